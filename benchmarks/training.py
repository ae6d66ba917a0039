"""How fast a control is trained: tutorial_train.py against the recipe of diffusers' train_controlnet.py, in turn.

    python benchmarks/training.py                            # speed alone, a few minutes on two cores
    python benchmarks/training.py steps=1400 read_every=100  # also the steps to the same control error

Both train on the same pictures and base at the same batch, precision and highest learning rate, a step of one after a
step of the other. The recipe, in short form, with its defaults: every step reads pictures, encodes them by the VAE and
prompts by the text encoder; the frozen parts are in half precision; timesteps are uniform, losses mean squares; AdamW's
rate is constant; the hint is diffusers' CNN on a picture, here of one shade that says the number. Responses, drawings
and validations are left out of both. Prints the tables of docs/results.md, with where tutorial_train.py's time goes,
and what its responses, readings and validations add to that.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    data_root="dataForTrain",  # of one number
    base="models/tiny.yaml",
    batch_size=16,
    precision="auto",  # of tutorial_train.py: bf16-mixed or 32-true
    learning_rate=1e-3,
    steps=40,  # of each; the first two are not timed
    read_every=None,  # steps between control errors; None: only speed is measured
    seed=0,
)
if __name__ == "__main__":
    answer(__file__)

import copy
import math
import statistics
import time
from collections import Counter, defaultdict
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import tutorial_train
from cldm.conversion import add_control, fit_statistics
from cldm.dataset import ControlDataset, TrainingOrder, read_data
from cldm.hints import Hint
from cldm.model import load_base
from cldm.monitor import RESPONSE_EVERY, Monitor, read_handful
from cldm.runs import choose_precision, make_trainer
from cldm.training import ControlTraining, Method
from ldm.files import find_path
from ldm.pictures import fit_picture, pictures_to_tensor
from ldm.schema import Settings, expect, one_of

WARM, PROFILED = 2, 3  # steps before those that are timed, and after them
OURS, THEIRS = "tutorial_train.py", "the recipe of diffusers"
STRIDES = 16, 32, 96, 256  # channels of diffusers' hint, each but the first at half the side of the one before
KINDS = {"convolution": "convolutions", "mm": "matrix products", "dot_product": "attention"}
SIDE, TRIALS = 1024, 8  # of the matrix product that tells the machine's peak


class Painted(Hint):
    """diffusers' own hint: a CNN on a picture `factor` times as large as the latents, of one shade."""

    def __init__(self, channels, factor):
        super().__init__()
        self.factor = factor
        self.cnn = ControlNetConditioningEmbedding(channels, 3, STRIDES[: round(math.log2(factor)) + 1])
        self.mlp = [self.cnn.conv_in]  # in whose precision the number comes

    def features(self, condition):
        height, width = (self.factor * side for side in condition.shape[2:])
        return self.cnn(condition[:, :, :1, :1].expand(-1, 3, height, width))


