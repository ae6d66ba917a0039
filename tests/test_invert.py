"""invert.py: what it leaves, that it goes on where it was killed, and what it refuses."""

import csv
import json
import math
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import invert
from cldm import readers
from cldm import reading as reading_module
from cldm.confidence import Reading
from cldm.dataset import Row
from cldm.model import Sampling, load_model, save_model
from cldm.reading import read_controls
from ldm.base import LatentDiffusion
from ldm.settings import InputError, override, run_script
from tests.conftest import another_run

SUMMARY = ["target", "prompt", "names", "control", "std", "interval90", "flags", "loss", "model_calls", "seconds"]
CALIBRATED = dict(error_scale=[0.1], error_floor=[0.01])


@pytest.fixture
def arguments(make_model, tmp_path):
    model = make_model()
    model.control_net.register_to_config(control_low=[-1.0], control_high=[1.0], **CALIBRATED)
    save_model(model, tmp_path / "control")
    return [f"model_path={tmp_path / 'control'}", f"out_dir={tmp_path / 'out'}"]


@pytest.fixture
def one(arguments, picture):
    return [*arguments, f"target_image_path={picture}"]


@pytest.fixture
def targets(picture, tmp_path):
    """A prompt.json of five targets; two say what their control is."""
    rows = [{"target": str(picture), "prompt": f"a cup {i}", **({"source": i} if i < 2 else {})} for i in range(5)]
    (tmp_path / "targets.json").write_text("\n".join(map(json.dumps, rows)))
    return f"targets={tmp_path / 'targets.json'}"


def run(*arguments):
    run_script(invert.main, invert.settings, arguments)


def read_results(tmp_path):
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in result.items() if k not in ("seconds", "model_calls")} for result in results]


def test_one_picture(one, tmp_path, capsys):
    run(*one, "seed=3")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(SUMMARY) < set(result) and "error" not in result and result["seed"] == 3
    (low, high), control = result["interval90"][0], result["control"]
    assert low < control < high and high - low == pytest.approx(2 * 1.645 * result["std"])
    with Image.open(tmp_path / "out" / "figure.png") as figure:
        assert figure.width > figure.height > 100
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure.png", "result.json"]
    printed = capsys.readouterr().out
    assert f"control: {control:+.3f} ± {result['std']:.3f}" in printed and "figure.png" in printed


