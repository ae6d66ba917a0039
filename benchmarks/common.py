"""What the benchmarks share: reports, choosing what to run, reading as invert.py does, composing changes."""

import json
import math

import numpy as np
import torch

import invert
from cldm.changes import MOTIONS, NO_CHANGE, similarity
from cldm.hints import wrap
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


def read_lines(file):
    """Returns: a list of what the lines of a file of JSON lines hold."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    return read_lines(out_dir / "results.jsonl")


def check_fits(model, data, where):
    """Raises: InputError if a control is not calibrated, or was not trained on numbers as a dataset has them.

    model: ControlLDM. data: TrainingData. where: the dataset's folder.
    """
    config = model.control_net.config
    if config.error_scale is None:
        raise InputError("model_path: expected a control that was trained to its end, with error bars")
    numbers = list(config.control_names), list(config.periods), model.control_net.uses_reference
    found = data.names or numbers[0], data.periods_beside(numbers[1]), data.has_references
    if numbers != found or data.controls.shape[1] != len(numbers[0]):
        expected = f"{', '.join(numbers[0])}, periods {numbers[1]}, {'with' if numbers[2] else 'without'} references"
        raise InputError(f"data_root {where}: expected rows as the control was trained on: {expected}")


def read_by_control(model_path, rows, config, out):
    """Read Rows as invert.py does, in a folder `out`.

    Returns: found (n, d), half the 90% intervals (n, d), covariance (n, d, d), n lists of flags, seconds a row.
    """
    keys = ("target", "reference") if rows[0].reference else ("target",)
    lines = [dict(prompt=row.prompt) | {key: str(getattr(row, key).absolute()) for key in keys} for row in rows]
    write_lines(out / "targets.json", lines)
    results = read_targets(model_path, out / "targets.json", out / "ours")
    half = half_widths(results, config.periods)
    return dict(
        found=np.reshape([result["control"] for result in results], half.shape).tolist(),
        half=half.tolist(),
        covariance=[result["covariance"] for result in results],
        flags=[result["flags"] for result in results],
        seconds=float(np.mean([result["seconds"] for result in results])),
    )


def half_widths(results, periods):
    """Returns: (n, d), halves of the 90% intervals of dicts of results.jsonl. periods: as in the config."""
    low, high = np.moveaxis(np.array([result["interval90"] for result in results]), 2, 0)
    circle = np.array([period or np.inf for period in periods])
    return np.where(high > low, high - low, high - low + circle) / 2  # through the seam; equal ends: the whole circle


def significant(values):
    """Returns: a list of texts, numbers with three digits."""
    return [np.format_float_positional(value, 3, fractional=False, trim="-") for value in values]


def quantiles(errors, shares, digits=3):
    """Returns: a list of texts, quantiles of absolute errors."""
    return [f"{value:.{digits}f}" for value in np.quantile(np.abs(errors), shares)]


def compose(first, second, periods=None):
    """first, second: {name: number}, changes. Returns: likewise, the change that both make, one after the other.

    Numbers that are not in CHANGES add up. periods: {name: number} of those that go round, the shortest way.
    """
    given = [{name: change.get(name, none) for name, none in NO_CHANGE.items()} for change in (first, second)]
    matrix = similarity(*map(given[1].get, MOTIONS)) @ similarity(*map(given[0].get, MOTIONS))
    whole = {name: first[name] + second[name] for name in first} | decompose(matrix)
    whole["blur"] = math.hypot(given[0]["blur"] * given[1]["zoom"], given[1]["blur"])
    return shortest({name: whole[name] for name in first}, periods)


def inverse(change, periods=None):
    """change: {name: number}. Returns: likewise, the change back, which blurs nothing. periods: as in compose."""
    given = {name: change.get(name, none) for name, none in NO_CHANGE.items()}
    back = {name: -value for name, value in change.items()} | {"blur": 0.0}
    back |= decompose(np.linalg.inv(similarity(*map(given.get, MOTIONS))))
    return shortest({name: back[name] for name in change}, periods)


def shortest(change, periods):
    """Returns: a change, {name: number}, with those of `periods`, {name: number} or None, within half a period."""
    values = torch.tensor([*change.values()], dtype=torch.float64)
    return dict(zip(change, wrap(values, [(periods or {}).get(name) for name in change]).tolist()))


def decompose(matrix):
    """matrix: as similarity returns it. Returns: {name: number} of MOTIONS."""
    rotation, zoom = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0])), float(np.linalg.det(matrix)) ** 0.5
    return dict(zip(MOTIONS, (rotation, zoom, float(matrix[0, 2]), float(matrix[1, 2]))))
