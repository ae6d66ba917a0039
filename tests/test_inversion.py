"""Reading a control back: finds it, touches no weight, and a picture's result does not depend on its batch."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

from cldm.inversion import Inversion, flag, invert_by_sampling
from cldm.objectives import draw_noise
from ldm.ddim import ddim_timesteps

STEPS, WARM_STEPS, WARM_SHARE = 4, 2, 0.8
RATE = 20.0  # of plain SGD, for the miniature model
WARM = dict(warm_steps=WARM_STEPS, warm_denoise_strength=WARM_SHARE)
VARIANTS = pytest.mark.parametrize("variant", [{}, WARM, {"num_samples": 2}], ids=["cold", "warm", "two samples"])


@pytest.fixture
def embeddings(base):
    return base.embed(["a photo of a cup", "a cat", "blurred", ""])


@torch.no_grad()
def draw(model, input_latents, embeddings, control, seed=0, **options):
    """What an inversion's first iteration would generate at a control."""
    timesteps = ddim_timesteps(model.base.scheduler, STEPS)
    noise = draw_noise(input_latents.shape, 1 + STEPS, seed, "cpu")
    noisy = model.base.scheduler.add_noise(input_latents, noise[0].expand_as(input_latents), timesteps[:1])
    return model.generate(noisy, timesteps, embeddings, control, noise=noise[1:], **options)


def invert(model, input_latents, target_latents, embeddings, control, **options):
    defaults = dict(ddim_steps=STEPS, iterations=3)
    return invert_by_sampling(model, input_latents, target_latents, embeddings, control, **{**defaults, **options})


@pytest.mark.parametrize("options", [dict(eta=0.0), dict(eta=1.0), dict(eta=1.0, scale=2.0)], ids=str)
@pytest.mark.parametrize("learning_rate", [None, RATE])
def test_finds_the_control_that_made_the_target(make_model, normal, embeddings, options, learning_rate):
    model, truth = make_model(), torch.tensor([[2.0]])
    if "scale" in options:
        options = dict(options, negative=embeddings[2:3])
    pictures = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    target = draw(model, pictures, embeddings[:1], truth, **options)
    settings = dict(options, learning_rate=learning_rate, iterations=60, tolerance=1e-3)
    result = invert(model, pictures, target, embeddings[:1], torch.tensor([[0.5]]), **settings)
    assert abs(result.control - truth).item() < 0.02
    assert result.loss.item() < 1e-3 * result.history[0]["loss"][0]
    assert result.iterations.item() == len(result.history) < 60  # it noticed that it had settled


def test_finds_two_numbers(make_model, normal, embeddings):
    model, truth = make_model(2), torch.tensor([[1.0, -0.5]])
    pictures = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    target = draw(model, pictures, embeddings[:1], truth, eta=1.0)
    start = torch.zeros(1, 2)
    result = invert(model, pictures, target, embeddings[:1], start, iterations=80, tolerance=1e-3)
    torch.testing.assert_close(result.control, truth, atol=0.05, rtol=0)


def test_every_iteration_descends(make_model, normal, embeddings):
    pictures = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    model = make_model()
    target = draw(model, pictures, embeddings[:1], torch.tensor([[2.0]]), eta=1.0)
    result = invert(model, pictures, target, embeddings[:1], torch.tensor([[-2.0]]), learning_rate=300.0, iterations=5)
    losses = [entry["loss"][0] for entry in result.history]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert result.history[0]["control"] == [[-2.0]] and result.start.item() == -2.0


def test_result_belongs_together(make_model, normal, embeddings):
    """control, loss and last are of one and the same generation; first is the start's."""
    model, pictures = make_model(), normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    target = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    result = invert(model, pictures, target, embeddings[:1], torch.tensor([[1.0]]))
    torch.testing.assert_close(result.first, draw(model, pictures, embeddings[:1], result.start, eta=1.0))
    torch.testing.assert_close(result.last, draw(model, pictures, embeddings[:1], result.control, eta=1.0))
    torch.testing.assert_close(result.loss, (result.last - target).square().mean((1, 2, 3)))


@VARIANTS
def test_weights_stay_as_they_were(make_model, normal, embeddings, variant):
    model, pictures = make_model(), normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    control = torch.tensor([[1.0]])
    result = invert(model, *pictures.split(1), embeddings[:1], control, scale=2.0, negative=embeddings[2:3], **variant)
    assert result.control.item() != 1.0 and control.item() == 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in (result.control, result.loss, result.first, result.last))


