"""Read the control from a picture, or from many, in about a second each: no start, with error bars and flags.

    python invert.py input_image_path=before.png target_image_path=after.png known=zoom=1 out_dir=OUT
    python invert.py model_path=runs/my_control target_image_path=x.png prompt="a photo of a leather bag" out_dir=OUT
    python invert.py model_path=runs/my_control targets=my_data/prompt.json out_dir=OUT
    python invert.py model_path=runs/my_control targets="photos/*.jpg" prompt="a photo of a leather bag" out_dir=OUT

Leaves OUT/result.json and OUT/figure.png of one picture; OUT/results.jsonl, a line each, of many. A run over many that
was killed goes on when started again with the same out_dir. A "source" in a prompt.json is only compared with.
"""

from ldm.settings import (
    InputError,
    answer,
    check_kinds,
    check_numbers,
    check_used,
    nearest,
    run_script,
)

settings = dict(
    model_path="models/control_tiny_pair",  # the out_dir of a training
    input_image_path="dataForTrain/demo/resultData/00000_reference.png",  # picture A, where the control is a change
    target_image_path="dataForTrain/demo/resultData/00000_target.png",  # picture B, or the only one
    prompt="",  # as in training; pairs need none
    a_prompt=None,  # added to the prompt; None: as the base's YAML says
    known="",  # what need not be found: "zoom=1,exposure=0"
    targets="",  # many, in place of target_image_path: a folder, a glob like "photos/*.jpg", or a prompt.json
    out_dir="outputs/invert",
    draws=8,  # of noise, in pairs
    batch_size=12,  # targets read together
    figures=None,  # per target: true, false; None: for a single one
    seed=0,
    save_memory=False,  # True: fewer pictures at once
    device="auto",  # a GPU where there is one
)
if __name__ == "__main__":
    answer(__file__)

import glob
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cldm.confidence import FLAGS
from cldm.dataset import Row, parse_control, read_rows
from cldm.evidence import check_evidence
from cldm.model import load_model
from cldm.pairs import SUFFIXES, list_pictures
from cldm.reading import read_and_profile, read_controls
from cldm.report import describe_reading, draw_pictures, draw_reading
from ldm.files import digest, find_path, report_folder, write_whole
from ldm.pictures import check_picture, fit_picture, load_picture, tell_fit


def read_rows_at_once(model, s, rows, unlike, out_dir, figures):
    """Read some rows together; figures: the names of their files, if they are drawn.

    Returns: their Reading; a function that draws and writes figure i.
    Raises: InputError if a number that was read is not finite.
    """
    began = time.perf_counter()

    def load(file):
        return file and fit_picture(load_picture(file), model.config.image_size)

    pictures = [(load(row.target), load(row.reference)) for row in rows]
    targets, references = zip(*pictures)
    prompts = [row.prompt for row in rows]
    target = model.encode(prompts, targets, references if rows[0].reference else None, s.a_prompt)
    if figures:
        reading, profiles = read_and_profile(model, target, s.known, s.draws, s.seed)
    else:
        reading = read_controls(model, target, s.known, s.draws, s.seed)
    for i, row in enumerate(rows):
        if not reading.control[i].isfinite().all():
            raise InputError(f"{row.target}: what was read is not finite ({reading.control[i].tolist()})")
        reading.flags[i] += ["unlike_shapes"] * unlike[i]
    if rows[0].reference:
        reading = check_evidence(reading, pictures, model.control_net.config, s.known)
    reading.seconds = (time.perf_counter() - began) / len(rows)

    def save_figure(i):
        drawn = draw_pictures(model, target.select(slice(i, i + 1)), reading.control[i : i + 1], s.seed)
        figure = draw_reading(model.control_net.config, reading, i, profiles, rows[i], (*pictures[i], *drawn))
        write_whole(out_dir / figures[i], partial(figure.savefig, format="png", dpi=100))

    return reading, save_figure


def parse_known(text, names):
    """Read "zoom=1,exposure=0". Returns: {name: number}. Raises: InputError for what names none of `names`."""
    known = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            (known[name],) = parse_control(value)
        except ValueError:
            raise InputError(f'setting "known": expected name=number, got "{part}"') from None
        if name not in names:
            raise InputError(f'setting "known": unknown number "{name}"{nearest(name, names)}')
    if len(known) == len(names):
        raise InputError(f'setting "known": all of {", ".join(names)} are given, nothing is left to read')
    return known