def test_a_periodic_number_is_told_within_its_circle(arguments, targets, make_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cldm.report.DRAWN", Sampling(2))
    model = make_model(periods=[10.0])
    circle = dict(control_low=[0.0], control_high=[10.0], control_mean=[5.0], control_std=[2.9])
    model.control_net.register_to_config(**circle, **CALIBRATED)
    save_model(model, tmp_path / "control")
    run(*arguments, targets, "figures=true")
    for result in read_results(tmp_path):
        low, high = result["interval90"][0]
        assert result["periods"] == [10.0] and 0 <= result["control"] < 10 and min(low, high) >= 0
        assert "outside_range" not in result["flags"]
        if "error" in result:
            assert abs(result["error"]) <= 5 and (result["control"] - result["error"]) % 10 in (0, 1)
    assert "of 2 targets" in capsys.readouterr().out


def test_a_picture_must_be_named(arguments, fails_in_one_line):
    assert "give the picture that it reads" in fails_in_one_line(invert.main, invert.settings, arguments)


def test_no_earlier_figure_stays_beside_a_result(one, tmp_path):
    run(*one)
    run(*one, "figures=false")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_what_an_earlier_run_drew_is_no_target(arguments, picture, tmp_path, capsys, fails_in_one_line):
    folder, out = tmp_path / "many", tmp_path / "many" / "out"
    folder.mkdir()
    shutil.copy(picture, folder / "z.png")
    for _ in range(2):
        run(arguments[0], f"targets={folder}", "prompt=a cup", f"out_dir={out}")
    assert "going on after 1 of 1 targets" in capsys.readouterr().out and (out / "series.png").is_file()
    asked = [arguments[0], f"targets={out}", f"out_dir={out}"]
    assert "all of them lie in out_dir" in fails_in_one_line(invert.main, invert.settings, asked)


def test_a_name_that_no_disk_holds_does_not_stop_the_others(arguments, targets, tmp_path):
    file = tmp_path / "targets.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["target"] = 300 * "x" + ".png"
    file.write_text("\n".join(map(json.dumps, rows)))
    run(*arguments, targets)
    assert [result["flags"] == ["unreadable"] for result in read_results(tmp_path)] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_many_pictures(arguments, targets, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cldm.report.DRAWN", Sampling(2))
    run(*arguments, targets, "figures=true", "batch_size=2")
    results = read_results(tmp_path)
    assert [result["prompt"] for result in results] == [f"a cup {i}" for i in range(5)]
    assert [result.get("error") for result in results] == [
        pytest.approx(result["control"] - i) if i < 2 else None for i, result in enumerate(results)
    ]
    assert len(list((tmp_path / "out").glob("0*.png"))) == 5
    printed = capsys.readouterr().out
    assert "of 2 targets" in printed and "seconds a target" in printed


def test_the_source_is_never_used(arguments, targets, tmp_path):
    run(*arguments, targets)
    before = [result["control"] for result in read_results(tmp_path)]
    (tmp_path / "out" / "results.jsonl").unlink()
    (tmp_path / "targets.json").write_text(
        (tmp_path / "targets.json").read_text().replace('"source": 1', '"source": 9')
    )
    run(*arguments, targets)
    assert [result["control"] for result in read_results(tmp_path)] == before


def test_a_killed_run_goes_on(arguments, targets, tmp_path, capsys):
    run(*arguments, targets)
    whole, file = read_results(tmp_path), tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    kept = [line.replace("}", ', "kept": true}', 1) if i == 0 else line for i, line in enumerate(lines[:3])]
    file.write_text("".join(kept) + lines[3][:20])
    run(*arguments, targets)
    first, *others = read_results(tmp_path)
    assert first.pop("kept") and "going on after 3 of 5 targets" in capsys.readouterr().out
    for again, before in zip([first, *others], whole, strict=True):
        assert again["control"] == pytest.approx(before["control"], abs=1e-3) and again["prompt"] == before["prompt"]


def test_a_picture_that_was_copied_anew_is_no_other(arguments, targets, picture, tmp_path, capsys):
    run(*arguments, targets)
    os.utime(picture, (1, 1))
    run(*arguments, targets)
    assert "going on after 5 of 5 targets" in capsys.readouterr().out and len(read_results(tmp_path)) == 5


def test_targets_may_be_added_at_the_end(arguments, targets, tmp_path, capsys, fails_in_one_line):
    path = tmp_path / "targets.json"
    five = path.read_text()
    path.write_text("\n".join(five.splitlines()[:3]))
    run(*arguments, targets)
    path.write_text(five)
    run(*arguments, targets)
    assert "going on after 3 of 5" in capsys.readouterr().out and len(read_results(tmp_path)) == 5
    path.write_text("\n".join(five.splitlines()[:3]))
    assert "other targets" in fails_in_one_line(invert.main, invert.settings, [*arguments, targets])


@pytest.mark.parametrize(
    "change",
    ["seed=1", "draws=4", "figures=true", "prompts", "sources", "no settings", "weights", "picture", "binary", "a key"],
)
def test_results_of_another_run_are_kept(arguments, targets, picture, tmp_path, fails_in_one_line, change):
    run(*arguments, targets)
    if change == "weights":  # in a folder of the control
        model = load_model(tmp_path / "control")
        model.control_net.conv_in.bias.data += 1
        save_model(model, tmp_path / "control")
    if change == "picture":
        Image.open(picture).rotate(90).save(picture)
    if change == "binary":
        (tmp_path / "out" / "results.jsonl").write_bytes(b"\xff\xfe\n")
    if change == "a key":
        (tmp_path / "out" / "results.jsonl").write_text('{"target": "x.png"}\n')
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    if change == "no settings":
        (tmp_path / "out" / "settings.yaml").unlink()
    file = tmp_path / "targets.json"
    if change == "prompts":
        file.write_text(file.read_text().replace("a cup 2", "a cat"))
    if change == "sources":
        file.write_text(file.read_text().replace('"source": 1', '"source": 9'))
    line = fails_in_one_line(invert.main, invert.settings, [*arguments, targets, *([change] if "=" in change else [])])
    changed = {"picture": "line 1: .*picture.png has changed since it was read", "no settings": "not of this script"}
    assert (
        re.search(f"results.jsonl:? .*{changed.get(change, 'other targets')}", line)
        and (tmp_path / "out" / "results.jsonl").read_bytes() == before
    )


@pytest.mark.parametrize(
    "argument, message",
    [
        ("figures=maybe", 'setting "figures": expected true or false, or null, got'),
        ("draws=5", 'setting "draws": expected an even number'),
        ("draws=2", 'setting "draws"'),
        ("batch_size=0", 'setting "batch_size"'),
        ("targets=nowhere.json", "nowhere.json"),
    ],
)
def test_bad_setting_is_named(arguments, tmp_path, fails_in_one_line, argument, message):
    assert message in fails_in_one_line(invert.main, invert.settings, [*arguments, argument])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_control_that_was_never_trained_is_named(one, make_model, tmp_path, fails_in_one_line):
    save_model(make_model(), tmp_path / "control")
    assert "never trained" in fails_in_one_line(invert.main, invert.settings, one)


def test_a_source_of_another_length_is_named(arguments, targets, tmp_path, fails_in_one_line):
    file = tmp_path / "targets.json"
    file.write_text(
        "\n".join(json.dumps({**json.loads(line), "source": [1, 2]}) for line in file.read_text().split("\n"))
    )
    assert "the model takes 1 number(s)" in fails_in_one_line(invert.main, invert.settings, [*arguments, targets])


def test_many_at_once_equal_each_alone(arguments, targets, tmp_path):
    run(*arguments, targets)
    together = torch.tensor([result["control"] for result in read_results(tmp_path)])
    (tmp_path / "out" / "results.jsonl").unlink()
    run(*arguments, targets, "batch_size=1")
    alone = torch.tensor([result["control"] for result in read_results(tmp_path)])
    torch.testing.assert_close(alone, together, atol=1e-3, rtol=0)


def test_a_result_is_kept_when_its_figure_cannot_be_drawn(one, tmp_path, monkeypatch):
    def fail(*_):
        raise InputError("figure.png: cannot be written")

    monkeypatch.setattr(readers, "draw_reading", fail)
    with pytest.raises(SystemExit):
        run(*one)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["names"] == ["control"]


def test_names_with_dollar_signs_are_drawn_as_they_are(one, tmp_path):
    model = load_model(tmp_path / "control")
    model.control_net.register_to_config(control_names=["price $\\frac"], control_units=["$"])
    save_model(model, tmp_path / "control")
    run(*one, "prompt=costs $5_")
    assert (tmp_path / "out" / "figure.png").is_file()


def test_what_is_not_finite_is_an_error_and_leaves_nothing(one, tmp_path, monkeypatch, fails_in_one_line):
    def read(*inputs, **how):
        reading = read_controls(*inputs, **how)
        reading.control[:] = math.nan
        return reading

    monkeypatch.setattr(readers, "read_controls", read)
    line = fails_in_one_line(invert.main, invert.settings, [*one, "figures=false"])
    assert "not finite" in line and not any((tmp_path / "out").iterdir())


def test_a_picture_whose_latents_are_not_finite_does_not_stop_the_others(arguments, picture, tmp_path, monkeypatch):
    encode = LatentDiffusion.encode

    def encode_all_but_white(base, pictures):
        white = pictures.amin((1, 2, 3), keepdim=True) > 0.9
        return encode(base, pictures).masked_fill(white, math.nan)

    monkeypatch.setattr(LatentDiffusion, "encode", encode_all_but_white)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "odd.png")
    rows = [json.dumps({"target": name, "prompt": ""}) for name in (picture.name, "odd.png", picture.name)]
    (tmp_path / "targets.json").write_text("\n".join(rows))
    run(*arguments, f"targets={tmp_path / 'targets.json'}")
    problems = [result.get("problem", "") for result in read_results(tmp_path)]
    assert problems[0] == problems[2] == "" and "odd.png: its latents are not finite" in problems[1]


@pytest.fixture
def half_readable(picture, tmp_path):
    """Targets of which the second is damaged, the fourth missing; the fifth is read as not finite."""
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes()[:-40])
    shutil.copy(picture, tmp_path / "odd.png")
    names = "picture", "damaged", "picture", "missing", "odd", "picture"
    times = [f"2019-06-21T1{i}:00:00+02:00" for i in range(6)]
    rows = [{"target": f"{name}.png", "prompt": "", "time": time} for name, time in zip(names, times)]
    (tmp_path / "targets.json").write_text("\n".join(map(json.dumps, rows)))


