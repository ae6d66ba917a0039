"""Several processes train and read as one does; they are started, killed and started again for real."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cldm.conversion import add_control
from cldm.model import load_base, save_model
from cldm.training import ControlTraining, Method
from ldm.files import ROOT
from tests.conftest import randomize_zero_convolutions, trained_state

ROWS, STEPS = 8, 6
NOISE = 2**-23  # of float32, relative
TINY = 1e-30  # what is zero is so for both
TRAIN = f"""
import os, signal, sys

sys.path.insert(0, {str(ROOT)!r})
import cldm.report, tutorial_train
from cldm.model import Sampling
from cldm.training import ControlTraining
from ldm.settings import run_script

step = ControlTraining.training_step


def training_step(self, batch, index):
    with open(f"seen{{self.global_rank}}", "a") as file:
        file.write(" ".join(f"{{number:g}}" for number in batch["control"][:, 0].tolist()) + "\\n")
    if os.environ.get("STOP") == f"{{self.global_rank}} {{self.global_step}}":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batch, index)


ControlTraining.training_step = training_step
cldm.report.DRAWN, tutorial_train.finish = Sampling(2), lambda *_: None  # most of the time
run_script(tutorial_train.main, tutorial_train.settings)
"""
READ = f"""
import os, signal, sys

sys.path.insert(0, {str(ROOT)!r})
import invert
from ldm.settings import run_script

read_each = invert.read_each


def read(model, s, known, rows, tell):
    if os.environ.get("STOP") == f"{{os.environ.get('LOCAL_RANK', 0)}} {{rows[0].prompt}}":
        os.kill(os.getpid(), signal.SIGKILL)
    return read_each(model, s, known, rows, tell)


invert.read_each = read
run_script(invert.main, invert.settings)
"""


def start(folder, script, *arguments, **environment):
    """Returns: the process that runs a script in a folder, which may start others."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(script)
    command, pipe = [sys.executable, "script.py", "out_dir=out", *map(str, arguments)], subprocess.PIPE
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment  # sums depend on the number of threads
    return subprocess.Popen(command, cwd=folder, env=own, text=True, stdout=pipe, stderr=pipe)


