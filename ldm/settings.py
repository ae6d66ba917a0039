"""Settings of a script: a dict at its top, `key=value` on its command line, one clear line for a mistake.

Nothing here takes long to import, so that `-h` and a misspelt setting are answered at once.
"""

import ast
import codecs
import difflib
import errno
import io
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import tokenize
from contextlib import suppress
from pathlib import Path

import yaml


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, expected, found and the remedy, in one line."""


class Settings(dict):
    """A dict whose keys are attributes too. Nothing is interpolated: what is text in it stays that text."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f'no setting "{key}"') from None


KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "a text"}
# Settings, and keys of YAML files, whose values are text whatever they look like: 2024-05-01, 007, yes, ${x}.
TEXTS = ("a_prompt", "n_prompt", "base", "architecture", "precision", "prediction_type", "names", "units")


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, 010 is ten, a date is text; what TEXTS names is text."""

    def construct_settings(self, node):
        for key, value in node.value:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for part in parts if key.value in TEXTS else []:
                if isinstance(part, yaml.ScalarNode) and not part.tag.endswith(":null"):
                    part.tag = "tag:yaml.org,2002:str"
        return Settings(self.construct_mapping(node, deep=True))


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads."""


for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":bool", ":null"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern in {
        "int": r"[-+]?\d[\d_]*",
        "float": r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan",
        "null": "None",
    }.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"({_pattern})$"), list("-+.0123456789N"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_settings)
_Dumper.add_representer(Settings, yaml.SafeDumper.represent_dict)


def read_yaml(path):
    """Returns: the Settings in a YAML file. Raises: InputError if it is missing or is no YAML mapping."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            config = yaml.load(file, _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(config, Settings):
        raise InputError(f"{path}: expected a YAML mapping")
    return config


def write_yaml(values, path):
    """Write a mapping, so that read_yaml returns the same."""
    Path(path).write_text(yaml.dump(Settings(values), Dumper=_Dumper, sort_keys=False), encoding="utf-8")


# How torch says, on a GPU and on a CPU, that memory ran out; and the settings that need least of it.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.I)
LEAST_MEMORY = {"save_memory": "true", "batch_size": 1, "num_samples": 1, "draws": 4}


def nearest(name, names):
    """Returns: ' (did you mean "x"?)' for the closest of `names`, or a list of them when none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f' (did you mean "{close[0]}"?)' if close else f" (known: {', '.join(names)})"


def override(settings, arguments):
    """Apply `key=value` arguments to a dict of defaults.

    A value takes the type of the default it replaces; a default of None takes whatever YAML reads, but a text as it is.
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
    if isinstance(default, str) or (default is None and key in TEXTS and text not in ("None", "null")):
        return text
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, str):
        value = text  # with what YAML takes for a comment
    kind = type(default)
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


def check_numbers(settings, kind=float, /, **limits):
    """Check settings that are given, and make whole numbers of those that should be.

    kind: float, or int where a whole number is needed. limits: key=(lowest, highest); what is not finite never passes.
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


def check_kinds(settings, kind, *keys):
    """Raises: InputError for a setting that is neither None nor of that type, one of KINDS."""
    for key in keys:
        if not isinstance(settings[key], kind | None):
            raise InputError(f'setting "{key}": expected {KINDS[kind]}, got {settings[key]}')


def check_used(settings, defaults, why, *keys):
    """Raises: InputError for a setting that was given though it does nothing here: `why`."""
    for key in keys:
        if settings[key] != defaults[key]:
            raise InputError(f'setting "{key}": has no effect {why}; leave it out')


