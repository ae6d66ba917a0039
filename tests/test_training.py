"""Training: falls, touches nothing but the control, leaves whole folders, goes on where it was killed."""

import contextlib
import csv
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional as F

import cldm.report
import tutorial_train
from benchmarks.common import read_targets
from cldm.calibration import spread_out
from cldm.conversion import fit_statistics
from cldm.dataset import ControlDataset, read_rows, split_rows
from cldm.logger import PictureLogger, describe_bars, describe_losses
from cldm.model import Sampling, load_model, save_model
from cldm.monitor import HANDFUL, Monitor, across, describe_asked, draw_asked
from cldm.pairs import FreshPairs
from cldm.runs import SaveBestAndLast, choose_precision, hold_folder, list_checkpoints, make_trainer
from cldm.training import EXPLODED, RECENT, VALIDATION_TIMESTEPS, ControlTraining, FullAttention, Method, checkpointing
from ldm.base import has_bfloat16
from ldm.files import PARTIAL, ROOT
from ldm.schema import read_config, write_yaml
from ldm.settings import InputError, override
from tests.conftest import another_run, randomize_zero_convolutions, send, trained_state

FINISH = tutorial_train.finish  # which the fixture replaces
SOURCES = [[1, 0.5], [2, "0.5"], ["3", 1.0], [4, 2.0]]
VALIDATION = [[1.5, 0.5], [2.5, 1.0]]


@pytest.fixture
def train(base_yaml, write_dataset, tmp_path, monkeypatch):
    """train(*arguments) -> out_dir, after 4 steps of two pictures on a tiny dataset of two numbers."""
    monkeypatch.setattr(tutorial_train, "finish", lambda *_: None)  # most of the time
    monkeypatch.setattr("cldm.report.DRAWN", Sampling(2))
    write_dataset(SOURCES)
    data_root = write_dataset(VALIDATION, file="validation.json")
    (data_root / "controls.yaml").write_text("names: [angle, zoom]\nunits: [degrees, '']\n")

    defaults = [
        f"data_root={data_root}",
        f"base={base_yaml}",
        f"out_dir={tmp_path / 'out'}",
        "batch_size=2",
        "max_steps=4",
        "logger_freq=2",
        "precision=32-true",
        "accelerator=cpu",
        "devices=1",
    ]

    def run(*arguments):
        s = override(tutorial_train.settings, [*defaults, *arguments])
        tutorial_train.main(s)
        return Path(s.out_dir)

    run.defaults = defaults
    return run


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    """Returns: names of the weights of a module that are not those of another, or of its copy `before`."""
    before = before if isinstance(before, dict) else before.state_dict()
    assert before.keys() == module.state_dict().keys()
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_done(out_dir):
    return torch.load(max((out_dir / "checkpoints").iterdir()), weights_only=True)["global_step"]


def test_training_leaves_a_control_that_can_be_loaded(train, base_yaml, base, capsys, monkeypatch):
    monkeypatch.setattr(tutorial_train, "finish", FINISH)
    on_disk = files(base_yaml.parent)
    out_dir = train("only_mid_control=true")
    assert files(base_yaml.parent) == on_disk
    assert "pictures of 40 x 40 resized to 32 x 32" in capsys.readouterr().out
    for folder in (out_dir, out_dir / "last"):
        model = load_model(folder)
        config, controls = model.control_net.config, torch.tensor([[1, 0.5], [2, 0.5], [3, 1.0], [4, 2.0]])
        torch.testing.assert_close(torch.tensor(config.control_mean), controls.mean(0))
        torch.testing.assert_close(torch.tensor(config.control_std), controls.std(0, correction=0))
        assert (list(config.control_low), list(config.control_high)) == ([1.0, 0.5], [4.0, 2.0])
        assert list(config.control_names) == ["angle", "zoom"] and list(config.control_units) == ["degrees", ""]
        assert not changed(base, model.base)
        assert model.control_net.controlnet_mid_block.weight.any()  # it learned
        assert not any(parameter.any() for parameter in model.control_net.controlnet_down_blocks.parameters())
        assert not (folder / "unet").exists()
        assert config.only_mid_control is True
        assert list(config.prompts) == ["a square"]
        assert (config.error_scale is None) == (folder.name == "last")
    assert {path.name for path in (out_dir / "pictures").iterdir()} == {"000002.png", "000004.png"}
    assert list((out_dir / "tensorboard").glob("events*"))
    assert not list(out_dir.rglob(".partial*"))


@pytest.mark.slow
def test_stopped_training_goes_on_as_if_it_had_not_been(train, monkeypatch, tmp_path, capsys):
    """By Ctrl-C or SIGTERM: one line, the shell's code; then bitwise the weights of a run that was left alone."""
    steps = ["max_steps=7", "logger_freq=4"]
    whole = trained_state(train(*steps, f"out_dir={tmp_path / 'out'}"))
    stops = {1: signal.SIGTERM, 3: signal.SIGINT, 4: signal.SIGTERM, 7: signal.SIGINT}
    for step, number in stops.items():  # 4 and 7 are validated
        out = tmp_path / f"stopped at {step}" / "out"
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
            send(number, step, patched)
            capsys.readouterr()
            train(*steps, f"out_dir={out}")
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        line = f"stopped by {name} at step {step} of 7; the same command goes on from there"
        errors = capsys.readouterr().err.replace("\r", "\n").splitlines()
        assert [text for text in errors if text and "it/s" not in text] == [line]
        assert stopped.value.code == 128 + number and steps_done(out) == step
        train(*steps, f"out_dir={out}")
        resumed = trained_state(out)
        assert resumed.keys() == whole.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole), step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def readable(out_dir):
    """Returns: how many files with a final name a run has left. Raises: if one of them cannot be read."""
    readers = {
        ".ckpt": partial(torch.load, weights_only=True),
        ".safetensors": safetensors.torch.load_file,
        ".json": lambda file: json.loads(file.read_text()),
        ".yaml": read_config,
        ".csv": lambda file: list(csv.DictReader(file.open())),
        ".png": lambda file: Image.open(file).load(),
    }
    kept = [file for file in out_dir.rglob("*") if file.suffix in readers and ".partial" not in str(file)]
    for file in kept:
        readers[file.suffix](file)
    return len(kept)


