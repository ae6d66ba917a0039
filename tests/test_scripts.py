"""The scripts: what they leave, and one line and exit code 2 for whatever the user got wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

import generate
import invert
import test5
import test5_s1
import tool_add_control
import tool_calibrate
import tool_export_control
import tool_train_base
import tutorial_train
from benchmarks import base, drawn, inversion, odd_inputs, pairs, sampling_inversion, stable_diffusion
from cldm.model import load_model, save_model
from dataForTrain import make_dataset
from ldm.files import ROOT, digest
from ldm.schema import read_config, write_yaml
from ldm.settings import read_settings, run_script
from tests.conftest import another_run

MODULES = {
    f"{module.__name__.replace('.', '/')}.py": module
    for module in (
        *(test5, test5_s1, invert, generate, tutorial_train),
        *(tool_add_control, tool_calibrate, tool_export_control, tool_train_base),
        *(make_dataset, base, drawn, inversion, odd_inputs, pairs, sampling_inversion, stable_diffusion),
    )
}
FOLDERS = (ROOT, ROOT / "benchmarks", ROOT / "dataForTrain")
FILES = [file for folder in FOLDERS for file in folder.glob("*.py")]
SCRIPTS = sorted(str(file.relative_to(ROOT)) for file in FILES if "\n    answer(__file__" in file.read_text())
INFERENCE = pytest.mark.parametrize("script", [test5, test5_s1], ids=lambda module: module.__name__)


def nothing_in(folder):
    return not folder.exists() or not any(path.is_file() for path in folder.rglob("*"))


@pytest.fixture
def out_dir(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def arguments(control_folder, picture, out_dir):
    """Arguments of an inference that works, and soon ends; later ones win."""
    pictures = [f"input_image_path={picture}", f"target_image_path={picture}"]
    return [f"model_path={control_folder}", f"out_dir={out_dir}", *pictures, "iterations=2", "ddim_steps=3"]


class TestBeforeTheImports:
    """What every script answers within a moment: torch is not imported for it."""

    @pytest.fixture
    def call(self, tmp_path):
        """call(script, *arguments) -> the finished process, in which importing torch is a mistake."""
        (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")

        def call(script, *arguments, **environment):
            command = [sys.executable, str(ROOT / script), *arguments]
            environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80", **environment}
            return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

        return call

    @pytest.mark.parametrize("script", SCRIPTS)
    def test_help_has_the_docstring_and_every_setting_with_its_comment(self, script, call):
        done = call(script, "-h", "seeed=1")
        settings, docstring = read_settings(ROOT / script)
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(docstring)
        for key, (default, comment) in settings.items():
            told = done.stdout[done.stdout.index(f"\n  {key}={default}") :]
            assert " ".join(told.split()).startswith(f"{key}={default} {comment}".strip())
        assert max(map(len, done.stdout[len(docstring) :].splitlines())) <= 80

    @pytest.mark.parametrize("script, name", [("test5_s1.py", "warm_steps"), ("tool_add_control.py", "hint")])
    def test_a_misspelt_setting_is_named(self, script, name, call):
        done = call(script, *["in", "out"][: 2 * script.startswith("tool")], f"{name}x=1")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == f'error: unknown setting "{name}x" (did you mean "{name}"?)\n'

    def test_without_arguments_the_usage_is_shown(self, call):
        done = call("tool_export_control.py")
        assert done.returncode == 2 and "tool_export_control.py MODEL" in done.stderr and "  overwrite=" in done.stderr

    def test_help_can_be_read_on_any_console(self, call):
        done = call("tool_export_control.py", "--help", PYTHONIOENCODING="ascii")
        assert "control_model.input_blocks.?)" in done.stdout

    def test_ctrl_c_in_the_midst_of_the_imports_is_no_traceback(self, call, tmp_path):
        (tmp_path / "torch.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
        )
        done = call("test5.py")
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # which a shell calls 130


def test_the_settings_that_help_shows_are_those_of_the_script():
    """Help reads them from the source."""
    for file, script in MODULES.items():
        assert {key: default for key, (default, *_) in read_settings(ROOT / file)[0].items()} == script.settings


CONTROL = ("model.yaml", "config.json", "diffusion_pytorch_model.safetensors", "unet")
DATASET = ("prompt.json", "validation.json", "controls.yaml", "resultData")
BASE = ("unet", "text_encoder", "scheduler")
OUTPUTS = {  # of every script: what it writes, and how it is told where
    "tool_add_control.py": (CONTROL, ["models/tiny_sd", "{}"]),
    "tool_export_control.py": (["a.safetensors"], ["models/control_tiny", "{}/a.safetensors"]),
    "tool_train_base.py": (BASE, ["out_dir={}"]),
    "tutorial_train.py": ((*CONTROL, *BASE[1:], *DATASET, "last", "pictures"), ["out_dir={}"]),
    "dataForTrain/make_dataset.py": (DATASET, ["out_dir={}"]),
    "dataForTrain/make_dataset.py views": (DATASET, ["out_dir={}", "views=1"]),
    "dataForTrain/make_dataset.py pairs": (DATASET, ["out_dir={}", "pairs=1"]),
    "test5.py": (["result.json", "figure.png"], ["out_dir={}"]),
    "test5_s1.py": (["result.json", "figure.png"], ["out_dir={}"]),
    "generate.py": (["controls.json", "control_001.png", "strip.png"], ["out_dir={}"]),
    "invert.py": (["result.json", "figure.png"], ["out_dir={}"]),
    "invert.py targets": (
        ["settings.yaml", "results.jsonl", "results.csv", "series.png"],
        ["out_dir={}", "targets=dataForTrain/prompt.json"],
    ),
    "invert.py figures": (["00001_a.png"], ["out_dir={}", "targets=dataForTrain/prompt.json", "figures=true"]),
    "benchmarks/inversion.py": (["results.jsonl", "plot.png"], ["out_dir={}"]),
    "benchmarks/sampling_inversion.py": (["results.jsonl"], ["out_dir={}"]),
    "benchmarks/pairs.py": (["errors.json"], ["out_dir={}"]),
    "benchmarks/base.py": (["results.json", "kinds.jpg"], ["out_dir={}"]),
    "benchmarks/drawn.py": (["results.json", "unseen", "readings"], ["out_dir={}"]),
    "benchmarks/stable_diffusion.py": (["measured.json", "1.5", "2.1"], ["out_dir={}"]),
    "benchmarks/odd_inputs.py": (["cases.json", "pictures", "formulas"], ["out_dir={}"]),
}


@pytest.mark.parametrize("call, name", [(call, name) for call, (names, _) in OUTPUTS.items() for name in names])
def test_no_script_replaces_what_it_did_not_make(call, name, tmp_path, fails_in_one_line):
    """Each of its outputs, alone in a folder: refused before any work, and nothing changes."""
    script, arguments = MODULES[call.split()[0]], [part.format(tmp_path) for part in OUTPUTS[call][1]]
    if Path(name).suffix in (".json", ".jsonl", ".yaml", ".png", ".safetensors"):
        (tmp_path / name).write_text("mine")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "000001.png").write_text("mine")
    before = digest([tmp_path])
    line = fails_in_one_line(script.main, script.settings, arguments, paths=getattr(script, "PATHS", ()))
    assert str(tmp_path) in line and "choose another" in line and digest([tmp_path]) == before


class TestOverwrite:
    def run(self, script, *arguments):
        run_script(script.main, script.settings, [*map(str, arguments)], paths=getattr(script, "PATHS", ()))

    @pytest.mark.parametrize("more", [[], ["overwrite=true"]], ids=["", "overwrite"])
    def test_a_base_is_never_made_a_control(self, base_yaml, tmp_path, fails_in_one_line, more):
        base, other = tmp_path / "mini_sd", tmp_path / "other"
        for folder in (base, other):
            shutil.copytree(base_yaml.parent / "mini_sd", folder)
        shutil.copy(base_yaml, base / "base.yaml")
        before, script = digest([base, other]), tool_add_control
        for source, target in ((base, base), (base, other), (base / "base.yaml", base), (base, tmp_path)):
            paths = [str(source), str(target), *more]
            assert "choose another" in fails_in_one_line(script.main, script.settings, paths, paths=script.PATHS)
        assert digest([base, other]) == before
        line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, [f"out_dir={base}", *more])
        assert "choose another" in line and digest([base, other]) == before

    def test_a_control_is_never_made_a_base(self, control_folder, fails_in_one_line):
        before, arguments = digest([control_folder]), [f"out_dir={control_folder}", "overwrite=true"]
        assert "choose another" in fails_in_one_line(tool_train_base.main, tool_train_base.settings, arguments)
        assert digest([control_folder]) == before

    def test_a_dataset_is_never_trained_into(self, write_dataset, fails_in_one_line):
        arguments = ["data_root={0}", "out_dir={0}", "overwrite=true"]
        arguments = [part.format(write_dataset([1, 2])) for part in arguments]
        assert "which is read" in fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)

    def test_a_control_is_replaced_when_told_to_be(self, base_yaml, control_folder):
        (control_folder / "unet").mkdir()
        (control_folder / "mine.txt").write_text("mine")
        self.run(tool_add_control, base_yaml, control_folder, "overwrite=true", "control_dim=3")
        assert load_model(control_folder).control_net.control_dim == 3 and not (control_folder / "unet").exists()
        assert (control_folder / "mine.txt").read_text() == "mine"

    def test_a_dataset_is_replaced_as_a_whole(self, tmp_path, fails_in_one_line, small_disk):
        self.run(make_dataset, "photos=coffee", "image_size=16", f"out_dir={tmp_path}")
        before = digest([tmp_path])
        again = ["photos=coffee", "angles=[1]", "overwrite=true", f"out_dir={tmp_path}"]
        with small_disk():
            line = fails_in_one_line(make_dataset.main, make_dataset.settings, again)  # its pictures are too large
        assert line == f"error: {tmp_path}: cannot be written (File too large)" and digest([tmp_path]) == before
        self.run(make_dataset, *again, "image_size=8")
        assert [path.name for path in (tmp_path / "resultData").iterdir()] == ["coffee_+1.png"]
        assert not (tmp_path / "validation.json").exists()

    def test_pictures_are_not_cut_from_what_is_replaced(self, tmp_path, fails_in_one_line, picture):
        (tmp_path / "resultData").mkdir()
        picture.rename(tmp_path / "resultData" / "a.png")
        arguments = ["pairs=1", f"photos={tmp_path / 'resultData'}", f"out_dir={tmp_path}", "overwrite=true"]
        assert "which is read" in fails_in_one_line(make_dataset.main, make_dataset.settings, arguments)

    def test_an_exported_file_is_replaced_when_told_to_be(
        self, control_folder, make_model, tmp_path, fails_in_one_line
    ):
        save_model(make_model(hint="original"), control_folder)
        script, file = tool_export_control, tmp_path / "new" / "a.safetensors"
        for more in ([], ["overwrite=true"]):
            self.run(script, control_folder, file, *more)
        paths = [control_folder, file]
        line = fails_in_one_line(script.main, script.settings, paths, paths=script.PATHS)
        assert "has a.safetensors in it already" in line
        paths = [control_folder, control_folder / WEIGHTS, "overwrite=true"]
        assert "choose another folder" in fails_in_one_line(script.main, script.settings, paths, paths=script.PATHS)

    def test_a_full_disk_leaves_a_control_whole(self, control_folder, base_yaml, fails_in_one_line, small_disk):
        before, script = digest([control_folder]), tool_add_control
        paths = [base_yaml, control_folder, "overwrite=true", "control_dim=3"]
        with small_disk():
            line = fails_in_one_line(script.main, script.settings, paths, paths=script.PATHS)
        assert f"{control_folder}: cannot be written" in line and digest([control_folder]) == before


@pytest.mark.parametrize(
    "control_range", ["5", "abc", "[a,b]", "[5,-5]", "-5,5", "[1]", "[1,2,3]", "[.inf,5]", "true", "{a: 1}"]
)
def test_a_range_that_is_none_is_named(fails_in_one_line, tmp_path, control_range):
    arguments, script = ["in", str(tmp_path / "out"), f"control_range={control_range}"], tool_add_control
    line = fails_in_one_line(script.main, script.settings, arguments, paths=script.PATHS)
    assert line.startswith('error: setting "control_range": expected [low, high], two numbers, or null, got ')


@pytest.mark.parametrize(
    "given",
    ["denoise_strength=0.001 ddim_steps=32", "warm_denoise_strength=0.001"],
)
def test_steps_that_the_schedule_has_not_are_named_before_any_is_taken(given, arguments, out_dir, fails_in_one_line):
    line = fails_in_one_line(test5_s1.main, test5_s1.settings, [*arguments, *given.split()])
    assert "of a noise schedule of 1000 timesteps: at most" in line and nothing_in(out_dir)


@INFERENCE
@pytest.mark.parametrize("control", [[1.0], [1.0, -2.0]], ids=["one number", "two numbers"])
def test_inference_leaves_a_report_and_a_figure(script, control, arguments, out_dir, make_model, tmp_path):
    save_model(make_model(len(control)), tmp_path / "control")
    warm = ["warm_steps=2"] if script is test5_s1 else []
    run_script(script.main, script.settings, [*arguments, *warm, f"control={control}", "seed=5", "scale=2"])
    report = json.loads((out_dir / "result.json").read_text())
    assert sorted(report) == sorted(["control", "start", "loss", "flags", "iterations", "seconds", "seed", "history"])
    assert report["start"] == (control if len(control) > 1 else control[0])
    assert type(report["control"]) is type(report["start"]) and report["control"] != report["start"]
    assert (report["iterations"], report["seed"], len(report["history"])) == (2, 5, 2)
    assert report["history"][-1] == {"control": report["control"], "loss": report["loss"]}
    assert report["loss"] > 0 and report["seconds"] > 0
    with Image.open(out_dir / "figure.png") as figure:
        assert figure.format == "PNG" and figure.width > figure.height > 100
    assert sorted(path.name for path in out_dir.iterdir()) == ["figure.png", "result.json"]


def remove(*names):
    def spoil(folder):
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def cut(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def drop_weights(name):
    """A file of weights that can be read but lacks one of them."""

    def spoil(folder):
        weights = safetensors.torch.load_file(folder / name)
        del weights[sorted(weights)[-1]]
        safetensors.torch.save_file(weights, folder / name, {"format": "pt"})

    return spoil


WEIGHTS = "diffusion_pytorch_model.safetensors"
SPOILT_CONTROLS = {
    "no folder": shutil.rmtree,
    "no model.yaml": remove("model.yaml"),
    "no config.json": remove("config.json"),
    "no weights": remove(WEIGHTS),
    "half the weights": cut(WEIGHTS),
    "one weight missing": drop_weights(WEIGHTS),
    "half the config.json": cut("config.json"),
    "no YAML": write("model.yaml", "base: ["),
    "empty YAML": write("model.yaml", ""),
    "half a unet": lambda folder: (folder / "unet").mkdir(),
}
SPOILT_BASES = {
    "no folder": shutil.rmtree,
    "no unet": remove("unet"),
    "no vae": remove("vae"),
    "no text_encoder": remove("text_encoder"),
    "no scheduler": remove("scheduler"),
    "half the scheduler": cut("scheduler/scheduler_config.json"),
    "no weights": remove(f"vae/{WEIGHTS}"),
    "half the weights": cut(f"unet/{WEIGHTS}"),
    "one weight missing": drop_weights(f"unet/{WEIGHTS}"),
    "half the words": cut("text_encoder/model.safetensors"),
    "one word missing": drop_weights("text_encoder/model.safetensors"),
}


@pytest.mark.parametrize("spoil", SPOILT_CONTROLS.values(), ids=SPOILT_CONTROLS)
def test_incomplete_control_is_named(arguments, control_folder, out_dir, fails_in_one_line, spoil):
    spoil(control_folder)
    assert str(control_folder) in fails_in_one_line(test5.main, test5.settings, arguments)
    assert nothing_in(out_dir)


@pytest.mark.parametrize("key", ["base", "image_size", "a_prompt"])
def test_model_yaml_without_a_key_is_named(arguments, control_folder, out_dir, fails_in_one_line, key):
    config = read_config(control_folder / "model.yaml")
    del config[key]
    write_yaml(config, control_folder / "model.yaml")
    assert key in fails_in_one_line(test5.main, test5.settings, arguments)
    assert nothing_in(out_dir)


@pytest.mark.parametrize("spoil", SPOILT_BASES.values(), ids=SPOILT_BASES)
def test_incomplete_base_is_named(base_yaml, tmp_path, fails_in_one_line, spoil):
    folder = tmp_path / "mini_sd"
    shutil.copytree(base_yaml.parent / "mini_sd", folder)
    spoil(folder)

    def main(s):
        tool_add_control.main(s, [str(folder), str(tmp_path / "control")])

    assert str(tmp_path) in fails_in_one_line(main, tool_add_control.settings, [])
    assert not (tmp_path / "control").exists()


@pytest.mark.parametrize(
    "argument, message",
    [
        ("n_prompt=blurred", 'setting "n_prompt": has no effect with scale=1'),
        ("num_samples=2.5", 'setting "num_samples": expected a whole number, got 2.5'),
        ("iterations=1.5", 'setting "iterations": expected a whole number, got 1.5'),
        ("scale=inf", 'setting "scale": expected a finite number'),
        ("device=meta", 'setting "device": meta cannot be used'),
        (f"target_image_path={'a' * 300}", "a: cannot be read (File name too long)"),
        ("target_image_path=there/is/no.png", "error: there/is/no.png: no such file"),
        ("control=[1,2]", "error: control: "),
        ("control=[]", "error: control: "),
        ("control=nan", "error: control: expected finite numbers"),
        ("control=[1,abc]", "error: control: expected finite numbers"),
        ("iterations=0", "iterations"),
        ("ddim_steps=0", "ddim_steps"),
        ("ddim_steps=1001", "ddim_steps"),
        ("denoise_strength=0", "denoise_strength"),
        ("denoise_strength=1.5", "denoise_strength"),
        ("learning_rate=fast", "learning_rate"),
        ("eta=much", "eta"),
        ("scale=[1]", "scale"),
    ],
)
def test_bad_value_is_named(arguments, out_dir, fails_in_one_line, argument, message):
    assert message in fails_in_one_line(test5.main, test5.settings, [*arguments, argument])
    assert nothing_in(out_dir)


@pytest.mark.parametrize("key", ["input_image_path", "target_image_path"])
@pytest.mark.parametrize("content", [None, "", "no picture"], ids=["missing", "empty", "text"])
def test_bad_picture_is_named(arguments, out_dir, tmp_path, fails_in_one_line, key, content):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_text(content)
    assert f"{path}: " in fails_in_one_line(test5.main, test5.settings, [*arguments, f"{key}={path}"])
    assert nothing_in(out_dir)


@pytest.mark.parametrize("script", [test5, invert, generate, tutorial_train, make_dataset, tool_train_base])
def test_unwritable_out_dir_is_named(script, unwritable, fails_in_one_line):
    line = fails_in_one_line(script.main, script.settings, [f"out_dir={unwritable}"])
    assert f"{unwritable}: cannot be written" in line


def test_unwritable_output_of_a_fresh_control_is_named(base_yaml, unwritable, fails_in_one_line):
    script = tool_add_control
    line = fails_in_one_line(script.main, script.settings, [base_yaml, unwritable], paths=script.PATHS)
    assert f"{unwritable}: cannot be written" in line


@pytest.mark.parametrize(
    "argument, message",
    [
        ("control_dim=0", "control_dim"),
        ("control_dim=1.5", "control_dim"),
        ("control_range=[-5,5]", 'setting "control_range": has no effect without a trained control in INPUT'),
        ("control_dim=-1", "control_dim"),
        ("periods=10", 'setting "periods": expected a list of length 1'),
        ("periods=[10,null]", 'setting "periods": expected a list of length 1'),
        ("periods=[-10]", 'setting "periods"'),
        ("hint=cnn", "hint"),
    ],
)
def test_add_control_names_a_bad_value(base_yaml, tmp_path, fails_in_one_line, argument, message):
    arguments, script = [base_yaml, tmp_path / "control", argument], tool_add_control
    line = fails_in_one_line(script.main, script.settings, arguments, paths=script.PATHS)
    assert message in line and not (tmp_path / "control").exists()


class TestTraining:
    @pytest.fixture
    def train_arguments(self, base_yaml, write_dataset, out_dir):
        return [f"data_root={write_dataset([1, 2])}", f"base={base_yaml}", f"out_dir={out_dir}", "max_steps=1"]

    def test_broken_prompt_json_is_named(self, train_arguments, out_dir, tmp_path, fails_in_one_line):
        (tmp_path / "data" / "prompt.json").write_text('{"source": 1, "target": "x.png"}\n')
        line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, train_arguments)
        assert 'data/prompt.json line 1: no "prompt" in it' in line
        assert nothing_in(out_dir)

    @pytest.mark.parametrize(
        "argument, message",
        [
            ("data_root=nowhere", "nowhere/prompt.json: no such file"),
            ("base=nowhere.yaml", "nowhere.yaml: cannot be read as YAML (No such file or directory)"),
            ("resume_path=nowhere", "nowhere: no model.yaml in it, expected the out_dir of a training"),
            ("resume_path=nowhere hint=coordinate", 'setting "hint": has no effect with resume_path'),
            ("controls=[zoom]", 'setting "controls": has no effect without pairs'),
            ("out_dir={}/killed data_root=nowhere", "nowhere/prompt.json: no such file"),  # before its first checkpoint
            ("pairs=train", 'setting "data_root": has no effect with pairs'),
            ("accelerator=tpu", "accelerator, devices, num_nodes, strategy or precision: "),
            ("strategy=fsdp", 'setting "strategy": expected auto or ddp, got fsdp'),
            ("num_nodes=0", "num_nodes"),
            ("learning_rate=inf", "learning_rate"),
            ("batch_size=0.5", "batch_size"),
            ("hint=cnn", 'got "cnn"'),
            ("fusion=none", 'setting "fusion": expected affine or attention or both, got "none"'),
            ("fusion=both", 'setting "fusion": has no effect without references'),
            ("proposals=-1", "proposals"),
            ("max_steps=2 proposal_steps=1", 'setting "proposal_steps": the control has no proposal'),
            ("proposals=2 proposal_steps=1000000", "proposal_steps"),
            ("batch_size=0", "batch_size"),
            ("max_steps=0", "max_steps"),
            ("logger_freq=0", "logger_freq"),
            ("precision=17", "17"),
        ],
    )
    def test_bad_value_is_named(self, train_arguments, out_dir, tmp_path, fails_in_one_line, argument, message):
        for left in ("tensorboard", "pictures"):
            (tmp_path / "killed" / left).mkdir(parents=True)
        argument = argument.replace("{}", str(tmp_path))
        line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, [*train_arguments, *argument.split()])
        assert message in line and nothing_in(out_dir)

    def test_yaml_without_a_picture_size_is_named(self, train_arguments, base_yaml, tmp_path, fails_in_one_line):
        (tmp_path / "base.yaml").write_text(f"base: {base_yaml.parent / 'mini_sd'}\n")
        arguments = [*train_arguments, f"base={tmp_path / 'base.yaml'}"]
        line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)
        assert 'base.yaml: no "image_size" in it' in line


def test_scripts_work_from_any_folder(arguments, out_dir, tmp_path, monkeypatch):
    """Given paths are of the folder one stands in, the defaults' of the repository."""
    monkeypatch.chdir(tmp_path)
    relative = [a.replace(f"={tmp_path}/", "=") for a in arguments if not a.startswith("target_image_path")]
    assert all(str(tmp_path) not in argument for argument in relative)
    run_script(test5.main, test5.settings, relative)
    assert (out_dir / "result.json").is_file() and Path.cwd() == tmp_path


