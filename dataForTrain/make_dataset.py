"""Render the training set: photographs rotated about their centre by known angles.

    python dataForTrain/make_dataset.py                                       # what lies in dataForTrain, once more
    python dataForTrain/make_dataset.py angles=[-3.37,1.61] out_dir=elsewhere # other angles, identical framing
    python dataForTrain/make_dataset.py views=200 out_dir=elsewhere           # several controls at once, at random
    python dataForTrain/make_dataset.py pairs=100 photos=FOLDER out_dir=elsewhere   # changes between two pictures

The photographs come inside the wheels of scikit-image, matplotlib and scikit-learn; PHOTOGRAPHS.md has
their sources and licences. A positive angle turns the picture counterclockwise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, check_used, run_script, write_yaml

settings = dict(
    angles=None,  # a list, degrees; None: -5, -4 … 5, and -3.5, 0.5, 2.5 into validation.json
    views=None,  # how many of every photo, rotation, zoom, exposure and blur at random, and a tenth for validation
    pairs=None,  # how many pairs, cut at random from the photos, between which `controls` change
    controls=None,  # of pairs: ["rotation", "zoom"] or {rotation: [-5, 5]}; None: all six
    seed=0,  # of views and pairs
    photos="train",  # "train", "held_out", or names separated by commas; of pairs also "validation", or any folder
    image_size=128,  # pixels
    out_dir="runs/dataset",
    overwrite=False,  # True: a dataset that lies in out_dir is replaced
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import random
from dataclasses import dataclass
from importlib.util import find_spec

from PIL import Image, ImageFilter
from tqdm import tqdm

from cldm.changes import CHANGES, choose_changes, expose_picture
from cldm.dataset import CONTROLS_FILE, TRAINING_FILE, VALIDATION_FILE, parse_control
from cldm.pairs import draw_pair, list_pictures, open_photo
from ldm.files import find_path, fresh_folder, whole_folder

PICTURES = "resultData"
MADE = (
    PICTURES,
    TRAINING_FILE,
    VALIDATION_FILE,
    CONTROLS_FILE,
)  # one dataset: what one has not, an old one must not add
TRAIN_ANGLES = list(range(-5, 6))  # degrees
VALIDATION_ANGLES = [-3.5, 0.5, 2.5]
CONTROLS = {  # of a view: its unit and range
    "rotation": ("degrees", -10, 10),
    "zoom": ("ratio", 0.8, 1.25),
    "exposure": ("stops", -1, 1),
    "blur": ("pixels", 0, 2),
}
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
# Free pictures (PHOTOGRAPHS.md) that teach texture and colour beside the subjects; never drawn in full.
EXTRA = [
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/grass.png",
    "skimage/data/clock_motion.png",
]
# What only calibrates a control for pairs; those that train it are TRAIN and EXTRA.
VALIDATION = ["skimage/data/motorcycle_left.png", "skimage/data/moon.png", "skimage/data/page.png"]
# Seen by no training and by no tuning, ever: for measuring on pictures that are new.
HELD_OUT = {
    "grace_hopper": Photo("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "a portrait of an officer"),
    "gravel": Photo("skimage/data/gravel.png", "a photo of gravel"),
    "ihc": Photo("skimage/data/ihc.png", "a micrograph of stained tissue"),
}


def find_photo(file):
    """Returns: the path of the photograph `file`."""
    package, path = file.split("/", 1)
    spec = find_spec(package)
    if spec is None:
        raise InputError(f"photograph {file}: package {package} is not installed (pip install -r requirements.txt)")
    return Path(spec.submodule_search_locations[0]) / path


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


def render_framed(photo, size, angle_deg=0.0, zoom=1.0, exposure=0.0, blur=0.0):
    """Show `photo` (a Photo) in the dataset's framing.

    size: pixels. angle_deg: counterclockwise. zoom: above 1, larger. exposure: stops, of linear light. blur: standard
    deviation of a Gaussian, in pixels of the result.
    Returns: PIL picture, size x size.
    """
    picture = open_photo(find_photo(photo.file))
    picture = render(picture, size, photo.frame * min(picture.size) / zoom, angle_deg)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    if exposure:
        picture = expose_picture(picture, exposure)
    return picture


def draw_view(rng):
    """Returns: a control vector, CONTROLS' numbers drawn evenly, zoom evenly in its logarithm."""
    rotation, zoom, exposure, blur = (bounds for _, *bounds in CONTROLS.values())
    return (
        round(rng.uniform(*rotation), 3),
        round(math.exp(rng.uniform(*map(math.log, zoom))), 4),
        round(rng.uniform(*exposure), 3),
        round(rng.uniform(*blur), 3),
    )


