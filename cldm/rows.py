"""What is to be read: the pictures that invert.py's settings name, and the numbers that need not be found."""

import glob
import re
from functools import partial
from pathlib import Path

from tqdm import tqdm

from cldm.dataset import Row, iterate_rows, parse_control
from cldm.pairs import SUFFIXES, list_pictures
from ldm.files import find_path, leave_out
from ldm.settings import InputError, check_used, nearest


def find_rows(s, defaults, control_net):
    """Find the pictures to read: one target, those of a folder or of a glob, or the rows of a prompt.json.

    s: Settings with model_path, targets, target_image_path, input_image_path and prompt. defaults: theirs. The default
    reference belongs to the default target alone. control_net: the NumericControlNet that will read them.
    Returns: a function that iterates over the Rows, of which millions may be there; their number.
    Raises: InputError if there are none, or if they do not fit the control. Pictures are not looked at.
    """
    own_reference, own_target = (s[key] != defaults[key] for key in ("input_image_path", "target_image_path"))
    demo = control_net.uses_reference and not s.targets and not own_target
    reference = find_path(s.input_image_path) if s.input_image_path and (own_reference or demo) else None
    if reference and own_reference and not s.targets and not own_target:
        raise InputError("input_image_path: picture A alone; give picture B too, target_image_path")
    if not (control_net.uses_reference or s.targets or own_target):
        raise InputError(f"model_path {s.model_path}: give the picture that it reads, target_image_path, or targets")
    rows, names, count = find_targets(s, defaults, reference), control_net.config.control_names, 0
    for row in tqdm(rows(), "looking at the rows", delay=2, leave=False):
        count += 1
        if control_net.uses_reference and not row.reference:
            what = f"model_path {s.model_path} reads changes between two pictures"
            mend = f'{row.place} has no "reference"; every row needs one' if row.place else "give input_image_path too"
            raise InputError(f"{what}: {mend}")
        if row.reference and not control_net.uses_reference:
            raise InputError(f"model_path {s.model_path} takes no reference: leave out {row.reference}")
        if row.control and len(row.control) != len(names):
            expected = f"{len(names)} number(s) ({', '.join(names)})"
            raise InputError(f"{s.targets}, {row.target}: the model takes {expected}, got {row.control}")
    return rows, count


def find_targets(s, defaults, reference):
    """As find_rows, unchecked. reference: Path or None, picture A of all pictures but those of a prompt.json."""
    if not s.targets:
        return partial(iter, [Row(None, find_path(s.target_image_path), s.prompt, reference)])
    check_used(s, defaults, "with targets", "target_image_path")
    path = find_path(s.targets)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        if s.prompt or reference:
            key = "prompt" if s.prompt else "input_image_path"
            raise InputError(f'setting "{key}": has no effect with targets, whose rows say it; leave it out')
        return partial(iterate_rows, path, known=False)
    if path.exists():
        files = list_pictures(path) if path.is_dir() else [path]
    else:
        files = glob.glob(str(path), recursive=True)
    if not files:
        raise InputError(f'targets {path}: not there; expected a folder, pictures like "photos/*.jpg" or a prompt.json')
    files = list(map(str, files))  # a fifth of the memory that paths take
    if not (files := leave_out(files, s.get("out_dir"))):
        raise InputError(f"targets {path}: all of them lie in out_dir, {s.out_dir}; choose another one")
    files.sort(key=natural)
    return lambda: (Row(None, Path(file), s.prompt, reference) for file in files)


def natural(name):
    """Returns: by what names are sorted so that 2 comes before 10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split("([0-9]+)", name))]


def parse_known(text, names):
    """Read "zoom=1,exposure=0". Returns: {name: number}. Raises: InputError for what is not among `names`."""
    known = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            (known[name],) = parse_control(value)
        except ValueError:
            raise InputError(f'setting "known": expected name=number, got "{part}"') from None
        if name not in names:
            raise InputError(f'setting "known": unknown number "{name}"{nearest(name, names)}')
        if name == "zoom" and known[name] <= 0:
            raise InputError(f'setting "known": zoom is a ratio, above 0, got {value}')
    if len(known) == len(names):
        raise InputError(f'setting "known": all of {", ".join(names)} are given, nothing is left to read')
    return known
