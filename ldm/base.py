"""The frozen base: VAE, text encoder, UNet and noise schedule, from a folder in diffusers' layout or a single file."""

import re

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SCHEDULER_DEFAULT_CONFIG
from torch import nn
from transformers import CLIPTextModel

from ldm.checkpoints import INPUTS, cause, check_finite, load_single_file, refuse_download
from ldm.files import find_path
from ldm.schema import check, each, number, one_of, or_null, read_json
from ldm.settings import InputError
from ldm.text import LENGTH, clip_tokenizer, tokenize

PIXELS_AT_ONCE = 16 * 128**2  # the VAE's largest batch, unless one picture is larger

# The keys of diffusers' noise schedules that describe the noise and the prediction; the others describe sampling.
NOISE = {
    "num_train_timesteps": number(2, whole=True),
    "beta_start": number(0, 1),
    "beta_end": number(0, 1),
    "beta_schedule": one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": or_null(each(number(0, 1))),
    "prediction_type": one_of("epsilon", "v_prediction"),
}
# Keys of a UNet's configuration that ask for inputs beyond noise, timestep and text, and the models that have them.
BEYOND_TEXT = {
    "addition_embed_type": "Stable Diffusion XL",
    "class_embed_type": "unCLIP",
    "num_class_embeds": "an upscaler",
    "encoder_hid_dim_type": "Kandinsky or DeepFloyd",
    "time_cond_proj_dim": "a latent consistency model",
}


def load_part(cls, folder, **kwargs):
    """`cls.from_pretrained` from a local folder, in any variant; safetensors are preferred to pickles.

    Raises: InputError if it is missing or broken.
    """
    if not folder.is_dir():
        index = folder.parent / "model_index.json"
        what = f" (it is a {read_json(index).get('_class_name')})" if index.is_file() else ""
        raise InputError(f"model folder {folder.parent}: no {folder.name}/ in it{what}")
    named = r"[a-z_]*model(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)"
    weights = [match for file in sorted(folder.iterdir()) if (match := re.fullmatch(named, file.name))]
    for match in weights:
        refuse_download(folder / match[0])
    safe = any(match[4] == "safetensors" for match in weights)
    variants = {(m[1] or m[3] or "").removeprefix(".") for m in weights if safe == (m[4] == "safetensors")}
    variant = min(variants, key=lambda name: (name not in ("", "fp32", "fp16", "bf16"), len(name), name), default="")
    options = dict(local_files_only=True, use_safetensors=safe, output_loading_info=True, variant=variant or None)
    try:
        part, info = cls.from_pretrained(folder, **options, **kwargs)
    except Exception as error:  # a damaged configuration raises any kind
        raise InputError(f"{folder}: not a whole {cls.__name__} ({cause(error)})") from None
    if info["missing_keys"]:
        raise InputError(f"{folder}: not a whole {cls.__name__} (no weights for {min(info['missing_keys'])})")
    if info["unexpected_keys"] and cls is not CLIPTextModel:  # which may come with a projection that is not used
        what = f"its configuration has no place for {min(info['unexpected_keys'])}"
        raise InputError(f"{folder}: another model than a {cls.__name__} ({what})")
    return part