def train_quickly(arguments):
    """What the fixture `train` does, in a process of its own."""
    tutorial_train.finish, cldm.report.DRAWN = (lambda *_: None), Sampling(2)
    tutorial_train.main(override(tutorial_train.settings, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_killed_training_goes_on_as_if_it_had_not_been(train, tmp_path, ema):
    """Ten times SIGKILL at any moment, a write among them: nothing is half-written, and the weights are the same."""
    settings = [*train.defaults, "max_steps=6", "logger_freq=3", "checkpoint_freq=1", f"ema={ema}"]
    processes, moments, kills, run = multiprocessing.get_context("forkserver"), random.Random(0), 0, 0
    processes.set_forkserver_preload(["tests.test_training"])

    def start(out_dir):
        process = processes.Process(target=train_quickly, args=([*settings, f"out_dir={out_dir}"],))
        process.start()
        return process

    start(tmp_path / "out").join(120)
    whole, long = trained_state(tmp_path / "out"), 60.0
    while kills < 10:
        out_dir, run, killed = tmp_path / f"killed {run}" / "out", run + 1, True
        while killed:
            process, began = start(out_dir), time.monotonic()
            process.join(moments.uniform(0, long) if kills < 10 else 120)
            process.kill()
            process.join()
            killed, there = process.exitcode == -signal.SIGKILL, readable(out_dir)
            kills += killed
            assert killed or process.exitcode == 0 and there
        long = min(long, time.monotonic() - began)
        resumed = trained_state(out_dir)
        assert resumed.keys() == whole.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("steps, earlier, ema", [(3, 0, "null"), (3, 0, "0.9"), (2, 0, "0.9"), (4, 1, "null")])
def test_a_run_killed_before_it_saved_its_best_goes_on(train, monkeypatch, tmp_path, steps, earlier, ema):
    """In a validation after two steps, or in the last, where an earlier one's best may be there."""
    monkeypatch.setattr("cldm.runs.HARDLY", math.inf)  # so that every validation saves
    settings, folder = [f"max_steps={steps}", f"ema={ema}"], tmp_path / "killed" / "out"
    whole, out = train(*settings), f"out_dir={folder}"
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        kept = Mock(side_effect=[save_model] * earlier + [RuntimeError("killed")])
        patched.setattr("cldm.runs.save_model", lambda *given: kept()(*given))
        train(*settings, out)
    assert steps_done(folder) == 2 + 2 * earlier and (folder / "config.json").exists() == earlier
    (folder / "checkpoints" / f"{PARTIAL}00000002.ckpt").write_bytes(b"half")
    ends = pytest.raises(RuntimeError, match="killed") if steps == 3 else contextlib.nullcontext()
    with monkeypatch.context() as patched, ends:
        patched.setattr(ControlTraining, "squared_errors", Mock(side_effect=RuntimeError("killed")))
        train(*settings, out)
    assert not list(folder.rglob(f"{PARTIAL}*"))
    assert load_model(folder).control_net.config.control_names == ["angle", "zoom"]  # saved at the start
    train(*settings, out)
    assert not changed(load_model(whole).control_net, load_model(folder).control_net)


def test_checkpoints_come_by_steps_and_by_the_clock_and_the_last_are_kept(train, monkeypatch, tmp_path):
    def kept(*arguments):
        return [int(file.stem) for file in sorted((train(*arguments) / "checkpoints").iterdir())]

    assert kept("checkpoint_freq=1", "logger_freq=4", "keep_checkpoints=3") == [2, 3, 4]
    assert kept("logger_freq=4", "keep_checkpoints=9", f"out_dir={tmp_path / 'rare'}") == [4]
    often = ["checkpoint_minutes=1e-9", "logger_freq=4", "keep_checkpoints=9", f"out_dir={tmp_path / 'often'}"]
    assert kept(*often) == [1, 2, 3, 4]


def test_a_proposal_may_learn_first(train):
    """Until the rest has learned, too, nothing is judged by what it reads."""
    kept = ["checkpoint_freq=1", "logger_freq=1", "keep_checkpoints=3", "ema=0.9"]
    out_dir = train("proposals=2", "proposal_steps=2", "max_steps=3", *kept)
    states = [torch.load(file, weights_only=True)["state_dict"] for file in list_checkpoints(out_dir)]
    for before, after, all_learn in zip(states[:-1], states[1:], (False, True), strict=True):
        learned = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(".proposal." in name for name in learned)
        assert any(".proposal." not in name for name in learned) == all_learn
    (row,) = csv.DictReader((out_dir / "log.csv").read_text().splitlines())
    assert row["step"] == "3" and float(row["control_error"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["limit", "tmpfs"])
def test_full_disk_loses_nothing(train, small_disk, tmp_path, monkeypatch, disk):
    """A checkpoint that does not fit: one line; the one before it stays whole, and training goes on from there."""
    whole, out_dir = trained_state(train()), tmp_path / disk
    out_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", out_dir]
    if disk == "tmpfs" and (os.geteuid() or subprocess.run(mount).returncode):
        pytest.skip("only root may mount")
    save, room = SaveBestAndLast.checkpoint, contextlib.ExitStack()

    def fill(self, trainer):
        if trainer.global_step == 3:
            if disk == "limit":
                room.enter_context(small_disk())
            else:
                (out_dir / "tensorboard" / "full").write_bytes(bytes(shutil.disk_usage(out_dir).free - 2**16))
        save(self, trainer)

    try:
        with monkeypatch.context() as patched, room, pytest.raises(InputError, match="00003.ckpt: cannot be written"):
            patched.setattr(SaveBestAndLast, "checkpoint", fill)
            train("checkpoint_freq=1", f"out_dir={out_dir}")
        assert steps_done(out_dir) == 2 and readable(out_dir)
        (out_dir / "tensorboard" / "full").unlink(missing_ok=True)
        resumed = trained_state(train("checkpoint_freq=1", f"out_dir={out_dir}"))
        assert all(torch.equal(value, resumed[name.replace("out ", f"{disk} ")]) for name, value in whole.items())
    finally:
        if disk == "tmpfs":
            subprocess.run(["umount", "--lazy", out_dir], check=True)


@pytest.mark.slow
def test_stopped_training_goes_on_with_latents_on_disk(train, monkeypatch, tmp_path):
    """Bitwise as a run that was left alone, whatever was encoded before it was stopped."""
    monkeypatch.setattr("cldm.dataset.FEW", 0)
    whole = trained_state(train("max_steps=3", f"latents_cache={tmp_path / 'latents'}"))
    out = tmp_path / "stopped" / "out"
    arguments = "max_steps=3", f"out_dir={out}", f"latents_cache={tmp_path / 'others'}"
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        send(signal.SIGTERM, 1, patched)
        train(*arguments)
    train(*arguments)
    resumed = trained_state(out)
    assert resumed.keys() == whole.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(InputError, match=r"latents=float16 \(now None\)"):
        train(*arguments[:2], "latents_cache=")


def test_longer_training_goes_on_from_its_checkpoint(train, monkeypatch, capsys):
    trained, rates, step = [], [], ControlTraining.training_step

    def note(self, *args):
        trained.append(self.global_step)
        rates.append(self.optimizers().param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(ControlTraining, "training_step", note)
    out_dir = train()
    before = load_model(out_dir / "last").control_net
    assert trained == [0, 1, 2, 3] and steps_done(out_dir) == 4
    train("max_steps=8")
    assert "max_steps was 4: the learning rate goes on at 50% of its peak" in capsys.readouterr().out
    assert trained == list(range(8)) and steps_done(out_dir) == 8
    assert rates[4:] == pytest.approx([1e-3 * (0.5 + 0.5 * math.cos(math.pi * k / 8)) for k in range(4, 8)])
    assert changed(before, load_model(out_dir / "last").control_net)
    with pytest.raises(InputError, match="has done 8 steps already, more than max_steps=4"):
        train()


def test_used_out_dir_refuses_another_run(train, base_yaml, tmp_path):
    """Whatever would make other weights of the same steps is named, and nothing is changed."""
    out_dir, data = train("max_steps=1"), tmp_path / "data"
    unlike = shutil.copytree(base_yaml.parent, tmp_path / "unlike")
    weights = unlike / "mini_sd" / "text_encoder" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({k: t + 1e-3 for k, t in tensors.items()}, weights, {"format": "pt"})
    write_yaml(read_config(base_yaml) | {"base": str(unlike / "mini_sd")}, unlike / "mini.yaml")
    before = files(out_dir)
    for argument, named in {
        "learning_rate=0.01": r"learning_rate=0.001 \(now 0.01\)",
        "seed=1": r"seed=0 \(now 1\)",
        "prompt_dropout=0.2": "prompt_dropout=0.1",
        "only_mid_control=true": "only_mid_control=False",
        "sd_locked=false": "sd_locked=True",
        "hint=coordinate": "hint=dense",
        "modulated=true": "class_embed_type=None",
        "precision=bf16-mixed": "precision=32-true",
        "batch_size=1": "batch_size=2",
        f"base={unlike / 'mini.yaml'}": "the base",
        f"resume_path={out_dir}": "the control of resume_path",
    }.items():
        with pytest.raises(InputError, match=rf"0001.ckpt: .*with other settings or data: {named}[^,]*; start as"):
            train("max_steps=1", argument)
    rows = (data / "prompt.json").read_text()
    (data / "prompt.json").write_text(rows.replace('"3"', '"3.5"'))
    with pytest.raises(InputError, match="the rows"):
        train("max_steps=1")
    (data / "prompt.json").write_text(rows)
    names = (data / "controls.yaml").read_text()
    (data / "controls.yaml").write_text(names.replace("angle", "size"))
    with pytest.raises(InputError, match="the numbers' names"):
        train("max_steps=1")
    (data / "controls.yaml").write_text(names)
    (data / "validation.json_0.png").write_bytes((data / "validation.json_1.png").read_bytes())
    with pytest.raises(InputError, match="the pictures"):
        train("max_steps=1")
    assert files(out_dir) == before


def test_a_run_killed_as_it_wrote_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"{PARTIAL}00000001.ckpt").write_bytes(b"half")
    assert hold_folder(tmp_path, False, ()) == tmp_path
    (tmp_path / "checkpoints" / "mine.ckpt").write_bytes(b"whole")
    with pytest.raises(InputError, match="has checkpoints in it already"):
        hold_folder(tmp_path, False, ())


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    for name in ("tensorboard", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "log.csv").write_text("step\n100\n")
    assert hold_folder(tmp_path, False, ()) == tmp_path
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="has notes.txt in it already"):
        hold_folder(tmp_path, False, ())


def test_validations_come_when_they_are_due_however_many_epochs_there_are(train, tmp_path):
    s = override(tutorial_train.settings, ["epochs=10", "logger_freq=5000", "accelerator=cpu", "devices=1"])
    assert make_trainer(s, tmp_path, []).val_check_interval == 5000


def test_pairs_that_diverge_are_named_though_they_lie_in_no_file():
    trainer = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=FreshPairs.__new__(FreshPairs)))
    run = SimpleNamespace(trainer=trainer, global_step=7, saved=None, method=SimpleNamespace(learning_rate=1e-3))
    error = ControlTraining.diverged(run, "the loss is not finite", math.nan, {"row": torch.tensor([3])})
    assert str(error).startswith("step 7: the loss is not finite: nan; last checkpoint: none")


