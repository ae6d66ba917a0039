"""Reading an angle: every method on the same targets, in one run.

    python benchmarks/inversion.py                                  # all, about 70 minutes on two cores
    python benchmarks/inversion.py methods=lm_denoising             # some

Targets are photographs at random angles that training never saw; slow methods take a share of them. Every method runs
in a process of its own, so that its memory can be told. Prints a table of docs/results.md, then how often each flag is
raised for targets in the range, at +-8 degrees, and of photographs never trained on; leaves results.jsonl and plot.png
in out_dir. Started again with the same settings, it keeps the results that are there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, Settings, answer, check_numbers, run_script

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
import random
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.models import resnet18

import test5
import test5_s1
from benchmarks.baselines import read_by_adam, read_by_sampling
from benchmarks.common import choose, quantiles, read_lines
from benchmarks.regressors import augment, train_regressor
from cldm.dataset import split_rows
from cldm.model import MODEL_YAML, Sampling, load_model, read_model_yaml
from cldm.reading import read_controls
from cldm.report import COLOURS, label
from cldm.results import digest_model
from dataForTrain.make_dataset import HELD_OUT, TRAIN, render_framed
from ldm.files import find_path, report_folder, write_whole
from ldm.pictures import load_picture, pictures_to_tensor
from ldm.schema import read_config

SIZE = 128  # pixels
BATCH = 12  # targets read together
ORIGINAL = dict(num_samples=1, scale=9.0, eta=1.0)  # the original's settings; its rate, of the control itself, is 0.35


@dataclass
class Case:
    picture: Image.Image
    prompt: str
    angle: float  # degrees
    start: float  # for the methods that need one


def draw_cases(photos, count, rng, angle):
    """Returns: `count` Cases, taking photographs in turn, at angles drawn by angle(rng)."""
    cases = []
    for photo in itertools.islice(itertools.cycle(photos.values()), count):
        degrees = angle(rng)
        cases.append(Case(render_framed(photo, SIZE, degrees), photo.prompt, degrees, rng.uniform(-5, 5)))
    return cases


def encode(model, cases):
    return model.encode([case.prompt for case in cases], [case.picture for case in cases])


def invert(script, model, prompt, start, target, control, **overrides):
    """Invert a picture by test5 or test5_s1. start, target: PIL pictures. control: number to start from.

    Returns: Inversion; how many pictures the model was evaluated on, a gradient counting twice.
    """
    s = Settings({**script.settings, **overrides})
    start, target = (model.encode([prompt], [picture]) for picture in (start, target))
    result = test5.infer(model, s, start.latents, target, torch.tensor([control], dtype=torch.float64))
    steps = s.ddim_steps + (len(result.history) - 1) * (s.warm_steps or s.ddim_steps)
    return result, 2 * steps * s.num_samples * (1 if s.scale == 1 else 2)


def by_script(script, overrides=None):
    """Returns: a method, which inverts cases one by one."""

    def read(model, cases, s):
        own = dict(overrides or {})
        if own:
            rate = 0.35 / model.control_net.config.control_std[0] ** 2  # test5's rates are for a control of spread 1
            own |= dict(learning_rate=rate, iterations=s.original_iterations)
        results = [invert(script, model, c.prompt, c.picture, c.picture, c.start, **own) for c in cases]
        return dict(found=[result.control.item() for result, _ in results], calls=sum(calls for _, calls in results))

    return read


def by_reading(model, cases, s, batch_size=BATCH):
    """Read cases as invert.py does."""
    targets = (encode(model, cases[i : i + batch_size]) for i in range(0, len(cases), batch_size))
    readings = [read_controls(model, target) for target in targets]
    found, low, high = torch.cat([torch.cat([r.control, r.interval90[:, 0]], 1) for r in readings]).T.tolist()
    return dict(
        found=found,
        calls=sum(reading.model_calls * len(reading.control) for reading in readings),
        inside=np.mean([a <= case.angle <= b for a, b, case in zip(low, high, cases)]),
        iterations=torch.cat([reading.iterations for reading in readings]).tolist(),
        flags=[flags for reading in readings for flags in reading.flags],
    )


def in_batches(read):
    """read: function(model, target) -> controls, model calls, …. Returns: a method."""

    def method(model, cases, s):
        results = [read(model, encode(model, cases[i : i + BATCH])) for i in range(0, len(cases), BATCH)]
        return dict(
            found=torch.cat([result[0] for result in results])[:, 0].tolist(),
            calls=sum(result[1] for result in results),
        )

    return method


def by_regressor(model, cases, s):
    """A CNN from picture to angle, trained on the control's own pictures.

    They are shifted, zoomed a little and changed in brightness while it trains, or it would learn them by heart.
    """
    rows, _ = split_rows(find_path(s.data_root))
    pictures = pictures_to_tensor([load_picture(row.target) for row in rows])
    angles = torch.tensor([row.control for row in rows])
    spread, network = angles.std(), resnet18(num_classes=1)

    def draw_batch(step):
        chosen = torch.randint(len(rows), (32,))
        return (augment(pictures[chosen]),), angles[chosen] / spread

    train_regressor(network, s.regressor_minutes, draw_batch, nn.functional.mse_loss)
    with torch.no_grad():
        began = time.perf_counter()
        found = network(pictures_to_tensor([case.picture for case in cases]))[:, 0] * spread
    return dict(found=found.tolist(), calls=len(cases), seconds=(time.perf_counter() - began) / len(cases))


# name: (it takes one in so many targets, coprime to the 12 photographs; function(model, cases, settings) -> result)
METHODS = {
    "original": (17, by_script(test5, ORIGINAL)),
    "original_s1": (17, by_script(test5_s1, ORIGINAL)),
    "test5": (5, by_script(test5)),
    "test5_s1": (5, by_script(test5_s1)),
    "adam_denoising": (7, in_batches(read_by_adam)),
    "lm_sampling": (1, in_batches(partial(read_by_sampling, sampling=Sampling(ddim_steps=10), draws=4))),
    "lm_denoising": (1, by_reading),
    "lm_denoising_alone": (1, partial(by_reading, batch_size=1)),
    "regressor": (1, by_regressor),
}

# name: what the plot calls it, on which side of its point; what it compares with the target
SHOWN = {
    "original": ("the original's settings", "below", "drawings"),
    "original_s1": ("the original's, warm-started", "left", "drawings"),
    "test5": ("test5.py", "right", "drawings"),
    "test5_s1": ("test5_s1.py", "left", "drawings"),
    "lm_sampling": ("Levenberg-Marquardt", "right", "drawings"),
    "adam_denoising": ("Adam", "right", "noise removed"),
    "lm_denoising": ("invert.py, 12 at a time", "left", "noise removed"),
    "lm_denoising_alone": ("invert.py, one at a time", "right", "noise removed"),
    "regressor": ("ResNet-18", "right", "nothing: a network answers"),
}
SIDES = {
    "left": dict(xytext=(-7, 0), ha="right", va="center"),
    "right": dict(xytext=(7, 0), ha="left", va="center"),
    "below": dict(xytext=(0, -7), ha="center", va="top"),
}


def comparable(s):
    """Returns: the settings that results depend on; only results of the same ones stand in one table."""
    control = digest_model(s.model_path, read_model_yaml(find_path(s.model_path) / MODEL_YAML).base)
    return {name: s[name] for name in settings if name not in ("methods", "out_dir")} | {"control": control}


def run_method(name, s):
    """Returns: a method's line of results.jsonl. It needs a process of its own, for its memory."""
    torch.manual_seed(s.seed)
    share, method = METHODS[name]
    cases = draw_cases(TRAIN, s.targets, random.Random(s.seed), lambda rng: rng.uniform(-5, 5))[::share]
    model = load_model(s.model_path)
    began = time.perf_counter()
    result = method(model, cases, s)
    return {
        "method": name,
        "settings": comparable(s),
        "angles": [case.angle for case in cases],
        "seconds": (time.perf_counter() - began) / len(cases),
        **result,
        "calls": result["calls"] / len(cases),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # GiB
    }


