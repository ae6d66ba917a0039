"""Render pairs of pictures of things in the round, between which the thing turns, and camera and lamp move.

    python dataForTrain/make_things.py folder=FOLDER                              # 40000 pairs and 5 copies of each
    python dataForTrain/make_things.py folder=FOLDER turn=180 out_dir=runs/around # turned by any angle

FOLDER holds Debian's package sweethome3d-furniture, unpacked; mitsuba renders: docs/things.md says how to get both and
what the numbers mean, THINGS.md has the models' authors and licences. A run that was stopped goes on when started
again; more pairs may then be asked for. The pictures depend on the seed alone, not on the number of processes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import write_yaml
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    folder="outputs/furniture",  # with the archives *.sh3f in it or below it
    pairs=40000,  # of things to train on, about 13 from five pictures of a thing
    copies=5,  # of each of them, 11 at most: mirrored, in other colours, or both
    validation=400,  # pairs of other things, for error bars
    test=400,  # pairs of things that are held out
    only="",  # things with this in their names, such as blendswap-cc-0, all of which are CC0
    turn=30.0,  # degrees, the largest change; 180: anywhere
    photos="train",  # on tables and behind them in training, as make_dataset.py has it
    seed=0,
    samples=24,  # of every pixel; an even number shares them equally between lamp and sky
    image_size=128,  # pixels
    processes=1,
    out_dir="runs/things",
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import random
from functools import lru_cache, partial
from itertools import permutations, product
from operator import le

from PIL import Image, ImageOps
from tqdm import tqdm

from cldm.dataset import CONTROLS_FILE, TRAINING_FILE, VALIDATION_FILE
from cldm.pairs import open_photo
from dataForTrain.make_dataset import find_pictures, map_in_processes
from dataForTrain.solids import PACKAGE, Solid, Studio, View, load_mitsuba, read_things, render_view
from ldm.files import find_path, leave_out, report_folder, write_whole
from ldm.pictures import check_pictures
from ldm.schema import read_config

PICTURES, SETTINGS_FILE = "pictures", "settings.json"
MODELS = 820  # in the package: which are held out depends on it
BROKEN = {"scopia/kids_shelves"}  # its materials are missing
FLAT = 0.05  # of a thing's largest extent: what is thinner shows too little when it turns
FILES = {"training": TRAINING_FILE, "validation": VALIDATION_FILE, "test": "test/targets.json"}
PHOTOS = {"validation": "validation", "test": "held_out"}  # others than training's
TARGETS = 4  # pictures beside the reference of every scene in training, each of which may be the reference of others
CONTROLS = {  # unit, period, and whether it is of the target alone
    "turn": ("degrees", None, False),
    "height": ("degrees", None, False),
    "distance": ("ratio", None, False),
    "light": ("degrees", 360.0, True),
    "light height": ("degrees", None, True),
}
HEIGHTS, HEIGHT_CHANGE = (17.0, 43.0), 12.0  # of the reference's camera, degrees
DISTANCE_CHANGE = 1.25  # times, or one part in it
LIGHT_HEIGHTS = 25.0, 65.0  # degrees
TABLES = 1.2, 4.0  # half a table's side, in sizes of the thing
LAMPS, LAMP_RADII, SKIES = (0.7, 1.1), (0.1, 0.8), (0.15, 0.4)  # light of a lamp, its size, light of the sky
TINT = 0.15  # of lamp and sky, at most
PLAIN = 0.3  # of tables and backgrounds are of one colour
WAYS = [*product((False, True), permutations(range(3)))][1:]  # to copy a pair: whether mirrored, channels
SURFACE, SMALLEST = 256, 0.3  # pixels of one that is cut from a photograph; its side over the photograph's, at least


def choose_things(things, group, only=""):
    """Returns: the Things of "training", "validation" or "test", without those that are flat or broken.

    things: all, sorted by name; the index modulo 8 decides: 7 is the test's, 6 the validation's. only: what names have.
    Raises: InputError if there are none.
    """
    own = {"test": {7}, "validation": {6}}.get(group, set(range(6)))
    chosen = [thing for i, thing in enumerate(things) if i % 8 in own and is_solid(thing) and only in thing.name]
    if not chosen:
        raise InputError(f'setting "only": expected a part of names, got "{only}", which is in none of {group}')
    return chosen


def is_solid(thing):
    return thing.name not in BROKEN and min(thing.size) >= FLAT * max(thing.size)


def draw_scene(seed, group, number, turn):
    """Returns: a scene's Studio, and Views: the reference's and its targets', which depend on the arguments alone."""
    rng = random.Random(f"{seed} {group} {number}")

    def tinted(low, high):
        light = rng.uniform(low, high)
        return tuple(light * (1 + rng.uniform(-TINT, TINT)) for _ in range(3))

    studio = Studio(rng.uniform(*TABLES), rng.uniform(0, 90), rng.uniform(*LAMP_RADII), tinted(*LAMPS), tinted(*SKIES))
    first = View(rng.uniform(0, 360), rng.uniform(*HEIGHTS), 1.0, rng.uniform(0, 360), rng.uniform(*LIGHT_HEIGHTS))
    views, far = [first], math.log(DISTANCE_CHANGE)
    for _ in range(TARGETS if group == "training" else 1):
        turned = first.turn + rng.uniform(-turn, turn)
        height = first.height + rng.uniform(-HEIGHT_CHANGE, HEIGHT_CHANGE)
        distance = math.exp(rng.uniform(-far, far))
        views.append(View(turned, height, distance, rng.uniform(0, 360), rng.uniform(*LIGHT_HEIGHTS)))
    return studio, views


