"""Read a control back from a picture: every weight frozen, descend the sampling error into the control alone."""

import time
from dataclasses import dataclass, field

import torch

from cldm.objectives import SamplingObjective
from cldm.reading import is_outside
from cldm.solvers import sgd
from ldm.ddim import ddim_timesteps


@dataclass
class Inversion:
    """What an inversion found. For a batch of B targets and d numbers each:"""

    control: torch.Tensor  # (B, d), in the dataset's units
    start: torch.Tensor  # (B, d)
    iterations: torch.Tensor = None  # (B,) until each control settled
    settled: torch.Tensor = None  # (B,) bool, whether it has
    flags: list = None  # of B lists of some of reading.FLAGS
    loss: torch.Tensor = None  # (B,) latent mean squared error of the control
    model_calls: int = 0  # pictures that the model was evaluated on, a gradient counting twice
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
    guess_mode=False,
    seed=0,
    on_iteration=None,
    **descent,
):
    """Find the control at which the model generates the target: SGD through a whole DDIM chain.

    An iteration noises the start picture, generates, compares latents by mean squared error, and back-propagates
    through every step into the control. All iterations share their noise. With warm_steps, iterations after the
    first start from the previous generation (detached) and take that many steps.

    model: ControlLDM, frozen. input_latents, target_latents: (B, C, h, w). embeddings, negative: (B, 77, D).
    control: (B, d), where to start. num_samples: pictures drawn in every iteration, each from noise of its own, and
    their losses averaged: what one gets wrong by chance the others do not. scale, strength, eta, guess_mode: as
    ControlLDM.generate has them.
    on_iteration: called with the iteration's entry of the history.
    descent: learning_rate, max_step, iterations, tolerance and patience, as solvers.sgd has them; its unit is the
    control's spread in training.
    Returns: Inversion.
    """
    began = time.perf_counter()
    if warm_steps:  # what does not fit is said before the first iteration
        ddim_timesteps(model.base.scheduler, warm_steps, warm_denoise_strength)
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
        guess_mode=guess_mode,
    )
    result = Inversion(control, start=control)

    def after(control, residuals):
        drawn = target_latents[:, None] + residuals.unflatten(2, target_latents.shape[1:])
        result.control, result.loss, result.last = control, residuals.square().mean((1, 2)), drawn[:, 0]
        result.first = result.last if result.first is None else result.first
        result.history.append({"control": control.tolist(), "loss": result.loss.tolist()})
        if warm_steps:
            objective.start_from(drawn, warm_steps, warm_denoise_strength)
        if on_iteration:
            on_iteration(result.history[-1])

    result.iterations, result.settled = sgd(
        objective,
        control,
        torch.arange(len(control), device=control.device),
        model.control_net.spread(control),
        on_iteration=after,
        **descent,
    )
    result.model_calls, result.seconds = objective.calls, time.perf_counter() - began
    result.flags = flag(model.control_net.config, result)
    return result


def flag(config, result):
    """Returns: for each of an Inversion's B targets, a list of the reading.FLAGS that are raised."""
    sought = torch.ones_like(result.control[0], dtype=torch.bool)
    raised = {"unsettled": ~result.settled}
    if config.control_low is not None:
        raised["outside_range"] = is_outside(config, result.control, torch.full_like(result.control, torch.inf), sought)
    if config.sampling_loss is None:
        raised["uncalibrated"] = torch.ones_like(result.iterations, dtype=torch.bool)
    else:
        raised["unexplained"] = result.loss > config.sampling_loss
    return [[name for name, holds in raised.items() if holds[i]] for i in range(len(result.control))]
