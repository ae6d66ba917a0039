"""Reading a real meter: error against the number of labelled pictures, what alternatives reach, and mishaps.

    python benchmarks/meter.py folder=FOLDER                                  # all, about three hours on two cores
    python benchmarks/meter.py folder=FOLDER counts=60 model_path=runs/meter  # with a control trained before

FOLDER is one that dataForTrain/make_meter.py takes. For every count, the control is trained by tutorial_train.py's own
settings on so many labelled pictures of every dial, the regressor on the same ones, and image processing learns from
them how the dials are mounted; all then read the same pictures of those that are left. Errors are against the labels,
which go in tenths, and against the value that the next dial tells, less a constant of every dial that its labelled
pictures tell. At 60 labelled pictures, mishaps are read too. Prints the tables of docs/results.md; leaves plot.png,
mishaps.png and results.json. Started again with the same out_dir, it trains nothing twice.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import each, expect, number
from ldm.settings import InputError, answer, check_numbers, override, run_script

settings = dict(
    folder="",  # of photographs and readings.csv
    counts=[5, 10, 20, 60, 200],  # labelled pictures of every dial
    methods="all",
    model_path="",  # a control trained on 60 labelled pictures a dial, in place of training one
    regressor_minutes=12.0,  # as long as a control is trained
    targets=400,  # read at every count
    mishaps="all",  # or some of them; "": none
    out_dir="outputs/meter",
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import random
import re
import shutil
from dataclasses import asdict
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.common import choose, quantiles, read_lines, save_json, start_report, write_lines
from benchmarks.meter_methods import MAIN, METHODS, SIZE, column
from benchmarks.mishaps import MISHAPS
from cldm.dataset import TRAINING_FILE
from cldm.report import COLOURS
from dataForTrain import make_meter
from dataForTrain.make_meter import PERIOD, TARGETS_FILE, shortest
from ldm.files import write_whole
from ldm.pictures import fit_picture, load_picture

READ = 60  # pictures of every mishap
HEADS = ["", "labelled", "median", "95% within", "worst", "within 0.1", "second truth: median", "95% within"]
HEADS += ["in the interval", "width, median", "flagged", "seconds", "training minutes"]
OTHER_PROMPT, UNTRAINED = "another dial's prompt", "a dial never trained"


def make_data(folder, s, count):
    """Make the dataset folder/data. Returns: the rows to read, spread over those that are left."""
    arguments = [f"folder={s.folder}", f"labelled={count}", f"out_dir={folder / 'data'}", "overwrite=true"]
    make_meter.main(override(make_meter.settings, arguments))
    rows = [row for row in read_lines(folder / "data" / TARGETS_FILE) if "source" in row]
    if not rows:
        raise InputError(
            f"folder {s.folder}: with {count} labelled pictures a dial to learn from, none is left to read"
        )
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(s.targets, len(rows))).round().astype(int)]


def errors(readings, rows, data):
    """Returns: (n,) errors against the labels; against what the next dials tell, NaN where they do not."""
    known = read_lines(data / TRAINING_FILE)
    offsets = {}
    for dial in {row["prompt"] for row in rows}:
        own = [row for row in known if row["prompt"] == dial and "value_from_next_dial" in row]
        differences = shortest(column(own, "source") - column(own, "value_from_next_dial"))
        offsets[dial] = np.median(differences) if own else math.nan
    second = column(rows, "value_from_next_dial") + [offsets[row["prompt"]] for row in rows]
    return shortest(readings.found - column(rows, "source")), shortest(readings.found - second)


def tabulate(readings, rows, data, minutes):
    """minutes: of training; None: unknown, or none. Returns: cells of a table's row."""
    first, second = errors(readings, rows, data)
    size, inside = np.abs(first), np.abs(first) <= readings.half
    return [
        *quantiles(first, [0.5, 0.95, 1]),
        f"{np.mean(size <= 0.1 + 1e-6):.0%}",
        *quantiles(second[np.isfinite(second)], [0.5, 0.95]),
        f"{inside.mean():.0%}",
        f"{2 * np.median(readings.half):.3f}",
        f"{np.mean(readings.flagged):.1%}",
        f"{readings.seconds:.3f}",
        "—" if minutes is None else f"{minutes:.1f}",
    ]


def print_table(heads, rows):
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for cells in rows:
        print(f"| {' | '.join(map(str, cells))} |")


def suffer(name, rows, folder):
    """Let a mishap happen to some rows. Returns: the rows to read, whose pictures lie in a folder."""
    rng, dials, result = random.Random(name), sorted({row["prompt"] for row in rows}), []
    if name == UNTRAINED:
        rows = [row for row in rows if row["prompt"] == dials[-1]]  # read under the prompts of the others
    for i, row in enumerate(rng.sample(rows, min(READ, len(rows)))):
        if name in MISHAPS:
            picture, value = MISHAPS[name](rng, load_picture(row["target"]), row["source"])
            file = folder / name.replace(" ", "_") / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
            row = {"source": value, "target": str(file.absolute()), "prompt": row["prompt"]}
        else:
            row = row | {"prompt": rng.choice([dial for dial in dials if dial != row["prompt"]])}
        result.append(row)
    return result


