"""Train a small latent diffusion model like models/tiny_sd, which ships with this repository, from scratch.

    python tool_train_base.py out_dir=runs/tiny_sd

Three stages: draw views of the photographs, train the VAE, train text encoder and UNet on its latents.
A VAE that lies in out_dir already is kept.
"""

from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    out_dir="runs/tiny_sd",
    image_size=128,  # pixels
    vae_views=6000,  # pictures drawn from the photographs
    vae_details=0.4,  # the share of them that are details; the others show a subject in its framing
    vae_steps=5500,
    unet_views=4000,
    unet_details=0.1,
    unet_steps=5500,
    batch_size=16,
    learning_rate=1e-3,
    prompt_dropout=0.1,
    seed=0,
    overwrite=False,  # True: the text encoder and UNet in out_dir are replaced
)
if __name__ == "__main__":
    answer(__file__)

import math
import random

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageEnhance, ImageFilter
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from cldm.pairs import open_photo
from cldm.training import half_cosine
from dataForTrain.make_dataset import EXTRA, TRAIN, find_photo, render, render_framed
from ldm.base import load_part
from ldm.ddim import draw_timesteps
from ldm.files import ROOT, fresh_folder, whole_folder
from ldm.pictures import pictures_to_tensor
from ldm.text import tokenize

# Its configs are the architecture. The VAE has convolutions only, so that small crops train it for whole pictures. The
# UNet attends at 8 x 8 and 4 x 4 of 32 x 32 latents, where it is cheap, and takes the pooled prompt beside the
# timestep: attention alone learns slowly. The schedule ends in pure noise, so that nothing of a start picture leaks
# (Lin et al. 2024).
LIKE = ROOT / "models" / "tiny_sd"


def draw_view(rng, size, details):
    """Returns: a detail of a photograph (a share `details` of the time) or a subject in its framing; its prompt."""
    if rng.random() >= details:
        photo = TRAIN[rng.choice(list(TRAIN))]
        zoom = math.exp(rng.uniform(math.log(0.8), math.log(1.25))) if rng.random() < details else 1.0
        angle = rng.uniform(-7, 7)
        picture, prompt = render_framed(photo, size, angle, zoom), photo.prompt
    else:
        file, prompt = rng.choice([(p.file, p.prompt) for p in TRAIN.values()] + [(file, "") for file in EXTRA])
        photo = open_photo(find_photo(file))
        side = math.exp(rng.uniform(math.log(64), math.log(0.65 * min(photo.size))))
        reach = side / math.sqrt(2) + 2
        center = rng.uniform(reach, photo.width - reach), rng.uniform(reach, photo.height - reach)
        picture = render(photo, size, side, rng.uniform(-180, 180), center)
        prompt = f"a detail of {prompt}" if prompt else "a detail"
        if rng.random() < 0.5:  # so that the VAE knows more colours than those of a few photographs
            channels = list(picture.split())
            rng.shuffle(channels)
            picture = Image.merge("RGB", channels)
    if rng.random() < details / 2:
        picture = ImageEnhance.Brightness(picture).enhance(2 ** rng.uniform(-1, 1))
    if rng.random() < details / 2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))
    return picture, prompt


def draw_views(seed, count, size, details):
    """Returns: (count, 3, size, size) bytes; their prompts."""
    rng = random.Random(seed)
    views = [draw_view(rng, size, details) for _ in tqdm(range(count), desc="drawing views")]
    return pictures_to_tensor([picture for picture, _ in views], scaled=False), [prompt for _, prompt in views]


def train_steps(parameters, steps, peak, loss_at, label):
    """Minimise loss_at(step) by AdamW; the learning rate warms up linearly and falls as half a cosine."""
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01)
    smooth, bar = None, tqdm(range(steps), desc=label, mininterval=5)
    for step in bar:
        rate = peak * min(1, (step + 1) / 100) * half_cosine(step, steps)
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)


