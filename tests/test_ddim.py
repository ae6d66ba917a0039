"""The sampling chain: against diffusers' own pipeline, and its gradient against finite differences."""

import json

import diffusers
import pytest
import torch
from conftest import CHANNELS, IMAGE_SIZE, LATENT_SIZE, build_scheduler, build_unet, build_vae
from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline

from cldm.model import Sampling, Target
from ldm.base import load_scheduler
from ldm.ddim import ddim_sample, ddim_schedule, draw_timesteps
from ldm.settings import InputError

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
    target, sampling = Target(embeddings, negative=negative), Sampling(STEPS, scale, 0.7, eta)
    with torch.no_grad():
        found = model.generate(torch.cat([start[None], noise]), torch.tensor([control]), target, sampling)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("control", [[1.0], [1.0, -2.0]], ids=["one number", "two numbers"])
def test_gradient_of_the_chain_equals_finite_differences(scene, normal, control, eta):
    model, start, embeddings, negative = scene(len(control))
    model.double()
    noise, weights = normal(STEPS, *start.shape).double(), normal(*start.shape).double()
    noise, sampling = torch.cat([start[None].double(), noise]), Sampling(STEPS, scale=2.0, eta=eta)
    target = Target(embeddings.double(), negative=negative.double())

    def objective(control):
        return (model.generate(noise, control[None], target, sampling) * weights).sum()

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
    controls, target = torch.tensor([[-3.0], [0.0], [4.0]]), Target(embeddings, negative=negative)
    noise, sampling = normal(1 + STEPS, 1, *start.shape[1:]), Sampling(STEPS, scale=2.0)
    with torch.no_grad():
        together = model.generate(noise, controls, target, sampling)
        alone = [
            model.generate(noise, c[None], target.select(slice(i, i + 1)), sampling) for i, c in enumerate(controls)
        ]
    assert (together[0] - together[2]).abs().max() > 1e-3
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_guidance_of_one_needs_no_negative_prompt(scene):
    model, start, embeddings, _ = scene()
    noise, control = torch.stack([start] * 3), torch.tensor([[1.0]])
    with torch.no_grad():
        without = model.generate(noise, control, Target(embeddings), Sampling(2))
        same = model.generate(noise, control, Target(embeddings, negative=embeddings), Sampling(2, scale=3.0))
    torch.testing.assert_close(without, same, atol=1e-5, rtol=1e-5)  # guidance away from the prompt itself: none


@pytest.mark.parametrize("steps, denoise_strength", [(10, 0.8), (10, 0.5), (32, 1.0), (9, 1.0), (9, 0.9)])
def test_timesteps_cover_the_last_part_of_the_schedule(base, steps, denoise_strength):
    timesteps = ddim_schedule(base.scheduler, steps, denoise_strength)[1]
    total = base.scheduler.config.num_train_timesteps
    assert len(timesteps) == steps
    assert (timesteps.diff() < 0).all() and timesteps.min() >= 0
    assert abs((timesteps[0].item() + 1) / total - denoise_strength) < 0.05


def sd_scheduler(**own):
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(**{**SD_NOISE, "clip_sample": False, "steps_offset": 1, **own})


def test_all_numbers_of_steps_that_fit_are_taken(base):
    for scheduler in base.scheduler, sd_scheduler():
        for steps in range(1, 1000):
            timesteps = ddim_schedule(scheduler, steps)[1]
            assert len(timesteps) == steps and timesteps.min() >= 0 and timesteps.max() < 1000, steps
            assert (timesteps.diff() < 0).all()


@pytest.mark.parametrize(
    "steps, denoise_strength, told",
    [(1000, 1, "at most 999 steps fit$"), (32, 0.02, "at most 19 steps fit, or a share of 0.033 at least")],
)
def test_steps_that_do_not_fit_say_which_do(steps, denoise_strength, told):
    """The most, and the least share, that are named do fit."""
    scheduler = sd_scheduler()
    with pytest.raises(InputError, match=told):
        ddim_schedule(scheduler, steps, denoise_strength)
    assert len(ddim_schedule(scheduler, 999)[1]) == 999 and len(ddim_schedule(scheduler, 32, 0.033)[1]) == 32
    assert ddim_schedule(scheduler, 19, 0.02)[1][0] == 19


