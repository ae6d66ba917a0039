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
    iterations: torch.Tensor  # (B,) until each control settled
    loss: torch.Tensor = None  # (B,) latent mean squared error of the control
    seconds: float = 0.0
    first: torch.Tensor = None  # (B, C, h, w) latents generated at the start, the first sample's
    last: torch.Tensor = None  # (B, C, h, w) latents generated at the control, likewise
    history: list = field(default_factory=list)  # per iteration: {"control": (B, d), "loss": (B,)} as lists


def draw_noise(shape, count, seed, device, num_samples=1):
    """Returns: (count, num_samples, C, h, w) normal noise of a seed, the same for every picture of a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_samples, *shape[1:], generator=generator).to(device)


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
    num_samples=1,
    scale=1.0,
    strength=1.0,
    eta=1.0,
    seed=0,
    learning_rate=None,
    max_step=0.5,
    iterations=100,
    tolerance=0.002,
    patience=2,
    on_iteration=None,
):
    """Find the control at which the model generates the target: SGD through a whole DDIM chain.

    An iteration noises the start picture, generates, compares latents by mean squared error, and back-propagates
    through every step into the control. All iterations share their noise. With warm_steps, iterations after the
    first start from the previous generation (detached) and take that many steps.

    model: ControlLDM, frozen. input_latents, target_latents: (B, C, h, w). embeddings, negative: (B, 77, D).
    control: (B, d), where to start. num_samples: pictures drawn in every iteration, each from noise of its own, and
    their losses averaged: what one gets wrong by chance the others do not. scale, strength, eta: as ControlLDM.generate
    has them.
    learning_rate: of plain SGD on the normalised control. None: such that the first step has length max_step, then
    SGD-BB, whose rate follows the curvature that the last step met; one setting suits pictures of any contrast.
    max_step, tolerance: lengths in units of the control's spread in training. No step is longer than max_step; a
    control whose steps were shorter than tolerance `patience` times in a row has settled.
    on_iteration: called with the iteration's entry of the history.
    Returns: Inversion.
    Source: Tan et al. 2016, Barzilai-Borwein step size for stochastic gradient descent.
    """
    scheduler = model.base.scheduler
    began = time.perf_counter()
    spread = model.control_net.spread(control)
    count = len(control)
    noise = draw_noise(target_latents.shape, 1 + max(ddim_steps, warm_steps or 0), seed, control.device, num_samples)
    noise = noise.repeat(1, count, 1, 1, 1)  # (steps, B samples, C, h, w), as all that is generated
    embeddings, negative, picture = (
        None if x is None else x.repeat_interleave(num_samples, 0) for x in (embeddings, negative, input_latents)
    )
    result = Inversion(control, control.clone(), iterations=torch.full((count,), iterations))
    rate = None if learning_rate is None else torch.full_like(control[:, :1], learning_rate)
    still = torch.zeros(count, dtype=torch.long, device=control.device)  # short steps in a row
    moved = previous_gradient = torch.zeros_like(control)
    steps, share, drawn = ddim_steps, denoise_strength, None
    for iteration in range(iterations):
        position = (control / spread).requires_grad_(True)
        timesteps = ddim_timesteps(scheduler, steps, share)
        noisy = scheduler.add_noise(picture, noise[0], timesteps[:1].to(picture.device))
        generated = model.generate(
            noisy,
            timesteps,
            embeddings,
            (position * spread).repeat_interleave(num_samples, 0),
            negative=negative,
            scale=scale,
            strength=strength,
            eta=eta,
            noise=noise[1:],
        )
        generated = generated.unflatten(0, (count, num_samples))
        loss = (generated - target_latents[:, None]).square().mean((1, 2, 3, 4))  # (B,)
        (gradient,) = torch.autograd.grad(loss.sum(), position)  # (B, d), of the position alone
        settled = still >= patience
        if iteration:  # a settled target keeps what it settled with, whatever its batch still does
            loss = torch.where(settled, result.loss, loss)
            generated = torch.where(settled[:, None, None, None, None], drawn, generated)
        drawn = generated.detach()
        result.control, result.loss, result.last = control, loss.detach(), drawn[:, 0]
        result.first = result.last if result.first is None else result.first
        result.history.append({"control": control.tolist(), "loss": loss.tolist()})
        if on_iteration:
            on_iteration(result.history[-1])
        if rate is None:
            rate = max_step / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if learning_rate is None and iteration:
            bend = (moved * (gradient - previous_gradient)).sum(1, keepdim=True)
            rate = torch.where(bend > 0, moved.square().sum(1, keepdim=True) / bend, rate)
        step = rate * gradient
        length = step.norm(dim=1, keepdim=True)
        step = step * (max_step / length.clamp_min(max_step))
        still = torch.where(settled | (length[:, 0] < tolerance), still + 1, 0)
        result.iterations[(still == patience).cpu()] = iteration + 1
        if (still >= patience).all():
            break
        moved = torch.where((still >= patience)[:, None], 0, -step)
        control, previous_gradient = control + moved * spread, gradient
        if warm_steps:
            picture, steps, share = drawn.flatten(0, 1), warm_steps, warm_denoise_strength
    result.seconds = time.perf_counter() - began
    return result
