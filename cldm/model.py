"""The frozen base and its numeric ControlNet as one model, and the folder that holds a trained control.

A control's folder: model.yaml (which base, how it samples), config.json and diffusion_pytorch_model.safetensors
(the NumericControlNet), and unet/ where sd_locked=False trained the base's decoder too.
"""

import copy
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from torch import nn
from torch.utils.checkpoint import checkpoint

from cldm.controlnet import NumericControlNet, default_names
from ldm.base import ROOT, LatentDiffusion, find_path, load_part
from ldm.ddim import ddim_sample
from ldm.settings import InputError, read_yaml, whole_folder
from ldm.unet import decode_unet

MODEL_YAML = "model.yaml"


class ControlLDM(nn.Module):
    """A LatentDiffusion `base` steered by a NumericControlNet `control_net`, as its YAML `config` says."""

    def __init__(self, base, control_net, config):
        super().__init__()
        self.base, self.control_net, self.config = base, control_net, config
        self.own_unet = False  # whether the UNet was trained with this control, and so belongs to its folder

    def predict(self, latents, timesteps, embeddings, control, strength=1.0, encoded=None):
        """One call of ControlNet and UNet.

        latents: (B, C, h, w), noisy. timesteps: (B,) or a number. embeddings: (B, 77, D).
        control: (B, d), in the dataset's units. strength: factor on what the ControlNet adds.
        encoded: ldm.unet.encode_unet's result for the same latents, timesteps and embeddings, to spare its time.
        Returns: (B, C, h, w), noise or velocity, whichever the base was trained to predict.
        """
        down, mid = self.control_net(
            latents, timesteps, embeddings, control, conditioning_scale=strength, return_dict=False
        )
        if self.config.only_mid_control:
            down = [torch.zeros_like(residual) for residual in down]
        if encoded is not None:
            return decode_unet(self.base.unet, encoded, down, mid)
        return self.base.unet(
            latents,
            timesteps,
            embeddings,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]

    def generate(
        self,
        latents,
        timesteps,
        embeddings,
        control,
        *,
        negative=None,
        scale=1.0,
        strength=1.0,
        eta=0.0,
        noise=None,
        recompute=False,
    ):
        """Draw pictures' latents by DDIM with classifier-free guidance (Ho & Salimans 2022).

        latents, timesteps, eta, noise: as ldm.ddim.ddim_sample has them. embeddings, negative: (B, 77, D).
        control: (B, d). scale: of the guidance; at 1 `negative` is not used. strength: of the control.
        recompute: for a gradient in the memory of one step: forget a step's activations and compute them again (Chen et
        al. 2016), a third more time.
        Returns: (B, C, h, w) latents. Gradients pass, unless the caller forbids them.
        """
        if scale == 1.0:

            def predict(x, t):
                return self.predict(x, t, embeddings, control, strength)
        else:
            both, twice = torch.cat([negative, embeddings]), torch.cat([control, control])

            def predict(x, t):
                without, with_prompt = self.predict(torch.cat([x, x]), t, both, twice, strength).chunk(2)
                return without + scale * (with_prompt - without)

        if recompute and torch.is_grad_enabled():
            predict = partial(checkpoint, predict, use_reentrant=False)
        return ddim_sample(self.base.scheduler, predict, latents, timesteps, eta, noise)


def load_base(path):
    """Read a base from its YAML (models/tiny.yaml), or from a folder in diffusers' layout.

    A folder that no YAML in models/ describes gets tiny.yaml's settings and its own picture size.
    Returns: (LatentDiffusion, DictConfig).
    """
    path = find_path(path)
    if not path.is_dir():
        config = read_yaml(path)
        for key in read_yaml(ROOT / "models" / "tiny.yaml"):
            if key not in config:
                raise InputError(f'{path}: no "{key}" in it, expected a model description like models/tiny.yaml')
        return LatentDiffusion.from_pretrained(config.base), config
    base = LatentDiffusion.from_pretrained(path)
    for file in (ROOT / "models").glob("*.yaml"):
        config = read_yaml(file)
        if find_path(config.base).resolve() == path.resolve():
            return base, config
    config = read_yaml(ROOT / "models" / "tiny.yaml")
    size = base.unet.config.sample_size * base.downsampling
    return base, OmegaConf.merge(config, {"base": str(path.resolve()), "image_size": size})


def add_control(base, config, *, control_dim=1, hint="dense"):
    """Give a base a fresh control: encoder copied, zero convolutions, a new MLP on control_dim numbers.

    Returns: ControlLDM whose output equals the base's exactly, until it is trained.
    """
    control_net = NumericControlNet.from_unet(
        base.unet,
        hint=hint,
        latent_size=config.image_size // base.downsampling if hint == "dense" else None,
        control_names=default_names(control_dim),
        control_units=[""] * control_dim,
        control_mean=[0.0] * control_dim,
        control_std=[1.0] * control_dim,
    )
    return ControlLDM(base, control_net, config)


def fit_statistics(control_net, controls, names, units):
    """Take a training set's controls (N, d) and what it calls them into a control that was never trained."""
    if control_net.config.control_low is not None:
        return  # trained before: its weights belong to the statistics they were trained with
    controls = torch.tensor(controls, dtype=torch.float64)
    std = controls.std(0, correction=0)
    control_net.register_to_config(
        control_names=names,
        control_units=units,
        control_mean=controls.mean(0).tolist(),
        control_std=torch.where(std > 0, std, 1.0).tolist(),
        control_low=controls.amin(0).tolist(),
        control_high=controls.amax(0).tolist(),
    )


def load_model(path):
    """Read a control's folder and the base it names. Returns: ControlLDM, frozen, in eval mode.

    Raises: InputError if the folder, or its base, is missing or incomplete.
    """
    path = find_path(path)
    if not path.is_dir():
        raise InputError(f"model_path {path}: no such folder; tutorial_train.py makes one")
    if not (path / MODEL_YAML).is_file():
        raise InputError(f"model_path {path}: no {MODEL_YAML} in it, expected the out_dir of a training")
    base, config = load_base(path / MODEL_YAML)
    control_net = load_part(NumericControlNet, path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    if (path / "unet").is_dir():
        base.unet = load_part(UNet2DConditionModel, path / "unet", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    model = ControlLDM(base, control_net, config).requires_grad_(False).eval()
    model.own_unet = (path / "unet").is_dir()
    return model


def save_model(model, path):
    """Write a control's folder, weights in half precision, with the UNet if that was trained too."""
    with whole_folder(path) as folder:
        copy.deepcopy(model.control_net).half().save_pretrained(folder)
        if model.own_unet:
            copy.deepcopy(model.base.unet).half().save_pretrained(folder / "unet")
        elif (Path(path) / "unet").is_dir():
            shutil.rmtree(Path(path) / "unet")
        OmegaConf.save(model.config, folder / MODEL_YAML)
