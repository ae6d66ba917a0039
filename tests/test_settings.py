"""key=value settings, folders written whole or not at all, and errors in one line."""

import sys

import pytest
from omegaconf import OmegaConf

from ldm.files import output_folder, whole_folder
from ldm.settings import InputError, override, read_yaml, run_script

DEFAULTS = dict(name="a", steps=10, rate=0.5, locked=True, control=[-4.0], names=[], scale=None)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("name=runs/x", "runs/x"),
        ("name=5", "5"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("steps=3", 3),
        ("steps=-3", -3),
        ("rate=2", 2.0),
        ("rate=1e-3", 1e-3),
        ("rate=1E-3", 1e-3),
        ("locked=false", False),
        ("locked=True", True),
        ("control=2", [2]),
        ("control=-2.5", [-2.5]),
        ("control=[1, 2.5]", [1, 2.5]),
        ("control=1e-3", [1e-3]),
        ("names=[angle, zoom]", ["angle", "zoom"]),
        ("names=angle", ["angle"]),
        ("scale=9", 9),
        ("scale=1e-3", 1e-3),
        ("scale=null", None),
        ("scale=a text", "a text"),
        ("scale=[1, 2]", [1, 2]),
    ],
)
def test_value_takes_the_type_of_its_default(argument, expected):
    key = argument.partition("=")[0]
    s = OmegaConf.to_container(override(DEFAULTS, [argument]))
    assert s == {**DEFAULTS, key: expected} and type(s[key]) is type(expected)


def test_without_arguments_the_defaults_stand_and_are_not_shared():
    s = override(DEFAULTS, [])
    s.control.append(1.0)
    s.name = "b"
    assert DEFAULTS["control"] == [-4.0] and DEFAULTS["name"] == "a"


def test_the_last_of_two_wins():
    assert override(DEFAULTS, ["steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize(
    "argument, message",
    [
        ("stesp=3", r'unknown setting "stesp" \(did you mean "steps"\?\)'),
        ("lokced=1", r'"locked"'),
        ("qqqq=3", r"known: name, steps, rate"),
        ("--steps=3", r'"--steps" \(did you mean "steps"\?\)'),
        ("steps", "expected key=value"),
        ("steps=2.5", 'setting "steps": expected int, got "2.5"'),
        ("steps=many", "expected int"),
        ("steps=true", "expected int"),
        ("steps=[3]", "expected int"),
        ("rate=fast", "expected float"),
        ("rate=true", "expected float"),
        ("rate=[1, 2", "expected float"),
        ("locked=1", "expected bool"),
        ("locked=maybe", "expected bool"),
        ("steps=", 'setting "steps"'),
        ("rate=null", 'setting "rate"'),
        ("locked=null", 'setting "locked"'),
    ],
)
def test_mistake_is_named_with_its_remedy(argument, message):
    with pytest.raises(InputError, match=message):
        override(DEFAULTS, [argument])


def test_run_script_turns_an_input_error_into_one_line(fails_in_one_line):
    def main(s):
        raise InputError(f"steps: {s.steps} are too many")

    assert fails_in_one_line(main, DEFAULTS, ["steps=99"]) == "error: steps: 99 are too many"
    assert 'did you mean "steps"' in fails_in_one_line(main, DEFAULTS, ["step=99"])


def test_run_script_reads_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "steps=7"])
    seen = []
    run_script(lambda s: seen.append(s.steps), DEFAULTS)
    assert seen == [7]


def test_run_script_lets_a_bug_be_seen():
    def main(s):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main, DEFAULTS, [])


def test_whole_folder_replaces_earlier_files_and_folders(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
            (folder / "file").write_text(text)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["out/file", "out/sub/new"] and (tmp_path / "out" / "file").read_text() == "new"


def test_whole_folder_leaves_nothing_of_a_body_that_raises(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path) as folder:
        (folder / "file").write_text("half")
        (folder / "other").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_whole_folder_shows_nothing_before_it_is_whole(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "out" / "file").exists()
    assert (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("make", [output_folder, lambda path: whole_folder(path).__enter__()])
def test_unwritable_folder_is_named(unwritable, make):
    with pytest.raises(InputError, match=f"out_dir {unwritable}: cannot be written"):
        make(unwritable)
    with pytest.raises(InputError, match="cannot be written"):
        make(unwritable.parent)  # a file where the folder should be


def test_output_folder_is_made_and_left_empty(tmp_path):
    assert list(output_folder(tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("a: [1", "cannot be read as YAML"),
        ("- 1\n- 2\n", "expected a YAML mapping"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
    ],
)
def test_broken_yaml_is_named(tmp_path, content, message):
    file = tmp_path / "model.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"model.yaml: {message}"):
        read_yaml(file)