def select_photos(names):
    """Returns: {name: Photo} for "train", "held_out" or a comma-separated list of names. Raises: InputError."""
    known = {**TRAIN, **HELD_OUT}
    groups = {"train": TRAIN, "held_out": HELD_OUT}
    if names in groups:
        return groups[names]
    if find_path(names).is_dir():
        raise InputError(f"photos={names}: from a folder only pairs are cut; give pairs=N too")
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise InputError(f'no photograph or folder "{unknown[0]}" (known: {", ".join([*groups, *known])})')
    return {name: known[name] for name in names.split(",")}


def find_pictures(photos):
    """Returns: the paths of the pictures to cut pairs from: in a folder, or those that `photos` names."""
    if photos == "validation":
        return [find_photo(file) for file in VALIDATION]
    if photos not in ("train", "held_out") and find_path(photos).is_dir():
        return list_pictures(find_path(photos))
    if len(Path(photos).parts) > 1:
        raise InputError(f"{photos}: no such folder")
    return [find_photo(p.file) for p in select_photos(photos).values()] + [
        find_photo(f) for f in EXTRA if photos == "train"
    ]


def write_pairs(s, out):
    """Write prompt.json and controls.yaml of s.pairs pairs into the folder `out`, pictures into its resultData/."""
    ranges, files, rng, lines = choose_changes(s.controls), find_pictures(s.photos), random.Random(s.seed), []
    for i in tqdm(range(s.pairs), desc="pairs"):
        reference, target, change = draw_pair(rng, files, s.image_size, ranges)
        row = {"source": [round(change[name], 6) for name in ranges]}
        for key, picture in dict(reference=reference, target=target).items():
            row[key] = f"{PICTURES}/{i:05d}_{key}.png"
            picture.save(out / row[key])
        lines.append(json.dumps(row | {"prompt": ""}))
    (out / TRAINING_FILE).write_text("\n".join(lines) + "\n")
    units = [CHANGES[name][0] for name in ranges]
    write_yaml({"names": list(ranges), "units": units}, out / CONTROLS_FILE)
    print(f"{len(lines)} pairs from {len(files)} photographs: {Path(s.out_dir) / TRAINING_FILE}")


def choose_controls(s):
    """Returns: {file: a function of no arguments, the control vectors of a photo}."""
    if s.views is not None:
        rng = random.Random(s.seed)
        counts = {TRAINING_FILE: s.views, VALIDATION_FILE: max(1, s.views // 10)}
        return {file: lambda n=count: [draw_view(rng) for _ in range(n)] for file, count in counts.items()}
    if s.angles is None:
        return {TRAINING_FILE: lambda: zip(TRAIN_ANGLES), VALIDATION_FILE: lambda: zip(VALIDATION_ANGLES)}
    try:
        angles = parse_control(s.angles if isinstance(s.angles, list) else [])
    except ValueError:
        raise InputError(f"angles: expected a list of numbers like [-3.37,1.61], got {s.angles}") from None
    return {TRAINING_FILE: lambda: zip(angles)}


def main(s):
    check_numbers(s, int, views=(1, 10**6), pairs=(1, 10**6), image_size=(8, 4096))
    given = [key for key in ("angles", "views", "pairs") if s[key] is not None]
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: one of them makes a dataset, give just one")
    if s.controls is not None and s.pairs is None:
        raise InputError("controls: says what changes in pairs; give pairs=N too")
    if s.pairs is None and s.views is None:
        check_used(s, settings, "without views or pairs, where nothing is drawn", "seed")
    out_dir = fresh_folder(s.out_dir, s.overwrite, inputs=[p for p in [find_path(s.photos)] if p.is_dir()])
    if s.pairs is not None:
        with whole_folder(out_dir, removes=MADE) as out:
            (out / PICTURES).mkdir()
            write_pairs(s, out)
        return
    photos, files = select_photos(s.photos), choose_controls(s)
    names = list(CONTROLS) if s.views is not None else ["angle"]
    units = [unit for unit, *_ in CONTROLS.values()] if s.views is not None else ["degrees"]
    with whole_folder(out_dir, removes=MADE) as out:
        (out / PICTURES).mkdir()
        write_yaml({"names": names, "units": units}, out / CONTROLS_FILE)
        for file, draw in files.items():
            lines = []
            for name, photo in tqdm(photos.items(), desc=file):
                for control in draw():
                    target = f"{PICTURES}/{name}_{'_'.join(f'{value:+g}' for value in control)}.png"
                    render_framed(photo, s.image_size, *control).save(out / target)
                    source = list(control) if len(control) > 1 else f"{control[0]:g}"
                    lines.append(json.dumps({"source": source, "target": target, "prompt": photo.prompt}))
            (out / file).write_text("\n".join(lines) + "\n")
            print(f"{len(lines)} pictures of {len(photos)} photographs: {Path(s.out_dir) / file}")


if __name__ == "__main__":
    run_script(main, settings)
