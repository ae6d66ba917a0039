"""Reading the change between two pictures: every method on the same pairs, in one run.

    python benchmarks/pairs.py                                       # all, about four hours on two cores
    python benchmarks/pairs.py methods=ours,chain tasks="all six"    # some

Pairs are cut from photographs that no training has seen. Prints the tables of docs/results.md: for rotation alone, for
all six numbers, and for pictures of 320 x 320 pixels rotated about a point that is not their middle; how far corners
are off, and what the methods' doubts are worth; what is flagged, also for pairs of different photographs; and how
readings agree with each other, there and back. Leaves every answer in out_dir, where a run that was stopped goes on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    model_path="models/control_tiny_pair",
    methods="all",
    tasks="all",  # of "rotation alone", "all six", "from outside" and "ways", with commas between them
    photos="held_out",  # a group of make_dataset.py's, or any folder
    pairs=300,
    seed=3,
    regressor_minutes=60.0,  # as long as the control was trained
    out_dir="outputs/pairs",
)
if __name__ == "__main__":
    answer(__file__)

import io
import json
import math
import random
import time
from dataclasses import asdict
from functools import partial

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, spearmanr
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

from benchmarks.classical import SIZE, Answer, chain, ecc, log_polar, sift, start_motions
from benchmarks.common import choose, compose, decompose, read_lines, save_json, significant, start_report
from benchmarks.doubt import (
    LIMITS,
    area_under,
    corner_error,
    corner_spread,
    distance_ranks,
    middle_shares,
    ranks,
    risk_curve,
)
from benchmarks.regressors import train_regressor
from cldm.changes import CHANGES, NO_CHANGE, choose_changes, similarity
from cldm.evidence import check_evidence
from cldm.fit import LOW, NAMES, WIDTHS, refine_reading
from cldm.model import load_model
from cldm.pairs import POOL, draw_pair, draw_views, open_photo
from cldm.reading import read_controls
from cldm.results import digest_model
from dataForTrain.make_dataset import find_pictures
from ldm.files import append_whole, write_whole
from ldm.pictures import fit_picture, pictures_to_tensor
from ldm.schema import Settings

BATCH = 12  # pairs read together
TASKS = {  # which numbers are unknown
    "rotation alone": ["rotation"],
    "all six": NAMES,
    "from outside": ["rotation", "shift x", "shift y"],
}
WAYS = "ways"  # pairs of different photographs, and readings that should agree with each other
OURS = "ours", "denoising"  # as invert.py reads; without the fit of pixels that ends it
# Beside these and "siamese", by name, function(reference, target, sought) -> Answer.
CLASSICAL = {
    "ecc": ecc,
    "ecc_started": lambda *pair: ecc(*pair, start_motions(*pair)),
    "log_polar": log_polar,
    "sift": sift,
    "magsac": partial(sift, magsac=True),
    "light": partial(chain, joint=False),
    "chain": chain,
}


def outside_pair(rng, files):
    """Returns: reference, target, change: 320 x 320 pictures, rotated by whole degrees about any point, PNG or JPEG."""
    size = 320
    files = [file for file in files if min(open_photo(file).size) > 1.3 * size]  # so that a rotated square fits in
    if not files:
        raise InputError(f"photos: none is large enough to cut {size} x {size} pixels from it, rotated")
    while True:
        photo = open_photo(rng.choice(files))
        angle = rng.choice([-1, 1]) * rng.randint(1, 8)
        pivot = [rng.uniform(-0.5, 0.5) for _ in range(2)]  # widths from the middle
        there = np.array([[1, 0, pivot[0]], [0, 1, pivot[1]], [0, 0, 1]])
        motion = there @ similarity(angle, 1, 0, 0) @ np.linalg.inv(there)
        if max(abs(motion[0, 2]), abs(motion[1, 2])) > CHANGES["shift x"][2]:
            continue
        x, y = (rng.uniform(0, side - size) for side in photo.size)
        pixels = np.array([[1 / size, 0, -0.5], [0, 1 / size, -0.5], [0, 0, 1]])
        place = np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ np.linalg.inv(pixels)
        matrices = place @ pixels, place @ np.linalg.inv(motion) @ pixels
        corners = matrices[1] @ [[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]]
        if corners[:2].min() < 0 or (corners[:2].max(1) > photo.size).any():
            continue
        cut = [
            photo.transform((size, size), Image.Transform.AFFINE, m[:2].flatten().tolist(), Image.Resampling.BICUBIC)
            for m in matrices
        ]
        file = io.BytesIO()
        cut[1].save(file, rng.choice(["png", "jpeg"]))
        return *(fit_picture(p, SIZE) for p in (cut[0], Image.open(file))), NO_CHANGE | decompose(motion)


class Siamese(nn.Module):
    """What one might train instead: the first half of a ResNet-18 on each picture, the second half on both."""

    def __init__(self, outputs):
        super().__init__()
        whole = resnet18()
        self.each = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.layer1, whole.layer2)
        self.both = nn.Sequential(nn.Conv2d(256, 128, 1), whole.layer3, whole.layer4, nn.Flatten())
        self.last = nn.Linear(512 * (SIZE // 16) ** 2, outputs)

    def forward(self, reference, target):
        return self.last(self.both(torch.cat([self.each(reference), self.each(target)], 1)))


def siamese(minutes, seed, file):
    """Returns: what reads pairs by the Siamese network in `file`; it is trained if there is none.

    It learns from fresh pairs of the photographs that the control was trained on, each used four times, as there.
    """
    network, ranges = Siamese(len(NAMES)), choose_changes(None)
    low, high = torch.tensor(list(ranges.values())).T
    middle, spread = (low + high) / 2, (high - low) / 12**0.5
    rng, photos, pool = random.Random(seed), find_pictures("train"), []

    def draw_batch(step):
        if step % (4 * POOL // 32) == 0:
            pool[:] = [draw_pair(rng, photos, SIZE, ranges) for _ in range(POOL)]
        some = rng.sample(pool, 32)
        inputs = tuple(pictures_to_tensor([pair[i] for pair in some]) for i in (0, 1))
        wanted = torch.tensor([list(change.values()) for *_, change in some])
        return inputs, (wanted - middle) / spread

    if not file.exists():
        train_regressor(network, minutes, draw_batch, nn.functional.l1_loss)
        write_whole(file, partial(save_file, network.state_dict()))
    network.load_state_dict(load_file(file))
    network.eval()

    @torch.no_grad()
    def read(reference, target, sought):
        found = network(pictures_to_tensor([reference]), pictures_to_tensor([target]))[0] * spread + middle
        return Answer(dict(zip(NAMES, found.tolist())))

    return read


def read_pairs(model, pairs, sought):
    """Read pairs by the control; numbers that are not sought are known not to change. Returns: Readings."""
    known, readings = {name: NO_CHANGE[name] for name in NAMES if name not in sought}, []
    for first in tqdm(range(0, len(pairs), BATCH), desc="reading", leave=False):
        references, targets, _ = zip(*pairs[first : first + BATCH])
        readings.append(read_controls(model, model.encode([""] * len(targets), targets, references), known))
    return readings


def answer_by_model(model, fitted, pairs, sought):
    """Read pairs as invert.py does, or without the fit of pixels that ends it. Returns: a list of Answers."""
    (reading,), (references, targets, _) = read_pairs(model, pairs, sought), zip(*pairs)
    known, pictures = [name for name in NAMES if name not in sought], [*zip(targets, references)]
    if fitted:
        reading = refine_reading(reading, pictures, model.control_net.config, known)
    reading = check_evidence(reading, pictures, model.control_net.config, known)
    answers = []
    for control, covariance, flags in zip(reading.control.tolist(), reading.covariance.numpy(), reading.flags):
        found = dict(zip(NAMES, control))
        answers.append(Answer(found, corner_spread(found, covariance, SIZE), covariance.tolist(), flags))
    return answers


def answer_pairs(file, read, pairs, sought, s):
    """Have pairs answered BATCH at a time; those that stand in the file, by the same settings, are not asked again.

    read: function(pairs, sought) -> a list of Answers. Returns: a list of dicts, Answers with "seconds".
    """
    own = {name: value for name, value in s.items() if name not in ("methods", "tasks", "out_dir")}
    if not file.exists() or read_lines(file)[0] != own:
        write_whole(file, partial(Path.write_text, data=json.dumps(own) + "\n"))
    for first in range(len(read_lines(file)) - 1, len(pairs), BATCH):
        began, some = time.perf_counter(), pairs[first : first + BATCH]
        answers = [asdict(own) for own in read(some, sought)]
        for own in answers:
            own["found"] = {name: number for name, number in own["found"].items() if name in sought}
        seconds = (time.perf_counter() - began) / len(some)
        append_whole(file, "".join(json.dumps(own | {"seconds": seconds}) + "\n" for own in answers))
    return read_lines(file)[1:]


def print_row(name, errors, last):
    """Print a row: for every number median / 90% within / worst of its errors, a list or None; then a last cell."""
    cells = []
    for own in errors.values():
        levels = np.quantile(np.abs(own), [0.5, 0.9, 1]) if own else ()
        cells.append(" / ".join(significant(levels)) or "—")
    print(f"| {name} | {' | '.join(cells)} | {last} |", flush=True)


def draw_task(task, rng, files, count):
    """Returns: a list of (reference, target, {name: number})."""
    if task == "from outside":
        return [outside_pair(rng, files) for _ in range(count)]
    ranges = {"rotation": (-5, 5)} if task == "rotation alone" else choose_changes(None)
    return [draw_pair(rng, files, SIZE, ranges) for _ in range(count)]


def main(s):
    names = choose(s.methods, [*OURS, *CLASSICAL, "siamese"], "methods")
    tasks = choose(s.tasks, [*TASKS, WAYS], "tasks")
    check_numbers(s, int, pairs=(1, 10**6), seed=(0, 2**63 - 1))
    check_numbers(s, regressor_minutes=(0, 10**4))
    out_dir = start_report(s.out_dir, "errors.json", "rotation alone", "*.jsonl", "risk.png")
    files, model = find_pictures(s.photos), load_model(s.model_path) if {*OURS} & {*names} else None
    control = dict(control=digest_model(s.model_path, model.config.base)) if model else {}
    if model and list(model.control_net.config.control_names) != NAMES:
        raise InputError(f"model_path {s.model_path}: expected a control of {', '.join(NAMES)}")
    if tasks == [WAYS] and not model:
        raise InputError('setting "tasks": ways are of our readings; add ours to methods')
    torch.manual_seed(s.seed)
    each = dict(CLASSICAL)
    if "siamese" in names:
        file = out_dir / f"siamese_{s.regressor_minutes:g}_{s.seed}.safetensors"
        each["siamese"] = siamese(s.regressor_minutes, s.seed, file)
    report, curves = {"rotation alone": None}, {}
    for task in [task for task in tasks if task in TASKS]:
        sought, pairs = TASKS[task], draw_task(task, random.Random(f"{s.seed} {task}"), files, s.pairs)
        answers = {}
        for method in names:
            if method == "light" and "exposure" not in sought:  # it would be the chain again
                continue
            cv2.setRNGSeed(s.seed % 2**31)

            def read(some, sought, method=method):
                if method in OURS:
                    return answer_by_model(model, method == "ours", some, sought)
                return [each[method](reference, target, sought) for reference, target, _ in some]

            file = out_dir / f"{task}_{method}.jsonl".replace(" ", "_")
            answers[method] = answer_pairs(file, read, pairs, sought, Settings(s | control) if method in OURS else s)
        changes = [change for *_, change in pairs]
        report |= print_task(task, sought, changes, answers)
        curves[task] = print_corners(changes, answers)
        print_posteriors(sought, changes, answers, s.seed)
    draw_curves(curves, out_dir / "risk.png")
    if WAYS in tasks and model:
        check_ways(model, random.Random(f"{s.seed} {WAYS}"), files, s.pairs)
    save_json(out_dir / "errors.json", report)


def print_task(task, sought, changes, answers):
    """Print a table of every number's errors. answers: {method: list}. Returns: {"task, method": {name: errors}}."""
    print(f"\n{task}, {len(changes)} pairs: median / 90% within / worst\n")
    units = [f"{name} ({CHANGES[name][0]})" for name in sought]
    print(f"| | {' | '.join(units)} | seconds a pair |\n|{' --- |' * (len(sought) + 2)}")
    report = {}
    for method, own in answers.items():
        read = [name for name in sought if name in own[0]["found"]]
        errors = {name: [a["found"][name] - change[name] for a, change in zip(own, changes)] for name in read}
        print_row(method, {name: errors.get(name) for name in sought}, f"{np.mean([a['seconds'] for a in own]):.2f}")
        report[f"{task}, {method}"] = errors
    flags = [own["flags"] for own in answers.get("ours", [])]
    for flag in sorted(set(sum(flags, []))):
        print(f"    {flag}: {np.mean([flag in own for own in flags]):.1%} of ours")
    return report


