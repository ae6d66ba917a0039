"""Read a control back from a picture: every weight frozen, descend the sampling error into the control alone."""

import time
from dataclasses import dataclass, field

import torch

from cldm.objectives import SamplingObjective


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
    began = time.perf_counter()
    spread = model.control_net.spread(control)
    count = len(control)
    objective = SamplingObjective(
        model,
        input_latents,
        target_latents,
        embeddings,
        negative=negative,
        draws=num_samples,
        ddim_steps=ddim_steps,
        denoise_strength=denoise_strength,
        longest=max(ddim_steps, warm_steps or 0),
        seed=seed,
        scale=scale,
        strength=strength,
        eta=eta,
    )
    everything = torch.arange(count, device=control.device)
    result = Inversion(control, control.clone(), iterations=torch.full((count,), iterations))
    rate = None if learning_rate is None else torch.full_like(control[:, :1], learning_rate)
    still = torch.zeros(count, dtype=torch.long, device=control.device)  # short steps in a row
    moved = previous_gradient = torch.zeros_like(control)
    drawn = None
    for iteration in range(iterations):
        residuals, gradients = objective.gradient(control, everything)
        loss, gradient = residuals.square().mean((1, 2)), gradients.mean(1) * spread  # of the normalised control
        generated = target_latents[:, None] + residuals.unflatten(2, target_latents.shape[1:])
        settled = still >= patience
        if iteration:  # a settled target keeps what it settled with, whatever its batch still does
            loss = torch.where(settled, result.loss, loss)
            generated = torch.where(settled[:, None, None, None, None], drawn, generated)
        drawn = generated
        result.control, result.loss, result.last = control, loss, drawn[:, 0]
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
            objective.start_from(drawn, warm_steps, warm_denoise_strength)
    result.seconds = time.perf_counter() - began
    return result
