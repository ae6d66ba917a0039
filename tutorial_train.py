"""Train a ControlNet on numbers: edit the settings, run `python tutorial_train.py`, or give them as key=value.

The base: models/tiny.yaml, models/cldm_v15.yaml, models/cldm_v21.yaml, a folder in diffusers' layout or a single file.
The data: data_root/prompt.json, one JSON object a line, {"source": 5 or "5" or [5, 0.8], "target": "x.png",
"prompt": "a text"}; targets are relative to data_root, whose controls.yaml may name the numbers. With
"reference": "y.png" in every row, source is the change from that picture to the target; pairs=FOLDER cuts such pairs
from any pictures. Everything of a run goes to out_dir, which is then the model_path of test5.py, test5_s1.py and
invert.py. A run that was killed goes on when started again with the same out_dir.
"""

from ldm.settings import InputError, answer, check_numbers, check_used, run_script

settings = dict(
    # what is trained on what
    data_root="dataForTrain",
    pairs="",  # a folder of pictures, or "train": pairs are cut from them while training, in place of data_root
    controls=None,  # of pairs: ["rotation", "zoom", "shift x", "shift y", "exposure", "blur"], some; None: all
    base="models/tiny.yaml",  # the frozen base
    resume_path="",  # a control to start from (tool_add_control.py, or an earlier out_dir); "": a fresh one of the base
    hint="dense",  # of a fresh control: dense (as the original: one resolution) or coordinate (any)
    out_dir="runs/control_tiny",
    overwrite=False,  # True: a control that lies in out_dir, of no run that goes on, is replaced
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
if __name__ == "__main__":
    answer(__file__)

import logging
import math
import random
import warnings
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from cldm.changes import CHANGES, choose_changes, draw_change
from cldm.conversion import add_control, fit_statistics
from cldm.dataset import ControlDataset, TrainingOrder, read_control_names, split_rows
from cldm.logger import PictureLogger, Progress, describe_data, tell_bars
from cldm.model import control_folder, load_base, load_model
from cldm.pairs import FreshPairs, check_photos
from cldm.reading import calibrate
from cldm.training import (
    PRECISIONS,
    RESUME_FILE,
    ControlTraining,
    SaveBestAndLast,
    checkpointing,
    digest_weights,
    find_checkpoint,
    stoppable,
)
from dataForTrain.make_dataset import find_pictures
from ldm.files import check_writable, find_path, output_folder

VALIDATION_PAIRS = 144
STATISTICS = 10_000  # random changes, for the spread of each


def read_data(s):
    """Returns: what is trained on, rows or files of pictures; the same for validation; all controls; names; units.

    Names and units are None where nobody gave them.
    """
    if s.pairs:
        ranges = choose_changes(s.controls)
        rng = random.Random(s.seed)
        drawn = [draw_change(rng, ranges) for _ in range(STATISTICS)]
        controls = [[change[name] for name in ranges] for change in drawn] + [*zip(*ranges.values())]
        return *split_pictures(s.pairs), controls, list(ranges), [CHANGES[name][0] for name in ranges]
    folder = find_path(s.data_root)
    train, validation = split_rows(folder)
    controls = [row.control for row in train]
    return train, validation, controls, *read_control_names(folder, len(controls[0]))


def split_pictures(folder):
    """Returns: the pictures in a folder, those that packages carry for "train"; one in ten of them for validation."""
    if folder == "train":
        return find_pictures("train"), find_pictures("validation")
    files = find_pictures(folder)
    held_out = files[5::10] or files[2:3]
    return [file for file in files if file not in held_out], held_out


def make_model(s, controls, names, units, prompts, references):
    """Returns: the ControlLDM to train, from resume_path or fresh, with the statistics of the controls."""
    numbers = len(controls[0])
    if s.resume_path:
        model = load_model(s.resume_path, dtype=torch.float32)
        if s.base != settings["base"]:
            print(f"base {s.base} is not used: resume_path has its own, {model.config.base}")
    else:
        base, config = load_base(s.base)
        if references:
            check_used(s, settings, "with references, which have a hint of their own", "hint")
        model = add_control(base, config, control_dim=numbers, hint="reference" if references else s.hint)
    data = s.pairs or s.data_root
    if model.control_net.control_dim != numbers:
        raise InputError(
            f"resume_path {s.resume_path}: made for {model.control_net.control_dim} number(s), {data} has "
            f"{numbers}; make one with tool_add_control.py control_dim={numbers}"
        )
    if model.control_net.uses_reference != references:
        has = "has references" if references else "has no references"
        raise InputError(f"{data} {has}, unlike the data of resume_path {s.resume_path}; train a fresh control")
    model.control_net.register_to_config(only_mid_control=s.only_mid_control)
    fit_statistics(model.control_net, controls, names, units, prompts)
    return model


def make_datasets(s, model, train, validation):
    """Returns: the datasets of training and validation, None without; {what: its digest}."""
    base, size = model.base, model.config.image_size
    if not s.pairs:
        datasets = [ControlDataset(rows, base, size) if rows else None for rows in (train, validation)]
        digests = [dataset.digest for dataset in datasets if dataset]
        return *datasets, {f"the {key}": " ".join(digest[key] for digest in digests) for key in digests[0]}
    ranges = choose_changes(s.controls)
    digest = {"controls": str({name: [*bounds] for name, bounds in ranges.items()})}
    digest["the pictures"] = check_photos([*train, *validation])
    drawn = FreshPairs(validation or train, ranges, base, size, s.seed + 1).draw(VALIDATION_PAIRS, 0)
    return FreshPairs(train, ranges, base, size, s.seed), drawn, digest


def describe_run(s, model, precision, digests):
    """Returns: {what: text or number}, by which a checkpoint knows whose it is."""
    settings = ("batch_size", "max_steps", "learning_rate", "prompt_dropout", "sd_locked", "only_mid_control", "seed")
    scheduler = model.base.scheduler
    base = model.config.image_size, scheduler.config.prediction_type, scheduler.alphas_cumprod.tolist()
    return {
        **{key: s[key] for key in settings},
        "hint": model.control_net.config.hint,
        "precision": precision,
        **digests,
        "the base": digest_weights(model.base, *base),
        "the control of resume_path": digest_weights(model.control_net) if s.resume_path else "",
    }


def main(s):
    whole = (1, math.inf)
    check_numbers(s, int, batch_size=whole, max_steps=whole, logger_freq=whole, seed=(0, 2**32 - 1))
    check_numbers(s, learning_rate=(0, math.inf), prompt_dropout=(0, 1))
    if s.learning_rate == 0:
        raise InputError('setting "learning_rate": 0 learns nothing, expected a number above it')
    if s.pairs:
        check_used(s, settings, "with pairs, which are cut while training", "data_root")
    else:
        check_used(s, settings, "without pairs", "controls")
    if s.resume_path:
        check_used(s, settings, "with resume_path, whose control has its own", "hint")
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # on eval mode and workers: both are meant so
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    pl.seed_everything(s.seed, verbose=False)
    first = rank_zero_only.rank == 0  # of several processes, it holds the folder and tells
    out_dir = (output_folder if first else check_writable)(s.out_dir)
    with stoppable() as stop, nullcontext() if first else redirect_stdout(None):
        if not (out_dir / RESUME_FILE).exists():
            own = ["tensorboard", "pictures"] if (out_dir / "tensorboard").exists() else []  # of a run killed early
            control_folder(out_dir, s.overwrite, own=own, inputs=[find_path(s.pairs or s.data_root)])
        train_control(s, out_dir, stop)


def train_control(s, out_dir, stop):
    train, validation, controls, names, units = read_data(s)
    prompts = [""] if s.pairs else [row.prompt for row in train]
    model = make_model(s, controls, names, units, prompts, bool(s.pairs) or train[0].reference is not None)
    config = model.control_net.config
    print(f"{len(train)} training and {len(validation)} validation {'photographs' if s.pairs else 'pictures'}")
    print(*describe_data(controls, config.control_names, config.control_units, prompts, bool(s.pairs)), sep="\n")
    held_out = bool(validation)
    train, validation, digests = make_datasets(s, model, train, validation)
    print(f"results go to {out_dir}")

    saver = SaveBestAndLast(out_dir, s.logger_freq, stop)
    pictures = PictureLogger(validation if s.pairs else train, out_dir / "pictures", s.logger_freq, s.batch_size)
    try:
        trainer = pl.Trainer(
            max_steps=s.max_steps,
            val_check_interval=min(s.logger_freq, s.max_steps),
            check_val_every_n_epoch=None,  # count steps: several processes see several epochs
            logger=TensorBoardLogger(out_dir, name="", version="tensorboard"),
            callbacks=[pictures, Progress(), saver],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            accelerator=s.accelerator,
            devices=s.devices,
            strategy=s.strategy,
            precision=s.precision,
            gradient_clip_val=1.0,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            use_distributed_sampler=False,  # TrainingOrder knows of several processes
        )
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        raise InputError(f"accelerator, devices, strategy or precision: {str(error).splitlines()[0]}") from None
    if trainer.precision not in PRECISIONS:
        raise InputError(f'setting "precision": expected one of {", ".join(PRECISIONS)}, got {s.precision}')
    module = ControlTraining(
        model,
        learning_rate=s.learning_rate,
        steps=s.max_steps,
        sd_locked=s.sd_locked,
        prompt_dropout=s.prompt_dropout,
        seed=s.seed,
        run=describe_run(s, model, trainer.precision, digests),
    )
    resume_file, step = find_checkpoint(out_dir, module)
    order = TrainingOrder(None if s.pairs else len(train), s.max_steps * s.batch_size, s.seed)
    order.first, order.rank, order.processes = step * s.batch_size, trainer.global_rank, trainer.world_size
    validation_batches = DataLoader(validation, s.batch_size) if validation else None
    with checkpointing(model, s.save_memory):
        batches = DataLoader(train, s.batch_size, sampler=order)
        trainer.fit(module, batches, validation_batches, ckpt_path=resume_file, weights_only=True)
    saver.finish(trainer, module)
    if trainer.is_global_zero:
        print(saver.verdict())
        trainer.optimizers = []  # their memory
        module.zero_grad()
        trained = load_model(out_dir, base=model.base, device="auto", save_memory=s.save_memory)
        calibrate(trained, out_dir, validation or train)
        print(tell_bars(validation or train, seen=not held_out))
    print(f"the control: {out_dir} (give it to test5.py as model_path={Path(s.out_dir)})")


if __name__ == "__main__":
    run_script(
        main, settings, resume="it goes on from its last checkpoint when it is started again with the same out_dir"
    )