def print_corners(changes, answers):
    """Print how far corners are off, and risk against coverage. Returns: {method: its risk curve, if it doubts}."""
    header = [*(f"area under {limit}" for limit in LIMITS), *(f"within {limit}" for limit in LIMITS)]
    header += ["risk", "at 80% coverage", "at 50%", "area (AURC)", "of the best order"]
    print(f"\ncorners, pixels of {SIZE}\n\n| | median | {' | '.join(header)} |\n|{' --- |' * (len(header) + 2)}")
    curves = {}
    for method, own in answers.items():
        errors = np.array([corner_error(a["found"], change, SIZE) for a, change in zip(own, changes)])
        cells = [f"{np.median(errors):.3f}", *(f"{area_under(errors, limit):.3f}" for limit in LIMITS)]
        cells += [f"{(errors <= limit).mean():.1%}" for limit in LIMITS] + [f"{errors.mean():.3f}"]
        if own[0]["doubt"] is None:
            cells += 4 * ["—"]
        else:
            curve, best = risk_curve(errors, [a["doubt"] for a in own]), risk_curve(errors, errors)
            curves[method] = curve.tolist()
            places = (math.ceil(share * len(curve)) - 1 for share in (0.8, 0.5))
            cells += [f"{value:.3f}" for value in (*curve[[*places]], curve.mean(), best.mean())]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    return curves


