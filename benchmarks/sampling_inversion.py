"""Accuracy and time of test5 and test5_s1 as shipped: photographs rotated by angles that training never saw.

    python benchmarks/sampling_inversion.py                      # 3 targets a photo, both scripts, one run
    python benchmarks/sampling_inversion.py model_path=runs/mine

The two scripts take turns, target by target, so that a busy machine slows both. Prints a table of docs/results.md;
leaves every inversion in out_dir/results.jsonl.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    model_path="models/control_tiny",
    photos="train",
    pairs=3,  # (start, target) a photo, drawn from -5...5 degrees
    seed=1,
    out_dir="outputs/sampling_inversion",
)
if __name__ == "__main__":
    answer(__file__)

import json
import platform
import random

import numpy as np
import torch
from tqdm import tqdm

import test5
import test5_s1
from benchmarks.common import quantiles
from benchmarks.inversion import invert
from cldm.model import load_model
from dataForTrain.make_dataset import render_framed, select_photos
from ldm.files import report_folder


def main(s):
    check_numbers(s, int, pairs=(1, 1000), seed=(0, 2**63 - 1))
    out_dir = report_folder(s.out_dir, "results.jsonl", "script")
    rng, model, rows = random.Random(s.seed), load_model(s.model_path), []
    for name, photo in tqdm(select_photos(s.photos).items(), desc="photographs"):
        starts, angles = ([rng.uniform(-5, 5) for _ in range(s.pairs)] for _ in range(2))
        for start, angle in zip(starts, angles):
            pictures = [render_framed(photo, model.config.image_size, degrees) for degrees in (start, angle)]
            for script in (test5, test5_s1):
                result, _ = invert(script, model, photo.prompt, *pictures, start)
                row = dict(script=script.__name__, photo=name, start=start, angle=angle, control=result.control.item())
                rows.append(row | dict(loss=result.loss, iterations=len(result.history), seconds=result.seconds))
                (out_dir / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    print(f"\n{len(rows) // 2} targets, seed {s.seed}, {machine}, {s.model_path}\n")
    print("| | median error | 90% within | worst | within 0.3 | iterations (median, worst) | seconds a target |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for script in ("test5", "test5_s1"):
        own = [row for row in rows if row["script"] == script]
        errors = np.abs([row["control"] - row["angle"] for row in own])
        iterations, seconds = ([row[key] for row in own] for key in ("iterations", "seconds"))
        accuracy = " | ".join(f"{number}°" for number in quantiles(errors, [0.5, 0.9, 1]))
        cost = f"{np.median(iterations):.0f}, {max(iterations)} | {np.median(seconds):.1f}"
        print(f"| {script} | {accuracy} | {np.mean(errors <= 0.3):.0%} | {cost} |")


if __name__ == "__main__":
    run_script(main, settings)
