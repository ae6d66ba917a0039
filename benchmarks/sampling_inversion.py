"""Accuracy and time of test5 and test5_s1 as shipped: photographs turned by angles that training never saw.

    python benchmarks/sampling_inversion.py                      # 3 targets a photo, both scripts, one run
    python benchmarks/sampling_inversion.py model_path=runs/mine

Every target is inverted alone, as the scripts do it; the two scripts take turns target by target, so that a busy
machine slows both. Prints the README's table and writes every inversion to out_dir/results.jsonl.
"""

import json
import platform
import random
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test5  # noqa: E402
import test5_s1  # noqa: E402
from cldm.model import load_model  # noqa: E402
from dataForTrain.make_dataset import render_framed, select_photos  # noqa: E402
from ldm.settings import output_folder, run_script  # noqa: E402

settings = dict(
    model_path="models/control_tiny",
    photos="train",
    pairs=3,  # (start, target) a photo, drawn from -5...5 degrees
    seed=1,
    out_dir="outputs/sampling_inversion",
)


def main(s):
    out_dir = output_folder(s.out_dir)
    rng = random.Random(s.seed)
    model = load_model(s.model_path)
    targets = [
        (name, photo, rng.uniform(-5, 5), rng.uniform(-5, 5))
        for name, photo in select_photos(s.photos).items()
        for _ in range(s.pairs)
    ]
    errors = {"test5": [], "test5_s1": []}
    seconds = {"test5": [], "test5_s1": []}
    iterations = {"test5": [], "test5_s1": []}
    with open(out_dir / "results.jsonl", "w") as file:
        for name, photo, start, angle in tqdm(targets, desc="targets"):
            size = model.config.image_size
            pictures = [render_framed(photo, size, degrees) for degrees in (start, angle)]
            for script, module in {"test5": test5, "test5_s1": test5_s1}.items():
                own = OmegaConf.create({**module.settings, "control": [start], "prompt": photo.prompt})
                result = test5.infer(model, own, *pictures, script=script)
                found = result.control.item()
                errors[script].append(abs(found - angle))
                seconds[script].append(result.seconds)
                iterations[script].append(result.iterations.item())
                row = dict(photo=name, script=script, start=start, angle=angle, control=found, loss=result.loss.item())
                row.update(iterations=iterations[script][-1], seconds=result.seconds)
                file.write(json.dumps(row) + "\n")
                file.flush()
    machine = f"{torch.get_num_threads()} threads of {platform.machine()}"
    print(f"\n{len(targets)} targets, seed {s.seed}, {machine}, {s.model_path}\n")
    print("| | median error | 90% within | worst | within 0.3 | iterations (median) | seconds (median, worst) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for script, e in errors.items():
        e, t = np.array(e), np.array(seconds[script])
        accuracy = f"{np.median(e):.3f}° | {np.quantile(e, 0.9):.3f}° | {e.max():.3f}° | {np.mean(e <= 0.3):.0%}"
        cost = f"{np.median(iterations[script]):.0f} | {np.median(t):.1f}, {t.max():.1f}"
        print(f"| {script} | {accuracy} | {cost} |")
    print(f"\ntest5_s1 took {sum(seconds['test5_s1']) / sum(seconds['test5']):.0%} of test5's time.")


if __name__ == "__main__":
    run_script(main, settings)
