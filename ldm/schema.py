"""What a file of settings may say: a rule for every key, checked where the file is read."""

import json
import sys
from typing import NamedTuple

from ldm.settings import InputError, nearest

LARGEST = sys.float_info.max


class Rule(NamedTuple):
    """What a value must be."""

    expected: str  # in words
    holds: object  # value -> bool


TEXT = Rule("a text", lambda value: isinstance(value, str))
FLAG = Rule("true or false", lambda value: isinstance(value, bool))


def number(low=-LARGEST, high=LARGEST, whole=False):
    """Returns: the Rule of a finite number from low to high."""
    limits = f" from {low:g} to {high:g}" if high < LARGEST else f", at least {low:g}" if low > -LARGEST else ""
    kinds = int if whole else (int, float)
    return Rule(
        f"a {'whole' if whole else 'finite'} number{limits}",
        lambda value: isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high,
    )


POSITIVE = Rule("a finite number above 0", lambda value: number(0).holds(value) and value > 0)


def one_of(*known):
    """Returns: the Rule of a text that is one of those."""
    return Rule(" or ".join(known), lambda value: isinstance(value, str) and value in known)


def or_null(rule):
    """Returns: the Rule of a value that may be left out."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.holds(value))


def each(rule, count=None):
    """Returns: the Rule of a list, of `count` values or any number of them."""
    many = "" if count is None else f" of length {count}"
    return Rule(
        f"a list{many}, each {rule.expected}",
        lambda value: (
            isinstance(value, list) and (count is None or len(value) == count) and all(rule.holds(v) for v in value)
        ),
    )


def check(where, config, schema, required=(), complete=True, section=""):
    """Compare a dict with a schema, {key: Rule, or the schema of a section}.

    where: the file. required: keys that must be there. complete: whether a key that the schema lacks is a mistake.
    Raises: InputError with the file, the key, what was expected and what was found.
    """
    for key in required:
        if key not in config:
            raise InputError(f'{where}: no "{section}{key}" in it, expected {expected(schema[key])}')
    for key, value in config.items():
        if key not in schema:
            if complete:
                raise InputError(f'{where}: unknown key "{section}{key}"{nearest(str(key), list(schema))}')
        elif isinstance(schema[key], dict) and isinstance(value, dict):
            check(where, value, schema[key], complete=complete, section=f"{section}{key}.")
        elif isinstance(schema[key], dict) or not schema[key].holds(value):
            found = json.dumps(value, ensure_ascii=False, default=str)
            raise InputError(f'{where}: "{section}{key}" must be {expected(schema[key])}, got {found[:80]}')


def expected(rule):
    """Returns: in words, what a value must be."""
    return f"a mapping of {', '.join(rule)}" if isinstance(rule, dict) else rule.expected


def read_json(path):
    """Returns: the dict in a JSON file. Raises: InputError if it is missing or is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object")
    return config
