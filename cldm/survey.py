"""What `tutorial_train.py check=true` tells of its data: every problem, the numbers, and what training will take."""

import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from cldm.controlnet import default_names
from cldm.dataset import TRAINING_FILE, VALIDATION_FILE, iterate_rows, read_control_names
from cldm.hints import wrap
from cldm.logger import count_values
from cldm.pairs import training_set
from cldm.runs import count_steps, make_trainer
from cldm.training import ControlTraining, Method, checkpointing
from ldm.pictures import check_pictures, describe_fit, fit_picture, pictures_to_tensor
from ldm.schema import Settings
from ldm.settings import InputError

BARS = " ▁▂▃▄▅▆▇█"
BINS = 24  # of a histogram
SHOWN = 12  # prompts
SUBJECTS, LOOKED_AT = 3, 200  # prompts, the commonest, and pictures of each that are compared with one another
FEWEST = 6  # pictures of a prompt, below which nothing is said
THUMBNAIL = 16  # pixels
UNLIKE, ALIKE = 0.7, 2.0  # times the distance of any two pictures, and that to the likest one
REHEARSED = 3  # steps, of which the first is left out


def describe_numbers(controls, names):
    """controls: N times d numbers. names: d texts. Returns: a line each, its range and a histogram of its values."""
    lines = []
    for name, values in zip(names, np.array(controls).T):
        shares = (values - values.min()) / (np.ptp(values) or 1)  # bins of large numbers might be none
        counts, _ = np.histogram(shares, BINS, (0, 1))
        bars = "".join(BARS[int(np.ceil(count / counts.max() * (len(BARS) - 1)))] for count in counts)
        lines.append(f"{name}: |{bars}| {values.min():.10g} to {values.max():.10g}, {count_values(values)}")
    return lines


def describe_prompts(prompts):
    """prompts: of every row. Returns: lines on how many there are, and how many pictures each has."""
    counts = Counter(prompts).most_common()
    lines = [f"{len(counts)} prompt(s), {statistics.median(count for _, count in counts):g} pictures each (median)"]
    lines += [f'  {count:6}  "{prompt}"' for prompt, count in counts[:SHOWN]]
    return lines + ["  …"] * (len(counts) > SHOWN)


def tell_subjects(data):
    """Returns: a line for every prompt of a TrainingData under which pictures fall into groups.

    There, pictures whose numbers are nearest look as unlike as any two, though each has others that it is like. With
    references, which show the subject, there is nothing to tell.
    """
    lines, prompts = [], [] if data.has_references else data.prompts
    for prompt, count in Counter(prompts).most_common(SUBJECTS):
        if count < FEWEST:
            continue
        places = (i for i, own in enumerate(prompts) if own == prompt)  # of a million rows, most are never made
        rows = [data.train[i] for i in islice(places, LOOKED_AT)]
        looks = pictures_to_tensor([fit_picture(row.load()[0], THUMBNAIL) for row in rows]).flatten(1)
        controls = torch.tensor([row.control for row in rows], dtype=torch.float64)
        gaps = wrap(controls - controls[:, None], data.periods or ()) / controls.std(0).clamp_min(1e-9)
        apart = torch.eye(len(rows)).bool()
        unlike, gaps = torch.cdist(looks, looks), gaps.norm(dim=2).masked_fill(apart, torch.inf)
        nearest = unlike.gather(1, gaps.argmin(1, keepdim=True)).squeeze(1)
        likest = unlike.masked_fill(apart, torch.inf).amin(1).clamp_min(1e-9)
        if nearest.median() > UNLIKE * unlike[~apart].median() and (nearest / likest).median() > ALIKE:
            lines.append(
                f'warning: under the prompt "{prompt}" several subjects seem to be shown: pictures with nearly the '
                "same numbers look quite unlike; give each subject a prompt of its own"
            )
    return lines


