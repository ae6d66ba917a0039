"""Train a small latent diffusion model of the architecture that models/tiny_dc describes, from scratch.

    python tool_train_base.py out_dir=runs/tiny_dc

Four stages: draw views of the photographs, train the VAE, train on its latents a matcher, which finds places of one
picture in another, then text encoder and UNet; on a GPU if there is one.
A VAE and a matcher that lie in out_dir already are kept; a run that was killed goes on when it is started again.
docs/weights.md names the Debian packages that the photographs are in.
"""

from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    out_dir="runs/tiny_dc",
    photos="/usr/share/backgrounds,/usr/share/wallpapers",  # folders of photographs, beside those that packages carry
    stamps="/usr/share/tuxpaint/stamps",  # a folder of cut-outs, PNG, each with a text beside it
    image_size=128,  # pixels
    vae_views=5000,  # pictures drawn from the photographs
    vae_steps=3000,
    matcher_pairs=4000,  # of pictures whose moves are known
    matcher_steps=1000,
    unet_views=5000,
    unet_subjects=0.6,  # the share of them that show a subject in its framing; the others are details of anything
    unet_steps=10500,
    batch_size=16,
    learning_rate=1e-3,
    prompt_dropout=0.1,
    processes=1,  # that draw views side by side
    device="auto",
    seed=0,
    overwrite=False,  # True: the text encoder and UNet in out_dir are replaced
)
if __name__ == "__main__":
    answer(__file__)

import math
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from einops import rearrange
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from cldm.matcher import MATCHER_FILE, Matcher
from cldm.model import pick_device
from cldm.pairs import list_pictures, open_photo
from cldm.training import half_cosine
from dataForTrain.flying import cut_blob, draw_pair
from dataForTrain.make_dataset import EXTRA, TRAIN, Photo, find_photo, map_in_processes, render, render_framed
from ldm.base import load_vae, roughly
from ldm.checkpoints import to_half
from ldm.files import ROOT, find_path, fresh_folder, whole_folder, write_whole
from ldm.pictures import pictures_to_tensor
from ldm.text import tokenize

# Its configs are the architecture. The VAE has convolutions only, so that small crops train it for whole pictures, and
# no normalisation over positions, so that it keeps brightness. The UNet attends at 8 x 8 and 4 x 4 of 32 x 32 latents,
# where it is cheap, and takes the pooled prompt beside the timestep, since attention alone learns slowly. The schedule
# ends in pure noise, so that nothing of a start picture leaks (Lin et al. 2024).
LIKE = ROOT / "models" / "tiny_dc"
RESUME_FILE, KEPT = "resume.ckpt", 200  # what a stopped training goes on from; steps after which it is written
DETAILS = 64, 0.65  # least side of a detail of a photograph, in pixels; the largest, as a share of its own
SPREAD = 0.5  # latent channels deviate by this power of their principal component's deviation
PLAIN = 0.15  # share of a matcher's pairs before one colour
NOISE = 0.1  # added to its latents, whose spread is 1
CONSTANT = 16.0  # of four channels of the decoder, so that its normalisation begins as the identity


def recolour(rng, picture):
    """Returns: the PIL picture with its channels exchanged, its hue turned, its saturation and brightness changed."""
    angle, saturation = rng.uniform(-math.pi, math.pi), 2 ** rng.uniform(-1, 1)
    grey = torch.full((3, 3), 1 / 3)
    across = torch.linalg.cross(torch.eye(3), torch.full((3, 3), 1 / math.sqrt(3)))
    turned = math.cos(angle) * (torch.eye(3) - grey) + math.sin(angle) * across
    matrix = torch.cat([grey + saturation * turned, torch.zeros(3, 1)], 1)[rng.sample(range(3), 3)]
    return ImageEnhance.Brightness(picture.convert("RGB", matrix.flatten().tolist())).enhance(2 ** rng.uniform(-1, 0.5))


