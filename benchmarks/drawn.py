"""Numbers that are no motion: six drawn things at ten values each, trained with default settings, read in between.

    python benchmarks/drawn.py                                  # draws, trains, reads: about 15 minutes on two cores
    python benchmarks/drawn.py model_path=runs/drawn            # reads with that control, trained there if it is new
    python benchmarks/drawn.py clock=true out_dir=outputs/clock # a number that goes round, another quarter of an hour

A plant that grows, the hand of a clock, a lamp, an apple that ripens, haze and wetness, each from 0 to 9. Training sees
whole numbers; the 84 targets lie between them. With clock=true it is the hand alone, all the way round, trained every
6 degrees and read at 40 places within 3 degrees of the seam and at 40 others, as far from what training saw. Prints
errors, how often intervals hold the truth, flags, and readings that miss the truth by more than their interval without
one: a row for each thing, or for the seam and elsewhere, and one for all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import write_yaml
from ldm.settings import answer, check_numbers, override, run_script

settings = dict(
    clock=False,  # True: the hand of the clock alone, from 0 to 360 degrees
    model_path="",  # of the control, which is trained if there is none; "": a folder of out_dir
    max_steps=1400,
    between=14,  # values between the trained ones that every thing is read at
    out_dir="outputs/drawn",
)
if __name__ == "__main__":
    answer(__file__)

import colorsys
import json
import math
import shutil

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

import tutorial_train
from benchmarks.common import quantiles, read_targets, save_json, start_report
from cldm.confidence import Z90
from ldm.files import find_path

SIZE, FINE = 128, 4  # pixels of a picture; it is drawn this many times as fine
S = SIZE * FINE  # side of the canvas
HIGHEST = 9  # value of every number; the lowest is 0
TRAINED, NEAR, HANDS = 6, 3, 40  # degrees between trained hands of the clock, and from the seam; targets there


def paint(colour="white"):
    """Returns: a canvas, and draw(shape, points, **how) that calls ImageDraw with points in shares of the canvas."""
    canvas = Image.new("RGB", (S, S), colour)
    pen = ImageDraw.Draw(canvas)

    def draw(shape, points, **how):
        if "width" in how:
            how["width"] = max(1, round(how["width"] * S))
        getattr(pen, shape)([(x * S, y * S) for x, y in points], **how)

    return canvas, draw


def box(x, y, half_width, half_height=None):
    half_height = half_width if half_height is None else half_height
    return [(x - half_width, y - half_height), (x + half_width, y + half_height)]


def grid():
    """Returns: x, y, (S, S) each, from 0 to 1."""
    return np.meshgrid(*[(np.arange(S) + 0.5) / S] * 2)


def to_picture(pixels):
    """pixels: (S, S, 3), from 0 to 1."""
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def rgb(hue, saturation, value):
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def smooth_noise(seed, cells):
    """Returns: (S, S), from 0 to 1, hills of about S / cells pixels."""
    coarse = np.random.default_rng(seed).random((cells, cells)).astype(np.float32)
    hills = np.asarray(Image.fromarray(coarse).resize((S, S), Image.Resampling.BICUBIC))
    return (hills - hills.min()) / np.ptp(hills)


def draw_plant(t):
    """A stem that grows out of a pot; a pair of leaves opens at every fifth of its height."""
    canvas, draw = paint((214, 232, 240))
    draw("rectangle", [(0, 0.86), (1, 1)], fill=(150, 120, 90))
    top = 0.7 - 0.06 - 0.54 * t
    stem = [(0.5 + 0.03 * math.sin(9 * (0.7 - y)), y) for y in np.linspace(0.72, top, 60)]
    draw("line", stem, fill=(60, 130, 50), width=0.014, joint="curve")
    for k in range(6):
        y = 0.62 - 0.1 * k
        grown = min(1.0, max(0.0, (y - top) / 0.22))
        if grown:
            x = 0.5 + 0.03 * math.sin(9 * (0.7 - y))
            for side in (-1, 1):
                length, width = 0.19 * grown * (1 - 0.06 * k), 0.045 * grown
                turns = np.linspace(0, math.pi, 24)
                edge = [(length * (1 - math.cos(a)) / 2, width * math.sin(a)) for a in turns]
                edge += [(u, -v) for u, v in reversed(edge)]
                leaf = [(x + side * (u * 0.9 + v * 0.44), y - 0.012 * k - u * 0.44 + v * 0.9) for u, v in edge]
                draw("polygon", leaf, fill=(70, 150 + 6 * k, 60), outline=(40, 100, 40))
    if t > 0.85:
        draw("ellipse", box(stem[-1][0], top, 0.06 * (t - 0.85) / 0.15), fill=(230, 90, 120))
    draw("polygon", [(0.36, 0.7), (0.64, 0.7), (0.6, 0.92), (0.4, 0.92)], fill=(190, 95, 55))
    draw("rectangle", [(0.34, 0.67), (0.66, 0.73)], fill=(205, 110, 65))
    return canvas


def draw_clock(t):
    """A clock with one hand, which turns by 30 degrees a unit."""
    canvas, draw = paint((120, 150, 170))
    draw("ellipse", box(0.5, 0.5, 0.42), fill=(90, 60, 40))
    draw("ellipse", box(0.5, 0.5, 0.38), fill=(245, 240, 225))
    for hour in range(12):
        angle, inner = math.radians(30 * hour), 0.29 if hour % 3 == 0 else 0.32
        ends = [(0.5 + r * math.sin(angle), 0.5 - r * math.cos(angle)) for r in (inner, 0.355)]
        draw("line", ends, fill=(40, 40, 40), width=0.02 if hour % 3 == 0 else 0.01)
    angle = math.radians(30 * HIGHEST * t)
    sin, cos = math.sin(angle), math.cos(angle)
    shape = [(0.022, -0.06), (0.022, 0.16), (0.0, 0.27), (-0.022, 0.16), (-0.022, -0.06)]
    draw("polygon", [(0.5 + u * cos + v * sin, 0.5 + u * sin - v * cos) for u, v in shape], fill=(170, 30, 30))
    draw("ellipse", box(0.5, 0.5, 0.035), fill=(40, 40, 40))
    return canvas


def draw_lamp(t):
    """A standing lamp in a dark room; its light fades in."""
    canvas, draw = paint((70, 66, 80))
    draw("rectangle", [(0, 0.78), (1, 1)], fill=(88, 62, 46))
    draw("rectangle", [(0.06, 0.14), (0.26, 0.42)], fill=(96, 88, 60))
    draw("rectangle", [(0.085, 0.165), (0.235, 0.395)], fill=(52, 92, 98))
    draw("rectangle", [(0.485, 0.4), (0.515, 0.84)], fill=(60, 60, 60))
    draw("ellipse", box(0.5, 0.85, 0.13, 0.035), fill=(60, 60, 60))
    shade = [(0.4, 0.18), (0.6, 0.18), (0.68, 0.42), (0.32, 0.42)]
    draw("polygon", shade, fill=(120, 100, 80))
    x, y = grid()
    near = np.exp(-((x - 0.5) ** 2 + (y - 0.36) ** 2) / 0.06)
    below = np.clip((y - 0.42) / 0.05, 0, 1) * np.clip(1.4 - abs(x - 0.5) / (0.16 + 0.8 * (y - 0.36)).clip(0.05), 0, 1)
    light = (0.25 + 1.1 * near + 0.8 * below)[..., None] * [1.0, 0.85, 0.55]
    lit = np.asarray(canvas) / 255 * (0.35 + 2.6 * t * light)
    mask = Image.new("L", (S, S))
    ImageDraw.Draw(mask).polygon([(u * S, v * S) for u, v in shade], fill=255)
    glow = np.asarray(mask.filter(ImageFilter.GaussianBlur(S / 100)))[..., None] / 255
    return to_picture(lit * (1 - glow * 0.85 * t) + glow * 0.85 * t * np.array([1.0, 0.93, 0.7]))


def draw_apple(t):
    """An apple that ripens from green through yellow to dark red."""
    canvas, draw = paint((228, 222, 212))
    draw("rectangle", [(0, 0.74), (1, 1)], fill=(165, 140, 110))
    draw("ellipse", box(0.52, 0.83, 0.3, 0.05), fill=(120, 100, 80))
    x, y = grid()
    u, v = (x - 0.5) / 0.31, (y - 0.54) / 0.3
    r, angle = np.hypot(u, v), np.arctan2(u, -v)
    edge = 1 - 0.16 * np.exp(-((angle / 0.35) ** 2)) - 0.08 * np.exp(-(((np.abs(angle) - np.pi) / 0.3) ** 2))
    inside = np.clip((edge - r) * 0.3 * S + 0.5, 0, 1)[..., None]
    shade = 1.08 - 0.45 * np.clip(np.hypot(u + 0.3, v + 0.35), 0, 2)
    skin = rgb(0.32 - 0.36 * t, 0.62 + 0.25 * t, 0.9 - 0.22 * t) * shade[..., None]
    skin += 0.5 * np.exp(-((u + 0.35) ** 2 + (v + 0.4) ** 2) / 0.03)[..., None]
    canvas = to_picture(np.asarray(canvas) / 255 * (1 - inside) + skin * inside)
    pen = ImageDraw.Draw(canvas)
    pen.line([(0.5 * S, 0.32 * S), (0.51 * S, 0.24 * S), (0.54 * S, 0.18 * S)], (90, 60, 30), S // 45, "curve")
    pen.polygon([(p * S, q * S) for p, q in ((0.53, 0.22), (0.61, 0.15), (0.72, 0.17), (0.63, 0.23))], (80, 140, 60))
    return canvas


def draw_haze(t):
    """Five ranges of hills; the far ones fade into haze."""
    x, y = grid()
    sky = np.array([0.45, 0.65, 0.9]) + 0.25 * y[..., None]
    haze = np.array([0.86, 0.87, 0.89])
    air = math.exp(-2.2 * t * 1.3)
    pixels = sky * air + haze * (1 - air)
    for k in range(5):  # the farthest first
        distance = 1.0 - 0.21 * k
        line = 0.36 + 0.12 * k + 0.05 * np.sin(7 * x + 2.3 * k) + 0.025 * np.sin(17 * x + 5.1 * k)
        if k > 2:  # trees
            line = line - 0.03 * np.abs(np.sin(55 * x + k)) ** 0.5
        ground = np.array([0.16 + 0.05 * k, 0.32 + 0.04 * k, 0.18]) * (1 - 0.25 * (y - line).clip(0, 1))[..., None]
        air = math.exp(-2.2 * t * distance)
        covered = np.clip((y - line) * S + 0.5, 0, 1)[..., None]
        pixels = pixels * (1 - covered) + (ground * air + haze * (1 - air)) * covered
    return to_picture(pixels)


def draw_wetness(t):
    """Paving stones that darken as they get wet, with puddles that spread between them and mirror the sky."""
    x, y = grid()
    row = np.floor(y * 6)
    column = x * 5 + 0.5 * (row % 2)
    joint = np.minimum(np.minimum(column % 1, 1 - column % 1) / 5, np.minimum(y * 6 % 1, 1 - y * 6 % 1) / 6)
    shades = np.random.default_rng(3).uniform(0.8, 1.1, (6, 7))[row.astype(int), np.floor(column).astype(int)]
    stone = np.clip((joint - 0.008) * S / 4 + 0.5, 0, 1)
    dry = (0.66 * shades + 0.08 * (smooth_noise(4, 64) - 0.5))[..., None] * [1.0, 0.95, 0.88]
    dry = dry * stone[..., None] + np.array([0.42, 0.38, 0.34]) * (1 - stone[..., None])
    wet = dry ** (1 + 0.9 * t) * (1 - 0.3 * t)
    height = 0.8 * smooth_noise(5, 7) + 0.2 * stone
    puddle = np.clip((0.75 * t - height) * 40 + 0.5, 0, 1)[..., None]
    sky = np.array([0.55, 0.68, 0.82]) + 0.15 * (1 - y[..., None])
    return to_picture(wet * (1 - puddle) + (0.25 * wet + 0.75 * sky) * puddle)


THINGS = {
    "plant": (draw_plant, "a drawing of a plant in a pot"),
    "clock": (draw_clock, "a drawing of a clock on a wall"),
    "lamp": (draw_lamp, "a drawing of a lamp in a room"),
    "apple": (draw_apple, "a drawing of an apple on a table"),
    "haze": (draw_haze, "a drawing of hills under the sky"),
    "wetness": (draw_wetness, "a drawing of paving stones"),
}


def draw_thing(name, value):
    """value: from 0 to HIGHEST. Returns: a PIL picture of SIZE x SIZE pixels."""
    return THINGS[name][0](value / HIGHEST).reduce(FINE)


def values_between(count):
    """Returns: {thing: count values}, spread over the range, different ones for every thing, none of them whole."""
    return {
        name: [(k + (i + 0.5) / len(THINGS)) * HIGHEST / count for k in range(count)] for i, name in enumerate(THINGS)
    }


def hands_between():
    """Returns: {"seam", "elsewhere": degrees}, HANDS each, those beside the seam at all places that others are at."""
    beside = [NEAR * ((2 * k + 1) / HANDS - 1) for k in range(HANDS)]
    others = [TRAINED * round((k + 1) * 360 / TRAINED / (HANDS + 1)) for k in range(HANDS)]
    return {"seam": [degrees % 360 for degrees in beside], "elsewhere": [a + b for a, b in zip(others, beside)]}


def draw_dataset(folder, values, clock=False):
    """Write pictures/, prompt.json and controls.yaml into a folder.

    values: {thing: values to draw it at}. clock: whether all are degrees of the clock's hand.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, own in values.items():
        thing, unit = ("clock", 30) if clock else (name, 1)
        for value in own:
            row = {"source": round(value, 3), "target": f"pictures/{name}_{value:.3f}.png", "prompt": THINGS[thing][1]}
            draw_thing(thing, row["source"] / unit).save(folder / row["target"])
            rows.append(json.dumps(row) + "\n")
    (folder / "prompt.json").write_text("".join(rows))
    hand = {"names": ["hand"], "units": ["degrees"], "periods": [360]}
    write_yaml(hand if clock else {"names": ["value"], "units": [f"of {HIGHEST}"]}, folder / "controls.yaml")


