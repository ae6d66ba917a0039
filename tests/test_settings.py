"""key=value settings, folders written whole or not at all, and errors in one line."""

import contextlib
import errno
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from ldm.files import find_path, fresh_folder, output_folder, report_folder, whole_folder, write_whole
from ldm.schema import read_config, write_yaml
from ldm.settings import (
    InputError,
    Settings,
    check_numbers,
    check_used,
    override,
    read_settings,
    run_script,
    split_arguments,
)

DEFAULTS = dict(
    name="a", steps=10, rate=0.5, locked=True, control=[-4.0], names=[], scale=None, n_prompt=None, seeds=None
)


TEXTS = ["a ${seed} b", "costs ${", "${oc.env:HOME}", "photo #3", "???", "2024-05-01", "1:30"]


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("name=runs/x", "runs/x"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("steps=3", 3),
        ("rate=2", 2.0),
        ("rate=1e-3", 1e-3),
        ("locked=false", False),
        ("control=2", [2]),
        ("control=[1, 2.5]", [1, 2.5]),
        ("control=1e-3", [1e-3]),
        ("names=[angle, zoom]", ["angle", "zoom"]),
        ("scale=9", 9),
        ("scale=a text", "a text"),
        ("scale=[1, 2]", [1, 2]),
        ("scale=None", None),
        ("steps=1e3", 1000),
        ("steps=010", 10),  # not in base eight
        ("scale=010", 10),
        ("seeds={a: [1, 2]}", {"a": [1, 2]}),
        ("locked=yes", True),
        # what is text stays that text
        *((f"{key}={text}", text) for key in ("name", "n_prompt", "scale") for text in TEXTS),
        *((f"n_prompt={text}", text) for text in ("5", "yes", "[a]", "1e-3", "a: b", "")),
        ("n_prompt=None", None),
    ],
)
def test_value_takes_the_type_of_its_default(argument, expected):
    key = argument.partition("=")[0]
    s = override(DEFAULTS, [argument])
    assert s == {**DEFAULTS, key: expected} and type(s[key]) is type(expected)


def test_without_arguments_the_defaults_stand_and_are_not_shared():
    s = override(DEFAULTS, [])
    s.control.append(1.0)
    s.name = "b"
    assert DEFAULTS["control"] == [-4.0] and DEFAULTS["name"] == "a"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("stesp=3", r'unknown setting "stesp" \(did you mean "steps"\?\)'),
        ("qqqq=3", r"known: name, steps, rate"),
        ("--steps=3", r'"--steps" \(did you mean "steps"\?\)'),
        ("steps", "expected key=value"),
        ("steps=2.5", 'setting "steps": expected a whole number, got 2.5'),
        ("steps=many", "expected a whole number"),
        ("rate=fast", "expected a finite number"),
        ("rate=[1, 2", "expected a finite number"),
        ("locked=1", "expected true or false"),
        ("rate=inf", 'setting "rate": expected a finite number, got Infinity'),
        ("rate=1e999", "expected a finite number"),
        ("rate=" + "9" * 400, "expected a finite number"),
        ("scale=nan", "expected a finite number"),
        ("steps=", 'setting "steps"'),
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
            assert not (tmp_path / "out" / "file").exists() or text == "new"  # not before it is whole
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["out/file", "out/sub/new"] and (tmp_path / "out" / "file").read_text() == "new"


def test_whole_folder_leaves_nothing_of_a_body_that_raises(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path) as folder:
        (folder / "file").write_text("half")
        (folder / "other").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("make", [output_folder, lambda path: whole_folder(path).__enter__()])
def test_unwritable_folder_is_named(unwritable, make):
    with pytest.raises(InputError, match=f"{unwritable}: cannot be written"):
        make(unwritable)
    with pytest.raises(InputError, match="cannot be written"):
        make(unwritable.parent)  # a file where the folder should be


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read as YAML .No such file"),
        ("a: [1", "cannot be read as YAML"),
        ("{[a]: 1}", "cannot be read as YAML"),
        ("&a {b: *a}", "cannot be read as YAML"),
        ("a: \x07", "cannot be read as YAML"),
        ("a: !!int x", "cannot be read as YAML"),
        ("- 1\n- 2\n", "expected a YAML mapping"),
        (b"\xff\xfe\x00", "cannot be read as YAML"),
        ("a: ${", "cannot be read as YAML"),
        ("a: 1\na: 2", "cannot be read as YAML"),
    ],
)
def test_broken_yaml_is_named(tmp_path, content, message):
    file = tmp_path / "model.yaml"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"model.yaml: {message}"):
        read_config(file)


