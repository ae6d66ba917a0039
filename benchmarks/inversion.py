"""Reading an angle: every way there is, on the same targets, in one run.

    python benchmarks/inversion.py                                  # all, about 70 minutes on two cores
    python benchmarks/inversion.py methods=lm_denoising             # some

Targets are photographs at random angles that training never saw; the slow methods take a share of them. Every method
runs in a process of its own, for its memory. Prints the table of docs/results.md; out_dir has results.jsonl, plot.png.
Then: what is flagged of targets at +-8 degrees, and of photographs never trained on. Started again with the same
settings, it goes on after the last method in results.jsonl.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, Settings, answer, check_numbers, nearest, run_script

settings = dict(
    model_path="models/control_tiny",
    data_root="dataForTrain",  # what the regressor is trained on
    methods="all",
    targets=36,
    seed=2,
    regressor_minutes=27.0,  # as long as the control was trained
    original_iterations=100,  # at most, where the original's settings have not arrived
    out_dir="outputs/inversion",
)
if __name__ == "__main__":
    answer(__file__)

import itertools
import json
import math
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
import torch
from cldm.objectives import SamplingObjective
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import test5
import test5_s1
from cldm.dataset import split_rows
from cldm.model import load_model
from cldm.reading import BATCH, read_controls, search_bounds
from dataForTrain.make_dataset import HELD_OUT, TRAIN, render_framed
from ldm.files import find_path, report_folder
from ldm.pictures import load_picture, pictures_to_tensor

SIZE = 128  # pixels


@dataclass
class Target:
    picture: Image.Image
    prompt: str
    angle: float  # degrees
    start: float  # for the methods that need one


def draw_targets(photos, count, rng, angle):
    """Returns: `count` Targets, taking photos in turn, at angles drawn by angle(rng)."""
    targets = []
    for photo in itertools.islice(itertools.cycle(photos.values()), count):
        degrees = angle(rng)
        targets.append(Target(render_framed(photo, SIZE, degrees), photo.prompt, degrees, rng.uniform(-5, 5)))
    return targets


def descend(script, model, targets, **overrides):
    """Invert Targets one by one, by test5 or test5_s1. Returns: angles, model calls and seconds in all."""
    found, calls, seconds = [], 0, 0.0
    for target in targets:
        own = Settings({**script.settings, **overrides, "prompt": target.prompt})
        start = torch.tensor([[target.start]])
        result = test5.infer(model, own, [target.picture], [target.picture], start)
        found.append(result.control.item())
        calls, seconds = calls + result.model_calls, seconds + result.seconds
    return found, calls, seconds


def read(model, targets, batch_size=BATCH, sampling_steps=None, starts=None, **options):
    """Read Targets in batches. Returns: angles, model calls and seconds in all, and the Readings.

    sampling_steps: of the sampling objective; None: the denoising objective. starts: how many, evenly spaced; None:
    found by probing. options: as read_controls has them.
    """
    readings, began = [], time.perf_counter()
    for first in range(0, len(targets), batch_size):
        some = targets[first : first + batch_size]
        with torch.no_grad():
            latents = model.base.encode(pictures_to_tensor([target.picture for target in some]))
            embeddings = model.base.embed([target.prompt for target in some])
        sampling = start = None
        if sampling_steps:
            how = dict(draws=4, ddim_steps=sampling_steps, eta=1.0)
            sampling = SamplingObjective(model, latents, latents, embeddings, **how)
        if starts:
            low, high = (bound.item() for bound in search_bounds(model.control_net.config))
            start = torch.linspace(low, high, starts + 2)[1:-1].expand(len(some), -1)[:, :, None]
        readings.append(read_controls(model, latents, embeddings, sampling=sampling, start=start, **options))
    seconds = time.perf_counter() - began
    found = torch.cat([reading.control[:, 0] for reading in readings]).tolist()
    calls = sum(reading.model_calls * len(reading.control) for reading in readings)
    return found, calls, seconds, readings


def regress(model, targets, data_root, minutes):
    """What one would do instead: a CNN from picture to angle, trained on the control's pictures for `minutes`.

    Pictures are shifted, zoomed a little and changed in brightness while it trains, or it learns them by heart.
    """
    rows, _ = split_rows(find_path(data_root))
    pictures = pictures_to_tensor([load_picture(row.target) for row in rows])
    angles = torch.tensor([row.control[0] for row in rows])
    spread = angles.std()
    network = resnet18(num_classes=1)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    began = time.perf_counter()
    while (share := (time.perf_counter() - began) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.5 + 0.5 * math.cos(math.pi * share))
        chosen = torch.randint(len(rows), (32,))
        batch = augment(pictures[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            predicted = network(batch)[:, 0].float()
        loss = (predicted - angles[chosen] / spread).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        began = time.perf_counter()
        found = network(pictures_to_tensor([target.picture for target in targets]))[:, 0] * spread
    return found.tolist(), len(targets), time.perf_counter() - began


def augment(pictures):
    """Returns: (B, 3, H, W) pictures moved by up to 2 pixels, 3% of their size and 10% of their brightness."""
    count = len(pictures)
    move = torch.zeros(count, 2, 3)
    move[:, 0, 0] = move[:, 1, 1] = 1 + 0.06 * torch.rand(count) - 0.03
    move[:, :, 2] = 8 / SIZE * torch.rand(count, 2) - 4 / SIZE
    grid = nn.functional.affine_grid(move, pictures.shape, align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    return moved * (0.9 + 0.2 * torch.rand(count, 1, 1, 1))


ORIGINAL = dict(num_samples=1, scale=9.0, eta=1.0)  # and rate 0.35 of the control itself

# name: (one in so many targets, coprime to the 12 photographs; function(model, targets, settings) -> angles, calls …)
METHODS = {
    "original": (17, lambda m, t, s: descend(test5, m, t, **ORIGINAL, **original_rate(m, s))),
    "original_s1": (17, lambda m, t, s: descend(test5_s1, m, t, **ORIGINAL, **original_rate(m, s))),
    "test5": (5, lambda m, t, s: descend(test5, m, t)),
    "test5_s1": (5, lambda m, t, s: descend(test5_s1, m, t)),
    "adam_denoising": (7, lambda m, t, s: read(m, t, solver="adam", starts=4, iterations=100)),
    "lm_sampling": (1, lambda m, t, s: read(m, t, sampling_steps=10)),
    "lm_sampling_8_steps": (17, lambda m, t, s: read(m, t, sampling_steps=8)),  # for their memory
    "lm_sampling_64_steps": (17, lambda m, t, s: read(m, t, sampling_steps=64)),
    "lm_denoising": (1, lambda m, t, s: read(m, t)),
    "lm_denoising_alone": (1, lambda m, t, s: read(m, t, batch_size=1)),
    "regressor": (1, lambda m, t, s: regress(m, t, s.data_root, s.regressor_minutes)),
}


def original_rate(model, s):
    rate = 0.35 / model.control_net.config.control_std[0] ** 2  # sgd's unit is the control's spread
    return dict(learning_rate=rate, iterations=s.original_iterations)


def comparable(s):
    """Returns: the settings that results depend on, and results have to agree in to stand in one table."""
    return {name: s[name] for name in settings if name not in ("methods", "out_dir")}


def run_method(name, s):
    """Returns: a dict of a method's results, from a process of its own."""
    torch.manual_seed(s.seed)
    share, function = METHODS[name]
    targets = draw_targets(TRAIN, s.targets, random.Random(s.seed), lambda rng: rng.uniform(-5, 5))[::share]
    model = load_model(s.model_path)
    found, calls, seconds, *readings = function(model, targets, s)
    result = dict(
        method=name,
        settings=comparable(s),
        angles=[target.angle for target in targets],
        found=found,
        calls=calls / len(targets),
        seconds=seconds / len(targets),
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # GiB
    )
    if readings:
        inside = [r.interval90[:, 0] for r in readings[0]]
        low, high = torch.cat(inside).T.tolist()
        result["inside"] = np.mean([a <= angle <= b for a, b, angle in zip(low, high, result["angles"])])
        result["iterations"] = torch.cat([r.iterations for r in readings[0]]).tolist()
        result["flags"] = [flags for r in readings[0] for flags in r.flags]
    return result