def test_a_control_is_calibrated_anew(control_folder, write_dataset, capsys, fails_in_one_line):
    model = load_model(control_folder)
    model.control_net.register_to_config(control_low=[0.0], control_high=[7.0])
    save_model(model, control_folder)
    weights = (control_folder / WEIGHTS).read_bytes()
    data = f"data_root={write_dataset(range(8))}"
    run_script(tool_calibrate.main, tool_calibrate.settings, [str(control_folder), data], paths=("MODEL_PATH",))
    config = load_model(control_folder).control_net.config
    assert (
        len(config.error_scale) == 1 and config.explained_loss > 0 and config.sampling_loss > 0 and config.probes >= 8
    )
    assert (control_folder / WEIGHTS).read_bytes() == weights
    assert "error bars come from 1 validation picture(s)" in capsys.readouterr().out


def test_other_numbers_do_not_calibrate_a_control(control_folder, write_dataset, fails_in_one_line):
    """By count, range of those that are read for it, or unit."""
    model = load_model(control_folder)
    model.control_net.register_to_config(control_low=[0.0], control_high=[7.0])
    save_model(model, control_folder)

    def refused(sources, validation=None, **said):
        folder = write_dataset(sources)
        if validation:
            write_dataset(validation, file="validation.json")
        if said:
            write_yaml(said, folder / "controls.yaml")
        own = dict(arguments=[control_folder, f"data_root={folder}"], paths=("MODEL_PATH",))
        return fails_in_one_line(tool_calibrate.main, tool_calibrate.settings, **own)

    for line in (
        refused([[1, 2], [3, 4]]),
        refused(range(8), names=["control"], units=["radians"]),
        refused(range(8), range(1000, 1012), names=["control"], units=[""]),
    ):
        assert "not what" in line and "reads, control from [0.0] to [7.0]" in line


def test_subjects_that_a_control_does_not_know_do_not_calibrate_it(control_folder, write_dataset, fails_in_one_line):
    model = load_model(control_folder)
    model.control_net.register_to_config(control_low=[0.0], control_high=[7.0], prompts=["a photo of a leather bag"])
    save_model(model, control_folder)
    own = dict(arguments=[control_folder, f"data_root={write_dataset(range(8))}"], paths=("MODEL_PATH",))
    line = fails_in_one_line(tool_calibrate.main, tool_calibrate.settings, **own)
    assert "none of its prompts" in line and "a photo of a leather bag" in line


def test_two_runs_do_not_share_a_folder(arguments, out_dir, control_folder, fails_in_one_line):
    with another_run(out_dir):
        assert "another run" in fails_in_one_line(test5.main, test5.settings, arguments)
    with another_run(control_folder):
        own = dict(arguments=[control_folder], paths=("MODEL_PATH",))
        assert "another run" in fails_in_one_line(tool_calibrate.main, tool_calibrate.settings, **own)
