"""The frozen base: VAE, text encoder, UNet and noise schedule, from a folder in diffusers' layout or a single file."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel

from ldm.checkpoints import load_single_file
from ldm.files import find_path
from ldm.settings import InputError
from ldm.text import tokenize

PIXELS_AT_ONCE = 16 * 128**2  # that the VAE is given at most, or one picture


def load_part(cls, folder, **kwargs):
    """`cls.from_pretrained` from a local folder, safetensors only. Raises: InputError if it is missing or broken."""
    if not folder.is_dir():
        raise InputError(f"model folder {folder.parent}: no {folder.name}/ in it")
    try:
        half = any(folder.glob("*.fp16.safetensors")) and not any(folder.glob("*model.safetensors"))
        part, info = cls.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            variant="fp16" if half else None,
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a whole {cls.__name__} ({str(error).strip().splitlines()[0]})") from None
    if info["missing_keys"]:
        raise InputError(f"{folder}: not a whole {cls.__name__} (no weights for {min(info['missing_keys'])})")
    return part


class LatentDiffusion(nn.Module):
    """A latent diffusion model (Rombach et al. 2022), every weight frozen; the caller owns the gradient policy."""

    def __init__(self, vae, text_encoder, unet, scheduler):
        super().__init__()
        self.vae, self.text_encoder, self.unet, self.scheduler = vae, text_encoder, unet, scheduler
        # In float32, rounding makes a variance of ddim_sample negative where the last timestep is pure noise.
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path, *, architecture=None, use_ema=False, prediction_type=None, precision="float32"):
        """Read a base from the folders vae, text_encoder, unet and scheduler below `path`, or from a single file.

        architecture, use_ema: of a single file, as ldm.checkpoints.load_single_file has them. prediction_type: what the
        UNet predicts, where the noise schedule's own word is wrong. precision: a torch dtype's name.
        Raises: InputError if something is missing or incomplete.
        """
        path, dtype = find_path(path), getattr(torch, precision)
        if path.is_file():
            folder = find_path(architecture)
            parts = load_single_file(path, folder, use_ema)
        elif path.is_dir():
            folder, options = path, dict(torch_dtype=dtype, low_cpu_mem_usage=False)
            parts = (
                load_part(AutoencoderKL, path / "vae", **options),
                load_part(CLIPTextModel, path / "text_encoder", dtype=dtype),
                load_part(UNet2DConditionModel, path / "unet", **options),
            )
        else:
            raise InputError(f"base {path}: no such file or folder")
        scheduler = folder / "scheduler"
        if not (scheduler / "scheduler_config.json").is_file():
            raise InputError(f"model folder {folder}: no scheduler/scheduler_config.json in it")
        override = {"prediction_type": prediction_type} if prediction_type else {}
        try:
            schedule = DDIMScheduler.from_pretrained(scheduler, **override)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{scheduler}: not a whole DDIMScheduler ({str(error).strip().splitlines()[0]})") from None
        return cls(*(nn.Module.to(part, dtype) for part in parts), schedule)  # diffusers' own `to` warns of nothing

    @property
    def device(self):
        return self.unet.device

    @property
    def downsampling(self):
        """Pixels of a picture per latent, along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, pictures):
        """pictures: (B, 3, H, W) in -1..1. Returns: (B, C, H/f, W/f) scaled latents, the means; f: downsampling."""

        def encode(part):
            return self.vae.encode(part).latent_dist.mean * self.vae.config.scaling_factor

        return self._in_parts(encode, pictures, 1)

    def decode(self, latents):
        """latents: (B, C, H/f, W/f), scaled. Returns: (B, 3, H, W) pictures in -1..1."""

        def decode(part):
            return self.vae.decode(part / self.vae.config.scaling_factor).sample

        return self._in_parts(decode, latents, self.downsampling)

    def _in_parts(self, function, batch, pixels):
        """Returns: function of a batch, PIXELS_AT_ONCE at once, in the VAE's precision and then in the batch's."""
        size = max(1, PIXELS_AT_ONCE // (batch.shape[2] * batch.shape[3] * pixels**2))
        parts = batch.to(self.vae.device, self.vae.dtype).split(size)
        return torch.cat([function(part) for part in parts]).to(batch.dtype)

    def prediction_target(self, latents, noise, timesteps):
        """Returns: (B, C, h, w), what the UNet is to predict of latents so noised: the noise, or the velocity."""
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise

    def embed(self, prompts):
        """Returns: (B, 77, D) text embeddings of a list of prompts."""
        open_clip = self.text_encoder.config.hidden_act == "gelu"  # Stable Diffusion 2's was trained padded with zeros
        tokens = tokenize(prompts, 0 if open_clip else None)
        return self.text_encoder(tokens.to(self.device)).last_hidden_state
