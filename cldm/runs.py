"""A training's run: its folder, what it saves there, how it stops and how it goes on."""

import hashlib
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import fields

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from cldm.dataset import are_many
from cldm.model import control_folder, save_model
from cldm.processes import hold_together, start_trainer, unwatch
from cldm.results import digest_model
from cldm.training import Method, anywhere, half_cosine, mid_step
from ldm.base import has_bfloat16
from ldm.files import PARTIAL, digest, find_path, write_whole
from ldm.settings import InputError

CHECKPOINTS = "checkpoints"
HARDLY = 1.5  # times the least control error: the ratio of two medians of twelve errors has a standard error of 0.5
PRECISIONS = "32-true", "bf16-mixed", "16-mixed"  # others would round the controls or the noise levels


def hold_folder(out_dir, overwrite, inputs):
    """Hold out_dir for one run, new or going on; of several processes, the first holds it and prints.

    inputs: what is read, which must not lie in it. Returns: its Path. Raises: InputError if it is held or used.
    """
    path, first = hold_together(out_dir)
    for left in (own for folder in ("", "last", CHECKPOINTS) for own in (path / folder).glob(f"{PARTIAL}*") if first):
        shutil.rmtree(left) if left.is_dir() else left.unlink()  # of a run that was killed as it wrote
    if not list_checkpoints(path):
        own = ["tensorboard", "pictures", "log.csv"] if (path / "tensorboard").exists() else []  # of a run killed early
        if all(file.name.startswith(PARTIAL) for file in (path / CHECKPOINTS).glob("*")):  # as it wrote its first
            own.append(CHECKPOINTS)
        control_folder(path, overwrite, own=own, inputs=inputs)
    return path


def choose_precision(precision, accelerator):
    """Returns: what the setting "auto" stands for on a Lightning accelerator; any other precision as it is."""
    if precision != "auto":
        return precision
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if has_bfloat16(torch.device("cuda" if gpu else "cpu")) else "32-true"


