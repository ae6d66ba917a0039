"""Stable Diffusion through every script, into diffusers' pipeline, out to a file, in little memory."""

import json
import math
import re

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import invert
import test5
import test5_s1
import tool_add_control
import tool_export_control
import tutorial_train
from cldm.controlnet import NumericControlNet
from cldm.conversion import add_control, export_control, fit_statistics
from cldm.dataset import read_data
from cldm.model import Sampling, Target, load_base, load_model, save_model
from ldm.base import LatentDiffusion
from ldm.checkpoints import original_key, read_weights
from ldm.files import ROOT
from ldm.schema import read_config, write_yaml
from ldm.settings import InputError, Settings, override, run_script
from tests.conftest import randomize_zero_convolutions
from tests.original_layout import original_weights

SIZE = 64  # pixels


def add(*arguments, **overrides):
    paths, overrides = list(map(str, arguments)), [f"{key}={value}" for key, value in overrides.items()]
    run_script(lambda s: tool_add_control.main(s, paths), tool_add_control.settings, overrides)


@pytest.fixture
def base_file(folder, tmp_path):
    """The YAML of a narrow Stable Diffusion in one file of the original layout, and that file."""
    file = tmp_path / "narrow.safetensors"
    save_file(original_weights(LatentDiffusion.from_pretrained(folder)), file)
    name = "cldm_v15" if "sd1" in folder.name else "cldm_v21"
    config = read_config(ROOT / "models" / f"{name}.yaml")
    own = dict(
        base=str(file), architecture=str(folder), image_size=SIZE, precision="float32", prediction_type="epsilon"
    )
    write_yaml(config | own, tmp_path / "narrow.yaml")
    return tmp_path / "narrow.yaml", file


@pytest.fixture
def model(folder):
    base, config = load_base(folder)
    torch.manual_seed(3)
    model = add_control(base, config, control_dim=2, hint="coordinate")
    randomize_zero_convolutions(model.control_net, 0.3)
    return model.requires_grad_(False).eval()


@pytest.mark.slow
def test_all_scripts_take_it(base_file, folder, version, write_dataset, tmp_path):
    """1 as a single file, by its YAML; 2 as a folder."""
    data = write_dataset([1, 2, 3], size=SIZE)
    add(base_file[0] if version == 1 else folder, tmp_path / "fresh")
    arguments = ["max_steps=2", "batch_size=2", "accelerator=cpu", "devices=1", "precision=32-true", "save_memory=true"]
    paths = [f"resume_path={tmp_path / 'fresh'}", f"data_root={data}", f"out_dir={tmp_path / 'trained'}"]
    run_script(tutorial_train.main, tutorial_train.settings, [*arguments, *paths])
    target = data / "prompt.json_1.png"
    for script in test5, test5_s1, invert:
        out_dir = tmp_path / script.__name__
        own = (
            [] if script is invert else [f"input_image_path={target}", "iterations=2", "ddim_steps=2", "num_samples=1"]
        )
        arguments = [f"model_path={tmp_path / 'trained'}", f"target_image_path={target}", "prompt=x", "device=cpu"]
        run_script(script.main, script.settings, [*arguments, *own, f"out_dir={out_dir}"])
        assert (out_dir / "figure.png").exists() and json.loads((out_dir / "result.json").read_text())["loss"] > 0


def test_a_folder_is_known_by_its_architecture(folder):
    config = load_base(folder)[1]
    assert config.image_size == SIZE and config.base == str(folder.resolve())