def read_settings(file):
    """Read a script's `settings = dict(…)` from its source, without running it.

    Returns: {key: (default, comment, heading)}, texts "" where there are none; its docstring.
    """
    source = Path(file).read_text(encoding="utf-8")
    tree, found, heading = ast.parse(source), {}, ""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    (call,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "settings")
    for script in call.args:  # dict(test5.settings, …)
        found |= read_settings(Path(file).with_name(f"{script.value.id}.py"))[0]
    previous = call.lineno
    for keyword in call.keywords:
        for line in range(previous + 1, keyword.lineno):
            heading = comments[line].string.strip("# ") if line in comments else heading
        previous = keyword.end_lineno
        comment = comments[previous].string.strip("# ") if previous in comments else ""
        try:
            default = ast.literal_eval(keyword.value)
        except ValueError:  # edited into something to be computed: run_script will check it
            default = ast.get_source_segment(source, keyword.value)
        found[keyword.arg] = default, comment, heading
    return found, ast.get_docstring(tree)


def describe_script(file):
    """Returns: what `-h` prints: the docstring, and every setting with its default and its comment."""
    settings, docstring = read_settings(file)
    width = max(60, min(120, shutil.get_terminal_size().columns))
    lines, last = [docstring, "", "Settings, with their defaults; give others as key=value:"], ""
    given = {key: f"  {key}={default}" for key, (default, *_) in settings.items()}
    column = 2 + min(34, max(map(len, given.values())))
    for key, (_, comment, heading) in settings.items():
        if heading != last:
            lines += ["", f"  {heading}:"]
            last = heading
        indent = " " * column
        first = given[key].ljust(column)
        if len(first) > column and comment:
            lines += [first]
            first = indent
        lines += textwrap.wrap(comment, width, initial_indent=first, subsequent_indent=indent) or [first.rstrip()]
    return "\n".join(lines)


def split_arguments(arguments, settings, names):
    """Returns: the paths among a script's arguments, which it calls `names`; the others, key=value.

    A path may have a "=" in it, as Lightning's epoch=1-step=2.ckpt has.
    Raises: InputError if there are more or fewer than `names`.
    """
    if not names:
        return [], arguments
    paths, others = [], []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        path = not equals or (key not in settings and (not key.isidentifier() or os.path.exists(argument)))
        (paths if path else others).append(argument)
    if len(paths) != len(names) and all(other.partition("=")[0] in settings for other in others):
        raise InputError(f"expected {len(names)} paths, {' '.join(names)}, got {len(paths)}; -h tells more")
    return paths, others


# What a console of another encoding than UTF-8 is shown.
PLAIN = {"±": "+-", "°": " deg", "−": "-", "—": "-", "…": "...", "×": "x"}
codecs.register_error("plain", lambda e: ("".join(PLAIN.get(c, "?") for c in e.object[e.start : e.end]), e.end))


def _plain_console():
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def _fail(error):
    print(f"error: {error}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def _stop_importing(*_):
    os.write(2, b"\nstopped\n")
    os._exit(130)


def answer(file, *paths):
    """Answer `-h`, `--help` and mistaken settings of a script, before it imports what takes seconds.

    file: the script's. paths: names of the paths that it takes beside its settings.
    """
    _plain_console()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C within imports is a traceback
        signal.signal(signal.SIGINT, _stop_importing)
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        with suppress(BrokenPipeError):  # `-h | head`
            print(describe_script(file), flush=True)
        os._exit(0)
    if paths and not arguments:
        print(describe_script(file), file=sys.stderr)
        sys.exit(2)
    settings = {key: default for key, (default, *_) in read_settings(file)[0].items()}
    try:
        override(settings, split_arguments(arguments, settings, paths)[1])
    except InputError as error:
        _fail(error)


def run_script(main, settings, arguments=None, *, paths=(), resume=""):
    """Run `main(settings)` with key=value overrides, the command line's unless `arguments` are given.

    An InputError becomes one line and exit code 2, as does a full disk; Ctrl-C becomes one line and exit code 130.
    paths: as `answer` has them; then it is main(settings, list of paths). resume: how a run that was stopped goes on.
    """
    _plain_console()
    if signal.getsignal(signal.SIGINT) is _stop_importing:
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
