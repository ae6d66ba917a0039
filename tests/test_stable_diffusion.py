"""Stable Diffusion through every script, into diffusers' pipeline, out to a file, in little memory."""

import json

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline
from safetensors import safe_open
from safetensors.torch import save_file

import invert
import test5
import test5_s1
import tool_add_control
import tool_export_control
import tutorial_train
from cldm import memory
from cldm.controlnet import NumericControlNet
from cldm.memory import Estimate, MemoryTracker, checkpointing
from cldm.model import add_control, load_base, load_model, save_model
from cldm.objectives import SamplingObjective
from ldm.base import LatentDiffusion
from ldm.checkpoints import controlnet_weights, original_key, read_weights
from ldm.ddim import ddim_timesteps
from ldm.files import ROOT
from ldm.settings import Settings, read_yaml, run_script, write_yaml
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
    config = read_yaml(ROOT / "models" / f"{name}.yaml")
    own = dict(base=str(file), architecture=str(folder), image_size=SIZE, precision="float32")
    write_yaml(config | own, tmp_path / "narrow.yaml")
    return tmp_path / "narrow.yaml", file


@pytest.fixture
def model(folder):
    base, config = load_base(folder)
    torch.manual_seed(3)
    model = add_control(base, config, control_dim=2, hint="coordinate")
    randomize_zero_convolutions(model.control_net, 0.3)
    return model.requires_grad_(False).eval()


def test_all_scripts_take_it(base_file, folder, version, write_dataset, tmp_path, capsys):
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
    assert capsys.readouterr().out.count("memory: about ") == 4


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
    timesteps = ddim_timesteps(base.scheduler, 4)
    how = dict(negative=negative, scale=5.0, strength=0.8, guess_mode=guess_mode)
    ours = base.decode(model.generate(latents, timesteps, embeddings, control, **how)) / 2 + 0.5
    other = base.decode(model.generate(latents, timesteps, embeddings, -control, **how)) / 2 + 0.5
    assert (drawn - ours.clamp(0, 1)).abs().mean() < 1e-5 < (ours - other).abs().mean()


def test_saving_memory_changes_nothing_but_memory(model, normal):
    latents, embeddings, negative = normal(2, 4, 8, 8), normal(2, 77, 16), normal(2, 77, 16)

    def gradient():
        how = dict(negative=negative, draws=2, ddim_steps=3, scale=4.0, eta=1.0)
        objective = SamplingObjective(model, latents, latents, embeddings, **how)
        with MemoryTracker() as tracker:
            return *objective.gradient(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.arange(2)), tracker

    *expected, before = gradient()
    model.save_memory = True
    *found, after = gradient()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert after.peak < 0.4 * before.peak


def test_an_estimate_is_what_a_run_then_takes(model, normal):
    """Counted on fake tensors before, and on real ones."""
    model.config.image_size = SIZE
    model.control_net.requires_grad_(True)
    estimate = Estimate(model)
    for save_memory in False, True:
        with MemoryTracker() as tracker, checkpointing(model, save_memory):
            loss = model.predict(normal(2, 4, 8, 8), torch.tensor([1, 2]), normal(2, 77, 16), normal(2, 2))
            torch.autograd.grad(loss.square().mean(), list(model.control_net.parameters()), allow_unused=True)
        moments = 2 * memory.bytes_of(model.control_net.parameters())
        needed = estimate.training(2, save_memory=save_memory) - estimate.weights - moments
        assert needed == pytest.approx(max(tracker.peak, estimate.encoding()), rel=0.2)
    model.requires_grad_(False)
    one, two = (estimate.sampling(1, steps, False) for steps in (10, 20))
    assert one < two and estimate.sampling(1, 20, False, True) < one
    assert estimate.weights < estimate.reading(12, 8, True) <= estimate.reading(12, 8)


def test_what_would_make_it_fit_is_said(model, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50)
    Estimate(model).announce(2**40, {"a=1": lambda: 2**39, "a=2": lambda: 20, "a=3": lambda: 10})
    assert "it will not fit; a=2 would need" in capsys.readouterr().out
    Estimate(model).announce(2**40, {})
    assert "smaller image_size" in capsys.readouterr().out


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
    config = dict(base=str(tmp_path / "fork.safetensors"), architecture=str(folder))
    write_yaml(model.config | config, tmp_path / "fork.yaml")
    add(tmp_path / "fork.yaml", tmp_path / "taken", control_range="[-5,5]")
    taken = load_model(tmp_path / "taken")
    assert taken.config.image_size == 40 and taken.control_net.config.control_high == [5.0]
    hidden = torch.tensor([[-3.0]])
    for i in 1, 2, 3:
        weight, bias = (weights[f"control_model.mlp.fc{i}.{kind}"] for kind in ("weight", "bias"))
        hidden = torch.nn.functional.linear(hidden, weight, bias).relu()
    hint = taken.control_net.controlnet_cond_embedding
    found = hint(taken.control_net.normalize(torch.tensor([[-3.0]]))[:, :, None, None].expand(-1, -1, 5, 5))
    torch.testing.assert_close(found, hidden.reshape(1, 8, 5, 5), rtol=1e-2, atol=1e-2)  # saved in half precision


def test_an_exported_file_is_read_back(model, tmp_path, capsys):
    save_model(model, tmp_path / "control")
    file = tmp_path / "control.safetensors"
    paths = [str(tmp_path / "control"), str(file)]
    run_script(tool_export_control.main, tool_export_control.settings, paths, paths=tool_export_control.PATHS)
    read = controlnet_weights(read_weights(file), model.base.unet.config)
    own = load_model(tmp_path / "control").control_net.state_dict()
    assert read.keys() == own.keys() and all(torch.equal(read[key].float(), own[key]) for key in own)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["config"])["hint"] == "coordinate"


def test_an_encoder_in_the_original_layout_is_a_starting_point(model, folder, tmp_path):
    """Lvmin's files hold a hint CNN too, which has no place here."""
    weights = forks_weights(model, 8)
    encoder = {k: v + 1 for k, v in weights.items() if k.startswith("control_model.") and ".mlp." not in k}
    encoder["control_model.input_hint_block.0.weight"] = torch.zeros(16, 3, 3, 3)
    save_file(encoder, tmp_path / "control.safetensors")
    add(folder, tmp_path / "out", encoder=tmp_path / "control.safetensors")
    start = load_model(tmp_path / "out").control_net.conv_in.bias
    torch.testing.assert_close(start, weights["control_model.input_blocks.0.0.bias"] + 1, rtol=1e-3, atol=1e-3)


def test_a_control_of_another_base_is_refused(model, base_yaml, picture, fails_in_one_line, tmp_path):
    save_model(model, tmp_path / "control")
    other = model.config | {"base": read_yaml(base_yaml).base}
    write_yaml(other, tmp_path / "control" / "model.yaml")
    arguments = [f"model_path={tmp_path / 'control'}", f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    assert "made for another base" in fails_in_one_line(invert.main, invert.settings, arguments)
    (tmp_path / "empty").mkdir()
    arguments = [f"base={tmp_path / 'empty'}", f"out_dir={tmp_path / 'trained'}"]
    assert "no vae/ in it" in fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)


def test_a_device_that_is_not_there_is_named(control_folder, picture, fails_in_one_line, tmp_path):
    arguments = [f"model_path={control_folder}", f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    assert '"device": nowhere' in fails_in_one_line(test5.main, test5.settings, [*arguments, "device=nowhere"])
