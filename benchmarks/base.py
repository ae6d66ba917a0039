"""How well a base draws kinds of pictures that it was not trained on, beside PCA with as many components.

    python benchmarks/base.py        # about two minutes on two cores

The pictures lie in Debian packages, unpacked below `root`, and in the folder of the water meter, linked there:
docs/kinds.md lists them and has the commands. Kinds that are not there are skipped. Every picture is encoded and
decoded; PCA does the same to patches of as many pixels as a latent stands for, fitted to the pictures that bases are
trained on. Prints a table of PSNR and leaves it in results.json, beside kinds.jpg: of each kind the picture of median
PSNR, what comes back, and the difference.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    base="models/tiny_dc",  # a folder in diffusers' layout
    root="outputs/kinds",  # folder of the unpacked packages
    pictures=40,  # of every kind
    training_views=300,  # pictures that PCA is fitted to, drawn as tool_train_base.py draws them from
    photos="/usr/share/backgrounds,/usr/share/wallpapers",  # these folders
    stamps="/usr/share/tuxpaint/stamps",  # and this one
    image_size=128,  # pixels
    seed=0,
    out_dir="outputs/base",
)
if __name__ == "__main__":
    answer(__file__)

import io
import math
import random
import re
from itertools import cycle, islice

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageChops, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.common import save_json
from ldm.base import LatentDiffusion
from ldm.files import find_path, report_folder, write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tensor_to_pictures
from ldm.schema import read_config
from tool_train_base import draw_views, patch_pca, to_patches

KINDS = Path(__file__).with_name("kinds.yaml")
OTHERS = 4, 8, 16  # other numbers of components, for comparison
TRAINING, FIGURE = "training pictures", "kinds.jpg"
GAP, LINE = 16, 22  # pixels between two strips, and of a title


def read_pictures(file):
    """Returns: the PIL pictures in a file, which may be one of Qt's archives (.rcc) that holds them as WebP."""
    if file.suffix != ".rcc":
        return [load_picture(file)]
    data = file.read_bytes()
    found = [(m.start(), int.from_bytes(m[1], "little") + 8) for m in re.finditer(rb"RIFF(.{4})WEBP", data, re.S)]
    return [load_picture(Image.open(io.BytesIO(data[start : start + size]))) for start, size in found]


def cut_squares(rng, pictures, count, size, widest=None):
    """Returns: `count` PIL pictures, size x size: the middle of each picture, then squares at random places in it.

    widest: the side of a square in pixels at most, of which all are cut at random; None: as above.
    """
    squares = []
    for i, picture in enumerate(islice(cycle(pictures), count)):
        if widest or i >= len(pictures):
            side = rng.randint(size, max(size, min(*picture.size, widest or math.inf)))
            x, y = (rng.randint(0, length - side) for length in picture.size)
            picture = picture.crop((x, y, x + side, y + side))
        squares.append(fit_picture(picture, size))
    return squares


def find_kinds(s):
    """Yields: of each kind that is there, its name and s.pictures PIL pictures. Prints which are not."""
    root = find_path(s.root)
    for name, kind in tqdm(read_config(KINDS).items(), "reading pictures"):
        rng = random.Random(f"{s.seed} {name}")
        found = {pattern: sorted(root.glob(pattern)) for pattern in kind["files"]}
        if missing := [pattern for pattern, files in found.items() if not files]:
            print(f"{name}: skipped, no {missing[0]} in {s.root} (docs/kinds.md says how to get it)")
            continue
        files = sum(found.values(), [])
        files = rng.sample(files, min(len(files), 2 * s.pictures))
        pictures = [picture for file in files for picture in read_pictures(file) if min(picture.size) >= s.image_size]
        if not pictures:
            print(f"{name}: skipped, all of its pictures are smaller than {s.image_size} pixels")
            continue
        rng.shuffle(pictures)
        yield name, cut_squares(rng, pictures, s.pictures, s.image_size, kind.get("widest"))


