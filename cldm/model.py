"""The frozen base and its numeric ControlNet as one model, and the folder that holds a trained control.

A control's folder: model.yaml (the base it was trained on), config.json and diffusion_pytorch_model.safetensors (the
NumericControlNet), and unet/ where sd_locked=False trained the base's decoder too.
"""

import copy
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from cldm.controlnet import NumericControlNet, check_control
from ldm.base import LatentDiffusion, load_part
from ldm.checkpoints import SD2, check_finite, identify, read_weights, to_half
from ldm.ddim import ddim_sample
from ldm.files import ROOT, find_path, fresh_folder, whole_folder
from ldm.schema import FLAG, TEXT, check, number, one_of, or_null, read_json
from ldm.settings import InputError, Settings, read_yaml, write_yaml
from ldm.unet import decode_unet, encode_unet

MODEL_YAML = "model.yaml"
# Keys of a control's config that calibration fills in.
CALIBRATED = ("error_scale", "error_floor", "explained_loss", "sampling_loss", "probes")

# What a base's YAML, and so a control's model.yaml, may say.
YAML = {
    "base": TEXT,
    "image_size": or_null(number(1, whole=True)),
    "a_prompt": TEXT,
    "n_prompt": TEXT,
    "architecture": or_null(TEXT),
    "use_ema": FLAG,
    "prediction_type": or_null(one_of("epsilon", "v_prediction")),
    "precision": one_of("float32", "float16", "bfloat16"),
}
REQUIRED = ("base", "image_size", "a_prompt", "n_prompt")


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
        down = [torch.zeros_like(r) if self.control_net.config.only_mid_control else r.to(dtype) for r in down]
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
    """Returns: the Settings in a base's YAML, or in a control's. Raises: InputError for what it cannot say."""
    config = read_yaml(path)
    check(path, config, YAML, REQUIRED)
    return config


def load_base(path, prediction_type=None):
    """Read a base from its YAML (models/cldm_v15.yaml), its folder in diffusers' layout, or its single file.

    A folder or file that no YAML in models/ names gets the settings of the YAML with the same architecture.
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
    base = LatentDiffusion.from_pretrained(config.base, **{key: config[key] for key in config if key not in REQUIRED})
    if config.image_size is None:
        config.image_size = base.unet.config.sample_size * base.downsampling
    if config.image_size % base.downsampling:
        expected = f"a multiple of {base.downsampling}"
        raise InputError(f"{path}: image_size must be {expected} with this base, got {config.image_size}")
    return base, config


def describe(path):
    """Returns: the Settings of the YAML in models/ that names the base `path`, else of one with its architecture."""
    configs = {file.stem: read_model_yaml(file) for file in sorted((ROOT / "models").glob("*.yaml"))}
    for config in configs.values():
        if find_path(config.base).resolve() == path.resolve():
            return config
    if path.is_file():
        name = "cldm_v21" if identify(read_weights(path)) == SD2 else "cldm_v15"
        return configs[name] | {"prediction_type": None}
    text = path / "text_encoder" / "config.json"
    width = read_json(text).get("hidden_size") if text.is_file() else None
    name = {768: "cldm_v15", 1024: "cldm_v21"}.get(width, "tiny")
    return configs[name] | {"image_size": None, "prediction_type": None}


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
