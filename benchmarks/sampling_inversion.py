"""Accuracy and time of test5 and test5_s1 as shipped: photographs turned by angles that training never saw.

    python benchmarks/sampling_inversion.py                      # 3 targets a photo, both scripts, one run
    python benchmarks/sampling_inversion.py model_path=runs/mine

The targets of a photograph are inverted as one batch, which gives what each alone would give; the two scripts take
turns photograph by photograph, so that a busy machine slows both. Prints the table of docs/results.md;
out_dir/results.jsonl has every inversion.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import Settings, answer, check_numbers, run_script

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
from cldm.model import load_model
from dataForTrain.make_dataset import render_framed, select_photos
from ldm.files import report_folder


def main(s):
    check_numbers(s, int, pairs=(1, 1000), seed=(0, 2**63 - 1))
    out_dir = report_folder(s.out_dir, "results.jsonl", "script")
    rng = random.Random(s.seed)
    model = load_model(s.model_path)
    photos = select_photos(s.photos)
    size = model.config.image_size
    errors, iterations, seconds = ({"test5": [], "test5_s1": []} for _ in range(3))
    with open(out_dir / "results.jsonl", "w") as file:
        for name, photo in tqdm(photos.items(), desc="photographs"):
            starts, angles = ([rng.uniform(-5, 5) for _ in range(s.pairs)] for _ in range(2))
            pictures = [[render_framed(photo, size, angle) for angle in each] for each in (starts, angles)]
            for script, module in {"test5": test5, "test5_s1": test5_s1}.items():
                own = Settings({**module.settings, "prompt": photo.prompt})
                result = test5.infer(model, own, *pictures, torch.tensor(starts)[:, None])
                found = result.control[:, 0].tolist()
                errors[script] += [abs(a - b) for a, b in zip(found, angles)]
                iterations[script] += result.iterations.tolist()
                seconds[script].append(result.seconds)
                for row in zip(starts, angles, found, result.loss.tolist(), result.iterations.tolist()):
                    row = dict(zip(("start", "angle", "control", "loss", "iterations"), row), photo=name, script=script)
                    file.write(json.dumps(row) + "\n")
                file.flush()
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    print(f"\n{len(errors['test5'])} targets, seed {s.seed}, {machine}, {s.model_path}\n")
    print("| | median error | 90% within | worst | within 0.3 | iterations (median, worst) | seconds a photo |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for script, e in errors.items():
        e, n = np.array(e), iterations[script]
        accuracy = f"{np.median(e):.3f}° | {np.quantile(e, 0.9):.3f}° | {e.max():.3f}° | {np.mean(e <= 0.3):.0%}"
        cost = f"{np.median(n):.0f}, {max(n)} | {np.median(seconds[script]):.0f}"
        print(f"| {script} | {accuracy} | {cost} |")
    print(f"\ntest5_s1 took {sum(seconds['test5_s1']) / sum(seconds['test5']):.0%} of test5's time.")


if __name__ == "__main__":
    run_script(main, settings)