def draw_detail(rng, size, file):
    """Returns: the busier of two squares cut anywhere from a photograph, turned by any angle; PIL, size x size."""
    photo = open_photo(file)
    least, most = DETAILS[0], DETAILS[1] * min(photo.size)
    if most < least:
        raise InputError(f"{file}: {photo.width} x {photo.height} pixels are too few; leave it out of photos")

    def draw_square():
        side = math.exp(rng.uniform(math.log(least), math.log(most)))
        reach = side / math.sqrt(2) + 2
        return side, [rng.uniform(reach, n - reach) for n in photo.size]

    def busy(square):
        side, (x, y) = square
        return photo.resize((16, 16), box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2)).entropy()

    side, center = max(draw_square(), draw_square(), key=busy)
    return render(photo, size, side, rng.uniform(-180, 180), center)


def draw_stamp(rng, size, file):
    """Returns: a cut-out at any place and size before a plain background; PIL, size x size."""
    with Image.open(file) as picture:
        stamp = picture.convert("RGBA")
    stamp.thumbnail([size * rng.uniform(0.5, 1.2)] * 2)
    colour = (255, 255, 255) if rng.random() < 0.3 else tuple(rng.randrange(256) for _ in range(3))
    view = Image.new("RGB", (size, size), colour)
    place = [round((size - n) / 2 + rng.uniform(-0.2, 0.2) * size) for n in stamp.size]
    turned = stamp.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC)
    view.paste(turned, place, turned)
    return view


def draw_view(s, seed, chosen):
    """chosen: (number of the view, file, what draws it or the Photo of a subject). Returns: PIL picture; its prompt."""
    number, file, draw = chosen
    rng = random.Random(f"{seed} {number}")
    if isinstance(draw, Photo):
        return render_framed(draw, s.image_size, rng.uniform(-7, 7)), draw.prompt
    view = draw(rng, s.image_size, file)
    if rng.random() < 0.5:
        view = recolour(rng, view)
    if rng.random() < 0.2:
        view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2)))
    return view, describe(file)


def draw_views(s, seed, count, subjects, processes=1):
    """Draw views: a share `subjects` of subjects in their framing, the others details and cut-outs in any colours.

    Returns: (count, 3, size, size) bytes; their prompts. They depend on the seed, not on the number of processes.
    """
    rng, chosen = random.Random(seed), []
    shipped, photos, stamps = find_sources(s)
    for number in range(count):
        if rng.random() < subjects:
            photo = rng.choice(list(TRAIN.values()))
            chosen.append((number, find_photo(photo.file), photo))
        else:
            kinds = (shipped, draw_detail), (photos, draw_detail), (stamps, draw_stamp)
            files, draw = rng.choices(kinds, [0.35, 0.45, 0.2])[0]
            chosen.append((number, rng.choice(files), draw))
    chosen.sort(key=lambda one: one[1])  # so that each file is opened once, or by few processes
    drawn = map_in_processes(processes, partial(draw_view, s, seed), chosen, chunk=16)
    views, prompts = zip(*tqdm(drawn, desc="drawing views", total=count))
    return pictures_to_tensor(views, scaled=False), list(prompts)


def find_sources(s):
    """Returns: the paths of the photographs that packages carry, of those of the settings, and of the cut-outs."""
    shipped = [find_photo(file) for file in [*(photo.file for photo in TRAIN.values()), *EXTRA]]
    photos = [file for folder in s.photos.split(",") for file in largest_pictures(find_path(folder))]
    stamps = [file for file in list_pictures(find_path(s.stamps)) if file.suffix.lower() == ".png"]
    if not stamps:
        raise InputError(f'setting "stamps": {s.stamps}: no .png in it, which cut-outs are')
    return shipped, photos, stamps


def cut_square(rng, size, file):
    """Returns: a square cut anywhere from a photograph; PIL, size x size."""
    photo = open_photo(file)
    side = min(photo.size) * 2 ** rng.uniform(-3, 0)
    x, y = (rng.uniform(0, extent - side) for extent in photo.size)
    return photo.resize((size, size), Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))


