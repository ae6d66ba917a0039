"""Settings of a script: a dict at its top, `key=value` on its command line, one clear line for a mistake.

Nothing imported here takes long, so that `-h` and a misspelt setting are answered at once.
"""

import argparse
import ast
import difflib
import errno
import math
import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, expected, found and the remedy, in one line."""


class Settings(dict):
    """A dict whose keys are attributes too."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f'no setting "{key}"') from None


KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "a text"}
TEXTS = ("a_prompt", "n_prompt")  # settings that are texts though their default is None
WORDS = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None}

# How torch says, on a GPU and on a CPU, that memory ran out; and the settings that need least of it.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
LEAST_MEMORY = {"save_memory": "true", "batch_size": 1, "num_samples": 1, "draws": 4}


def read_mapping(path, form, load):
    """Returns: the Settings that `load(path)` finds in a file of that form. Raises: InputError if there are none."""
    try:
        config = load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # parsers raise many kinds
        why = f"{error} ({type(error).__name__})".splitlines()[0]
        raise InputError(f"{path}: cannot be read as {form}: {why}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a {form} mapping")
    return Settings(config)


def read_yaml(path):
    """Returns: the Settings in a YAML file; `${...}` in its texts is left as it stands."""
    return read_mapping(path, "YAML", lambda file: OmegaConf.to_container(OmegaConf.load(file), resolve=False))


def write_yaml(values, path):
    """Write a mapping so that read_yaml returns the same."""
    OmegaConf.save(OmegaConf.create(dict(values)), path)


def nearest(name, names):
    """Returns: ' (did you mean "x"?)' for the closest of `names`, or a list of them when none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f' (did you mean "{close[0]}"?)' if close else f" (known: {', '.join(names)})"


def override(settings, arguments):
    """Apply `key=value` arguments to a dict of defaults.

    A value takes the type of the default it replaces. A default of None takes a number, true, false, null, a YAML list
    or mapping, and else the text as it stands.
    Returns: Settings.
    Raises: InputError for an unknown key, an argument without "=", or a value of another type.
    """
    settings = Settings({key: value[:] if isinstance(value, list) else value for key, value in settings.items()})
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise InputError(f'argument "{argument}": expected key=value')
        if key not in settings:
            raise InputError(f'unknown setting "{key}"{nearest(key, settings)}')
        settings[key] = _parse(key, text, settings[key])
    return settings


def _parse(key, text, default):
    kind = type(default)
    if kind is str or (key in TEXTS and text.lower() not in ("none", "null")):
        return text
    value = _read(text)
    if kind is list and not isinstance(value, list):
        value = [value]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if default is not None and type(value) is not kind:
        raise InputError(f'setting "{key}": expected {KINDS[kind]}, got "{text}"')
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'setting "{key}": expected a finite number, got "{text}"')
    return value


def _read(text):
    """Returns: the number, the word, the YAML list or mapping that a text is, or else the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if text.startswith(("[", "{")):
        with suppress(Exception):  # YAML's, OmegaConf's and Python's: then it is no list
            return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    return WORDS.get(text.lower(), text)


def check_numbers(settings, kind=float, /, **limits):
    """Check settings that are given, and turn them into whole numbers where kind is int.

    limits: key=(lowest, highest). Infinity and NaN never pass.
    Raises: InputError for a setting that is neither None nor such a number.
    """
    for key, (low, high) in limits.items():
        value = settings.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        most = min(high, sys.float_info.max if kind is float else 2**63 - 1)
        if not number or not low <= value <= most or (kind is int and value != int(value)):
            limit = f" from {low:g} to {high:g}" if math.isfinite(high) else f", at least {low:g}"
            raise InputError(f'setting "{key}": expected {KINDS[kind]}{limit}, got {value}')
        settings[key] = int(value) if kind is int else value


def check_used(settings, defaults, why, *keys):
    """Raises: InputError for a setting that was given though it does nothing here: `why`."""
    for key in keys:
        if settings[key] != defaults[key]:
            raise InputError(f'setting "{key}": has no effect {why}; leave it out')


def read_settings(file):
    """Read a script's `settings = dict(…)` from its source, without running it.

    Returns: {key: (default, comment)}; the script's docstring.
    """
    source = Path(file).read_text(encoding="utf-8")
    tree, lines, found = ast.parse(source), source.splitlines(), {}
    (call,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "settings")
    for script in call.args:  # dict(test5.settings, …)
        found |= read_settings(Path(file).with_name(f"{script.value.id}.py"))[0]
    for keyword in call.keywords:
        try:
            default = ast.literal_eval(keyword.value)
        except ValueError:  # computed: run_script will check it
            default = ast.unparse(keyword.value)
        found[keyword.arg] = default, lines[keyword.end_lineno - 1].partition("  # ")[2]
    return found, ast.get_docstring(tree)


def describe_script(file):
    """Returns: what `-h` prints: the docstring, and every setting with its default and its comment."""
    settings, docstring = read_settings(file)
    form = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36)
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, formatter_class=form, add_help=False)
    parser.description = docstring
    group = parser.add_argument_group("settings, with their defaults; give others as key=value")
    for key, (default, comment) in settings.items():
        group.add_argument(key, metavar=f"{key}={default}", help=comment.replace("%", "%%"))
    return parser.format_help()


def split_arguments(arguments, settings, names):
    """Returns: the paths among a script's arguments, which it calls `names`; the others, key=value.

    A path may have a "=" in it, as Lightning's epoch=1-step=2.ckpt has.
    Raises: InputError if there are more or fewer than `names`.
    """
    paths, others = [], []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        setting = equals and (key in settings or (key.isidentifier() and not os.path.exists(argument)))
        (others if setting or not names else paths).append(argument)
    if len(paths) != len(names) and all(other.partition("=")[0] in settings for other in others):
        raise InputError(f"expected {len(names)} paths, {' '.join(names)}, got {len(paths)}; -h tells more")
    return paths, others


def _any_console():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what its encoding lacks becomes "?"


def _fail(error):
    print(f"error: {error}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def answer(file, *paths):
    """Answer `-h`, `--help` and mistaken settings of a script before it imports what takes seconds.

    file: the script's. paths: names of the paths that it takes beside its settings.
    """
    _any_console()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among imports ends the script without a traceback
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        with suppress(BrokenPipeError):  # `-h | head`
            print(describe_script(file), flush=True)
        os._exit(0)
    if paths and not arguments:
        print(describe_script(file), file=sys.stderr)
        sys.exit(2)
    settings = {key: default for key, (default, _) in read_settings(file)[0].items()}
    try:
        override(settings, split_arguments(arguments, settings, paths)[1])
    except InputError as error:
        _fail(error)


def run_script(main, settings, arguments=None, *, paths=(), resume=""):
    """Run `main(settings)` with key=value overrides, the command line's unless `arguments` are given.

    An InputError, a full disk and a lack of memory become one line and exit code 2; Ctrl-C one line and exit code 130.
    paths: as for `answer`; main is then called with the list of them too. resume: how a stopped run is continued.
    """
    _any_console()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given, overrides = split_arguments(sys.argv[1:] if arguments is None else arguments, settings, paths)
        main(override(settings, overrides), *([given] if paths else []))
    except InputError as error:
        _fail(error)
    except KeyboardInterrupt:
        print(f"\nstopped; {resume}" if resume else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO):
            raise
        _fail(f"{error.filename or 'a file'}: cannot be written ({error.strerror})")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        less = [f"{key}={least}" for key, least in LEAST_MEMORY.items() if key in settings]
        _fail(f"out of memory; the least is needed with {' '.join(less) or 'smaller pictures'}")
