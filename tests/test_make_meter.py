"""Photographs of a meter become a dataset: which are labelled, what stands in the rows, what is refused."""

import json
from datetime import datetime, timedelta

import pytest
from PIL import Image

from cldm.dataset import read_rows
from dataForTrain import make_meter
from ldm.schema import read_config
from ldm.settings import InputError, override

HEAD = "file,dial,time,value,value_from_next_dial"
VALUES = [1.0, 5.5, 1.1, 1.1, 1.1, 3.0, 9.9, 1.2]  # of dial 1, every ten minutes; dial 2 shows one more


def add_lines(folder, lines, head=HEAD):
    (folder / "readings.csv").write_text("\n".join([head, *lines]) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A folder of eight pictures of each of two dials."""
    folder, lines = tmp_path / "meter", []
    for dial, more in ((2, 1), (1, 0)):
        (folder / f"dial{dial}").mkdir(parents=True)
        for i, value in enumerate(VALUES):
            time = datetime(2019, 6, 1, 16) + timedelta(minutes=10 * i)
            file = f"dial{dial}/{time:%H%M}.png"
            Image.new("RGB", (8, 8), (20 * i, 100 * dial, 0)).save(folder / file)
            second = "" if dial == 2 else f"{value + 0.02:.2f}"
            lines.append(f"{file},{dial},{time.isoformat()},{(value + more) % 10:.1f},{second}")
    add_lines(folder, reversed(lines))
    return folder


def run(folder, *arguments):
    """Returns: the rows of prompt.json and of targets.json."""
    out = folder.parent / "out"
    make_meter.main(override(make_meter.settings, [f"folder={folder}", f"out_dir={out}", "overwrite=true", *arguments]))
    return tuple(
        [json.loads(line) for line in (out / f"{n}.json").read_text().splitlines()] for n in ("prompt", "targets")
    )


def labelled_values(folder, *arguments):
    return sorted(row["source"] for row in run(folder, *arguments)[0] if row["prompt"].startswith("dial 1 "))


def test_rows_say_value_time_and_second_truth(folder):
    labelled, targets = run(folder, "labelled=3")
    assert [len(labelled), len(targets)] == [6, 10]
    assert {row["prompt"] for row in labelled} == {"dial 1 of a water meter", "dial 2 of a water meter"}
    assert labelled[0]["time"] == "2019-06-01T16:00:00"
    assert labelled[0]["source"] == 1.0 and labelled[0]["value_from_next_dial"] == 1.02
    assert all(("value_from_next_dial" in row) == (row["prompt"][5] == "1") for row in targets)
    for dial in "12":
        times = [row["time"] for row in targets if row["prompt"][5] == dial]
        assert times == sorted(times) and len(times) == 5
    assert read_config(folder.parent / "out" / "controls.yaml") == dict(names=["value"], units=["of 10"], periods=[10])


def test_every_picture_is_in_one_file(folder):
    run(folder, "labelled=3")
    files = [row.target for name in ("prompt", "targets") for row in read_rows(folder.parent / "out" / f"{name}.json")]
    own = {file.read_bytes() for file in folder.glob("dial*/*.png")}
    assert len(files) == 16 and {file.read_bytes() for file in files} == own and len(own) == 16
    assert sum(file.is_relative_to(folder.parent / "out") for file in files) == 6


def test_labels_are_spread_over_the_circle_or_come_in_time(folder):
    assert labelled_values(folder, "labelled=2") == [1.0, 5.5]
    assert labelled_values(folder, "labelled=3") == [1.0, 3.0, 5.5]  # 9.9 lies 1.1 from 1.0
    assert labelled_values(folder, "labelled=4") == [1.0, 3.0, 5.5, 9.9]
    assert labelled_values(folder, "labelled=4", "order=time") == [1.0, 1.1, 1.1, 5.5]
    left = [row["time"][11:16] for row in run(folder, "labelled=6")[1] if row["prompt"][5] == "1"]
    assert left == ["16:20", "16:40"]  # of three pictures alike, that of 16:30 lies farthest from others in time


def test_a_picture_that_is_listed_twice_is_named(folder):
    lines = (folder / "readings.csv").read_text().splitlines()[1:]
    add_lines(folder, [*lines, ",".join([*lines[0].split(",")[:3], "", ""])])
    with pytest.raises(InputError, match='line 18: dial1/1710.png of dial "1" stands in line 2, too'):
        run(folder, "labelled=3")


def test_times_may_be_of_any_year_and_older_datasets_go(folder):
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "validation.json").write_text("{}")
    add_lines(
        folder, [line.replace("2019-06", "0001-01") for line in (folder / "readings.csv").read_text().splitlines()[1:]]
    )
    assert run(folder, "labelled=3")[0][0]["time"] == "0001-01-01T16:00:00"
    assert not (folder.parent / "out" / "validation.json").exists()


def test_pictures_without_a_label_are_read(folder):
    lines = (folder / "readings.csv").read_text().splitlines()[1:]
    labels = [line.split(",")[3] if "00.png" in line or "50.png" in line else "" for line in lines]
    add_lines(folder, [",".join([*line.split(",")[:3], label, ""]) for line, label in zip(lines, labels)])
    labelled, targets = run(folder, "labelled=3")
    assert [row["source"] for row in labelled if row["prompt"].startswith("dial 1 ")] == [1.0, 3.0, 9.9]
    assert len(targets) == 10 and not any("source" in row for row in targets)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["labelled=8"], 'dial "1" has 8 pictures, 8 with a value; labelled=8 needs as many, and one to read'),
        (["labelled=1"], 'setting "labelled": expected a whole number from 2'),
        (["order=random"], 'setting "order": expected spread or time, got "random"'),
        (["folder="], 'setting "folder": expected a folder of photographs and readings.csv, got ""'),
        (["folder=no/where"], 'setting "folder": expected a folder'),
    ],
)
def test_settings_that_cannot_be_are_named(folder, arguments, message):
    with pytest.raises(InputError, match=message):
        run(folder, *arguments)
    assert not list(folder.parent.glob("out/*"))


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "dial1/1600.png,1,2019-06-01T16:00:00,ten,",
            'line 2: "value" must be a number from 0 to 10, or empty, got "ten"',
        ),
        (
            "dial1/1600.png,1,2019-06-01T16:00:00,10.1,",
            'line 2: "value" must be a number from 0 to 10, or empty, got "10.1"',
        ),
        ("dial1/1600.png,1,2019-06-01T16:00:00", 'dial "1" has 1 pictures, 0 with a value; labelled=2 needs'),
        ("dial1/1600.png", 'line 2: "time" must be like 2019-06-01T16:10:12, got ""'),
        ("dial1/1600.png,1,2019-06-01T16:00:00,1,x", 'line 2: "value_from_next_dial" must be'),
        ("", "readings.csv: no rows; expected lines of file"),
        ("dial1/1600.png,1,4 pm,1,", 'line 2: "time" must be like 2019-06-01T16:10:12, got "4 pm"'),
        ("dial1/1200.png,1,2019-06-01T16:00:00,1,", "1200.png: no such file, expected a picture"),
    ],
)
def test_bad_lines_are_named(folder, line, message):
    add_lines(folder, [line])
    with pytest.raises(InputError, match=message):
        run(folder, "labelled=2")
    assert not list(folder.parent.glob("out/*"))


def test_missing_columns_and_files_are_named(folder):
    add_lines(folder, [], head="file,dial,time")
    with pytest.raises(InputError, match="no column value, value_from_next_dial; expected file, dial, time, value"):
        run(folder)
    (folder / "readings.csv").unlink()
    with pytest.raises(InputError, match="readings.csv: no such file; expected lines of file, dial, time"):
        run(folder)


def test_times_are_all_alike(folder):
    file = folder / "readings.csv"
    file.write_text(file.read_text().replace("T16:10:00,", "T16:10:00+02:00,"))
    with pytest.raises(InputError, match="readings.csv: some times have an offset from UTC, others none"):
        run(folder, "labelled=3")