def draw_flight(s, places, chosen):
    """chosen: (number of the pair, a photograph, cut-outs or None, each). Returns: as dataForTrain.flying.draw_pair."""
    number, photo, cutouts = chosen
    rng, size = random.Random(f"{s.seed} {number}"), 2 * s.image_size
    layers = []
    for file in cutouts:
        if file is None:
            layers.append(cut_blob(rng, cut_square(rng, size, photo)))
            continue
        with Image.open(file) as picture:
            layers.append(picture.convert("RGBA"))
        layers[-1].thumbnail((size, size))
    plain = Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3)))
    background = plain if rng.random() < PLAIN else cut_square(rng, size, photo)
    return draw_pair(rng, s.image_size, places, background, layers)


def draw_flights(s, places):
    """Returns: tensors of all pairs, as dataForTrain.flying.draw_pair has each. places: latents along a side."""
    rng, chosen = random.Random(s.seed + 2), []
    shipped, photos, stamps = find_sources(s)
    for number in range(s.matcher_pairs):
        cutouts = [rng.choice(stamps) if rng.random() < 0.6 else None for _ in range(rng.randint(1, 2))]
        chosen.append((number, rng.choice(rng.choice([shipped, photos])), cutouts))
    chosen.sort(key=lambda one: one[1])  # so that each file is opened once, or by few processes
    drawn = map_in_processes(s.processes, partial(draw_flight, s, places), chosen, chunk=16)
    return [torch.from_numpy(np.stack(part)) for part in zip(*tqdm(drawn, desc="drawing pairs", total=len(chosen)))]


def largest_pictures(folder):
    """Returns: the pictures in a folder and below; of one in several sizes, named by them, the largest."""
    largest = {}
    for file in list_pictures(folder):
        key = file.parent if re.fullmatch(r"\d+x\d+", file.stem) else file
        largest[key] = max(largest.get(key, file), file, key=lambda file: file.stat().st_size)
    return list(largest.values())


def describe(file):
    """Returns: what the text beside a cut-out calls it, "" without one."""
    text = file.with_suffix(".txt")
    return text.read_text("utf-8").splitlines()[0].strip(" .").lower() if text.is_file() else ""


