"""Benchmarks at their smallest: the methods that take seconds, one target each."""

import io
import json
import math
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.stats import kstest

from benchmarks import (
    base,
    control,
    drawn,
    gpu,
    inversion,
    knobs,
    large_data,
    meter,
    odd_cases,
    odd_inputs,
    pairs,
    things,
    training,
)
from benchmarks.baselines import SamplingObjective
from benchmarks.classical import SIZE, Answer, chain
from benchmarks.common import choose, start_report
from benchmarks.doubt import (
    area_under,
    corner_distances,
    corner_error,
    corner_spread,
    distance_ranks,
    middle_shares,
    ranks,
    risk_curve,
)
from benchmarks.meter_methods import find_needle
from benchmarks.mishaps import MISHAPS, draw_meter
from benchmarks.regressors import with_bars
from cldm.changes import choose_changes
from cldm.dataset import Row, read_control_names, read_rows
from cldm.fit import NAMES
from cldm.model import Sampling, load_model, save_model
from cldm.pairs import draw_pair
from dataForTrain.make_dataset import TRAIN, find_pictures
from dataForTrain.make_meter import shortest
from dataForTrain.solids import FIELD_DEG, direction
from ldm.files import ROOT
from ldm.schema import Settings, read_config, write_yaml
from ldm.settings import InputError, run_script