def draw_sheet(mishaps, file, shown=10):
    """Draw some pictures of every mishap, in a row each. mishaps: {name: rows}."""
    sheet = Image.new("RGB", (shown * SIZE, len(mishaps) * SIZE))
    for j, rows in enumerate(mishaps.values()):
        for i, row in enumerate(rows[:shown]):
            sheet.paste(fit_picture(load_picture(row["target"]), SIZE), (i * SIZE, j * SIZE))
    write_whole(file, partial(sheet.save, format="PNG"))


def draw_plot(sizes, file):
    """Plot errors over the number of labelled pictures. sizes: {method: {count: (n,) absolute errors}}."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for method, own in sizes.items():
        for share, style in ((0.5, "o-"), (0.95, "o:")):
            line = [np.quantile(size, share) for size in own.values()]
            label = f"{method}, {'median' if share == 0.5 else '95%'}"
            axes.loglog(list(own), line, style, color=COLOURS[list(METHODS).index(method)], label=label)
    axes.set_xticks(list(own), [str(count) for count in own], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="labelled pictures a dial", ylabel="error (of 10)")
    figure.legend(loc="outside right upper", fontsize=9)
    write_whole(file, partial(figure.savefig, format="png", dpi=110))


def read_mishaps(suffered, readers, untrained):
    """suffered: {mishap: rows}. readers: {method: its read}. untrained: that of the control that lacks a dial.

    Returns: rows of a table, of how many readings are off by more than their interval and how many are flagged.
    """
    table = []
    for mishap, rows in suffered.items():
        table.append([mishap, len(rows)])
        for method, read in readers.items():
            read = {"ours": untrained}.get(method) if mishap == UNTRAINED else read
            if not read:
                table[-1].append("—")
                continue
            readings = read(rows, re.sub(r"\W", "_", mishap))
            off = np.abs(shortest(readings.found - column(rows, "source"))) > readings.half
            table[-1].append(f"{off.mean():.0%}")
            if method == "ours":
                flagged = np.array(readings.flagged)
                table[-1] += [f"{flagged[off].mean():.0%}" if off.any() else "—", f"{flagged.mean():.0%}"]
    return table


def make_untrained(data, folder):
    """Copy a dataset into folder/data, all but the pictures of its last dial."""
    shutil.copytree(data, folder / "data", dirs_exist_ok=True)
    rows = read_lines(data / TRAINING_FILE)
    last = max(row["prompt"] for row in rows)
    write_lines(folder / "data" / TRAINING_FILE, [row for row in rows if row["prompt"] != last])


def main(s):
    expect('setting "counts": expected', s.counts, each(number(2, 10**6, whole=True)))
    check_numbers(s, int, targets=(1, 10**6))
    check_numbers(s, regressor_minutes=(0, 10**4))
    names = choose(s.methods, METHODS, "methods")
    mishaps = choose(s.mishaps, [*MISHAPS, OTHER_PROMPT, UNTRAINED], "mishaps") if s.mishaps else []
    out_dir = start_report(s.out_dir, "results.json", "minutes")
    report = {"results": {}, "minutes": json.loads((out_dir / "results.json").read_text())["minutes"] or {}}
    table, sizes, mishap_table = [], {name: {} for name in names}, []

    def open_reader(name, folder):
        try:
            return METHODS[name](s, folder, report["minutes"].setdefault(folder.name, {}))
        finally:
            save_json(out_dir / "results.json", report)

    made = {count: make_data(out_dir / str(count), s, count) for count in s.counts}  # none fails later
    for count, rows in made.items():
        folder = out_dir / str(count)
        readers = {name: open_reader(name, folder) for name in names}
        for name, read in readers.items():
            readings = read(rows, "targets")
            report["results"][f"{name} {count}"] = asdict(readings)
            sizes[name][count] = np.abs(errors(readings, rows, folder / "data")[0])
            minutes = report["minutes"][folder.name].get(name)
            table.append([name, count, *tabulate(readings, rows, folder / "data", minutes)])
            print(f"{name}, {count} labelled pictures a dial: median error {table[-1][2]}")
        save_json(out_dir / "results.json", report)
        if count == MAIN and mishaps:
            suffered = {mishap: suffer(mishap, rows, folder / "mishaps") for mishap in mishaps}
            draw_sheet(suffered, out_dir / "mishaps.png")
            untrained = None
            if UNTRAINED in mishaps and "ours" in names:
                make_untrained(folder / "data", out_dir / "untrained")
                untrained = open_reader("ours", out_dir / "untrained")
            mishap_table = read_mishaps(suffered, readers, untrained)
    print(f"\n{len(rows)} pictures a row, errors of {PERIOD}")
    print_table(HEADS, table)
    if mishap_table:
        heads = [[f"{name}: off", "of these flagged", "flagged"][: 3 if name == "ours" else 1] for name in names]
        print_table(["", "pictures", *sum(heads, [])], mishap_table)
    draw_plot(sizes, out_dir / "plot.png")


if __name__ == "__main__":
    run_script(main, settings)
