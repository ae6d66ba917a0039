"""What this project's methods are compared with: another objective, another solver."""

import torch
from einops import rearrange, repeat

from cldm.denoising import DenoisingObjective
from cldm.objective import Objective
from cldm.reading import probe, search_bounds
from cldm.solvers import distinct_solutions, levenberg_marquardt
from ldm.ddim import draw_noise


class SamplingObjective(Objective):
    """test5.py's loss as least squares: latents generated at a control, less the target's, from which they start.

    target: Target of B pictures. sampling: a Sampling. draws: K generations of every target, each from its own noise.
    """

    def __init__(self, model, target, sampling, draws, seed=0):
        super().__init__(model, torch.ones(model.control_net.control_dim, dtype=torch.bool), draws)
        self.target, self.sampling = target, sampling
        self.noise = draw_noise(target.latents.shape, 1 + sampling.ddim_steps, seed, target.latents.device, draws)

    def residuals(self, control, index, draw_index):
        target = self.target.select(index.repeat_interleave(len(draw_index)))
        noise = self.noise[:, draw_index].repeat(1, len(index), 1, 1, 1)
        control = rearrange(control, "p k d -> (p k) d")
        generated = self.model.generate(noise, control, target, self.sampling, target.latents)
        return rearrange(generated - target.latents, "(p k) c h w -> p k c (h w)", k=len(draw_index))


@torch.no_grad()
def read_by_sampling(model, target, sampling, draws):
    """Levenberg-Marquardt on the sampling objective, from where probes find valleys of the denoising objective.

    Returns: controls (B, d); how many pictures the model was evaluated on; iterations (B,).
    """
    bounds, denoising = search_bounds(model.control_net.config), DenoisingObjective(model, target)
    control, index = probe(denoising, bounds, torch.zeros_like(denoising.free))
    objective = SamplingObjective(model, target, sampling, draws)
    found = levenberg_marquardt(objective, control, index, bounds)
    valleys = distinct_solutions(found, index, objective, bounds)
    best = torch.stack([own[0] for own in valleys])
    calls = denoising.calls + objective.calls * sampling.ddim_steps
    return found.control[best], calls, found.iterations[best]


def read_by_adam(model, target, starts=4, iterations=100, learning_rate=0.1):
    """Adam on the denoising objective, from places evenly spaced over the searched range (iFusion's recipe).

    Returns: controls (B, d); how many pictures the model was evaluated on, a gradient counting twice.
    Source: Kingma & Ba 2015; Wu et al. 2023, iFusion.
    """
    objective = DenoisingObjective(model, target)
    low, high = search_bounds(model.control_net.config)
    places = low + (high - low) * torch.linspace(0, 1, starts + 2)[1:-1, None]
    index, draw_index = torch.arange(len(target)).repeat_interleave(starts), torch.arange(objective.draws)
    unit = model.control_net.spread(low)
    position = (places.repeat(len(target), 1) / unit).requires_grad_(True)
    optimizer = torch.optim.Adam([position], learning_rate)
    for _ in range(iterations):
        optimizer.zero_grad()
        for rows in torch.arange(len(index)).split(2):
            control = repeat(position[rows] * unit, "p d -> p k d", k=len(draw_index))
            objective.residuals(control, index[rows], draw_index).square().mean((1, 2)).sum().backward()
        optimizer.step()
    found = position.detach() * unit
    best = objective.losses(found, index).view(-1, starts).argmin(1) + starts * torch.arange(len(target))
    return found[best], 2 * iterations * len(index) * len(draw_index)
