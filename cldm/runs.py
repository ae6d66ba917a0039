"""A training's run: its folder, what it saves there, how it stops and how it goes on."""

import hashlib
import logging
import math
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from cldm.model import control_folder, save_model
from cldm.training import anywhere
from ldm.files import check_writable, output_folder, write_whole
from ldm.settings import InputError

RESUME_FILE = "resume.ckpt"
PRECISIONS = "32-true", "bf16-mixed", "16-mixed"  # others would round the controls or the noise levels
FLAT = 0.02  # val_loss has not changed if it changed by less than this share


class Stop:
    """While open, Ctrl-C and SIGTERM end a training after the current step, once its checkpoint is written.

    Between steps, or at a second signal, it ends at once; either way with one line and the shell's exit code.
    """

    def __init__(self):
        self.signal, self.stepping, self.where = None, False, "before the first step"

    def listen(self):
        """Returns: {signal: its former handler}."""
        return {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self):
        self.before = self.listen()
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def reached(self, where, stepping=True):
        """Note where training is, in words, and whether a step is under way."""
        self.where, self.stepping = where, stepping

    def receive(self, number, _):
        if not self.stepping or self.signal:
            self.end(number)
        self.signal = number

    def end(self, number=None):
        number = number or self.signal or signal.SIGTERM  # another process received it
        if rank_zero_only.rank == 0:
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            print(f"\nstopped by {name} {self.where}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + number)


@contextmanager
def training_run(out_dir, overwrite, inputs):
    """Hold out_dir for one run, new or going on. Yields: its Path and the run's Stop.

    Of several processes, the first holds the folder and prints. inputs: what is read, which must not lie in it.
    Raises: InputError if another run holds the folder, or something else lies in it and overwrite is false.
    """
    first = rank_zero_only.rank == 0
    path = (output_folder if first else check_writable)(out_dir)
    with Stop() as stop, nullcontext() if first else redirect_stdout(None):
        if not (path / RESUME_FILE).exists():
            own = ["tensorboard", "pictures"] if (path / "tensorboard").exists() else []  # of a run killed early
            control_folder(path, overwrite, own=own, inputs=inputs)
        yield path, stop


def make_trainer(out_dir, callbacks, max_steps, logger_freq, **hardware):
    """Returns: the Lightning Trainer of a run. hardware: its accelerator, devices, strategy and precision.

    Raises: InputError if there is no such hardware, or no such precision.
    """
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # on eval mode and workers, which are meant so
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        trainer = pl.Trainer(
            max_steps=max_steps,
            val_check_interval=min(logger_freq, max_steps),
            check_val_every_n_epoch=None,  # count steps: several processes see several epochs
            logger=TensorBoardLogger(out_dir, name="", version="tensorboard"),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            use_distributed_sampler=False,  # TrainingOrder knows of several processes
            **hardware,
        )
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"accelerator, devices, strategy or precision: {str(error).splitlines()[0]}") from None
    if trainer.precision not in PRECISIONS:
        raise InputError(f'setting "precision": expected one of {", ".join(PRECISIONS)}, got {hardware["precision"]}')
    return trainer


def digest_weights(module, *more):
    """Returns: a digest of a module's weights, and of whatever else tells it from others."""
    total = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def describe_run(model, datasets, resumes, **settings):
    """Returns: {what: text or number}, by which a checkpoint knows its run.

    datasets: with a `digest` each. resumes: whether the control was trained before. settings: those that matter.
    """
    run = settings | {"hint": model.control_net.config.hint}
    for dataset in datasets:
        for kind, digest in dataset.digest.items():
            run[f"the {kind}"] = f"{run.get(f'the {kind}', '')} {digest}"
    scheduler = model.base.scheduler
    base = model.config.image_size, scheduler.config.prediction_type, scheduler.alphas_cumprod.tolist()
    run["the base"] = digest_weights(model.base, *base)
    return run | {"the control of resume_path": digest_weights(model.control_net) if resumes else ""}