def print_row(result):
    errors = np.abs(np.subtract(result["found"], result["angles"]))
    accuracy = [f"{number}°" for number in quantiles(errors, [0.5, 0.95, 1])]
    accuracy += [f"{np.mean(errors <= limit):.0%}" for limit in (0.1, 0.3, 0.5)]
    cost = f"{result['calls']:.0f} | {result['seconds']:.2f} | {result['memory']:.2f} GiB"
    print(f"| {result['method']} | {len(errors)} | {' | '.join(accuracy)} | {cost} |", flush=True)
    if "inside" in result:
        print(f"  90% intervals hold {result['inside']:.0%}; at most {max(result['iterations'])} iterations")


def draw_costs(costs, file):
    """Plot the methods, their names beside them. costs: {name: (seconds a target, median error in degrees)}."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes, colours = figure.subplots(), iter(COLOURS)
    kind_of = lambda name: SHOWN[name][2]  # noqa: E731
    for kind, names in itertools.groupby(sorted(costs, key=kind_of), kind_of):
        own = {name: costs[name] for name in names}
        axes.loglog(*zip(*own.values()), "o", color=next(colours), label=kind)
        for name, cost in own.items():
            text, side, _ = SHOWN[name]
            axes.annotate(text, cost, textcoords="offset points", fontsize=9, **SIDES[side])
    axes.margins(0.18)
    axes.set(xlabel="seconds a target", ylabel="median error (degrees)")
    axes.grid(alpha=0.3)
    figure.legend(title="what is compared with the target", loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(file, dpi=110)


def count_flags(s):
    """Print how often each flag is raised, for targets that deserve it and for those that do not."""
    model, rng = load_model(s.model_path), random.Random(s.seed + 1)
    kinds = {
        "in range": (TRAIN, lambda rng: rng.uniform(-5, 5)),
        "at -8 or 8 degrees": (TRAIN, lambda rng: rng.choice([-8.0, 8.0])),
        "never trained on": (HELD_OUT, lambda rng: rng.uniform(-5, 5)),
    }
    print("\n| targets | number | outside_range | ambiguous | unexplained |\n| --- | --- | --- | --- | --- |")
    for kind, (photos, angle) in kinds.items():
        flags = by_reading(model, draw_cases(photos, s.targets, rng, angle), s)["flags"]
        shares = (np.mean([flag in f for f in flags]) for flag in ("outside_range", "ambiguous", "unexplained"))
        print(f"| {kind} | {len(flags)} | {' | '.join(f'{share:.0%}' for share in shares)} |")


def main(s):
    check_numbers(s, int, targets=(1, 10**6), original_iterations=(1, 10**6), seed=(0, 2**32 - 1))
    check_numbers(s, regressor_minutes=(0, 10**4))
    out_dir, names = (
        report_folder(s.out_dir, "results.jsonl", "method", "plot.png"),
        choose(s.methods, METHODS, "methods"),
    )
    found = read_config(find_path(s.model_path) / "config.json")
    if list(found.control_units) != ["degrees"]:
        told = ", ".join(map(label, found.control_names, found.control_units))
        raise InputError(f"model_path {s.model_path}: expected a control of one angle in degrees, found {told}")
    file = out_dir / "results.jsonl"
    results, same = read_lines(file) if file.exists() else [], comparable(s)
    results = {result["method"]: result for result in results if result["settings"] == same}
    print("| | targets | median error | 95% within | worst | within 0.1 | 0.3 | 0.5 | model calls | seconds | memory |")
    print(f"| {'--- | ' * 11}")
    for name in names:
        if name not in results:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                results[name] = process.submit(run_method, name, s).result()
            lines = [json.dumps(result) + "\n" for result in results.values()]
            write_whole(file, partial(Path.write_text, data="".join(lines)))
        print_row(results[name])
    errors = {name: np.median(np.abs(np.subtract(results[name]["found"], results[name]["angles"]))) for name in names}
    draw_costs({name: (results[name]["seconds"], error) for name, error in errors.items()}, out_dir / "plot.png")
    count_flags(s)


if __name__ == "__main__":
    run_script(main, settings)