def print_posteriors(sought, changes, answers, seed):
    """Print where the truth lies in what a method says is likely: SBC's ranks of every number, TARP's of all."""
    which = [NAMES.index(name) for name in sought]
    print("\nshare of truths in the middle 50% / 90% of the posterior / mean rank / p of uniform ranks\n")
    print(f"| | {' | '.join(sought)} | TARP |\n|{' --- |' * (len(sought) + 2)}")
    truths = np.array([[change[name] for name in NAMES] for change in changes])
    for method, own in answers.items():
        if own[0]["covariance"] is None:
            continue
        covariances = np.array([a["covariance"] for a in own])
        errors = np.array([[(NO_CHANGE | a["found"])[name] for name in NAMES] for a in own]) - truths
        units = WIDTHS[which]
        tarp = distance_ranks(
            errors[:, which] / units,
            covariances[:, which][:, :, which] / (units[:, None] * units),
            (truths - LOW)[:, which] / units,
            np.random.default_rng(seed),
        )
        columns = [*ranks(errors, covariances)[:, which].T, tarp]
        cells = []
        for column in columns:
            half, most, mean = middle_shares(column)
            cells.append(f"{half:.0%} / {most:.0%} / {mean:.2f} / {kstest(column, 'uniform').pvalue:.2g}")
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def draw_curves(curves, file):
    """Draw risk against coverage. curves: {task: {method: curve}}."""
    drawn = {task: own for task, own in curves.items() if own}
    if not drawn:
        return
    figure = Figure(figsize=(4.5 * len(drawn), 4), layout="constrained")
    for axes, (task, own) in zip(np.atleast_1d(figure.subplots(1, len(drawn))), drawn.items()):
        for method, curve in own.items():
            axes.semilogy(np.arange(1, len(curve) + 1) / len(curve), curve, label=method)
        axes.set(title=task, xlabel="coverage, the surest first", ylabel="mean error of the corners (pixels)")
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)