def test_what_cannot_be_read_does_not_stop_the_others(arguments, half_readable, tmp_path, monkeypatch, capsys):
    read = readers.read

    def read_or_not(model, s, known, rows, *how):
        if any(row.target.name == "odd.png" for row in rows):
            raise InputError("what was read is not finite")
        return read(model, s, known, rows, *how)

    monkeypatch.setattr(readers, "read", read_or_not)
    given = [*arguments, f"targets={tmp_path / 'targets.json'}"]
    run(*given)
    results = read_results(tmp_path)
    problems = [result.get("problem", "") for result in results]
    expected = ["", 'line 2: "target" .*damaged.png: damaged', "", "missing.png: no such file", "not finite", ""]
    assert all(re.search(said, found) and bool(said) == bool(found) for said, found in zip(expected, problems))
    assert [result["control"] is None for result in results] == [*map(bool, problems)]
    assert "unreadable: 3 of 6" in capsys.readouterr().out
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["file", "time", "control", "control std", "control low", "control high", "flags"]
    for row, result in zip(table, results, strict=True):
        assert (row["file"], row["time"]) == (result["target"], result["time"])
        assert row["flags"].split() == result["flags"]
        numbers = [row[key] for key in list(table[0])[2:6]]
        if result["control"] is None:
            assert numbers == [""] * 4
        else:
            assert [*map(float, numbers)] == [result["control"], result["std"], *result["interval90"][0]]
    with Image.open(tmp_path / "out" / "series.png") as figure:
        assert figure.width > figure.height > 100
    run(*given)
    assert "going on after 6 of 6" in capsys.readouterr().out
    shutil.copy(tmp_path / "picture.png", tmp_path / "missing.png")
    with pytest.raises(InputError, match="line 4: .*missing.png has changed since it was read"):
        invert.main(override(invert.settings, given))