def describe_change(reference, target):
    """Returns: the numbers of CONTROLS between two Views; the lamp's are the target's own."""
    turn = (target.turn - reference.turn + 180) % 360 - 180
    change = turn, target.height - reference.height, target.distance / reference.distance
    return [round(value, 4) for value in (*change, target.light, target.light_height)]


def list_pairs(group, views, turn):
    """Returns: the pairs of a scene, each the indices of reference and target: in training, all within the ranges."""
    if group != "training":
        return [(0, 1)]
    most, far = (turn, HEIGHT_CHANGE), math.log(DISTANCE_CHANGE)

    def fits(i, j):
        *moved, distance = describe_change(views[i], views[j])[:3]
        return all(map(le, map(abs, moved), most)) and abs(math.log(distance)) <= far

    return sorted((pair for pair in permutations(range(len(views)), 2) if fits(*pair)), key=max)


def draw_surface(rng, files):
    """Returns: a plain picture, or a square cut from a photograph, turned and recoloured at random; PIL."""
    if rng.random() < PLAIN:
        return Image.new("RGB", (8, 8), tuple(rng.randrange(30, 240) for _ in range(3)))
    photo = open_photo(rng.choice(files))
    side = min(photo.size) * rng.uniform(SMALLEST, 1)
    x, y = (rng.uniform(0, extent - side) for extent in photo.size)
    square = photo.resize((SURFACE, SURFACE), Image.Resampling.LANCZOS, (x, y, x + side, y + side))
    square = square.transpose(rng.choice([*Image.Transpose]))
    return Image.merge("RGB", [square.split()[k] for k in rng.sample(range(3), 3)])


@lru_cache(1)
def order_things(folder, seed, group, only):
    """Returns: the Things of a group in the order in which scenes take them, again and again."""
    things = choose_things(read_things(folder), group, only)
    random.Random(f"{seed} {group}").shuffle(things)
    return things


def render_scene(s, out, group, photos, count, number):
    """Render the pictures of a scene that are not there yet.

    out: the folder of the group's rows, which holds PICTURES. photos: files, of tables and backgrounds. count: pairs,
    the first of the scene's.
    Returns: the rows of its pairs.
    """
    things = order_things(s.folder, s.seed, group, s.only)
    thing, (studio, views) = things[number % len(things)], draw_scene(s.seed, group, number, s.turn)
    files = [f"{PICTURES}/{group}_{number:05d}_{i}.png" for i in range(len(views))]
    pairs = list_pairs(group, views, s.turn)[:count]
    missing = [i for i in sorted({i for pair in pairs for i in pair}) if not (out / files[i]).exists()]
    if missing:
        rng = random.Random(f"{s.seed} {group} {number} surfaces")
        solid, floor, background = Solid(thing), draw_surface(rng, photos), draw_surface(rng, photos)
        for i in missing:
            seed = random.Random(f"{s.seed} {group} {number} {i}").getrandbits(32)
            picture = render_view(solid, studio, views[i], floor, background, s.image_size, s.samples, seed)
            write_whole(out / files[i], partial(picture.save, format="png"))
    rows = [
        {"source": describe_change(views[i], views[j]), "target": files[j], "prompt": "", "reference": files[i]}
        | {"thing": thing.name}
        for i, j in pairs
    ]
    ways = random.Random(f"{s.seed} {group} {number} copies").sample(WAYS, s.copies if group == "training" else 0)
    return rows + [copy_pair(out, row, k, *way) for k, way in enumerate(ways) for row in rows]