def project(pictures, mean, components):
    """pictures: (B, 3, H, W) in -1..1. Returns: likewise, what patch_pca's components leave of them."""
    left = (to_patches(pictures.double()) - mean) @ components.T @ components + mean
    return F.pixel_shuffle(F.pixel_shuffle(rearrange(left, "b h w c -> b c h w"), 2), 2)


def psnr(found, wanted):
    """found, wanted: (B, 3, H, W) in -1..1. Returns: (B) numpy, in dB, 100 at most."""
    error = (found.clamp(-1, 1) - wanted).double().square().mean((1, 2, 3)) / 4
    return -10 * error.clamp(1e-10).log10().numpy()


def draw_strips(strips, size):
    """strips: {title: (original, reconstruction), PIL}. Returns: a PIL picture: both, and their difference times 5."""
    sheet = Image.new("RGB", (6 * size + GAP, math.ceil(len(strips) / 2) * (size + LINE)), "white")
    for i, (title, (wanted, found)) in enumerate(strips.items()):
        x, y = i % 2 * (3 * size + GAP), i // 2 * (size + LINE)
        ImageDraw.Draw(sheet).text((x + 1, y + 2), title, "black", ImageFont.load_default(14))
        missed = ImageChops.difference(wanted, found).point(lambda value: 5 * value)
        for k, picture in enumerate((wanted, found, missed)):
            sheet.paste(picture, (x + k * size, y + LINE))
    return sheet


@torch.no_grad()
def main(s):
    check_numbers(s, int, pictures=(1, 1000), training_views=(1, 10**5), image_size=(32, 4096), seed=(0, 2**63 - 2))
    out_dir = report_folder(s.out_dir, "results.json", TRAINING, FIGURE)
    base = LatentDiffusion.from_pretrained(s.base)
    multiple, channels = math.lcm(4, base.downsampling), base.unet.config.in_channels
    if s.image_size % multiple:
        raise InputError(f'setting "image_size": expected a multiple of {multiple}, got {s.image_size}')
    kinds = dict(find_kinds(s))
    if not kinds:
        raise InputError(f"{s.root}: no pictures of any kind; docs/kinds.md has the commands that fetch them")
    fitted, shown = (
        draw_views(s, s.seed + i, count, 0)[0] / 127.5 - 1 for i, count in enumerate((s.training_views, s.pictures))
    )
    counts = sorted({channels, *OTHERS})
    mean, components, _ = patch_pca(fitted, counts[-1])
    kinds[TRAINING] = tensor_to_pictures(shown)
    results, strips = {}, {}
    header = [f"VAE, {channels} channels", f"PCA, {channels} components", "VAE better", *(f"PCA, {n}" for n in OTHERS)]
    print(f"| kind | pictures | {' | '.join(header)} |\n{'| --- ' * (2 + len(header))}|")
    for kind, pictures in kinds.items():
        wanted = pictures_to_tensor(pictures)
        found = base.decode(base.encode(wanted))
        vae, linear = psnr(found, wanted), {n: psnr(project(wanted, mean, components[:n]), wanted) for n in counts}
        both = vae, linear[channels]
        cells = [" / ".join(f"{np.quantile(own, share):.1f}" for share in (0.5, 0.1, 0)) for own in both]
        cells += [f"{np.mean(vae > linear[channels]):.0%}", *(f"{np.median(linear[count]):.1f}" for count in OTHERS)]
        print(f"| {kind} | {len(pictures)} | {' | '.join(cells)} |", flush=True)
        results[kind] = {"vae": vae.tolist(), "pca": {count: own.tolist() for count, own in linear.items()}}
        middle = vae.argsort()[len(vae) // 2]
        strips[f"{kind}: {vae[middle]:.1f} dB"] = pictures[middle], tensor_to_pictures(found[middle, None])[0]
    medians = [np.median(own["vae"]) for kind, own in results.items() if kind != TRAINING]
    print(f"unseen kinds: median {np.median(medians):.1f} dB, lowest {min(medians):.1f} dB")
    save_json(out_dir / "results.json", results)
    sheet = draw_strips(strips, s.image_size)
    write_whole(out_dir / FIGURE, lambda file: sheet.save(file, format="JPEG", quality=92, subsampling=0))


if __name__ == "__main__":
    run_script(main, settings)