def find_rows(s, uses_reference):
    """Returns: the Rows to read: of one target, of a folder or glob of pictures, or of a prompt.json."""
    demo = s.input_image_path == settings["input_image_path"]
    if demo and (s.targets or s.target_image_path != settings["target_image_path"] or not uses_reference):
        s.input_image_path = ""  # the demo's reference belongs to the demo's target
    reference = find_path(s.input_image_path) if s.input_image_path else None
    if not s.targets:
        if s.input_image_path and not demo and s.target_image_path == settings["target_image_path"]:
            raise InputError("input_image_path: picture A alone; give picture B too, target_image_path")
        return [Row(None, find_path(s.target_image_path), s.prompt, reference)]
    check_used(s, settings, "with targets", "target_image_path")
    path = find_path(s.targets)
    if path.is_dir():
        return [Row(None, file, s.prompt, reference) for file in list_pictures(path)]
    if files := [] if path.exists() else sorted(glob.glob(os.path.expanduser(s.targets))):
        return [Row(None, Path(file), s.prompt, reference) for file in files]
    if not path.exists() or path.suffix.lower() in SUFFIXES:
        there = path.exists()
        found = "a picture, which target_image_path takes" if there else "not there, nor does a picture match it"
        raise InputError(f"targets {s.targets}: {found}; expected a folder, a glob or a prompt.json")
    check_used(
        s, {"prompt": "", "input_image_path": ""}, "with targets, whose rows say it", "prompt", "input_image_path"
    )
    return read_rows(path, known=False)


def check(s, model, rows):
    """Raises: InputError for a setting that cannot be."""
    check_kinds(s, str, "a_prompt")
    check_kinds(s, bool, "figures")
    check_numbers(s, int, draws=(4, 1000), batch_size=(1, math.inf), seed=(0, 2**63 - 1))
    if s.draws % 2:
        raise InputError(f'setting "draws": expected an even number, since noise comes in pairs, got {s.draws}')
    config = model.control_net.config
    s.known = parse_known(s.known, config.control_names)
    if model.control_net.uses_reference and s.known.get("zoom", 1) <= 0:
        raise InputError(f'setting "known": zoom is a ratio, above 0, got {s.known["zoom"]:g}')
    if model.control_net.uses_reference and rows[0].reference is None:
        raise InputError(f"model_path {s.model_path} reads changes between two pictures: give input_image_path too")
    if rows[0].reference is not None and not model.control_net.uses_reference:
        raise InputError(
            f"model_path {s.model_path} takes no reference: leave out input_image_path, {rows[0].reference}"
        )
    if config.control_low is None:
        raise InputError(f"model_path {s.model_path}: never trained, so its range is not known; run tutorial_train.py")
    for row in rows:
        if row.control is not None and len(row.control) != len(config.control_names):
            names = ", ".join(config.control_names)
            expected = f"{len(config.control_names)} number(s) ({names})"
            raise InputError(f"{s.targets}, {row.target}: the model takes {expected}, got {row.control}")


def resume(out_dir, s, rows, model):
    """Returns: the lines of out_dir/results.jsonl that a killed run of the same model, settings and pictures left."""
    own = {key: s[key] for key in s if key not in ("out_dir", "batch_size", "figures", "save_memory", "device")}
    folder = find_path(s.model_path)
    kinds = (".json", ".yaml", ".safetensors")
    files = [file for file in folder.iterdir() if file.suffix in kinds or file.name == "unet"]
    own["sha256"] = digest([*sorted(files), find_path(model.config.base)])
    own = json.dumps(own, indent=1)
    file, settings_file = out_dir / "results.jsonl", out_dir / "settings.yaml"
    if not file.exists():
        write_whole(settings_file, lambda file: file.write_text(own))
        return []
    remedy = "delete it, or choose another out_dir"
    try:
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        results = [json.loads(line) for line in lines]
        done = [(result["target"], result["prompt"], result.get("source")) for result in results]
        asked = [(str(r.target), r.prompt, r.control and list(r.control)) for r in rows[: len(lines)]]
        same = settings_file.read_text() == own and done == asked
        changed = [row.target for row, result in zip(rows, results) if result["sha256"] != digest_pictures(row)]
    except (OSError, ValueError, LookupError, TypeError):
        same, changed = False, []
    if not same:
        raise InputError(f"{file}: results of another model, other targets or settings; {remedy}")
    if changed:
        raise InputError(f"{file}: was read from another picture than {changed[0]} is now; {remedy}")
    print(f"going on after {len(lines)} of {len(rows)} targets" + (", figures from there on" if s.figures else ""))
    return lines