def count_flags(s):
    """Print how often readings are doubted that should be, and that should not."""
    model, rng = load_model(s.model_path), random.Random(s.seed + 1)
    kinds = {
        "in range": (TRAIN, lambda rng: rng.uniform(-5, 5)),
        "at -8 or 8 degrees": (TRAIN, lambda rng: rng.choice([-8.0, 8.0])),
        "never trained on": (HELD_OUT, lambda rng: rng.uniform(-5, 5)),
    }
    print("\n| targets | number | outside_range | ambiguous | unexplained |\n| --- | --- | --- | --- | --- |")
    for kind, (photos, angle) in kinds.items():
        flags = [f for r in read(model, draw_targets(photos, s.targets, rng, angle))[3] for f in r.flags]
        shares = (np.mean([flag in f for f in flags]) for flag in ("outside_range", "ambiguous", "unexplained"))
        print(f"| {kind} | {len(flags)} | {' | '.join(f'{share:.0%}' for share in shares)} |")


def main(s):
    check_numbers(s, int, targets=(1, 10**6), original_iterations=(1, 10**6), seed=(0, 2**32 - 1))
    check_numbers(s, regressor_minutes=(0, 10**4))
    out_dir = report_folder(s.out_dir, "results.jsonl", "method", "plot.png")
    names = list(METHODS) if s.methods == "all" else s.methods.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise InputError(f'methods: no "{unknown[0]}"{nearest(unknown[0], METHODS)}')
    head = "median error | 95% within | worst | within 0.1 | 0.3 | 0.5 | model calls | seconds | memory"
    print(f"| | targets | {head} |\n| {'--- | ' * 11}")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    results = out_dir / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {result["method"]: result for result in done if result["settings"] == comparable(s)}
    with open(results, "w") as file:
        for i, name in enumerate(names):
            if not (result := done.get(name)):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    result = process.submit(run_method, name, s).result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            e = np.abs(np.subtract(result["found"], result["angles"]))
            accuracy = f"{np.median(e):.3f}° | {np.quantile(e, 0.95):.3f}° | {e.max():.3f}°"
            shares = " | ".join(f"{np.mean(e <= limit):.0%}" for limit in (0.1, 0.3, 0.5))
            cost = f"{result['calls']:.0f} | {result['seconds']:.2f} | {result['memory']:.2f} GiB"
            print(f"| {name} | {len(e)} | {accuracy} | {shares} | {cost} |", flush=True)
            if "inside" in result:
                print(f"  90% intervals hold {result['inside']:.0%}; at most {max(result['iterations'])} iterations")
            axes.loglog(result["seconds"], np.median(e), "os"[i // 10], label=name)  # colours repeat after ten
    axes.set(xlabel="seconds a target", ylabel="median error (degrees)")
    axes.legend(fontsize=7)
    figure.savefig(out_dir / "plot.png", dpi=110)
    count_flags(s)


if __name__ == "__main__":
    run_script(main, settings)
