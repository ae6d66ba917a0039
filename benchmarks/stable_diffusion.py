"""Seconds and memory of Stable Diffusion 1.5 and 2.1 at full size, with random weights: they cost what real ones do.

    python benchmarks/stable_diffusion.py                     # both, half an hour each on two cores
    python benchmarks/stable_diffusion.py versions=1.5

Writes a checkpoint in the original single-file layout (half precision, 2 GB) and two pictures to out_dir, then goes
through the scripts as one would, each in a process of its own; one that grows beyond `limit` is ended, since it does
not fit. The last row is a gradient without any care for memory, through 10 DDIM steps. Prints a table, which is also
in out_dir/measured.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import read_config, write_yaml
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    versions="all",  # or "1.5", or "2.1"
    image_size=320,  # pixels
    precision="bfloat16",  # of the frozen base
    limit=20.0,  # GiB of a process
    out_dir="outputs/stable_diffusion",
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import shutil
import subprocess
import time
from functools import partial
from multiprocessing import get_context

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import invert
import test5_s1
import tool_add_control
import tutorial_train
from benchmarks.common import choose, save_json, start_report
from cldm.model import Sampling, load_model
from cldm.training import ControlTraining, Method, checkpointing
from ldm.base import LatentDiffusion
from ldm.ddim import draw_noise
from ldm.files import ROOT, output_folder, write_whole
from tests.original_layout import original_weights

VERSIONS = {"1.5": ("cldm_v15.yaml", "epsilon"), "2.1": ("cldm_v21.yaml", "v_prediction")}
PROMPT = "a photo of an astronaut in an orange suit"
START, TARGET = "resultData/astronaut_-4.png", "resultData/astronaut_+2.png"


def make_checkpoint(architecture, file):
    """Write random weights of an architecture's folder as one file in its original layout."""
    torch.manual_seed(0)
    vae, unet = (
        cls.from_config(cls.load_config(architecture / name)).half()
        for cls, name in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    text = CLIPTextModel(CLIPTextConfig.from_pretrained(architecture / "text_encoder")).half()
    weights = original_weights(LatentDiffusion(vae, text, unet, DDIMScheduler()))
    write_whole(file, partial(save_file, weights))


def timed(script, *arguments):
    """Run a script. Returns: seconds."""
    began = time.perf_counter()
    run_script(script.main, script.settings, [*map(str, arguments)], paths=getattr(script, "PATHS", ()))
    return time.perf_counter() - began


def convert(folder, size):
    return timed(tool_add_control, folder / "base.yaml", folder / "fresh")


def train(folder, size):
    paths = f"resume_path={folder / 'fresh'}", f"data_root={folder / 'data'}", f"out_dir={folder / 'trained'}"
    return timed(tutorial_train, *paths, "max_steps=2", "batch_size=1", "save_memory=true")


def training_steps(folder, size):
    """Returns: seconds of the second of two steps."""
    model = load_model(folder / "fresh", dtype=torch.float32)
    module = ControlTraining(model, Method(1e-5, 2))
    optimizer = module.configure_optimizers()["optimizer"]
    batch = dict(latents=torch.randn(1, 4, size // 8, size // 8), control=torch.tensor([[2.0]]))
    batch |= {name: model.base.embed([text]) for name, text in dict(embeddings=PROMPT, empty="").items()}
    for _ in range(2):
        began = time.perf_counter()
        with checkpointing(model, True), torch.autocast("cpu", torch.bfloat16):
            noise, kept = torch.randn_like(batch["latents"]), torch.ones(1, dtype=torch.bool)
            loss = module.squared_errors(batch, noise, torch.tensor([500]), kept).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def seconds_of(script, folder, name, *arguments):
    """Run test5_s1 or invert. Returns: the seconds in its result.json."""
    paths = f"model_path={folder / 'trained'}", f"target_image_path={folder / 'data' / TARGET}"
    timed(script, *paths, f"prompt={PROMPT}", f"out_dir={folder / name}", "save_memory=true", *arguments)
    return json.loads((folder / name / "result.json").read_text())["seconds"]


def invert_s1(folder, size):
    start = f"input_image_path={folder / 'data' / START}"
    return seconds_of(test5_s1, folder, "s1", start, "ddim_steps=10", "iterations=1", "num_samples=1")


def invert_denoising(folder, size):
    return seconds_of(invert, folder, "lm", "draws=4", "figures=false")


def naive(folder, size):
    """Returns: seconds of a gradient through 10 DDIM steps that keeps everything."""
    model = load_model(folder / "trained")
    control = torch.tensor([[2.0]], requires_grad=True)
    began = time.perf_counter()
    noise = draw_noise((1, 4, size // 8, size // 8), 11, 0, "cpu")
    model.generate(noise, control, model.encode([PROMPT]), Sampling(ddim_steps=10)).square().mean().backward()
    return time.perf_counter() - began


ROWS = {
    "`tool_add_control.py`, from the single file": convert,
    "`tutorial_train.py max_steps=2`, with pictures and calibration": train,
    "of that, a training step": training_steps,
    "`test5_s1.py`, an iteration of 10 steps": invert_s1,
    "`invert.py draws=4`": invert_denoising,
    "reverse mode through 10 steps, nothing recomputed": naive,
}


def send(function, arguments, pipe):
    pipe.send(function(*arguments))


def measure(function, arguments, limit):
    """Run function(*arguments) in a process of its own. Returns: its result, None if it failed or was ended; GiB."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(False)
    process = context.Process(target=send, args=(function, arguments, sender))
    process.start()
    peak, watched = 0, psutil.Process(process.pid)
    while process.is_alive() and peak <= limit:
        peak = max(peak, watched.memory_info().rss / 2**30)
        process.join(0.05)
    process.kill()
    return (receiver.recv() if receiver.poll() else None), peak


def main(s):
    check_numbers(s, int, image_size=(64, 4096))
    check_numbers(s, limit=(1, math.inf))
    versions, report = choose(s.versions, VERSIONS, "versions"), {}
    out_dir = start_report(s.out_dir, "measured.json", "seconds", *VERSIONS)
    print("| | seconds | memory |\n| --- | --- | --- |")
    for version in versions:
        folder, (file, prediction_type) = output_folder(out_dir / version), VERSIONS[version]
        config, checkpoint = read_config(ROOT / "models" / file), folder.resolve() / "base.safetensors"
        architecture = ROOT / config["architecture"]
        own = dict(base=str(checkpoint), image_size=s.image_size, precision=s.precision)
        write_yaml({**config, **own, "prediction_type": prediction_type}, folder / "base.yaml")
        if not checkpoint.exists():
            measure(make_checkpoint, (architecture, checkpoint), s.limit)
        for old in ("data", "fresh", "trained"):
            shutil.rmtree(folder / old, ignore_errors=True)
        maker = [sys.executable, ROOT / "dataForTrain" / "make_dataset.py", "photos=astronaut", "angles=[-4,2]"]
        subprocess.run([*maker, f"image_size={s.image_size}", f"out_dir={folder / 'data'}"], check=True)
        for name, function in ROWS.items():
            seconds, memory = measure(function, (folder, s.image_size), s.limit)
            took = f"{seconds:.0f}" if seconds else "does not fit" if memory > s.limit else "failed"
            print(f"| {version}: {name} | {took} | {memory:.1f} GiB |", flush=True)
            report[f"{version}: {name}"] = dict(seconds=seconds, memory=memory)
            save_json(out_dir / "measured.json", report)


if __name__ == "__main__":
    run_script(main, settings)
