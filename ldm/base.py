"""The frozen base: VAE, text encoder, UNet and noise schedule, from a folder in diffusers' layout or a single file."""

import re

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from ldm.checkpoints import check_download, check_finite, load_single_file
from ldm.files import find_path
from ldm.schema import InputError, check, one_of, read_config, reason
from ldm.text import LENGTH, clip_tokenizer, tokenize

PIXELS_AT_ONCE = 16 * 128**2  # the VAE's largest batch, unless one picture is larger

PREDICTION = one_of("epsilon", "v_prediction")
VARIANTS = ("", "fp32", "fp16", "bf16")  # of weights, as diffusers names them, without those such as non_ema
BETAS = ("beta_start", "beta_end", "beta_schedule")
# The keys of diffusers' noise schedules that describe the noise and the prediction; the others describe sampling.
NOISE = (*BETAS, "num_train_timesteps", "trained_betas", "rescale_betas_zero_snr", "prediction_type")
# Keys of a UNet's configuration that ask for inputs beyond noise, timestep and text.
BEYOND_TEXT = (
    *("addition_embed_type", "class_embed_type", "num_class_embeds"),  # Stable Diffusion XL, unCLIP, an upscaler
    *("encoder_hid_dim_type", "time_cond_proj_dim"),  # Kandinsky or DeepFloyd, a latent consistency model
)


def has_bfloat16(device):
    """Returns: whether a torch.device has instructions for bfloat16; without, it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(has for name, has in able.items() if name.endswith("bf16"))


def roughly(device):
    """Returns: a context that computes in bfloat16 where a torch.device can: faster, and exact enough to train on."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def load_part(cls, folder, **kwargs):
    """`cls.from_pretrained` from a local folder, in any variant. Raises: InputError if it is missing or broken."""
    if not folder.parent.exists():
        raise InputError(f"base {folder.parent}: no such file or folder; a control's model.yaml says where its base is")
    if not folder.is_dir():
        index = folder.parent / "model_index.json"
        what = f" (it is a {read_config(index).get('_class_name')})" if index.is_file() else ""
        raise InputError(f"model folder {folder.parent}: no {folder.name}/ in it{what}")
    files = [file for file in folder.glob("*model*") if file.suffix in (".safetensors", ".bin")]
    for file in files:
        check_download(file)
    whole = [re.sub(r"-\d+-of-\d+", "", file.name) for file in files]  # of what is split into several files
    variants = {".".join(name.split(".")[1:-1]) for name in whole}
    known = {name: place for place, name in enumerate(VARIANTS)}
    variant = min(variants, key=lambda name: (known.get(name, len(known)), len(name), name), default="")
    options = dict(local_files_only=True, output_loading_info=True, variant=variant or None)
    try:
        part, info = cls.from_pretrained(folder, **options, **kwargs)
    except Exception as error:  # a damaged configuration raises any kind
        raise InputError(f"{folder}: not a whole {cls.__name__} ({reason(error)})") from None
    if info["missing_keys"]:
        raise InputError(f"{folder}: not a whole {cls.__name__} (no weights for {min(info['missing_keys'])})")
    if info["unexpected_keys"] and cls is not CLIPTextModel:  # which may come with a projection that is not used
        raise InputError(f"{folder}: another model than a {cls.__name__}, with {min(info['unexpected_keys'])}")
    return part


