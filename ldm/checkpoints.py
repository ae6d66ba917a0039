"""Stable Diffusion's original single-file checkpoints: what a file holds is found from its contents, never its name."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.settings import InputError

SD1, SD2 = "Stable Diffusion 1.x", "Stable Diffusion 2.x"
CONTROL = "control_model."  # what the original's keys of a ControlNet begin with, beside the base's own or alone
HINT = "controlnet_cond_embedding."

# What a file may hold, by texts of which one is in a key of such files alone. The first that fits.
KINDS = {
    "a LoRA": ("lora_", ".lora"),
    "Stable Diffusion XL": ("conditioner.embedders.",),
    SD2: ("cond_stage_model.model.",),
    SD1: ("cond_stage_model.transformer.",),
    "a ControlNet in the original layout": (CONTROL, "input_hint_block.", "zero_convs."),
    "a ControlNet in diffusers' layout": ("controlnet_cond_embedding.",),
    "a UNet without text encoder and VAE": ("input_blocks.", "down_blocks."),
    "a VAE alone": ("decoder.conv_in.",),
    "a text encoder alone": ("text_model.", "resblocks."),
}
# v1-5-pruned.ckpt names this class beside its weights; reading it is given an empty one instead.
LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def read_weights(file):
    """Read a .safetensors or .ckpt file, never running what a pickle asks for.

    Returns: {key: tensor}, without the "state_dict" that may be around it.
    Raises: InputError for anything else than a whole file of weights.
    """
    file = Path(file)
    try:
        with open(file, "rb") as opened:
            safe = opened.read(9)[8:] == b"{"  # eight bytes of length, then JSON
        if safe:
            weights = load_file(file)
        else:
            with torch.serialization.safe_globals([(type("Callback", (), {}), LIGHTNING_CALLBACK)]):
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"refused, its pickle would run {name[1]}; expected tensors alone, best as .safetensors"
        else:
            first = str(error).strip().split("\n")[0]
            what = f"truncated, or no file of weights ({first}); expected .safetensors or .ckpt"
        raise InputError(f"{file}: {what}") from None
    while isinstance(weights, dict) and "state_dict" in weights:
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise InputError(f"{file}: expected a dict of weights, found {type(weights).__name__}")
    return {key: tensor for key, tensor in weights.items() if isinstance(tensor, torch.Tensor)}


def identify(weights):
    """Returns: what a file of weights holds, one of KINDS, or None."""
    for kind, marks in KINDS.items():
        if any(mark in key for key in weights for mark in marks):
            return kind
    return None


def load_single_file(file, architecture, use_ema=False):
    """Read a Stable Diffusion 1.x or 2.x checkpoint in the original layout.

    architecture: a folder with the config.json of vae, text_encoder and unet.
    use_ema: take the UNet's weights averaged over training, if the file has both, as v1-5-pruned.ckpt does.
    Returns: vae, text_encoder, unet in the file's precision.
    Raises: InputError if the file is of another kind than the architecture, or not whole.
    """
    weights = read_weights(file)
    vae_config = AutoencoderKL.load_config(architecture / "vae", local_files_only=True)
    unet_config = UNet2DConditionModel.load_config(architecture / "unet", local_files_only=True)
    found = identify(weights) or "weights of an unknown kind"
    expected = SD2 if unet_config.get("use_linear_projection") else SD1
    if found != expected:
        raise InputError(f"{file}: holds {found}, {architecture.name} expects {expected}")
    if use_ema and not any(key.startswith("model_ema.") for key in weights):
        raise InputError(f"{file}: has no averaged weights (model_ema.…); set use_ema: false")
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(architecture / "text_encoder", local_files_only=True))
    second = found == SD2
    text = convert_open_clip_checkpoint(text_encoder, weights) if second else convert_ldm_clip_checkpoint(weights)
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    unet = convert_ldm_unet_checkpoint(weights, unet_config, extract_ema=use_ema)
    vae = convert_ldm_vae_checkpoint(weights, vae_config)
    with torch.device("meta"):
        parts = AutoencoderKL.from_config(vae_config), text_encoder, UNet2DConditionModel.from_config(unet_config)
    for part, own in zip(parts, (vae, text, unet)):
        fill(part, own, file)
    return parts


def fill(part, weights, file):
    """Put converted weights into a model. Raises: InputError if one is missing, or of another shape."""
    weights = {key: tensor for key, tensor in weights.items() if tensor is not None}  # None: the converters' missing
    try:
        missing = part.load_state_dict(weights, strict=False, assign=True).missing_keys
    except RuntimeError as error:
        raise InputError(f"{file}: does not fit {type(part).__name__} ({str(error).splitlines()[1].strip()})") from None
    if missing:
        raise InputError(f"{file}: not a whole {type(part).__name__} (no weights for {min(missing)})")


def controlnet_weights(weights, config):
    """Find a ControlNet in the original layout, alone in a file or beside its base.

    config: of the UNet, of which layers_per_block counts.
    Returns: {diffusers' name: tensor}, without a hint CNN, with the original fork's MLP; empty if there is none.
    """
    start = CONTROL if any(key.startswith(CONTROL) for key in weights) else ""
    own = {key.removeprefix(start): tensor for key, tensor in weights.items() if key.startswith(start)}
    if "zero_convs.0.0.weight" not in own:
        return {}
    converted = convert_controlnet_checkpoint(own, config)
    converted = {key: t for key, t in converted.items() if not key.startswith(HINT)}
    mlp = {
        f"{HINT}mlp.{2 * i}.{kind}": own.get(f"mlp.fc{i + 1}.{kind}") for i in range(3) for kind in ("weight", "bias")
    }
    return {key: tensor for key, tensor in {**converted, **mlp}.items() if tensor is not None}


# Of a ResNet: diffusers' names and the original's.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_key(key, layers):
    """Returns: the original layout's name of a weight of diffusers' ControlNet or UNet encoder.

    layers: ResNets a level, the config's layers_per_block.
    """

    def block(level, index, part):  # input_blocks: conv_in, then for every level its ResNets and a downsampling
        return f"input_blocks.{1 + int(level) * (layers + 1) + int(index)}.{part}."

    rules = {
        rf"^{HINT}mlp\.(\d)\.": lambda m: f"mlp.fc{int(m[1]) // 2 + 1}.",
        r"^time_embedding\.linear_(\d)\.": lambda m: f"time_embed.{2 * int(m[1]) - 2}.",
        r"^conv_in\.": lambda m: "input_blocks.0.0.",
        r"^controlnet_down_blocks\.(\d+)\.": lambda m: f"zero_convs.{m[1]}.0.",
        r"^controlnet_mid_block\.": lambda m: "middle_block_out.0.",
        r"^(\w+)\.(\d+\.)?resnets\.(\d+)\.(\w+)": lambda m: f"{m[1]}.{m[2] or ''}resnets.{m[3]}.{RESNET[m[4]]}",
        r"^down_blocks\.(\d+)\.resnets\.(\d+)\.": lambda m: block(m[1], m[2], 0),
        r"^down_blocks\.(\d+)\.attentions\.(\d+)\.": lambda m: block(m[1], m[2], 1),
        r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.": lambda m: block(m[1], layers, 0) + "op.",
        r"^mid_block\.resnets\.(\d)\.": lambda m: f"middle_block.{2 * int(m[1])}.",
        r"^mid_block\.attentions\.0\.": lambda m: "middle_block.1.",
    }
    for pattern, replace in rules.items():
        key = re.sub(pattern, replace, key)
    return key