def find_checkpoint(out_dir, module):
    """Returns: the path of a killed run's checkpoint in out_dir and its step; None, 0 if there is none.

    Raises: InputError if it is broken, or belongs to another run than `module`'s; only max_steps may be larger.
    """
    file = out_dir / RESUME_FILE
    if not file.exists():
        return None, 0
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        saved, step, run = checkpoint["state_dict"], checkpoint["global_step"], checkpoint["run"]
    except Exception as error:  # zip, pickle, key: torch raises many kinds
        raise InputError(f"{file}: not a whole checkpoint ({type(error).__name__}); delete it to start anew") from None
    other = {key: run.get(key) for key in module.run if run.get(key) != module.run[key] and key != "max_steps"}
    said = [key if key.startswith("the ") else f"{key}={was} (now {module.run[key]})" for key, was in other.items()]
    trained = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    problems = {
        f"a run with other settings or data: {', '.join(said)}": other,
        "a checkpoint of another model": {name: p.shape for name, p in saved.items()} != trained,
        f"has done {step} steps already, more than max_steps={module.steps}": step > module.steps,
    }
    for problem in (text for text, holds in problems.items() if holds):
        remedy = "choose another out_dir, or delete the file and give overwrite=true to begin again"
        raise InputError(f"{file}: {problem}; start as before to go on, {remedy}")
    print(f"going on from step {step} of {file}")
    if run["max_steps"] != module.steps:
        rate = 0.5 + 0.5 * math.cos(math.pi * step / module.steps)
        text = f"max_steps was {run['max_steps']}: the learning rate goes on at {rate:.0%} of its peak"
        print(f"{text}; the result is close to that of {module.steps} steps from the start, not the same")
    return file, step


class SaveBestAndLast(pl.Callback):
    """Writes out_dir (the lowest val_loss so far; the last without validation), out_dir/last and out_dir/resume.ckpt.

    The checkpoint is written after every validation; without validation, every `every` steps; and when a Stop asks.
    held_out: whether validation shows pictures that training does not.
    history: [step, val_loss] of all validations. base_loss: the first one's loss without the control.
    """

    def __init__(self, out_dir, every, stop, held_out=True):
        self.out_dir, self.every, self.stop, self.held_out = out_dir, every, stop, held_out
        self.history, self.base_loss = [], None

    def state_dict(self):
        return {"history": self.history, "base_loss": self.base_loss}

    def load_state_dict(self, state_dict):
        self.history, self.base_loss = state_dict["history"], state_dict["base_loss"]

    def save(self, trainer, module, folder):
        if trainer.is_global_zero:
            save_model(module.model, folder)

    def checkpoint(self, trainer):
        write_whole(self.out_dir / RESUME_FILE, trainer.save_checkpoint)
        self.stop.reached(f"at step {trainer.global_step} of {trainer.max_steps}")

    def on_train_start(self, trainer, module):
        self.stop.listen()  # instead of Lightning, whose own handler of SIGTERM neither saves nor says anything
        self.stop.reached(f"at step {trainer.global_step} of {trainer.max_steps}")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        last = trainer.global_step == trainer.max_steps
        stopping, due = anywhere(trainer, self.stop.signal), last or trainer.global_step % self.every == 0
        trainer.should_stop = last  # which makes Lightning validate
        if stopping or (due and not trainer.val_dataloaders):
            self.checkpoint(trainer)
        if stopping and not (due and trainer.val_dataloaders):  # else after the validation, a part of the step
            self.stop.end()

    def on_validation_end(self, trainer, module):
        loss = trainer.callback_metrics["val_loss"].item()
        if not math.isfinite(loss):
            raise module.diverged("val_loss", loss)
        if "base_loss" in trainer.callback_metrics and self.base_loss is None:
            self.base_loss = trainer.callback_metrics["base_loss"].item()
        if loss < min((earlier for _, earlier in self.history), default=math.inf):
            self.save(trainer, module, self.out_dir)
        self.history.append([trainer.global_step, loss])
        self.checkpoint(trainer)
        if anywhere(trainer, self.stop.signal):
            self.stop.end()

    def on_train_end(self, trainer, module):
        self.stop.reached("after the last step", stepping=False)

    def finish(self, trainer, module):
        """Write what there is after the last step, even if the run was killed before it could."""
        self.save(trainer, module, self.out_dir / "last")
        if not self.history:
            self.save(trainer, module, self.out_dir)

    def verdict(self):
        """Returns: a sentence on the course of val_loss."""
        if not self.history:
            return "no validation: five different numbers, or a validation.json, would tell how good it is"
        (step, best), (_, last) = min(self.history, key=lambda entry: entry[1]), self.history[-1]
        base = f"; {self.base_loss:.4f} without the control" if self.base_loss else ""
        shown = "pictures that were not trained on" if self.held_out else "new pairs from the training photographs"
        if last > (1 + FLAT) * best:
            trend = f"it has risen since step {step}, which is kept: more pictures would help, not more steps"
        elif best > (1 - FLAT) * (self.base_loss or math.inf):
            trend = "the numbers are hardly used yet: try more steps (max_steps) or a higher learning_rate"
        elif len(self.history) == 1:
            trend = "a single validation tells no trend"
        elif last < (1 - FLAT) * min(loss for _, loss in self.history[:-1]):
            trend = "it was still falling: more steps would help (max_steps)"
        else:
            trend = "it has levelled off"
        return f"val_loss {best:.4f} on {shown} (0 would be perfect{base}): {trend}"
