"""Train a ControlNet on numbers: edit the settings, run `python tutorial_train.py`, or give them as key=value.

The base: models/tiny.yaml, models/cldm_v15.yaml, models/cldm_v21.yaml, a folder in diffusers' layout or a single file.
The data: data_root/prompt.json, one JSON object a line, {"source": 5 or "5" or [5, 0.8], "target": "x.png",
"prompt": "a text"}; targets are relative to data_root. Its controls.yaml may name the numbers and say which go round:
names: [hour, size], units: [h, m], periods: [12, null]. With "reference": "y.png" in every row, source is the change
from that picture to the target, or, with absolute: [false, true], the target's own size; pairs=FOLDER cuts pairs from
any pictures. All results go to out_dir, which is then the model_path of test5.py, test5_s1.py and invert.py.
A run that was killed goes on when started again with the same out_dir.
"""

from ldm.schema import FLAG, Rule, each, expect, number, one_of, or_null
from ldm.settings import InputError, answer, check_numbers, check_used, run_script

settings = dict(
    # what is trained, on what
    data_root="dataForTrain",
    pairs="",  # folders of pictures, or "train,FOLDER": pairs are cut from them, and data_root is not read
    controls=None,  # of pairs: some of ["rotation", "zoom", "shift x", "shift y", "exposure", "blur"]; None: all
    base="models/tiny.yaml",  # the frozen base
    latents_cache="runs/latents",  # where its latents of more than 512 pictures are kept; "": in memory, made anew
    resume_path="",  # a control to start from, of tool_add_control.py or an earlier run; "": a fresh one
    hint="dense",  # of a fresh control: dense (as the original; one resolution) or coordinate (any resolution)
    fusion="affine",  # of a fresh control with references: affine (they move), attention (they turn), or both
    modulated=False,  # of a fresh control: whether the numbers act in every block of the ControlNet
    proposals=None,  # of a fresh control: places that a small network suggests; 0: none; None: 8 for unknown changes
    proposal_steps=0,  # at the start, in which that network alone learns, in a fraction of the time
    out_dir="runs/control_tiny",
    overwrite=False,  # True: replace a control in out_dir that belongs to no unfinished run
    check=False,  # True: train nothing; look at all of the data, tell every problem and what training will take
    # how
    batch_size=16,
    accumulate=1,  # batches that make one step
    max_steps=1400,
    epochs=None,  # in place of max_steps: how often every row is taken
    logger_freq=500,  # steps between pictures, and between validations; the last step has its own
    patience=None,  # validations in a row with 1.5 times the least error, after which training ends; None: at max_steps
    checkpoint_freq=500,  # steps between checkpoints, beside those after validations
    checkpoint_minutes=10.0,  # and minutes; 0: not by the clock
    keep_checkpoints=1,  # the last so many; the best control is kept apart
    learning_rate=1e-3,  # at its peak
    warmup_steps=100,  # in which it rises to it, a tenth of all at most
    schedule="cosine",  # it falls to zero as half a cosine; "constant": it stays
    gradient_clip=1.0,  # largest norm of the gradient; 0: any
    ema=None,  # decay of an average of the weights that becomes the control, 0.999 for example
    timesteps=[0, 1],  # the share of the noise schedule that is trained
    min_snr=None,  # gamma of min-SNR weights, 5 for example; then mean squares are minimised
    prompt_dropout=0.1,  # share of prompts replaced by the empty one, which guidance needs
    likelihood=None,  # True: weigh latent channels as reading does; False: alike, as ControlNet; None: if no references
    sd_locked=True,  # False: the UNet's decoder learns too
    only_mid_control=False,
    save_memory=False,  # True: recompute activations instead of keeping them
    seed=0,
    # passed on to Lightning's Trainer
    accelerator="auto",
    devices="auto",  # processes on this machine, each with a batch of batch_size
    num_nodes=1,  # machines, on each of which the same command is started
    strategy="auto",  # or ddp
    precision="auto",  # bf16-mixed if the device computes in bfloat16, else 32-true
)
if __name__ == "__main__":
    answer(__file__)

import gc
import math
from dataclasses import fields
from functools import partial

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from cldm.calibration import calibrate
from cldm.changes import are_changes, choose_changes
from cldm.conversion import add_control, fit_statistics
from cldm.dataset import CONTROLS_FILE, Ahead, TrainingOrder, read_data
from cldm.logger import PictureLogger, Progress, describe_bars, describe_data, describe_losses
from cldm.model import load_base, load_model, save_model
from cldm.monitor import Monitor, describe_asked, draw_asked
from cldm.pairs import read_photos, training_set, validation_set
from cldm.processes import together
from cldm.reference import FUSIONS
from cldm.runs import SaveBestAndLast, count_steps, describe_run, find_checkpoint, hold_folder, make_trainer
from cldm.survey import rehearse, survey_rows, tell_subjects
from cldm.training import SCHEDULES, ControlTraining, Method, checkpointing
from dataForTrain.make_dataset import find_pictures
from ldm.files import find_path, leave_out, write_whole