def test_what_is_resumed_is_not_overwritten(train, control_folder):
    before = files(control_folder)
    with pytest.raises(InputError, match="which is read"):
        train(f"resume_path={control_folder}", f"out_dir={control_folder}", "overwrite=true")
    assert files(control_folder) == before


def test_patience_needs_a_validation(train, write_dataset):
    (write_dataset([[1, 0.5], [2, 1.0], [3, 2.0]]) / "validation.json").unlink()
    with pytest.raises(InputError, match='"patience": has no effect without validation'):
        train("patience=2")


def test_one_run_at_a_time_writes_into_a_folder(train, tmp_path):
    with another_run(tmp_path / "out"), pytest.raises(InputError, match="out: another run is writing into it"):
        train()
    assert not files(tmp_path / "out")


@pytest.mark.parametrize("what", ["loss", "gradient", "val_loss"])
def test_loss_that_is_not_finite_ends_training_and_nothing_good_is_lost(train, monkeypatch, tmp_path, what):
    """In the third step, or the validation after the fourth; the checkpoint of the second stays."""
    original = ControlTraining.squared_errors

    def loss(self, *args):
        value, ill = original(self, *args), self.global_step == (4 if what == "val_loss" else 2)
        if ill and what == "gradient" and value.requires_grad:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value * math.nan if ill and (what == "val_loss") != self.training else value

    kept, go_on = {}, SaveBestAndLast.end_if_told  # after both were saved
    monkeypatch.setattr(
        SaveBestAndLast, "end_if_told", lambda *args: go_on(*args) or kept.update(files(args[0].out_dir))
    )
    monkeypatch.setattr(ControlTraining, "squared_errors", loss)
    named = "" if what == "val_loss" else r"\(of prompt.json_\d.png, prompt.json_\d.png\)"
    with pytest.raises(InputError, match=rf"^step [234]: the .* is not finite ?{named}: .*0*2.ckpt; .* below 0.001 "):
        train()
    assert steps_done(tmp_path / "out") == 2 and not (tmp_path / "out" / "last").exists()
    now = {path: content for path, content in files(tmp_path / "out").items() if path.suffix not in (".png", ".csv")}
    assert kept and all(now[path] == kept[path] for path in now if "tensorboard" not in str(path))


