"""Checkpoints in Stable Diffusion's original single-file layouts, written from models in diffusers' layout."""

import re

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoints import RESNET, original_key

LEVELS = 4


def build(version):
    """Returns: vae, text_encoder, unet of Stable Diffusion 1's or 2's shape, but narrow, with random weights."""
    torch.manual_seed(version)
    second = version == 2
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[8, 16, 16, 16],
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=[2, 4, 4, 4] if second else 2,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * LEVELS,
        up_block_types=["UpDecoderBlock2D"] * LEVELS,
        block_out_channels=[8, 8, 8, 16],
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=64,
    )
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="gelu" if second else "quick_gelu",
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return vae, CLIPTextModel(text), unet


def unet_key(key, config):
    """Returns: the original name of a weight of the whole UNet."""
    layers = config["layers_per_block"]

    def block(m, part):  # output_blocks: for every level its ResNets, one more than going down
        return f"output_blocks.{int(m[1]) * (layers + 1) + int(m[2])}.{part}."

    def upsampler(m):
        part = 2 if "CrossAttn" in config["up_block_types"][int(m[1])] else 1
        return f"output_blocks.{int(m[1]) * (layers + 1) + layers}.{part}.conv."

    rules = {
        r"^up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)": lambda m: block(m, 0) + RESNET[m[3]],
        r"^up_blocks\.(\d+)\.attentions\.(\d+)\.": lambda m: block(m, 1),
        r"^up_blocks\.(\d+)\.upsamplers\.0\.conv\.": upsampler,
        r"^conv_norm_out\.": lambda m: "out.0.",
        r"^conv_out\.": lambda m: "out.2.",
    }
    for pattern, replace in rules.items():
        key = re.sub(pattern, replace, key)
    return original_key(key, layers)


def vae_key(key, levels):
    """Returns: the original name of a weight of the VAE."""
    rules = {
        r"down_blocks\.(\d+)\.resnets\.": r"down.\1.block.",
        r"down_blocks\.(\d+)\.downsamplers\.0\.": r"down.\1.downsample.",
        r"up_blocks\.(\d+)\.resnets\.": lambda m: f"up.{levels - 1 - int(m[1])}.block.",
        r"up_blocks\.(\d+)\.upsamplers\.0\.": lambda m: f"up.{levels - 1 - int(m[1])}.upsample.",
        r"mid_block\.resnets\.(\d)\.": lambda m: f"mid.block_{int(m[1]) + 1}.",
        r"mid_block\.attentions\.0\.": "mid.attn_1.",
        r"group_norm\.": "norm.",
        r"to_([qkv])\.": r"\1.",
        r"to_out\.0\.": "proj_out.",
        r"conv_shortcut\.": "nin_shortcut.",
        r"conv_norm_out\.": "norm_out.",
    }
    for pattern, replace in rules.items():
        key = re.sub(pattern, replace, key)
    return key


def open_clip(weights):
    """Returns: a CLIP text encoder's weights as open-clip-torch names them, q, k and v in one, and a layer on top."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inner = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    result = {}
    for key, tensor in weights.items():
        if key in names:
            result[names[key]] = tensor
        elif m := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key):
            start = f"transformer.resblocks.{m[1]}."
            if m[2] in inner:
                result[f"{start}{inner[m[2]]}.{m[3]}"] = tensor
            elif m[2] == "self_attn.q_proj":
                all_three = [weights[key.replace("q_proj", f"{which}_proj")] for which in "qkv"]
                result[f"{start}attn.in_proj_{m[3]}"] = torch.cat(all_three)
    count = 1 + max(int(key.split(".")[2]) for key in result if "resblocks" in key)
    last = {key: torch.zeros_like(t) for key, t in result.items() if f"resblocks.{count - 1}." in key}
    result |= {key.replace(f"resblocks.{count - 1}.", f"resblocks.{count}."): t for key, t in last.items()}
    return result | {"text_projection": torch.eye(len(result["ln_final.bias"])), "logit_scale": torch.tensor(1.0)}


def original_weights(base):
    """Returns: {key: tensor} of a LatentDiffusion, as Stable Diffusion 1.x (or 2.x, by its UNet) is distributed."""
    config = base.unet.config
    unet = {f"model.diffusion_model.{unet_key(k, config)}": v for k, v in base.unet.state_dict().items()}
    vae = {}
    for key, tensor in base.vae.state_dict().items():
        attention = ".attentions." in key and tensor.ndim == 2  # convolutions of 1 x 1 in the original
        name = vae_key(key, len(base.vae.config.block_out_channels))
        vae[f"first_stage_model.{name}"] = tensor[:, :, None, None] if attention else tensor
    text = base.text_encoder.state_dict()
    if config.use_linear_projection:
        text = {f"cond_stage_model.model.{k}": v for k, v in open_clip(text).items()}
    else:
        text = {f"cond_stage_model.transformer.text_model.{k}": v for k, v in text.items()}
    return {key: tensor.clone().contiguous() for key, tensor in {**unet, **vae, **text}.items()}
