"""What each setting of a training is worth: short trainings that differ in one of them, by their control error.

    python benchmarks/knobs.py processes=2     # about an hour of two cores
    python benchmarks/knobs.py processes=20    # all at once on a GPU
    python benchmarks/knobs.py variants=defaults,ema seeds=1

Trains on dataForTrain as tutorial_train.py does, and reads the validation pictures as invert.py does, every variant in
a process of its own, which leaves its errors.json and log.txt. The defaults are trained with every seed, so that the
table tells what is chance. A variant that was done is not trained again, one that fails does not stop the others.
Prints the table of docs/training.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    steps=500,
    seeds=3,  # of the defaults; a variant has the first
    variants="all",  # or some, with commas between them
    processes=1,  # variants that are trained at once; of several, each on one thread
    out_dir="outputs/knobs",
)
if __name__ == "__main__":
    answer(__file__)

import json
import os
import time
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

import tutorial_train
from benchmarks.common import choose, quantiles, read_targets, save_json
from cldm.series import listed
from ldm.files import ROOT, output_folder
from ldm.settings import override

VALIDATION = ROOT / "dataForTrain" / "validation.json"
VARIANTS = {
    "defaults": "",
    "squares": "likelihood=false",
    "min_snr": "min_snr=5",
    "ema": "ema=0.99",
    "long ema": "ema=0.999",
    "constant": "schedule=constant",
    "cold": "warmup_steps=0",
    "unclipped": "gradient_clip=0",
    "prompts": "prompt_dropout=0",
    "fewer prompts": "prompt_dropout=0.3",
    "little noise": "timesteps=[0,0.7]",
    "much noise": "timesteps=[0.3,1]",
    "half batch": "batch_size=8",
    "double batch": "batch_size=32",
    "accumulated": "batch_size=8 accumulate=2",
    "half rate": "learning_rate=5e-4",
    "double rate": "learning_rate=2e-3",
    "unlocked": "sd_locked=false",
}


def measure(changes, steps, seed, folder):
    """Train a variant in `folder`, and leave there the errors of its validation pictures and the seconds it took."""
    with open(folder / "log.txt", "a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    common = f"max_steps={steps}", f"logger_freq={steps}", f"seed={seed}", f"out_dir={folder / 'control'}", "devices=1"
    began = time.perf_counter()
    with patch.object(tutorial_train, "finish", lambda *_: None):  # error bars, which nothing here needs
        tutorial_train.main(override(tutorial_train.settings, [*common, *changes.split()]))
    seconds = time.perf_counter() - began
    results = read_targets(folder / "control", VALIDATION, folder / "readings")
    errors = np.abs([listed(result["error"], 1)[0] for result in results]).tolist()
    save_json(folder / "errors.json", {"errors": errors, "seconds": seconds})


def measure_apart(run):
    """Call measure(*run) in a process of its own, unless that was done."""
    if not (run[-1] / "errors.json").exists():
        run[-1].mkdir(exist_ok=True)
        process = get_context("spawn").Process(target=measure, args=run, daemon=True)  # which ends with this one
        process.start()
        process.join()


def main(s):
    check_numbers(s, int, steps=(1, 10**6), seeds=(1, 100), processes=(1, 1000))
    variants, out_dir = choose(s.variants, VARIANTS, 'setting "variants"'), output_folder(s.out_dir)
    names = [(variant, seed) for variant in variants for seed in range(s.seeds if variant == "defaults" else 1)]
    runs = [(VARIANTS[name], s.steps, seed, out_dir / f"{name}, {s.steps} steps, seed {seed}") for name, seed in names]
    if s.processes > 1:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come
    with ThreadPool(s.processes) as threads:
        list(tqdm(threads.imap_unordered(measure_apart, runs, chunksize=1), "training", len(runs)))
    print(f"error in degrees of the validation pictures after {s.steps} steps, {s.processes} variant(s) at once")
    print("| setting | seed | median | 95% within | worst | minutes |\n| --- | --- | --- | --- | --- | --- |")
    for (name, _), (changes, _, seed, folder) in zip(names, runs):
        shown = f"failed: {folder / 'log.txt'} | | |"
        if (folder / "errors.json").exists():
            found = json.loads((folder / "errors.json").read_text())
            shown = " | ".join([*quantiles(found["errors"], (0.5, 0.95, 1)), f"{found['seconds'] / 60:.1f}"])
        print(f"| {name}: `{changes}` | {seed} | {shown} |")


if __name__ == "__main__":
    run_script(main, settings, resume="variants that were done are not trained again")