def load_scheduler(folder, prediction_type=None, overrule=False):
    """Read any of diffusers' noise schedules, from folder/scheduler, as the DDIM schedule that we sample with.

    What it leaves open is as in Stable Diffusion. As in diffusers' pipelines, latents are not clipped and timesteps
    count from 1; a custom grid of timesteps is not followed.
    prediction_type: what the UNet predicts, where the schedule does not say so. overrule: it replaces what the schedule
    says, which is that of another UNet.
    Raises: InputError if DDIM cannot follow it.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    config = read_config(file)
    said = config.get("prediction_type")
    if said and prediction_type not in (None, said) and not overrule:
        what = f'says "prediction_type": {said}, the YAML {prediction_type}'
        raise InputError(f"{file}: {what}; a folder knows it, so leave it out of the YAML, or correct the file")
    config |= {"prediction_type": prediction_type} if prediction_type else {}
    check(file, config, {"prediction_type": PREDICTION}, complete=False)
    try:
        if missing := [key for key in BETAS if key not in config]:
            raise ValueError(f"it has no {missing[0]}")
        scheduler = DDIMScheduler(
            **{key: config[key] for key in NOISE if key in config},
            set_alpha_to_one=config.get("set_alpha_to_one", False),
            timestep_spacing="trailing" if config.get("timestep_spacing") == "trailing" else "leading",
            steps_offset=1,
            clip_sample=False,
        )
        left = scheduler.alphas_cumprod  # share of the picture that is left at every timestep
        falling = left[0] < 1 and (left.diff() < 0).all() and left[-1] >= 0
        if not falling or len(left) != scheduler.config.num_train_timesteps:
            raise ValueError("its betas must leave less of the picture at every timestep")
        if left[-1] == 0 and scheduler.config.prediction_type == "epsilon":  # the noise says nothing there
            raise ValueError('"prediction_type" must be v_prediction where only noise is left at the last timestep')
    except Exception as error:  # a damaged configuration raises any kind
        kind = config.get("_class_name")
        raise InputError(f"{file}: no noise schedule that DDIM can follow, {kind} ({reason(error)})") from None
    return scheduler


def check_parts(where, vae, text_encoder, unet):
    """Raises: InputError if the parts of a base do not belong together, or are of another kind of model."""
    config, text, words = unet.config, text_encoder.config, clip_tokenizer().vocab_size
    alike = {
        "inputs of its UNet beyond a text": ([key for key in BEYOND_TEXT if config.get(key) not in (None, "text")], []),
        "channels that its UNet takes and returns": (config.in_channels, config.out_channels),
        "channels of its UNet's and its VAE's latents": (config.in_channels, vae.config.latent_channels),
        "width of its UNet's and its text encoder's texts": (config.cross_attention_dim, text.hidden_size),
        "tokens that its text encoder knows, and CLIP": (min(text.vocab_size, words), words),
        "tokens of a prompt, its and CLIP's": (min(text.max_position_embeddings, LENGTH), LENGTH),
        "shift of its VAE's latents": (vae.config.get("shift_factor"), None),
    }
    for what, (found, other) in alike.items():
        if found != other:
            remedy = "expected a text-to-image model like Stable Diffusion 1 or 2"
            raise InputError(f"base {where}: {what}: {found} and {other}; {remedy}")


def load_vae(folder, **options):
    """Read a VAE: Stable Diffusion's AutoencoderKL, or AutoencoderDC (Chen et al. 2024), which draws no samples."""
    kind = read_config(folder / "config.json").get("_class_name") if folder.is_dir() else None
    return load_part(AutoencoderDC if kind == "AutoencoderDC" else AutoencoderKL, folder, **options)


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
        else:
            if use_ema:
                raise InputError(f'base {path}: "use_ema" is of a single file with both kinds of weights; leave it out')
            folder, options = path, dict(torch_dtype=dtype, low_cpu_mem_usage=False)
            parts = (
                load_vae(path / "vae", **options),
                load_part(CLIPTextModel, path / "text_encoder", dtype=dtype),
                load_part(UNet2DConditionModel, path / "unet", **options),
            )
        schedule = load_scheduler(folder, prediction_type, overrule=path.is_file())
        check_parts(path, *parts)
        return cls(*parts, schedule).to_precision(dtype, path)

    def to_precision(self, dtype, where, unet=True):
        """Convert all weights, or all but the UNet's, in place. Returns: self. Raises: InputError if one overflows."""
        for part in (self.vae, self.text_encoder, *[self.unet] * unet):
            nn.Module.to(part, dtype)  # without the warnings of diffusers' own `to`
            check_finite(part, where)
        return self

    @property
    def device(self):
        return self.unet.device

    @property
    def downsampling(self):
        """Pixels per latent along a side."""
        config = self.vae.config
        return 2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1)

    def encode(self, pictures):
        """pictures: (B, 3, H, W) in -1..1. Returns: (B, C, H/f, W/f) scaled latents, the means; f: downsampling."""
        factor = self.vae.config.scaling_factor

        def means(part):
            encoded = self.vae.encode(part)
            return factor * (encoded.latent_dist.mean if "latent_dist" in encoded else encoded.latent)

        return self._in_parts(means, pictures, 1)

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
        embeddings = self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state
        return embeddings.to(self.device)  # of a control's own UNet, which may be elsewhere
