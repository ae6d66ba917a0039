"""A miniature base of random weights, the controls on it, and a tiny dataset: everything the tests share."""

import copy
import fcntl
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from cldm.conversion import add_control
from cldm.model import load_base, load_model, save_model
from cldm.training import ControlTraining
from ldm.files import ROOT
from ldm.schema import read_config, write_yaml
from ldm.settings import run_script
from tests.original_layout import build

IMAGE_SIZE, DOWNSAMPLING, CHANNELS = 32, 4, 4
LATENT_SIZE = IMAGE_SIZE // DOWNSAMPLING


def build_vae():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 16],
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
        scaling_factor=0.5,
    )


def build_unet():
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[16, 32],
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def build_text_encoder():
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config)


def build_scheduler():
    """The shipped base's noise schedule: velocity, and pure noise at the last timestep."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


@pytest.fixture(scope="session", autouse=True)
def foreground():
    """Ctrl-C as a terminal has it: shells let what runs in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def base_yaml(tmp_path_factory):
    """The YAML of a miniature base on disk; every other key is models/tiny.yaml's."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    parts = dict(vae=build_vae(), unet=build_unet(), text_encoder=build_text_encoder(), scheduler=build_scheduler())
    for name, part in parts.items():
        part.save_pretrained(folder / "mini_sd" / name)
    shipped = read_config(ROOT / "models" / "tiny.yaml")
    write_yaml(shipped | {"base": str(folder / "mini_sd"), "image_size": IMAGE_SIZE}, folder / "mini.yaml")
    return folder / "mini.yaml"


@pytest.fixture(scope="session")
def loaded_base(base_yaml):
    return load_base(base_yaml)


@pytest.fixture
def base(loaded_base):
    """The miniature LatentDiffusion, a test's own."""
    return copy.deepcopy(loaded_base[0])


def randomize_zero_convolutions(control_net, std=0.1):
    """A fresh ControlNet adds exactly nothing; this makes it add something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in control_net.parameters():
            if not parameter.any():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def make_model(loaded_base):
    """make_model(control_dim=1, hint="coordinate", fresh=False, **others) -> a frozen ControlLDM, a test's own.

    others: as add_control has them.
    """

    def make(control_dim=1, hint="coordinate", fresh=False, **others):
        torch.manual_seed(1)
        model = add_control(*copy.deepcopy(loaded_base), control_dim=control_dim, hint=hint, **others)
        if not fresh:
            randomize_zero_convolutions(model.control_net)
            model.control_net.register_to_config(control_mean=[0.5] * control_dim, control_std=[2.0] * control_dim)
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture
def control_folder(make_model, tmp_path):
    """A control's folder, as a training leaves it."""
    save_model(make_model(), tmp_path / "control")
    return tmp_path / "control"


@pytest.fixture
def normal():
    """normal(*shape) -> standard normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(2)
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture
def write_dataset(tmp_path):
    """write_dataset(sources, file="prompt.json", size=40, prompt="a square") -> its folder, one picture a source."""

    def write(sources, file="prompt.json", size=40, prompt="a square"):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0)
        lines = []
        for i, source in enumerate(sources):
            target = f"{file}_{i}.png"
            Image.fromarray(pixels.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / target)
            lines.append(json.dumps({"source": source, "target": target, "prompt": prompt}))
        (folder / file).write_text("\n".join(lines) + "\n")
        return folder

    return write


@pytest.fixture
def picture(tmp_path):
    """The path of a picture."""
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def fails_in_one_line(capsys):
    """fails_in_one_line(main, settings, arguments) -> the line; checks exit code 2 and that it is the only one."""

    def check(main, settings, arguments, **options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_script(main, settings, [str(argument) for argument in arguments], **options)
        assert exit_info.value.code == 2
        # progress bars rewrite their line with carriage returns
        lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "it/s" not in line]
        errors = [line for line in lines if line.strip() and "%|" not in line]
        assert len(errors) == 1 and errors[0].startswith("error: "), errors
        return errors[0]

    return check


@pytest.fixture
def small_disk():
    """with small_disk(): files may have 4096 bytes; writing more fails as on a full disk."""

    @contextmanager
    def small():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return small


def send(number, step, monkeypatch):
    """Let this process receive a signal while a training takes its step `step`."""
    original = ControlTraining.training_step

    def training_step(self, *args):
        if self.global_step == step - 1:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(ControlTraining, "training_step", training_step)


def trained_state(out_dir):
    """Returns: {name: tensor} of weights and optimiser in the checkpoint, and of the best and last weights."""
    checkpoint = torch.load(max((out_dir / "checkpoints").iterdir()), weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    state = checkpoint["state_dict"] | {f"{i} {k}": v for i, own in moments.items() for k, v in own.items()}
    for folder in (out_dir, out_dir / "last"):
        state |= {f"{folder.name} {k}": v for k, v in load_model(folder).control_net.state_dict().items()}
    return state | {"schedule": torch.tensor(checkpoint["lr_schedulers"][0]["_last_lr"])}


@contextmanager
def another_run(path):
    """While open, a folder is held as by the run of another process."""
    path.mkdir(exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    yield
    os.close(folder)


@pytest.fixture
def unwritable(tmp_path):
    """A path that nobody can make a folder at, root included."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


@pytest.fixture(scope="session", params=[1, 2])
def version(request):
    """Of Stable Diffusion."""
    return request.param


@pytest.fixture(scope="session")
def folder(version, tmp_path_factory):
    """A narrow Stable Diffusion, as a folder in diffusers' layout."""
    path = tmp_path_factory.mktemp(f"sd{version}")
    for name, part in zip(("vae", "text_encoder", "unet"), build(version)):
        part.save_pretrained(path / name)
    shutil.copytree(ROOT / "models" / {1: "sd15", 2: "sd21"}[version] / "scheduler", path / "scheduler")
    return path
