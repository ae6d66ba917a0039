"""What invert.py leaves and says: results.jsonl, which a killed run is resumed from, a table, a summary of many."""

import csv
import json
import os
from contextlib import suppress
from functools import partial
from itertools import chain

import numpy as np
from tqdm import tqdm

from cldm.confidence import FLAGS, tell_value
from cldm.report import describe_flags, describe_row, tell_names
from cldm.series import Series, draw_series, listed
from ldm.files import digest, find_path, write_whole, writing
from ldm.settings import InputError

OF_ROW = "reference", "target", "time", "prompt", "source"  # keys of what describe_row says


def resume(out_dir, config, about, rows, count):
    """Take up results.jsonl where it ends, and write down in settings.yaml what its results depend on.

    config: of the control. about: {what: value}, of settings and digests. rows: an iterator over `count` Rows, from
    which those that were read are taken.
    Returns: the number of those. Raises: InputError if the results are of something else.
    """
    file, settings_file, done, end = out_dir / "results.jsonl", out_dir / "settings.yaml", 0, 0
    if file.exists():
        what = "results of another model, other targets or settings; delete it, or choose another out_dir"
        other = InputError(f"{file}: {what}")
        try:
            if json.loads(settings_file.read_text()) != about:
                raise other
        except (OSError, ValueError):
            raise other from None
        with open(file, "rb") as lines:
            for line in tqdm(lines, "checking what was read", count, delay=2, leave=False):
                if not line.endswith(b"\n"):  # torn off by a kill
                    break
                row = next(rows, None)
                if row is None or not (result := parse_line(line, describe_row(config, row))):
                    raise other
                if is_changed(row, result):
                    what = f"line {done + 1}: {row.target} has changed since it was read; delete this line and those"
                    raise InputError(f"{file} {what} after it to go on from there, or choose another out_dir")
                done, end = done + 1, end + len(line)
        with writing(file):
            os.truncate(file, end)
        print(f"going on after {done} of {count} targets")
    write_whole(settings_file, lambda partial: partial.write_text(json.dumps(about, indent=1)))
    return done


def parse_line(line, asked):
    """Returns: the dict in a line of results.jsonl; None if it is no such line, or not of the row `asked` describes."""
    try:
        result = json.loads(line)
        same = all(result.get(key) == asked.get(key) for key in OF_ROW) and {"flags", "control", "sha256"} <= {*result}
    except (ValueError, AttributeError):
        return None
    return result if same else None


def when_changed(row):
    """Returns: when each of a Row's pictures was last written, in nanoseconds; None for what is not there."""
    changed = dict.fromkeys(row.pictures)
    for file in changed:
        with suppress(OSError):  # a name may be too long
            changed[file] = file.stat().st_mtime_ns if file.is_file() else None
    return [changed[file] for file in row.pictures]


def fingerprint(row):
    """Returns: what tells later whether a Row's pictures have changed, for its line of results.jsonl."""
    changed, found = when_changed(row), ""
    with suppress(OSError):  # no permission
        found = "" if None in changed else digest(row.pictures)
    return dict(changed=changed, sha256=found)


def is_changed(row, result):
    """Returns: whether a Row's pictures are not those that were read; only what was written since is read again."""
    return when_changed(row) != result["changed"] and fingerprint(row)["sha256"] != result["sha256"]


def digest_model(path, base):
    """Returns: a text that changes with the files of a control's folder, but for checkpoints, and of its base."""
    kinds = (".json", ".yaml", ".safetensors")
    files = [file for file in find_path(path).iterdir() if file.suffix in kinds or file.name == "unet"]
    return digest([*sorted(files), find_path(base)])


def tell_reading(config, reading, result):
    """Print what was read from one target, with its flags. result: as describe_reading has it."""
    count = len(config.control_names)
    errors = reading.std[0].tolist() if reading.calibrated else [None] * count
    parts = reading.control[0].tolist(), errors, reading.given[0].tolist()
    for name, unit, value, std, given in zip(tell_names(config), config.control_units, *parts):
        print(f"{name}: {tell_value(value, None if given else std)} {unit}".rstrip() + " (given)" * given)
    for flag, text in describe_flags(result["flags"], result).items():
        print(f"{flag}: {text}")
    if not result["flags"]:
        print("no flags")


def tabulate(result):
    """Returns: the row of results.csv for a dict of results.jsonl, empty where nothing was read."""
    count = len(result["names"])
    columns = (listed(result[key], count, "") for key in ("control", "std"))
    numbers = zip(*columns, *zip(*listed(result["interval90"], count, ("", ""))))
    return [result["target"], result.get("time"), *chain.from_iterable(numbers), " ".join(result["flags"])]


def write_table(file, results, series):
    """Write results.csv to an open file, and gather its numbers in a Series. results: dicts of results.jsonl."""
    table = csv.writer(file)
    names = [f"{name}{what}" for name in series.config.control_names for what in ("", " std", " low", " high")]
    table.writerow(["file", "time", *names, "flags"])
    for result in results:
        table.writerow(tabulate(result))
        series.add(result)


def save_series(out_dir, config, count):
    """Make results.csv and series.png of results.jsonl, which has `count` lines, and print what they come to."""
    series = Series(config)

    def write(partial):
        with (
            open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
            open(out_dir / "results.jsonl", "rb") as lines,
        ):
            lines = tqdm(lines, "making results.csv", count, delay=2, leave=False)
            write_table(file, map(json.loads, lines), series)

    write_whole(out_dir / "results.csv", write)
    figure = draw_series(series)
    write_whole(out_dir / "series.png", partial(figure.savefig, format="png", dpi=100))
    summarize(config, series)


def summarize(config, series):
    """Print the errors of a Series where they are known, its flags, model calls and seconds."""
    count, unread = len(series), series.flags["unreadable"]
    _, _, bars, errors, *_ = series.arrays()
    known = ~np.isnan(errors[:, 0])
    numbers = zip(config.control_names, config.control_units, np.abs(errors[known]).T, bars[known].T)
    for name, unit, error, bar in numbers if known.any() else ():
        if not error.any() and not bar.any():  # the number was given
            continue
        middle, most, worst = np.quantile(error, (0.5, 0.95, 1))
        share = "" if series.flags["uncalibrated"] else f"; interval90 holds the truth for {(error <= bar).mean():.0%}"
        text = f"{name}: error median {middle:.3g}, 95% within {most:.3g}, worst {worst:.3g} {unit}".rstrip()
        print(f"{text}{share} of {len(error)} targets")
    for flag, meaning in FLAGS.items():
        if flagged := series.flags[flag]:
            print(f"{flag}: {flagged} of {count} ({meaning})")
    calls, seconds = (total / max(1, count - unread) for total in (series.model_calls, series.seconds))
    print(f"at most {series.iterations} iterations; {calls:.0f} model calls, {seconds:.2f} seconds a target")