def test_where_the_first_target_cannot_be_read_the_run_stops(arguments, picture, tmp_path, fails_in_one_line):
    (tmp_path / "targets.json").write_text(
        "\n".join(json.dumps({"target": name, "prompt": ""}) for name in ("wrong.png", str(picture)))
    )
    line = fails_in_one_line(invert.main, invert.settings, [*arguments, f"targets={tmp_path / 'targets.json'}"])
    assert 'targets.json line 1: "target"' in line and not (tmp_path / "out" / "results.csv").exists()
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_a_full_disk_leaves_the_lines_whole(arguments, targets, tmp_path, small_disk, fails_in_one_line):
    (tmp_path / "targets.json").write_text((tmp_path / "targets.json").read_text().replace("a cup", "a cup" * 200))
    with small_disk():
        line = fails_in_one_line(invert.main, invert.settings, [*arguments, targets, "batch_size=1"])
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    assert "results.jsonl: cannot be written" in line and len(lines) == 2 and lines[1].endswith("}\n")


@pytest.fixture
def stub(monkeypatch):
    """Readings that take no time: 5 of 10, give or take 1, in which every other is flagged."""

    def read(model, s, known, rows, loaded, figures):
        count, ones = len(rows), torch.ones(len(rows), 1)
        flags = [["ambiguous"] * (i % 2) for i in range(count)]
        bars = dict(error_scale=torch.ones(1), error_floor=torch.ones(1), unexplained_share=ones[:, 0])
        zeros = torch.zeros(count, 1, 1)
        return Reading(5 * ones, zeros + 1, zeros + 1, ones[:, 0], ones[:, 0].int(), [[]] * count, flags, **bars), print

    monkeypatch.setattr(readers, "read", read)


def test_memory_does_not_grow_with_the_rows(arguments, picture, tmp_path, monkeypatch, stub):
    """But for some bytes each, of the curve; every picture is decoded once."""
    loads, load = [], Row.load
    monkeypatch.setattr(Row, "load", lambda row: loads.append(0) or load(row))
    model = load_model(tmp_path / "control")
    monkeypatch.setattr(invert, "load_model", lambda *_, **how: model)
    monkeypatch.setattr("cldm.results.draw_series", lambda series: Figure() if series.arrays() else None)

    def peak(count):
        row = json.dumps({"target": str(picture), "prompt": "a" * 5000, "source": 5, "time": "2019-06-21T14:05:00"})
        (tmp_path / "targets.json").write_text(f"{row}\n" * count)
        loads.clear()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        run(*arguments, f"targets={tmp_path / 'targets.json'}", f"out_dir={tmp_path / str(count)}")
        assert len(loads) == count
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    peak(20)  # what is loaded once
    few, many = peak(50), peak(350)
    tracemalloc.stop()
    assert many - few < 300 * 1000  # bytes; a row has over 5,000, and its line in results.jsonl too