def test_nothing_is_too_deep_to_be_answered(tmp_path):
    deep = "[" * 500 + "]" * 500
    assert override(DEFAULTS, [f"scale={deep}"]).scale == deep
    (tmp_path / "deep.yaml").write_text(deep)
    with pytest.raises(InputError, match="deep.yaml: cannot be read as YAML"):
        read_config(tmp_path / "deep.yaml")


class TestYaml:
    def test_texts_stay_what_they_are(self, tmp_path):
        (tmp_path / "a.yaml").write_text("a: a ${x} of ???\nb: 2024-05-01\nc: ['yes', '${oc.env:HOME}']\n")
        expected = dict(a="a ${x} of ???", b="2024-05-01", c=["yes", "${oc.env:HOME}"])
        assert read_config(tmp_path / "a.yaml") == expected

    @pytest.mark.parametrize("value", ["1e-3", "010", "null", "None", "yes", "${x}", "a: b #c", "é\u2028\x85", " a "])
    def test_what_is_written_is_what_is_read(self, tmp_path, value):
        values = Settings(key=value, inner=dict(list=[value, 1, 1e-3, None, True]))
        write_yaml(values, tmp_path / "a.yaml")
        assert read_config(tmp_path / "a.yaml") == values

    def test_a_byte_order_mark_is_no_part_of_it(self, tmp_path):
        (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfbase: x\n")
        assert read_config(tmp_path / "a.yaml") == {"base": "x"}

    def test_code_is_not_run(self, tmp_path):
        (tmp_path / "a.yaml").write_text("base: !!python/object/apply:os.getcwd []\n")
        with pytest.raises(InputError, match="cannot be read as YAML"):
            read_config(tmp_path / "a.yaml")


class TestChecks:
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, True, "1", [1], 0])
    @pytest.mark.parametrize("kind, what", [(float, "a finite number"), (int, "a whole number")])
    def test_what_is_no_such_number_is_named(self, kind, what, value):
        with pytest.raises(InputError, match=f'setting "n": expected {what}, at least 1, got '):
            check_numbers(Settings(n=value), kind, n=(1, math.inf))

    def test_halves_are_refused_where_whole_numbers_are_needed(self):
        with pytest.raises(InputError, match='setting "n": expected a whole number from 1 to 9, got 2.5'):
            check_numbers(Settings(n=2.5), int, n=(1, 9))
        check_numbers(Settings(n=2, m=None), int, n=(1, 9), m=(1, 9), other=(1, 9))

    def test_what_has_no_effect_is_named(self):
        check_used(DEFAULTS, DEFAULTS, "here", "rate")
        with pytest.raises(InputError, match='setting "rate": has no effect here; leave it out'):
            check_used(override(DEFAULTS, ["rate=2"]), DEFAULTS, "here", "rate")


class TestArguments:
    def test_an_equals_sign_in_a_path_makes_no_setting(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "epoch=276-step=27700.ckpt").touch()
        arguments = ["steps=3", "epoch=276-step=27700.ckpt", "runs/lr=0.1/out"]
        assert split_arguments(arguments, DEFAULTS, ("IN", "OUT")) == (arguments[1:], arguments[:1])

    @pytest.mark.parametrize("arguments", [[], ["in"], ["in", "out", "more"], ["in", "steps=3"]])
    def test_too_few_or_too_many_paths_are_named(self, arguments):
        with pytest.raises(InputError, match="expected 2 paths, IN OUT, got"):
            split_arguments(arguments, DEFAULTS, ("IN", "OUT"))

    def test_a_misspelt_setting_is_no_path(self):
        paths, others = split_arguments(["in", "stesp=3"], DEFAULTS, ("IN", "OUT"))
        with pytest.raises(InputError, match='unknown setting "stesp"'):
            override(DEFAULTS, others)


