"""A ControlNet whose hint is a vector of numbers: diffusers' ControlNetModel with an MLP for its hint CNN."""

import math

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

from ldm.settings import InputError

HINTS = {"coordinate": (256, 256), "dense": (256, 64), "original": (256, 512)}  # and their hidden widths


def default_names(control_dim):
    """Returns: names for control_dim numbers that nobody named."""
    return ["control"] if control_dim == 1 else [f"control {i + 1}" for i in range(control_dim)]


def initialize_hint(mlp):
    """Draw weights that keep the control's variance through the layers: PyTorch's own shrink it twentyfold."""
    for layer in mlp[::2]:
        torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


class Hint(nn.Module):
    """What a control adds to the ControlNet's first features.

    Its weights stay in float32 where the network's are in half precision, which would round the number itself.
    """

    dtype = torch.float32  # of the network

    def forward(self, control):  # (B, d, h, w), constant over h and w
        return self.features(control).to(self.dtype)  # (B, channels, h, w)


class CoordinateHint(Hint):
    """A 3-layer MLP evaluated at every latent position on (control, x, y): any resolution, few weights.

    x and y run from -1 to 1 between the outermost positions of the longer side, and come with their sines and
    cosines at `octaves` frequencies, without which an MLP is slow to learn detail.
    Source: Tancik et al. 2020, Fourier features.
    """

    def __init__(self, control_dim, channels, hidden, octaves):
        super().__init__()
        self.octaves = octaves
        self.mlp = nn.Sequential(
            nn.Conv2d(control_dim + 2 + 4 * octaves, hidden[0], 1),
            nn.SiLU(),
            nn.Conv2d(hidden[0], hidden[1], 1),
            nn.SiLU(),
            nn.Conv2d(hidden[1], channels, 1),
        )
        initialize_hint(self.mlp)

    def features(self, control):
        height, width = control.shape[2:]
        longer = max(height, width, 2) - 1
        y, x = torch.meshgrid(
            (2 * torch.arange(height, device=control.device) - height + 1) / longer,
            (2 * torch.arange(width, device=control.device) - width + 1) / longer,
            indexing="ij",
        )
        phases = [2**k * math.pi * axis for k in range(self.octaves) for axis in (x, y)]
        features = torch.stack([x, y, *map(torch.sin, phases), *map(torch.cos, phases)])  # (2 + 4 octaves, h, w)
        features = features.to(control.dtype).expand(len(control), -1, height, width)
        return self.mlp(torch.cat([control, features], 1))


class DenseHint(Hint):
    """A 3-layer MLP from the control to the whole feature map: one latent size only.

    original: with ReLU after every layer, the last too, as in the original fork, in place of SiLU between them.
    """

    def __init__(self, control_dim, channels, hidden, latent_size, original):
        super().__init__()
        self.shape = (channels, latent_size, latent_size)
        activation = nn.ReLU if original else nn.SiLU
        self.mlp = nn.Sequential(
            nn.Linear(control_dim, hidden[0]),
            activation(),
            nn.Linear(hidden[0], hidden[1]),
            activation(),
            nn.Linear(hidden[1], channels * latent_size**2),
        )
        initialize_hint(self.mlp)
        if original:
            self.mlp.append(nn.ReLU())

    def features(self, control):
        if control.shape[2:] != self.shape[1:]:
            raise InputError(
                f"this hint was made for latents of {self.shape[1]} x {self.shape[2]}, got "
                f"{tuple(control.shape[2:])}: use hint=coordinate"
            )
        return self.mlp(control[:, :, 0, 0]).unflatten(1, self.shape)


class NumericControlNet(ControlNetModel):
    """ControlNet (Zhang et al. 2023) on a control vector of d numbers in the units of its dataset.

    hint: "coordinate", "dense" or "original". hint_hidden: widths of its MLP's hidden layers; None: as HINTS says.
    hint_octaves: frequencies of the positions, used by "coordinate" alone.
    latent_size: side of the latents, not needed by "coordinate".
    control_names, control_units: d texts. control_mean, control_std: the training set's statistics, by which a
    control is normalised. control_low, control_high: the trained range, None before training. error_scale,
    explained_loss: what cldm.reading.calibrate found, None before. The rest are ControlNetModel's own.
    """

    ignore_for_config = ["kwargs"]

    @register_to_config
    def __init__(
        self,
        hint: str = "coordinate",
        hint_hidden: tuple[int, int] | None = None,
        hint_octaves: int = 4,
        latent_size: int | None = None,
        control_names: tuple[str, ...] = ("control",),
        control_units: tuple[str, ...] = ("",),
        control_mean: tuple[float, ...] = (0.0,),
        control_std: tuple[float, ...] = (1.0,),
        control_low: tuple[float, ...] | None = None,
        control_high: tuple[float, ...] | None = None,
        error_scale: tuple[float, ...] | None = None,
        explained_loss: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if hint not in HINTS:
            raise InputError(f'hint: expected one of {", ".join(HINTS)}, got "{hint}"')
        if hint_hidden is None:
            self.register_to_config(hint_hidden=HINTS[hint])
        size = (len(control_mean), self.conv_in.out_channels, self.config.hint_hidden)
        self.controlnet_cond_embedding = (
            CoordinateHint(*size, hint_octaves)
            if hint == "coordinate"
            else DenseHint(*size, latent_size, original=hint == "original")
        )

    @staticmethod
    def _get_init_keys(input_class):
        # diffusers reads the keys of a config off one signature; ours is that of both classes together
        return ConfigMixin._get_init_keys(input_class) | ConfigMixin._get_init_keys(ControlNetModel)

    @classmethod
    def from_unet(cls, unet, **control_config):
        """Copy a UNet's encoder; zero convolutions make its output exactly nothing until it is trained.

        control_config: this class's own parameters (hint, control_mean, ...).
        """
        backbone = ControlNetModel.from_unet(unet)
        control_net = cls(**{**cls.extract_init_dict(backbone.config)[0], **control_config})
        weights = {k: v for k, v in backbone.state_dict().items() if not k.startswith("controlnet_cond_embedding.")}
        control_net.load_state_dict(weights, strict=False)
        return control_net

    @property
    def control_dim(self):
        return len(self.config.control_mean)

    def to_precision(self, dtype):
        """All weights but the hint's, in place. Returns: itself."""
        for name, part in self.named_children():
            if name != "controlnet_cond_embedding":
                part.to(dtype)
        return self

    def normalize(self, control):
        """control: (B, d) in the dataset's units. Returns: (B, d) with the training set's mean 0 and spread 1."""
        return (control - control.new_tensor(self.config.control_mean)) / self.spread(control)

    def spread(self, control):
        """Returns: (d,) the training set's standard deviations, on the control's device and in its precision."""
        return control.new_tensor(self.config.control_std)

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs):
        """ControlNetModel.forward with a control for its picture.

        controlnet_cond: (B, d), or (B, d, H, W) constant over H and W as diffusers' pipeline makes it.
        """
        if controlnet_cond.ndim == 4:
            controlnet_cond = controlnet_cond[:, :, 0, 0]
        if controlnet_cond.ndim != 2 or controlnet_cond.shape[1] != self.control_dim:
            raise InputError(
                f"control: expected {self.control_dim} numbers ({', '.join(self.config.control_names)}), "
                f"got shape {tuple(controlnet_cond.shape)}"
            )
        hint = self.controlnet_cond_embedding
        hint.dtype = sample.dtype
        control = self.normalize(controlnet_cond.to(hint.mlp[0].weight.dtype))
        control = control[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        return super().forward(sample, timestep, encoder_hidden_states, control, *args, **kwargs)
