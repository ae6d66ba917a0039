"""Stable Diffusion at full size on a GPU: seconds, memory, how busy the device is, how often the CPU waits for it.

    python benchmarks/gpu.py                              # 1.5; a few minutes
    python benchmarks/gpu.py base=models/cldm_v21.yaml

Random weights, which cost what real ones do, are made on the device; nothing is read or downloaded. A row is a training
step of tutorial_train.py, an iteration of test5.py or of test5_s1.py that draws a batch, or a reading of a batch of
targets; what does not fit is tried again with save_memory=true. Busy: the share of a step's seconds in which anything
ran on the device, by the profiler, without which the seconds are taken. Waits: calls in a step during which the CPU
waits for the device. A last table compares what is read in bfloat16 and in float32, here and by the control that ships.
Prints both, which are also in out_dir/measured.json.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    base="models/cldm_v15.yaml",  # whose architecture is built, in its precision
    image_sizes=[512, 320],  # pixels, multiples of 8
    batches=[1, 4, 16],
    seconds=200.0,  # after so many, no further row is begun
    device="cuda",  # or cpu, for a base that is small enough
    out_dir="outputs/gpu",
)
if __name__ == "__main__":
    answer(__file__)

BEGAN = time.perf_counter()

import copy
import gc
import math
import traceback
import warnings
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from statistics import median
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel

import test5
import test5_s1
import tutorial_train
from benchmarks.common import save_json, start_report
from cldm.conversion import add_control
from cldm.dataset import read_rows
from cldm.hints import wrap
from cldm.model import Target, load_model, pick_device, read_model_yaml
from cldm.reading import read_controls
from cldm.runs import make_trainer
from cldm.training import ControlTraining, Method, checkpointing
from ldm.base import LatentDiffusion, load_scheduler
from ldm.files import ROOT, find_path
from ldm.schema import Settings, each, expect, number

PROMPT = "a photo of an astronaut in an orange suit"
SHIPPED = "models/control_tiny"
TARGETS = 4  # read in both precisions
TIMED, ENOUGH = 4, 2.0  # steps whose median is taken, fewer once they took so many seconds
QUICK, SHORT = 1.0, 4.0  # seconds of a step whose waits are counted anew after the first, and of one that is profiled
TRAINED = ("waits", *["seconds"] * TIMED, "waits", "busy")  # what is noted of a training's steps of one shape
TRAINING, SAVING = "a step of `tutorial_train.py`", ", `save_memory=true`"
NO_ROOM = "does not fit"


def make_model(base, image_size, device):
    """Returns: a ControlLDM of random weights, the base's in its precision, the control's in float32."""
    config = Settings(read_model_yaml(find_path(base)) | dict(image_size=image_size))
    architecture, dtype = find_path(config.architecture), getattr(torch, config.get("precision", "float32"))
    torch.manual_seed(0)
    with torch.device(device):
        vae, unet = (
            cls.from_config(cls.load_config(architecture / name))
            for cls, name in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
        )
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(architecture / "text_encoder"))
    for part in (vae, text, unet):
        nn.Module.to(part, dtype)
    ldm = LatentDiffusion(vae, text, unet, load_scheduler(architecture, config.get("prediction_type")))
    with torch.device(device):
        model = add_control(ldm, config, hint="coordinate")
    for part in (*model.control_net.controlnet_down_blocks, model.control_net.controlnet_mid_block):
        nn.init.normal_(part.weight, std=0.02)  # a fresh control would have no effect
    model.control_net.register_to_config(control_low=[-5.0], control_high=[5.0], control_std=[3.0])
    return model


def in_precision(model, dtype):
    """Returns: a copy of a ControlLDM in another precision."""
    model = copy.deepcopy(model)
    for part in (model.base.vae, model.base.text_encoder, model.base.unet):
        nn.Module.to(part, dtype)
    model.control_net.to_precision(dtype)
    return model


def clear(device):
    """Free what earlier rows left, and count the peak of memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def covered(spans):
    """spans: (start, end). Returns: the length of their union."""
    length, last = 0, -math.inf
    for start, end in sorted(spans):
        length += max(0, end - max(start, last))
        last = max(last, end)
    return length


@contextmanager
def watched(device, found, what):
    """While open, a step runs; adds to found[what] its "seconds", its "waits", or the seconds in which it was "busy".

    On a CPU, the seconds alone are known.
    """
    cuda = device.type == "cuda"
    with ExitStack() as stack:
        if cuda and what == "waits":
            said = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("warn")
        if cuda and what == "busy":
            profiler = stack.enter_context(profile(activities=[ProfilerActivity.CUDA]))
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    if what == "seconds":
        found[what].append(seconds)
    elif cuda and what == "waits":
        found[what].append(sum("synchronizing CUDA operation" in str(warning.message) for warning in said))
    elif cuda:
        events = [own for own in profiler.profiler.kineto_results.events() if own.device_type() == DeviceType.CUDA]
        spans = ((own.start_ns(), own.start_ns() + own.duration_ns()) for own in events if not own.is_user_annotation())
        found[what].append(covered(spans) / 1e9)