PROPOSALS = 8  # places, by default
OWN = "hint", "fusion", "modulated", "proposals"  # of a fresh control
COUNT, SOME, ANY = (1, math.inf), (1e-12, math.inf), (0, math.inf)
SHARES = Rule("two shares, [0, 1] for example", lambda v: each(number(0, 1), 2).holds(v) and v[0] < v[1])


def check(s):
    """Raises: InputError for settings that cannot be, or that would have no effect."""
    counts = "batch_size", "accumulate", "max_steps", "logger_freq", "patience", "checkpoint_freq", "keep_checkpoints"
    check_numbers(
        s, int, **dict.fromkeys((*counts, "num_nodes"), COUNT), warmup_steps=ANY, proposals=ANY, seed=(0, 2**32 - 1)
    )
    check_numbers(s, int, proposal_steps=(0, s.max_steps - 1))
    if s.proposal_steps and s.epochs:
        raise InputError('setting "epochs": with proposal_steps, give max_steps')
    check_numbers(s, learning_rate=SOME, epochs=SOME, min_snr=SOME, checkpoint_minutes=ANY, gradient_clip=ANY)
    check_numbers(s, prompt_dropout=(0, 1), ema=(0, 0.99999))
    expect('setting "fusion": expected', s.fusion, one_of(*FUSIONS))
    expect('setting "schedule": expected', s.schedule, one_of(*SCHEDULES))
    expect('setting "timesteps": expected', s.timesteps, SHARES)
    if s.epochs:
        check_used(s, settings, "with epochs", "max_steps")
        if s.pairs:
            raise InputError('setting "epochs": pairs are cut without end; give max_steps')
    if s.min_snr and s.likelihood:
        raise InputError('setting "min_snr": weighs mean squares, which likelihood=true does not minimise')
    unused = ("with pairs, which are cut while training", "data_root") if s.pairs else ("without pairs", "controls")
    check_used(s, settings, *unused)
    expect('setting "likelihood": expected', s.likelihood, or_null(FLAG))
    if s.resume_path:
        check_used(s, settings, "with resume_path, whose control has its own", *OWN)


def read(s):
    """Returns: the TrainingData, rows of data_root or the photographs that pairs names, one in ten for validation."""
    if not s.pairs:
        return read_data(find_path(s.data_root))
    files, ranges = leave_out(find_pictures(s.pairs), s.get("out_dir")), choose_changes(s.controls)
    held_out = find_pictures("validation") if "train" in s.pairs.split(",") else files[5::10] or files[2:3]
    seen = {*held_out}
    return read_photos([file for file in files if file not in seen], held_out, ranges, s.seed)


def make_model(s, data):
    """Returns: the ControlLDM to train, from resume_path or fresh, with the statistics of its data."""
    numbers, references = len(data.controls[0]), data.has_references
    if s.resume_path:
        model = load_model(s.resume_path, dtype=torch.float32, precision="float32")
        if s.base != settings["base"]:
            print(f"base {s.base} is not used: resume_path has its own, {model.config.base}")
    else:
        if references:
            check_used(s, settings, "with references, which have a hint of their own", "hint")
        else:
            check_used(s, settings, "without references", "fusion")
        how = dict(control_dim=numbers, periods=data.periods, hint="reference" if references else s.hint)
        how |= {key: s[key] for key in OWN[1:]}
        if s.proposals is None:
            known = data.names and all(are_changes(data.names, data.units, data.absolute))  # by formula
            how["proposals"] = PROPOSALS if references and not known else 0
        changes = references and not all(data.absolute or [False])  # what is the target's own, moves tell little of
        how["flows"] = bool(how["proposals"] and changes)
        model = add_control(*load_base(s.base, precision="float32"), **how)
    frozen = s.sd_locked and not model.own_unet
    model.base.to_precision(getattr(torch, model.config.get("precision", "float32")), model.config.base, unet=frozen)
    own = model.control_net.control_dim, model.control_net.uses_reference, list(model.control_net.config.periods)
    given = numbers, references, data.periods_beside(own[2])
    if own != given:
        made, has = (
            f"{n} number(s), {'with' if r else 'without'} references" + f", periods {p}" * any(p)
            for n, r, p in (own, given)
        )
        remedy = f"mend {CONTROLS_FILE}, or train a fresh control"
        raise InputError(f"resume_path {s.resume_path}: made for {made}, the data has {has}; {remedy}")
    if s.proposal_steps and model.control_net.proposal is None:
        found = "the control has no proposal that would learn in them"
        raise InputError(f'setting "proposal_steps": {found}; leave it out, or train a fresh one with proposals=8')
    model.control_net.register_to_config(only_mid_control=s.only_mid_control)
    fit_statistics(model.control_net, data.controls, data.names, data.units, data.prompts, data.absolute)
    return model