def test_without_calibration_there_are_no_bars(one, tmp_path, capsys):
    model = load_model(tmp_path / "control")
    model.control_net.register_to_config(error_scale=None)
    save_model(model, tmp_path / "control")
    run(*one, "figures=false")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["std"] is result["interval90"] is result["covariance"] is None and "uncalibrated" in result["flags"]
    printed = capsys.readouterr().out
    assert "±" not in printed and "uncalibrated: this control was never calibrated" in printed


def test_what_a_guess_would_tell_as_well_is_told(one, tmp_path, capsys):
    model = load_model(tmp_path / "control")
    model.control_net.register_to_config(guessed=[True])
    save_model(model, tmp_path / "control")
    run(*one, "figures=false")
    result, name = json.loads((tmp_path / "out" / "result.json").read_text()), model.control_net.config.control_names[0]
    assert "guess" in result["flags"] and result["guess"] == [name]
    assert re.search(rf"^guess: a guess would do as well.* \({name}\)$", capsys.readouterr().out, re.M)


def test_targets_that_are_none_are_named(arguments, tmp_path, fails_in_one_line):
    line = fails_in_one_line(invert.main, invert.settings, [*arguments, f"targets={tmp_path / '*.jpg'}"])
    assert "*.jpg: not there; expected a folder" in line


def test_a_lower_place_is_read_again_and_nothing_known_is_lost(one, tmp_path, monkeypatch):
    starts = []

    def read(*inputs):
        starts.append(inputs[5] if len(inputs) > 5 else None)
        reading = read_controls(*inputs)
        reading.others = [[[0.25]]]
        return reading

    monkeypatch.setattr(reading_module, "read_controls", read)
    monkeypatch.setattr(reading_module, "find_lower", lambda bounds, periods, control, *_: control + 0.5)
    run(*one)
    assert starts[0] is None and starts[1].shape == (1, 3, 1)
    control, lower, other = starts[1].flatten().tolist()
    assert lower == pytest.approx(control + 0.5) and other == 0.25


def test_two_runs_do_not_share_a_folder(one, tmp_path, fails_in_one_line):
    with another_run(tmp_path / "out"):
        assert "another run is writing into it" in fails_in_one_line(invert.main, invert.settings, one)


def test_targets_may_be_a_folder_a_glob_or_a_picture(arguments, picture, tmp_path):
    (tmp_path / "many").mkdir()
    for name in ("b.png", "a.jpg"):
        Image.open(picture).save(tmp_path / "many" / name)
    (tmp_path / "many" / "._a.jpg").write_text("left by another system")
    (tmp_path / "many" / "notes.txt").write_text("no picture")
    for number in (10, 9):
        Image.open(picture).save(tmp_path / "many" / f"{number}.bmp")
    for targets, names in (
        ("many", ["9.bmp", "10.bmp", "a.jpg", "b.png"]),
        ("many/?.png", ["b.png"]),
        (f"{tmp_path}/**/*.bmp", ["9.bmp", "10.bmp"]),
        ("many/a.jpg", ["a.jpg"]),
    ):
        run(*arguments, f"targets={tmp_path / targets}", "prompt=a cup")
        results = read_results(tmp_path)
        assert [Path(result["target"]).name for result in results] == names
        assert {result["prompt"] for result in results} == {"a cup"}
        (tmp_path / "out" / "results.jsonl").unlink()


def test_names_need_not_be_utf_8(arguments, picture, tmp_path):
    (tmp_path / "many").mkdir()
    shutil.copy(picture, os.fsencode(tmp_path) + b"/many/Z\xe4hler.png")
    run(*arguments, f"targets={tmp_path / 'many'}", "prompt=a cup")
    assert b"Z\xe4hler.png," in (tmp_path / "out" / "results.csv").read_bytes()


@pytest.mark.parametrize("setting", ["prompt=a cup", "input_image_path=x.png", "target_image_path=x.png"])
def test_what_targets_say_themselves_is_not_given_twice(arguments, targets, fails_in_one_line, setting):
    line = fails_in_one_line(invert.main, invert.settings, [*arguments, targets, setting])
    assert setting.partition("=")[0] in line and "has no effect with targets" in line