def test_settings_that_are_computed_are_shown_as_they_stand(tmp_path):
    (tmp_path / "a.py").write_text('"""A."""\nsettings = dict(\n    # how\n    rate=10**-3,  # of it\n    n=None,\n)\n')
    settings, docstring = read_settings(tmp_path / "a.py")
    assert settings == {"rate": ("10 ** (-3)", "of it"), "n": (None, "")} and docstring == "A."
    override({key: default for key, (default, _) in settings.items()}, ["rate=2", "n=3"])


class TestRunScript:
    def test_ctrl_c_is_one_line(self, capsys):
        def main(s):
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(SystemExit) as exit_info:
            run_script(main, DEFAULTS, [], resume="start it again")
        assert exit_info.value.code == 130 and capsys.readouterr().err == "\nstopped; start it again\n"

    def test_a_full_disk_is_one_line(self, fails_in_one_line):
        def main(s):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.txt")

        assert fails_in_one_line(main, {}, []) == "error: a.txt: cannot be read or written (No space left on device)"

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes."),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 16 bytes."),
            MemoryError(),
        ],
    )
    def test_what_does_not_fit_into_memory_is_one_line_with_its_remedy(self, error, fails_in_one_line):
        def main(s):
            raise error

        line = fails_in_one_line(main, dict(save_memory=False, draws=8, seed=0), [])
        assert line.startswith("error: out of memory") and "save_memory=true draws=4" in line


