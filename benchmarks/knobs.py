"""What each setting of a training is worth: short trainings that differ in one of them, by their control error.

    python benchmarks/knobs.py            # about three quarters of an hour of one core
    python benchmarks/knobs.py variants=defaults,ema seeds=1

Trains on dataForTrain as tutorial_train.py does, and reads the validation pictures as invert.py does. The defaults are
trained with every seed, so that the table tells what is chance. A variant that was done is not trained again. Prints
the table of docs/training.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    steps=500,
    seeds=3,  # of the defaults; a variant has the first
    variants="all",  # or some, with commas between them
    out_dir="outputs/knobs",
)
if __name__ == "__main__":
    answer(__file__)

import json
import time
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
    "accumulated": "batch_size=8 accumulate=2",
}


def measure(s, variant, seed, folder):
    """Train a variant, unless that was done. Returns: the errors of its validation pictures; seconds of training."""
    file = folder / "errors.json"
    if not file.exists():
        common = f"max_steps={s.steps}", f"seed={seed}", f"logger_freq={s.steps}", f"out_dir={folder / 'control'}"
        began = time.perf_counter()
        with patch.object(tutorial_train, "finish", lambda *_: None):  # error bars, which nothing here needs
            tutorial_train.main(override(tutorial_train.settings, [*common, *VARIANTS[variant].split()]))
        seconds = time.perf_counter() - began
        results = read_targets(folder / "control", VALIDATION, folder / "readings")
        errors = np.abs([listed(result["error"], 1)[0] for result in results]).tolist()
        save_json(file, {"errors": errors, "seconds": seconds})
    found = json.loads(file.read_text())
    return found["errors"], found["seconds"]


def main(s):
    check_numbers(s, int, steps=(1, 10**6), seeds=(1, 100))
    variants, out_dir = choose(s.variants, VARIANTS, 'setting "variants"'), output_folder(s.out_dir)
    runs = [(variant, seed) for variant in variants for seed in range(s.seeds if variant == "defaults" else 1)]
    lines = ["| setting | seed | median | 95% within | worst | minutes |", "| --- | --- | --- | --- | --- | --- |"]
    for variant, seed in tqdm(runs, "training"):
        errors, seconds = measure(s, variant, seed, out_dir / f"{variant} {seed}")
        shown = " | ".join(quantiles(errors, (0.5, 0.95, 1)))
        lines.append(f"| {variant}: `{VARIANTS[variant]}` | {seed} | {shown} | {seconds / 60:.1f} |")
    print(f"error in degrees of {len(errors)} validation pictures after {s.steps} steps", *lines, sep="\n")


if __name__ == "__main__":
    run_script(main, settings, resume="variants that were done are not trained again")