@pytest.mark.parametrize("guess_mode", [False, True])
def test_the_pipeline_of_diffusers_draws_the_same_picture(model, tmp_path, normal, guess_mode):
    """With from_pretrained, unmodified, on the same noise; the control as a tensor of (1, d, 1, 1)."""
    model.control_net.save_pretrained(tmp_path)
    base, latents = model.base, normal(1, 4, SIZE // 8, SIZE // 8)
    embeddings, negative = base.embed(["a cup"]), base.embed(["dark"])
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=None,
        unet=base.unet,
        controlnet=NumericControlNet.from_pretrained(tmp_path),
        scheduler=type(base.scheduler).from_config(base.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    control = torch.tensor([[3.0, -2.0]])
    drawn = pipeline(
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative,
        image=control[:, :, None, None],
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        guidance_scale=5.0,
        controlnet_conditioning_scale=0.8,
        latents=latents,
        guess_mode=guess_mode,
        output_type="pt",
    ).images
    noise, target = latents.expand(5, 1, -1, -1, -1), Target(embeddings, negative=negative)
    sampling = Sampling(4, scale=5.0, strength=0.8, eta=0.0, guess_mode=guess_mode)
    ours, other = (base.decode(model.generate(noise, c, target, sampling)) / 2 + 0.5 for c in (control, -control))
    assert (drawn - ours.clamp(0, 1)).abs().mean() < 1e-5 < (ours - other).abs().mean()


def test_saving_memory_changes_nothing_but_memory(model, normal):
    noise, embeddings, negative = normal(4, 2, 4, 8, 8), normal(2, 77, 16), normal(2, 77, 16)

    def gradient():
        control = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        kept = {}  # what is kept for the backward pass: the bytes of every storage
        keep = lambda tensor: kept.update({tensor.data_ptr(): tensor.nbytes}) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            drawn = model.generate(noise, control, Target(embeddings, negative=negative), Sampling(3, scale=4.0))
            (gradient,) = torch.autograd.grad(drawn.square().sum(), control)
            return drawn.detach(), gradient, sum(kept.values())

    *expected, before = gradient()
    model.save_memory = True
    *found, after = gradient()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert after < 0.4 * before


def test_a_base_in_half_precision_reads_the_same(model, normal):
    latents, embeddings, control = normal(2, 4, 8, 8), normal(2, 77, 16), normal(2, 2)
    expected = model.predict(latents, 500, embeddings, control)
    model.base.unet.bfloat16()
    assert model.predict(latents, 500, embeddings, control).dtype == torch.float32
    torch.testing.assert_close(model.predict(latents, 500, embeddings, control), expected, rtol=0.05, atol=0.05)


def test_a_control_in_half_precision_keeps_its_number(model, tmp_path, normal):
    """A number that half precision could not tell from another still changes what is drawn."""
    save_model(model, tmp_path)
    write_yaml(model.config | {"precision": "bfloat16"}, tmp_path / "model.yaml")
    half = load_model(tmp_path)
    assert half.base.unet.dtype == half.control_net.dtype == torch.bfloat16
    hint = half.control_net.controlnet_cond_embedding
    maps = torch.tensor([[[[100.0]], [[0.0]]], [[[100.1]], [[0.0]]]]).expand(-1, -1, 8, 8)
    hint.dtype = torch.float32
    assert not torch.equal(*hint(maps))


def forks_weights(model, latent_size):
    """Returns: the original fork's file of a Stable Diffusion with a control: its MLP has ReLU after every layer."""
    torch.manual_seed(4)
    fork = add_control(model.base, Settings(model.config | {"image_size": 8 * latent_size}), hint="original")
    randomize_zero_convolutions(fork.control_net)
    control = {f"control_model.{original_key(k, 2)}": v for k, v in fork.control_net.state_dict().items()}
    return {**original_weights(model.base), **control}


def test_what_the_original_fork_trained_is_taken_over(model, folder, tmp_path, normal):
    weights = forks_weights(model, 5)
    assert "control_model.mlp.fc3.bias" in weights
    save_file(weights, tmp_path / "fork.safetensors")
    config = dict(base=str(tmp_path / "fork.safetensors"), architecture=str(folder), prediction_type="epsilon")
    write_yaml(model.config | config, tmp_path / "fork.yaml")
    add(tmp_path / "fork.yaml", tmp_path / "taken", control_range="[-5,5]")
    taken = load_model(tmp_path / "taken")
    assert taken.config.image_size == 40 and taken.control_net.config.control_high == [5.0]
    hint = taken.control_net.controlnet_cond_embedding
    found = hint(taken.control_net.normalize(torch.tensor([[-3.0]]))[:, :, None, None].expand(-1, -1, 5, 5))
    expected = originals_hint(weights, -3.0, 5)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)  # saved in half precision


@pytest.mark.parametrize("version", [1], indirect=True)
@pytest.mark.parametrize("control_range", [None, "[-5,5]"])
def test_what_the_original_fork_trained_keeps_its_statistics(model, folder, tmp_path, normal, control_range):
    """Its MLP was trained on numbers as they are, whatever it is then trained on."""
    save_file(forks_weights(model, 5), tmp_path / "fork.safetensors")
    config = dict(base=str(tmp_path / "fork.safetensors"), architecture=str(folder), prediction_type="epsilon")
    write_yaml(model.config | config, tmp_path / "fork.yaml")
    add(tmp_path / "fork.yaml", tmp_path / "taken", **({"control_range": control_range} if control_range else {}))
    taken = load_model(tmp_path / "taken")
    inputs = normal(1, 4, 5, 5), 500, normal(1, 77, 16), torch.tensor([[3.0]])
    before = taken.predict(*inputs)
    fit_statistics(taken.control_net, [(1.0,), (3.0,), (8.0,)], ["angle"], ["degrees"])
    assert torch.equal(taken.predict(*inputs), before)
    assert (taken.control_net.config.control_mean, taken.control_net.config.control_std) == ([0.0], [1.0])
    assert taken.control_net.config.control_high == [8.0]


def originals_hint(weights, numbers, latent_size):
    """Returns: (1, 8, latent_size, latent_size), what the original's code makes of one or more numbers, as they are."""
    hidden = torch.tensor([numbers]).view(1, -1)
    for i in 1, 2, 3:
        weight, bias = (weights[f"control_model.mlp.fc{i}.{kind}"].float() for kind in ("weight", "bias"))
        hidden = torch.nn.functional.linear(hidden, weight, bias).relu()
    return hidden.reshape(1, 8, latent_size, latent_size)


def test_what_the_original_has_no_layers_for_is_not_exported(make_model, tmp_path):
    model = make_model(hint="original", proposals=2)
    export_control(model.control_net, tmp_path / "control.safetensors")
    assert not [key for key in load_file(tmp_path / "control.safetensors") if "proposal" in key]
    model.control_net.register_to_config(class_embed_type="projection")
    with pytest.raises(InputError, match="modulated=true"):
        export_control(model.control_net, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def export(model, tmp_path, name="control"):
    save_model(model, tmp_path / name)
    file = tmp_path / f"{name}.safetensors"
    paths = [str(tmp_path / name), str(file)]
    run_script(tool_export_control.main, tool_export_control.settings, paths, paths=tool_export_control.PATHS)
    return file


@pytest.mark.parametrize("version", [1], indirect=True)
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (20.0, 0.5), (2015.0, 5.0), (3.0, 1e9)])
def test_the_original_computes_the_same_of_an_exported_file(model, tmp_path, mean, std):
    """Its MLP takes the number as it is, ours the normalised one."""
    torch.manual_seed(5)
    model = add_control(model.base, Settings(model.config | {"image_size": 40}), hint="original")
    randomize_zero_convolutions(model.control_net)
    model.control_net.register_to_config(control_mean=[mean], control_std=[std], control_names=["angle"])
    weights = read_weights(export(model, tmp_path))
    own = load_model(tmp_path / "control").control_net
    number = mean + 1.5 * std
    ours = own.controlnet_cond_embedding(own.normalize(torch.tensor([[number]]))[:, :, None, None].expand(-1, -1, 5, 5))
    torch.testing.assert_close(originals_hint(weights, number, 5), ours, rtol=1e-2, atol=1e-2 * ours.max().item())
    converted = convert_controlnet_checkpoint(
        {key.removeprefix("control_model."): tensor for key, tensor in weights.items()}, model.base.unet.config
    )
    assert {key for key in own.state_dict() if ".mlp." not in key} <= converted.keys()
    assert all(torch.equal(t.float(), own.state_dict()[key]) for key, t in converted.items() if "cond" not in key)
    with safe_open(tmp_path / "control.safetensors", "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    assert (config["control_names"], config["control_mean"], config["control_std"]) == (["angle"], [0.0], [1.0])


@pytest.mark.parametrize("version", [1], indirect=True)
def test_an_exported_periodic_number_is_given_as_sine_and_cosine(model, tmp_path):
    how = dict(control_dim=2, periods=[None, 10.0], hint="original")
    model = add_control(model.base, Settings(model.config | {"image_size": 40}), **how)
    model.control_net.register_to_config(control_mean=[2.0, 5.0], control_std=[3.0, 2.9])
    weights, own = read_weights(export(model, tmp_path)), load_model(tmp_path / "control").control_net
    phase, condition = 2 * math.pi * 0.7, own.normalize(torch.tensor([[4.0, 7.0]]))[:, :, None, None]
    ours = own.controlnet_cond_embedding(condition.expand(-1, -1, 5, 5))
    theirs = originals_hint(weights, [4.0, math.sin(phase), math.cos(phase)], 5)
    torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2 * ours.max().item())


