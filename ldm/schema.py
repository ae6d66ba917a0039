"""What configuration files and settings may say: read and written in one place, every value held against a Rule.

Nothing imported here takes long, so that a script can answer a misspelt setting at once.
"""

import difflib
import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

MISSPELT = 0.8  # likeness, as difflib has it, from which on a name is taken to be another one


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


class Rule(NamedTuple):
    """What a value must be."""

    expected: str  # in words
    holds: object  # value -> bool


TEXT = Rule("a text, in quotes where it looks like something else", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))


def number(low=-math.inf, high=math.inf, whole=False):
    """Returns: the Rule of a finite number from low to high; whole: of one that 64 bits hold."""
    limits = f" from {low:g} to {high:g}" if high < math.inf else f", at least {low:g}" if low > -math.inf else ""
    kinds, largest = (int, 2**63 - 1) if whole else ((int, float), sys.float_info.max)
    low, high = max(low, -largest), min(high, largest)
    return Rule(
        f"a {'whole' if whole else 'finite'} number{limits}",
        lambda value: isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high,
    )


POSITIVE = Rule("a finite number above 0", lambda value: number(0).holds(value) and value > 0)


def one_of(*known):
    """Returns: the Rule of a text that is one of those."""
    return Rule(" or ".join(known), lambda value: isinstance(value, str) and value in known)


def or_null(rule):
    """Returns: the Rule of a value that may be null."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.holds(value))


def each(rule, count=None):
    """Returns: the Rule of a list of `count` values, or of any number of them."""

    def holds(value):
        return isinstance(value, list) and count in (None, len(value)) and all(map(rule.holds, value))

    return Rule(f"a list{'' if count is None else f' of length {count}'}, each {rule.expected}", holds)


def expect(start, value, rule):
    """Raises: InputError, which begins with `start`, unless the rule holds of the value."""
    if not rule.holds(value):
        found = json.dumps(value, ensure_ascii=False, default=str)
        raise InputError(f"{start} {rule.expected}, got {found[:80]}")


def check(where, config, schema, required=(), complete=True):
    """Compare a dict with a schema, {key: Rule}.

    where: the file. required: keys that must be there. complete: whether a key that the schema lacks is a mistake; else
    it is one only if a key that is missing is spelt much like it.
    Raises: InputError with the file, the key, what was expected and what was found.
    """
    for key in required:
        if key not in config:
            raise InputError(f'{where}: no "{key}" in it, expected {schema[key].expected}')
    for key, value in config.items():
        if key in schema:
            if not schema[key].holds(value):
                expect(f'{where}: "{key}" must be', value, schema[key])
        elif complete or is_misspelt(str(key), tuple(own for own in schema if own not in config)):
            raise InputError(f'{where}: unknown key "{key}"{nearest(str(key), list(schema))}')


@lru_cache(1024)  # a million rows have the same keys
def is_misspelt(name, names):
    """Returns: whether a name is much like one of `names`, a tuple, or short for one."""
    name = name.casefold()
    short = len(name) > 2 and any(own.startswith(name) for own in names)
    return short or bool(difflib.get_close_matches(name, names, 1, MISSPELT))


def nearest(name, names):
    """Returns: ' (did you mean "x"?)' for the closest of `names`, or a list of them when none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f' (did you mean "{close[0]}"?)' if close else f" (known: {', '.join(names)})"


def reason(error):
    """Returns: the one line of an error that says what went wrong, whichever library raised it."""
    if mark := getattr(error, "problem_mark", None):  # YAML's
        return f"line {mark.line + 1}: {error.problem}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(":")]
    return getattr(error, "strerror", None) or (lines or [type(error).__name__])[0]


def read_config(path):
    """Returns: the Settings in a .json or YAML file; `${...}` in its texts is left as it stands.

    Raises: InputError if there are none.
    """
    form = "JSON" if Path(path).suffix == ".json" else "YAML"
    try:
        if form == "JSON":
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # parsers raise many kinds
        raise InputError(f"{path}: cannot be read as {form} ({reason(error)})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a {form} mapping")
    return Settings(config)


def write_yaml(values, path):
    """Write a mapping so that read_config returns the same."""
    OmegaConf.save(OmegaConf.create(dict(values)), path)
