"""What the benchmarks share: folders for their reports, choosing what to run, reading as invert.py does."""

import json

import numpy as np

import invert
from ldm.files import report_folder, write_whole
from ldm.settings import InputError, nearest, override


def start_report(path, report, key, *others):
    """Make a folder as report_folder does, and a first report at once, so that a run that was killed can start again.

    Returns: the folder's Path.
    """
    folder = report_folder(path, report, key, *others)
    if not (folder / report).exists():
        save_json(folder / report, {key: None})
    return folder


def save_json(path, value):
    write_whole(path, lambda file: file.write_text(json.dumps(value, indent=1) + "\n"))


def choose(asked, known, setting):
    """asked: "all", or some of the known names with commas between them. Returns: a list of names.

    Raises: InputError for an unknown name.
    """
    names = list(known) if asked == "all" else asked.split(",")
    for name in names:
        if name not in known:
            raise InputError(f'{setting}: no "{name}"{nearest(name, known)}')
    return names


def read_targets(model_path, rows, out_dir):
    """Run invert.py on the rows of a prompt.json. Returns: a list of dicts, as results.jsonl has them."""
    arguments = [f"model_path={model_path}", f"targets={rows}", "figures=false", f"out_dir={out_dir}"]
    invert.main(override(invert.settings, arguments))
    return [json.loads(line) for line in (out_dir / "results.jsonl").read_text().splitlines()]


def quantiles(errors, shares, digits=3):
    """Returns: a list of texts, quantiles of absolute errors."""
    return [f"{value:.{digits}f}" for value in np.quantile(np.abs(errors), shares)]
