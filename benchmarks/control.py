"""Asked against read back: are pictures drawn at a number what the number asks for?

    python benchmarks/control.py                        # the shipped angle; a network learns for minutes=10 first
    python dataForTrain/make_dataset.py views=300 out_dir=runs/views
    python benchmarks/control.py model_path=models/control_views data_root=runs/views augment=false
    python dataForTrain/make_dataset.py pairs=4000 out_dir=runs/pairs
    python benchmarks/control.py model_path=models/control_tiny_pair data_root=runs/pairs

Pictures are drawn at random numbers of the trained range and read back: by the control itself, as invert.py reads, and
by a reader that has never seen the control: a ResNet-18 that learns, from pictures as the control learned from, what
their numbers are; or, where a formula knows every number, the classical chain of pairs.py. Its errors on true pictures,
those of validation, say how good a judge it is; they make its error bars, too. Prints a table; asked.png in out_dir
shows all controls that were read there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    model_path="models/control_tiny",
    data_root="dataForTrain",  # what the control was trained on
    count=60,  # pictures that are drawn
    ddim_steps=32,
    minutes=10.0,  # of the network's training
    augment=True,  # it learns from pictures moved, zoomed and tinted a little; False: where these are the numbers
    seed=0,
    out_dir="outputs/control",
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import shutil
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.classical import SIZE, chain
from benchmarks.common import check_fits, read_by_control, save_json, significant, start_report
from benchmarks.regressors import augment, find_errors, regress, tint, with_bars
from cldm.dataset import TRAINING_FILE, read_data, read_rows
from cldm.fit import has_formula
from cldm.hints import wrap
from cldm.model import Sampling, load_model
from cldm.report import COLOURS, draw_pictures, label, plain, tell_names
from ldm.files import find_path, write_whole
from ldm.pictures import fit_picture

REPORT, PLOT, DRAWINGS = "asked.json", "asked.png", "drawings"
FEWEST, MOST = 9, 100  # rows of validation: that bars of 90% can be made from; that the classical chain reads
ROW = 6  # panels of the plot in a line
READERS = {"ours": "the control itself", "other": "a reader that never saw the control"}


def ask(s, model, validation, folder):
    """Draw pictures at random numbers, with the prompts and references of validation. Returns: their Rows."""
    config, lines = model.control_net.config, []
    low, high = torch.tensor([config.control_low, config.control_high], dtype=torch.float64)
    shares = torch.rand(s.count, len(low), generator=torch.Generator().manual_seed(s.seed), dtype=torch.float64)
    which = np.linspace(0, len(validation) - 1, s.count).round().astype(int)
    for i, control in enumerate(tqdm(low + (high - low) * shares, "drawing", leave=False)):
        row = validation[which[i]]
        reference = [row.load()[1]] if row.reference else None
        target = model.encode([row.prompt], None, reference)
        (picture,) = draw_pictures(model, target, control[None], s.seed + i, Sampling(s.ddim_steps))
        picture.save(folder / f"{i:03d}.png")
        line = dict(source=control.tolist(), target=f"{i:03d}.png", prompt=row.prompt)
        lines.append(json.dumps(line | ({"reference": str(row.reference.absolute())} if reference else {})) + "\n")
    (folder / TRAINING_FILE).write_text("".join(lines))
    return read_rows(folder / TRAINING_FILE)


def read_by_formula(names, rows):
    """Returns: controls (n, d) of pairs, by the classical chain. names: of their numbers."""
    found = []
    for row in tqdm(rows, "reading by formula", leave=False):
        target, reference = (fit_picture(picture, SIZE) for picture in row.load())
        answer = chain(reference, target, names).found
        found.append([answer[name] for name in names])
    return torch.tensor(found, dtype=torch.float64)


def without_change(pictures):
    return pictures


def augment_single(pictures):
    return augment(pictures[:, 0])[:, None]


def tell(found, rows, judged, validation, config):
    """Print a table. found: {reader: of drawings, as read_by_control returns it}. judged: controls (n, d) that the
    other reader finds in true pictures, `validation`.
    """
    print("\n| number | read by | of | median | 90% | worst | intervals hold |\n|" + " --- |" * 7)
    every = [(READERS[name], "drawings", find_errors(own["found"], rows, config), own) for name, own in found.items()]
    every.append((READERS["other"], "true pictures", find_errors(judged, validation, config), None))
    for k, (name, unit) in enumerate(zip(tell_names(config), config.control_units)):
        for reader, what, errors, own in every:
            one = errors[:, k].numpy()
            cells = significant(np.quantile(one, [0.5, 0.9, 1]))
            held = f"{(one <= np.array(own['half'])[:, k]).mean():.0%}" if own else "—"
            print(f"| {label(name, unit)} | {reader} | {what} | {' | '.join(cells)} | {held} |")


def draw(report, file):
    """Plot asked against read. report: {control: its entry of asked.json}."""
    panels = [(name, k) for name, own in report.items() for k in range(len(own["names"]))]
    lines = math.ceil(len(panels) / ROW)
    figure = Figure(figsize=(max(4, 2.2 * min(ROW, len(panels))), 2.3 * lines + 0.4), layout="constrained")
    table = figure.subplots(lines, min(ROW, len(panels)), squeeze=False)
    for spare in table.flat[len(panels) :]:
        spare.remove()
    for axes, (name, k) in zip(table.flat, panels):
        own = report[name]
        asked, (low, high) = np.array(own["asked"]), own["ranges"][k]
        axes.plot([low, high], [low, high], color="gray", lw=0.8)
        for reader, colour in zip(READERS, COLOURS):
            gaps = wrap(torch.from_numpy(np.array(own[reader]["found"]) - asked), own["periods"])[:, k].numpy()
            half = np.array(own[reader]["half"])[:, k]
            bars = dict(elinewidth=0.7, alpha=0.7, color=colour, label=READERS[reader])
            axes.errorbar(asked[:, k], asked[:, k] + gaps, half, fmt=".", markersize=3, **bars)
        axes.set_title(plain(f"{name}\n{label(own['names'][k], own['units'][k])}"), fontsize=8)
        margin = 0.15 * (high - low)
        axes.set(xlim=(low, high), ylim=(low - margin, high + margin))
        axes.tick_params(labelsize=7)
    for axes in table[:, 0]:
        axes.set_ylabel("read back", fontsize=8)
    figure.supxlabel("asked", fontsize=8)
    figure.legend(*table[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    write_whole(file, partial(figure.savefig, format="png", dpi=100))


def main(s):
    check_numbers(s, int, count=(2, 10**4), ddim_steps=(1, 1000), seed=(0, 2**63 - 1))
    check_numbers(s, minutes=(1e-3, 1e4))
    path, root = find_path(s.model_path).resolve(), find_path(s.data_root)
    model, data = load_model(path), read_data(root)
    check_fits(model, data, root)
    config, validation = model.control_net.config, data.validation
    if len(validation) < FEWEST:
        raise InputError(f"data_root {root}: expected at least {FEWEST} rows for validation, found {len(validation)}")
    out = start_report(s.out_dir, REPORT, "controls", PLOT, DRAWINGS)
    name, report = path.name, json.loads((out / REPORT).read_text())["controls"] or {}
    if (there := report.get(name, {}).get("path", str(path))) != str(path):
        raise InputError(f"{out / REPORT}: has another control of the name {name}, {there}; choose another out_dir")
    folder = out / DRAWINGS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = ask(s, model, validation, folder)
    found = {"ours": read_by_control(s.model_path, rows, config, folder)}
    if has_formula(config):
        validation = validation[:: math.ceil(len(validation) / MOST)]
        read = partial(read_by_formula, [*config.control_names])
    else:
        change = (tint if data.has_references else augment_single) if s.augment else without_change
        read, _ = regress(data.train, config, model.config.image_size, s.minutes, out, change)
    judged = read(validation)
    found["other"] = with_bars(read, rows, judged, validation, config)
    ranges = [*zip(config.control_low, config.control_high)]
    told = dict(names=tell_names(config), units=config.control_units, periods=config.periods, ranges=ranges)
    told |= dict(path=str(path), asked=rows.controls.tolist())
    controls = report | {name: told | found}
    save_json(out / REPORT, {"controls": controls})
    tell(found, rows, judged, validation, config)
    draw(controls, out / PLOT)
    print(f"see {out / PLOT}")


if __name__ == "__main__":
    run_script(main, settings)
