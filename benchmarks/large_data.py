"""Seconds and memory until the first step of a training on many rows.

    python benchmarks/large_data.py                    # a million rows, written to a temporary folder
    python benchmarks/large_data.py prompts=1000000    # of which no two have the same prompt

Few pictures are drawn, which the rows share. Prints a table of docs/large_data.md: seconds by the clock and of the
processor, and the process's memory at its peak. On a busy machine the processor's tell more.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    rows=1_000_000,
    pictures=50,
    prompts=50,
    base="models/tiny.yaml",
)
if __name__ == "__main__":
    answer(__file__)

BEGAN = time.perf_counter(), time.process_time()

import json
import resource
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
from PIL import Image

import tutorial_train
from cldm.dataset import Ahead, TrainingOrder
from cldm.logger import describe_data
from cldm.pairs import training_set, validation_set
from cldm.runs import describe_run
from cldm.survey import tell_subjects
from ldm.schema import Settings

COUNT = 1, 10**9
IMPORTED = time.perf_counter(), time.process_time()


def write_data(s, folder):
    """Write a prompt.json and its pictures, noise of 128 x 128 pixels."""
    rng = np.random.default_rng(0)
    for i in range(s.pictures):
        noise = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"picture_{i:04d}.png")
    with open(folder / "prompt.json", "w", encoding="utf-8") as file:
        for i, source in enumerate(rng.uniform(-10, 10, s.rows).round(4).tolist()):
            target, prompt = f"picture_{i % s.pictures:04d}.png", f"a photo of thing {i % s.prompts}"
            file.write(json.dumps({"source": source, "target": target, "prompt": prompt}) + "\n")


def peak():
    """Returns: the most memory that the process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(s, folder):
    """Do what tutorial_train.py does until its first step. Returns: {stage: (seconds, CPU seconds, peak in MiB)}."""
    own = Settings(tutorial_train.settings | dict(data_root=folder, base=s.base, latents_cache=folder / "latents"))
    measured, last = {}, [time.perf_counter(), time.process_time()]

    def note(stage):
        now = time.perf_counter(), time.process_time()
        measured[stage] = *(after - before for after, before in zip(now, last)), peak()
        last[:] = now

    measured["imports"] = *(after - before for after, before in zip(IMPORTED, BEGAN)), peak()
    data = tutorial_train.read(own)
    note("rows")
    model = tutorial_train.make_model(own, data)
    note("model")
    describe_data(data, model.control_net.config), tell_subjects(data)
    note("what is told of them")
    given = data, model.base, model.config.image_size, own.seed, own.latents_cache
    rows, _ = training_set(*given), validation_set(*given)
    note("datasets")
    describe_run(own, model, data, SimpleNamespace(precision=own.precision, world_size=1))
    note("a look at every picture file")
    next(iter(Ahead(rows, own.batch_size, sampler=TrainingOrder(len(rows), own.batch_size, own.seed))))
    note("first batch, encoded")
    return measured


def main(s):
    check_numbers(s, int, rows=COUNT, pictures=COUNT, prompts=COUNT)
    with TemporaryDirectory() as folder:
        write_data(s, Path(folder))
        measured = measure(s, Path(folder))
    print(f"\n{s.rows} rows, {s.prompts} prompts, {s.base}\n")
    print("| stage | seconds | of the processor | MiB at the peak |\n| --- | --- | --- | --- |")
    for stage, (seconds, processor, peak) in measured.items():
        print(f"| {stage} | {seconds:.1f} | {processor:.1f} | {peak:.0f} |")
    total = [sum(own[k] for own in measured.values()) for k in (0, 1)]
    print(f"| all | {total[0]:.1f} | {total[1]:.1f} | |")


if __name__ == "__main__":
    run_script(main, settings)
