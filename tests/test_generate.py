"""generate.py: pictures at numbers, a list or a range of them."""

import json

import pytest
from PIL import Image

import generate
from cldm.model import save_model
from ldm.settings import InputError, run_script


@pytest.mark.parametrize(
    "text, names, expected",
    [
        ("3", "a", [[3]]),
        ("+.5", "a", [[0.5]]),
        ("[-5,0,5]", "a", [[-5], [0], [5]]),
        ("-5..5", "a", [[-5], [0], [5]]),
        ("[5,1.1]", "ab", [[5, 1.1]]),
        ("[[5,1],[4,2]]", "ab", [[5, 1], [4, 2]]),
        ("[0,1]..[4,3]", "ab", [[0, 1], [2, 2], [4, 3]]),
    ],
)
def test_control_is_a_number_a_list_or_a_range(text, names, expected):
    assert generate.parse_controls(text, 3, list(names)).tolist() == expected


@pytest.mark.parametrize("text", ["", "x", "[]", "1..", "1...2", "1..[2,3]", "[[1,2]]", "NaN"])
def test_what_is_no_control_is_named(text):
    with pytest.raises(InputError, match='"control": expected 1 number'):
        generate.parse_controls(text, 3, ["a"])


def test_pictures_differ_by_their_numbers_alone(control_folder, tmp_path, fails_in_one_line):
    arguments = [f"model_path={control_folder}", f"out_dir={tmp_path / 'out'}", "ddim_steps=2", "device=cpu", "prompt="]
    run_script(generate.main, generate.settings, [*arguments, "control=[-3,3,-3]"])
    report = json.loads((tmp_path / "out" / "controls.json").read_text())
    first, other, again = (Image.open(tmp_path / "out" / file).tobytes() for file in report["files"])
    run_script(generate.main, generate.settings, [*arguments, "control=3"])
    assert sorted(file.name for file in (tmp_path / "out").glob("control_*")) == ["control_001.png"]
    assert first == again != other and report["controls"] == [[-3], [3], [-3]]
    assert Image.open(tmp_path / "out" / "strip.png").width > 200
    (tmp_path / "out" / "controls.json").unlink()
    line = fails_in_one_line(generate.main, generate.settings, [*arguments, "control=1"])
    assert "not of this script" in line


def test_a_periodic_number_is_named_within_its_circle(make_model, tmp_path, capsys):
    model = make_model(periods=[10.0])
    model.control_net.register_to_config(control_mean=[5.0], control_low=[0.0], control_high=[10.0])
    save_model(model, tmp_path / "control")
    arguments = [f"model_path={tmp_path / 'control'}", f"out_dir={tmp_path / 'out'}", "ddim_steps=2", "prompt="]
    run_script(generate.main, generate.settings, [*arguments, "control=9..11", "count=3"])
    report = json.loads((tmp_path / "out" / "controls.json").read_text())
    assert report["controls"] == [[9], [0], [1]] and "outside_range" not in capsys.readouterr().out


def test_a_control_without_texts_is_given_none_by_default(make_model):
    """The default is a subject of another control, which would lead a drawing away from picture A."""
    model = make_model(2, "reference")
    for known, prompt in (([""], ""), (["a cup", ""], "default"), (None, "default")):
        model.control_net.register_to_config(prompts=known)
        assert model.choose_prompt("default", "default") == prompt and model.choose_prompt("own", "default") == "own"


def test_what_guidance_leads_away_from_needs_guidance(control_folder, fails_in_one_line):
    line = fails_in_one_line(generate.main, generate.settings, [f"model_path={control_folder}", "n_prompt=blurred"])
    assert '"n_prompt": has no effect with scale=1' in line


def test_a_change_needs_its_picture(make_model, picture, tmp_path, fails_in_one_line):
    save_model(make_model(2, "reference"), tmp_path / "control")
    arguments = [f"model_path={tmp_path / 'control'}", f"out_dir={tmp_path / 'out'}", "ddim_steps=2", "control=[1,1]"]
    assert "input_image_path" in fails_in_one_line(generate.main, generate.settings, arguments)
    run_script(generate.main, generate.settings, [*arguments, f"input_image_path={picture}", "prompt="])
    drawn, mine = (tmp_path / "out" / name for name in ("control_001.png", "control_mine.png"))
    mine.write_bytes(drawn.read_bytes())
    assert "input_image_path" in fails_in_one_line(generate.main, generate.settings, arguments)
    assert drawn.read_bytes() == mine.read_bytes()  # neither is lost
    run_script(generate.main, generate.settings, [*arguments, f"input_image_path={picture}", "prompt=", "seed=1"])
    assert drawn.read_bytes() != mine.read_bytes()