@pytest.mark.slow
def test_methods_and_flags_are_tabled(tmp_path, capsys):
    """Two methods in two runs: the second keeps what the first one found."""
    for method in ("regressor", "lm_denoising"):
        arguments = [f"methods={method}", "targets=1", "regressor_minutes=0.02", f"out_dir={tmp_path}"]
        run_script(inversion.main, inversion.settings, arguments)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["method"] for result in results] == ["regressor", "lm_denoising"]
    assert results[1]["found"] == pytest.approx(results[1]["angles"], abs=0.3) and results[1]["calls"] < 100
    assert (tmp_path / "plot.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| lm_denoising | 1 |" in printed and "| at -8 or 8 degrees | 1 | 100% |" in printed


def test_generations_as_least_squares():
    """The sampling objective's exact derivative is what a small change of the control makes of its residuals."""
    model = load_model("models/control_tiny")
    (case,) = inversion.draw_cases(TRAIN, 1, random.Random(1), lambda rng: 2.0)
    objective = SamplingObjective(model, inversion.encode(model, [case]), Sampling(ddim_steps=2), draws=2)
    at, small, index = torch.tensor([[2.0]], dtype=torch.float64), 0.01, torch.tensor([0])
    residuals, jacobian = objective.linearize(at, index)
    higher, lower = (objective.evaluate(at + step, index) for step in (small, -small))
    slope = (higher - lower) / (2 * small)
    assert residuals.shape == jacobian.shape[:4] and (slope - jacobian[..., 0]).norm() < 0.01 * slope.norm()


def test_a_killed_run_starts_again(tmp_path):
    for _ in range(2):
        folder = start_report(tmp_path, "report.json", "seconds", "1.5")
        (folder / "1.5").mkdir(exist_ok=True)
    with pytest.raises(InputError, match="not of this script"):
        start_report(tmp_path, "report.json", "method", "1.5")


@pytest.mark.slow
def test_a_million_rows_start_soon_in_little_memory(base_yaml, tmp_path):
    """Seconds of the processor, since others may use it too, and MiB; both beyond what imports take.

    The seconds are told in those of the least that can be done: every line decoded, every picture's file looked at.
    """
    s = Settings(large_data.settings | dict(base=base_yaml))
    large_data.write_data(s, tmp_path)
    (_, _, imports), *stages = large_data.measure(s, tmp_path).values()
    began = time.process_time()
    with open(tmp_path / "prompt.json", encoding="utf-8") as lines:
        for line in lines:
            os.stat(f"{tmp_path}/{json.loads(line)['target']}")
    least = time.process_time() - began
    assert sum(processor for _, processor, _ in stages) < 3 * least and stages[-1][2] - imports < 200


@pytest.mark.slow
@pytest.mark.parametrize("version", [1], indirect=True, scope="session")
def test_a_gpus_rows_are_tabled_on_a_cpu(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "TARGETS", 1)
    write_yaml(read_config(ROOT / "models" / "cldm_v15.yaml") | {"architecture": str(folder)}, tmp_path / "base.yaml")
    arguments = [f"base={tmp_path / 'base.yaml'}", "image_sizes=[64]", "batches=[1]", "device=cpu", "seconds=1e6"]
    run_script(gpu.main, gpu.settings, [*arguments, f"out_dir={tmp_path / 'out'}"])
    report = json.loads((tmp_path / "out" / "measured.json").read_text())
    names = [gpu.TRAINING, *gpu.ROWS]
    assert [(row["row"], row["image_size"], row["batch"]) for row in report["rows"]] == [(own, 64, 1) for own in names]
    assert min(row["seconds"] for row in report["rows"]) > 0
    calls = {row["row"]: row["calls"] for row in report["rows"]}
    assert [calls[name] for name in names[2:]] == [2 * 10, 2 * 32]
    assert capsys.readouterr().out.count("\n| bfloat16 less float32, ") == len(report["precisions"]) == 2
    shipped = report["precisions"][gpu.SHIPPED]
    assert 0 < np.abs(shipped["difference"]).max() < np.max(shipped["std"])


@pytest.mark.parametrize("error, why", [(torch.OutOfMemoryError(), gpu.NO_ROOM), (ValueError(), "failed")])
def test_a_row_that_ends_early_says_why(error, why):
    def step():
        raise error

    assert gpu.attempt(gpu.measure, step, torch.device("cpu")) == why


def test_busy_is_what_kernels_cover_together():
    assert gpu.covered([(5, 6), (0, 2), (1, 4), (1, 2)]) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(fails_in_one_line, tmp_path):
    assert '"device": cuda' in fails_in_one_line(gpu.main, gpu.settings, [f"out_dir={tmp_path / 'out'}"])


def test_an_unknown_method_is_named():
    with pytest.raises(InputError, match="lm_denoising"):
        choose("lm_denoisin", inversion.METHODS, "methods")


@pytest.mark.slow
def test_a_hand_is_read_across_its_seam(tmp_path, monkeypatch):
    """After a tenth of the training, by pictures of half the side: no worse than elsewhere, never outside the range."""
    write_yaml(read_config(ROOT / "models" / "tiny.yaml") | {"image_size": 64}, tmp_path / "base.yaml")
    for key, value in dict(base=str(tmp_path / "base.yaml"), batch_size=8).items():
        monkeypatch.setitem(drawn.tutorial_train.settings, key, value)
    monkeypatch.setattr(drawn, "HANDS", 6)
    run_script(drawn.main, drawn.settings, ["clock=true", "max_steps=300", f"out_dir={tmp_path / 'out'}"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    seam, elsewhere = (np.median(np.abs([r["error"] for r in results[name]])) for name in ("seam", "elsewhere"))
    assert seam < max(3, 1.5 * elsewhere) < 15
    for result in results["seam"] + results["elsewhere"]:
        assert 0 <= result["control"] < 360 and abs(result["error"]) <= 180 and "outside_range" not in result["flags"]


@pytest.mark.slow
def test_a_setting_that_fails_does_not_stop_the_others(base_yaml, write_dataset, tmp_path, capfd, monkeypatch):
    own = f"base={base_yaml} data_root={write_dataset([-2, -1, 1, 2])} accelerator=cpu precision=32-true batch_size=2"
    monkeypatch.setattr(knobs, "VARIANTS", {"broken": "base=none.yaml", "sound": own})
    run_script(knobs.main, knobs.settings, ["steps=2", "processes=2", f"out_dir={tmp_path}"])
    broken, sound = capfd.readouterr().out.splitlines()[-2:]
    assert broken.startswith("| broken: `base=none.yaml` | 0 | failed: ")
    assert "none.yaml" in (tmp_path / "broken, 2 steps, seed 0" / "log.txt").read_text()
    errors = json.loads((tmp_path / "sound, 2 steps, seed 0" / "errors.json").read_text())["errors"]
    assert len(errors) == 36 and f"| 0 | {np.median(errors):.3f} | " in sound


@pytest.mark.slow
def test_trainings_are_timed_in_turn(base_yaml, write_dataset, capsys):
    data_root = write_dataset([-2, -1, 1, 2])
    arguments = [f"data_root={data_root}", f"base={base_yaml}", "batch_size=2", "steps=4", "read_every=2"]
    run_script(training.main, training.settings, arguments)
    printed = capsys.readouterr().out
    assert printed.count(f"| {training.OURS} |") == printed.count(f"| {training.THEIRS} |") == 2
    assert "| ControlNet |" in printed and "GFLOP a step" in printed and "| control error" in printed
    assert "added to the time of 1400 steps: 14 responses " in printed and ", 3 readings " in printed


@pytest.fixture
def things_folder(make_model, tmp_path, monkeypatch):
    """A folder as make_things.py leaves it, of two numbers, one of which goes round; control/ reads them.

    It lies where the test works, so that paths may be relative.
    """
    monkeypatch.chdir(tmp_path)
    (folder := Path("data")).mkdir()
    noise, rows = np.random.default_rng(0), []
    for i in range(12):
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        row = dict(source=[3.0 * i - 18, 30.0 * i], target=f"{i}.png", reference=f"{(i + 1) % 12}.png", prompt="")
        rows.append(json.dumps(row) + "\n")
    for file in ("prompt.json", "validation.json", "targets.json"):
        (folder / file).write_text("".join(rows))
    said = {"names": ["turn", "height"], "units": ["degrees"] * 2, "periods": [None, 360]}
    write_yaml(said, folder / "controls.yaml")
    model = make_model(2, "reference", periods=[None, 360.0], fusion="both", proposals=2)
    ranges = dict(control_low=[-18.0, 0.0], control_high=[15.0, 360.0])
    names = dict(control_names=["turn", "height"], control_units=["degrees"] * 2)
    learned = dict(error_scale=[0.1] * 2, error_floor=[1.0] * 2, proposal_scale=[2.0] * 2, proposal_floor=[1.0] * 2)
    statistics = dict(control_mean=[0.0, 180.0], control_std=[10.0, 360 / 12**0.5])
    model.control_net.register_to_config(**ranges, **names, **learned, **statistics)
    save_model(model, Path("control"))
    return folder


@pytest.mark.slow
def test_things_are_tabled(things_folder, capsys, monkeypatch):
    """Two numbers by every method; pictures of noise have nothing that matches. A second run adds to the first."""
    monkeypatch.setattr(things, "TEST_FILE", "targets.json")
    arguments = ["data_root=data", "model_path=control", "pairs=3", "minutes=0.02", "out_dir=out"]
    run_script(things.main, things.settings, [*arguments, "methods=siamese"])
    before = json.loads(Path("out/readings.json").read_text())["readings"]["siamese"]
    run_script(things.main, things.settings, [*arguments, "methods=ours,proposal,posterior,essential"])
    readings, printed = json.loads(Path("out/readings.json").read_text())["readings"], capsys.readouterr().out
    assert readings["siamese"] == before
    for method in things.METHODS:
        assert len(readings[method]["found"]) == 3
        if method != "essential":
            assert printed.count(f"| {method} | ") == 3
            assert all(0 <= height <= 360 for _, height in readings[method]["found"])
    assert "| essential | 0% | 0.000 | 0.000 | 0.000 | 0% | 0% |" in printed
    assert readings["siamese"]["half"][0] == readings["siamese"]["half"][1]  # split conformal: one for all
    assert "TARP of ours" in printed and "TARP of posterior" in printed and "TARP of siamese" not in printed
    run_script(things.main, things.settings, [*arguments[:2], "pairs=2", "out_dir=out", "methods=ours"])
    assert [*json.loads(Path("out/readings.json").read_text())["readings"]] == ["ours"]


def test_bars_are_scaled_by_validation():
    """What tells no spread has one width; what does not answer is left out."""

    class Truths:
        controls = np.stack([np.arange(20.0), np.full(20, 359.0)], 1)

        def __len__(self):
            return len(self.controls)

    config, rows = SimpleNamespace(periods=[None, 360.0]), Truths()
    off = torch.from_numpy(rows.controls) + torch.stack([torch.arange(20) / 10, torch.full((20,), 3.0)], 1)
    off[0, 0] = math.nan
    told = with_bars(lambda rows: off, rows, off, rows, config)
    assert told["found"][0][0] is None and told["half"][3] == [pytest.approx(1.8), pytest.approx(3)]
    spread = torch.stack([torch.full((20,), 2.0), torch.full((20,), 6.0)], 1)
    said = off, torch.eye(2).double().expand(20, 2, 2), spread
    told = with_bars(lambda rows: said, rows, said, rows, config)
    assert told["half"][3] == [pytest.approx(1.8), pytest.approx(3)]
    assert told["covariance"][3] == [[pytest.approx(0.81), 0], [0, pytest.approx(0.25)]]


@pytest.mark.parametrize("turn, height", [(12.0, 5.0), (-25.0, 8.0), (2.0, -10.0)])
def test_an_essential_matrix_tells_turn_and_height(turn, height):
    """Of points in space, as make_things.py's camera sees them, from 30 degrees above the horizon at first."""
    points, seen = np.random.default_rng(0).uniform(-0.5, 0.5, (60, 3)), []
    for turned, above in ((40.0, 30.0), (40.0 + turn, 30.0 + height)):
        back = direction(-turned, above)
        right = np.cross([0, 1, 0], back) / np.linalg.norm(np.cross([0, 1, 0], back))
        x, up, depth = np.array([right, np.cross(back, right), -back]) @ (points - 3 * back).T
        focal = 64 / math.tan(math.radians(FIELD_DEG / 2))
        seen.append(np.stack([63.5 + focal * x / depth, 63.5 - focal * up / depth], 1))
    assert things.find_pose(*seen, 128) == pytest.approx((turn, height), abs=0.1)
    assert things.find_pose(seen[0][:5], seen[1][:5], 128) is None


@pytest.mark.slow
def test_drawings_are_read_back(things_folder, capsys):
    """By the control and by a network; a second control joins the first in the plot, once."""
    shutil.copytree("control", "again")
    for name, count in (("control", 3), ("again", 2), ("again", 3)):
        where = ["data_root=data", f"model_path={name}", "out_dir=out", "ddim_steps=2", "minutes=0.02"]
        run_script(control.main, control.settings, [*where, f"count={count}"])
    report = json.loads(Path("out/asked.json").read_text())["controls"]
    assert [*report] == ["control", "again"]
    for own in report.values():
        asked = np.array(own["asked"])
        assert asked.shape == (3, 2) and (asked >= [-18, 0]).all() and (asked <= [15, 360]).all()
        for reader in control.READERS:
            assert np.isfinite(own[reader]["found"]).all() and len(own[reader]["half"]) == 3
    printed = capsys.readouterr().out
    assert printed.count("| turn (degrees) |") == 9 and printed.count("true pictures") == 6
    assert Image.open("out/asked.png").width > 300 and len(list(Path("out").glob("network_*"))) == 1
    write_yaml({"names": ["hour", "height"], "units": ["h"] * 2, "periods": [None, 360]}, Path("data/controls.yaml"))
    with pytest.raises(SystemExit, match="2"):
        run_script(control.main, control.settings, where)
    assert "expected rows as the control was trained on: turn, height" in capsys.readouterr().err


def test_drawn_pairs_are_read_by_the_classical_chain():
    """Only what a control knows: the other numbers do not change."""
    ranges = choose_changes(["rotation", "exposure"])
    reference, target, change = draw_pair(random.Random(2), find_pictures("train"), SIZE, ranges)
    found = control.read_by_formula(["rotation", "exposure"], [Row(None, target, "", reference)])
    assert found.tolist()[0] == pytest.approx([change["rotation"], change["exposure"]], abs=0.05)


@pytest.mark.slow
def test_peers_read_pairs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "POOL", 32)
    arguments = ["methods=ecc,log_polar,siamese", "pairs=3", "regressor_minutes=0.02", f"out_dir={tmp_path}"]
    run_script(pairs.main, pairs.settings, arguments)
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert all(abs(error) < 0.5 for error in errors["rotation alone, log_polar"]["rotation"])
    assert all(abs(error) < 0.5 for error in errors["from outside, ecc"]["rotation"])
    assert list(errors["all six, log_polar"]) == ["rotation", "zoom", "shift x", "shift y"]
    assert len(errors["all six, siamese"]["blur"]) == 3 and "| siamese |" in capsys.readouterr().out


def test_the_classical_chain_finds_all_six():
    """Better than its parts, where these see the same pair; and a run that was stopped goes on."""
    reference, target, change = draw_pair(random.Random(2), find_pictures("train"), SIZE, choose_changes(None))
    registered, chained = (read(reference, target, NAMES) for read in (pairs.CLASSICAL["magsac"], chain))
    within = dict(rotation=0.02, zoom=0.001, exposure=0.03, blur=0.5) | {"shift x": 3e-4, "shift y": 3e-4}
    assert all(abs(chained.found[name] - change[name]) < within[name] for name in NAMES)
    before, after = (corner_error(own.found, change, SIZE) for own in (registered, chained))
    assert after < before < 1 and 0 < chained.doubt < 1


def test_answers_are_kept_and_not_asked_again(tmp_path):
    s, asked = Settings(pairs.settings), []

    def read(some, sought):
        asked.extend(some)
        if len(asked) > pairs.BATCH:
            raise KeyboardInterrupt
        return [Answer({"rotation": float(number), "zoom": 1.0}) for number in some]

    with pytest.raises(KeyboardInterrupt):
        pairs.answer_pairs(tmp_path / "answers.jsonl", read, range(20), ["rotation"], s)
    del asked[:]
    answers = pairs.answer_pairs(tmp_path / "answers.jsonl", read, range(20), ["rotation"], s)
    assert asked == [*range(pairs.BATCH, 20)] and [own["found"] for own in answers] == [
        {"rotation": i} for i in range(20)
    ]
    with pytest.raises(KeyboardInterrupt):  # other settings, other answers
        pairs.answer_pairs(tmp_path / "answers.jsonl", read, range(20), ["rotation"], Settings({**s, "seed": 4}))


def test_corners_tell_how_far_off_a_reading_is():
    off, covariance = {"rotation": 3.0, "zoom": 1.1, "shift x": 0.02}, np.diag([0.5, 0.01, 0.003, 0.002, 1, 1]) ** 2
    assert corner_error({"rotation": 1.0}, {}, 100) == pytest.approx(100 * 2**0.5 * math.sin(math.radians(0.5)))
    numbers, rng = np.array([3.0, 1.1, 0.02, 0, 0, 0]), np.random.default_rng(0)
    draws = [dict(zip(NAMES, numbers + error)) for error in rng.multivariate_normal(np.zeros(6), covariance, 4000)]
    corners = [corner_distances(own, off, 100) for own in draws]
    assert corner_spread(off, covariance, 100) == pytest.approx(np.sqrt(np.mean(np.square(corners))), rel=0.03)


def test_areas_and_risks_by_hand():
    assert area_under([0.5, 0.0, 3.0, 9.0], 1) == pytest.approx((0.5 + 1) / 4)
    assert risk_curve([4.0, 1.0, 1.0], [9, 1, math.inf]) == pytest.approx([1, 2.5, 2])


def test_posteriors_that_are_too_narrow_or_too_wide_are_told():
    rng = np.random.default_rng(1)
    mixing = np.array([[0.02, 0.03], [0, 0.05]])
    errors, covariance = rng.standard_normal((400, 2)) @ mixing, mixing.T @ mixing
    truths = rng.uniform(size=errors.shape)
    for scale, low, high in ((1, 0.86, 0.94), (4, 0.99, 1), (0.25, 0, 0.7)):
        said = np.tile(scale * covariance, (400, 1, 1))
        for own in (*ranks(errors, said).T, distance_ranks(errors, said, truths, rng)):
            assert low <= middle_shares(own)[1] <= high and (kstest(own, "uniform").pvalue > 0.001) == (scale == 1)
    errors = rng.normal(0, 0.3, (400, 1))
    errors -= errors.round()  # of a number that goes round and is hardly known, the short way
    told, truths = np.full((400, 1, 1), 0.3**2), rng.uniform(size=(400, 1))
    right, straight = (distance_ranks(errors, told, truths, rng, goes_round) for goes_round in (True, False))
    assert kstest(right, "uniform").pvalue > 0.001 > kstest(straight, "uniform").pvalue


@pytest.mark.slow
def test_changes_and_checks_are_tabled(tmp_path, capsys):
    run_script(pairs.main, pairs.settings, ["methods=ours", "pairs=2", f"out_dir={tmp_path}"])
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert all(abs(error) < 0.5 for error in errors["rotation alone, ours"]["rotation"])
    assert all(abs(error) < 0.02 for error in errors["all six, ours"]["shift x"])
    printed = capsys.readouterr().out
    assert "| there and back |" in printed and "| by way of another |" in printed


@pytest.mark.slow
def test_odd_inputs_are_read_and_refused(tmp_path, capsys):
    arguments = ["sorts=identical,no_pictures,bad_rows", "quick=true", f"out_dir={tmp_path}"]
    run_script(odd_inputs.main, odd_inputs.settings, arguments)
    printed = capsys.readouterr().out
    assert "| identical | 2 | 2 | 0 | 0 | 0 |" in printed and "| no pictures | 2 | 0 | 0 | 2 | 0 |" in printed
    assert [case["ended"] for case in json.loads((tmp_path / "cases.json").read_text())["bad_rows"]] == ["refused"] * 2


@pytest.mark.parametrize(
    "truth, unseen, width, flags, ended",
    [
        (0.1, (), 0.2, [], "right"),
        (0.1, (), 0.1, [], "wrong"),  # more than three standard errors
        (0.1, (), 0.1, ["ambiguous"], "flagged"),
        (0.1, ("angle",), 0.2, [], "wrong"),  # sure of what cannot be seen
        (None, ("angle",), 6, [], "wrong"),  # nothing explains it
        (9, ("angle",), 6, [], "right"),
        (9, ("angle",), 0.1, ["no_effect", "angle"], "flagged"),
        (9, ("angle",), 0.1, ["no_effect", "zoom"], "wrong"),
    ],
)
def test_odd_inputs_are_judged(truth, unseen, width, flags, ended):
    truth = None if truth is None else {"angle": truth}
    case = odd_cases.Case("a case", None, truth=truth, unseen=unseen, model="control_tiny")
    reading = dict(names=["angle"], control=0.0, std=width / 4, interval90=[[-width / 2, width / 2]], flags=flags[:1])
    assert odd_inputs.judge(case, reading | {"no_effect": flags[1:]})["ended"] == ended


@pytest.mark.parametrize("name", drawn.THINGS)
def test_things_change_with_their_number(name):
    low, near, high = (np.asarray(drawn.draw_thing(name, value), float) for value in (0.5, 1, 8.5))
    assert low.shape == (drawn.SIZE, drawn.SIZE, 3) and np.abs(low - high).mean() > np.abs(low - near).mean() > 0.05


def test_drawn_things_are_a_dataset(tmp_path):
    drawn.draw_dataset(tmp_path, drawn.values_between(2))
    rows = read_rows(tmp_path / "prompt.json")
    assert len(rows) == 2 * len(drawn.THINGS) == len({row.control for row in rows})
    assert all(0 < row.control[0] < drawn.HIGHEST and row.control[0] % 1 for row in rows)
    assert read_control_names(tmp_path, 1) == (["value"], ["of 9"], [None], None)


def test_hands_of_the_clock_are_as_near_to_the_trained_beside_the_seam_as_elsewhere(tmp_path):
    hands = drawn.hands_between()
    near, far = ([(h + drawn.NEAR) % drawn.TRAINED for h in own] for own in hands.values())
    assert near == pytest.approx(far) and len({*hands["elsewhere"]} - {*hands["seam"]}) == drawn.HANDS
    assert all(min(h, 360 - h) <= drawn.NEAR for h in hands["seam"]) and len({*hands["seam"]}) == drawn.HANDS
    assert all(drawn.NEAR < h < 360 - drawn.NEAR for h in hands["elsewhere"])
    drawn.draw_dataset(tmp_path, {"hand": [0, 90, 360]}, clock=True)
    assert read_control_names(tmp_path, 1) == (["hand"], ["degrees"], [360], None)
    start, quarter, round_about = (
        np.asarray(Image.open(row.target), float) for row in read_rows(tmp_path / "prompt.json")
    )
    assert np.abs(start - round_about).mean() < 0.1 < np.abs(start - quarter).mean()


def test_drawn_things_are_tabled(capsys):
    reading = dict(prompt="a clock", control=2.0, std=0.2 / 1.645)
    results = [dict(reading, error=error, flags=flags) for error, flags in ((0.1, []), (0.3, []), (7, ["ambiguous"]))]
    drawn.tabulate({"clock": results})
    printed = capsys.readouterr().out
    assert "| clock | 3 | 0.300 | 6.330 | 7.000 | 33% | 1 | 1 |" in printed
    assert "a clock, -5.00: 2.00 ± 0.12 ambiguous" in printed and printed.count("a clock") == 1


def draw_needle(value, size=64):
    """Returns: a white dial with a red needle at a value, 0 at the top and clockwise to 10."""
    picture, middle, angle = Image.new("RGB", (size, size), "white"), size / 2, 2 * math.pi * value / 10
    pen, (x, y) = ImageDraw.Draw(picture), (math.sin(angle), -math.cos(angle))
    wide, tip = size / 8, 0.4 * size
    corners = [(tip * x, tip * y), (wide * -y, wide * x), (wide * y, wide * -x)]
    pen.polygon([(middle + right, middle + down) for right, down in corners], fill=(220, 30, 30))
    return picture


@pytest.mark.parametrize("value", [0.0, 1.3, 5.0, 7.4, 9.9])
def test_needles_are_found(value):
    found = find_needle(draw_needle(value)) * 10 / (2 * math.pi)
    assert abs(shortest([found - value])) < 0.1


@pytest.mark.parametrize("name", MISHAPS)
def test_mishaps_change_the_picture(name):
    picture = draw_meter(random.Random(1), 142, 3.0)
    changed, again = (MISHAPS[name](random.Random(2), picture, 3.0) for _ in range(2))
    assert changed[0].size == picture.size and changed[0].mode == "RGB" and 0 <= changed[1] <= 10
    assert np.abs(np.asarray(changed[0], float) - np.asarray(picture)).mean() > 1
    assert changed[0].tobytes() == again[0].tobytes()


def make_dials(folder, count):
    """Write `count` drawn pictures of each of two dials, the first mounted 0.3 off and the second a tenth of it."""
    lines = ["file,dial,time,value,value_from_next_dial"]
    for i in range(count):
        whole = i * 3.7 % 100
        for dial, value in ((1, whole / 10), (2, whole % 10)):
            draw_needle(value + 0.3 * (dial == 1)).save(folder / f"{dial}_{i}.png")
            second = f"{value:.3f}" if dial == 1 else ""
            lines.append(
                f"{dial}_{i}.png,{dial},2019-06-01T{i // 60:02d}:{i % 60:02d}:00,{round(value, 1) % 10},{second}"
            )
    (folder / "readings.csv").write_text("\n".join(lines) + "\n")


def test_a_meter_is_read_by_image_processing(tmp_path, capsys):
    make_dials(tmp_path, 80)
    arguments = [
        f"folder={tmp_path}",
        "counts=[5,60]",
        "methods=processing",
        "targets=20",
        f"out_dir={tmp_path / 'out'}",
    ]
    run_script(meter.main, meter.settings, [*arguments, "mishaps=darkness,another dial's prompt"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "60" / "data" / "targets.json").read_text().splitlines()]
    assert len(rows) == 40 and len(report["results"]["processing 60"]["found"]) == 20
    assert (
        "| processing | 5 |" in printed
        and "| darkness | 20 |" in printed
        and "| another dial's prompt | 20 |" in printed
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("| processing | 60 |"))
    median, _, worst, _, second = (cell for cell in line.split(" | ")[2:7])
    assert float(median) < 0.06 and float(worst) < 0.15 and float(second) < 0.05  # labels are rounded to tenths
    assert (tmp_path / "out" / "plot.png").exists() and (tmp_path / "out" / "mishaps.png").exists()


@pytest.mark.slow
def test_a_meter_is_read_by_networks(tmp_path, capsys):
    """The regressor, and a control that was never shown a meter: its readings are flagged."""
    make_dials(tmp_path, 64)
    arguments = ["counts=60", "methods=ours,resnet", "model_path=models/control_tiny", "regressor_minutes=0.02"]
    arguments += ["targets=4", "mishaps=", f"folder={tmp_path}", f"out_dir={tmp_path / 'out'}"]
    for _ in range(2):
        run_script(meter.main, meter.settings, arguments)
    printed = capsys.readouterr().out
    assert printed.count("| resnet | 60 |") == 2 and "| ours | 60 |" in printed and " | 100.0% | " in printed


class TestKindsOfPictures:
    """benchmarks/base.py."""

    def test_every_kind_that_is_there_is_measured(self, tmp_path, capsys):
        for folder, suffix, mode in (
            ("meter/dial1", "jpg", "RGB"),
            ("photos", "jpg", "RGB"),
            ("stamps", "png", "RGBA"),
        ):
            (tmp_path / folder).mkdir(parents=True)
            for i in range(2):
                Image.effect_noise((160, 150), 60).convert(mode).save(tmp_path / folder / f"{i}.{suffix}")
        arguments = [f"photos={tmp_path / 'photos'}", f"stamps={tmp_path / 'stamps'}", f"out_dir={tmp_path / 'out'}"]
        arguments += ["pictures=3", "training_views=2", "image_size=32", f"root={tmp_path}"]
        run_script(base.main, base.settings, arguments)
        printed = capsys.readouterr().out
        assert "| water meter | 3 |" in printed and "animals: skipped, no gcompris-qt-data" in printed
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results.keys() == {"water meter", base.TRAINING} and min(results["water meter"]["vae"]) > 5
        assert Image.open(tmp_path / "out" / base.FIGURE).size == (6 * 32 + base.GAP, 32 + base.LINE)

    def test_without_any_kind_it_says_what_to_do(self, tmp_path, fails_in_one_line):
        line = fails_in_one_line(base.main, base.settings, [f"root={tmp_path}", f"out_dir={tmp_path / 'out'}"])
        assert "docs/kinds.md" in line

    def test_an_archive_gives_its_pictures(self, tmp_path):
        data = io.BytesIO()
        for colour in ("red", "blue"):
            Image.new("RGB", (20, 30), colour).save(picture := io.BytesIO(), format="WEBP", lossless=True)
            data.write(b"between" + picture.getvalue())
        (tmp_path / "a.rcc").write_bytes(data.getvalue())
        red, blue = base.read_pictures(tmp_path / "a.rcc")
        assert red.getpixel((3, 3)) == (255, 0, 0) and blue.getpixel((3, 3)) == (0, 0, 255)

    def test_squares_are_middles_first_and_details_where_they_are_asked_for(self):
        picture = Image.linear_gradient("L").convert("RGB").crop((0, 0, 256, 200))  # 0 above, 255 below
        middle, other = base.cut_squares(random.Random(0), [picture], 2, 32)
        assert middle.getpixel((0, 0))[0] < 8 and middle.getpixel((0, 31))[0] > 190 and other != middle
        (detail,) = base.cut_squares(random.Random(0), [picture], 1, 32, widest=40)
        assert 25 < detail.getpixel((0, 31))[0] - detail.getpixel((0, 0))[0] < 42

    def test_pca_keeps_what_its_components_span(self):
        pictures = 2 * torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
        kept = [base.project(pictures, *base.patch_pca(pictures, count)[:2]) for count in (4, 16, 48)]
        errors = [base.psnr(found, pictures) for found in kept]
        assert (errors[0] < errors[1]).all() and (errors[1] < errors[2]).all() and (errors[2] == 100).all()
