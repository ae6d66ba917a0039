"""The frozen base and its numeric ControlNet as one model, and the folder that holds a trained control.

A control's folder: model.yaml (which base, how it samples), config.json and diffusion_pytorch_model.safetensors
(the NumericControlNet), and unet/ where sd_locked=False trained the base's decoder too.
"""

import copy
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from cldm.controlnet import NumericControlNet, check_control, default_names
from ldm.base import LatentDiffusion, load_part
from ldm.checkpoints import (
    CONTROL,
    HINT,
    SD1,
    SD2,
    check_finite,
    fill_control,
    find_control,
    identify,
    original_key,
    read_weights,
    to_half,
)
from ldm.ddim import ddim_sample
from ldm.files import ROOT, find_path, fresh_folder, whole_folder, write_whole
from ldm.schema import FLAG, POSITIVE, TEXT, Rule, check, number, one_of, or_null, read_json
from ldm.settings import InputError, Settings, read_yaml, write_yaml
from ldm.unet import decode_unet, encode_unet

MODEL_YAML = "model.yaml"
MOST_PROMPTS = 1000  # that a control keeps
# What cldm.reading.calibrate puts into its config.
CALIBRATED = ("error_scale", "error_floor", "explained_loss", "sampling_loss", "probes")

# What a base's YAML and a control's model.yaml say.
LEARNING_RATE = or_null(POSITIVE)
SHARE = Rule("above 0, at most 1", lambda value: number(0, 1).holds(value) and value > 0)
YAML = {
    "base": TEXT,
    "image_size": or_null(number(1, whole=True)),
    "a_prompt": TEXT,
    "n_prompt": TEXT,
    "only_mid_control": FLAG,
    "sampling": {"scale": number(0), "num_samples": number(1, whole=True), "eta": number(0, 1)},
    "test5": {"learning_rate": LEARNING_RATE},
    "test5_s1": {"learning_rate": LEARNING_RATE, "warm_denoise_strength": SHARE},
    "architecture": or_null(TEXT),
    "use_ema": FLAG,
    "prediction_type": or_null(one_of("epsilon", "v_prediction")),
    "precision": one_of("float32", "float16", "bfloat16"),
    "reference": FLAG,
}
OPTIONAL = ("architecture", "use_ema", "prediction_type", "precision", "reference")


