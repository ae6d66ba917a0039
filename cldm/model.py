"""The frozen base and its numeric ControlNet as one model, and the folder that holds a trained control.

A control's folder: model.yaml (the base it was trained on), config.json and diffusion_pytorch_model.safetensors (the
NumericControlNet), and unet/ where sd_locked=False trained the base's decoder too.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from cldm.controlnet import NumericControlNet, check_control
from cldm.dataset import recognize_prompt
from ldm.base import PREDICTION, LatentDiffusion, load_part
from ldm.checkpoints import SD2, check_finite, identify, read_weights, to_half
from ldm.ddim import ddim_sample, ddim_schedule
from ldm.files import ROOT, find_path, fresh_folder, whole_folder
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor
from ldm.schema import FLAG, TEXT, check, number, one_of, or_null, read_config, reason, write_yaml
from ldm.settings import InputError, Settings
from ldm.unet import decode_unet, encode_unet

MODEL_YAML = "model.yaml"
# Keys of a control's config that calibration fills in.
CALIBRATED = (
    "error_scale",
    "error_floor",
    "proposal_scale",
    "proposal_floor",
    "proposal_correlation",
    "fit_scale",
    "fit_floor",
    "fit_correlation",
    "explained_loss",
    "sampling_loss",
    "guessed",
    "probes",
)

# What a base's YAML, and so a control's model.yaml, may say.
YAML = {
    "base": TEXT,
    "image_size": or_null(number(1, whole=True)),
    "a_prompt": TEXT,
    "n_prompt": TEXT,
    "architecture": or_null(TEXT),
    "use_ema": FLAG,
    "prediction_type": or_null(PREDICTION),
    "precision": one_of("float32", "float16", "bfloat16"),
}
REQUIRED = ("base", "image_size", "a_prompt", "n_prompt")
SD2_EPSILON_SIZE = 512  # pixels that Stable Diffusion 2 was trained at, of the kind that predicts noise


@dataclass(frozen=True)
class Target:
    """B pictures as the model sees them: what is to be drawn, or read."""

    embeddings: torch.Tensor  # (B, 77, D), of the prompts
    latents: torch.Tensor | None = None  # (B, C, h, w), of the pictures; None where they are yet to be drawn
    reference: torch.Tensor | None = None  # (B, C, h, w), latents of the pictures that controls are changes from
    negative: torch.Tensor | None = None  # (B, 77, D), of the prompts that guidance leads away from

    def __len__(self):
        return len(self.embeddings)

    def select(self, index):
        """Returns: the Target of some pictures; index: a slice, or a (B',) tensor of integers."""
        return Target(**{name: None if part is None else part[index] for name, part in vars(self).items()})


@dataclass(frozen=True)
class Sampling:
    """How a picture is generated."""

    ddim_steps: int = 32
    scale: float = 1.0  # of classifier-free guidance; 1: none
    strength: float = 1.0  # factor on what the ControlNet adds
    eta: float = 1.0  # 0: deterministic DDIM; 1: fresh noise at every step, as DDPM
    denoise_strength: float = 1.0  # share of the noise schedule that the chain runs through; 1: from pure noise
    guess_mode: bool = False  # the control acts less in the outer blocks, and not on the negative prompt


class ControlLDM(nn.Module):
    """A LatentDiffusion `base` steered by a NumericControlNet `control_net`, as its YAML `config` says."""

    def __init__(self, base, control_net, config):
        super().__init__()
        self.base, self.control_net, self.config = base, control_net, config
        self.own_unet = False  # whether the UNet was trained with this control, and so belongs to its folder
        self.save_memory = False  # trade time for memory: guidance in two passes, each step recomputed for gradients

    def predict(
        self, latents, timesteps, embeddings, control, reference=None, strength=1.0, encoded=None, guess_mode=False
    ):
        """One call of ControlNet and UNet.

        latents: (B, C, h, w), noisy. timesteps: (B,) or a number. embeddings: (B, 77, D).
        control: (B, d), in the dataset's units, or (B / r, d), one for r latents one after the other; None: the base
        alone. reference: likewise (B, C, h, w), latents of the picture that the control is a change from, for a control
        that takes one. strength: factor on what the ControlNet adds.
        encoded: ldm.unet.encode_unet's result for the same latents, timesteps and embeddings, where it is known.
        guess_mode: scale the ControlNet's outputs from 0.1 at the outermost block to 1 in the middle.
        Returns: (B, C, h, w), noise or velocity, whichever the base was trained to predict.
        """
        if encoded is None:
            encoded = encode_unet(self.base.unet, latents, timesteps, embeddings)
        if control is None:
            return decode_unet(self.base.unet, encoded, [0] * len(encoded.skips), 0).to(latents.dtype)
        down, mid = self.control_net(
            latents.to(self.control_net.dtype),
            timesteps,
            embeddings.to(self.control_net.dtype),
            self.control_net.condition(control, reference),
            conditioning_scale=strength,
            guess_mode=guess_mode,
            return_dict=False,
        )
        dtype = self.base.unet.dtype
        return decode_unet(self.base.unet, encoded, [r.to(dtype) for r in down], mid.to(dtype)).to(latents.dtype)

    @torch.no_grad()
    def encode(self, prompts, pictures=None, references=None, a_prompt=None, n_prompt=None):
        """Returns: the Target of B prompts, and of as many PIL pictures and references, cut to the model's size.

        a_prompt: added to every prompt. n_prompt: what guidance leads away from. None: as the base's YAML says.
        """
        added, negative = (
            self.config[key] if given is None else given
            for key, given in dict(a_prompt=a_prompt, n_prompt=n_prompt).items()
        )
        known = tuple(self.control_net.config.prompts or ())
        texts = [", ".join(filter(None, [recognize_prompt(prompt, known), added])) for prompt in prompts]
        embeddings, negative = self.base.embed(texts), self.base.embed([negative]).expand(len(texts), -1, -1)

        def latents(pictures):
            if pictures is None:
                return None
            fitted = [fit_picture(load_picture(picture), self.config.image_size) for picture in pictures]
            return self.base.encode(pictures_to_tensor(fitted).to(self.base.device))

        return Target(embeddings, latents(pictures), latents(references), negative)

    def choose_prompt(self, given, default):
        """Returns: a script's prompt, `given`; "" in place of its `default` if the control has no texts."""
        return "" if given == default and list(self.control_net.config.prompts or ()) == [""] else given

    def generate(self, noise, control, target, sampling=Sampling(), start=None):  # noqa: B008 (frozen)
        """Draw latents at a control: DDIM with classifier-free guidance (Ho & Salimans 2022).

        noise: (1 + ddim_steps, B or 1, C, h, w), standard normal, one for the start and one for each step.
        control: (B, d). target: a Target of B pictures, whose own latents are not looked at.
        start: (B, C, h, w), latents that are noised as far as the first step asks; None: nothing but noise.
        In guess mode the negative prompt goes without control (Zhang et al. 2023, sec. 3.3). With save_memory,
        a gradient computes the activations of every step again (Chen et al. 2016), a third more time.
        Returns: (B, C, h, w) latents. Gradients pass, unless the caller forbids them.
        """
        scheduler, timesteps = ddim_schedule(self.base.scheduler, sampling.ddim_steps, sampling.denoise_strength)
        first, *others = noise.expand(-1, len(control), -1, -1, -1)
        pure = (
            start is None or sampling.denoise_strength == 1
        )  # Stable Diffusion's first timestep would keep some of it
        noisy = first if pure else scheduler.add_noise(start, first, timesteps[:1].to(first.device))

        def prompted(latents, timestep):
            how = dict(strength=sampling.strength, guess_mode=sampling.guess_mode)
            return self.predict(latents, timestep, target.embeddings, control, target.reference, **how)

        def guided(latents, timestep):
            if self.save_memory or sampling.guess_mode:
                without = None if sampling.guess_mode else control
                negative = self.predict(
                    latents, timestep, target.negative, without, target.reference, sampling.strength
                )
                positive = prompted(latents, timestep)
            else:  # both in one call
                embeddings = torch.cat([target.negative, target.embeddings])
                twice = [None if part is None else torch.cat([part, part]) for part in (control, target.reference)]
                both = self.predict(torch.cat([latents, latents]), timestep, embeddings, *twice, sampling.strength)
                negative, positive = both.chunk(2)
            return negative + sampling.scale * (positive - negative)

        predict = prompted if sampling.scale == 1 else guided
        if self.save_memory and torch.is_grad_enabled():
            predict = partial(checkpoint, predict, use_reentrant=False)
        return ddim_sample(scheduler, timesteps, predict, noisy, sampling.eta, others)


def read_model_yaml(path):
    """Returns: the Settings in a base's YAML, or in a control's. Raises: InputError for what it cannot say."""
    config = read_config(path)
    check(path, config, YAML, REQUIRED)
    return config


def load_base(path, prediction_type=None, precision=None):
    """Read a base from its YAML (models/cldm_v15.yaml), its folder in diffusers' layout, or its single file.

    A folder or file that no YAML in models/ names gets the settings of the YAML with the same architecture.
    prediction_type: what its UNet predicts; precision: of its weights in memory, which its config does not take over;
    None: as the YAML says.
    Returns: (LatentDiffusion, Settings).
    """
    path = find_path(path)
    if path.suffix in (".yaml", ".yml"):
        config = read_model_yaml(path)
    else:
        place = path.resolve()
        place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place  # so that the whole can be moved
        config = Settings(describe(path, prediction_type) | {"base": str(place)})
    if prediction_type:
        config.prediction_type = prediction_type
    given = config | ({"precision": precision} if precision else {})
    base = LatentDiffusion.from_pretrained(config.base, **{key: given[key] for key in given if key not in REQUIRED})
    if config.image_size is None:
        if not isinstance(size := base.unet.config.sample_size, int):
            raise InputError(f"{path}: its UNet's sample_size is {size}; name it in a YAML that says image_size")
        config.image_size = size * base.downsampling
    if config.image_size % base.downsampling:
        expected = f"a multiple of {base.downsampling}"
        raise InputError(f"{path}: image_size must be {expected} with this base, got {config.image_size}")
    return base, config


def describe(path, prediction_type=None):
    """Returns: the Settings of the YAML in models/ that names the base `path`, else of one with its architecture.

    prediction_type: of a single file, where it is known.
    """
    configs = {file.stem: read_model_yaml(file) for file in sorted((ROOT / "models").glob("*.yaml"))}
    for config in configs.values():
        if find_path(config.base).resolve() == path.resolve():
            return config
    if path.is_file():
        name = "cldm_v21" if identify(read_weights(path)) == SD2 else "cldm_v15"
        smaller = {"image_size": SD2_EPSILON_SIZE} if name == "cldm_v21" and prediction_type == "epsilon" else {}
        return configs[name] | {"prediction_type": None} | smaller
    text = path / "text_encoder" / "config.json"
    width = read_config(text).get("hidden_size") if text.is_file() else None
    name = {768: "cldm_v15", 1024: "cldm_v21"}.get(width, "tiny")
    config = configs[name] | {"image_size": None, "prediction_type": None}
    config.pop("use_ema", None)  # of a file
    return config


def load_model(path, *, base=None, dtype=None, precision=None, device="cpu", save_memory=False):
    """Read a control's folder and the base it names.

    base: that LatentDiffusion, where it is in memory already. dtype: of what the folder holds; None: what its YAML's
    `precision` says. precision: of the base's weights, likewise. save_memory: as ControlLDM has it.
    Returns: ControlLDM, frozen, in eval mode.
    Raises: InputError if the folder, or its base, is missing or incomplete, or if they do not belong together.
    """
    path = find_path(path)
    if not (path / MODEL_YAML).is_file():
        raise InputError(f"model_path {path}: no {MODEL_YAML} in it, expected the out_dir of a training")
    check_control(path / "config.json")
    file = path / MODEL_YAML
    base, config = (base, read_model_yaml(file)) if base else load_base(file, precision=precision)
    dtype = dtype or getattr(torch, config.get("precision", "float32"))  # a UNet that was trained is in another now
    control_net = load_part(NumericControlNet, path, torch_dtype=torch.float32, low_cpu_mem_usage=False)
    check_finite(control_net.to_precision(dtype), path)
    for key in ("block_out_channels", "cross_attention_dim"):
        if (own := control_net.config[key]) != (expected := base.unet.config[key]):
            raise InputError(
                f"model_path {path}: made for another base ({key} {own}) than {config.base} ({expected}); set base in "
                f"its {MODEL_YAML} to the one it was trained on"
            )
    own_unet = (path / "unet").is_dir()
    if own_unet:
        unet = load_part(UNet2DConditionModel, path / "unet", torch_dtype=dtype, low_cpu_mem_usage=False)
        check_finite(unet, path / "unet")
        base = LatentDiffusion(base.vae, base.text_encoder, unet, base.scheduler)  # others may use the one given
    model = ControlLDM(base, control_net, config).requires_grad_(False).eval().to(pick_device(device))
    model.own_unet, model.save_memory = own_unet, save_memory
    return model


def pick_device(name):
    """Returns: the torch.device that `name` says, "auto" being a GPU where there is one. Raises: InputError."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        torch.empty(0, device=device, dtype=torch.float64).cpu()  # "meta" has nothing to give, "mps" no float64
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f'setting "device": {name} cannot be used ({reason(error)})') from None
    return device


def control_folder(path, overwrite=False, **options):
    """Check a folder that a control is to be written into: as ldm.files.fresh_folder, and never a base's."""
    return fresh_folder(path, overwrite, never=("vae", "text_encoder"), **options)


def save_model(model, path):
    """Write a control's folder, weights in half precision, with the UNet if that was trained too."""

    def save(part, folder):
        part = copy.deepcopy(part)
        for name, tensor in to_half(part.state_dict()).items():
            part.get_parameter(name).data = tensor
        part.save_pretrained(folder)

    with whole_folder(path, removes=["unet"]) as folder:
        save(model.control_net, folder)
        if model.own_unet:
            save(model.base.unet, folder / "unet")
        write_yaml(model.config, folder / MODEL_YAML)