def test_an_exported_file_beside_its_base_is_taken_over(model, folder, tmp_path, normal):
    own = add_control(model.base, Settings(model.config | {"image_size": 40}), hint="original")
    randomize_zero_convolutions(own.control_net)
    own.control_net.register_to_config(control_mean=[2.0], control_std=[0.5])
    save_file(original_weights(model.base) | read_weights(export(own, tmp_path)), tmp_path / "both.safetensors")
    config = dict(base=str(tmp_path / "both.safetensors"), architecture=str(folder), prediction_type="epsilon")
    write_yaml(model.config | config, tmp_path / "both.yaml")
    add(tmp_path / "both.yaml", tmp_path / "back")
    inputs = normal(1, 4, 5, 5), 500, normal(1, 77, 16), torch.tensor([[3.0]])
    with torch.no_grad():
        before, after = (load_model(tmp_path / name).predict(*inputs) for name in ("control", "back"))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", [1], indirect=True)
@pytest.mark.parametrize("hint", ["dense", "coordinate", "reference"])
def test_what_the_original_cannot_compute_is_not_exported(model, hint, tmp_path, fails_in_one_line):
    save_model(add_control(model.base, model.config, hint=hint), tmp_path / "control")
    paths = [str(tmp_path / "control"), str(tmp_path / "control.safetensors")]
    assert f"hint={hint} is not in the original" in fails_in_one_line(
        lambda s: tool_export_control.main(s, paths), tool_export_control.settings, []
    )
    assert not (tmp_path / "control.safetensors").exists()


