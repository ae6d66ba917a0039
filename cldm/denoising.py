"""The denoising objective of invert.py: the likelihood bound of a diffusion model as a function of the control."""

import torch
from einops import rearrange, repeat

from cldm.objective import Objective, likelihood_loss
from ldm.ddim import draw_noise
from ldm.unet import Encoded, encode_unet

# Share of the noise schedule that the timesteps cover, without and with a reference: the range with the smallest errors
# on validation pictures.
LEVELS = (0.5, 1.0), (0.3, 0.8)
NEAR = 0.15  # of 1, the share left unexplained for which all draws are asked: half of them are off by a tenth


class DenoisingObjective(Objective):
    """How well the noise added to a target is predicted at a control (Li et al. 2023, the diffusion classifier).

    target: Target of B pictures. free: (d,) bool; None: all numbers. draws: K noises and timesteps, the same for every
    target, in pairs of opposite noise. Residuals are those of whatever the base predicts, noise or velocity.
    """

    paired = True

    def __init__(self, model, target, free=None, draws=8, seed=0):
        device, pairs = target.latents.device, draws // 2
        free = torch.ones(model.control_net.control_dim, dtype=torch.bool) if free is None else free
        super().__init__(model, free.to(device), 2 * pairs)
        self.target = target
        if target.reference is not None:
            self.alike = 1, 2, 3  # channels of their own variance read exposure half as well
        scheduler = model.base.scheduler
        low, high = (
            share * (scheduler.config.num_train_timesteps - 1) for share in LEVELS[target.reference is not None]
        )
        timesteps = (low + (high - low) * (torch.arange(pairs) + 0.5) / pairs).long().to(device)
        noise = draw_noise(target.latents.shape, pairs, seed, device)
        # from here on, everything is (B K, ...), the draws of the first target first
        self.timesteps = repeat(timesteps, "pairs -> (b pairs 2)", b=len(target))
        noise = repeat(torch.stack([noise, -noise], 1), "pairs two 1 c h w -> (b pairs two) c h w", b=len(target))
        clean = repeat(target.latents, "b c h w -> (b k) c h w", k=self.draws)
        self.noisy = scheduler.add_noise(clean, noise, self.timesteps)
        self.wanted = model.base.prediction_target(clean, noise, self.timesteps)
        with torch.no_grad():  # the UNet's encoder does not see the control
            inputs = (self.noisy, self.timesteps, repeat(target.embeddings, "b n d -> (b k) n d", k=self.draws))
            chunks = zip(*(tensor.split(self.chunk) for tensor in inputs))
            self.encoded = Encoded.cat([encode_unet(model.base.unet, *chunk) for chunk in chunks])

    def residuals(self, control, index, draw_index):
        picture = rearrange(index[:, None] * self.draws + draw_index.to(index.device), "p k -> (p k)")
        encoded, reference = self.encoded.select(picture), self.target.reference
        prediction = self.model.predict(
            self.noisy[picture],
            self.timesteps[picture],
            encoded.embeddings,
            None if control is None else control[:, 0],  # the same for every draw
            None if reference is None else reference[index],
            encoded=encoded,
        )
        return rearrange(prediction - self.wanted[picture], "(p k) c h w -> p k c (h w)", k=len(draw_index))

    @torch.no_grad()
    def unexplained(self, residuals):
        """residuals: (B, K, C, n), of the targets at controls. Returns: (B,), their loss as a share of that without.

        Above 1 a control explains less than nothing. Of two draws of opposite noise, which tell much the same, the
        first is taken, and both where that comes near 1. Source: Wright 1921, what the coefficient of determination
        lacks of 1.
        """

        def without(_, index, draw_index):
            self.calls += len(index) * len(draw_index)
            return (self.residuals(None, index, draw_index),)

        def share(index, draws):
            (alone,) = self._in_chunks(without, index[:, None], index, draws, self.chunk)
            loss, loss_alone = (likelihood_loss(own, self.alike)[0] for own in (residuals[index][:, draws], alone))
            return loss / loss_alone

        every = torch.arange(self.draws, device=residuals.device)
        shares = share(torch.arange(len(residuals), device=residuals.device), every[::2])
        near = ((shares - 1).abs() < NEAR).nonzero()[:, 0]
        if len(near):
            shares[near] = share(near, every)
        return shares

    @property
    def middle_draws(self):
        """(2,), the pair of draws in the middle of the noise levels."""
        first = (self.draws - 1) // 4 * 2
        return torch.tensor([first, first + 1])
