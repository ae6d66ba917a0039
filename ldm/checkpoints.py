"""Stable Diffusion's original single-file checkpoints, recognised by their contents, never by their names."""

import re
import zipfile
from functools import partial

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.schema import InputError, read_config, reason

SD1, SD2 = "Stable Diffusion 1.x", "Stable Diffusion 2.x"
DIFFERENCES = "a ControlNet's differences from Stable Diffusion"  # which a key of this name marks
CONTROL = "control_model."  # prefix of a ControlNet's keys in the original layout
HINT = "controlnet_cond_embedding."
# Of the text encoder of 2.x; newer trainers name it as the first of several, of which Stable Diffusion XL has a second.
SD2_TEXT, FIRST_TEXT = "cond_stage_model.model.", r"^conditioner\.embedders\.0\.model\."
SECOND_TEXT = "conditioner.embedders.1."

# What a file may hold -> parts of keys that give it away. The first match counts.
KINDS = {
    DIFFERENCES: ("difference",),
    "a LoRA": ("lora_", ".lora"),
    "Stable Diffusion XL": ("conditioner.embedders.",),
    "unCLIP or an upscaler": ("diffusion_model.label_emb.",),
    SD2: (SD2_TEXT,),
    SD1: ("cond_stage_model.transformer.",),
    "a ControlNet in the original layout": (CONTROL, "input_hint_block.", "zero_convs.", "mlp.fc1."),
    "a ControlNet in diffusers' layout": ("controlnet_cond_embedding.",),
    "a UNet without text encoder and VAE": ("input_blocks.", "down_blocks."),
    "a UNet's averaged weights (model_ema.…) alone": ("model_ema.",),
    "a VAE alone": ("decoder.conv_in.",),
    "a text encoder alone": ("text_model.", "resblocks."),
}
# v1-5-pruned.ckpt refers to this class; an empty one takes its place when the file is read.
LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
AROUND = ("state_dict", "model", "module")  # keys under which trainers save the weights
WRAPPED = ("module.", "_orig_mod.")  # prefixes that trainers add to every key