@pytest.mark.parametrize(
    "argument, message",
    [
        ("learning_rate=0", "learning_rate"),
        ("learning_rate=1e30", "step 1: the loss or its gradient is not finite"),
        ("precision=16-true", "expected auto or one of 32-true, bf16-mixed, 16-mixed"),
        ("schedule=linear", "expected cosine or constant"),
        ("timesteps=[0.5,0.5]", "expected two shares"),
        ("min_snr=5 likelihood=true", "weighs mean squares"),
        ("precision=64", "expected auto or one of 32-true"),
    ],
)
def test_what_cannot_be_trained_is_named(train, tmp_path, argument, message):
    with pytest.raises(InputError, match=message):
        train(*argument.split())
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "sources, named", [([[1, 5], [2, 5]], "zoom is 5 in all"), ([[0.25, 1]], "angle is 0.25 in all")]
)
def test_number_that_never_changes_is_named(train, write_dataset, sources, named):
    write_dataset(sources)
    with pytest.raises(InputError, match=f"nothing to learn: {named} rows"):
        train()


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_finished_training_started_again_keeps_its_control(train, ema):
    out_dir = train(f"ema={ema}")
    before = [load_model(folder).control_net for folder in (out_dir, out_dir / "last")]
    train(f"ema={ema}")
    assert not any(map(changed, before, [load_model(folder).control_net for folder in (out_dir, out_dir / "last")]))
    assert steps_done(out_dir) == 4


def test_same_seed_trains_the_same_control(train, tmp_path):
    first = load_model(train("max_steps=2")).control_net
    again = load_model(train("max_steps=2", f"out_dir={tmp_path / 'again'}")).control_net
    other = load_model(train("max_steps=2", f"out_dir={tmp_path / 'other'}", "seed=1")).control_net
    assert not changed(first, again) and changed(first, other)


def test_unlocked_unet_is_saved_and_used(train, base):
    out_dir = train("sd_locked=false", "max_steps=2", "learning_rate=1e-2")
    model = load_model(out_dir)
    assert (out_dir / "unet" / "config.json").is_file()
    learned = changed(base.unet.half().float(), model.base.unet)  # a control's folder is in half precision
    assert learned and all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in learned)
    assert not changed(base.vae, model.base.vae) and not changed(base.text_encoder, model.base.text_encoder)
    config = read_config(out_dir / "model.yaml")
    write_yaml(config | {"precision": "bfloat16"}, out_dir / "model.yaml")  # the UNet in memory is float32 by now
    model = load_model(out_dir, base=base)
    assert model.base.unet.dtype == model.control_net.conv_in.weight.dtype == torch.bfloat16


def test_resume_path_keeps_a_trained_unet(train, make_model, tmp_path):
    """What was trained on this UNet is worth nothing without it, whether or not it goes on learning."""
    earlier = make_model(2)
    earlier.own_unet = True
    earlier.base.unet.conv_out.bias.add_(1.0)
    save_model(earlier, tmp_path / "earlier")
    out_dir = train(f"resume_path={tmp_path / 'earlier'}", "max_steps=1")
    assert not changed(load_model(tmp_path / "earlier").base.unet, load_model(out_dir).base.unet)


def test_resume_path_keeps_weights_and_statistics(train, make_model, tmp_path, capsys):
    """But its range grows, and so do the prompts that it knows; its error bars are learned anew."""
    model = make_model(2, fresh=True)
    controls, names = [(0.0, 1.0), (3.0, 21.0)], ["angle", "zoom"]
    fit_statistics(model.control_net, controls, names, ["degrees", ""], ["a cup", "a cat", "a cat"])
    randomize_zero_convolutions(model.control_net)
    model.control_net.register_to_config(error_scale=[0.1, 0.1], error_floor=[0.1, 0.1], explained_loss=0.1)
    save_model(model, tmp_path / "earlier")
    earlier = load_model(tmp_path / "earlier").control_net
    out_dir = train(f"resume_path={tmp_path / 'earlier'}", "max_steps=1", "learning_rate=1e-12")
    trained = load_model(out_dir).control_net
    assert list(trained.config.control_mean) == [1.5, 11.0] and list(trained.config.control_std) == [1.5, 10.0]
    assert (list(trained.config.control_low), list(trained.config.control_high)) == ([0.0, 0.5], [4.0, 21.0])
    assert list(trained.config.prompts) == ["a square", "a cat", "a cup"]
    assert trained.config.error_scale is trained.config.error_floor is trained.config.explained_loss is None
    out = capsys.readouterr().out
    assert "the range of angle is now 0 to 4, which was 0 to 3 degrees\n" in out
    assert "the range of zoom is now 0.5 to 21, which was 1 to 21\n" in out
    assert len(changed(earlier, trained)) < 0.1 * len(earlier.state_dict())  # half precision hides such a step


@pytest.mark.parametrize(
    "own, given, names",
    [
        (["tilt", "degrees"], ["tilt", "degrees"], "tilt"),
        (["tilt", "degrees"], None, "tilt"),  # nobody says that they are others
        (["control", ""], ["tilt", "degrees"], "tilt"),
        (["tilt", "degrees"], ["tilt", "radians"], None),
        (["tilt", "degrees"], ["lean", "degrees"], None),
    ],
)
def test_names_of_a_trained_control(make_model, own, given, names):
    control_net = make_model().control_net
    control_net.register_to_config(control_names=own[:1], control_units=own[1:], control_low=[0.0], control_high=[1.0])
    given = (given[:1], given[1:]) if given else (None, None)
    if names:
        fit_statistics(control_net, [(0.0,), (1.0,)], *given)
        assert control_net.config.control_names == [names]
    else:
        with pytest.raises(InputError, match="resume_path: was trained on tilt degrees, the data has .*controls.yaml"):
            fit_statistics(control_net, [(0.0,), (1.0,)], *given)


