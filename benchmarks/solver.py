"""What each part of the solver is worth: the same pairs read with all of them, and without one.

    python benchmarks/solver.py        # about 10 minutes on two cores

Parts: doubled steps, Broyden's update (else a new Jacobian after every step), the Cauchy loss at the end. Pairs with
all six numbers unknown are cut from photographs that no training has seen. Prints the table of docs/results.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    model_path="models/control_tiny_pair",
    pairs=24,
    seed=9,
)
if __name__ == "__main__":
    answer(__file__)

import random
import time
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np

from benchmarks.common import quantiles
from cldm import reading, solvers
from cldm.changes import CHANGES, choose_changes
from cldm.model import load_model
from cldm.pairs import draw_pair
from dataForTrain.make_dataset import find_pictures

BATCH = 12  # pairs read together


def without_cauchy(objective, start, index, bounds, draw_index=None, scale=None, **how):
    """levenberg_marquardt, but for the last solution by a Cauchy loss."""
    return (
        start if scale is not None else solvers.levenberg_marquardt(objective, start, index, bounds, draw_index, **how)
    )


VARIANTS = {
    "all": (),
    "steps never doubled": (patch.object(solvers, "GAIN", float("inf")),),
    "a new Jacobian after every step": (patch.object(solvers, "LONG_STEP", -1.0),),
    "no Cauchy loss": (patch.object(reading, "levenberg_marquardt", without_cauchy),),
}


def main(s):
    check_numbers(s, int, pairs=(1, 10**6), seed=(0, 2**63 - 1))
    model, rng = load_model(s.model_path), random.Random(s.seed)
    files, ranges = find_pictures("held_out"), choose_changes(None)
    pairs = [draw_pair(rng, files, model.config.image_size, ranges) for _ in range(s.pairs)]
    truth = np.array([list(change.values()) for *_, change in pairs])
    references, targets, _ = zip(*pairs)
    parts = [slice(i, i + BATCH) for i in range(0, len(pairs), BATCH)]
    batches = [model.encode([""] * len(targets[part]), targets[part], references[part]) for part in parts]
    names = [f"{name} ({unit})" for name, (unit, *_) in CHANGES.items()]
    print(f"| | {' | '.join(names)} | model calls | seconds a pair |\n| --- |{' --- |' * (len(names) + 2)}")
    for variant, patches in VARIANTS.items():
        began = time.perf_counter()
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            readings = [reading.read_controls(model, batch) for batch in batches]
        seconds = (time.perf_counter() - began) / len(pairs)
        errors = np.concatenate([own.control.numpy() for own in readings]) - truth
        calls = np.average([own.model_calls for own in readings], weights=[len(batch) for batch in batches])
        cells = [" / ".join(quantiles(column, (0.5, 0.9, 1), 4)) for column in errors.T]
        print(f"| {variant} | {' | '.join(cells)} | {calls:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    run_script(main, settings)
