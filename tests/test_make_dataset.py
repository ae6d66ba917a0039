"""The data set: the committed pictures are what the code renders, turned the right way about the right point."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cldm.changes import CHANGES, expose
from cldm.pairs import open_photo
from dataForTrain import make_dataset
from dataForTrain.make_dataset import (
    EXTRA,
    HELD_OUT,
    TRAIN,
    VALIDATION,
    VALIDATION_ANGLES,
    VIEW,
    find_photo,
    find_pictures,
    render_framed,
)
from ldm.files import ROOT, digest
from ldm.schema import read_config
from ldm.settings import InputError, override

FOLDER = Path(make_dataset.__file__).parent


def run(*arguments):
    make_dataset.main(override(make_dataset.settings, [str(argument) for argument in arguments]))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_committed_pictures_are_reproduced_byte_for_byte(tmp_path):
    run("photos=astronaut,hubble", f"out_dir={tmp_path}")
    for file, angles in {"prompt.json": range(-5, 6), "validation.json": VALIDATION_ANGLES}.items():
        rows = read(tmp_path / file)
        assert [float(row["source"]) for row in rows] == [float(angle) for angle in angles] * 2
        committed = read(FOLDER / file)
        for row in rows:
            assert row in committed
            assert (tmp_path / row["target"]).read_bytes() == (FOLDER / row["target"]).read_bytes()


def test_pairs_are_not_cut_from_what_was_made_before(tmp_path):
    shutil.copy(find_photo(TRAIN["coffee"].file), tmp_path / "coffee.png")
    made = ["pairs=2", "image_size=16", f"photos={tmp_path}", f"out_dir={tmp_path / 'pairs'}"]
    run(*made)
    before = digest([tmp_path / "pairs"])
    run(*made, "overwrite=true")
    assert digest([tmp_path / "pairs"]) == before
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(InputError, match="broken.png"):
        run(*made, "overwrite=true")
    assert digest([tmp_path / "pairs"]) == before


def test_an_older_dataset_is_replaced_and_nothing_else(tmp_path):
    for name in ("pictures/own.jpg", "targets.json", "resultData/old.png", "validation.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    run("angles=[1]", "photos=coffee", "image_size=16", f"out_dir={tmp_path}", "overwrite=true")
    made = {"controls.yaml", "prompt.json", "resultData"}
    assert {file.name for file in tmp_path.iterdir()} == made | {"pictures", "targets.json"}
    assert (tmp_path / "pictures" / "own.jpg").exists() and len([*(tmp_path / "resultData").iterdir()]) == 1


def test_numbers_with_many_digits_have_names_of_their_own(tmp_path):
    run("angles=[123.4567,123.4568]", "photos=coffee", "image_size=16", f"out_dir={tmp_path}")
    rows = read(tmp_path / "prompt.json")
    assert [row["source"] for row in rows] == ["123.4567", "123.4568"] and rows[0]["target"] != rows[1]["target"]


def test_other_angles_and_photos(tmp_path):
    run("angles=[-3.37,1.61]", "photos=astronaut,coffee", "image_size=48", f"out_dir={tmp_path}")
    rows = read(tmp_path / "prompt.json")
    assert [row["source"] for row in rows] == ["-3.37", "1.61"] * 2
    assert [row["prompt"] for row in rows[1:3]] == [TRAIN["astronaut"].prompt, TRAIN["coffee"].prompt]
    for row in rows:
        assert Image.open(tmp_path / row["target"]).size == (48, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["controls.yaml", "prompt.json", "resultData"]
    assert len(list((tmp_path / "resultData").iterdir())) == 4


def test_views_are_drawn_over_every_range_and_are_what_their_controls_say(tmp_path):
    run("views=20", "photos=coffee", "image_size=32", f"out_dir={tmp_path}")
    controls = read_config(tmp_path / "controls.yaml")
    assert controls.names == ["rotation", "zoom", "exposure", "blur"]
    assert controls.units == ["degrees", "ratio", "stops", "pixels"]
    rows, validation = (read(tmp_path / f"{file}.json") for file in ("prompt", "validation"))
    assert (len(rows), len(validation)) == (20, 2)
    for drawn, name in zip(np.transpose([row["source"] for row in rows]), VIEW):
        _, low, high, _ = CHANGES[name]
        assert low <= drawn.min() < low + 0.3 * (high - low) and high - 0.3 * (high - low) < drawn.max() <= high
    for row in rows[:3]:
        expected = render_framed(TRAIN["coffee"], 32, *row["source"])
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["target"])), np.asarray(expected))


def test_the_widest_view_stays_inside_every_photo():
    for photo in {**TRAIN, **HELD_OUT}.values():
        render_framed(photo, 128, angle_deg=10, zoom=0.8)


def test_exposure_scales_linear_light():
    values = torch.tensor([0.5, 1.0, 0.02, 0.9])
    assert expose(expose(values[:1], -1), 1).item() == pytest.approx(0.5)
    expected = [0.7354, 0.04, 1.0]  # sRGB of half the light; of twice, where it is linear; clipped
    assert expose(values[1:], torch.tensor([-1.0, 1, 1])).tolist() == pytest.approx(expected, abs=1e-4)


def test_zoom_enlarges_about_the_middle():
    plain, zoomed = (np.asarray(render_framed(TRAIN["coffee"], 128, zoom=zoom), float) for zoom in (1, 1.25))
    middle = Image.fromarray(plain.astype("uint8")).resize(
        (128, 128), Image.Resampling.BICUBIC, (12.8, 12.8, 115.2, 115.2)
    )
    assert np.abs(zoomed - np.asarray(middle)).mean() < 0.5 * np.abs(zoomed - plain).mean()


def test_held_out_photos_are_in_no_training_list():
    assert not set(HELD_OUT) & set(TRAIN)
    held_out = [photo.file for photo in HELD_OUT.values()]
    assert not set(held_out) & ({photo.file for photo in TRAIN.values()} | set(EXTRA) | set(VALIDATION))
    paired = {find_photo(file) for file in held_out} & {*find_pictures("train"), *find_pictures("validation")}
    assert not paired and find_pictures("held_out") == [find_photo(file) for file in held_out]
    assert not set(find_pictures("train")) & set(find_pictures("validation"))


def test_no_folder_is_taken_that_nobody_named(tmp_path, monkeypatch):
    (tmp_path / "validation").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "validation" / "x.png")
    built_in = find_pictures("validation")
    monkeypatch.chdir(tmp_path)
    assert find_pictures("validation") == built_in
    with pytest.raises(InputError, match="has no name"):
        find_pictures("train,")


def test_photos_of_several_sources():
    pictures = sorted((FOLDER / "resultData").glob("*.png"))
    found = find_pictures(f"train,{FOLDER / 'resultData'},gravel")
    assert found == [*find_pictures("train"), *pictures, find_photo("skimage/data/gravel.png")]
    rows = read(FOLDER / "prompt.json") + read(FOLDER / "validation.json")
    assert {Path(row["target"]).name.rpartition("_")[0] for row in rows} == set(TRAIN)
    assert not {row["prompt"] for row in rows} & {photo.prompt for photo in HELD_OUT.values()}


def test_validation_angles_are_not_trained():
    trained, seen = ({row["source"] for row in read(FOLDER / f"{f}.json")} for f in ("prompt", "validation"))
    assert len(trained) == 11 and not trained & seen


def difference(a, b):
    """Mean absolute difference of the middles, where a turned picture has no border."""
    a, b = (np.asarray(picture, float)[32:96, 32:96] for picture in (a, b))
    return np.abs(a - b).mean()


@pytest.mark.parametrize("name", ["astronaut", "coffee", "text"])
def test_positive_angle_turns_counterclockwise_about_the_middle(name):
    straight, turned = (render_framed(TRAIN[name], 128, angle) for angle in (0, 5))
    expected = difference(straight.rotate(5, Image.Resampling.BICUBIC), turned)
    others = [difference(straight.rotate(angle, Image.Resampling.BICUBIC), turned) for angle in (-5, 0, 4, 6)]
    assert expected < 0.6 * min(others)  # not nothing: it was interpolated twice


def test_framing_does_not_depend_on_the_angle():
    """A quarter turn of the rendered picture and of the photograph are the same."""
    straight, turned = (render_framed(TRAIN["astronaut"], 64, angle) for angle in (0, 90))
    quarter = np.rot90(np.asarray(straight, int))
    assert np.abs(np.asarray(turned, int) - quarter).mean() < 1


@pytest.mark.parametrize("name", [*TRAIN, *HELD_OUT])
def test_every_photo_holds_its_frame_at_any_angle(name):
    photo = {**TRAIN, **HELD_OUT}[name]
    width, height = open_photo(find_photo(photo.file)).size
    side = photo.frame * min(width, height)
    assert side * 2**0.5 < min(width, height)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["views=2", "pairs=2"], "give just one"),
        (["angles=[1]", "views=2"], "give just one"),
        (["controls=[zoom]"], 'setting "controls": has no effect without pairs'),
        (["seed=1"], 'setting "seed": has no effect without views or pairs'),
        ([f"photos={FOLDER / 'resultData'}"], "from a folder only pairs are cut; give pairs=N too"),
        (["pairs=1", "photos=no/where"], "no/where: no such folder"),
        (["pairs=0.5"], 'setting "pairs": expected a whole number'),
        (["views=2.5"], 'setting "views": expected a whole number'),
        (["image_size=1"], 'setting "image_size": expected a whole number from 8 to 4096, got 1'),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments, f"out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_unknown_photo_is_named(tmp_path):
    with pytest.raises(InputError, match='no photograph or folder "astronat".*astronaut'):
        run("photos=coffee,astronat", f"out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "angles", ["abc", "2", "[1,abc]", "[.nan]", "[[1]]", "[true]", "[]", "[1e999]", f"[{9 * 10**400}]"]
)
def test_bad_angles_are_named(tmp_path, angles):
    with pytest.raises(InputError, match="angles: expected a list of numbers"):
        run(f"angles={angles}", "photos=coffee", f"out_dir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_workers_end_with_a_process_that_is_killed():
    work = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = f"from dataForTrain.make_dataset import map_in_processes; [*map_in_processes(2, exec, 2 * [{work!r}])]"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as first:
        workers = [psutil.Process(int(first.stdout.readline())) for _ in range(2)]
        first.kill()
    assert not psutil.wait_procs(workers, timeout=30)[1]
