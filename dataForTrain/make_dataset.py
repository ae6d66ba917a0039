"""Render the training set: photographs rotated about their centre by known angles.

    python dataForTrain/make_dataset.py                                       # what lies in dataForTrain, once more
    python dataForTrain/make_dataset.py angles=[-3.37,1.61] out_dir=elsewhere # other angles, the same framing
    python dataForTrain/make_dataset.py views=200 out_dir=elsewhere           # several numbers at once, at random
    python dataForTrain/make_dataset.py pairs=100 photos=FOLDER out_dir=elsewhere   # changes between two pictures

The photographs come inside the wheels of scikit-image, matplotlib and scikit-learn; PHOTOGRAPHS.md has their sources
and licences. A positive angle turns the picture counterclockwise.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import write_yaml
from ldm.settings import InputError, answer, check_numbers, check_used, run_script

settings = dict(
    angles=None,  # a list, degrees; None: -5, -4 … 5, and -3.5, 0.5, 2.5 into validation.json
    views=None,  # how many views of every photo, at random rotation, zoom, exposure and blur; a tenth for validation
    pairs=None,  # how many pairs, cut at random from the photos, between which `controls` change
    controls=None,  # of pairs: ["rotation", "zoom"] or {rotation: [-5, 5]}; None: all six
    seed=0,  # of views and pairs
    photos="train",  # "train", "held_out", names; for pairs also "validation" and folders; separated by commas
    image_size=128,  # pixels
    out_dir="runs/dataset",
    overwrite=False,  # True: a dataset in out_dir is replaced
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from threading import Thread

from PIL import Image, ImageFilter
from tqdm import tqdm

from cldm.changes import CHANGES, choose_changes, draw_change, expose_picture
from cldm.dataset import CONTROLS_FILE, TRAINING_FILE, VALIDATION_FILE, parse_control
from cldm.pairs import draw_pair, list_pictures, open_photo
from ldm.files import find_path, fresh_folder, leave_out, whole_folder
from ldm.pictures import check_pictures

PICTURES = "resultData"
TRAIN_ANGLES = list(range(-5, 6))  # degrees
VALIDATION_ANGLES = [-3.5, 0.5, 2.5]
VIEW = ("rotation", "zoom", "exposure", "blur")  # what is random in a view
FRAME = 0.68  # side of the frame over the photo's short side: it stays inside the photo at any angle
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
# These teach texture and colour beside the subjects, and are never shown in full.
EXTRA = [
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "skimage/data/grass.png",
    "skimage/data/clock_motion.png",
]
# A control for pairs is trained on TRAIN and EXTRA, and calibrated on these.
VALIDATION = ["skimage/data/motorcycle_left.png", "skimage/data/moon.png", "skimage/data/page.png"]
# No training and no tuning ever sees these: they are what accuracy is measured on.
HELD_OUT = {
    "grace_hopper": Photo("matplotlib/mpl-data/sample_data/grace_hopper.jpg", "a portrait of an officer"),
    "gravel": Photo("skimage/data/gravel.png", "a photo of gravel"),
    "ihc": Photo("skimage/data/ihc.png", "a micrograph of stained tissue"),
}


GROUPS = {"train": TRAIN, "held_out": HELD_OUT}


def follow_parent():
    """Of a worker: leave Ctrl-C to the process that started it, and end with that one, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def map_in_processes(count, function, *iterables, chunk=1):
    """Like map, but side by side in `count` processes; chunk: items that one of them takes at once."""
    if count == 1:
        yield from map(function, *iterables)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), follow_parent) as pool:
        yield from pool.map(function, *iterables, chunksize=chunk)


def find_photo(file):
    """Returns: the path of the photograph `file`."""
    package, path = file.split("/", 1)
    spec = find_spec(package)
    if spec is None:
        raise InputError(f"photograph {file}: package {package} is not installed (pip install -r requirements.txt)")
    return Path(spec.submodule_search_locations[0]) / path


def render(photo, size, side, angle_deg=0.0, center=None):
    """Turn a PIL photograph counterclockwise about a point and cut a square around that point, inside the photograph.

    size: pixels of the result. side: of the square, and center: (x, y), in the photo's pixels; None: its middle.
    Returns: PIL picture, size x size. Raises: ValueError if the turned square reaches over the photo's border.
    """
    x, y = center or (photo.width / 2, photo.height / 2)
    angle = math.radians(angle_deg)
    fine = OVERSAMPLE * size
    turned = 2 * math.ceil(fine * (abs(math.cos(angle)) + abs(math.sin(angle))) / 2)  # holds the turned square
    reach = turned / 2 * side / fine
    box = (x - reach, y - reach, x + reach, y + reach)
    picture = photo.resize((turned, turned), Image.Resampling.LANCZOS, box=box)
    picture = picture.rotate(angle_deg, Image.Resampling.BICUBIC)
    start = (turned - fine) // 2
    return picture.crop((start, start, start + fine, start + fine)).reduce(OVERSAMPLE)


def render_framed(photo, size, angle_deg=0.0, zoom=1.0, exposure=0.0, blur=0.0):
    """Returns: a Photo in the dataset's framing, changed as cldm.changes says; PIL, size x size."""
    picture = open_photo(find_photo(photo.file))
    picture = render(picture, size, photo.frame * min(picture.size) / zoom, angle_deg)
    return expose_picture(picture.filter(ImageFilter.GaussianBlur(blur)), exposure)