@pytest.mark.parametrize("version", [1], indirect=True)
def test_what_is_trained_begins_as_the_base_has_it(model, folder, write_dataset, tmp_path):
    """And goes out so, whatever the precision of what stays frozen."""
    write_yaml(model.config | {"base": str(folder), "precision": "bfloat16"}, tmp_path / "base.yaml")
    add(tmp_path / "base.yaml", tmp_path / "control", hint="original")
    weights = tutorial_train.make_model(
        override(tutorial_train.settings, [f"resume_path={tmp_path / 'control'}", "sd_locked=false"]),
        read_data(write_dataset([1.0, 2.0])),
    )
    exact = LatentDiffusion.from_pretrained(folder).unet
    assert weights.base.vae.dtype == torch.bfloat16
    assert all(torch.equal(t, exact.state_dict()[name]) for name, t in weights.base.unet.state_dict().items())
    own = weights.control_net.state_dict()
    half = exact.conv_in.weight.half()
    assert torch.equal(own["conv_in.weight"], half.float()) and not torch.equal(half, half.bfloat16().half())
    exported = read_weights(export(weights, tmp_path, "out"))
    assert torch.equal(exported["control_model.input_blocks.0.0.weight"], half)


@pytest.mark.parametrize("version", [1], indirect=True)
def test_only_the_middle_acts_outside_too(model, tmp_path, normal):
    own = add_control(model.base, Settings(model.config | {"image_size": 40}), hint="original")
    randomize_zero_convolutions(own.control_net)
    own.control_net.register_to_config(only_mid_control=True)
    inputs = dict(encoder_hidden_states=normal(1, 77, 16), controlnet_cond=torch.tensor([[3.0]]))
    for as_dict in (True, False):
        result = own.control_net(normal(1, 4, 5, 5), 500, **inputs, return_dict=as_dict)
        down, mid = result.to_tuple() if as_dict else result
        assert not any(part.any() for part in down) and mid.any()
    weights = read_weights(export(own, tmp_path))
    assert not any(t.any() for key, t in weights.items() if "zero_convs" in key)
    assert weights["control_model.middle_block_out.0.weight"].any()


@pytest.mark.parametrize("version", [1], indirect=True)
def test_a_control_whose_unet_was_trained_is_not_exported(model, tmp_path, fails_in_one_line):
    own = add_control(model.base, Settings(model.config | {"image_size": 40}), hint="original")
    own.own_unet = True
    save_model(own, tmp_path / "control")
    paths = [str(tmp_path / "control"), str(tmp_path / "control.safetensors")]
    line = fails_in_one_line(lambda s: tool_export_control.main(s, paths), tool_export_control.settings, [])
    assert "its UNet was trained, too" in line and not (tmp_path / "control.safetensors").exists()


@pytest.mark.parametrize("version", [1], indirect=True)
def test_a_weight_beyond_half_precision_is_kept(model, tmp_path):
    with torch.no_grad():
        model.control_net.conv_in.bias[0] = 70000.0
        model.base.unet.conv_out.bias[0] = 1e5
    model.own_unet = True
    save_model(model, tmp_path)
    read = load_model(tmp_path)
    assert read.control_net.conv_in.bias[0] == 70000.0 and read.base.unet.conv_out.bias[0] == 1e5
    write_yaml(model.config | {"precision": "float16"}, tmp_path / "model.yaml")
    with pytest.raises(InputError, match="conv_in.bias; float16 ends at 65504"):
        load_model(tmp_path)