def train_vae(s, pictures):
    """Train the VAE on the views: L1 loss on pixels, and a weak KL loss on its latents."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(LIKE / "vae"), sample_size=s.image_size)
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.latent_channels :], -4.0)  # log variances: hardly any noise
    generator = torch.Generator().manual_seed(s.seed)
    crop = s.image_size // 2

    def loss_at(step):
        whole = step > 0.85 * s.vae_steps  # small crops first, since they show more variety in a second
        index = torch.randint(len(pictures), (2 if whole else 4,), generator=generator)
        x, y = (0, 0) if whole else torch.randint(crop + 1, (2,), generator=generator).tolist()
        side = s.image_size if whole else crop
        batch = pictures[index, :, y : y + side, x : x + side] / 127.5 - 1
        if step % 2:
            batch = batch.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
            decoded = vae.decode(latents).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded, batch) + 2e-5 * kl

    train_steps(list(vae.parameters()), s.vae_steps, s.learning_rate, loss_at, "vae")
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures[:256] / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def train_unet(s, latents, prompts):
    """Train text encoder and UNet on v-prediction. Returns: both, their weights averaged over steps; the scheduler."""
    scheduler = DDIMScheduler.from_pretrained(LIKE / "scheduler")
    config = UNet2DConditionModel.load_config(LIKE / "unet")
    unet = UNet2DConditionModel.from_config(config, sample_size=latents.shape[-1])
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(LIKE / "text_encoder", dtype="float32"))
    # Token embeddings stay random: words that training never saw must look like words.
    text_encoder.get_input_embeddings().requires_grad_(False)
    models = torch.nn.ModuleList([unet, text_encoder])
    averaged = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    distinct = [""] + sorted(set(prompts))
    tokens = tokenize(distinct)
    prompt_index = torch.tensor([distinct.index(prompt) for prompt in prompts])
    generator = torch.Generator().manual_seed(s.seed + 1)
    parameters = [p for p in models.parameters() if p.requires_grad]

    def loss_at(step):
        if step:
            averaged.update_parameters(models)
        index = torch.randint(len(latents), (s.batch_size,), generator=generator)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(s.batch_size, scheduler.config.num_train_timesteps, generator)
        kept = torch.rand(s.batch_size, generator=generator) >= s.prompt_dropout
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = text_encoder(tokens).last_hidden_state[prompt_index[index] * kept]
            velocity = unet(noisy, timesteps, embeddings).sample.float()
        return F.mse_loss(velocity, scheduler.get_velocity(clean, noise, timesteps))

    train_steps(parameters, s.unet_steps, s.learning_rate, loss_at, "unet")
    return *averaged.module, scheduler


def main(s):
    counts = dict.fromkeys(("vae_views", "vae_steps", "unet_views", "unet_steps", "batch_size"), (1, math.inf))
    check_numbers(s, int, **counts, image_size=(32, 4096), seed=(0, 2**63 - 2))
    check_numbers(s, vae_details=(0, 1), unet_details=(0, 1), prompt_dropout=(0, 1), learning_rate=(0, math.inf))
    if s.image_size % 32:
        raise InputError(f'setting "image_size": expected a multiple of 32, got {s.image_size}')
    out = fresh_folder(s.out_dir, s.overwrite, own=["vae"], never=["model.yaml"])
    torch.manual_seed(s.seed)
    if not (out / "vae").exists():
        vae = train_vae(s, draw_views(s.seed, s.vae_views, s.image_size, s.vae_details)[0])
        with whole_folder(out) as folder:
            vae.half().save_pretrained(folder / "vae")
    vae = load_part(AutoencoderKL, out / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    pictures, prompts = draw_views(s.seed + 1, s.unet_views, s.image_size, s.unet_details)
    with torch.no_grad():
        batches = tqdm((pictures / 127.5 - 1).split(64), desc="encoding")
        latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in batches]) * vae.config.scaling_factor
    unet, text_encoder, scheduler = train_unet(s, latents, prompts)
    with whole_folder(out) as folder:
        for name, model in {"unet": unet.half(), "text_encoder": text_encoder.half(), "scheduler": scheduler}.items():
            model.save_pretrained(folder / name)


if __name__ == "__main__":
    run_script(main, settings, resume="started again, it goes on from the VAE if that was done")