def draw_view(rng):
    """Returns: a control vector, the numbers of VIEW, each drawn over its whole range."""
    change = draw_change(rng, choose_changes(VIEW))
    return tuple(round(change[name], 4 if name == "zoom" else 3) for name in VIEW)


def select_photos(names):
    """Returns: {name: Photo} for "train", "held_out" or names separated by commas. Raises: InputError."""
    if names in GROUPS:
        return GROUPS[names]
    known, names = {**TRAIN, **HELD_OUT}, names.split(",")
    for name in names:
        if name not in known:
            raise InputError(f'no photograph or folder "{name}" (known: {", ".join([*GROUPS, *known])})')
    return {name: known[name] for name in names}


def find_pictures(photos):
    """Returns: the paths of the pictures that pairs are cut from, in folders, groups or names separated by commas."""
    files = []
    for name in photos.split(","):
        if not name.strip():
            raise InputError(f'"{photos}": a folder between commas has no name')
        if name not in (*GROUPS, "validation") and find_path(name).is_dir():
            files += list_pictures(find_path(name))
        elif len(Path(name).parts) > 1:
            raise InputError(f"{name}: no such folder")
        else:
            own = VALIDATION if name == "validation" else [photo.file for photo in select_photos(name).values()]
            files += map(find_photo, own + (EXTRA if name == "train" else []))
    return [*{os.path.realpath(file): file for file in files}.values()]  # one that is named twice is one


def make_pairs(s, out):
    """Save pairs below the folder out. Yields: for each, TRAINING_FILE and its row."""
    ranges, rng = choose_changes(s.controls), random.Random(s.seed)
    files = leave_out(find_pictures(s.photos), s.out_dir)
    check_pictures(files)
    for i in tqdm(range(s.pairs), desc="pairs"):
        reference, target, change = draw_pair(rng, files, s.image_size, ranges)
        row = {"source": [round(change[name], 6) for name in ranges]}
        for key, picture in (("reference", reference), ("target", target)):
            row[key] = f"{PICTURES}/{i:05d}_{key}.png"
            picture.save(out / row[key])
        yield TRAINING_FILE, row | {"prompt": ""}


def make_views(s, out):
    """Save views below the folder out. Yields: for each photo and control, the file it belongs to and its row."""
    files, rng = {TRAINING_FILE: TRAIN_ANGLES, VALIDATION_FILE: VALIDATION_ANGLES}, random.Random(s.seed)
    if s.angles is not None:
        try:
            files = {TRAINING_FILE: parse_control(s.angles if isinstance(s.angles, list) else [])}
        except ValueError:
            raise InputError(f"angles: expected a list of numbers like [-3.37,1.61], got {s.angles}") from None
    if s.views is not None:
        files = {TRAINING_FILE: range(s.views), VALIDATION_FILE: range(max(1, s.views // 10))}
    for file, numbers in files.items():
        for name, photo in tqdm(select_photos(s.photos).items(), desc=file):
            for number in numbers:
                control = draw_view(rng) if s.views else (number,)
                target = f"{PICTURES}/{name}_{'_'.join(f'{value:+.10g}' for value in control)}.png"
                source = list(control) if s.views else f"{number:.10g}"
                render_framed(photo, s.image_size, *control).save(out / target)
                yield file, {"source": source, "target": target, "prompt": photo.prompt}


def main(s):
    check_numbers(s, int, views=(1, 10**6), pairs=(1, 10**6), image_size=(32 if s.views else 8, 4096))
    given = [key for key in ("angles", "views", "pairs") if s[key] is not None]
    if len(given) > 1:
        raise InputError(f"{', '.join(given)}: one of them makes a dataset, give just one")
    folders = [find_path(name) for name in s.photos.split(",") if name not in GROUPS and find_path(name).is_dir()]
    if not s.pairs:
        check_used(s, settings, "without pairs", "controls")
        if folders:
            raise InputError(f"photos={s.photos}: from a folder only pairs are cut; give pairs=N too")
    if not s.pairs and not s.views:
        check_used(s, settings, "without views or pairs, where nothing is drawn", "seed")
    out_dir = fresh_folder(s.out_dir, s.overwrite, inputs=folders)
    names = list(choose_changes(s.controls) if s.pairs else VIEW if s.views else ["angle"])
    units = [CHANGES[name][0] if name in CHANGES else "degrees" for name in names]
    lines = {}
    with whole_folder(out_dir, removes=[VALIDATION_FILE], synced=False) as out:
        (out / PICTURES).mkdir()
        for file, row in (make_pairs if s.pairs else make_views)(s, out):
            lines.setdefault(file, []).append(json.dumps(row))
        for file, own in lines.items():
            (out / file).write_text("\n".join(own) + "\n")
        write_yaml({"names": names, "units": units}, out / CONTROLS_FILE)
    for file, own in lines.items():
        print(f"{len(own)} {'pairs' if s.pairs else 'pictures'}: {Path(s.out_dir) / file}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half made is removed then too
    run_script(main, settings)
