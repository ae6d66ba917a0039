"""Settings of a script: a dict at its top, `key=value` on its command line, one clear line for a mistake."""

import difflib
import math
import sys
from contextlib import suppress

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError, safe_load


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, expected, found and the remedy, in one line."""


def nearest(name, names):
    """Returns: ' (did you mean "x"?)' for the closest of `names`, or a list of them when none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f' (did you mean "{close[0]}"?)' if close else f" (known: {', '.join(names)})"


def override(settings, arguments):
    """Apply `key=value` arguments to a dict of defaults.

    A value takes the type of the default it replaces; a default of None takes whatever YAML reads.
    Returns: an OmegaConf DictConfig, `settings.key` for each key.
    Raises: InputError for an unknown key, an argument without "=", or a value of another type.
    """
    settings = dict(settings)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise InputError(f'argument "{argument}": expected key=value')
        if key not in settings:
            raise InputError(f'unknown setting "{key}"{nearest(key, settings)}')
        settings[key] = _parse(key, text, settings[key])
    return OmegaConf.create(settings)


def _parse(key, text, default):
    if isinstance(default, str):
        return text
    try:
        value = safe_load(text)
    except YAMLError:
        value = text
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a text
        with suppress(ValueError):
            value = float(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if isinstance(default, list) and not isinstance(value, list):
        value = [value]
    if default is not None and type(value) is not type(default):
        raise InputError(f'setting "{key}": expected {type(default).__name__}, got "{text}"')
    return value


def check_numbers(settings, **limits):
    """limits: key=(lowest, highest). Raises: InputError for a setting that is neither None nor a number in them."""
    for key, (low, high) in limits.items():
        value = settings.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            limit = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number, at least {low:g}"
            raise InputError(f'setting "{key}": expected {limit}, got {value}')


def fill_settings(settings, *defaults):
    """Give the settings that are None what `defaults` say of them, mappings of which the last counts most."""
    for key, value in {key: value for own in defaults for key, value in own.items()}.items():
        if key in settings and settings[key] is None:
            settings[key] = value


def check_texts(settings, *keys):
    """Raises: InputError for a setting that is neither None nor a text."""
    for key in keys:
        if not isinstance(settings[key], str | None):
            raise InputError(f'setting "{key}": expected a text, got {settings[key]}; put it in quotes within quotes')


def read_yaml(path):
    """Returns: the DictConfig in a YAML file. Raises: InputError if it is missing or is no YAML mapping."""
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path}: expected a YAML mapping")
    return config


def run_script(main, settings, arguments=None):
    """Run `main(settings)` with key=value overrides, the command line's unless `arguments` are given.

    An InputError becomes one line and exit code 2.
    """
    try:
        main(override(settings, sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