def check_download(file):
    """Returns: a file's first bytes. Raises: InputError for what a failed download leaves, and if it is not there."""
    try:
        with open(file, "rb") as opened:
            start = opened.read(100)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({reason(error)})") from None
    if start.lstrip().lower().startswith((b"version https://git-lfs", b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{file}: a web page or a Git LFS pointer (git lfs pull), not the weights themselves")
    return start


def read_weights(file):
    """Read a .safetensors or .ckpt file without running any code that a pickle asks for.

    Returns: {key: tensor}, unwrapped from what trainers save around it.
    Raises: InputError unless it is a whole file of weights.
    """
    safe = check_download(file)[8:9] == b"{"  # after eight bytes of length, JSON
    try:
        if safe:
            weights = load_file(file)
        else:
            with torch.serialization.safe_globals([(type("Callback", (), {}), LIGHTNING_CALLBACK)]):
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch and safetensors raise many kinds
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"refused, its pickle would run {name[1]}; expected tensors alone, best as .safetensors"
        else:
            what = f"truncated, or no file of weights ({reason(error)}); expected .safetensors or .ckpt"
        raise InputError(f"{file}: {what}") from None
    for _ in AROUND:
        inner = [key for key in AROUND if isinstance(weights, dict) and isinstance(weights.get(key), dict)]
        weights = weights[inner[0]] if inner else weights
    tensors = weights.items() if isinstance(weights, dict) else ()
    tensors = {key: tensor for key, tensor in tensors if isinstance(key, str) and isinstance(tensor, torch.Tensor)}
    if not tensors:
        found = ", ".join(map(str, weights))[:80] if isinstance(weights, dict) else type(weights).__name__
        raise InputError(f"{file}: expected a dict of weights, found {found}")
    for start in WRAPPED:
        if all(key.startswith(start) for key in tensors):
            tensors = {key.removeprefix(start): tensor for key, tensor in tensors.items()}
    if not any(key.startswith(SECOND_TEXT) for key in tensors):
        tensors = {re.sub(FIRST_TEXT, SD2_TEXT, key): tensor for key, tensor in tensors.items()}
    return tensors


def identify(weights):
    """Returns: what a file of weights holds, in words."""
    for kind, marks in KINDS.items():
        if any(mark in key for key in weights for mark in marks):
            return kind
    return "weights of an unknown kind"


def load_single_file(file, architecture, use_ema=False, prediction_type=None):
    """Read a Stable Diffusion 1.x or 2.x checkpoint in the original layout.

    architecture: a folder with the config.json of vae, text_encoder and unet. use_ema: take the UNet's weights averaged
    over training, which v1-5-pruned.ckpt has too. prediction_type: what its UNet predicts; 2.x exists in both kinds.
    Returns: vae, text_encoder, unet in the file's precision.
    Raises: InputError if the file is not whole, or does not fit the architecture.
    """
    weights = read_weights(file)
    vae_config, unet_config = (read_config(architecture / part / "config.json") for part in ("vae", "unet"))
    found = identify(weights)
    expected = SD2 if unet_config.get("use_linear_projection") else SD1
    if found != expected:
        raise InputError(f"{file}: holds {found}, {architecture.name} expects {expected}")
    starts = {key.split(".")[0] for key in weights}
    for start in ("model", "model_ema") if use_ema else ("model",):
        if start not in starts:
            raise InputError(f"{file}: no {start}.… in it, expected model.…, and with use_ema: true model_ema.… too")
    if found == SD2 and not prediction_type:
        raise InputError(
            f"{file}: {SD2}, which does not say what it predicts; set prediction_type, in the YAML of the base or as a "
            "setting of tool_add_control.py: v_prediction if made for 768 pixels (v2-1_768…), epsilon if for 512"
        )
    try:
        text_config = CLIPTextConfig.from_pretrained(architecture / "text_encoder", local_files_only=True)
        with torch.device("meta"):
            vae, unet = AutoencoderKL.from_config(vae_config), UNet2DConditionModel.from_config(unet_config)
        text_encoder = CLIPTextModel(text_config)
    except Exception as error:  # a damaged configuration raises any kind
        raise InputError(f"architecture {architecture}: cannot be built ({reason(error)})") from None
    convert_text = partial(convert_open_clip_checkpoint, text_encoder) if found == SD2 else convert_ldm_clip_checkpoint
    fill(vae, lambda: convert_ldm_vae_checkpoint(weights, vae_config), file)
    fill(text_encoder, lambda: {k.removeprefix("text_model."): t for k, t in convert_text(weights).items()}, file)
    fill(unet, lambda: convert_ldm_unet_checkpoint(weights, unet_config, extract_ema=use_ema), file)
    return vae, text_encoder, unet


def fill(part, convert, file):
    """Put the weights that `convert()` returns into a model.

    Raises: InputError if one is missing, of another shape or not finite.
    """
    try:
        weights = {key: tensor for key, tensor in convert().items() if tensor is not None}
        missing = part.load_state_dict(weights, strict=False, assign=True).missing_keys
    except RuntimeError as error:
        raise InputError(f"{file}: does not fit {type(part).__name__} ({reason(error)})") from None
    except (LookupError, TypeError, AttributeError) as error:  # how converters miss a weight
        missing = [reason(error).strip("'")]
    if missing:
        raise InputError(f"{file}: not a whole {type(part).__name__} (no weights for {min(missing)})")
    check_finite(part, file)


def check_finite(part, where):
    """Raises: InputError if a weight of a model is infinite or NaN, which makes the sum of its tensor so too."""
    for name, tensor in part.state_dict().items():
        if not tensor.sum(dtype=torch.float32).isfinite():
            hint = "; float16 ends at 65504, bfloat16 does not" if tensor.dtype == torch.float16 else ""
            raise InputError(f"{where}: {type(part).__name__} has weights that are not finite, {name}{hint}")


def find_control(weights):
    """Find a ControlNet in the original layout, alone in a file or beside its base.

    Returns: {name in the original, without "control_model.": tensor}; empty if there is none.
    """
    kind = identify(weights)
    if kind == DIFFERENCES:
        return {}
    found = {key.removeprefix(CONTROL): tensor for key, tensor in weights.items() if key.startswith(CONTROL)}
    return found or (weights if kind == "a ControlNet in the original layout" else {})


def fill_control(control_net, weights, file, keep=()):
    """Put find_control's weights into a ControlNet, except where its own names start with `keep`.

    Raises: InputError if one is missing, of another shape or not finite.
    """
    own, layers = control_net.state_dict(), control_net.config.layers_per_block
    taken = [key for key in own if not key.startswith(keep)]
    fill(control_net, lambda: own | {key: weights[original_key(key, layers)] for key in taken}, file)


def to_half(weights):
    """Returns: {key: tensor} in half precision, or in float32 where half precision would overflow or underflow."""
    half = {key: tensor.half() for key, tensor in weights.items()}
    return {
        key: half[key] if (half[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max() else tensor.float()
        for key, tensor in weights.items()
    }


# Layers of a ResNet: diffusers' name -> the original's.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_key(key, layers):
    """Returns: the original layout's name for a weight of diffusers' ControlNet or UNet encoder.

    layers: ResNets per level, the config's layers_per_block.
    """

    def block(level, index, part):  # input_blocks: conv_in, then the ResNets and the downsampling of every level
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
