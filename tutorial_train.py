"""Train a ControlNet on numbers: edit the settings, run `python tutorial_train.py`, or give them as key=value.

The base: models/tiny.yaml, models/cldm_v15.yaml, models/cldm_v21.yaml, a folder in diffusers' layout or a single file.
The data: data_root/prompt.json, one JSON object a line, {"source": 5 or "5" or [5, 0.8], "target": "x.png",
"prompt": "a text"}; targets are relative to data_root, whose controls.yaml may name the numbers. Everything of a run
goes to out_dir, which is then the model_path of test5.py and test5_s1.py. A run that was killed goes on when started
again with the same out_dir.
"""

import logging
import math
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, RandomSampler

from cldm.dataset import ControlDataset, read_control_names, split_rows
from cldm.memory import Estimate, checkpointing
from cldm.model import add_control, fit_statistics, load_base, load_model
from cldm.reading import calibrate
from cldm.report import PictureLogger
from cldm.training import ControlTraining, SaveBestAndLast, find_checkpoint
from ldm.settings import InputError, check_numbers, output_folder, run_script

settings = dict(
    # what is trained on what
    data_root="dataForTrain",
    base="models/tiny.yaml",  # the frozen base
    resume_path="",  # a control to start from (tool_add_control.py, or an earlier out_dir); "": a fresh one of the base
    hint="dense",  # of a fresh control: dense (as the original: one resolution) or coordinate (any)
    out_dir="runs/control_tiny",
    # how
    batch_size=16,
    max_steps=1400,
    logger_freq=500,  # steps between pictures, validations and checkpoints; the last step has its own
    learning_rate=1e-3,  # at its peak; falls to zero as half a cosine
    prompt_dropout=0.1,  # share of prompts replaced by the empty one, which guidance needs
    sd_locked=True,  # False: the UNet's decoder learns too
    only_mid_control=False,
    save_memory=False,  # True: activations are computed twice and not kept
    seed=0,
    # passed on to Lightning's Trainer
    accelerator="auto",
    devices="auto",
    strategy="auto",
    precision="bf16-mixed",
)


def make_model(s, rows):
    """Returns: the ControlLDM to train, from resume_path or fresh, with the statistics of the rows' controls."""
    control_dim = len(rows[0].control)
    if s.resume_path:
        model = load_model(s.resume_path, dtype=torch.float32)
    else:
        model = add_control(*load_base(s.base), control_dim=control_dim, hint=s.hint)
    if model.control_net.control_dim != control_dim:
        raise InputError(
            f"resume_path {s.resume_path}: made for {model.control_net.control_dim} number(s), {s.data_root} has "
            f"{control_dim}; make one with tool_add_control.py control_dim={control_dim}"
        )
    model.config.only_mid_control = s.only_mid_control
    fit_statistics(model.control_net, [row.control for row in rows], *read_control_names(s.data_root, control_dim))
    return model


def tell_memory(s, model, trainer):
    """Print what the training will need on one device, and what would help if there is less."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
    estimate = Estimate(model, trainer.strategy.root_device)
    remedies = {
        "save_memory=true": lambda: estimate.training(s.batch_size, dtype, True),
        "save_memory=true batch_size=1": lambda: estimate.training(1, dtype, True),
    }
    estimate.announce(estimate.training(s.batch_size, dtype, s.save_memory), remedies)


def main(s):
    at_least_one = (1, math.inf)
    check_numbers(s, batch_size=at_least_one, max_steps=at_least_one, logger_freq=at_least_one)
    check_numbers(s, learning_rate=(0, math.inf), prompt_dropout=(0, 1), seed=(0, 2**32 - 1))
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # on eval mode and workers: both are meant so
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    pl.seed_everything(s.seed, verbose=False)
    out_dir = output_folder(s.out_dir)
    train_rows, validation_rows = split_rows(s.data_root)
    model = make_model(s, train_rows)
    size = model.config.image_size
    train = ControlDataset(train_rows, model.base, size, label="encoding")
    validation = ControlDataset(validation_rows, model.base, size, label="validation") if validation_rows else []
    print(f"{len(train)} training and {len(validation)} validation pictures; results go to {out_dir}")

    module = ControlTraining(
        model,
        learning_rate=s.learning_rate,
        steps=s.max_steps,
        sd_locked=s.sd_locked,
        prompt_dropout=s.prompt_dropout,
        seed=s.seed,
    )
    sampler = RandomSampler(train, replacement=True, num_samples=s.max_steps * s.batch_size)
    pictures = PictureLogger(train, out_dir / "pictures", s.logger_freq)
    every = min(s.logger_freq, s.max_steps)
    try:
        trainer = pl.Trainer(
            max_steps=s.max_steps,
            val_check_interval=every,
            check_val_every_n_epoch=None,  # count steps: several processes see several epochs
            logger=TensorBoardLogger(out_dir, name="", version="tensorboard"),
            callbacks=[SaveBestAndLast(out_dir, s.logger_freq), pictures],
            enable_checkpointing=False,
            enable_model_summary=False,
            accelerator=s.accelerator,
            devices=s.devices,
            strategy=s.strategy,
            precision=s.precision,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(f"accelerator, devices, strategy or precision: {str(error).splitlines()[0]}") from None
    tell_memory(s, module.model, trainer)
    validation_batches = DataLoader(validation, s.batch_size) if len(validation) else None
    with checkpointing(model, s.save_memory):
        trainer.fit(
            module,
            DataLoader(train, s.batch_size, sampler=sampler),
            validation_batches,
            ckpt_path=find_checkpoint(out_dir, module),
            weights_only=True,
        )
    if validation_batches and s.max_steps % every:
        trainer.validate(module, validation_batches, verbose=False)
    if trainer.is_global_zero:
        trainer.optimizers = []  # their memory
        module.zero_grad()
        trained = load_model(out_dir, base=model.base, device="auto", save_memory=s.save_memory)
        calibrate(trained, out_dir, validation or train)
    print(f"the control: {out_dir} (give it to test5.py as model_path={Path(s.out_dir)})")


if __name__ == "__main__":
    run_script(main, settings)