# What published folders say, of what DDIM has a say in.
SD_NOISE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
FOREIGN = {
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None},
    "EulerDiscreteScheduler": {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {"clip_sample": True, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {"thresholding": True, "algorithm_type": "dpmsolver++", "solver_order": 2},
    "UniPCMultistepScheduler": {"steps_offset": 0, "timestep_spacing": "leading"},
    "DDPMScheduler": {"clip_sample": True, "variance_type": "fixed_small", "clip_sample_range": 1.0},
    "LMSDiscreteScheduler": {},
    "DDIMScheduler": {},
}


@pytest.fixture
def read_scheduler(tmp_path):
    """read_scheduler(config, **options) -> the scheduler of a folder that says so."""

    def read(config, **options):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return load_scheduler(tmp_path, **options)

    return read


@pytest.mark.filterwarnings("ignore")  # the pipeline says what it forces
@pytest.mark.parametrize("name, config", FOREIGN.items(), ids=FOREIGN)
def test_a_foreign_schedule_is_sampled_as_diffusers_own_pipeline_does(read_scheduler, normal, name, config):
    """Latents are larger than 1: what clips or thresholds them, or takes other timesteps, draws something else."""
    found = read_scheduler({"_class_name": name, **SD_NOISE, **config})
    own = getattr(diffusers, name).from_config({**SD_NOISE, **config})
    torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod)
    assert found.config.prediction_type == config.get("prediction_type", "epsilon")
    pipeline = StableDiffusionPipeline(
        vae=build_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=build_unet(),
        scheduler=DDIMScheduler(**SD_NOISE, set_alpha_to_one=found.config.set_alpha_to_one),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert ddim_schedule(found, 10)[1].tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    clean, noise = 5 * normal(1, 4, 8, 8), normal(1, 4, 8, 8)

    def predict(x, t):
        return found.get_velocity(clean, noise, t) if "prediction_type" in config else noise

    noisy = found.add_noise(clean, noise, torch.tensor([901]))
    drawn = ddim_sample(*ddim_schedule(found, 10), predict, noisy)
    left = found.final_alpha_cumprod
    torch.testing.assert_close(drawn, left.sqrt() * clean + (1 - left).sqrt() * noise, rtol=1e-3, atol=1e-3)
    assert not found.config.set_alpha_to_one
    for key in "clip_sample", "steps_offset", "timestep_spacing", "thresholding":
        assert found.config[key] == pipeline.scheduler.config[key]


def test_trailing_timesteps_and_pure_noise_are_kept(read_scheduler):
    config = dict(SD_NOISE, _class_name="EulerDiscreteScheduler", rescale_betas_zero_snr=True)
    found = read_scheduler({**config, "timestep_spacing": "trailing", "prediction_type": "v_prediction"})
    assert found.alphas_cumprod[-1] == 0 and ddim_schedule(found, 10)[1][0] == 999


@pytest.mark.parametrize(
    "config, options, told",
    [
        ({"rescale_betas_zero_snr": True}, {}, "must be v_prediction where only noise is left"),
        ({"prediction_type": "sample"}, {}, 'must be epsilon or v_prediction, got "sample"'),
        ({"prediction_type": "v-prediction"}, {}, 'must be epsilon or v_prediction, got "v-prediction"'),
        ({"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, "says .*epsilon, the YAML v_prediction"),
        ({"beta_schedule": "cosine"}, {}, "no noise schedule that DDIM can follow, None .cosine"),
        ({"beta_end": float("nan")}, {}, "less of the picture at every timestep"),
        ({"beta_end": "0.012"}, {}, "no noise schedule that DDIM can follow"),
        ({"beta_start": 0.0, "beta_end": 0.0}, {}, "less of the picture at every timestep"),
        ({"trained_betas": [0.1, 0.2]}, {}, "less of the picture at every timestep"),
        ({"num_train_timesteps": 0}, {}, "no noise schedule that DDIM can follow"),
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_followed_is_refused(read_scheduler, config, options, told):
    with pytest.raises(InputError, match=f"scheduler_config.json.*{told}"):
        read_scheduler({**SD_NOISE, **config}, **options)


def test_a_schedule_without_betas_is_refused(read_scheduler):
    with pytest.raises(InputError, match="no noise schedule that DDIM can follow, FlowMatch.* .it has no beta_start"):
        read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def test_what_a_folder_leaves_open_the_yaml_says(read_scheduler):
    found = read_scheduler(SD_NOISE, prediction_type="v_prediction")
    assert found.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("steps", [3, 9, 10, 16, 24, 25, 32, 50])
def test_fresh_noise_gives_numbers_at_any_number_of_steps(base, normal, steps):
    """At the last timestep nothing but noise is left: rounding must not make the rest's variance negative."""
    start, noise = normal(1, CHANNELS, LATENT_SIZE, LATENT_SIZE), normal(steps, 1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    schedule = ddim_schedule(base.scheduler, steps)
    drawn = ddim_sample(*schedule, lambda x, t: torch.zeros_like(x), start, eta=1.0, noise=noise)
    assert drawn.isfinite().all()


def test_perfect_predictions_lead_back_to_the_clean_latents(base, normal):
    """A part of the schedule, too, must end at the clean picture that the noise was added to."""
    clean, noise = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE), normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    scheduler, timesteps = ddim_schedule(base.scheduler, 10, 0.5)  # 20 steps divide the 1000 timesteps: no rounding
    noisy = base.scheduler.add_noise(clean, noise, timesteps[:1])
    drawn = ddim_sample(scheduler, timesteps, lambda x, t: scheduler.get_velocity(clean, noise, t), noisy)
    torch.testing.assert_close(drawn, clean, atol=1e-4, rtol=1e-4)


def test_training_timesteps_lean_toward_noise():
    drawn = draw_timesteps(10_000, 1000, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() == 999
    assert drawn.double().mean() == pytest.approx(2 / 3 * 1000, abs=10)
