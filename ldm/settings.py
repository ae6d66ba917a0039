"""Settings of a script: a dict at its top, `key=value` on its command line, one clear line for a mistake.

Nothing imported here takes long, so that `-h` and a misspelt setting are answered at once.
"""

import argparse
import ast
import copy
import math
import os
import re
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from ldm.schema import FLAG, InputError, Rule, Settings, expect, nearest, number, reason

TEXTS = ("a_prompt", "n_prompt")  # settings that are texts though their default is None
WORDS = {"true": True, "yes": True, "false": False, "no": False, "null": None, "none": None}
RULES = {  # type of a default -> what may replace it
    bool: FLAG,
    int: number(whole=True),
    float: number(),
    type(None): Rule("a finite number", lambda value: not isinstance(value, float) or math.isfinite(value)),
}

# How torch says, on a GPU and on a CPU, that memory ran out; and the settings that need least of it.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
LEAST_MEMORY = {"save_memory": "true", "batch_size": 1, "num_samples": 1, "draws": 4}


def override(settings, arguments):
    """Apply `key=value` arguments to a dict of defaults.

    A value takes the type of the default it replaces. A default of None takes a number, true, false, null, a YAML list
    or mapping, and else the text as it stands.
    Returns: Settings.
    Raises: InputError for an unknown key, an argument without "=", or a value of another type.
    """
    settings = Settings(copy.deepcopy(dict(settings)))
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
    if kind is list:
        return value if isinstance(value, list) else [value]
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    expect(f'setting "{key}": expected', value, RULES[kind])
    return float(value) if kind is float else value


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
    """Raises: InputError for a setting that is given, and is no number of that kind within its limits.

    limits: key=(lowest, highest). Infinity and NaN never pass.
    """
    for key, (low, high) in limits.items():
        if settings.get(key) is not None:
            expect(f'setting "{key}": expected', settings[key], number(low, high, whole=kind is int))


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


def _fail(error):
    print(f"error: {error}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def answer(file, *paths):
    """Answer `-h`, `--help` and mistaken settings of a script before it imports what takes seconds.

    file: the script's. paths: names of the paths that it takes beside its settings.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what the console's encoding lacks becomes "?"
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C among imports ends the script without a traceback
    arguments = sys.argv[1:]
    asked = {"-h", "--help"} & set(arguments)
    if asked or (paths and not arguments):
        print(describe_script(file), file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    settings = {key: default for key, (default, _) in read_settings(file)[0].items()}
    try:
        override(settings, split_arguments(arguments, settings, paths)[1])
    except InputError as error:
        _fail(error)


def run_script(main, settings, arguments=None, *, paths=(), resume=""):
    """Run `main(settings)` with key=value overrides, the command line's unless `arguments` are given.

    An InputError, a full disk or a lack of memory becomes one line and exit code 2; Ctrl-C one line and exit code 130.
    paths: as for `answer`; main is then called with the list of them too. resume: how a stopped run is continued.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given, overrides = split_arguments(sys.argv[1:] if arguments is None else arguments, settings, paths)
        main(override(settings, overrides), *([given] if paths else []))
    except KeyboardInterrupt:
        print(f"\nstopped; {resume}" if resume else "\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not (line := explain(error, settings)):
            raise
        _fail(line)


def explain(error, settings):
    """Returns: the line that tells an InputError, a full disk or a lack of memory; "" for an error of the program."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: cannot be read or written ({reason(error)})"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        less = [f"{key}={least}" for key, least in LEAST_MEMORY.items() if key in settings]
        return f"out of memory; the least is needed with {' '.join(less) or 'smaller pictures'}"
    return ""