class ControlLDM(nn.Module):
    """A LatentDiffusion `base` steered by a NumericControlNet `control_net`, as its YAML `config` says."""

    def __init__(self, base, control_net, config):
        super().__init__()
        self.base, self.control_net, self.config = base, control_net, config
        self.own_unet = False  # whether the UNet was trained with this control, and so belongs to its folder
        self.save_memory = False  # time for memory: guidance in two passes, gradients that compute each step again

    def predict(
        self, latents, timesteps, embeddings, control, reference=None, strength=1.0, encoded=None, guess_mode=False
    ):
        """One call of ControlNet and UNet.

        latents: (B, C, h, w), noisy. timesteps: (B,) or a number. embeddings: (B, 77, D).
        control: (B, d), in the dataset's units; None: the base alone. reference: (B, C, h, w), the latents of the
        picture that the control is a change from, for a control that knows references.
        strength: factor on what the ControlNet adds.
        encoded: ldm.unet.encode_unet's result for the same latents, timesteps and embeddings, to spare its time.
        guess_mode: let the ControlNet act the less the further out, from 1 in the middle to 0.1.
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
        down = [torch.zeros_like(r) if self.config.only_mid_control else r.to(dtype) for r in down]
        return decode_unet(self.base.unet, encoded, down, mid.to(dtype)).to(latents.dtype)

    def generate(
        self,
        latents,
        timesteps,
        embeddings,
        control,
        *,
        reference=None,
        negative=None,
        scale=1.0,
        strength=1.0,
        eta=0.0,
        noise=None,
        guess_mode=False,
        recompute=False,
    ):
        """Draw pictures' latents by DDIM with classifier-free guidance (Ho & Salimans 2022).

        latents, timesteps, eta, noise: as ldm.ddim.ddim_sample has them. embeddings, negative: (B, 77, D).
        control: (B, d). reference: (B, C, h, w) or None, as in predict.
        scale: of the guidance; at 1 `negative` is not used. strength: of the control.
        guess_mode: as in predict, and the negative prompt goes without control (Zhang et al. 2023, sec. 3.3).
        recompute: for a gradient in the memory of one step: forget a step's activations and compute them again (Chen et
        al. 2016), a third more time. save_memory asks for it too, and for guidance's two predictions one by one.
        Returns: (B, C, h, w) latents. Gradients pass, unless the caller forbids them.
        """

        def with_prompt(x, t):
            return self.predict(x, t, embeddings, control, reference, strength, guess_mode=guess_mode)

        def guided(x, t):
            if not self.save_memory and not guess_mode:
                both = torch.cat([negative, embeddings])
                twice = [None if part is None else torch.cat([part, part]) for part in (control, reference)]
                without, prompted = self.predict(torch.cat([x, x]), t, both, *twice, strength).chunk(2)
            else:
                without = self.predict(x, t, negative, None if guess_mode else control, reference, strength)
                prompted = with_prompt(x, t)
            return without + scale * (prompted - without)

        predict = with_prompt if scale == 1.0 else guided
        if (recompute or self.save_memory) and torch.is_grad_enabled():
            predict = partial(checkpoint, predict, use_reentrant=False)
        return ddim_sample(self.base.scheduler, predict, latents, timesteps, eta, noise)


def read_model_yaml(path):
    """Returns: the Settings in a base's YAML, or a control's. Raises: InputError if it says what it cannot."""
    config = read_yaml(path)
    check(path, config, YAML, [key for key in YAML if key not in OPTIONAL])
    return config


def load_base(path, prediction_type=None):
    """Read a base from its YAML (models/cldm_v15.yaml), its folder in diffusers' layout, or its single file.

    A folder or file that no YAML in models/ names gets the settings of the one that describes its architecture.
    prediction_type: what its UNet predicts; None: as the YAML says.
    Returns: (LatentDiffusion, Settings).
    """
    path = find_path(path)
    if path.suffix in (".yaml", ".yml"):
        config = read_model_yaml(path)
    else:
        config = Settings(describe(path) | {"base": str(path.resolve())})
    if prediction_type:
        config.prediction_type = prediction_type
    options = {key: config[key] for key in OPTIONAL if key in config and key != "reference"}
    base = LatentDiffusion.from_pretrained(config.base, **options)
    if config.image_size is None:
        config.image_size = base.unet.config.sample_size * base.downsampling
    if config.image_size % base.downsampling:
        expected = f"a multiple of {base.downsampling}"
        raise InputError(f"{path}: image_size must be {expected} with this base, got {config.image_size}")
    return base, config


def describe(path):
    """Returns: the Settings in models/ that names the base `path`, else the one of its architecture."""
    configs = {file.stem: read_model_yaml(file) for file in sorted((ROOT / "models").glob("*.yaml"))}
    for config in configs.values():
        if find_path(config.base).resolve() == path.resolve():
            return config
    if path.is_file():
        name = {SD1: "cldm_v15", SD2: "cldm_v21"}.get(identify(read_weights(path)), "cldm_v15")
        return Settings(configs[name] | {"prediction_type": None})
    text = path / "text_encoder" / "config.json"
    width = read_json(text).get("hidden_size") if text.is_file() else None
    name = {768: "cldm_v15", 1024: "cldm_v21"}.get(width, "tiny")
    return Settings(configs[name] | {"image_size": None, "prediction_type": None})


def add_control(base, config, *, control_dim=1, hint="dense", hint_hidden=None, encoder=""):
    """Give a base a fresh control: encoder copied, zero convolutions, a new MLP on control_dim numbers.

    Where config says `reference: true`, its hint is "reference".
    encoder: a file with a ControlNet in the original layout, whose encoder is copied in place of the UNet's.
    Returns: ControlLDM whose output equals the base's exactly, until it is trained.
    """
    hint = "reference" if config.get("reference") else hint
    control_net = NumericControlNet.from_unet(
        base.unet,
        hint=hint,
        hint_hidden=hint_hidden,
        latent_size=None if hint in ("coordinate", "reference") else config.image_size // base.downsampling,
        control_names=default_names(control_dim),
        control_units=[""] * control_dim,
        control_mean=[0.0] * control_dim,
        control_std=[1.0] * control_dim,
    )
    if encoder:
        weights = read_weights(find_path(encoder))
        if not (found := find_control(weights)):
            what = identify(weights) or "weights of an unknown kind"
            raise InputError(f"encoder {encoder}: holds {what}, expected a ControlNet in the original layout")
        fill_control(control_net, found, encoder, keep="controlnet_")
    return ControlLDM(base, control_net, config)


def import_control(base, config, weights, file, control_range=None):
    """Take over a control that the original fork trained: its ReLU MLP takes the number as it is.

    weights: ldm.checkpoints.find_control of the `file`. control_range: [low, high] of every number in training.
    Returns: ControlLDM at the picture size that the MLP was made for.
    """
    try:
        (first, numbers), (second, _), (last, _) = (weights[f"mlp.fc{i}.weight"].shape for i in (1, 2, 3))
    except (LookupError, ValueError):
        raise InputError(f"{file}: not a whole control of the original fork, expected mlp.fc1 to mlp.fc3") from None
    latent_size = math.isqrt(last // base.unet.config.block_out_channels[0])
    config = Settings(config | {"image_size": latent_size * base.downsampling})
    model = add_control(base, config, control_dim=numbers, hint="original", hint_hidden=(first, second))
    fill_control(model.control_net, weights, file)
    if control_range:
        low, high = ([bound] * numbers for bound in control_range)
        model.control_net.register_to_config(control_low=low, control_high=high)
    return model


def fit_statistics(control_net, controls, names, units, prompts=()):
    """Take over what a training set says of its numbers: their names, units, mean, spread and range; its prompts.

    A control that was trained before keeps its mean and spread, to which its weights belong; its range grows.
    controls: (N, d) numbers. names, units: d texts, None where nobody named them. prompts: one of every row.
    Raises: InputError if the numbers are others than the control was trained on, or one of them never changes.
    """
    config, controls = control_net.config, torch.tensor(controls, dtype=torch.float64)
    low, high = controls.amin(0), controls.amax(0)
    trained = any(
        layer.weight.any() for layer in [*control_net.controlnet_down_blocks, control_net.controlnet_mid_block]
    )
    own = list(config.control_names), list(config.control_units)
    nobody = default_names(len(low)), [""] * len(low)
    if trained and names and own not in ((names, units), nobody):
        said = [", ".join(f"{name} {unit}".strip() for name, unit in zip(*both)) for both in (own, (names, units))]
        raise InputError(
            f"resume_path: was trained on {said[0]}, the data has {said[1]}; if they are the same, name them so in "
            "controls.yaml, else train a fresh control (no resume_path)"
        )
    names, units = (names, units) if names else own if trained else nobody
    if trained and config.control_low is not None:
        before = [torch.tensor(bound, dtype=torch.float64) for bound in (config.control_low, config.control_high)]
        low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        for name, unit, *ends in zip(names, units, *before, low, high):
            if ends[:2] != ends[2:]:
                text = "{:.10g} to {:.10g}, which was {:.10g} to {:.10g}".format(*ends[2:], *ends[:2])
                print(f"the range of {name} is now {text} {unit}".rstrip())
    elif not trained:
        size = controls.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
        std = (controls / size).std(0, correction=0) * size  # squares of numbers near the ends of float64 leave it
        for name, value, never in zip(names, low, high == low):
            if never:
                raise InputError(
                    f"nothing to learn: {name} is {value:.10g} in all rows of the training data; it needs at least two "
                    "values, or leave it out"
                )
        control_net.register_to_config(
            control_mean=((controls / size).mean(0) * size).tolist(), control_std=std.tolist()
        )
    prompts = [prompt for prompt, _ in Counter(prompts).most_common()] + list(config.get("prompts") or [])
    control_net.register_to_config(
        control_names=names,
        control_units=units,
        control_low=low.tolist(),
        control_high=high.tolist(),
        prompts=list(dict.fromkeys(prompts))[:MOST_PROMPTS],
        **{key: None for key in CALIBRATED if key in config},  # of weights that it will not have any more
    )


def load_model(path, *, base=None, dtype=None, device="cpu", save_memory=False):
    """Read a control's folder and the base it names.

    base: that LatentDiffusion, where it is in memory already. dtype: of the ControlNet; None: the base's, which its
    YAML's `precision` says. save_memory: as ControlLDM has it.
    Returns: ControlLDM, frozen, in eval mode.
    Raises: InputError if the folder, or its base, is missing or incomplete, or if they do not belong together.
    """
    path = find_path(path)
    if not path.is_dir():
        raise InputError(f"model_path {path}: no such folder; tutorial_train.py makes one")
    if not (path / MODEL_YAML).is_file():
        raise InputError(f"model_path {path}: no {MODEL_YAML} in it, expected the out_dir of a training")
    check_control(path / "config.json")
    base, config = (base, read_model_yaml(path / MODEL_YAML)) if base else load_base(path / MODEL_YAML)
    dtype = dtype or base.unet.dtype
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
        base.unet = load_part(UNet2DConditionModel, path / "unet", torch_dtype=dtype, low_cpu_mem_usage=False)
        check_finite(base.unet, path / "unet")
    model = ControlLDM(base, control_net, config).requires_grad_(False).eval().to(pick_device(device))
    model.own_unet, model.save_memory = own_unet, save_memory
    return model


def pick_device(name):
    """Returns: the torch.device that `name` says, "auto" being a GPU where there is one. Raises: InputError."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)
        torch.empty(0, device=device).cpu()  # "meta" has nothing to give
    except (RuntimeError, AssertionError) as error:
        raise InputError(f'setting "device": {name} cannot be used ({str(error).splitlines()[0]})') from None
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


