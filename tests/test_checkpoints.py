"""Single files in the original layouts: read as what they were written from, and refused where they are not it."""

import pytest
import torch
from diffusers import DDIMScheduler
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from ldm.base import LatentDiffusion
from ldm.settings import InputError
from tests.original_layout import build, original_weights


@pytest.fixture
def weights(folder):
    return original_weights(LatentDiffusion.from_pretrained(folder))


def write(weights, form, path):
    """Write weights as people have them. Returns: the file."""
    if form == "safetensors":
        save_file(weights, path / "base.safetensors")
        return path / "base.safetensors"
    if form == "lightning":  # v1-5-pruned.ckpt: a whole checkpoint, with a class for a key
        weights = {"state_dict": weights, "epoch": 3, "callbacks": {ModelCheckpoint: {"best_model_score": None}}}
    torch.save(weights, path / "base.ckpt")
    return path / "base.ckpt"


@pytest.mark.parametrize("form", ["safetensors", "bare", "lightning"])
def test_a_single_file_is_what_its_folder_is(folder, weights, version, form, tmp_path):
    """Noise prediction, text embedding and decoded picture; the file's name says nothing."""
    original, read = (
        LatentDiffusion.from_pretrained(path, architecture=folder) for path in (folder, write(weights, form, tmp_path))
    )
    normal = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=normal)
    prompts = ["a photo of a cup", ""]
    expected, found = original.embed(prompts), read.embed(prompts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    timesteps = torch.tensor([10, 900])
    pairs = [
        (base.unet(latents, timesteps, expected).sample, base.decode(latents), base.encode(base.decode(latents)))
        for base in (original, read)
    ]
    for one, other in zip(*pairs):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_the_average_is_taken_where_it_is_asked_for(folder, weights, tmp_path):
    averaged = {
        f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in weights.items() if "diffusion" in k
    }
    file = write({**weights, **averaged}, "safetensors", tmp_path)
    plain, average = (LatentDiffusion.from_pretrained(file, architecture=folder, use_ema=ema) for ema in (False, True))
    torch.testing.assert_close(average.unet.conv_in.bias, plain.unet.conv_in.bias + 1)
    with pytest.raises(InputError, match="no averaged weights"):
        LatentDiffusion.from_pretrained(write(weights, "safetensors", tmp_path), architecture=folder, use_ema=True)


class Malicious:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.fixture
def refused(folder, version, capsys):
    """refused(file) -> the one line that a file gets."""

    def check(file):
        with pytest.raises(InputError) as error:
            LatentDiffusion.from_pretrained(file, architecture=folder)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert "this ran" not in capsys.readouterr().out
        return str(error.value)

    return check


def test_files_that_are_not_it_are_refused(refused, weights, version, tmp_path):
    file = tmp_path / "base.ckpt"
    torch.save({"state_dict": weights, "extra": Malicious()}, file)
    assert "would run" in refused(file) and "print" in refused(file)
    for form in "safetensors", "bare":
        whole = write(weights, form, tmp_path)
        file.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert "truncated" in refused(file)
    for kind, key in {
        "Stable Diffusion XL": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "a LoRA": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "a ControlNet in the original layout": "control_model.zero_convs.0.0.weight",
        "weights of an unknown kind": "weight",
    }.items():
        assert f"holds {kind}," in refused(write({key: torch.ones(1)}, "bare", tmp_path))
    other = original_weights(LatentDiffusion(*build(3 - version), DDIMScheduler()))
    assert f"holds Stable Diffusion {3 - version}.x" in refused(write(other, "safetensors", tmp_path))
    del weights["model.diffusion_model.out.2.bias"]
    assert "no weights for conv_out.bias" in refused(write(weights, "safetensors", tmp_path))
    file.write_text("version https://git-lfs.github.com/spec/v1")
    assert "truncated, or no file of weights" in refused(file)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty" / "missing.ckpt")
