"""What a control's config.json and a YAML must say, and what a damaged one is told: file, key, expected, found."""

import json
import shutil

import pytest
import torch
from conftest import IMAGE_SIZE
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from cldm.controlnet import check_control
from cldm.model import load_base, load_model, read_model_yaml
from ldm.base import load_part
from ldm.files import ROOT
from ldm.schema import read_config, write_yaml
from ldm.settings import InputError

NAN, INFINITE = float("nan"), float("inf")
GONE = object()
SHIPPED = [f"control_{name}" for name in ("tiny", "tiny_pair", "views")]

# key, value, what it must be
CONFIG = [
    ("hint", "cnn", "coordinate or dense or original or reference"),
    ("hint", GONE, "coordinate or"),
    ("hint_hidden", "wide", "a list of length 2"),
    ("hint_hidden", [256, 0], "at least 1"),
    ("hint_octaves", -1, "at least 0"),
    ("hint_octaves", True, "a whole number"),
    ("latent_size", None, "a whole number with hint=dense"),
    ("control_names", "angle", "a list of length 1"),
    ("control_names", ["a", "b"], "a list of length 1"),
    ("control_names", GONE, "a list of length 1"),
    ("control_units", [None], "each a text"),
    ("control_mean", [NAN], "a finite number"),
    ("control_mean", [10**400], "a finite number"),
    ("control_std", GONE, "a finite number above 0"),
    ("control_std", [0.0], "above 0"),
    ("control_low", [6.0], 'at most "control_high"'),
    ("control_low", None, 'at most "control_high"'),
    ("control_low", [-INFINITE], "a finite number"),
    ("control_high", GONE, 'at most "control_high"'),
    ("periods", [0.0], "above 0, or null"),
    ("periods", [None, 10.0], "a list of length 1"),
    ("error_scale", [-0.1], "at least 0"),
    ("error_floor", [INFINITE], "at least 0"),
    ("explained_loss", "0.03", "at least 0"),
    ("sampling_loss", [0.03], "at least 0"),
    ("prompts", "a cup", "a list, each a text"),
    ("only_mid_control", "sometimes", "true or false"),
    ("_class_name", "ControlNetModel", "expected a NumericControlNet"),
    ("_class_name", GONE, "expected a NumericControlNet"),
]

YAML = [
    ("base", GONE, "expected a text"),
    ("image_size", 0, "at least 1"),
    ("image_size", 128.5, "a whole number"),
    ("a_prompt", None, "a text"),
    ("n_prompt", 7, "a text, in quotes"),
    ("precision", "float99", "float32 or float16 or bfloat16"),
    ("precision", 16, "float32 or float16 or bfloat16"),
    ("prediction_type", "sample", "epsilon or v_prediction"),
    ("architecture", ["models/sd15"], "a text"),
    ("use_ema", "yes please", "true or false"),
    ("sampling", {"scale": 1.0}, 'unknown key "sampling"'),
    ("precison", "bfloat16", 'unknown key "precison" .did you mean "precision"'),
]


def changed(config, key, value):
    """Returns: the config with the key set to the value, or without it."""
    own = {**config, key: value}
    return {k: v for k, v in own.items() if v is not GONE}


@pytest.mark.parametrize("key, value, told", CONFIG, ids=lambda part: "gone" if part is GONE else ascii(part)[:30])
def test_a_damaged_config_is_named(key, value, told, tmp_path):
    config = json.loads((ROOT / "models" / "control_tiny" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(changed(config, key, value)))
    with pytest.raises(InputError, match=f"config.json: .*{told}") as error:
        check_control(tmp_path / "config.json")
    assert ("NumericControlNet" if key == "_class_name" else f'"{key}"') in str(error.value)
    assert value is GONE or key == "_class_name" or "got" in str(error.value)


@pytest.mark.parametrize("key, value, told", YAML, ids=lambda part: "gone" if part is GONE else ascii(part)[:30])
def test_a_damaged_yaml_is_named(key, value, told, tmp_path):
    write_yaml(changed(read_config(ROOT / "models" / "tiny.yaml"), key, value), tmp_path / "model.yaml")
    with pytest.raises(InputError, match=f"model.yaml: .*{told}"):
        read_model_yaml(tmp_path / "model.yaml")


def test_numbers_of_one_name_are_told_apart(tmp_path):
    config = json.loads((ROOT / "models" / "control_views" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"control_names": ["a", "b", "a", "c"]}))
    with pytest.raises(InputError, match='"control_names" must differ'):
        check_control(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"hint": ', "\x00", "[" * 100_000, "version https://git-lfs"])
def test_what_is_no_json_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json: (cannot be read as|expected a) JSON"):
        check_control(tmp_path / "config.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_controls_say_what_they_must(name):
    check_control(ROOT / "models" / name / "config.json")
    read_model_yaml(ROOT / "models" / name / "model.yaml")


@pytest.mark.parametrize("file", sorted((ROOT / "models").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_bases_say_what_they_must(file):
    read_model_yaml(file)


@pytest.mark.parametrize("damaged", ["config.json", "model.yaml"])
def test_a_model_is_checked_when_it_is_loaded(control_folder, damaged, loaded_base):
    file = control_folder / damaged
    if damaged == "model.yaml":
        write_yaml(read_config(file) | {"precision": "float99"}, file)
    else:
        config = json.loads(file.read_text())
        del config["control_std"]
        file.write_text(json.dumps(config))
    for base in None, loaded_base[0]:
        with pytest.raises(InputError, match=damaged):
            load_model(control_folder, base=base)


@pytest.mark.parametrize(
    "key, value",
    [
        ("block_out_channels", "many"),
        ("layers_per_block", None),
        ("norm_num_groups", 0),
        ("in_channels", -4),
        ("hint_hidden", [3, 4]),
        ("hint_octaves", 2),
    ],
)
def test_what_the_network_itself_cannot_be_is_named_too(control_folder, key, value):
    config = json.loads((control_folder / "config.json").read_text())
    (control_folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=r"control: not a whole NumericControlNet \([^()]{4}") as error:
        load_model(control_folder)
    assert "in loading state_dict" not in str(error.value)


def test_weights_that_a_configuration_has_no_place_for_are_named(control_folder):
    file = control_folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"motion_module.weight": torch.ones(1)}, file)
    with pytest.raises(InputError, match="another model than .*, with motion_module.weight"):
        load_model(control_folder)


def test_weights_that_are_not_finite_are_named(make_model, control_folder, base_yaml, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_yaml.parent / "mini_sd", base)
    for cls, folder in (UNet2DConditionModel, base / "unet"), (type(make_model().control_net), control_folder):
        part = load_part(cls, folder)
        part.conv_in.weight.data[1, 2, 0, 0] = NAN
        part.save_pretrained(folder)
    with pytest.raises(InputError, match="base: UNet2DConditionModel has weights that are not finite, conv_in.weight"):
        load_base(base)
    with pytest.raises(InputError, match="control: NumericControlNet has weights that are not finite, conv_in.weight"):
        load_model(control_folder)


def test_a_picture_size_may_be_left_to_the_base(base_yaml, tmp_path):
    write_yaml(read_config(base_yaml) | {"image_size": None}, tmp_path / "open.yml")
    assert load_base(tmp_path / "open.yml")[1].image_size == IMAGE_SIZE