def make_trainer(s, out_dir, callbacks):
    """Returns: the Lightning Trainer of a run with tutorial_train's settings. Raises: InputError for its hardware."""
    s.precision = choose_precision(s.precision, s.accelerator)
    trainer = start_trainer(
        s,
        max_steps=s.max_steps,
        val_check_interval=s.logger_freq * s.accumulate,
        accumulate_grad_batches=s.accumulate,
        check_val_every_n_epoch=None,  # count steps: several processes see several epochs
        logger=TensorBoardLogger(out_dir, name="", version="tensorboard"),
        callbacks=callbacks,
        gradient_clip_val=s.gradient_clip,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    if trainer.precision not in PRECISIONS:
        raise InputError(f'setting "precision": expected auto or one of {", ".join(PRECISIONS)}, got {s.precision}')
    return trainer


def count_steps(s, rows, processes):
    """Returns: the steps of a training with tutorial_train's settings, by its epochs of so many rows if it has any."""
    return math.ceil(s.epochs * rows / (s.batch_size * s.accumulate * processes)) if s.epochs else s.max_steps


def describe_run(s, model, data, trainer):
    """Returns: {what: text or number}, all that decides which weights a training of tutorial_train ends with.

    Its batch_size is that of all processes together, which may be fewer or more when it goes on.
    """
    keys = *(field.name for field in fields(Method)), "gradient_clip", "only_mid_control"
    parts = data.train, data.validation
    rows = data.ranges or [part.digest() for part in parts]
    if any(periods := model.control_net.config.periods):
        rows = rows, periods
    pictures = digest([*data.train, *data.validation]) if data.ranges else [part.digest_pictures() for part in parts]
    base = model.config | {"base": digest([find_path(model.config.base)])}
    return {key: s[key] for key in keys} | {
        "batch_size": s.batch_size * trainer.world_size,
        "precision": trainer.precision,
        **{key: model.control_net.config[key] for key in ("hint", "fusion", "proposals", "flows", "class_embed_type")},
        "the controls" if data.ranges else "the rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "the pictures": pictures,
        "latents": "float16" if s.latents_cache and not data.ranges and are_many(data.train) else None,
        "the numbers' names": json.dumps([data.names, data.units, data.absolute]),
        "the base": json.dumps(base, sort_keys=True),
        "the control of resume_path": digest_model(s.resume_path, model.config.base) if s.resume_path else "",
    }


def list_checkpoints(out_dir):
    """Returns: the paths of a run's checkpoints, the oldest first."""
    return sorted((out_dir / CHECKPOINTS).glob("[0-9]*.ckpt"))


def find_checkpoint(out_dir, run):
    """Returns: the path of a killed run's last checkpoint in out_dir and its step; None, 0 if there is none.

    Raises: InputError if it is broken, or belongs to another run than describe_run's; only max_steps may differ.
    """
    *earlier, file = list_checkpoints(out_dir) or [None]
    if not file:
        return None, 0
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        older = {field.name: field.default for field in fields(Method)} | {"flows": False}  # where it does not say
        step, before = checkpoint["global_step"], older | checkpoint["run"]
    except Exception as error:  # zip, pickle, key: torch raises many kinds
        remedy = f"delete it to {f'go on from {earlier[-1].name}' if earlier else 'start anew'}"
        raise InputError(f"{file}: not a whole checkpoint ({type(error).__name__}); {remedy}") from None
    other = {key: was for key, was in before.items() if key in run and was != run[key] and key != "max_steps"}
    said = [key if key.startswith("the ") else f"{key}={was} (now {run[key]})" for key, was in other.items()]
    if other or step > run["max_steps"]:
        problem = f"has done {step} steps already, more than max_steps={run['max_steps']}"
        problem = f"a run with other settings or data: {', '.join(said)}" if other else problem
        remedy = f"choose another out_dir, or delete {CHECKPOINTS}/ and give overwrite=true to begin again"
        raise InputError(f"{file}: {problem}; start as before to go on, {remedy}")
    print(f"going on from step {step} of {file}")
    if before["max_steps"] != run["max_steps"]:
        first = min(step, run["proposal_steps"])
        rate = half_cosine(step - first, run["max_steps"] - first) if run["schedule"] == "cosine" else 1
        print(f"max_steps was {before['max_steps']}: the learning rate goes on at {rate:.0%} of its peak")
    return file, step


class SaveBestAndLast(pl.Callback):
    """Saves the control that reads best in out_dir, and the last `keep` checkpoints, from which a stopped run goes on.

    The best is that of the lowest control error, as a Monitor has it, or a later one whose error is hardly larger. The
    training ends after `patience` validations that found none; None: only at max_steps. A checkpoint is written after
    every validation, every `every` steps, every `minutes` (0: not for that), and when Ctrl-C or SIGTERM ends the
    training after the current step, with one line and the shell's exit code. A second one kills it.
    history: [step, val_loss, loss without the control, control error] of all validations.
    """

    def __init__(self, out_dir, every, monitor, patience=None, minutes=0, keep=1):
        self.out_dir, self.every, self.monitor, self.patience = out_dir, every, monitor, patience
        self.minutes, self.keep, self.saved_at = minutes, keep, time.monotonic()
        self.history, self.signal, self.since = [], None, 0  # since: validations after the best

    def state_dict(self):
        return {"history": self.history, "since": self.since}

    def load_state_dict(self, state_dict):
        self.history, self.since = state_dict["history"], state_dict["since"]

    def on_train_start(self, trainer, module):
        self.saved_at = time.monotonic()
        *_, module.saved = [None, *list_checkpoints(self.out_dir)]
        trainer.should_stop = bool(self.patience) and self.since >= self.patience  # when started again after its end
        if trainer.is_global_zero and self.is_best(trainer):  # it may have been killed before it saved that
            with module.averaged():
                save_model(module.model, self.out_dir)
        unwatch(trainer)
        for number in (signal.SIGINT, signal.SIGTERM):  # Lightning's own handlers neither save nor say anything
            signal.signal(number, self.receive)

    def is_best(self, trainer):
        """Returns: whether the weights are the best control's."""
        return bool(self.history) and not self.since and self.history[-1][0] == trainer.global_step

    def receive(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def checkpoint(self, trainer):
        file = self.out_dir / CHECKPOINTS / f"{trainer.global_step:08d}.ckpt"
        if trainer.is_global_zero:
            write_whole(file, trainer.save_checkpoint)
            for old in list_checkpoints(self.out_dir)[: -self.keep]:
                old.unlink()
        else:  # takes part, and writes nothing
            trainer.save_checkpoint(file)
        trainer.lightning_module.saved, self.saved_at = file, time.monotonic()

    def end_if_told(self, trainer):
        if anywhere(trainer, self.signal):
            if trainer.is_global_zero:
                name = "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"
                where = f"at step {trainer.global_step} of {trainer.max_steps}"
                print(f"\nstopped by {name} {where}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + (self.signal or signal.SIGTERM))  # None: another process received it

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if mid_step(trainer, batch_index):
            return
        trainer.should_stop = trainer.global_step == trainer.max_steps  # which makes Lightning validate
        late = self.minutes and time.monotonic() > self.saved_at + 60 * self.minutes
        due = anywhere(trainer, late or self.signal) or trainer.global_step % self.every == 0
        validated = trainer.global_step * trainer.accumulate_grad_batches % trainer.val_check_interval == 0
        validated = trainer.val_dataloaders and (trainer.should_stop or validated)  # and saved after it
        if (due or trainer.should_stop) and not validated:
            self.checkpoint(trainer)
            self.end_if_told(trainer)

    def on_validation_end(self, trainer, module):
        if module.untrained:
            self.checkpoint(trainer)
            return self.end_if_told(trainer)
        loss, base_loss = (trainer.callback_metrics[key].item() for key in ("val_loss", "base_loss"))
        error, least = self.monitor.error, min((earlier for *_, earlier in self.history), default=math.inf)
        error = error if math.isfinite(error) else math.inf
        self.since = 0 if error <= HARDLY * least else self.since + 1
        self.history.append([trainer.global_step, loss, base_loss, error])
        self.checkpoint(trainer)  # first, since a folder that has a control and no checkpoint is no run's
        if trainer.is_global_zero and not self.since:
            save_model(module.model, self.out_dir)
        self.end_if_told(trainer)
        if self.patience and self.since >= self.patience:
            print(f"step {trainer.global_step}: {self.since} validation(s) in a row found no better control")
            trainer.should_stop = True
