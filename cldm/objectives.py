"""What a control is judged by: residuals between what the model says at a control and what the target shows.

An objective of B targets maps controls (B, d) to residuals (B, K, N): K draws of noise, N numbers each. Its loss is
their mean square. Everything that does not depend on the control is computed once.
"""

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cldm.inversion import draw_noise
from ldm.ddim import ddim_timesteps
from ldm.unet import Encoded, encode_unet

CHUNK = 64  # pictures in one call of the model


class Objective(ABC):
    """Losses, gradients and Gauss-Newton curvature of residuals, by forward-mode differentiation.

    calls: how many pictures the model was evaluated on so far; a derivative counts as one more.
    """

    draws: int  # K
    calls = 0

    @abstractmethod
    def residuals(self, control, targets, draws):
        """control: (P, d). targets: (P,) which target each is for. draws: a slice of the K. Returns: (P, k, N)."""

    def _chunks(self, count):
        """Returns: pairs (slice of `count` controls, slice of the draws), each at most CHUNK pictures."""
        rows = max(1, CHUNK // self.draws)
        for start in range(0, count, rows):
            for first in range(0, self.draws, CHUNK):
                yield slice(start, start + rows), slice(first, first + CHUNK)

    @torch.no_grad()
    def losses(self, control, targets):
        """control: (P, d). targets: (P,). Returns: (P, K), one of every draw."""
        losses = control.new_zeros(len(control), self.draws)
        for rows, draws in self._chunks(len(control)):
            residuals = self.residuals(control[rows], targets[rows], draws)
            losses[rows, draws] = residuals.square().mean(2)
            self.calls += residuals.shape[0] * residuals.shape[1]
        return losses

    @torch.no_grad()
    def linearize(self, control, targets):
        """Evaluate the residuals and their derivative along every control.

        control: (P, d). targets: (P,).
        Returns: losses (P, K); gradients (P, K, d), of every draw's half mean square; curvature (P, d, d), that of
        Gauss-Newton.
        """
        count, dim = control.shape
        losses, gradients, curvature = (
            control.new_zeros(count, *shape) for shape in ((self.draws,), (self.draws, dim), (dim, dim))
        )
        for rows, draws in self._chunks(count):
            columns = []
            for axis in torch.eye(dim, dtype=control.dtype, device=control.device):
                with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no forward-mode derivative
                    residuals, column = torch.func.jvp(
                        partial(self.residuals, targets=targets[rows], draws=draws),
                        (control[rows],),
                        (axis.expand_as(control[rows]).contiguous(),),
                    )
                columns.append(column)
                self.calls += 2 * residuals.shape[0] * residuals.shape[1]
            jacobian = torch.stack(columns, 3)  # (P, k, N, d)
            size = residuals.shape[2]
            losses[rows, draws] = residuals.square().mean(2)
            gradients[rows, draws] = torch.einsum("pkn,pknd->pkd", residuals, jacobian) / size
            curvature[rows] += torch.einsum("pknd,pkne->pde", jacobian, jacobian) / size / self.draws
        return losses, gradients, curvature


class DenoisingObjective(Objective):
    """The likelihood bound of a diffusion model: how well noise added to the target is told from it, at a control.

    target_latents: (B, C, h, w). embeddings: (B, 77, D). draws: K noises and timesteps, the same for every target, in
    pairs of opposite sign. levels: share of the noise schedule that the timesteps cover.
    Residuals are those of whatever the base predicts, noise or velocity.
    Source: Li et al. 2023, the diffusion classifier.
    """

    def __init__(self, model, target_latents, embeddings, *, draws=16, levels=(0.5, 1.0), seed=0):
        scheduler, self.model, self.draws = model.base.scheduler, model, draws
        count, device = len(target_latents), target_latents.device
        low, high = (share * (scheduler.config.num_train_timesteps - 1) for share in levels)
        pairs = (draws + 1) // 2
        timesteps = (low + (high - low) * (torch.arange(pairs) + 0.5) / pairs).long()
        noise = draw_noise(target_latents.shape, pairs, seed, device)
        noise = torch.cat([noise, -noise], 1).flatten(0, 1)[:draws]
        self.timesteps = timesteps.repeat_interleave(2)[:draws].repeat(count).to(device)  # (B K,), as all below
        noise, clean = noise.repeat(count, 1, 1, 1), target_latents.repeat_interleave(draws, 0)
        self.noisy = scheduler.add_noise(clean, noise, self.timesteps)
        self.wanted = model.base.prediction_target(clean, noise, self.timesteps)
        with torch.no_grad():
            inputs = (self.noisy, self.timesteps, embeddings.repeat_interleave(draws, 0))
            chunks = zip(*(tensor.split(CHUNK) for tensor in inputs))
            self.encoded = Encoded.cat([encode_unet(model.base.unet, *chunk) for chunk in chunks])

    def residuals(self, control, targets, draws):
        index = targets[:, None] * self.draws + torch.arange(self.draws, device=targets.device)[draws]  # (P, k)
        shape, index = index.shape, index.flatten()
        encoded = self.encoded.select(index)
        prediction = self.model.predict(
            self.noisy[index],
            self.timesteps[index],
            encoded.embeddings,
            control.repeat_interleave(shape[1], 0),
            encoded=encoded,
        )
        return (prediction - self.wanted[index]).flatten(1).unflatten(0, shape)


class SamplingObjective(Objective):
    """Test5's: generate by DDIM at a control, compare latents with the target's. One draw of noise.

    Arguments as cldm.inversion.invert_by_sampling has them.
    """

    draws = 1

    def __init__(
        self, model, input_latents, target_latents, embeddings, *, negative=None, ddim_steps=32, seed=0, **how
    ):
        self.model, self.target, self.how = model, target_latents, how
        self.embeddings, self.negative = embeddings, negative
        self.timesteps = ddim_timesteps(model.base.scheduler, ddim_steps, how.pop("denoise_strength", 1.0))
        self.noise = draw_noise(target_latents.shape, 1 + ddim_steps, seed, target_latents.device)
        start = self.timesteps[:1].to(target_latents.device)
        noise = self.noise[0].expand_as(input_latents)
        self.noisy = model.base.scheduler.add_noise(input_latents, noise, start)

    def residuals(self, control, targets, draws):
        generated = self.model.generate(
            self.noisy[targets],
            self.timesteps,
            self.embeddings[targets],
            control,
            negative=None if self.negative is None else self.negative[targets],
            noise=self.noise[1:],
            **self.how,
        )
        return (generated - self.target[targets]).flatten(1)[:, None]