def test_control_that_was_trained_elsewhere_keeps_how_it_takes_numbers(make_model):
    """Though nobody knows its range, as of a file of the original fork."""
    control_net = make_model().control_net
    control_net.register_to_config(control_mean=[0.0], control_std=[1.0])
    fit_statistics(control_net, [(10.0,), (30.0,)], ["angle"], ["degrees"])
    config = control_net.config
    assert config.control_mean == [0.0] and config.control_std == [1.0] and config.control_high == [30.0]


@pytest.mark.parametrize("size", [1e-310, 1e-50, 1.0, 1e39, 1e200, 1e307])
def test_statistics_of_numbers_of_any_size(make_model, size):
    control_net = make_model(fresh=True).control_net
    fit_statistics(control_net, [(size,), (3 * size,), (2 * size,)], ["a"], [""])
    normal = control_net.normalize(torch.tensor([[size], [2 * size], [3 * size]], dtype=torch.float64))
    torch.testing.assert_close(normal, torch.tensor([[-1.0], [0.0], [1.0]]) * 1.5**0.5)


def test_resume_path_of_another_dimension_is_named(train, make_model, tmp_path):
    save_model(make_model(1), tmp_path / "one")
    with pytest.raises(InputError, match=r"made for 1 number\(s\), .* has 2 number"):
        train(f"resume_path={tmp_path / 'one'}")


def test_a_control_keeps_the_periods_that_it_was_trained_with(train, write_dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tutorial_train, "finish", FINISH)
    file = write_dataset(SOURCES) / "controls.yaml"
    file.write_text("names: [angle, zoom]\nunits: [degrees, '']\nperiods: [5, null]\n")
    out_dir = train("max_steps=2")
    config = load_model(out_dir).control_net.config
    assert list(config.periods) == [5, None] and len(config.error_scale) == 2
    assert (list(config.control_low), list(config.control_high)) == ([0, 0.5], [5, 2])
    assert "angle: 1 to 4 degrees, 4 values, which goes round every 5\n" in capsys.readouterr().out
    file.write_text("names: [angle, zoom]\nunits: [degrees, '']\nperiods: [6, null]\n")
    with pytest.raises(InputError, match="other settings or data: the rows;"):
        train("max_steps=2")
    with pytest.raises(InputError, match=r"made for .*, periods \[5, None\], .* has .*, periods \[6, None\]; mend"):
        train(f"resume_path={out_dir}", f"out_dir={tmp_path / 'other'}")
    file.unlink()  # unnamed numbers do not say that they go round
    with pytest.raises(InputError, match=r"made for .*, periods \[5, None\], .* has .* without references; mend"):
        train(f"resume_path={out_dir}", f"out_dir={tmp_path / 'other'}")


def test_broken_checkpoint_is_named(train, tmp_path):
    """And the remedy: the one before it, if it was kept."""
    out_dir = train("keep_checkpoints=2")
    first, last = sorted((out_dir / "checkpoints").iterdir())
    last.write_bytes(b"half")
    with pytest.raises(InputError, match="00004.ckpt: not a whole .* delete it to go on from 0*2.ckpt"):
        train()
    first.unlink()
    with pytest.raises(InputError, match="delete it to start anew"):
        train()


def test_few_controls_train_without_validation(train, write_dataset, tmp_path):
    folder = write_dataset(SOURCES)
    (folder / "validation.json").unlink()
    out_dir = train("max_steps=2")
    assert load_model(out_dir).control_net.control_dim == 2 and (out_dir / "last").is_dir()


@pytest.fixture
def module_and_batch(make_model, write_dataset):
    """A fresh control, unfrozen, and one batch of all pictures of a tiny dataset."""

    def make(only_mid_control=False, **options):
        model, (rows, _) = make_model(fresh=True), split_rows(write_dataset([-2, -1, 1, 2], size=32))
        fit_statistics(model.control_net, [row.control for row in rows], ["a"], [""])
        model.control_net.register_to_config(only_mid_control=only_mid_control)
        module = ControlTraining(model, Method(**dict(learning_rate=1e-2, max_steps=30) | options))
        return module, torch.utils.data.default_collate(list(ControlDataset(rows, model.base, 32)))

    return make


