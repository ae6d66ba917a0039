"""Render the training set: photographs rotated about their centre by known angles.

    python dataForTrain/make_dataset.py                                       # dataForTrain/prompt.json, resultData/
    python dataForTrain/make_dataset.py angles=[-3.37,1.61] out_dir=elsewhere # other angles, identical framing

The photographs come inside the wheels of scikit-image, matplotlib and scikit-learn; PHOTOGRAPHS.md has
their sources and licences. A positive angle turns the picture counterclockwise.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from omegaconf import ListConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, run_script, whole_folder  # noqa: E402

settings = dict(
    angles=None,  # a list, degrees; None: TRAIN_ANGLES, and VALIDATION_ANGLES into validation.json
    photos="train",  # "train", "held_out", or names separated by commas
    image_size=128,  # pixels
    out_dir=str(Path(__file__).resolve().parent),
)

TRAIN_ANGLES = list(range(-5, 6))  # degrees
VALIDATION_ANGLES = [-3.5, 0.5, 2.5]
FRAME = 0.68  # side of the frame over the photo's short side: inside the photo at any angle
OVERSAMPLE = 4  # a picture is turned at this many times its resolution, then averaged down


@dataclass(frozen=True)
class Photo:
    file: str  # inside a package: "package/path"
    prompt: str
    frame: float = FRAME


TRAIN = {
    "astronaut": Photo("skimage/data/astronaut.png", "a photo of an astronaut in an orange suit"),
    "brick": Photo("skimage/data/brick.png", "a photo of a brick wall"),
    "camera": Photo("skimage/data/camera.png", "a photo of a man with a camera"),
    "cell": Photo("skimage/data/cell.png", "a micrograph of a bright cell"),
    "chelsea": Photo("skimage/data/chelsea.png", "a photo of a tabby cat"),
    "coffee": Photo("skimage/data/coffee.png", "a photo of a cup of coffee"),
    "coins": Photo("skimage/data/coins.png", "a photo of old coins"),
    "horse": Photo("skimage/data/horse.png", "a silhouette of a black horse"),
    "hubble": Photo("skimage/data/hubble_deep_field.jpg", "a photo of distant galaxies", FRAME / 2),
    "retina": Photo("skimage/data/retina.jpg", "a photo of a retina"),
    "rocket": Photo("skimage/data/rocket.jpg", "a photo of a rocket on the launch pad"),
    "text": Photo("skimage/data/text.png", "a photo of handwriting on paper"),
}
# Seen by no training and by no tuning, ever: for measuring on pictures that are new.
HELD_OUT = {
    "grace_hopper": Photo("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "a portrait of an officer"),
    "gravel": Photo("skimage/data/gravel.png", "a photo of gravel"),
    "ihc": Photo("skimage/data/ihc.png", "a micrograph of stained tissue"),
}


@lru_cache
def open_photo(file):
    """Returns: the photograph `file`, RGB, transparency on white."""
    package, path = file.split("/", 1)
    spec = find_spec(package)
    if spec is None:
        raise InputError(f"photograph {file}: package {package} is not installed (pip install -r requirements.txt)")
    photo = Image.open(Path(spec.submodule_search_locations[0]) / path)
    if photo.mode == "RGBA":
        white = Image.new("RGBA", photo.size, "white")
        photo = Image.alpha_composite(white, photo)
    return photo.convert("RGB")


def render(photo, size, side, angle_deg=0.0, center=None):
    """Turn a photograph about a point and cut a square around that point.

    photo: PIL picture. size: pixels of the result. side: of the square, in the photo's pixels.
    angle_deg: counterclockwise. center: (x, y) in the photo's pixels, by default its middle.
    Returns: PIL picture, size x size.
    Raises: ValueError if the turned square reaches over the photo's border.
    """
    x, y = center or (photo.width / 2, photo.height / 2)
    angle = math.radians(angle_deg)
    fine = OVERSAMPLE * size
    turned = 2 * math.ceil(fine * (abs(math.cos(angle)) + abs(math.sin(angle))) / 2)  # holds the turned square
    reach = turned / 2 * side / fine
    box = (x - reach, y - reach, x + reach, y + reach)
    if min(box[:2]) < 0 or box[2] > photo.width or box[3] > photo.height:
        raise ValueError(f"a square of {side:.0f} pixels turned by {angle_deg:g} degrees leaves the photo {photo.size}")
    picture = photo.resize((turned, turned), Image.Resampling.LANCZOS, box=box)
    picture = picture.rotate(angle_deg, Image.Resampling.BICUBIC)
    start = (turned - fine) // 2
    return picture.crop((start, start, start + fine, start + fine)).reduce(OVERSAMPLE)


def render_framed(photo, size, angle_deg=0.0, zoom=1.0):
    """Returns: `photo` (a Photo) in the dataset's framing, size x size, turned by angle_deg."""
    picture = open_photo(photo.file)
    return render(picture, size, photo.frame * min(picture.size) / zoom, angle_deg)


def select_photos(names):
    """Returns: {name: Photo} for "train", "held_out" or a comma-separated list of names."""
    known = {**TRAIN, **HELD_OUT}
    groups = {"train": TRAIN, "held_out": HELD_OUT}
    if names in groups:
        return groups[names]
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise InputError(f'photos: no photograph "{unknown[0]}" (known: {", ".join(known)})')
    return {name: known[name] for name in names.split(",")}


def main(s):
    photos = select_photos(s.photos)
    files = {"prompt.json": s.angles}
    if s.angles is None:
        files = {"prompt.json": TRAIN_ANGLES, "validation.json": VALIDATION_ANGLES}
    elif (
        not isinstance(s.angles, ListConfig)
        or not s.angles
        or not all(type(a) in (int, float) and math.isfinite(a) for a in s.angles)
    ):
        raise InputError(f"angles: expected a list of numbers like [-3.37,1.61], got {s.angles}")
    with whole_folder(s.out_dir) as out:
        (out / "resultData").mkdir()
        OmegaConf.save({"names": ["angle"], "units": ["degrees"]}, out / "controls.yaml")
        for file, angles in files.items():
            lines = []
            for name, photo in tqdm(photos.items(), desc=file):
                for angle in angles:
                    target = f"resultData/{name}_{angle:+g}.png"
                    render_framed(photo, s.image_size, angle).save(out / target)
                    lines.append(json.dumps({"source": f"{angle:g}", "target": target, "prompt": photo.prompt}))
            (out / file).write_text("\n".join(lines) + "\n")
            print(f"{len(lines)} pictures of {len(photos)} photographs: {Path(s.out_dir) / file}")


if __name__ == "__main__":
    run_script(main, settings)