def only(*names):
    return lambda weights: {k: v for k, v in weights.items() if "control_model" not in k or any(n in k for n in names)}


def without(*names):
    return lambda weights: {k: v for k, v in weights.items() if not any(f"control_model.{n}" in k for n in names)}


@pytest.mark.parametrize("version", [1], indirect=True)
@pytest.mark.parametrize(
    "change, told",
    [
        (without("zero_convs"), "not a whole NumericControlNet .no weights for zero_convs.0.0"),
        (without("mlp.fc2"), "expected mlp.fc1 to mlp.fc3"),
        (without("mlp.fc1.bias"), "no weights for mlp.fc1.bias"),
        (without("middle_block."), "no weights for middle_block."),
        (only("mlp"), "not a whole NumericControlNet"),
        (without("mlp"), "holds a ControlNet on pictures; encoder=.* starts from its encoder"),
        (lambda weights: weights | {"control_model.mlp.fc2.bias": torch.zeros(5)}, "does not fit NumericControlNet"),
        (lambda weights: weights | {"control_model.mlp.fc3.bias": torch.full([200], torch.inf)}, "not finite"),
    ],
)
def test_a_control_in_the_original_layout_is_taken_whole_or_not_at_all(
    model, folder, version, change, told, tmp_path, fails_in_one_line
):
    save_file(change(forks_weights(model, 5)), tmp_path / "fork.safetensors")
    config = dict(base=str(tmp_path / "fork.safetensors"), architecture=str(folder), prediction_type="epsilon")
    write_yaml(model.config | config, tmp_path / "fork.yaml")
    paths = [str(tmp_path / "fork.yaml"), str(tmp_path / "out")]
    line = fails_in_one_line(lambda s: tool_add_control.main(s, paths), tool_add_control.settings, [])
    assert re.search(told, line) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", ["v_prediction", "epsilon"])
def test_what_a_base_is_told_to_predict_stays_with_its_control(base_file, tmp_path, said):
    add(base_file[0], tmp_path / "out", prediction_type=said)
    assert load_model(tmp_path / "out").base.scheduler.config.prediction_type == said


@pytest.mark.parametrize("version", [2], indirect=True)
def test_a_file_as_input_is_told_what_it_predicts(model, tmp_path, fails_in_one_line):
    """What its YAML says is of another file."""
    save_file(original_weights(model.base), tmp_path / "sd2.safetensors")
    script, paths = tool_add_control, [tmp_path / "sd2.safetensors", tmp_path / "out"]
    line = fails_in_one_line(script.main, script.settings, paths, paths=script.PATHS)
    assert "set prediction_type" in line and "tool_add_control.py" in line
    line = fails_in_one_line(script.main, script.settings, [*paths, "prediction_type=velocity"], paths=script.PATHS)
    assert "expected epsilon or v_prediction, or null, got" in line


def test_an_encoder_in_the_original_layout_is_a_starting_point(model, folder, tmp_path):
    """Lvmin's files hold a hint CNN too, which has no place here."""
    weights = forks_weights(model, 8)
    encoder = {k: v + 1 for k, v in weights.items() if k.startswith("control_model.") and ".mlp." not in k}
    encoder["control_model.input_hint_block.0.weight"] = torch.zeros(16, 3, 3, 3)
    save_file(encoder, tmp_path / "control.safetensors")
    add(folder, tmp_path / "out", encoder=tmp_path / "control.safetensors")
    start = load_model(tmp_path / "out").control_net.conv_in.bias
    torch.testing.assert_close(start, weights["control_model.input_blocks.0.0.bias"] + 1, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", [1], indirect=True)
def test_a_control_of_another_base_is_refused(model, base_yaml, picture, fails_in_one_line, tmp_path):
    save_model(model, tmp_path / "control")
    other = model.config | {"base": read_config(base_yaml).base}
    write_yaml(other, tmp_path / "control" / "model.yaml")
    arguments = [f"model_path={tmp_path / 'control'}", f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    assert "made for another base" in fails_in_one_line(invert.main, invert.settings, arguments)
    (tmp_path / "empty").mkdir()
    arguments = [f"base={tmp_path / 'empty'}", f"out_dir={tmp_path / 'trained'}"]
    assert "no vae/ in it" in fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)


def test_a_device_that_is_not_there_is_named(control_folder, picture, fails_in_one_line, tmp_path):
    arguments = [f"model_path={control_folder}", f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    assert '"device": nowhere' in fails_in_one_line(test5.main, test5.settings, [*arguments, "device=nowhere"])