def test_loss_falls_and_only_the_control_learns(module_and_batch, normal):
    module, batch = module_and_batch(max_steps=40)
    before, control_before = weights(module.model.base), weights(module.model.control_net)
    optimizer = module.configure_optimizers()["optimizer"]
    noise, timesteps = normal(*batch["latents"].shape), torch.tensor([100, 300, 600, 900])
    losses = []
    for _ in range(40):
        loss = module.squared_errors(batch, noise, timesteps, torch.ones(4, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not changed(before, module.model.base)
    assert all(p.grad is None for p in module.model.base.parameters())
    learned = changed(control_before, module.model.control_net)
    for part in ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block", "down_blocks"):
        assert any(name.startswith(part) for name in learned)


@pytest.mark.parametrize("only_mid_control", [False, True])
@pytest.mark.parametrize("sd_locked", [True, False])
def test_what_is_trained_has_a_gradient_and_is_kept_in_checkpoints(
    module_and_batch, normal, sd_locked, only_mid_control
):
    """The control, and the UNet's decoder if it is not locked. Without a gradient, several processes would wait."""
    module, batch = module_and_batch(only_mid_control, sd_locked=sd_locked)
    randomize_zero_convolutions(module.model.control_net)
    noise, timesteps = normal(*batch["latents"].shape), torch.tensor([500] * 4)
    module.squared_errors(batch, noise, timesteps, torch.ones(4, dtype=torch.bool)).mean().backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in module.named_parameters() if p.grad is not None}
    control = {name for name, _ in module.named_parameters() if name.startswith("model.control_net.")}
    left = {name for name in control - trained if not name.startswith("model.control_net.controlnet_down_blocks.")}
    assert not left and (control == trained & control) == (not only_mid_control)
    decoder = tuple(f"model.base.unet.{part}" for part in ("up_blocks", "conv_norm_out", "conv_out"))
    assert all(name.startswith(decoder) for name in trained - control) and sd_locked == (not trained - control)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == trained


def test_loss_is_of_velocity_or_of_noise_as_the_base_says(module_and_batch, normal):
    module, batch = module_and_batch()
    scheduler, noise, timesteps = module.model.base.scheduler, normal(*batch["latents"].shape), torch.tensor([500] * 4)
    kept = torch.ones(4, dtype=torch.bool)
    noisy = scheduler.add_noise(batch["latents"], noise, timesteps)
    with torch.no_grad():
        predicted = module.model.predict(noisy, timesteps, batch["embeddings"], batch["control"])
        velocity = module.squared_errors(batch, noise, timesteps, kept)
        scheduler.register_to_config(prediction_type="epsilon")
        epsilon = module.squared_errors(batch, noise, timesteps, kept)
    torch.testing.assert_close(epsilon, (predicted - noise).square().mean((2, 3)))
    # Salimans & Ho 2022: v = alpha eps - sigma x
    alpha, sigma = scheduler.alphas_cumprod[500].sqrt(), (1 - scheduler.alphas_cumprod[500]).sqrt()
    target = alpha * noise - sigma * batch["latents"]
    torch.testing.assert_close(velocity, (predicted - target).square().mean((2, 3)))


@pytest.mark.parametrize("likelihood", [True, False])
def test_what_is_minimised(module_and_batch, monkeypatch, likelihood):
    """With likelihood, a channel counts by how much its error changes, not by how large it is."""
    module, batch = module_and_batch(likelihood=likelihood)
    module.log = lambda *_: None
    monkeypatch.setattr(ControlTraining, "global_step", 3)
    module.trainer = Mock(world_size=1, global_rank=0)
    squares = torch.tensor([[1.0, 100.0], [4.0, 100.0]], requires_grad=True)
    monkeypatch.setattr(module, "squared_errors", lambda *_: squares)
    module.training_step(batch, 0).backward()
    shares = squares.grad * squares.detach()
    torch.testing.assert_close(shares, 0.1 / 4 * torch.ones(2, 2) if likelihood else squares.detach() / 4)
    assert module.loss == squares.mean()


def test_min_snr_weights(module_and_batch):
    """Of velocity, min(SNR, gamma) / (SNR + 1); of noise, min(SNR, gamma) / SNR."""
    module, _ = module_and_batch(min_snr=5.0)
    scheduler, timesteps = module.model.base.scheduler, torch.tensor([10, 500, 999])
    alphas = scheduler.alphas_cumprod[timesteps]
    ratio = alphas / (1 - alphas)
    assert ratio[0] > 5 > ratio[1]
    torch.testing.assert_close(module.snr_weights(timesteps), ratio.clamp_max(5) / (ratio + 1))
    scheduler.register_to_config(prediction_type="epsilon")
    torch.testing.assert_close(module.snr_weights(timesteps), torch.tensor([5 / ratio[0], 1, 1]))


def test_noise_levels_are_those_of_the_range(module_and_batch, monkeypatch):
    module, batch = module_and_batch(timesteps=[0.2, 0.3])
    module.log, seen = lambda *_: None, []
    module.trainer = Mock(world_size=1, global_rank=0)
    original = module.squared_errors
    monkeypatch.setattr(module, "squared_errors", lambda *args: (seen.append(args[2]), original(*args))[1])
    for step in range(20):
        monkeypatch.setattr(ControlTraining, "global_step", step)
        module.training_step(batch, step)
    assert 200 <= torch.cat(seen).min() < 230 and 280 < torch.cat(seen).max() < 300


@pytest.mark.slow
def test_accumulated_batches_make_one_step(train, monkeypatch, tmp_path):
    """Two batches a step: no row or noise comes twice, checkpoints and pictures count steps, a stopped run goes on."""
    seen, stop, step = [], set(), ControlTraining.training_step

    def training_step(self, batch, index):
        if index in stop:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append((self.global_step, *batch["control"][:, 0].tolist()))
        return step(self, batch, index)

    monkeypatch.setattr(ControlTraining, "training_step", training_step)
    settings = ["accumulate=2", "batch_size=2", "logger_freq=2", "keep_checkpoints=9", "max_steps=3"]
    out_dir = train(*settings)
    assert [place for place, *_ in seen] == [0, 0, 1, 1, 2, 2]
    assert all(sorted(seen[k][1:] + seen[k + 1][1:]) == [1, 2, 3, 4] for k in (0, 2, 4))
    assert [file.name for file in sorted((out_dir / "checkpoints").iterdir())] == ["00000002.ckpt", "00000003.ckpt"]
    assert {path.name for path in (out_dir / "pictures").iterdir()} == {"000002.png", "000003.png"}
    stop.add(2)  # in the first half of the second step
    with pytest.raises(SystemExit):
        train(*settings, f"out_dir={tmp_path / 'stopped' / 'out'}")
    stop.clear()
    whole, resumed = trained_state(out_dir), trained_state(train(*settings, f"out_dir={tmp_path / 'stopped' / 'out'}"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_epochs_in_place_of_steps(train):
    assert steps_done(train("epochs=3", "max_steps=1400")) == 6  # of four rows, two at a time


@pytest.mark.slow
def test_the_average_of_the_weights_becomes_the_control(train, tmp_path):
    """With ema, what is kept differs from what goes on learning, and lags behind it."""
    plain, averaged = (train(f"ema={ema}", f"out_dir={tmp_path / ema}") for ema in ("null", "0.9"))
    state = {out: torch.load(max((out / "checkpoints").iterdir()), weights_only=True) for out in (plain, averaged)}
    weights = [state[out]["state_dict"] for out in (plain, averaged)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    shadow = dict(zip(weights[1], state[averaged]["average"]["shadow_params"]))
    kept = load_model(averaged / "last").control_net.state_dict()
    name = "controlnet_mid_block.weight"
    torch.testing.assert_close(kept[name], shadow[f"model.control_net.{name}"], rtol=1e-3, atol=1e-5)
    assert 0 < kept[name].norm() < load_model(plain / "last").control_net.state_dict()[name].norm()


def test_exploding_loss_ends_training(train, monkeypatch):
    """It is finite, and far above what predicting nothing would have."""
    original = ControlTraining.squared_errors
    factor = EXPLODED * 10
    monkeypatch.setattr(ControlTraining, "squared_errors", lambda self, *args: original(self, *args) * factor)
    with pytest.raises(
        InputError, match=rf"step {RECENT - 1}: the loss explodes.*last checkpoint: .*/0*18.ckpt; start"
    ):
        train("max_steps=40", "logger_freq=40", "checkpoint_freq=9")


@pytest.mark.parametrize("able, precision", [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_is_one_that_the_device_has_instructions_for(monkeypatch, able, precision):
    monkeypatch.setattr("cldm.runs.has_bfloat16", lambda device: able)
    assert choose_precision("auto", "cpu") == precision
    assert choose_precision("16-mixed", "cpu") == "16-mixed"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="tells what the processor has")
def test_bfloat16_is_known_of_a_processor():
    assert has_bfloat16(torch.device("cpu")) == ("bf16" in Path("/proc/cpuinfo").read_text())


def test_half_precision_attends_in_full(normal):
    query, key, value = normal(3, 2, 4, 16, 8).bfloat16()
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = F.scaled_dot_product_attention(query, key, value)
        with FullAttention():
            assert torch.equal(F.scaled_dot_product_attention(query, key, value), exact)
    assert not torch.equal(half, exact)


def test_checkpointing_changes_no_gradient_in_half_precision(module_and_batch, normal):
    module, batch = module_and_batch()
    randomize_zero_convolutions(module.model.control_net)
    noise, timesteps, gradients = normal(*batch["latents"].shape), torch.tensor([100, 300, 600, 900]), []
    for enabled in (False, True):
        with checkpointing(module.model, enabled):
            with torch.autocast("cpu", torch.bfloat16):
                loss = module.squared_errors(batch, noise, timesteps, torch.ones(4, dtype=torch.bool)).mean()
            loss.backward()
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        module.zero_grad()
    assert all(map(torch.equal, *gradients))


def test_dropped_prompts_are_the_empty_prompt(module_and_batch, normal):
    module, batch = module_and_batch()
    noise, timesteps = normal(*batch["latents"].shape), torch.tensor([500] * 4)

    @torch.no_grad()
    def loss(kept, **changes):
        return module.squared_errors({**batch, **changes}, noise, timesteps, torch.tensor(kept))

    mixed = loss([True, False, True, False])
    torch.testing.assert_close(mixed[::2], loss([True] * 4)[::2])
    torch.testing.assert_close(mixed[1::2], loss([True] * 4, embeddings=batch["empty"])[1::2])
    assert not torch.equal(mixed, loss([True] * 4))


@pytest.mark.parametrize("steps", [1, 2, 500])
def test_learning_rate_warms_up_and_falls_to_zero(module_and_batch, steps):
    module, _ = module_and_batch(max_steps=steps, learning_rate=1.0)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert 0 < rates[0] <= 1 and max(rates) > 0.9 and abs(rates[-1]) < 1e-6


@pytest.mark.parametrize("sd_locked", [True, False])
def test_the_loss_without_the_control_is_computed_anew_only_if_the_unet_learns(
    module_and_batch, monkeypatch, sd_locked
):
    module, batch = module_and_batch(sd_locked=sd_locked)
    randomize_zero_convolutions(module.model.control_net)
    original, alone, logged = module.squared_errors, [], []
    monkeypatch.setattr(module, "log_dict", lambda means, **_: logged.append(means))
    monkeypatch.setattr(
        module, "squared_errors", lambda batch, *how: alone.append(batch["control"] is None) or original(batch, *how)
    )
    with torch.no_grad():
        for index in (0, 1, 0, 1):
            module.validation_step(batch if index == 0 else {k: v[:1] for k, v in batch.items()}, index)
    assert sum(alone) == VALIDATION_TIMESTEPS * (2 if sd_locked else 4)
    assert logged[:2] == logged[2:] and logged[0]["base_loss"] != logged[1]["base_loss"]
    assert all(means["val_loss"] != means["base_loss"] for means in logged)


@pytest.fixture
def given_errors(monkeypatch):
    """Validations find these control errors, one after the other: the second is the best."""
    errors = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(Monitor, "on_validation_end", lambda self, *_: setattr(self, "error", next(errors)))


@pytest.mark.parametrize("first, more", [(4, 8), (3, 5)])  # the last step is validated, multiple of logger_freq or not
def test_best_is_the_lowest_control_error(train, given_errors, tmp_path, first, more):
    """out_dir holds the step of the lowest control error, out_dir/last the last, over a restart too."""
    best = load_model(train(f"max_steps={first}")).control_net
    assert not changed(best, load_model(tmp_path / "out" / "last").control_net)
    assert steps_done(tmp_path / "out") == first
    train(f"max_steps={more}")
    assert not changed(best, load_model(tmp_path / "out").control_net)
    assert changed(best, load_model(tmp_path / "out" / "last").control_net)


@pytest.mark.slow
def test_control_errors_are_those_of_invert(train, make_model, write_dataset, tmp_path):
    """To 2%, of the last control's folder, whose weights are in half precision."""
    save_model(make_model(2, periods=[5, 3]), tmp_path / "first")  # on circles no reading is held by a bound
    folder = write_dataset([[i % 5, i % 7 / 3] for i in range(20)], file="validation.json")
    (folder / "controls.yaml").write_text("names: [angle, zoom]\nunits: [degrees, '']\nperiods: [5, 3]\n")
    out_dir = train(f"resume_path={tmp_path / 'first'}")
    lines = (folder / "validation.json").read_text().splitlines()
    (folder / "targets.json").write_text("\n".join(lines[i] for i in spread_out(HANDFUL, lines)))
    results = read_targets(out_dir / "last", folder / "targets.json", tmp_path / "readings")
    *_, last = csv.DictReader((out_dir / "log.csv").open())
    told = [float(last[f"error of {name}"]) for name in ("angle", "zoom")]
    assert np.median(np.abs([result["error"] for result in results]), 0) == pytest.approx(told, rel=0.02)


def test_patience_ends_a_training_that_no_longer_improves(train, given_errors, tmp_path, capsys):
    train("max_steps=20", "patience=2")  # the errors of its validations are 3, 1, 2, 5
    assert (
        steps_done(tmp_path / "out") == 8
        and "2 validation(s) in a row found no better control" in capsys.readouterr().out
    )
    before = files(tmp_path / "out")
    train("max_steps=20", "patience=2")
    after = files(tmp_path / "out")
    assert all(after[name] == before[name] for name in before if name.suffix in (".safetensors", ".ckpt", ".csv"))


def test_response_is_what_the_own_number_takes_off_the_loss(make_model, base, write_dataset):
    rows = read_rows(write_dataset([1, 2, 3, 4], size=32) / "prompt.json")
    monitor, dataset = Monitor([], Path()), ControlDataset(rows, base, 32)
    ranged = dict(control_low=[1.0], control_high=[4.0])
    model = make_model(fresh=True)
    model.control_net.register_to_config(**ranged)
    assert monitor.find_response(model, dataset) == 0
    model = make_model()
    model.control_net.register_to_config(**ranged)
    with patch.object(model, "predict", lambda noisy, *given: noisy * 0 + given[2][:, :, None, None].float()):
        numbers = monitor.find_response(model, dataset)
        alike = monitor.find_response(model, ControlDataset(rows[:1], base, 32))
    assert 0 < abs(numbers) < 1 and 0 < abs(alike) < 1


def test_of_pictures_that_share_a_number_the_guess_is_of_the_range(make_model):
    model = make_model(2, periods=[None, 360.0])
    model.control_net.register_to_config(control_low=[0.0, -180.0], control_high=[10.0, 180.0])
    config = model.control_net.config
    control = torch.tensor([[6.0, 90.0]] * 3).double()
    assert across(model.control_net, control).tolist() == [[0.0, -90.0]] * 3
    for errors, warned in ((1.0, 40.0), 0), ((2.0, 40.0), 1), ((2.0, 80.0), 2):
        reading = SimpleNamespace(control=control + torch.tensor(errors))
        lines = describe_asked(config, control, reading, reading, False)
        assert [line.split()[1] for line in lines if "by guessing" in line] == ["control"] * warned
        drawn = (
            f"draws control 1 to {errors[0]:g}, control 2 to 40, as read back from drawings at those numbers: asked.png"
        )
        assert [line for line in lines if line.startswith("draws ")] == [drawn] * (warned < 2)


def test_a_plot_of_one_number_has_room(make_model, recwarn):
    config, control = make_model().control_net.config, torch.tensor([[5.0]] * 3).double()
    draw_asked(config, control, SimpleNamespace(control=control, margin=control))
    assert not recwarn.list


def test_training_tells_what_it_does(train, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("cldm.logger.TOLD_EVERY", -1)
    monkeypatch.setattr("cldm.logger.LEAST_PSNR", 100)
    monkeypatch.setattr(tutorial_train, "finish", FINISH)
    train("max_steps=3")
    lines = capsys.readouterr().out.splitlines()
    for text in (
        "4 training and 2 validation pictures$",
        "angle: 1 to 4 degrees, 4 values$",
        "zoom: 0.5 to 2, 3 values$",
        r"1 prompt\(s\): \"a square\"$",
        r"the base's own reconstruction of the pictures: \d+\.\d dB",
        "warning: below 100 dB",
        r"val_loss [\d.]+ on pictures that were not trained on .* [\d.]+ without the control\)$",
        "warning: the numbers are ignored ",
        r"reads angle to [\d.]+ degrees, zoom to [\d.]+ \(median of 2 validation pictures\)",
        "warning: angle is read no better than by guessing",
        "warning: zoom is read no better than by guessing",
        r"error bars come from 2 validation picture\(s\) of 2 different value\(s\): too few",
    ):
        assert len([line for line in lines if re.match(text, line)]) == 1
    assert not any(line.startswith("draws ") for line in lines)  # by a control that reads nothing
    told = [line.split(",")[0] for line in lines if line.startswith("step ") and "val_loss" not in line]
    assert told == ["step 1 of 3", "step 2 of 3", "step 3 of 3"] and not any("\r" in line for line in lines)
    assert (
        len(
            [
                line
                for line in lines
                if re.match(r"step [23] of 3, loss [\d.]+, response \S+%, val_loss [\d.]+, reads angle to ", line)
            ]
        )
        == 2
    )
    lines = (tmp_path / "out" / "log.csv").read_text().splitlines()
    assert lines[0].split(",")[:5] == ["step", "loss", "response", "val_loss", "base_loss"]
    assert lines[0].endswith(",error of angle,error of zoom,control_error") and len(lines) == 3
    with Image.open(tmp_path / "out" / "asked.png") as figure:
        assert figure.size == (840, 440)
    with Image.open(tmp_path / "out" / "pictures" / "000003.png") as grid:
        assert grid.width >= 4 * 3 * 32 and grid.height > 32  # target, VAE and generation of four


@pytest.mark.slow
def test_inference_does_not_import_lightning():
    code = "import sys, invert, test5, test5_s1; sys.exit(any('lightning' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "losses, said",
    [
        ([], "no validation"),
        ([0.5], "val_loss 0.5000 .*0.9000 without the control.: a single"),
        ([0.5, 0.3], "val_loss 0.3000 .*still falling: more steps"),
        ([0.5, 0.3, 0.299], "val_loss 0.2990 .*levelled off"),
        ([0.5, 0.3, 0.4], "val_loss 0.3000 .*risen since step 20, .*more pictures"),
    ],
)
def test_verdict_on_the_validations(losses, said):
    for held_out in (True, False):
        history = [[10 * (i + 1), loss, 0.9, 0.1] for i, loss in enumerate(losses)]
        verdict = describe_losses(history, held_out, caught=True)
        assert re.match(said, verdict) and ("not trained on" in verdict) == (held_out and losses != [])
        ignored = describe_losses(history, held_out, caught=False)
        assert verdict.startswith(ignored) and (ignored.endswith("without the control)") or not losses)


def test_error_bars_say_what_they_come_from(base, write_dataset):
    def tell(sources, seen=False):
        rows = ControlDataset(read_rows(write_dataset(sources) / "prompt.json"), base, 32)
        return describe_bars(SimpleNamespace(control_low=[1], control_high=[4], periods=[None]), rows, seen)

    assert tell([1, 2, 3, 4] * 3) == "error bars come from 12 validation picture(s) of 4 different value(s)"
    assert "too few" in tell([1, 2] * 6) and "too few" in tell([1, 2, 3])
    assert "too narrow" in tell([1, 2, 3, 4] * 3, seen=True)
    assert "; 3 of all 12 lie beyond the trained range, which makes the bars wider" in tell([1, 2, 3, 5] * 3)


def test_grid_shows_every_subject(write_dataset, base):
    """Up to a dozen, at two numbers at least."""
    folder = write_dataset(list(range(30)) * 2, size=32)
    rows = [replace(row, prompt=f"thing {i % 6}") for i, row in enumerate(read_rows(folder / "prompt.json"))]

    def shown(rows):
        return sorted(row.prompt for row in PictureLogger(ControlDataset(rows, base, 32), None, 1, 4).rows)

    assert shown(rows) == sorted([f"thing {k}" for k in range(6)] * 4)
    rows = [replace(row, prompt=f"thing {i % 20:02d}") for i, row in enumerate(rows)]
    assert shown(rows) == sorted([f"thing {k:02d}" for k in range(12)] * 2)