def read_between(model_path, folder, values, clock):
    """Read things at values, as draw_dataset has them, as invert.py does. Returns: {thing: its results}."""
    for old in ("unseen", "readings"):
        shutil.rmtree(folder / old, ignore_errors=True)
    draw_dataset(folder / "unseen", values, clock)
    results = iter(read_targets(model_path, folder / "unseen" / "prompt.json", folder / "readings"))
    return {name: [next(results) for _ in own] for name, own in values.items()}


def tabulate(results):
    """Print errors, coverage and flags. results: {thing: dicts as invert.py leaves them}."""
    print("| | targets | median | 95% within | worst | in interval90 | flagged | outside, without a flag |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    everything = [result for own in results.values() for result in own]
    for name, own in [*results.items(), ("all", everything)]:
        errors = np.abs([result["error"] for result in own])
        half = Z90 * np.array([result["std"] for result in own])
        flagged = np.array([bool(result["flags"]) for result in own])
        counts = f"{np.mean(errors <= half):.0%} | {flagged.sum()} | {np.sum((errors > half) & ~flagged)}"
        print(f"| {name} | {len(own)} | {' | '.join(quantiles(errors, [0.5, 0.95, 1]))} | {counts} |")
    for result in everything:
        if abs(result["error"]) > 2 * Z90 * result["std"]:  # twice what nine in ten stay within
            found, true = result["control"], result["control"] - result["error"]
            what = f"{result['prompt']}, {true:.2f}: {found:.2f} ± {result['std']:.2f}"
            print(what, ", ".join(result["flags"]))


def main(s):
    check_numbers(s, int, max_steps=(1, math.inf), between=(1, 1000))
    out_dir, kind = start_report(s.out_dir, "results.json", "interval90", "unseen", "readings"), "hand_" * s.clock
    data_root = out_dir / f"{kind}data"
    model_path = find_path(s.model_path or out_dir / f"{kind}control_{s.max_steps}")
    config, trained = model_path / "config.json", {name: range(HIGHEST + 1) for name in THINGS}
    if not config.exists() or not json.loads(config.read_text()).get(
        "error_scale"
    ):  # a training that was killed goes on
        if not (data_root / "prompt.json").exists():
            draw_dataset(data_root, {"hand": range(0, 360, TRAINED)} if s.clock else trained, s.clock)
        arguments = [f"data_root={data_root}", f"out_dir={model_path}", f"max_steps={s.max_steps}"]
        tutorial_train.main(override(tutorial_train.settings, arguments))
    values = hands_between() if s.clock else values_between(s.between)
    results = read_between(model_path, out_dir, values, s.clock)
    save_json(out_dir / "results.json", results)
    tabulate(results)


if __name__ == "__main__":
    run_script(main, settings)
