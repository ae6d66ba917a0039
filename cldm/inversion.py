"""Read a control back from a picture: every weight frozen, descend the sampling error into the control alone."""

import time
from dataclasses import dataclass, field

import torch

from ldm.ddim import ddim_timesteps


@dataclass
class Inversion:
    """What an inversion found. For a batch of B targets and d numbers each:"""

    control: torch.Tensor  # (B, d), in the dataset's units
    start: torch.Tensor  # (B, d)
    loss: torch.Tensor  # (B,) latent mean squared error, of the control it stopped at
    iterations: torch.Tensor  # (B,) until each control settled
    seconds: float
    first: torch.Tensor  # (B, C, h, w) latents generated at the start
    last: torch.Tensor  # (B, C, h, w) latents generated at the end
    history: list = field(default_factory=list)  # per iteration: {"control": (B, d), "loss": (B,)} as lists


def draw_noise(shape, count, seed, device):
    """Returns: (count, 1, C, h, w) normal noise of a seed, one for all pictures: alone or in a batch, the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, *shape[1:], generator=generator).to(device)


def invert_by_sampling(
    model,
    input_latents,
    target_latents,
    embeddings,
    control,
    *,
    negative=None,
    ddim_steps=32,
    denoise_strength=1.0,
    warm_steps=None,
    warm_denoise_strength=None,
    scale=1.0,
    strength=1.0,
    eta=1.0,
    seed=0,
    learning_rate=1.0,
    iterations=100,
    tolerance=0.01,
    patience=3,
    on_iteration=None,
):
    """Find the control at which the model generates the target: SGD through a whole DDIM chain.

    An iteration noises the start picture, generates, compares latents by mean squared error, and back-propagates
    through every step into the control. All iterations share their noise. With warm_steps, iterations after the
    first start from the previous generation (detached) and take that many steps.

    model: ControlLDM, frozen. input_latents, target_latents: (B, C, h, w). embeddings, negative: (B, 77, D).
    control: (B, d), where to start. scale, strength, eta: as ControlLDM.generate has them.
    learning_rate: of SGD on the normalised control, over the target's own variance, so that one rate suits
    pictures of any contrast. tolerance: in units of the control's spread in training; a control that moves less
    for `patience` iterations has settled. on_iteration: called with the iteration's entry of the history.
    Returns: Inversion.
    """
    scheduler = model.base.scheduler
    began = time.perf_counter()
    std = model.control_net.spread(control)
    position = (control / std).clone().requires_grad_(True)  # offset left out: only steps matter
    optimizer = torch.optim.SGD([position], lr=learning_rate)
    noise = draw_noise(target_latents.shape, 1 + max(ddim_steps, warm_steps or 0), seed, control.device)
    contrast = target_latents.var((2, 3)).mean(1)  # (B,)
    result = Inversion(control, control.clone(), None, torch.full((len(control),), iterations), 0.0, None, None)
    still = torch.zeros(len(control), dtype=torch.long, device=control.device)  # iterations without a move
    picture, steps, share = input_latents, ddim_steps, denoise_strength
    for iteration in range(iterations):
        timesteps = ddim_timesteps(scheduler, steps, share)
        noisy = scheduler.add_noise(picture, noise[0].expand_as(picture), timesteps[:1].to(picture.device))
        generated = model.generate(
            noisy,
            timesteps,
            embeddings,
            position * std,
            negative=negative,
            scale=scale,
            strength=strength,
            eta=eta,
            noise=noise[1:],
        )
        loss = (generated - target_latents).square().mean((1, 2, 3))  # (B,)
        optimizer.zero_grad()
        (loss / contrast).sum().backward()
        before = position.detach().clone()
        entry = {"control": (before * std).tolist(), "loss": loss.tolist()}
        result.history.append(entry)
        settled = still >= patience
        position.grad[settled] = 0  # the others of the batch go on
        optimizer.step()
        moved = (position.detach() - before).abs().amax(1) > tolerance
        still = torch.where(settled | ~moved, still + 1, torch.zeros_like(still))
        result.iterations[(still == patience).cpu() & ~settled.cpu()] = iteration + 1
        result.first = generated.detach() if result.first is None else result.first
        result.last, result.loss, result.control = generated.detach(), loss.detach(), before * std
        if on_iteration:
            on_iteration(entry)
        if (still >= patience).all():
            break
        if warm_steps:
            picture, steps, share = result.last, warm_steps, warm_denoise_strength
    result.seconds = time.perf_counter() - began
    return result
