"""The sampling chain: against diffusers' own pipeline, and its gradient against finite differences."""

import pytest
import torch
from conftest import CHANNELS, IMAGE_SIZE, LATENT_SIZE, build_scheduler
from diffusers import StableDiffusionControlNetPipeline

from ldm.ddim import ddim_sample, ddim_timesteps, draw_timesteps

STEPS = 5


@pytest.fixture
def scene(make_model, normal):
    """scene(control_dim, batch) -> model, start noise, embeddings, negative embeddings."""

    def make(control_dim=1, batch=1):
        model = make_model(control_dim)
        start = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE).expand(batch, -1, -1, -1)
        embeddings, negative = model.base.embed(["a photo of a cup", "blurred"]).split(1)
        return model, start, embeddings.expand(batch, -1, -1), negative.expand(batch, -1, -1)

    return make


@pytest.mark.parametrize("control", [[3.0], [1.5, -2.0]], ids=["one number", "two numbers"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_generate_equals_diffusers_pipeline(scene, eta, scale, control):
    model, start, embeddings, negative = scene(len(control))
    pipeline = StableDiffusionControlNetPipeline(
        vae=model.base.vae,
        text_encoder=None,
        tokenizer=None,
        unet=model.base.unet,
        controlnet=model.control_net,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=embeddings,
        negative_prompt_embeds=negative,
        image=torch.tensor(control)[None, :, None, None],
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        latents=start,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        controlnet_conditioning_scale=0.7,
        eta=eta,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    generator = torch.Generator().manual_seed(3)  # the pipeline draws one noise a step from its own
    noise = torch.stack([torch.randn(start.shape, generator=generator) for _ in range(STEPS)])
    with torch.no_grad():
        found = model.generate(
            start,
            ddim_timesteps(model.base.scheduler, STEPS),
            embeddings,
            torch.tensor([control]),
            negative=negative,
            scale=scale,
            strength=0.7,
            eta=eta,
            noise=noise,
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("control", [[1.0], [1.0, -2.0]], ids=["one number", "two numbers"])
def test_gradient_of_the_chain_equals_finite_differences(scene, normal, control, eta):
    model, start, embeddings, negative = scene(len(control))
    model.double()
    timesteps = ddim_timesteps(model.base.scheduler, STEPS)
    noise, weights = normal(STEPS, *start.shape).double(), normal(*start.shape).double()

    def objective(control):
        drawn = model.generate(
            start.double(),
            timesteps,
            embeddings.double(),
            control[None],
            negative=negative.double(),
            scale=2.0,
            eta=eta,
            noise=noise,
        )
        return (drawn * weights).sum()

    control = torch.tensor(control, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(objective(control), control)
    h = 1e-4
    with torch.no_grad():
        moves = h * torch.eye(len(control), dtype=torch.float64)
        differences = torch.stack([(objective(control + m) - objective(control - m)) / (2 * h) for m in moves])
    assert gradient.abs().min() > 1e-4  # the control moves the picture
    torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=0)


def test_pictures_of_a_batch_do_not_mix(scene, normal):
    model, start, embeddings, negative = scene(batch=3)
    controls, timesteps = torch.tensor([[-3.0], [0.0], [4.0]]), ddim_timesteps(model.base.scheduler, STEPS)
    options = dict(scale=2.0, eta=1.0, noise=normal(STEPS, 1, *start.shape[1:]))
    with torch.no_grad():
        together = model.generate(start, timesteps, embeddings, controls, negative=negative, **options)
        alone = [
            model.generate(start[:1], timesteps, embeddings[:1], control[None], negative=negative[:1], **options)
            for control in controls
        ]
    assert (together[0] - together[2]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_guidance_of_one_needs_no_negative_prompt(scene):
    model, start, embeddings, _ = scene()
    timesteps = ddim_timesteps(model.base.scheduler, 2)
    with torch.no_grad():
        without = model.generate(start, timesteps, embeddings, torch.tensor([[1.0]]))
        same = model.generate(start, timesteps, embeddings, torch.tensor([[1.0]]), negative=embeddings, scale=3.0)
    torch.testing.assert_close(without, same, atol=1e-5, rtol=1e-5)  # guidance away from the prompt itself: none


@pytest.mark.parametrize("steps, denoise_strength", [(10, 0.8), (10, 0.5), (32, 1.0), (9, 1.0), (9, 0.9)])
def test_timesteps_cover_the_last_part_of_the_schedule(base, steps, denoise_strength):
    timesteps = ddim_timesteps(base.scheduler, steps, denoise_strength)
    total = base.scheduler.config.num_train_timesteps
    assert len(timesteps) == steps
    assert (timesteps.diff() < 0).all() and timesteps.min() >= 0
    assert abs((timesteps[0].item() + 1) / total - denoise_strength) < 0.05


@pytest.mark.parametrize("steps", [3, 9, 10, 16, 24, 25, 32, 50])
def test_fresh_noise_gives_numbers_at_any_number_of_steps(base, normal, steps):
    """At the last timestep nothing but noise is left: rounding must not make the rest's variance negative."""
    timesteps = ddim_timesteps(base.scheduler, steps)
    start, noise = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE), normal(steps, 1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    drawn = ddim_sample(base.scheduler, lambda x, t: torch.zeros_like(x), start, timesteps, eta=1.0, noise=noise)
    assert drawn.isfinite().all()


def test_perfect_predictions_lead_back_to_the_clean_latents(base, normal):
    """A part of the schedule, too, must end at the clean picture that the noise was added to."""
    clean, noise = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE), normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    timesteps = ddim_timesteps(base.scheduler, 10, 0.5)  # 20 steps divide the 1000 timesteps: no rounding
    noisy = base.scheduler.add_noise(clean, noise, timesteps[:1])
    drawn = ddim_sample(base.scheduler, lambda x, t: base.scheduler.get_velocity(clean, noise, t), noisy, timesteps)
    torch.testing.assert_close(drawn, clean, atol=1e-4, rtol=1e-4)


def test_training_timesteps_lean_toward_noise():
    drawn = draw_timesteps(10_000, 1000, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() == 999
    assert drawn.double().mean() == pytest.approx(2 / 3 * 1000, abs=10)