def check_ways(model, rng, files, count):
    """Print what is flagged of pairs of different photographs, and how far readings are from agreeing with each other.

    The latter takes no truth: there and back should come to no change, as should a picture and itself; a change by way
    of a third picture should be the same as the direct one. count: of pairs.
    """
    every = choose_changes(None)
    turns = [draw_pair(rng, [files[i % len(files)]], SIZE, every) for i in range((count + 1) // 2)]
    mixed = [(one[0], other[1], None) for one, other in zip(turns, turns[1:] + turns[:1])]
    flags = [flags for reading in read_pairs(model, mixed, NAMES) for flags in reading.flags]
    shares = (f"{name} {np.mean([name in own for own in flags]):.0%}" for name in sorted(set(sum(flags, []))))
    print(f"\n{len(mixed)} pairs of different photographs: {', '.join(shares)}")

    def read(pairs):
        """Returns: a list of {name: number}, without blur, which has no way back."""
        readings = read_pairs(model, pairs, [name for name in NAMES if name != "blur"])
        return [dict(zip(NAMES, control)) for reading in readings for control in reading.control.tolist()]

    def miss(ways, wholes):
        ways = list(ways)
        return {name: [way[name] - whole[name] for way, whole in zip(ways, wholes)] for name in NAMES[:-1]}

    print("\ndisagreement between readings: median / 90% within / worst\n")
    print(f"| | {' | '.join(NAMES[:-1])} | pairs |\n|{' --- |' * (len(NAMES) + 1)}")
    pairs = [draw_pair(rng, files, SIZE, every) for _ in range(count)]
    controls = torch.cat([reading.control for reading in read_pairs(model, pairs, NAMES)]).tolist()
    found, changes = [dict(zip(NAMES, control)) for control in controls], [change for *_, change in pairs]
    errors = {name: [own[name] - change[name] for own, change in zip(found, changes)] for name in NAMES}
    backs = read([(target, reference, None) for reference, target, _ in pairs])
    trips = miss(map(compose, found, backs), [NO_CHANGE] * len(pairs))
    print_row("there and back", trips, len(pairs))
    some = pairs[: (len(pairs) + 3) // 4]
    print_row("to itself", miss(read([(one, one, None) for one, *_ in some]), [NO_CHANGE] * len(some)), len(some))
    less = {name: ((low + none) / 2, (high + none) / 2) for name, (_, low, high, none) in CHANGES.items()}
    views = [draw_views(rng, files, SIZE, less | {"blur": (0, 0)}, 2) for _ in some]
    legs = ([(a, b, None) for a, ((b, _), _) in views], [(b, c, None) for _, ((b, _), (c, _)) in views])
    whole = read([(a, c, None) for a, (_, (c, _)) in views])
    print_row("by way of another", miss(map(compose, *map(read, legs)), whole), len(some))
    agree = (f"{name} {spearmanr(np.abs(trips[name]), np.abs(errors[name])).statistic:.2f}" for name in trips)
    print(f"rank correlation of there and back with the error: {', '.join(agree)}")


if __name__ == "__main__":
    run_script(main, settings)