@pytest.fixture
def four(make_model, normal, embeddings):
    """Four targets, each from another control, and where to start each."""
    model, pictures = make_model(), normal(4, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    targets = draw(model, pictures, embeddings, torch.tensor([[3.0], [1.2], [-1.0], [-2.0]]), eta=1.0)
    return model, pictures, targets, embeddings, torch.tensor([[0.0], [0.5], [0.0], [0.0]])


@VARIANTS
def test_four_targets_together_equal_each_alone(four, variant):
    model, *inputs = four
    together = invert(model, *inputs, **variant)
    assert (together.control - together.start).abs().min() > 0.01
    for i in range(4):
        alone = invert(model, *(tensor[i : i + 1] for tensor in inputs), **variant)
        for name in ("control", "loss", "first", "last", "iterations"):
            torch.testing.assert_close(getattr(together, name)[i : i + 1], getattr(alone, name), atol=1e-4, rtol=1e-4)


@VARIANTS
def test_settled_targets_equal_each_alone(four, variant):
    """A target that settles early must not go on moving because another of its batch has not settled."""
    model, *inputs = four
    options = dict(iterations=25, tolerance=0.05, patience=2, **variant)
    together = invert(model, *inputs, **options)
    assert len(set(together.iterations.tolist())) > 1  # some settled before others
    for i in range(4):
        alone = invert(model, *(tensor[i : i + 1] for tensor in inputs), **options)
        for name in ("iterations", "control", "loss", "last"):
            torch.testing.assert_close(getattr(together, name)[i : i + 1], getattr(alone, name), atol=1e-4, rtol=1e-4)


@VARIANTS
def test_seed_decides_the_result(four, variant):
    model, *inputs = four
    first, again, other = (invert(model, *inputs, seed=seed, **variant) for seed in (0, 0, 1))
    assert torch.equal(first.control, again.control) and torch.equal(first.last, again.last)
    assert first.history == again.history
    assert (first.loss != other.loss).all()


def test_on_iteration_sees_every_entry(four):
    model, *inputs = four
    seen = []
    result = invert(model, *inputs, on_iteration=seen.append)
    assert seen == result.history and len(seen) == 3


@pytest.mark.parametrize("learning_rate", [None, RATE])
def test_steps_are_in_units_of_the_spread(four, learning_rate):
    """The same dataset in minutes of arc takes the same steps as in degrees."""
    model, pictures, targets, embeddings, control = four
    degrees = invert(model, pictures, targets, embeddings, control, learning_rate=learning_rate)
    mean, std = torch.tensor(model.control_net.config.control_mean), torch.tensor(model.control_net.config.control_std)
    model.control_net.register_to_config(control_mean=(60 * mean).tolist(), control_std=(60 * std).tolist())
    minutes = invert(model, pictures, targets, embeddings, 60 * control, learning_rate=learning_rate)
    torch.testing.assert_close(minutes.control, 60 * degrees.control, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("learning_rate", [None, 1e9])
def test_no_step_is_longer_than_max_step(four, learning_rate):
    model, *inputs = four
    history = invert(model, *inputs, learning_rate=learning_rate, max_step=0.25, iterations=4).history
    controls = torch.tensor([entry["control"] for entry in history])  # (4, B, 1)
    longest = controls.diff(dim=0).abs().amax((0, 2)) / model.control_net.config.control_std[0]
    torch.testing.assert_close(longest, torch.full((4,), 0.25))  # every target takes one such step, and no longer


def test_what_is_wrong_with_an_inversion_is_flagged(make_model):
    """From -1 to 1; a sampling loss of 0.1 is what validation pictures leave at the most."""
    config = make_model().control_net.config
    control = torch.tensor([[0.5], [1.5], [0.5], [0.5]]).double()
    loss, settled = torch.tensor([0.05, 0.05, 0.2, 0.05]), torch.tensor([True, True, True, False])
    found = Inversion(control, control, iterations=torch.full((4,), 9), settled=settled, loss=loss)
    known = config | dict(control_low=[-1.0], control_high=[1.0], sampling_loss=0.1)
    assert flag(SimpleNamespace(**known), found) == [[], ["outside_range"], ["unexplained"], ["unsettled"]]
    uncalibrated = flag(SimpleNamespace(**known | {"sampling_loss": None}), found)
    assert uncalibrated == [["uncalibrated"], ["outside_range", "uncalibrated"], ["uncalibrated"]] + [
        ["unsettled", "uncalibrated"]
    ]


def test_too_few_iterations_are_told(make_model, normal, embeddings):
    model, pictures = make_model(), normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    target = draw(model, pictures, embeddings[:1], torch.tensor([[2.0]]), eta=1.0)
    for iterations, unsettled in ((2, True), (60, False)):
        start = torch.tensor([[0.5]])
        result = invert(model, pictures, target, embeddings[:1], start, iterations=iterations, tolerance=1e-3)
        assert ("unsettled" in result.flags[0]) == unsettled
