"""What a configuration file may say: a rule for every key, checked where the file is read."""

import json
import sys
from typing import NamedTuple

from ldm.settings import InputError, nearest, read_mapping

LARGEST = sys.float_info.max


class Rule(NamedTuple):
    """What a value must be."""

    expected: str  # in words
    holds: object  # value -> bool


TEXT = Rule("a text, in quotes where it looks like something else", lambda value: isinstance(value, str))
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
    """Returns: the Rule of a value that may be null."""
    return Rule(f"{rule.expected}, or null", lambda value: value is None or rule.holds(value))


def each(rule, count=None):
    """Returns: the Rule of a list of `count` values, or of any number of them."""

    def holds(value):
        return isinstance(value, list) and count in (None, len(value)) and all(map(rule.holds, value))

    return Rule(f"a list{'' if count is None else f' of length {count}'}, each {rule.expected}", holds)


def check(where, config, schema, required=(), complete=True):
    """Compare a dict with a schema, {key: Rule}.

    where: the file. required: keys that must be there. complete: whether a key that the schema lacks is a mistake.
    Raises: InputError with the file, the key, what was expected and what was found.
    """
    for key in required:
        if key not in config:
            raise InputError(f'{where}: no "{key}" in it, expected {schema[key].expected}')
    for key, value in config.items():
        if key in schema and not schema[key].holds(value):
            found = json.dumps(value, ensure_ascii=False, default=str)
            raise InputError(f'{where}: "{key}" must be {schema[key].expected}, got {found[:80]}')
        if complete and key not in schema:
            raise InputError(f'{where}: unknown key "{key}"{nearest(str(key), list(schema))}')


def read_json(path):
    """Returns: the dict in a JSON file. Raises: InputError if it is missing or is no JSON object."""
    return read_mapping(path, "JSON", lambda file: json.loads(file.read_text(encoding="utf-8")))