def digest_pictures(row):
    return digest([file for file in (row.reference, row.target) if file])


def summarize(config, lines):
    """Print errors where they are known, flags, calls and seconds of results.jsonl's lines."""
    results = [json.loads(line) for line in lines]
    known = [r for r in results if "error" in r]
    if known:
        errors, found = (np.stack([np.atleast_1d(r[key]) for r in known]) for key in ("error", "control"))  # (n, d)
        if calibrated := all(r["interval90"] for r in known):
            low, high = np.moveaxis([r["interval90"] for r in known], 2, 0)
            inside = (low <= found - errors) & (found - errors <= high)
        for i, (name, unit) in enumerate(zip(config.control_names, config.control_units)):
            e = np.abs(errors[:, i])
            numbers = f"error median {np.median(e):.3f}, 95% within {np.quantile(e, 0.95):.3f}, worst {e.max():.3f}"
            share = f"; interval90 holds the truth for {inside[:, i].mean():.0%}" if calibrated else ""
            print(f"{name}: {numbers} {unit}".rstrip() + f"{share} of {len(e)} targets")
    for flag, meaning in FLAGS.items():
        flagged = sum(flag in r["flags"] for r in results)
        if flagged:
            print(f"{flag}: {flagged} of {len(results)} ({meaning})")
    calls, seconds = (np.mean([r[key] for r in results]) for key in ("model_calls", "seconds"))
    iterations = max(r["iterations"] for r in results)
    print(f"at most {iterations} iterations; {calls:.0f} model calls, {seconds:.2f} seconds a target")


def read_one(model, s, row, unlike, out_dir):
    """Read one target: result.json first, then figure.png, then what was found is printed."""
    name, config = "figure.png" if s.figures is not False else "", model.control_net.config
    reading, save_figure = read_rows_at_once(model, s, [row], [unlike], out_dir, [name] if name else [])
    result = describe_reading(config, reading, 0, row, s.seed)
    write_whole(out_dir / "result.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    for k, (number, unit) in enumerate(zip(config.control_names, config.control_units)):
        error = f" ± {reading.std[0, k]:.3f}" if reading.calibrated else ""
        print(f"{number}: {reading.control[0, k]:+.3f}{error} {unit}".rstrip())
    for flag in reading.flags[0]:
        of = f" ({', '.join(result['no_effect'])})" if flag == "no_effect" else ""
        print(f"{flag}{of}: {FLAGS[flag]}")
    if name:
        save_figure(0)
    said = "" if reading.flags[0] else "no flags; "
    print(f"{said}{result['seconds']:.1f} seconds; see {out_dir}/{name or 'result.json'}")


def read_many(model, s, rows, unlike, out_dir):
    """Read all targets, batch after batch, each kept in results.jsonl before the next."""
    lines = resume(out_dir, s, rows, model)
    with tqdm(total=len(rows), initial=len(lines), desc="reading", leave=False) as bar:
        while len(lines) < len(rows):
            some = slice(len(lines), len(lines) + s.batch_size)
            batch = rows[some]
            names = [f"{i:05d}_{row.target.stem}.png" for i, row in enumerate(batch, 1 + len(lines)) if s.figures]
            reading, save_figure = read_rows_at_once(model, s, batch, unlike[some], out_dir, names)
            for i, row in enumerate(batch):
                result = describe_reading(model.control_net.config, reading, i, row, s.seed)
                lines.append(json.dumps(result | {"sha256": digest_pictures(row)}) + "\n")
            write_whole(out_dir / "results.jsonl", lambda file: file.write_text("".join(lines)))
            for i in range(len(names)):
                save_figure(i)
            bar.update(len(batch))
    summarize(model.control_net.config, lines)


def main(s):
    many = ("settings.yaml", "sha256", "results.jsonl", *(["?????_*.png"] if s.figures else []))
    out_dir = report_folder(s.out_dir, *(many if s.targets else ("result.json", "interval90", "figure.png")))
    model = load_model(s.model_path, device=s.device, save_memory=s.save_memory)
    rows = find_rows(s, model.control_net.uses_reference)
    check(s, model, rows)
    sizes = [[check_picture(file) for file in (row.reference, row.target) if file] for row in rows]
    unlike = tell_fit(sizes, model.config.image_size)
    if s.targets:
        read_many(model, s, rows, unlike, out_dir)
    else:
        read_one(model, s, rows[0], unlike[0], out_dir)


if __name__ == "__main__":
    run_script(main, settings, resume="a run over targets goes on when it is started again with the same out_dir")
