"""diffusers' UNet in two halves: a control acts on the second alone, so the first is computed once a noisy picture."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps

import torch


@dataclass(frozen=True)
class Encoded:
    """What the encoder leaves to the decoder. Everything is batched alike."""

    middle: torch.Tensor  # (B, c, h, w)
    skips: tuple  # of (B, c, h, w), outermost first
    time: torch.Tensor  # (B, c)
    embeddings: torch.Tensor  # (B, 77, D)

    def select(self, index):
        """Returns: the Encoded of the pictures `index`, a (B',) tensor of integers."""
        skips = tuple(skip[index] for skip in self.skips)
        return Encoded(self.middle[index], skips, self.time[index], self.embeddings[index])

    @staticmethod
    def cat(parts):
        """Returns: the Encoded of all pictures of a list of Encoded."""
        skips = tuple(map(torch.cat, zip(*(part.skips for part in parts))))
        middle, time, embeddings = (torch.cat([getattr(p, k) for p in parts]) for k in ("middle", "time", "embeddings"))
        return Encoded(middle, skips, time, embeddings)


def in_own_precision(function):
    """Weights in half precision are computed in it: autocast would mix it with another, which a CPU refuses."""

    @wraps(function)
    def computed(unet, *args):
        half = unet.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(unet.device.type, enabled=False) if half else nullcontext():
            return function(unet, *args)

    return computed


@in_own_precision
def encode_unet(unet, latents, timesteps, embeddings):
    """latents: (B, C, h, w), noisy. timesteps: (B,) or a number. embeddings: (B, 77, D). Returns: Encoded."""
    latents, embeddings = latents.to(unet.dtype), embeddings.to(unet.dtype)
    time = unet.time_embedding(unet.get_time_embed(latents, timesteps))
    pooled = unet.get_aug_embed(time, embeddings, {})
    time = time if pooled is None else time + pooled
    hidden = unet.conv_in(latents)
    skips = (hidden,)
    for block in unet.down_blocks:
        hidden, own = block(hidden, time, **_context(block, embeddings))
        skips += own
    return Encoded(unet.mid_block(hidden, time, **_context(unet.mid_block, embeddings)), skips, time, embeddings)


@in_own_precision
def decode_unet(unet, encoded, down, mid):
    """down, mid: what a ControlNet adds to skips and middle. Returns: (B, C, h, w), the UNet's prediction."""
    hidden = encoded.middle + mid
    skips = [skip + residual for skip, residual in zip(encoded.skips, down, strict=True)]
    for block in unet.up_blocks:
        own, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
        size = skips[-1].shape[2:] if skips else None
        hidden = block(hidden, own, encoded.time, upsample_size=size, **_context(block, encoded.embeddings))
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def _context(block, embeddings):
    return {"encoder_hidden_states": embeddings} if getattr(block, "has_cross_attention", False) else {}