def finish(*processes):
    """Returns: the exit codes of processes, all they printed, and all their errors but for progress bars."""
    said = [process.communicate(timeout=1200) for process in processes]
    outs, errors = zip(*said)
    lines = [line for line in "".join(errors).replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    return [process.returncode for process in processes], "".join(outs), lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of ROWS pictures, one validation picture, and their numbers."""
    folder, pixels = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, numbers in ("prompt.json", range(ROWS)), ("validation.json", [2.5]):
        lines = []
        for number in numbers:
            target = f"{number}.png"
            Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / target)
            lines.append(json.dumps({"source": number, "target": target, "prompt": f"a cup {number}"}))
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def training(data, base_yaml):
    return [TRAIN, f"data_root={data}", f"base={base_yaml}", f"max_steps={STEPS}", "logger_freq=4", "accelerator=cpu",
            "precision=32-true"]  # fmt: skip


@pytest.fixture(scope="module")
def two(training, tmp_path_factory):
    """The folder of a training by two processes."""
    folder = tmp_path_factory.mktemp("two")
    codes, out, errors = finish(start(folder, *training, "devices=2", "strategy=ddp", "batch_size=2"))
    assert (codes, errors) == ([0], []) and out.count("the control: out ") == 1
    return folder


def checkpoint(folder):
    return torch.load(max((folder / "out" / "checkpoints").iterdir()), weights_only=True)


def learned(folder):
    """Returns: {name: tensor} of the moments of all gradients in a checkpoint, of which Adam makes the weights.

    Not the weights: from zero, one takes a whole step, whichever sign its gradient has, and of none rounding decides.
    """
    moments = checkpoint(folder)["optimizer_states"][0]["state"]
    return {f"{i} {k}": v for i, own in moments.items() for k, v in own.items()}


def check_alike(one, both):
    assert one.keys() == both.keys()
    worst = max(((one[name] - both[name]).norm() / one[name].norm().clamp_min(TINY)).item() for name in one)
    assert worst < 400 * NOISE, worst / NOISE  # 110 of a second moment, on a CPU without bfloat16


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(training, two, tmp_path):
    assert finish(start(tmp_path, *training, "devices=1", "batch_size=4"))[0] == [0]
    seen = [[line.split() for line in (two / f"seen{rank}").read_text().splitlines()] for rank in (0, 1)]
    turns = [sum(halves, []) for halves in zip(*seen)]  # what both took in each step
    epochs = [sorted(turns[k] + turns[k + 1]) for k in range(0, STEPS, 2)]
    assert epochs == [[str(number) for number in range(ROWS)]] * (STEPS // 2)
    one = [line.split() for line in (tmp_path / "seen0").read_text().splitlines()]
    assert [sorted(turn) for turn in turns] == [sorted(turn) for turn in one]
    check_alike(learned(tmp_path), learned(two))


@pytest.mark.slow
def test_two_processes_let_a_proposal_learn_first(training, tmp_path):
    first = ["max_steps=3", "proposals=2", "proposal_steps=2"]
    for name, how in dict(one=["devices=1", "batch_size=4"], two=["devices=2", "strategy=ddp", "batch_size=2"]).items():
        (tmp_path / name).mkdir()
        assert finish(start(tmp_path / name, *training, *first, *how))[0] == [0]
    check_alike(learned(tmp_path / "one"), learned(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_stops_all_and_they_go_on_as_if_it_had_not(training, two, tmp_path, rank):
    arguments = [*training, "devices=2", "strategy=ddp", "batch_size=2"]
    (code,), _, errors = finish(start(tmp_path, *arguments, STOP=f"{rank} 2"))
    assert code in (143, -signal.SIGTERM) and errors == [
        f"stopped by SIGTERM at step 3 of {STEPS}; the same command goes on from there"
    ]
    assert checkpoint(tmp_path)["global_step"] == 3
    codes, out, errors = finish(start(tmp_path, *arguments))
    assert (codes, errors) == ([0], []) and out.count("going on from step 3") == 1
    assert same(trained_state(tmp_path / "out"), trained_state(two / "out"))


@pytest.mark.slow
def test_processes_that_are_stopped_as_they_start_leave_none_behind(training, tmp_path):
    first = start(tmp_path, *training, "devices=2", "strategy=ddp", "batch_size=2")
    while not (others := psutil.Process(first.pid).children()):
        assert first.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # so that the first waits for the second
    first.terminate()
    code, (_, left) = first.wait(60), psutil.wait_procs(others, timeout=30)
    for process in left:
        process.kill()
    assert code == 143 and not left


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["by hand", "SLURM"])
def test_two_machines_train_as_one(training, two, tmp_path, launcher):
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    environments = [shared | {"NODE_RANK": str(rank)} for rank in (0, 1)]
    if launcher == "SLURM":
        job = dict(SLURM_JOB_NAME="train", SLURM_JOB_ID="1", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1")
        job |= dict(SLURM_NODELIST="127.0.0.1", SLURM_LOCALID="0")
        environments = [shared | job | dict(SLURM_PROCID=str(rank), SLURM_NODEID=str(rank)) for rank in (0, 1)]
    arguments = [*training, "devices=1", "num_nodes=2", "batch_size=2"]
    codes, out, errors = finish(*(start(tmp_path, *arguments, **environment) for environment in environments))
    assert (codes, errors) == ([0, 0], []) and out.count("the control: out ") == 1
    assert same(trained_state(tmp_path / "out"), trained_state(two / "out"))


def test_processes_share_the_draws_of_one(monkeypatch):
    """The noise, noise level and prompt of a row do not depend on who trains on it."""
    monkeypatch.setattr(ControlTraining, "global_step", 3)

    def draws(rank, processes, size):
        model = torch.nn.Module()
        model.base, model.control_net = Mock(), torch.nn.Linear(1, 1)
        model.control_net.controlnet_down_blocks, model.control_net.config = torch.nn.Module(), Mock()
        model.control_net.config.only_mid_control, model.control_net.config.fusion = False, "affine"
        model.control_net.proposal = None
        model.base.scheduler.config.num_train_timesteps = 1000
        module, taken = ControlTraining(model, Method(1.0, 9, prompt_dropout=0.5)), []
        module.trainer, module.log = Mock(world_size=processes, global_rank=rank), lambda *_: None
        module.squared_errors = lambda batch, *drawn: taken.extend(drawn) or torch.zeros(1)
        module.other_losses = lambda batch, *drawn: taken.extend(drawn) or 0
        module.training_step({"latents": torch.zeros(size, 4, 2, 2)}, 0)
        return taken

    whole, halves = draws(0, 1, 16), [draws(rank, 2, 8) for rank in (0, 1)]
    for one, *parts in zip(whole, *halves):
        assert torch.equal(one, torch.stack(parts, 1).flatten(0, 1))
    assert 0 < whole[2].sum() < 16
    assert torch.equal(whole[3][:, 0], whole[0])
    noise, other = draws(0, 1, 1)[3][0]
    assert (noise != other).all()  # of a batch of one, too


@pytest.fixture(scope="module")
def reading(base_yaml, data, tmp_path_factory):
    """invert.py's arguments, for seven targets in batches of two, of which the fourth is not there."""
    folder = tmp_path_factory.mktemp("reading")
    torch.manual_seed(1)
    model = add_control(*load_base(base_yaml), control_dim=1, hint="coordinate")
    randomize_zero_convolutions(model.control_net)
    learned = dict(control_mean=[0.5], control_std=[2.0], error_scale=[0.1], error_floor=[0.01])
    model.control_net.register_to_config(control_low=[-1.0], control_high=[1.0], **learned)
    save_model(model, folder / "control")
    rows = [{"target": str(data / f"{i if i != 3 else 'no'}.png"), "prompt": f"cup{i}"} for i in range(7)]
    (folder / "targets.json").write_text("\n".join(map(json.dumps, rows)))
    return [READ, f"model_path={folder / 'control'}", f"targets={folder / 'targets.json'}", "batch_size=2",
            "device=cpu"]  # fmt: skip


def read_results(folder):
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def alone(reading, tmp_path_factory):
    """What one process reads."""
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(folder, *reading))[0] == [0]
    return read_results(folder)


@pytest.mark.slow
def test_two_processes_read_what_one_reads(reading, alone, tmp_path):
    """In four batches; the second to last turn is the last process's last."""
    codes, out, errors = finish(start(tmp_path, *reading, "devices=2"))
    assert (codes, errors) == ([0], []) and out.count("seconds a target") == 1
    assert read_results(tmp_path) == alone and ["problem" in result for result in alone].index(True) == 3
    assert (tmp_path / "out" / "results.csv").is_file() and (tmp_path / "out" / "series.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("stop, left", [("1 cup6", 4), ("0 cup4", 4)])
def test_a_killed_process_ends_all_and_they_go_on(reading, alone, tmp_path, stop, left):
    (code,), _, errors = finish(start(tmp_path, *reading, "devices=2", STOP=stop))
    assert code and all("another process has ended" in line for line in errors) and len(errors) <= 1
    assert errors or stop.startswith("0")  # the other may have sent its lines, and ended well
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == left
    codes, out, _ = finish(start(tmp_path, *reading, "devices=2"))
    assert codes == [0] and f"going on after {left} of 7 targets" in out
    assert read_results(tmp_path) == alone