def attempt(function, *arguments):
    """Returns: what the function does; or why it does nothing, for the other rows must not suffer."""
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:
        return NO_ROOM
    except Exception:
        traceback.print_exc()
        return "failed"


def measure(step, device):
    """Run a step, () -> calls of the model for each of the batch, as often as it takes.

    Returns: what `watched` found, and the calls.
    """
    found = defaultdict(list)

    def notes():
        yield "waits"
        while len(found["seconds"]) < TIMED and sum(found["seconds"]) < ENOUGH:
            yield "seconds"
        if median(found["seconds"]) < QUICK:
            yield "waits"
        if median(found["seconds"]) < SHORT:
            yield "busy"

    clear(device)
    for what in notes():
        with watched(device, found, what):
            found["calls"].append(step())
    return found


class Clock(pl.Callback):
    """Watches a training whose batches change their shape after as many steps as TRAINED has.

    shapes: (picture size, batch size), in that order. tell: (shape, what `watched` found), called after each. late: ()
    -> whether to stop before the next.
    """

    def __init__(self, shapes, device, tell, late):
        self.shapes, self.device, self.tell, self.late = shapes, device, tell, late
        self.watching, self.done = ExitStack(), 0

    def watch(self, trainer):
        place = trainer.global_step % len(TRAINED)
        if place == 0:
            trainer.should_stop = self.late()
            self.found = defaultdict(list)
            clear(self.device)
        self.watching.enter_context(watched(self.device, self.found, TRAINED[place]))

    def on_train_start(self, trainer, module):
        self.watch(trainer)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.watching.close()
        if trainer.global_step % len(TRAINED) == 0:
            self.tell(self.shapes[self.done], self.found)
            self.done += 1
        if trainer.global_step < trainer.max_steps:
            self.watch(trainer)

    def teardown(self, trainer, module, stage):
        self.watching.close()


def make_batch(model, size, count):
    """Returns: a batch of a ControlDataset's items, on the CPU as they are; size: of the pictures."""
    side, channels = size // model.base.downsampling, model.base.unet.config.in_channels
    words = [model.base.embed([text]).float().cpu().repeat(count, 1, 1) for text in (PROMPT, "")]
    latents, control = torch.randn(count, channels, side, side), torch.randn(count, 1, dtype=torch.float64)
    return dict(zip(("embeddings", "empty"), words), latents=latents, control=control)


def train(model, shapes, device, tell, late, save_memory):
    """Train as tutorial_train.py does. tell, late: as a Clock has them.

    Returns: the shapes that were not come to; why, if it was not for the time.
    """
    steps = len(shapes) * len(TRAINED)
    own = dict(max_steps=steps, learning_rate=1e-5, likelihood=True, accelerator=device.type, devices=1)
    s = Settings(tutorial_train.settings | own)
    module = ControlTraining(model, Method(**{field.name: s[field.name] for field in fields(Method)}))
    batches = [batch for shape in shapes for batch in [make_batch(model, *shape)] * len(TRAINED)]
    clock = Clock(shapes, device, tell, late)
    with TemporaryDirectory() as folder, checkpointing(model, save_memory):
        why = attempt(make_trainer(s, Path(folder), [clock]).fit, module, DataLoader(batches, batch_size=None))
    module.zero_grad()
    model.to(device)  # Lightning moved it to the CPU
    return shapes[clock.done :], why


def read(model, target):
    return read_controls(model, target).model_calls


def infer(script, model, target):
    """An iteration of test5 or, as all but the first are, of test5_s1; a gradient counts as a call."""
    s = Settings(script.settings | dict(iterations=1, num_samples=len(target)))
    if s.warm_steps:
        s |= dict(ddim_steps=s.warm_steps, denoise_strength=s.warm_denoise_strength, warm_steps=None)
    one = target.select(slice(1))
    test5.infer(model, s, one.latents, one, torch.ones(1, dtype=torch.float64))
    return 2 * s.ddim_steps


ROWS = {
    "a reading of `invert.py`": read,
    "an iteration of `test5_s1.py`": partial(infer, test5_s1),
    "an iteration of `test5.py`": partial(infer, test5),
}
COLUMNS = "pixels", "batch", "seconds", "samples a second", "GiB", "busy", "waits", "calls a sample"