class TestPaths:
    def test_home_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.png").touch()
        assert find_path("~/a.png") == tmp_path / "a.png" and output_folder("~/out") == tmp_path / "out"
        assert fresh_folder("~/new") == tmp_path / "new" and not (tmp_path / "new").exists()

    def test_what_is_missing_is_called_as_it_was_typed(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_path("a.png") == Path("a.png") and find_path("models/tiny.yaml").is_absolute()

    @pytest.mark.parametrize("call", [find_path, output_folder, fresh_folder])
    def test_a_name_that_is_too_long_is_named(self, call):
        with pytest.raises(InputError, match=r"a: cannot be (read|written) \(File name too long\)"):
            call("a" * 300)


def snapshot(folder):
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


class TestFreshFolder:
    def test_what_is_there_is_kept_unless_told_otherwise(self, tmp_path):
        assert fresh_folder(tmp_path) == tmp_path
        for name in (".hidden", "unet", "mine"):
            (tmp_path / name).mkdir()
        with pytest.raises(InputError, match="has mine, unet in it already; choose another folder, or give overwr"):
            fresh_folder(tmp_path)
        assert fresh_folder(tmp_path, overwrite=True) == fresh_folder(tmp_path, own=["mine", "unet"]) == tmp_path
        with pytest.raises(InputError, match="choose another folder$"):
            fresh_folder(tmp_path, overwrite=True, never=["unet"])

    def test_what_is_read_is_never_written_over(self, tmp_path):
        with pytest.raises(InputError, match="which is read"):
            fresh_folder(tmp_path, overwrite=True, inputs=[tmp_path / "a.png"])

    @pytest.mark.parametrize(
        "report, own", [(None, True), ('{"history": []}', True), ('{"mine": 1}', False), ("", False)]
    )
    def test_only_reports_of_the_same_script_are_replaced(self, tmp_path, report, own):
        (tmp_path / "other.txt").touch()
        if report is not None:
            (tmp_path / "result.json").write_text(report)
        expected = pytest.raises(InputError, match="has a result.json that is not of this script")
        with contextlib.nullcontext() if own else expected:
            report_folder(tmp_path, "result.json", "history", "figure.png")

    def test_a_figure_without_its_report_is_somebody_elses(self, tmp_path):
        (tmp_path / "figure.png").touch()
        with pytest.raises(InputError, match="figure.png"):
            report_folder(tmp_path, "result.json", "history", "figure.png")


class TestWriting:
    """Whole or not at all, whatever happens."""

    @pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("fails", range(1, 9))
    def test_a_swap_that_fails_leaves_the_old(self, tmp_path, monkeypatch, fails, error):
        (tmp_path / "a").mkdir()
        for name in ("a/old", "b", "gone", "other"):
            (tmp_path / name).write_text("old")
        before, replace, calls = snapshot(tmp_path), os.replace, []

        def failing(source, target):
            calls.append(source)
            if len(calls) == fails and error is OSError:
                raise OSError(errno.EIO, "Input/output error")
            replace(source, target)
            if len(calls) == fails:
                raise error

        monkeypatch.setattr(os, "replace", failing)
        try:
            with whole_folder(tmp_path, removes=["gone"]) as folder:
                (folder / "a").mkdir()
                for name in ("a/new", "b", "c"):
                    (folder / name).write_text("new")
        except (InputError, KeyboardInterrupt) as raised:
            assert str(raised) == (f"{tmp_path}: cannot be written (Input/output error)" if error is OSError else "")
            assert snapshot(tmp_path) == before
        else:
            assert len(calls) < fails  # three old away, three new in
            after = {str(name): text for name, text in snapshot(tmp_path).items()}
            assert after == {"a": False, "a/new": b"new", "b": b"new", "c": b"new", "other": b"old"}

    def test_a_control_is_known_only_while_all_of_it_is_there(self, tmp_path, monkeypatch):
        """Wherever a swap is killed: the file by which a control is known is there with all the others, or is not."""
        names, seen, replace = ["config.json", "diffusion_pytorch_model.safetensors", "model.yaml"], [], os.replace

        def watched(source, target):
            replace(source, target)
            seen.append({name: (tmp_path / name).read_text() for name in names if (tmp_path / name).exists()})

        monkeypatch.setattr(os, "replace", watched)
        for text in ("old", "new"):
            with whole_folder(tmp_path) as folder:
                for name in names:
                    (folder / name).write_text(text)
        known = [files for files in seen if "config.json" in files]
        assert known == [dict.fromkeys(names, "old"), dict.fromkeys(names, "new")] and len(seen) == 9

    WRITERS = {
        "text": lambda file: file.write_text("x" * 10**5),
        "picture": lambda file: Image.effect_noise((99, 99), 99).save(file, "png"),
        "safetensors": lambda file: safetensors.torch.save_file({"a": torch.zeros(9999)}, file),
        "torch": lambda file: torch.save({"a": torch.zeros(9999)}, file),
    }

    @pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
    def test_a_full_disk_is_named_and_the_old_stays(self, tmp_path, write, small_disk):
        (tmp_path / "file").write_text("old")
        before = snapshot(tmp_path)
        with small_disk(), pytest.raises(InputError, match=f"{tmp_path}/file: cannot be written "):
            write_whole(tmp_path / "file", write)
        assert snapshot(tmp_path) == before
        if write is self.WRITERS["torch"]:
            return  # writes checkpoints alone, which are files
        expected = pytest.raises(InputError, match=f"{tmp_path}: cannot be written ")
        with small_disk(), expected, whole_folder(tmp_path) as folder:
            write(folder / "file")
        assert snapshot(tmp_path) == before
        with small_disk(), pytest.raises(InputError), whole_folder(tmp_path / "new") as folder:
            write(folder / "file")
        assert snapshot(tmp_path) == before

    def test_everybody_may_read_what_the_umask_allows(self, tmp_path):
        weights = {"a": torch.zeros(1)}
        with whole_folder(tmp_path / "out") as folder:
            (folder / "unet").mkdir(mode=0o700)
            safetensors.torch.save_file(weights, folder / "unet" / "a")
        write_whole(tmp_path / "b", lambda file: safetensors.torch.save_file(weights, file))
        (tmp_path / "ordinary").touch()
        ordinary = (tmp_path / "ordinary").stat().st_mode
        assert (tmp_path / "out" / "unet" / "a").stat().st_mode == (tmp_path / "b").stat().st_mode == ordinary
        assert (tmp_path / "out" / "unet").stat().st_mode == (tmp_path / "out").stat().st_mode
