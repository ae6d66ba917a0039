"""A ControlNet whose hint is a vector of numbers: diffusers' ControlNetModel with an MLP for its hint CNN."""

import torch
from diffusers import ControlNetModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from cldm.hints import HINTS, CoordinateHint, DenseHint, encode, wrap
from cldm.proposal import Proposal
from cldm.reference import FUSIONS, ReferenceHint
from ldm.schema import FLAG, POSITIVE, TEXT, check, each, number, one_of, or_null, read_config
from ldm.settings import InputError


class NumberEmbedding(TimestepEmbedding):
    """Embeds the numbers that modulate, outside autocast, as the hint does: half precision would round them."""

    def forward(self, sample):
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample)


def default_names(control_dim):
    """Returns: names for control_dim numbers that nobody named."""
    return ["control"] if control_dim == 1 else [f"control {i + 1}" for i in range(control_dim)]


def check_control(file):
    """Check the config.json of a NumericControlNet. Raises: InputError naming the key, if it says what it cannot."""
    config = read_config(file)
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
        "fusion": one_of(*FUSIONS),
        "proposals": number(0, whole=True),
        "flows": FLAG,
        "periods": or_null(each(or_null(POSITIVE), control_dim)),
        "absolute": or_null(each(FLAG, control_dim)),
        "control_low": or_null(each(number(), control_dim)),
        "control_high": or_null(each(number(), control_dim)),
        "error_scale": or_null(each(number(0), control_dim)),
        "error_floor": or_null(each(number(0), control_dim)),
        "proposal_scale": or_null(each(number(0), control_dim)),
        "proposal_floor": or_null(each(number(0), control_dim)),
        "proposal_correlation": or_null(number(0, 1)),
        "fit_scale": or_null(each(number(0), control_dim)),
        "fit_floor": or_null(each(number(0), control_dim)),
        "fit_correlation": or_null(number(0, 1)),
        "explained_loss": or_null(number(0)),
        "sampling_loss": or_null(number(0)),
        "guessed": or_null(each(FLAG, control_dim)),
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

    hint: one of HINTS; with "reference", the control is a change from a reference picture, whose latents go in too.
    hint_hidden: widths of the MLP's hidden layers; None: as in HINTS. hint_octaves: of "coordinate" alone.
    latent_size: side of the latents, needed by "dense" and "original" alone. fusion: of "reference", one of FUSIONS.
    proposals: components of a Proposal that is trained beside; 0: none. flows: as Proposal has it; False in controls of
    older code. class_embed_type: "projection": the numbers modulate every block, too, by way of the time embedding
    (Perez et al. 2018, FiLM).
    control_names, control_units: d texts. periods: d numbers, None where one does not go round; None: none does.
    absolute: with "reference", d bools, whether a number is the target's own; the others are changes; None: all are.
    control_mean, control_std: the training set's statistics, which normalise a control. control_low, control_high: the
    trained range, None before training. Of a periodic number these are the middle, spread and ends of a whole circle,
    in which it is told. prompts: those of training, distinct, the most frequent first. error_scale, error_floor,
    proposal_scale, proposal_floor, proposal_correlation, fit_scale, fit_floor, fit_correlation, explained_loss,
    sampling_loss, guessed, probes: what cldm.calibration.calibrate found, None before. only_mid_control: act on the
    UNet's middle alone.
    The rest are ControlNetModel's own.
    """

    ignore_for_config = ["kwargs"]

    @register_to_config
    def __init__(
        self,
        hint: str = "coordinate",
        hint_hidden: tuple[int, int] | None = None,
        hint_octaves: int = 4,
        latent_size: int | None = None,
        fusion: str = "affine",
        proposals: int = 0,
        flows: bool = False,
        control_names: tuple[str, ...] = ("control",),
        control_units: tuple[str, ...] = ("",),
        control_mean: tuple[float, ...] = (0.0,),
        control_std: tuple[float, ...] = (1.0,),
        periods: tuple[float | None, ...] | None = None,
        absolute: tuple[bool, ...] | None = None,
        control_low: tuple[float, ...] | None = None,
        control_high: tuple[float, ...] | None = None,
        prompts: tuple[str, ...] | None = None,
        error_scale: tuple[float, ...] | None = None,
        error_floor: tuple[float, ...] | None = None,
        proposal_scale: tuple[float, ...] | None = None,
        proposal_floor: tuple[float, ...] | None = None,
        proposal_correlation: float | None = None,
        fit_scale: tuple[float, ...] | None = None,
        fit_floor: tuple[float, ...] | None = None,
        fit_correlation: float | None = None,
        explained_loss: float | None = None,
        sampling_loss: float | None = None,
        guessed: tuple[bool, ...] | None = None,
        probes: int | None = None,
        only_mid_control: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if self.class_embedding is not None:
            self.class_embedding.__class__ = NumberEmbedding
        if hint not in HINTS:
            raise InputError(f'hint: expected one of {", ".join(HINTS)}, got "{hint}"')
        if hint_hidden is None:
            self.register_to_config(hint_hidden=HINTS[hint])
        if periods is None:
            self.register_to_config(periods=(None,) * len(control_mean))
        inputs, goes_round = len(control_mean) + sum(map(bool, self.config.periods)), any(self.config.periods)
        size = (inputs, self.conv_in.out_channels, self.config.hint_hidden)
        if hint == "coordinate":
            self.controlnet_cond_embedding = CoordinateHint(*size, hint_octaves)
        elif hint == "reference":
            self.controlnet_cond_embedding = ReferenceHint(*size, self.config.in_channels, goes_round, fusion)
        else:
            self.controlnet_cond_embedding = DenseHint(*size, latent_size, original=hint == "original")
        size = inputs, self.config.in_channels, proposals, self.uses_reference, flows
        self.proposal = Proposal(*size) if proposals else None

    @staticmethod
    def _get_init_keys(input_class):
        # diffusers reads a config's keys off one signature; ours is the union of both classes'
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
        if control_net.class_embedding is not None:  # which starts without effect, too
            nn.init.zeros_(control_net.class_embedding.linear_2.weight)
            nn.init.zeros_(control_net.class_embedding.linear_2.bias)
        return control_net

    @property
    def control_dim(self):
        return len(self.config.control_mean)

    def to_precision(self, dtype):
        """Convert all weights but those that take or tell numbers, in place. Returns: self."""
        for name, part in self.named_children():
            if name not in ("controlnet_cond_embedding", "class_embedding", "proposal"):
                part.to(dtype)
        self.controlnet_cond_embedding.output_dtype = dtype
        return self

    def normalize(self, control):
        """control: (B, d) in the dataset's units, float64 where float32 would round it.

        Returns: (B, inputs), what the hint takes: each number with the training set's mean 0 and spread 1, or its sine
        and cosine; in the precision of the hint's weights.
        """
        encoded = encode(control.double(), self.config.control_mean, self.config.control_std, self.config.periods)
        return encoded.to(self.controlnet_cond_embedding.mlp[0].weight.dtype)

    def spread(self, control):
        """Returns: (d,) the training set's standard deviations, on the control's device and in its precision."""
        return control.new_tensor(self.config.control_std)

    def wrap(self, control):
        """control: (..., d). Returns: likewise, periodic numbers within the circle that the control tells them in."""
        return wrap(control, self.config.periods, control.new_tensor(self.config.control_mean))

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, *args, **kwargs):
        """ControlNetModel.forward with a control for its picture.

        sample: (B r, C, h, w), r of every control, one after the other. controlnet_cond: (B, d), or (B, d, H, W)
        constant over H and W as diffusers' pipeline makes it; with a reference (B, d + C, H, W), as `condition` makes
        it, or enlarged by whole numbers.
        """
        maps = controlnet_cond if controlnet_cond.ndim == 4 else controlnet_cond[..., None, None]
        expected = self.control_dim + (sample.shape[1] if self.uses_reference else 0)
        if maps.ndim != 4 or maps.shape[1] != expected:
            what = f"{self.control_dim} numbers ({', '.join(self.config.control_names)})"
            what += " and the latents of a reference" if self.uses_reference else ""
            raise InputError(f"control: expected {what}, got shape {tuple(controlnet_cond.shape)}")
        control, reference = maps.tensor_split([self.control_dim], 1)
        control, repeats = self.normalize(control[:, :, 0, 0]), len(sample) // len(control)
        self.controlnet_cond_embedding.repeats = repeats
        if self.class_embedding is not None:
            kwargs["class_labels"] = control.repeat_interleave(repeats, 0)
        control = control[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        if self.uses_reference:
            down, right = (have // need for have, need in zip(maps.shape[2:], sample.shape[2:]))
            control = torch.cat([control, reference[:, :, ::down, ::right].to(control.dtype)], 1)
        result = super().forward(sample, timestep, encoder_hidden_states, control, *args, **kwargs)
        if not self.config.only_mid_control:
            return result
        down, mid = tuple(map(torch.zeros_like, result[0])), result[1]
        return (down, mid) if isinstance(result, tuple) else ControlNetOutput(down, mid)

    def propose(self, target):
        """target: a Target of B pictures. Returns: what the Proposal says of them."""
        latents = (own for own in (target.latents, target.reference) if own is not None)
        return self.proposal(*(own.to(self.proposal.first.weight.dtype) for own in latents))

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
