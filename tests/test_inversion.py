"""test5.py: finds the control that made a picture, touches no weight, and the seed decides its result."""

from dataclasses import replace

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

import test5
from cldm.confidence import flag_inversion
from cldm.model import Sampling, Target
from ldm.ddim import draw_noise
from ldm.settings import Settings

STEPS = 4
RATE = 50.0  # of plain SGD, for the miniature model
WARM = dict(warm_steps=2, warm_denoise_strength=0.8)
VARIANTS = pytest.mark.parametrize("variant", [{}, WARM, {"num_samples": 2}], ids=["cold", "warm", "two samples"])


@pytest.fixture
def scene(make_model, normal):
    """scene(control_dim, periods) -> model, latents to start from, a Target with prompts and a negative prompt."""

    def make(control_dim=1, periods=None):
        model = make_model(control_dim, periods=periods)
        embeddings, negative = model.base.embed(["a photo of a cup", "blurred"]).split(1)
        start, latents = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE).split(1)
        return model, start, Target(embeddings, latents, negative=negative)

    return make


@torch.no_grad()
def draw(model, start, target, control, **options):
    """Returns: latents, what the first iteration generates at a control."""
    noise = draw_noise(start.shape, 1 + STEPS, 0, "cpu")
    return model.generate(noise, torch.tensor([control]), target, Sampling(STEPS, **options), start)


def infer(model, start, target, control, **options):
    s = Settings({**test5.settings, "ddim_steps": STEPS, "iterations": 3, "num_samples": 1, **options})
    return test5.infer(model, s, start, target, torch.tensor(control).double())


@pytest.mark.parametrize("options", [dict(eta=0.0), dict(eta=1.0), dict(eta=1.0, scale=2.0)], ids=str)
@pytest.mark.parametrize("learning_rate", [None, pytest.param(RATE, marks=pytest.mark.slow)])
def test_finds_the_control_that_made_the_target(scene, options, learning_rate):
    model, start, target = scene()
    target = replace(target, latents=draw(model, start, target, [2.0], **options))
    result = infer(model, start, target, [0.5], **options, learning_rate=learning_rate, iterations=80)
    assert abs(result.control.item() - 2.0) < 0.03
    assert result.loss < 1e-3 * result.history[0]["loss"]
    assert len(result.history) < 80 and "unsettled" not in result.flags  # it noticed that it had settled


def test_finds_two_numbers(scene):
    model, start, target = scene(2)
    target = replace(target, latents=draw(model, start, target, [1.0, -0.5]))
    result = infer(model, start, target, [0.0, 0.0], iterations=100)
    torch.testing.assert_close(result.control, torch.tensor([1.0, -0.5]).double(), atol=0.05, rtol=0)


def test_every_iteration_descends(scene):
    model, start, target = scene()
    target = replace(target, latents=draw(model, start, target, [2.0]))
    result = infer(model, start, target, [-2.0], learning_rate=300.0, iterations=5)
    losses = [entry["loss"] for entry in result.history]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert result.history[0]["control"] == [-2.0] and result.start.item() == -2.0


def test_result_belongs_together(scene):
    """control, loss and last are of one and the same generation; first is the start's."""
    model, start, target = scene()
    result = infer(model, start, target, [1.0])
    torch.testing.assert_close(result.first, draw(model, start, target, [1.0]))
    torch.testing.assert_close(result.last, draw(model, start, target, result.control.tolist()))
    assert result.loss == pytest.approx((result.last - target.latents).square().mean().item())


@VARIANTS
def test_weights_stay_as_they_were(scene, variant):
    model, start, target = scene()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = infer(model, start, target, [1.0], scale=2.0, **variant)
    assert result.control.item() != 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in (result.control, result.first, result.last))


@VARIANTS
def test_seed_decides_the_result(scene, variant):
    inputs = scene()
    first, again, other = (infer(*inputs, [1.0], seed=seed, **variant) for seed in (0, 0, 1))
    assert first.history == again.history and torch.equal(first.last, again.last)
    assert first.loss != other.loss


def test_later_generations_start_from_the_one_before(scene):
    """Two steps over 0.8 of the noise schedule, from the previous latents and the same noise."""
    model, start, target = scene()
    result = infer(model, start, target, [1.0], iterations=2, **WARM)
    noise = draw_noise(start.shape, 1 + STEPS, 0, "cpu")
    with torch.no_grad():
        expected = model.generate(noise, result.control[None], target, Sampling(2, denoise_strength=0.8), result.first)
    torch.testing.assert_close(result.last, expected)


def test_at_full_strength_a_drawing_starts_from_noise_alone(scene):
    """Also by a schedule that leaves some of the picture at its first timestep, as Stable Diffusion's does."""
    model, start, target = scene()
    noise = draw_noise(start.shape, 1 + STEPS, 0, "cpu")
    drawn = [model.generate(noise, torch.ones(1, 1), target, Sampling(STEPS), own) for own in (start, -start, None)]
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[2])
    other = model.generate(noise, torch.ones(1, 1), target, Sampling(STEPS, denoise_strength=0.8), start)
    assert not torch.equal(other, drawn[0])


@pytest.mark.parametrize("learning_rate", [None, RATE])
def test_steps_are_in_units_of_the_spread(scene, learning_rate):
    """The same dataset in minutes of arc takes the same steps as in degrees."""
    model, start, target = scene()
    degrees = infer(model, start, target, [0.5], learning_rate=learning_rate)
    mean, std = (torch.tensor(model.control_net.config[f"control_{which}"]) for which in ("mean", "std"))
    model.control_net.register_to_config(control_mean=(60 * mean).tolist(), control_std=(60 * std).tolist())
    minutes = infer(model, start, target, [30.0], learning_rate=learning_rate)
    torch.testing.assert_close(minutes.control, 60 * degrees.control, atol=1e-2, rtol=1e-3)


def test_a_periodic_number_passes_its_seam(scene):
    """And is told within its circle."""
    model, start, target = scene(periods=[10.0])
    model.control_net.register_to_config(control_mean=[5.0], control_std=[10 / 12**0.5])
    options = dict(denoise_strength=1.0, eta=0.0)
    target = replace(target, latents=draw(model, start, target, [0.2], eta=0.0))
    result = infer(model, start, target, [9.8], iterations=40, **options)
    found = torch.tensor([entry["control"] for entry in result.history])
    assert found[0] == 9.8 and result.control.item() == pytest.approx(0.2, abs=0.05)
    assert found.min() >= 0 and found.max() < 10 and "outside_range" not in result.flags


def test_what_is_wrong_with_an_inversion_is_flagged(make_model):
    """From -1 to 1; a sampling loss of 0.1 is the most that validation pictures leave."""
    model = make_model()
    model.control_net.register_to_config(control_low=[-1.0], control_high=[1.0], sampling_loss=0.1)

    def flags(control, loss, settled):
        return flag_inversion(model.control_net.config, torch.tensor([control]), loss, settled)

    assert flags(0.5, 0.05, True) == [] and flags(1.5, 0.05, True) == ["outside_range"]
    assert flags(0.5, 0.2, True) == ["unexplained"] and flags(0.5, 0.05, False) == ["unsettled"]
    model.control_net.register_to_config(sampling_loss=None)
    assert flags(0.5, 0.2, True) == ["uncalibrated"]