def train_steps(s, module, generator, steps, peak, loss_at, label):
    """Minimise loss_at(step) by AdamW; the learning rate warms up linearly and falls as half a cosine.

    module: all that training changes, of which those with gradients are trained. generator: what loss_at draws from.
    Every KEPT steps, all of it goes into RESUME_FILE in out_dir, from which a run of the same settings goes on.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer, file = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.01), Path(s.out_dir) / RESUME_FILE
    first, smooth = 0, None
    about = {"stage": label, **s, "overwrite": None, "processes": None, "device": generator.device.type}
    if file.exists():
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["about"] != about:
            raise InputError(f"{file}: of a run with other settings; delete it, or choose another out_dir")
        first = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    bar = tqdm(range(first, steps), desc=label, initial=first, total=steps, mininterval=5)
    for step in bar:
        if step > first and step % KEPT == 0:
            state = dict(about=about, step=step, generator=generator.get_state())
            state |= {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
            write_whole(file, partial(torch.save, state))
        rate = peak * min(1, (step + 1) / 100) * half_cosine(step, steps)
        optimizer.param_groups[0]["lr"] = rate
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        value = loss.item()
        smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)


def to_patches(pictures):
    """pictures: (B, 3, H, W). Returns: (B, H / 4, W / 4, 48), patches as two steps of pixel_unshuffle order them."""
    return rearrange(F.pixel_unshuffle(F.pixel_unshuffle(pictures, 2), 2), "b c h w -> b h w c")


def patch_pca(pictures, channels):
    """The principal components of what to_patches makes of pictures.

    pictures: (B, 3, H, W). Returns: mean (48,), components (channels, 48), deviations (channels,).
    """
    patches = rearrange(to_patches(pictures), "b h w c -> (b h w) c").double()
    variances, components = torch.linalg.eigh(torch.cov(patches.T))
    return patches.mean(0), components.T.flip(0)[:channels], variances.flip(0)[:channels].sqrt()


@torch.no_grad()
def start_as_pca(vae, mean, components, deviations):
    """Set an AutoencoderDC's weights so that it computes principal components of patches and their inverse exactly.

    Its blocks begin as identities, its shortcuts already move pixels between channels and positions.
    """
    encoder, decoder, size = vae.encoder, vae.decoder, len(mean)
    for name, module in vae.named_modules():
        if name.endswith("norm"):  # of a residual block
            module.weight.zero_()
        elif getattr(module, "shortcut", False):
            module.conv.weight.zero_()
            module.conv.bias.zero_()

    def set_centre(conv, weight):
        conv.weight[: len(weight)] = 0
        conv.weight[: len(weight), : weight.shape[1], 1, 1] = weight

    scale = (deviations**SPREAD / deviations)[:, None]
    set_centre(encoder.conv_in.conv, torch.eye(3))  # its other channels are features
    encoder.conv_in.conv.bias[:3] = 0
    encoder.conv_out.weight.zero_()
    set_centre(encoder.conv_out, components * scale)
    encoder.conv_out.bias.copy_(-(components * scale) @ mean)
    decoder.conv_in.weight[-16:] = 0
    set_centre(decoder.conv_in, (components / scale).T)
    decoder.conv_in.bias[:size] = mean
    decoder.conv_in.bias[-16:] = CONSTANT
    norm, pixels = decoder.norm_out, size // 4  # channels that hold pixels before the last shuffle
    norm.weight[:pixels] = math.sqrt(4 * CONSTANT**2 / len(norm.weight))
    norm.bias[:pixels] = 2.0  # pixels are above -2, so that ReLU lets them through
    set_centre(decoder.conv_out.conv, torch.eye(pixels))
    decoder.conv_out.conv.bias.fill_(-2.0)


def train_vae(s, pictures, device):
    """Train the VAE on the views from their principal components on, to the least root mean square error of pixels."""
    torch.manual_seed(s.seed)
    vae = AutoencoderDC.from_config(AutoencoderDC.load_config(LIKE / "vae"))
    start_as_pca(vae, *patch_pca(pictures[:: len(pictures) // 1000 + 1] / 127.5 - 1, vae.config.latent_channels))
    vae.to(device)
    generator = torch.Generator().manual_seed(s.seed)
    crop = s.image_size // 2

    def loss_at(step):
        whole = step > 0.85 * s.vae_steps  # small crops first, since they show more variety in a second
        index = torch.randint(len(pictures), (2 if whole else 8,), generator=generator)
        x, y = (0, 0) if whole else torch.randint(crop + 1, (2,), generator=generator).tolist()
        side = s.image_size if whole else crop
        batch = pictures[index, :, y : y + side, x : x + side].to(device) / 127.5 - 1
        if step % 2:
            batch = batch.flip(3)
        with roughly(device):
            decoded = vae.decode(vae.encode(batch).latent).sample.float()
        return (decoded - batch).square().mean((1, 2, 3)).add(1e-6).sqrt().mean()

    train_steps(s, vae, generator, s.vae_steps, s.learning_rate / 2, loss_at, "vae")
    vae.eval()
    with torch.no_grad():
        parts = pictures[:: len(pictures) // 256 + 1].split(16)
        latents = torch.cat([vae.encode(part.to(device) / 127.5 - 1).latent for part in parts])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def encode_views(vae, pictures):
    """pictures: (N, 3, H, W) bytes. Returns: (N, C, h, w), scaled latents."""
    with torch.no_grad(), roughly(vae.device):
        parts = tqdm(pictures.split(64), desc="encoding")
        return vae.config.scaling_factor * torch.cat(
            [vae.encode(part.to(vae.device) / 127.5 - 1).latent.float() for part in parts]
        )


def train_matcher(s, vae):
    """Returns: a Matcher of the VAE's latents that finds again what flies before photographs."""
    pictures, moves, seen = draw_flights(s, s.image_size // 4)
    latents = encode_views(vae, pictures.flatten(0, 1)).unflatten(0, (-1, 2))
    torch.manual_seed(s.seed + 2)  # as if the VAE had been there already
    matcher = Matcher(latents.shape[2]).to(vae.device)
    generator = torch.Generator().manual_seed(s.seed + 2)

    def loss_at(step):
        index = torch.randint(len(latents), (s.batch_size,), generator=generator)
        batch = latents[index]
        batch = batch + NOISE * torch.randn(batch.shape, generator=generator).to(batch.device)
        with roughly(batch.device):
            return matcher.loss(batch, *(own[index].to(batch.device) for own in (moves, seen)))

    train_steps(s, matcher, generator, s.matcher_steps, s.learning_rate, loss_at, "matcher")
    return matcher


def train_unet(s, latents, prompts):
    """Train text encoder and UNet on v-prediction. Returns: both, their weights averaged over steps; the scheduler."""
    scheduler = DDIMScheduler.from_pretrained(LIKE / "scheduler")
    config = UNet2DConditionModel.load_config(LIKE / "unet")
    torch.manual_seed(s.seed + 1)  # likewise
    unet = UNet2DConditionModel.from_config(config, sample_size=latents.shape[-1])
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(LIKE / "text_encoder", dtype="float32"))
    # Token embeddings stay random: words that training never saw must look like words.
    text_encoder.get_input_embeddings().requires_grad_(False)
    device = latents.device
    models = torch.nn.ModuleList([unet, text_encoder]).to(device, memory_format=torch.channels_last)  # a tenth faster
    averaged = AveragedModel(models, multi_avg_fn=get_ema_multi_avg_fn(0.998)).requires_grad_(False)
    tokens, no_prompt = tokenize(prompts).to(device), tokenize([""]).to(device)
    generator = torch.Generator(device).manual_seed(s.seed + 1)
    draw = dict(generator=generator, device=device)

    def loss_at(step):
        if step:
            averaged.update_parameters(models)
        index = torch.randint(len(latents), (s.batch_size,), **draw)
        clean = latents[index]
        noise = torch.randn(clean.shape, **draw)
        # All noise levels alike: with those of little noise rare, as controls have them, drawings keep some of it.
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (s.batch_size,), **draw)
        kept = torch.rand(s.batch_size, **draw) >= s.prompt_dropout
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with roughly(device):
            embeddings = text_encoder(torch.where(kept[:, None], tokens[index], no_prompt)).last_hidden_state
            velocity = unet(noisy, timesteps, embeddings).sample.float()
        return F.mse_loss(velocity, scheduler.get_velocity(clean, noise, timesteps))

    train_steps(s, torch.nn.ModuleList([models, averaged]), generator, s.unet_steps, s.learning_rate, loss_at, "unet")
    return *averaged.module, scheduler


