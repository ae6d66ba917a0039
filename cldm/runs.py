"""A training's run: its folder, what it saves there, how it stops and how it goes on."""

import hashlib
import json
import logging
import math
import signal
import sys
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from cldm.dataset import are_many
from cldm.model import control_folder, save_model
from cldm.results import digest_model
from cldm.training import anywhere, half_cosine
from ldm.files import check_writable, digest, find_path, output_folder, write_whole
from ldm.settings import InputError

RESUME_FILE = "resume.ckpt"
HARDLY = 1.1  # times the least control error: no more than what a handful of pictures leaves to chance
PRECISIONS = "32-true", "bf16-mixed", "16-mixed"  # others would round the controls or the noise levels


def hold_folder(out_dir, overwrite, inputs):
    """Hold out_dir for one run, new or going on; of several processes, the first holds it and prints.

    inputs: what is read, which must not lie in it. Returns: its Path. Raises: InputError if it is held or used.
    """
    first = rank_zero_only.rank == 0
    path = (output_folder if first else check_writable)(out_dir)
    if not first:
        sys.stdout = None
    if not (path / RESUME_FILE).exists():
        own = ["tensorboard", "pictures"] if (path / "tensorboard").exists() else []  # of a run killed early
        control_folder(path, overwrite, own=own, inputs=inputs)
    return path


def make_trainer(s, out_dir, callbacks):
    """Returns: the Lightning Trainer of a run with tutorial_train's settings. Raises: InputError for its hardware."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # on eval mode and workers, which are meant so
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        trainer = pl.Trainer(
            max_steps=s.max_steps,
            val_check_interval=min(s.logger_freq, s.max_steps),
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
            **{key: s[key] for key in ("accelerator", "devices", "strategy", "precision")},
        )
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"accelerator, devices, strategy or precision: {str(error).splitlines()[0]}") from None
    if trainer.precision not in PRECISIONS:
        raise InputError(f'setting "precision": expected one of {", ".join(PRECISIONS)}, got {s.precision}')
    return trainer


def describe_run(s, model, data, precision):
    """Returns: {what: text or number}, all that decides which weights a training of tutorial_train ends with."""
    keys = "learning_rate", "prompt_dropout", "likelihood", "sd_locked", "only_mid_control", "batch_size", "seed"
    parts = data.train, data.validation
    rows = data.ranges or [part.digest() for part in parts]
    if any(periods := model.control_net.config.periods):
        rows = rows, periods
    pictures = digest([*data.train, *data.validation]) if data.ranges else [part.digest_pictures() for part in parts]
    base = model.config | {"base": digest([find_path(model.config.base)])}
    return {key: s[key] for key in (*keys, "max_steps")} | {
        "precision": precision,
        "hint": model.control_net.config.hint,
        "the controls" if data.ranges else "the rows": hashlib.sha256(repr(rows).encode()).hexdigest(),
        "the pictures": pictures,
        "latents": "float16" if s.latents_cache and not data.ranges and are_many(data.train) else None,
        "the base": json.dumps(base, sort_keys=True),
        "the control of resume_path": digest_model(s.resume_path, model.config.base) if s.resume_path else "",
    }


def find_checkpoint(out_dir, run):
    """Returns: the path of a killed run's checkpoint in out_dir and its step; None, 0 if there is none.

    Raises: InputError if it is broken, or belongs to another run than describe_run's; only max_steps may be larger.
    """
    file = out_dir / RESUME_FILE
    if not file.exists():
        return None, 0
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        step, before = checkpoint["global_step"], checkpoint["run"]
    except Exception as error:  # zip, pickle, key: torch raises many kinds
        raise InputError(f"{file}: not a whole checkpoint ({type(error).__name__}); delete it to start anew") from None
    other = {key: before.get(key) for key in run if before.get(key) != run[key] and key != "max_steps"}
    said = [key if key.startswith("the ") else f"{key}={was} (now {run[key]})" for key, was in other.items()]
    if other or step > run["max_steps"]:
        problem = f"has done {step} steps already, more than max_steps={run['max_steps']}"
        problem = f"a run with other settings or data: {', '.join(said)}" if other else problem
        remedy = "choose another out_dir, or delete the file and give overwrite=true to begin again"
        raise InputError(f"{file}: {problem}; start as before to go on, {remedy}")
    print(f"going on from step {step} of {file}")
    if before["max_steps"] != run["max_steps"]:
        rate = half_cosine(step, run["max_steps"])
        print(f"max_steps was {before['max_steps']}: the learning rate goes on at {rate:.0%} of its peak")
    return file, step


class SaveBestAndLast(pl.Callback):
    """Saves the control that reads best in out_dir, and out_dir/resume.ckpt, from which a stopped run goes on.

    It is that of the lowest control error, as a Monitor has it, or a later one whose error is hardly larger. The
    training ends after `patience` validations that found none; None: only at max_steps. The checkpoint is written
    after every validation; without validation, every `every` steps; and when Ctrl-C or SIGTERM ends the training
    after the current step, with one line and the shell's exit code. A second one kills it.
    history: [step, val_loss, loss without the control, control error] of all validations.
    """

    def __init__(self, out_dir, every, monitor, patience=None):
        self.out_dir, self.every, self.monitor, self.patience = out_dir, every, monitor, patience
        self.history, self.signal, self.since = [], None, 0  # since: validations after the best

    def state_dict(self):
        return {"history": self.history, "since": self.since}

    def load_state_dict(self, state_dict):
        self.history, self.since = state_dict["history"], state_dict["since"]

    def on_train_start(self, trainer, module):
        for number in (signal.SIGINT, signal.SIGTERM):  # Lightning's own handlers neither save nor say anything
            signal.signal(number, self.receive)

    def receive(self, number, _):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def checkpoint(self, trainer):
        write_whole(self.out_dir / RESUME_FILE, trainer.save_checkpoint)
        if anywhere(trainer, self.signal):
            if trainer.is_global_zero:
                name = "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"
                where = f"at step {trainer.global_step} of {trainer.max_steps}"
                print(f"\nstopped by {name} {where}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + (self.signal or signal.SIGTERM))  # None: another process received it

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        trainer.should_stop = trainer.global_step == trainer.max_steps  # which makes Lightning validate
        due = trainer.should_stop or trainer.global_step % self.every == 0
        if (due or anywhere(trainer, self.signal)) and not (due and trainer.val_dataloaders):
            self.checkpoint(trainer)

    def on_validation_end(self, trainer, module):
        loss, base_loss = (trainer.callback_metrics[key].item() for key in ("val_loss", "base_loss"))
        error, least = self.monitor.error, min((earlier for *_, earlier in self.history), default=math.inf)
        self.since = 0 if error <= HARDLY * least else self.since + 1
        if trainer.is_global_zero and not self.since:
            save_model(module.model, self.out_dir)
        self.history.append([trainer.global_step, loss, base_loss, error])
        self.checkpoint(trainer)
        if self.patience and self.since >= self.patience:
            print(f"step {trainer.global_step}: {self.since} validation(s) in a row found no better control")
            trainer.should_stop = True