class Recipe:
    """A training of model, a ControlLDM, as diffusers' examples/controlnet/train_controlnet.py has it."""

    def __init__(self, s, model):
        self.model, self.size, self.mixed = model, model.config.image_size, s.precision == "bf16-mixed"
        self.dtype = torch.bfloat16 if self.mixed else torch.float32
        self.base = copy.deepcopy(model.base)
        for part in (self.base.vae, self.base.text_encoder, self.base.unet):
            torch.nn.Module.to(part, self.dtype)
        self.parameters = [*model.control_net.requires_grad_(True).parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.learning_rate, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(s.seed)

    def step(self, rows):
        """rows: B Rows."""
        pictures = pictures_to_tensor([fit_picture(row.load()[0], self.size) for row in rows])
        control = torch.tensor([row.control for row in rows], dtype=torch.float64)
        scheduler = self.base.scheduler
        with torch.no_grad():
            latents = self.base.encode(pictures.to(self.dtype)).float()
            embeddings = self.base.embed([row.prompt for row in rows])
        noise = torch.randn(latents.shape, generator=self.generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=self.generator)
        noisy = scheduler.add_noise(latents, noise, timesteps).to(self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            down, mid = self.model.control_net(noisy, timesteps, embeddings, control, return_dict=False)
        prediction = self.base.unet(
            noisy,
            timesteps,
            embeddings,
            down_block_additional_residuals=[residual.to(self.dtype) for residual in down],
            mid_block_additional_residual=mid.to(self.dtype),
        ).sample
        F.mse_loss(prediction.float(), self.base.prediction_target(latents, noise, timesteps)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class InTurn(pl.Callback):
    """After every step of a ControlTraining, one of a Recipe; then perhaps both controls are read.

    batches: an iterator over lists of Rows. dataset: a ControlDataset, whose pictures are read every `every` steps.
    seconds: {name: [(seconds, CPU seconds) of every step]}. errors: {name: [(step, control error)]}. parts: {part of
    our step: CPU seconds of every timed step}. flops: of our step. kinds: {kind of operator: its seconds}.
    """

    def __init__(self, recipe, batches, dataset, every, steps):
        self.recipe, self.batches, self.dataset, self.every, self.steps = recipe, batches, dataset, every, steps
        self.seconds, self.errors, self.parts = defaultdict(list), defaultdict(list), defaultdict(list)
        self.kinds = Counter()

    def mark(self, part):
        """A part of our step ends here; outside of one, nothing does."""
        if self.last is None:
            return
        now = time.process_time()
        self.parts[part].append(now - self.last)
        self.last = now

    def begin(self):
        self.began, self.last = (time.perf_counter(), time.process_time()), time.process_time()

    def on_train_start(self, trainer, module):
        unet, control_net = module.model.base.unet, module.model.control_net
        hooks = unet.conv_in, control_net, unet.conv_out
        self.hooks = [
            hooks[0].register_forward_pre_hook(lambda *_: self.mark("draw noise")),
            hooks[1].register_forward_pre_hook(lambda *_: self.mark("base, encoder")),
            hooks[1].register_forward_hook(lambda *_: self.mark("ControlNet")),
            hooks[2].register_forward_hook(lambda *_: self.mark("base, decoder")),
        ]
        self.progress = tqdm(total=self.steps, desc="steps of both")
        self.begin()

    def on_train_batch_start(self, trainer, module, batch, index):
        self.mark("data, Lightning")
        self.observer = FlopCounterMode(display=False) if index == 0 else None
        if index >= self.steps:
            self.observer = profile(activities=[ProfilerActivity.CPU])
        if self.observer:
            self.observer.__enter__()

    def on_before_backward(self, trainer, module, loss):
        self.mark("loss")

    def on_after_backward(self, trainer, module):
        self.mark("backward")

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.mark("clipping, AdamW")
        self.last = None
        now = time.perf_counter(), time.process_time()
        if self.observer:
            self.observer.__exit__(None, None, None)
        if index == 0:
            self.flops = self.observer.get_total_flops()
        elif self.observer:
            for event in self.observer.key_averages():
                kind = next((kind for text, kind in KINDS.items() if text in event.key), "all else")
                self.kinds[kind] += event.self_cpu_time_total
        if index < self.steps:
            self.take(OURS, self.began, now)
            began = time.perf_counter(), time.process_time()
            self.recipe.step(next(self.batches))
            self.take(THEIRS, began, (time.perf_counter(), time.process_time()))
            if self.every and trainer.global_step % self.every == 0:
                for name, model in ((OURS, module.model), (THEIRS, self.recipe.model)):
                    self.errors[name].append((trainer.global_step, read_handful(model, self.dataset)[1]))
            self.progress.update()
        self.begin()

    def take(self, name, began, ended):
        self.seconds[name].append([end - start for start, end in zip(began, ended)])

    def on_train_end(self, trainer, module):
        self.progress.close()
        for hook in self.hooks:
            hook.remove()


def find_peak(dtype):
    """Returns: the FLOP a CPU second that a product of two large matrices reaches at best."""
    matrix, seconds = torch.randn(SIDE, SIDE).to(dtype), []
    for _ in range(TRIALS):
        began = time.process_time()
        matrix @ matrix
        seconds.append(time.process_time() - began)
    return 2 * SIDE**3 / min(seconds)


def median_seconds(turns, name):
    """Returns: the median seconds and CPU seconds of a step."""
    return [statistics.median(own) for own in zip(*turns.seconds[name][WARM:])]


def tell_speed(turns, batch_size):
    """Returns: lines of a table."""
    lines = ["| | samples a second | samples a CPU second | ratio |", "| --- | --- | --- | --- |"]
    ours, theirs = (median_seconds(turns, name) for name in (OURS, THEIRS))
    for name, own in ((OURS, ours), (THEIRS, theirs)):
        rates = " | ".join(f"{batch_size / seconds:.2f}" for seconds in own)
        lines.append(f"| {name} | {rates} | {theirs[1] / own[1]:.2f} |")
    return lines


def tell_parts(turns, dtype):
    """Returns: lines of a table of the parts of our step, a line on its operators, a line on what bounds it."""
    timed = {part: statistics.median(own[WARM : turns.steps]) for part, own in turns.parts.items()}
    whole, kinds = sum(timed.values()), turns.kinds
    lines = ["| part of a step | CPU seconds | share |", "| --- | --- | --- |"]
    lines += [f"| {part} | {seconds:.3f} | {seconds / whole:.0%} |" for part, seconds in timed.items()]
    shares = ", ".join(f"{kind} {time / kinds.total():.0%}" for kind, time in kinds.most_common())
    peak, rate = find_peak(dtype), turns.flops / whole
    return [
        *lines,
        f"\nof a step's time: {shares}",
        f"{turns.flops / 1e9:.0f} GFLOP a step, {rate / 1e9:.0f} a CPU second: {rate / peak:.0%} of the "
        f"{peak / 1e9:.0f} that a product of large matrices reaches in {str(dtype).removeprefix('torch.')}",
    ]


def tell_errors(turns):
    """Returns: lines of a table, the steps and minutes after which both had the same control error."""
    same = max(min(error for _, error in own) for own in turns.errors.values())
    lines = [f"| control error {same:.3f} of the spread | steps | minutes |", "| --- | --- | --- |"]
    for name, own in turns.errors.items():
        step = next(step for step, error in own if error <= same)
        lines.append(f"| {name} | {step} | {sum(seconds for seconds, _ in turns.seconds[name][:step]) / 60:.1f} |")
    return lines


def tell_watching(trainer, module, dataset, batch_size, step):
    """Returns: a line on what responses, readings and validations add to a training at tutorial_train.py's defaults.

    dataset: a ControlDataset for them. step: CPU seconds of a step.
    """
    steps, every = (tutorial_train.settings[key] for key in ("max_steps", "logger_freq"))

    def respond():
        with trainer.precision_plugin.forward_context():
            Monitor(dataset, Path()).find_response(module.model, dataset)

    def validate():
        trainer.validate(module, DataLoader(dataset, batch_size), verbose=False)

    watching = {
        "responses": (RESPONSE_EVERY, respond),
        "readings": (every, lambda: read_handful(module.model, dataset)),
        "validations": (every, validate),
    }
    module.eval()
    added = []
    for name, (often, watch) in watching.items():
        count, began = math.ceil(steps / often), time.process_time()
        watch()
        added.append(f"{count} {name} {count * (time.process_time() - began) / (steps * step):.1%}")
    return [f"added to the time of {steps} steps: {', '.join(added)}"]


def make_model(s, data):
    """Returns: a ControlLDM as tutorial_train.py begins with."""
    torch.manual_seed(s.seed)
    model = add_control(*load_base(s.base))
    fit_statistics(model.control_net, data.controls, data.names, data.units, data.prompts)
    return model


def main(s):
    check_numbers(s, int, batch_size=(1, 10**6), steps=(WARM + 1, 10**6), read_every=(1, s.steps), seed=(0, 2**32 - 1))
    expect('setting "precision": expected', s.precision, one_of("auto", "bf16-mixed", "32-true"))
    s.precision = choose_precision(s.precision, "cpu")
    data = read_data(find_path(s.data_root))
    if len(data.controls[0]) != 1 or data.has_references or any(data.periods or ()):
        raise InputError(f"data_root {s.data_root}: expected one number that does not go round, without references")
    model, rival = make_model(s, data), make_model(s, data)
    channels = rival.control_net.conv_in.out_channels
    rival.control_net.controlnet_cond_embedding = Painted(channels, model.base.downsampling)
    base, size = model.base, model.config.image_size
    rows, steps = ControlDataset(data.train, base, size), s.steps + PROFILED
    order = [*TrainingOrder(len(rows), steps * s.batch_size, s.seed)]
    batches = ([rows.rows[i] for i in order[k : k + s.batch_size]] for k in range(0, len(order), s.batch_size))
    held_out = ControlDataset(data.validation, base, size) if data.validation else rows
    turns = InTurn(Recipe(s, rival), batches, held_out, s.read_every, s.steps)
    module = ControlTraining(model, Method(s.learning_rate, s.steps, likelihood=True, seed=s.seed))
    how = dict(max_steps=steps, logger_freq=steps, accelerator="cpu", precision=s.precision)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(Settings(tutorial_train.settings | how), folder, [turns])
        trainer.fit(module, DataLoader(rows, s.batch_size, sampler=order))
        step = median_seconds(turns, OURS)[1]
        watching = tell_watching(trainer, module, held_out, s.batch_size, step)
    print(f"{s.steps} steps of {s.batch_size} pictures each, {s.precision}, {torch.get_num_threads()} thread(s)\n")
    tables = [tell_speed(turns, s.batch_size), tell_parts(turns, turns.recipe.dtype), watching]
    tables += [tell_errors(turns)] if s.read_every else []
    print("\n\n".join("\n".join(lines) for lines in tables))


if __name__ == "__main__":
    run_script(main, settings)