def main(s):
    counts = "vae_views", "vae_steps", "matcher_pairs", "matcher_steps", "unet_views", "unet_steps", "batch_size"
    counts = dict.fromkeys(counts, (1, math.inf))
    check_numbers(s, int, **counts, processes=(1, 1024), image_size=(32, 4096), seed=(0, 2**63 - 2))
    check_numbers(s, unet_subjects=(0, 1), prompt_dropout=(0, 1), learning_rate=(0, math.inf))
    if s.image_size % 32:
        raise InputError(f'setting "image_size": expected a multiple of 32, got {s.image_size}')
    device = pick_device(s.device)
    out = fresh_folder(s.out_dir, s.overwrite, own=["vae", MATCHER_FILE, RESUME_FILE], never=["model.yaml"])
    s.out_dir = str(out)
    if not (out / "vae").exists():
        vae = train_vae(s, draw_views(s, s.seed, s.vae_views, 0, s.processes)[0], device)
        with whole_folder(out, removes=[RESUME_FILE]) as folder:
            vae.half().save_pretrained(folder / "vae")
    vae = load_vae(out / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False)
    vae.to(device)
    if not (out / MATCHER_FILE).exists():
        weights = to_half(train_matcher(s, vae).state_dict())
        with whole_folder(out, removes=[RESUME_FILE]) as folder:
            save_file(weights, folder / MATCHER_FILE)
    pictures, prompts = draw_views(s, s.seed + 1, s.unet_views, s.unet_subjects, s.processes)
    unet, text_encoder, scheduler = train_unet(s, encode_views(vae, pictures), prompts)
    with whole_folder(out, removes=[RESUME_FILE]) as folder:
        for name, model in {"unet": unet.half(), "text_encoder": text_encoder.half(), "scheduler": scheduler}.items():
            model.save_pretrained(folder / name)


if __name__ == "__main__":
    run_script(main, settings, resume="it goes on when it is started again with the same out_dir")