class Table:
    """Prints rows as they come, each of which out_dir/measured.json then holds too."""

    def __init__(self, s, out_dir, device):
        self.file, self.device, self.seconds = out_dir / "measured.json", device, s.seconds
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.report = dict(device=card, torch=torch.__version__, base=s.base, rows=[], precisions={})
        print(f"{card}, torch {torch.__version__}, {s.base}\n\n| | {' | '.join(COLUMNS)} |")
        print(f"| --- |{' --- |' * len(COLUMNS)}", flush=True)

    def late(self):
        """Returns: whether no further row may begin."""
        return time.perf_counter() - BEGAN > self.seconds

    def tell(self, name, shape, found):
        """shape: (picture size, batch size). found: as `measure` returns it, just now, or a text."""
        row, cells = dict(row=name, image_size=shape[0], batch=shape[1]), [found] + [""] * 5
        if isinstance(found, str):
            row["why"] = found
        else:
            seconds = median(found["seconds"])
            memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
            waits, busy, calls = ([None, *found[key]][-1] for key in ("waits", "busy", "calls"))
            busy = busy and busy / seconds
            row |= dict(seconds=seconds, GiB=memory, busy=busy, waits=waits, calls=calls)
            cells = [f"{seconds:.3g}", f"{shape[1] / seconds:.3g}"]
            forms = (memory, ".1f"), (busy, ".0%"), (waits, "d"), (calls, ".0f")
            cells += ["" if value is None else format(value, form) for value, form in forms]
        print(f"| {name} | {' | '.join([*map(str, shape), *cells])} |", flush=True)
        self.report["rows"].append(row)
        save_json(self.file, self.report)

    def compare(self, name, model):
        """Read TARGETS pictures in float32 and in bfloat16, and tell how much that differs."""
        rows, readings = read_rows(ROOT / "dataForTrain" / "validation.json")[:TARGETS], []
        prompts, pictures = zip(*((row.prompt, row.load()[0]) for row in rows))
        for dtype in (torch.float32, torch.bfloat16):
            own = in_precision(model, dtype)
            readings.append(read_controls(own, own.encode(prompts, pictures)))
        whole, half = readings
        gaps, std = wrap(half.control - whole.control, whole.periods), whole.std
        told = dict(control=whole.control, std=std, difference=gaps)
        self.report["precisions"][name] = {key: own.tolist() for key, own in told.items()}
        save_json(self.file, self.report)
        shares = (gaps / std).abs()
        said = f"{shares.median():.2g} standard errors (median), {shares.max():.2g} (worst)"
        cells = [model.config.image_size, len(rows)] + [""] * (len(COLUMNS) - 2)
        print(f"| bfloat16 less float32, {name}: {said} | {' | '.join(map(str, cells))} |", flush=True)


def measure_training(table, model, shapes):
    """Rows of trainings; from the first that does not fit, with save_memory."""
    name = TRAINING
    while shapes and not table.late():
        shapes, why = train(model, shapes, table.device, partial(table.tell, name), table.late, name != TRAINING)
        if why:
            table.tell(name, shapes[0], why)
            again, name = why == NO_ROOM and name == TRAINING, TRAINING + SAVING * (why == NO_ROOM)
            shapes = shapes if again else shapes[1:]


def measure_rows(table, model, shape):
    """ROWS of one shape; what does not fit is tried again with save_memory."""
    torch.manual_seed(0)
    batch = make_batch(model, *shape)
    target = Target(batch["embeddings"].to(table.device, model.base.unet.dtype), batch["latents"].to(table.device))
    for name, step in ROWS.items():
        for model.save_memory in (False, True):
            if table.late():
                return
            found = attempt(measure, partial(step, model, target), table.device)
            table.tell(name + SAVING * model.save_memory, shape, found)
            if found != NO_ROOM:
                break


def main(s):
    check_numbers(s, seconds=(0, math.inf))
    for key in ("image_sizes", "batches"):
        expect(f'setting "{key}": expected', s[key], each(number(1, whole=True)))
    device = pick_device(s.device)
    table = Table(s, start_report(s.out_dir, "measured.json", "rows"), device)
    model = make_model(s.base, min(s.image_sizes), device)
    measure_training(table, model, [(size, batch) for batch in sorted(s.batches) for size in sorted(s.image_sizes)])
    model.requires_grad_(False).eval().control_net.to_precision(model.base.unet.dtype)
    for batch in s.batches:
        for size in s.image_sizes:
            measure_rows(table, model, (size, batch))
        if batch == s.batches[0] and not table.late():
            attempt(table.compare, SHIPPED, load_model(SHIPPED, device=device))
            attempt(table.compare, "random weights", model)


if __name__ == "__main__":
    run_script(main, settings)