def train(s, model, data, datasets, out_dir):
    """Train until max_steps, from the last checkpoint in out_dir if there is one. Returns: lines on how it went."""
    rows, validation = datasets
    monitor = Monitor(validation or rows, out_dir)
    saver = SaveBestAndLast(out_dir, s.checkpoint_freq, monitor, s.patience, s.checkpoint_minutes, s.keep_checkpoints)
    pictures = PictureLogger(validation if s.pairs else rows, out_dir / "pictures", s.logger_freq, s.batch_size)
    trainer = make_trainer(s, out_dir, [pictures, monitor, Progress(monitor), saver])
    s.max_steps = trainer.fit_loop.epoch_loop.max_steps = count_steps(s, len(data.train), trainer.world_size)
    run = describe_run(s, model, data, trainer)
    method = Method(**{field.name: s[field.name] for field in fields(Method)})
    module = ControlTraining(model, method, run)
    checkpoint, step = find_checkpoint(out_dir, run)
    taken, place = s.batch_size * s.accumulate, dict(rank=trainer.global_rank, processes=trainer.world_size)
    place |= dict(rows=None if s.pairs else len(rows), length=s.max_steps * taken, first=step * taken)
    batches = Ahead(rows, s.batch_size, sampler=TrainingOrder(seed=s.seed, **place))
    validations = DataLoader(validation, s.batch_size) if validation else None
    with checkpointing(model, s.save_memory), together(trainer):
        trainer.fit(module, batches, validations, ckpt_path=checkpoint, weights_only=True)
    module.take_average()
    module.zero_grad()
    if trainer.is_global_zero:
        unsaved = not saver.history or trainer.global_step == step and saver.is_best(trainer)  # killed before it was
        for folder in [out_dir / "last"] + [out_dir] * unsaved:
            save_model(model, folder)
    seen = rows if data.validation and not s.pairs else None
    losses = describe_losses(saver.history, bool(data.validation), bool(monitor.caught))
    return [losses, *monitor.describe(model, seen)]


def finish(model, data, dataset, out_dir):
    """Learn the error bars of the control that is kept; tell how well it reads and draws, and leave asked.png."""
    config, seen = model.control_net.config, not data.validation
    control, reading, drawn = calibrate(model, out_dir, dataset)
    print(*describe_asked(config, control, reading, drawn, seen), describe_bars(config, dataset, seen), sep="\n")
    write_whole(out_dir / "asked.png", partial(draw_asked(config, control, drawn).savefig, format="png"))


def survey(s):
    """Tell what there is to tell before a training. Raises: InputError if the data has problems."""
    if not s.pairs:
        lines, problems = survey_rows(find_path(s.data_root), load_base(s.base)[1].image_size)
        print(*lines, *(f"problem: {problem}" for problem in problems), sep="\n")
        if problems:
            raise InputError(f"{len(problems)} problem(s) in {s.data_root}, named above; mend them, then train")
    data = read(s)
    model = make_model(s, data)
    print(*describe_data(data, model.control_net.config), *tell_subjects(data), rehearse(s, model, data), sep="\n")


def main(s):
    check(s)
    pl.seed_everything(s.seed, verbose=False)
    if s.check:
        return survey(s)
    out_dir = hold_folder(
        s.out_dir,
        s.overwrite,
        inputs=map(find_path, [*(s.pairs.split(",") if s.pairs else [s.data_root]), *filter(None, [s.resume_path])]),
    )
    data = read(s)
    if s.likelihood is None:
        s.likelihood = not (data.has_references or s.min_snr)
    model = make_model(s, data)
    print(*describe_data(data, model.control_net.config), *tell_subjects(data), f"results go to {out_dir}", sep="\n")
    given = data, model.base, model.config.image_size, s.seed, s.latents_cache
    rows, validation = training_set(*given), validation_set(*given)
    if s.patience and not validation:
        raise InputError('setting "patience": has no effect without validation, which five numbers would give')
    print(*train(s, model, data, (rows, validation), out_dir), sep="\n")
    gc.collect()  # the optimizer's memory
    if rank_zero_only.rank == 0:
        trained = load_model(out_dir, base=model.base, device="auto", save_memory=s.save_memory)
        finish(trained, data, validation or rows, out_dir)
    print(f"the control: {out_dir} (give it to invert.py as model_path={s.out_dir})")


if __name__ == "__main__":
    run_script(
        main, settings, resume="it goes on from its last checkpoint when it is started again with the same out_dir"
    )