def load_scheduler(folder, prediction_type=None, overrule=False):
    """Read any of diffusers' noise schedules, from folder/scheduler, as the DDIM schedule that we sample with.

    The noise is that of its own class. Of its sampling options, those that DDIM knows are kept, except a custom grid
    of timesteps; missing ones are Stable Diffusion's. As in diffusers' pipelines, latents are not clipped and timesteps
    count from 1.
    prediction_type: what the UNet predicts, where the schedule does not say so. overrule: it replaces what the schedule
    says, which is that of another UNet.
    Raises: InputError if DDIM cannot follow it.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise InputError(f"model folder {folder}: no scheduler/scheduler_config.json in it")
    config = read_json(file)
    if prediction_type and not overrule and config.get("prediction_type", prediction_type) != prediction_type:
        what = f'says "prediction_type": {config["prediction_type"]}, the YAML {prediction_type}'
        raise InputError(f"{file}: {what}; a folder knows it, so leave it out of the YAML, or correct the file")
    config |= {"prediction_type": prediction_type} if prediction_type else {}
    check(file, config, NOISE, complete=False)
    kind = config.get("_class_name", "DDIMScheduler")
    try:
        own = getattr(diffusers, kind).from_config(config)
        said = {**SCHEDULER_DEFAULT_CONFIG, **own.config, **config}
        scheduler = DDIMScheduler(
            **{key: own.config[key] for key in NOISE},
            rescale_betas_zero_snr=said.get("rescale_betas_zero_snr", False),
            set_alpha_to_one=said["set_alpha_to_one"],
            timestep_spacing="trailing" if said["timestep_spacing"] == "trailing" else "leading",
            steps_offset=1,
            clip_sample=False,
        )
        left = scheduler.alphas_cumprod  # share of the picture that is left at every timestep
        falling = left[0] < 1 and (left.diff() < 0).all() and left[-1] >= 0
        if not falling or len(left) != scheduler.config.num_train_timesteps:
            raise ValueError("its betas must leave less of the picture at every timestep")
    except Exception as error:  # a damaged configuration raises any kind
        raise InputError(f"{file}: no noise schedule that DDIM can follow, {kind} ({cause(error)})") from None
    if left[-1] == 0 and scheduler.config.prediction_type == "epsilon":
        raise InputError(
            f'{file}: "prediction_type" must be v_prediction where only noise is left at the last timestep '
            "(rescale_betas_zero_snr), got epsilon: there, the noise says nothing about the picture"
        )
    return scheduler


def check_parts(where, vae, text_encoder, unet):
    """Raises: InputError if the parts of a base do not belong together, or are of another kind of model."""
    config, text = unet.config, text_encoder.config
    latents, width = vae.config.latent_channels, config.cross_attention_dim
    faults = {
        f"its UNet is given more than a text ({key}: {config[key]}): {whose}": config.get(key) not in (None, "text")
        for key, whose in BEYOND_TEXT.items()
    }
    faults |= {
        f"its UNet takes {config.in_channels} channels and returns {config.out_channels}: "
        f"{INPUTS.get(config.in_channels, 'another kind of model')}": config.in_channels != config.out_channels,
        f"its UNet draws latents of {config.in_channels} channels, its VAE's have {latents}: parts of two models": (
            config.in_channels != latents
        ),
        f"its UNet takes texts of width {width}, its text encoder's are {text.hidden_size}: parts of two models": (
            width != text.hidden_size
        ),
        f"its text encoder knows {text.vocab_size} tokens, {text.max_position_embeddings} a prompt, not CLIP's": (
            text.max_position_embeddings < LENGTH or text.vocab_size < clip_tokenizer().vocab_size
        ),
        "its VAE shifts its latents: Stable Diffusion 3 or Flux": vae.config.get("shift_factor") is not None,
    }
    for fault, found in faults.items():
        if found:
            raise InputError(f"base {where}: {fault}; expected a text-to-image model like Stable Diffusion 1 or 2")


class LatentDiffusion(nn.Module):
    """A latent diffusion model (Rombach et al. 2022) with all weights frozen; the caller owns the gradient policy."""

    def __init__(self, vae, text_encoder, unet, scheduler):
        super().__init__()
        self.vae, self.text_encoder, self.unet, self.scheduler = vae, text_encoder, unet, scheduler
        # In float32, rounding makes DDIM's variance negative where the last timestep is pure noise.
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, path, *, architecture=None, use_ema=False, prediction_type=None, precision="float32"):
        """Read a base from a folder with vae, text_encoder, unet and scheduler, or from a single file.

        architecture, use_ema: of a single file, as for ldm.checkpoints.load_single_file. prediction_type: what the UNet
        predicts, epsilon (noise) or v_prediction, where the file or folder does not say so. precision: a torch dtype's
        name.
        Raises: InputError if something is missing or incomplete, or does not belong together.
        """
        path, dtype = find_path(path), getattr(torch, precision)
        if path.is_file():
            folder = find_path(architecture) if architecture else None
            if folder is None or not folder.is_dir():
                raise InputError(f'base {path}: "architecture" must be a folder like models/sd15, got {architecture}')
            parts = load_single_file(path, folder, use_ema, prediction_type)
        elif path.is_dir():
            folder, options = path, dict(torch_dtype=dtype, low_cpu_mem_usage=False)
            parts = (
                load_part(AutoencoderKL, path / "vae", **options),
                load_part(CLIPTextModel, path / "text_encoder", dtype=dtype),
                load_part(UNet2DConditionModel, path / "unet", **options),
            )
        else:
            raise InputError(f"base {path}: no such file or folder")
        schedule = load_scheduler(folder, prediction_type, overrule=path.is_file())
        check_parts(path, *parts)
        for part in parts:
            nn.Module.to(part, dtype)  # without the warnings of diffusers' own `to`
            check_finite(part, path)
        return cls(*parts, schedule)

    @property
    def device(self):
        return self.unet.device

    @property
    def downsampling(self):
        """Pixels per latent along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode(self, pictures):
        """pictures: (B, 3, H, W) in -1..1. Returns: (B, C, H/f, W/f) scaled latents, the means; f: downsampling."""
        factor = self.vae.config.scaling_factor
        return self._in_parts(lambda part: factor * self.vae.encode(part).latent_dist.mean, pictures, 1)

    def decode(self, latents):
        """latents: (B, C, H/f, W/f), scaled. Returns: (B, 3, H, W) pictures in -1..1."""
        factor = self.vae.config.scaling_factor
        return self._in_parts(lambda part: self.vae.decode(part / factor).sample, latents, self.downsampling)

    def _in_parts(self, function, batch, pixels):
        """Returns: function(batch), computed PIXELS_AT_ONCE at a time in the VAE's precision."""
        size = max(1, PIXELS_AT_ONCE // (batch.shape[2] * batch.shape[3] * pixels**2))
        parts = batch.to(self.vae.device, self.vae.dtype).split(size)
        return torch.cat([function(part) for part in parts]).to(batch.dtype)

    def prediction_target(self, latents, noise, timesteps):
        """Returns: (B, C, h, w), what the UNet should predict for latents so noised: noise or velocity."""
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise

    def embed(self, prompts):
        """Returns: (B, 77, D) text embeddings of a list of prompts."""
        open_clip = self.text_encoder.config.hidden_act == "gelu"  # Stable Diffusion 2's, trained on padding by zeros
        tokens = tokenize(prompts, 0 if open_clip else None)
        return self.text_encoder(tokens.to(self.device)).last_hidden_state
