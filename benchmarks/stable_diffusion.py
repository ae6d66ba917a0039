"""Seconds and memory of Stable Diffusion 1.5 and 2.1 at full size, with random weights: they cost what real ones do.

    python benchmarks/stable_diffusion.py                     # both, on two cores half an hour each
    python benchmarks/stable_diffusion.py versions=1.5

Writes to out_dir a checkpoint in the original single-file layout (half precision, 2 GB), two pictures and, beside what
it prints, measured.json, then goes through the scripts as one would. Every row of the table is a process of its own;
one that grows beyond `limit` is ended: it does not fit. The last rows are a gradient without any care: reverse mode
through 10 DDIM steps.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, read_yaml, run_script, write_yaml

settings = dict(
    versions=["1.5", "2.1"],
    image_size=320,  # pixels
    precision="bfloat16",  # of the frozen base
    limit=20.0,  # GiB of a process
    out_dir="outputs/stable_diffusion",
)
if __name__ == "__main__":
    answer(__file__)

import json
import shutil
import subprocess
import time
from multiprocessing import get_context

import psutil
import torch
from cldm.objectives import SamplingObjective
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

import invert
import test5_s1
import tool_add_control
import tutorial_train
from cldm.model import load_model
from cldm.training import ControlTraining, checkpointing
from ldm.base import LatentDiffusion
from ldm.files import ROOT, output_folder, report_folder, write_whole
from tests.original_layout import original_weights

YAMLS = {"1.5": "cldm_v15.yaml", "2.1": "cldm_v21.yaml"}
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
    save_file(original_weights(LatentDiffusion(vae, text, unet, DDIMScheduler())), file)


def convert(folder, description, size):
    began = time.perf_counter()
    arguments = [str(description), str(folder / "fresh")]
    run_script(tool_add_control.main, tool_add_control.settings, arguments, paths=tool_add_control.PATHS)
    return time.perf_counter() - began


def train(folder, description, size):
    began = time.perf_counter()
    arguments = [f"resume_path={folder / 'fresh'}", f"data_root={folder / 'data'}", f"out_dir={folder / 'trained'}"]
    arguments += ["max_steps=2", "batch_size=1", "save_memory=true"]
    run_script(tutorial_train.main, tutorial_train.settings, arguments)
    return time.perf_counter() - began


def training_steps(folder, description, size):
    """Returns: seconds of the second of two steps."""
    model = load_model(folder / "fresh", dtype=torch.float32)
    module = ControlTraining(model, learning_rate=1e-5, steps=2)
    optimizer = module.configure_optimizers()["optimizer"]
    batch = dict(latents=torch.randn(1, 4, size // 8, size // 8), control=torch.tensor([[2.0]]))
    batch |= {name: model.base.embed([text]) for name, text in dict(embeddings=PROMPT, empty="").items()}
    for _ in range(2):
        began = time.perf_counter()
        with checkpointing(model, True), torch.autocast("cpu", torch.bfloat16):
            noise, kept = torch.randn_like(batch["latents"]), torch.ones(1, dtype=torch.bool)
            loss = module.denoising_loss(batch, noise, torch.tensor([500]), kept).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def invert_s1(folder, description, size):
    arguments = [f"model_path={folder / 'trained'}", f"prompt={PROMPT}"]
    arguments += [
        f"{which}_image_path={folder / 'data' / name}" for which, name in (("input", START), ("target", TARGET))
    ]
    arguments += [f"out_dir={folder / 's1'}", "ddim_steps=10", "iterations=1", "num_samples=1", "save_memory=true"]
    run_script(test5_s1.main, test5_s1.settings, arguments)
    return json.loads((folder / "s1" / "result.json").read_text())["seconds"]


def invert_denoising(folder, description, size):
    arguments = [
        f"model_path={folder / 'trained'}",
        f"prompt={PROMPT}",
        f"target_image_path={folder / 'data' / TARGET}",
    ]
    arguments += [f"out_dir={folder / 'lm'}", "draws=4", "figures=false", "save_memory=true"]
    run_script(invert.main, invert.settings, arguments)
    return json.loads((folder / "lm" / "result.json").read_text())["seconds"]


def naive(folder, description, size):
    """Returns: seconds of a gradient through 10 DDIM steps that keeps everything."""
    model = load_model(folder / "trained")
    latents, embeddings = torch.randn(1, 4, size // 8, size // 8), model.base.embed([PROMPT])
    objective = SamplingObjective(model, latents, latents, embeddings, ddim_steps=10, eta=1.0)
    began = time.perf_counter()
    objective.gradient(torch.tensor([[2.0]]), torch.tensor([0]))
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
    out_dir, report = report_folder(s.out_dir, "measured.json", "seconds", *map(str, s.versions)), {}
    print("| | seconds | memory |\n| --- | --- | --- |")
    for version in s.versions:
        folder = output_folder(out_dir / str(version))
        config = read_yaml(ROOT / "models" / YAMLS[str(version)])
        own = dict(base=str(folder.resolve() / "base.safetensors"), image_size=s.image_size, precision=s.precision)
        own["prediction_type"] = {"1.5": "epsilon", "2.1": "v_prediction"}[str(version)]
        config |= own
        write_yaml(config, folder / "base.yaml")
        if not Path(config.base).exists():
            measure(make_checkpoint, (ROOT / config.architecture, config.base), s.limit)
        for old in ("data", "fresh", "trained"):
            shutil.rmtree(folder / old, ignore_errors=True)
        maker = [sys.executable, ROOT / "dataForTrain" / "make_dataset.py", "photos=astronaut", "angles=[-4,2]"]
        subprocess.run([*maker, f"image_size={s.image_size}", f"out_dir={folder / 'data'}"], check=True)
        for name, function in ROWS.items():
            seconds, memory = measure(function, (folder, folder / "base.yaml", s.image_size), s.limit)
            took = f"{seconds:.0f}" if seconds else "does not fit" if memory > s.limit else "failed"
            print(f"| {version}: {name} | {took} | {memory:.1f} GiB |", flush=True)
            report[f"{version}: {name}"] = dict(seconds=seconds, memory=memory)
            write_whole(out_dir / "measured.json", lambda file: file.write_text(json.dumps(report, indent=1) + "\n"))


if __name__ == "__main__":
    run_script(main, settings)
