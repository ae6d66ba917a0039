"""`tutorial_train.py check=true`: what is wrong with a dataset, all of it, and what a training would take."""

import json
import re
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import tutorial_train
from cldm.dataset import Row
from cldm.survey import describe_numbers, describe_prompts, tell_subjects
from ldm.settings import InputError, override


@pytest.fixture
def survey(base_yaml, tmp_path):
    """survey(data_root, *arguments) runs the check."""

    def run(data_root, *arguments):
        given = (
            f"data_root={data_root}",
            f"base={base_yaml}",
            f"out_dir={tmp_path / 'out'}",
            "check=true",
            "batch_size=2",
        )
        given += "precision=32-true", "accelerator=cpu", *arguments
        tutorial_train.main(override(tutorial_train.settings, given))

    return run


def test_every_problem_is_named_with_its_line(survey, write_dataset, capsys, tmp_path):
    folder = write_dataset([1, 2, 3, 4, 5, 6])
    lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    lines[1]["source"], lines[2]["source"], lines[3]["target"] = "abc", [1, 2], "none.png"
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    (folder / "validation.json").write_text(json.dumps(lines[0] | {"source": [1, 2]}) + "\n")
    (folder / "controls.yaml").write_text("names: [a, b]\nunits: ['', '']\n")
    with pytest.raises(InputError, match=r"^6 problem\(s\) in "):
        survey(folder)
    told = capsys.readouterr().out
    assert "prompt.json: 7 rows, 3 of them with problems" in told
    for place in (
        "prompt.json line 2: ",
        "prompt.json line 3: ",
        "prompt.json line 7: not JSON",
        "validation.json line 1: ",
    ):
        assert len(re.findall(f"^problem: .*{place}", told, re.MULTILINE)) == 1
    assert re.search("^problem: .*controls.yaml: ", told, re.MULTILINE)
    assert re.search("^problem: .*prompt.json line 4: .*none.png: no such file", told, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_problems_are_named_where_all_lines_have_one(survey, write_dataset, capsys):
    folder = write_dataset([1, 2, 3])
    (folder / "prompt.json").write_text((folder / "prompt.json").read_text().replace('"target"', '"traget"'))
    with pytest.raises(InputError, match=r"^3 problem\(s\) in "):
        survey(folder)
    assert 'prompt.json line 3: no "target" in it' in capsys.readouterr().out


def test_rows_that_contradict_each_other_are_named(survey, write_dataset, capsys):
    folder = write_dataset([1, 2, 3, 4, 5, 6])
    lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    lines += [lines[0], lines[1] | {"source": 7}, lines[2] | {"source": 8}]
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    survey(folder)
    (told,) = re.findall("^warning: (.*) at other numbers, and 1 more", capsys.readouterr().out, re.MULTILINE)
    assert told == f"{folder / 'prompt.json'} line 8 shows what {folder / 'prompt.json'} line 2 shows,"
    (folder / "controls.yaml").write_text("names: [hour]\nunits: [h]\nperiods: [5]\n")  # 2 is 7, 3 is 8
    survey(folder)
    assert "at other numbers" not in capsys.readouterr().out


def test_a_sound_dataset_is_described_and_nothing_is_written(survey, write_dataset, capsys, tmp_path):
    survey(write_dataset([1, 2, 3, 4, 5, 6]))
    told = capsys.readouterr().out
    assert "prompt.json: 6 rows\n" in told and "6 pictures; pictures of 40 x 40 resized to 32 x 32" in told
    assert re.search(
        r"^training takes about \d+ min, [\d.]+ s a step of 2 pictures and [\d.]+ s .*GiB", told, re.MULTILINE
    )
    assert not (tmp_path / "out").exists()


def test_the_forecast_counts_accumulated_batches_and_epochs(survey, write_dataset, capsys, monkeypatch):
    """A batch takes a minute, so do two pictures: ten epochs of six rows in steps of 3 x 2 rows take 30 and 4."""
    write_dataset([1, 2], file="validation.json")
    monkeypatch.setattr("cldm.survey.time", SimpleNamespace(perf_counter=count(0, 60).__next__))
    survey(write_dataset([1, 2, 3, 4, 5, 6]), "accumulate=3", "epochs=10", "devices=1")
    assert "training takes about 34 min, 180.00 s a step of 6 pictures and 30.00 s to" in capsys.readouterr().out
    survey(write_dataset([1, 2, 3, 4, 5, 6]), "proposals=2", "proposal_steps=10", "max_steps=20", "devices=1")
    told = "training takes about 24 min, 60.00 s a step of 2 pictures, 60.00 s one of the proposal alone and 30.00 s to"
    assert told in capsys.readouterr().out


def test_numbers_and_prompts_in_a_few_lines():
    even, two = describe_numbers([(i, i % 2) for i in range(48)], ["angle", "side"])
    assert even == f"angle: |{'█' * 24}| 0 to 47, 48 values"
    assert two.startswith("side: |█" + " " * 22 + "█| 0 to 1, 2 values; two values only")
    (large,) = describe_numbers([(3e16,)] * 3, ["stamp"])  # where histograms of equal bins have none
    assert large.startswith("stamp: |█" + " " * 23 + "| 3e+16 to 3e+16, 1 value")
    lines = describe_prompts(["a"] * 3 + ["b"])
    assert lines == ["2 prompt(s), 2 pictures each (median)", '       3  "a"', '       1  "b"']
    assert describe_prompts([str(i) for i in range(30)])[-1] == "  …"


@pytest.mark.parametrize("periods", [None, [360]])
def test_prompts_that_do_not_separate_subjects_are_named(periods):
    """Two subjects of one prompt, turned alike; the same with a prompt each; and one that only varies at random."""
    random = np.random.default_rng(0)

    def picture(colour, angle, noise=0.0):
        pixels = np.empty((16, 16, 3))
        pixels[:] = colour
        pixels[: 8 + int(angle / 45)] *= 0.7
        return Image.fromarray((pixels + noise * random.normal(size=3)).clip(0, 255).astype("uint8"))

    def told(subjects, noise=0.0):
        rows = [
            Row((angle,), picture(colour, angle, noise), prompt)
            for colour, prompt in subjects
            for angle in np.linspace(0, 315, 8)
        ]
        prompts = [row.prompt for row in rows]
        return tell_subjects(SimpleNamespace(train=rows, prompts=prompts, periods=periods, has_references=False))

    red, blue = (200, 40, 40), (40, 40, 200)
    (line,) = told([(red, "a box"), (blue, "a box")])
    assert line.startswith('warning: under the prompt "a box" several subjects seem to be shown')
    assert told([(red, "a red box"), (blue, "a blue box")]) == told([(red, "a box")]) == []
    assert told([(red, "a box")], noise=30) == []
