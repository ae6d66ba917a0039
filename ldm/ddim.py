"""DDIM sampling (Song et al. 2021) as a free function: differentiable, its noise passed in."""

import copy
import math

import torch

from ldm.settings import InputError


def draw_noise(shape, count, seed, device, num_samples=1):
    """Returns: (count, num_samples, C, h, w) standard normal noise; shape: that of the latents, (B, C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_samples, *shape[1:], generator=generator).to(device)


def draw_timesteps(count, total, generator):
    """Draw training timesteps, the noisier the more often: there the prompt and the control decide.

    Returns: (count,) integers below `total`, with a density that rises linearly.
    """
    return (total * torch.rand(count, generator=generator).sqrt()).long().clamp_max(total - 1)


def ddim_schedule(scheduler, steps, denoise_strength=1.0):
    """Prepare `steps` DDIM steps over the last `denoise_strength` of a noise schedule.

    denoise_strength: in (0, 1]; 1 starts from pure noise, less keeps the layout of the start picture.
    Returns: a copy of the scheduler, set to these steps; their timesteps, (steps,), falling.
    Raises: InputError if the noise schedule has too few timesteps.
    """
    whole, config = round(steps / denoise_strength), scheduler.config
    have = config.num_train_timesteps - (config.steps_offset if config.timestep_spacing == "leading" else 0)
    if whole > have:
        share = math.ceil(1000 * steps / have) / 1000
        remedy = f"at most {math.floor(have * denoise_strength)} steps fit"
        remedy += f", or a share of {share} at least" if share <= 1 else ""
        raise InputError(f"{steps} steps over {denoise_strength:g} of a noise schedule of {have} timesteps: {remedy}")
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(whole)
    return scheduler, scheduler.timesteps[:whole][-steps:]  # rounding makes diffusers' "trailing" one too long at 61


def ddim_sample(scheduler, timesteps, predict, latents, eta=0.0, noise=None):
    """Run the chain from `latents` at timesteps[0] down to clean latents (Song et al. 2021, eq. 12).

    scheduler, timesteps: as ddim_schedule prepares them.
    predict: (latents, timestep) -> the model's output, of the kind that the scheduler expects.
    latents: (B, C, h, w) at the noise level of timesteps[0]. eta: 0 is deterministic, 1 is DDPM.
    noise: (steps, 1 or B, C, h, w), a standard normal draw for every step; needed if eta > 0.
    Returns: (B, C, h, w) latents. Gradients pass, unless the caller forbids them.
    """
    eta = min(eta, 1 - 1e-12)  # at exactly 1, rounding can make the variance left for the model's noise negative
    # the networks take a timestep from their device, the schedule from the CPU: otherwise every call waits for a GPU
    for i, (t, there) in enumerate(zip(timesteps, timesteps.to(latents.device))):
        step_noise = noise[i].expand_as(latents) if eta > 0 else None
        latents = scheduler.step(predict(latents, there), t, latents, eta=eta, variance_noise=step_noise).prev_sample
    return latents