def copy_pair(out, row, number, mirrored, channels):
    """Returns: the row of a pair as it would have looked mirrored, or if red, green and blue were other colours.

    number: of the copy, in the names of its pictures, which are written if they are not there yet.
    """
    turn, height, distance, light, light_height = row["source"]
    source = [-turn, height, distance, round(-light % 360, 4), light_height] if mirrored else row["source"]
    copied = row | {"source": source}
    for key in ("target", "reference"):
        copied[key] = row[key].replace(".png", f"_{number}.png")
        if not (out / copied[key]).exists():
            with Image.open(out / row[key]) as picture:
                bands = (ImageOps.mirror(picture) if mirrored else picture).split()
            save = Image.merge("RGB", [bands[k] for k in channels]).save
            write_whole(out / copied[key], partial(save, format="png"))
    return copied


def make_rows(s, out, group, photos, count):
    """Render `count` pairs of a group, s.processes scenes at a time. photos: as render_scene has them.

    Returns: their rows.
    """
    counts, missing = [], count
    while missing:
        own = list_pairs(group, draw_scene(s.seed, group, len(counts), s.turn)[1], s.turn)
        counts.append(min(len(own), missing))
        missing -= counts[-1]
    render, scenes, rows = partial(render_scene, s, out, group, photos), range(len(counts)), []
    with tqdm(total=count, desc=f"{group} pairs") as progress:
        for number, own in zip(counts, map_in_processes(s.processes, render, counts, scenes)):
            rows += own
            progress.update(number)
    return rows


def hold_folder(s, photos):
    """Hold out_dir for this run, new or going on. Returns: its Path. Raises: InputError if another run made it."""
    kept = {key: s[key] for key in ("only", "turn", "photos", "seed", "samples", "image_size")}
    kept["photographs"] = len(photos)
    out = report_folder(s.out_dir, SETTINGS_FILE, "samples", PICTURES, CONTROLS_FILE, *FILES.values())
    file = out / SETTINGS_FILE
    if file.exists():
        before = kept | read_config(file)
        other = [f"{key}={before[key]} (now {kept[key]})" for key in kept if before[key] != kept[key]]
        if other:
            raise InputError(f"{file}: was made with {', '.join(other)}; give the same, or choose another out_dir")
    write_whole(file, partial(Path.write_text, data=json.dumps(kept)))
    return out


def main(s):
    check_numbers(s, int, pairs=(1, 10**6), validation=(1, 10**6), test=(0, 10**6), processes=(1, 1024))
    check_numbers(s, int, samples=(1, 10**4), image_size=(8, 4096), copies=(0, len(WAYS)))
    check_numbers(s, turn=(0, 180))
    s.folder = find_path(s.folder)
    things = read_things(s.folder)
    if len(things) != MODELS:
        remedy = f"expected the {MODELS} of Debian's {PACKAGE}, as docs/things.md unpacks it"
        raise InputError(f'setting "folder": {len(things)} models in {s.folder}; {remedy}')
    for group in FILES:
        choose_things(things, group, s.only)
    photos = leave_out(find_pictures(s.photos), s.out_dir)
    if kept := {*photos} & {file for group in PHOTOS.values() for file in find_pictures(group)}:
        raise InputError(f'setting "photos": {min(kept)} is held out of training; leave it out')
    check_pictures(photos)
    load_mitsuba()
    out = hold_folder(s, photos)
    for group, file in FILES.items():
        if count := s.pairs if group == "training" else s[group]:
            own = find_pictures(PHOTOS[group]) if group in PHOTOS else photos
            lines = [json.dumps(row) + "\n" for row in make_rows(s, (out / file).parent, group, own, count)]
            write_whole(out / file, partial(Path.write_text, data="".join(lines)))
            print(f"{len(lines)} pairs: {out / file}")
    units, periods, absolute = map(list, zip(*CONTROLS.values()))
    periods[0] = 360.0 if s.turn == 180 else None
    told = dict(names=[*CONTROLS], units=units, periods=periods, absolute=absolute)
    write_whole(out / CONTROLS_FILE, partial(write_yaml, told))


if __name__ == "__main__":
    run_script(main, settings, resume="the same command goes on")