def export_control(control_net, file):
    """Write a NumericControlNet as one .safetensors file in the original layout: control_model.…, mlp.fc1 to mlp.fc3.

    The original's MLP takes the number as it is, so the first layer takes in the training's mean and spread. The
    file's metadata has the config.
    Raises: InputError if its hint is none that the original computes.
    """
    config = control_net.config
    if config.hint != "original":
        raise InputError(
            f"hint={config.hint} is not in the original, whose code computes hint=original alone; diffusers loads the "
            "control's folder itself"
        )
    weights = dict(control_net.state_dict())
    weight, bias = (weights[f"{HINT}mlp.0.{kind}"].double() for kind in ("weight", "bias"))
    mean, std = (torch.tensor(config[f"control_{which}"]).to(weight) for which in ("mean", "std"))
    weights[f"{HINT}mlp.0.weight"] = (weight / std).float()
    weights[f"{HINT}mlp.0.bias"] = (bias - weight @ (mean / std)).float()
    weights = {CONTROL + original_key(key, config.layers_per_block): t for key, t in to_half(weights).items()}
    own = json.loads(control_net.to_json_string())
    own |= {"control_mean": [0.0] * len(mean), "control_std": [1.0] * len(mean)}
    metadata = {"format": "pt", "config": json.dumps(own)}
    write_whole(Path(file), lambda partial: save_file(weights, partial, metadata))