def find_contradictions(rows, periods):
    """Returns: a line if some of N rows show the same, pictures and prompt, at other numbers. periods: d, or None."""
    first, found = {}, []
    for row in rows:
        before = first.setdefault(row.shown, row)
        apart = before.control != row.control  # of a million rows, few
        if apart and wrap(torch.tensor(before.control).double() - torch.tensor(row.control), periods or ()).any():
            found.append((before, row))
    if not found:
        return []
    (one, other), more = found[0], f", and {len(found) - 1} more" * (len(found) > 1)
    return [f"warning: {other.place} shows what {one.place} shows, at other numbers{more}; one of them is wrong"]


def survey_rows(data_root, image_size):
    """Returns: lines on the rows and pictures of a folder; the InputErrors of its lines and files."""
    lines, problems, like, names, periods = [], [], None, None, None
    for name in (TRAINING_FILE, VALIDATION_FILE):
        file, found = Path(data_root) / name, []
        if name != TRAINING_FILE and not file.exists():
            break
        rows = list(iterate_rows(file, like=like, problems=found))
        lines.append(f"{file}: {len(rows) + len(found)} rows" + f", {len(found)} of them with problems" * bool(found))
        problems += found
        if not rows:
            continue
        if not like:
            like = rows[0]
            try:
                names, _, periods, _ = read_control_names(data_root, len(like.control))
            except InputError as error:
                problems.append(error)
        places, broken = {str(picture): row.place for row in rows for picture in row.pictures}, {}
        sizes = check_pictures([*places], broken)
        problems += [InputError(f"{places[path]}: {error}") for path, error in broken.items()]
        lines += find_contradictions(rows, periods)
        lines += describe_numbers([row.control for row in rows], names or default_names(len(like.control)))
        lines += describe_prompts([row.prompt for row in rows])
        lines.append(f"{len(places)} pictures; {describe_fit(sizes, image_size) or 'all as large as the model takes'}")
    return lines, problems


def rehearse(s, model, data):
    """Train for a few steps, whose weights are thrown away.

    s: tutorial_train's settings. Returns: a line on the seconds and the memory that a training will take.
    """
    began = time.perf_counter()
    some = training_set(replace(data, train=data.train[: s.batch_size]), model.base, model.config.image_size, s.seed)
    encoding = 0 if s.pairs else (time.perf_counter() - began) / len(some)
    first = REHEARSED if s.proposal_steps else 0
    count = first + REHEARSED
    method = Method(0.0, count, sd_locked=s.sd_locked, proposal_steps=first, ema=s.ema)
    module, ends = ControlTraining(model, method), []

    class Clock(pl.Callback):
        def on_train_batch_end(self, *_):
            ends.append(time.perf_counter())

    order = [i % s.batch_size if s.pairs else i % len(some) for i in range(count * s.batch_size)]
    batches = DataLoader(some, s.batch_size, sampler=order)
    with TemporaryDirectory() as folder:
        processes = make_trainer(s, folder, []).world_size
        single = Settings(s | dict(max_steps=count, accumulate=1, devices=1, num_nodes=1))
        with checkpointing(model, s.save_memory):
            make_trainer(single, folder, [Clock()]).fit(module, batches)
    alone, step = (s.accumulate * (own[-1] - own[0]) / (REHEARSED - 1) for own in (ends[:REHEARSED], ends[first:]))
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps, size = count_steps(s, len(data.train), processes), s.batch_size * s.accumulate
    encoding_all = encoding * (min(len(data.train), steps * size) + len(data.validation))
    minutes = (encoding_all + alone * s.proposal_steps + step * (steps - s.proposal_steps)) / 60
    aside = f", {alone:.2f} s one of the proposal alone" if first else ""
    return (
        f"training takes about {max(1, round(minutes))} min, {step:.2f} s a step of {size} pictures{aside} and "
        f"{encoding:.2f} s to encode one, and {memory / 2**30:.1f} GiB; validations and error bars come on top"
    )
