"""tool_train_base.py: the VAE that starts as principal components, and the whole script in miniature."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file

import tool_train_base
from cldm.conversion import add_control
from cldm.matcher import MATCHER_FILE
from ldm.base import LatentDiffusion
from ldm.settings import InputError, Settings


@pytest.fixture
def pictures(tmp_path):
    """Returns: settings; a folder with a photograph in two sizes, one with two cut-outs, of which one has a text."""
    rng = np.random.default_rng(0)
    folders = tmp_path / "photos", tmp_path / "stamps"
    for folder, mode in zip(folders, ("RGB", "RGBA")):
        folder.mkdir()
        for width in (160, 220):
            pixels = rng.integers(0, 255, (20, width // 8, len(mode)), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, 160)).save(folder / f"{width}x160.png")
    (folders[1] / "160x160.txt").write_text("A frog.\nrest")
    return dict(photos=str(folders[0]), stamps=str(folders[1]))


def to_patches(pictures):
    return rearrange(F.pixel_unshuffle(F.pixel_unshuffle(pictures, 2), 2), "b c h w -> (b h w) c").double()


def test_vae_starts_as_principal_components():
    torch.manual_seed(0)
    pictures = F.interpolate(torch.rand(4, 3, 16, 16), scale_factor=4, mode="bicubic").clamp(0, 1) * 2 - 1
    mean, components, deviations = tool_train_base.patch_pca(pictures, 8)
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(tool_train_base.LIKE / "vae"), latent_channels=8)
    tool_train_base.start_as_pca(vae, mean, components, deviations)
    with torch.no_grad():
        latents = vae.encode(pictures).latent
        decoded = vae.decode(latents).sample
    expected = mean + (to_patches(pictures) - mean) @ components.T @ components
    assert (to_patches(decoded) - expected).abs().max() < 0.02
    torch.testing.assert_close(latents.std((0, 2, 3)).double(), deviations.sqrt(), rtol=0.01, atol=0)


def test_a_killed_training_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(tool_train_base, "KEPT", 2)

    def train(out_dir, killed_at=None, **changes):
        torch.manual_seed(0)
        module, generator = torch.nn.Linear(3, 3), torch.Generator().manual_seed(0)

        def loss_at(step):
            if step == killed_at:
                raise KeyboardInterrupt
            return module(torch.randn(4, 3, generator=generator)).square().mean()

        s = Settings(tool_train_base.settings | dict(out_dir=str(out_dir)) | changes)
        tool_train_base.train_steps(s, module, generator, 7, 1e-2, loss_at, "test")
        return module.weight

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", killed_at=5)
    with pytest.raises(InputError, match="other settings"):
        train(tmp_path / "killed", batch_size=3)
    assert torch.equal(train(tmp_path / "killed"), train(tmp_path / "whole"))


def test_what_a_stage_begins_with_does_not_depend_on_those_before(pictures, monkeypatch):
    """So that a run which was stopped between them goes on as it would have."""
    began = []
    monkeypatch.setattr(tool_train_base, "train_steps", lambda s, module, *_: began.append(module.state_dict()))
    s = Settings(tool_train_base.settings | pictures | dict(matcher_pairs=2, image_size=64))
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(tool_train_base.LIKE / "vae"))
    vae.register_to_config(scaling_factor=1.0)
    for seed in 1, 2:
        torch.manual_seed(seed)
        tool_train_base.train_matcher(s, vae)
        tool_train_base.train_unet(s, torch.zeros(2, 12, 16, 16), ["a", "b"])
    for first, second in zip(began[:2], began[2:], strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_whole_script_makes_a_base_that_loads(tmp_path, pictures):
    arguments = dict(vae_views=4, vae_steps=2, unet_views=4, unet_steps=2, batch_size=2, image_size=64)
    arguments |= dict(matcher_pairs=20, matcher_steps=2)
    s = Settings(tool_train_base.settings | arguments | pictures | dict(out_dir=str(tmp_path / "base")))
    tool_train_base.main(s)
    base = LatentDiffusion.from_pretrained(tmp_path / "base")
    views, prompts = tool_train_base.draw_views(s, 0, 40, 0.2, processes=2)
    alone = tool_train_base.draw_views(s, 0, 40, 0.2)
    assert torch.equal(views, alone[0]) and prompts == alone[1]
    assert {"", "a frog"} < set(prompts)
    flights, again = (tool_train_base.draw_flights(Settings(s | {"processes": n}), 16) for n in (1, 2))
    assert all(torch.equal(*both) for both in zip(flights, again))
    fresh = add_control(base, Settings(base=str(tmp_path / "base")), hint="reference", proposals=2, flows=True)
    learned = load_file(tmp_path / "base" / MATCHER_FILE)
    assert torch.equal(fresh.control_net.proposal.first.weight, learned["first.weight"].float())
    views = views / 127.5 - 1
    latents = base.encode(views)
    assert latents.shape == (40, base.unet.config.in_channels, 16, 16) and base.downsampling == 4
    assert latents.std() == pytest.approx(1, abs=0.3)
    assert (base.decode(latents) - views).square().mean() < views.var()


def test_only_the_largest_of_several_sizes_is_taken(pictures):
    (file,) = tool_train_base.largest_pictures(pictures["photos"])
    assert file.name == "220x160.png"


def test_missing_folders_are_named(tmp_path, pictures, fails_in_one_line):
    arguments = [f"photos={tmp_path / 'none'}", f"stamps={pictures['stamps']}", f"out_dir={tmp_path / 'base'}"]
    assert "none: no pictures" in fails_in_one_line(tool_train_base.main, tool_train_base.settings, arguments)


def test_photographs_and_folders_that_cannot_serve_are_named(tmp_path, pictures):
    small = tmp_path / "jpegs" / "small.jpg"
    small.parent.mkdir()
    Image.new("RGB", (90, 200)).save(small)
    with pytest.raises(InputError, match="small.jpg: 90 x 200 pixels are too few"):
        tool_train_base.draw_detail(random.Random(0), 128, small)
    stamp = Path(pictures["stamps"], "160x160.png")
    stamp.rename(stamp.with_suffix(".PNG"))
    assert stamp.with_suffix(".PNG") in tool_train_base.find_sources(Settings(pictures))[2]
    with pytest.raises(InputError, match='"stamps".*no .png'):
        tool_train_base.find_sources(Settings(pictures | dict(stamps=str(small.parent))))
