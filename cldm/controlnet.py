"""A ControlNet whose hint is a vector of numbers: diffusers' ControlNetModel with an MLP for its hint CNN."""

import math

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional as F

from ldm.schema import FLAG, POSITIVE, TEXT, check, each, number, one_of, or_null, read_json
from ldm.settings import InputError

# and their hidden widths
HINTS = {"coordinate": (256, 256), "dense": (256, 64), "original": (256, 512), "reference": (256, 256)}

REFERENCE_FEATURES = 64


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

    Its weights stay in float32 where the network's are in half precision, and what it does to the number is left out of
    autocast: both would round the number itself.
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
        first, *rest = self.mlp
        weights = first.weight.split([control.shape[1], len(features)], 1)
        with torch.autocast(control.device.type, enabled=False):
            number = F.linear(control[:, :, 0, 0], weights[0].flatten(1))  # no convolution: a GPU rounds those to TF32
            hidden = F.conv2d(features.to(control.dtype)[None], weights[1], first.bias) + number[:, :, None, None]
            return nn.Sequential(*rest)(hidden)


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
        with torch.autocast(control.device.type, enabled=False):
            return self.mlp(control[:, :, 0, 0]).unflatten(1, self.shape)


class ReferenceHint(Hint):
    """What a change does to a reference picture: its features, moved and scaled as a 3-layer MLP on the control says.

    A position in the target is taken to one in the reference by an affine map, the exponential of a sum of generators,
    one for each number, as a group of motions has them, and of what the MLP adds. Its other outputs are the scales and
    shifts of features before both convolutions that follow.
    Source: Jaderberg et al. 2015, spatial transformers; Perez et al. 2018, FiLM.
    """

    def __init__(self, control_dim, channels, hidden, latent_channels):
        super().__init__()
        self.control_dim = control_dim
        self.widths = (6, *2 * [REFERENCE_FEATURES + 1], *2 * [2 * REFERENCE_FEATURES])
        self.mlp = nn.Sequential(
            nn.Linear(control_dim, hidden[0]),
            nn.SiLU(),
            nn.Linear(hidden[0], hidden[1]),
            nn.SiLU(),
            nn.Linear(hidden[1], sum(self.widths)),
        )
        initialize_hint(self.mlp)
        nn.init.normal_(self.mlp[-1].weight, std=1e-3)  # hardly any change at first
        self.generators = nn.Linear(control_dim, 6, bias=False)
        nn.init.zeros_(self.generators.weight)
        self.extract = nn.Sequential(  # to twice the resolution, so that a position between two latents means something
            nn.Conv2d(latent_channels, 2 * REFERENCE_FEATURES, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * REFERENCE_FEATURES, 4 * REFERENCE_FEATURES, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.mix = nn.Conv2d(REFERENCE_FEATURES + 1, 2 * REFERENCE_FEATURES, 3, padding=1)
        self.out = nn.Conv2d(2 * REFERENCE_FEATURES, channels, 3, padding=1)

    def features(self, condition):
        control, reference = condition[:, : self.control_dim, 0, 0], condition[:, self.control_dim :]
        positions, inside, modulation = self.motion(control, *reference.shape[2:])
        scale, shift, scale2, shift2 = (part[:, :, None, None] for part in modulation)
        moved = sample_bilinear(self.extract(reference), 2 * positions + 0.5)
        moved = torch.cat([moved, inside], 1) * (1 + scale) + shift
        mixed = self.mix(F.silu(moved)) * (1 + scale2) + shift2
        return self.out(F.silu(mixed))

    def motion(self, control, height, width):
        """control: (B, d), normalised. height, width: of the latents.

        Returns: where every latent of the target lies in the reference, x and y in latents (B, 2, h, w); how far
        inside that is, from 0 to 1 (B, 1, h, w); the MLP's other outputs.
        """
        with torch.autocast(control.device.type, enabled=False):
            motion, *modulation = self.mlp(control).split(self.widths, 1)
            motion = F.pad((motion + self.generators(control)).unflatten(1, (2, 3)), (0, 0, 0, 1))
            positions = self.positions(torch.linalg.matrix_exp(motion), height, width)
        size = positions.new_tensor([width, height])[:, None, None]
        inside = (torch.minimum(positions, size - 1 - positions) + 1).clamp(0, 1).prod(1, keepdim=True)
        return positions, inside, modulation

    @staticmethod
    def positions(affine, height, width):
        """Returns: (B, 2, h, w), x and y in the reference, in latents, of every latent of the target.

        affine: (B, 3, 3), from the target to the reference, from the middle in units of half the longer side.
        """
        half = affine.new_tensor([width, height]) / 2
        y, x = torch.meshgrid(*(torch.arange(n, device=affine.device) + 0.5 for n in (height, width)), indexing="ij")
        here = (torch.stack([x, y]) - half[:, None, None]) / half.max()  # (2, h, w)
        there = torch.einsum("bij,jhw->bihw", affine[:, :2, :2], here) + affine[:, :2, 2, None, None]
        return there * half.max() + half[:, None, None] - 0.5


def sample_bilinear(features, positions):
    """Interpolate between four neighbours, with a forward-mode derivative, which torch's grid_sample lacks.

    features: (B, C, H, W). positions: (B, 2, h, w), x and y in units of the grid; beyond the border, the border.
    Returns: (B, C, h, w).
    """
    width, size = features.shape[3], features.new_tensor(features.shape[:1:-1], dtype=positions.dtype)[:, None, None]
    positions = torch.minimum(positions.clamp_min(0), size - 1)
    corner = torch.minimum(positions.detach().floor(), size - 2)
    right, down = (positions - corner)[:, :, None].unbind(1)  # (B, 1, h, w) each
    index = (corner[:, 1] * width + corner[:, 0]).long().flatten(1)[:, None].expand(-1, features.shape[1], -1)
    flat = features.flatten(2)
    neighbours = (flat.gather(2, index + k).unflatten(2, positions.shape[2:]) for k in (0, 1, width, width + 1))
    top, top_right, bottom, bottom_right = neighbours
    return (top * (1 - right) + top_right * right) * (1 - down) + (bottom * (1 - right) + bottom_right * right) * down


def check_control(file):
    """Check the config.json of a NumericControlNet. Raises: InputError naming the key, if it says what it cannot."""
    config = read_json(file)
    if config.get("_class_name") != "NumericControlNet":
        what = f"holds a {config.get('_class_name')}, expected a NumericControlNet, as tutorial_train.py leaves it"
        raise InputError(f"{file}: {what}")
    means = config.get("control_mean")
    control_dim = len(means) if isinstance(means, list) and means else 1
    needed = {
        "hint": one_of(*HINTS),
        "control_names": each(TEXT, control_dim),
        "control_units": each(TEXT, control_dim),
        "control_mean": each(number(), control_dim),
        "control_std": each(POSITIVE, control_dim),
    }
    optional = {
        "hint_hidden": or_null(each(number(1, whole=True), 2)),
        "hint_octaves": number(0, whole=True),
        "latent_size": or_null(number(1, whole=True)),
        "control_low": or_null(each(number(), control_dim)),
        "control_high": or_null(each(number(), control_dim)),
        "error_scale": or_null(each(number(0), control_dim)),
        "error_floor": or_null(each(number(0), control_dim)),
        "explained_loss": or_null(number(0)),
        "sampling_loss": or_null(number(0)),
        "probes": or_null(POSITIVE),
        "prompts": or_null(each(TEXT)),
        "only_mid_control": FLAG,
    }
    check(file, config, needed | optional, needed, complete=False)
    low, high = config.get("control_low"), config.get("control_high")
    faults = {
        f'"control_names" must differ, got {config["control_names"]}': len({*config["control_names"]}) < control_dim,
        f'"latent_size" must be a whole number with hint={config["hint"]}, got null': (
            config["hint"] in ("dense", "original") and config.get("latent_size") is None
        ),
        f'"control_low" must be at most "control_high", got {low} and {high}': (
            (low is None) != (high is None) or any(a > b for a, b in zip(low or [], high or []))
        ),
    }
    for fault, found in faults.items():
        if found:
            raise InputError(f"{file}: {fault}")


class NumericControlNet(ControlNetModel):
    """ControlNet (Zhang et al. 2023) on a control vector of d numbers in the units of its dataset.

    hint: "coordinate", "dense", "original", or "reference": the control is then the change from a reference picture,
    whose latents go in beside it. hint_hidden: widths of its MLP's hidden layers; None: as HINTS says.
    hint_octaves: frequencies of the positions, used by "coordinate" alone.
    latent_size: side of the latents, needed by "dense" and "original" alone.
    control_names, control_units: d texts. control_mean, control_std: the training set's statistics, by which a
    control is normalised. control_low, control_high: the trained range, None before training. prompts: what it was
    trained with, distinct, the most frequent first. error_scale, error_floor, explained_loss,
    sampling_loss, probes: what cldm.reading.calibrate found, None before.
    only_mid_control: act on the UNet's middle alone. The rest are ControlNetModel's own.
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
        prompts: tuple[str, ...] | None = None,
        error_scale: tuple[float, ...] | None = None,
        error_floor: tuple[float, ...] | None = None,
        explained_loss: float | None = None,
        sampling_loss: float | None = None,
        probes: int | None = None,
        only_mid_control: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if hint not in HINTS:
            raise InputError(f'hint: expected one of {", ".join(HINTS)}, got "{hint}"')
        if hint_hidden is None:
            self.register_to_config(hint_hidden=HINTS[hint])
        size = (len(control_mean), self.conv_in.out_channels, self.config.hint_hidden)
        if hint == "coordinate":
            self.controlnet_cond_embedding = CoordinateHint(*size, hint_octaves)
        elif hint == "reference":
            self.controlnet_cond_embedding = ReferenceHint(*size, self.config.in_channels)
        else:
            self.controlnet_cond_embedding = DenseHint(*size, latent_size, original=hint == "original")

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
        """control: (B, d) in the dataset's units, float64 where float32 would round it.

        Returns: (B, d) with the training set's mean 0 and spread 1, in the precision of the hint's weights.
        """
        control = control.double()
        normal = (control - control.new_tensor(self.config.control_mean)) / self.spread(control)
        return normal.to(self.controlnet_cond_embedding.mlp[0].weight.dtype)

    def spread(self, control):
        """Returns: (d,) the training set's standard deviations, on the control's device and in its precision."""
        return control.new_tensor(self.config.control_std)

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs):
        """ControlNetModel.forward with a control for its picture.

        sample: (B, C, h, w). controlnet_cond: (B, d), or (B, d, H, W) constant over H and W as diffusers' pipeline
        makes it; with a reference (B, d + C, H, W), as `condition` makes it, or enlarged by whole numbers.
        """
        maps = controlnet_cond if controlnet_cond.ndim == 4 else controlnet_cond[..., None, None]
        expected = self.control_dim + (sample.shape[1] if self.uses_reference else 0)
        if maps.ndim != 4 or maps.shape[1] != expected:
            what = f"{self.control_dim} numbers ({', '.join(self.config.control_names)})"
            what += " and the latents of a reference" if self.uses_reference else ""
            raise InputError(f"control: expected {what}, got shape {tuple(controlnet_cond.shape)}")
        hint = self.controlnet_cond_embedding
        hint.dtype = sample.dtype
        control, reference = maps.tensor_split([self.control_dim], 1)
        control = self.normalize(control[:, :, 0, 0])[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        if self.uses_reference:
            down, right = (have // need for have, need in zip(maps.shape[2:], sample.shape[2:]))
            control = torch.cat([control, reference[:, :, ::down, ::right].to(control.dtype)], 1)
        return super().forward(sample, timestep, encoder_hidden_states, control, *args, **kwargs)

    @property
    def uses_reference(self):
        return self.config.hint == "reference"

    def condition(self, control, reference=None):
        """control: (B, d). reference: (B, C, h, w), latents. Returns: what `forward` takes of both."""
        if not self.uses_reference:
            return control
        if reference is None:
            raise InputError("this control is a change from a reference picture: give one (input_image_path)")
        return torch.cat([control[:, :, None, None].expand(-1, -1, *reference.shape[2:]), reference], 1)
