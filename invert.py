"""Read the control from a picture, or from many, in about a second each: no start, with error bars and flags.

    python invert.py input_image_path=before.png target_image_path=after.png known=zoom=1 out_dir=OUT
    python invert.py model_path=runs/my_control target_image_path=x.png prompt="a photo of a leather bag" out_dir=OUT
    python invert.py model_path=runs/my_control targets=my_data/prompt.json out_dir=OUT
    python invert.py model_path=runs/my_control targets="photos/*.jpg" prompt="a photo of a leather bag" out_dir=OUT

Leaves OUT/result.json and OUT/figure.png for one picture, a line each in OUT/results.jsonl for many. A run over many
that was killed goes on when it is started again with the same out_dir. A "source" in a prompt.json is only compared
with what is read.
"""

from ldm.settings import InputError, answer, check_numbers, run_script

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
    figures=None,  # true, false; None: of a single target. Drawing it may find a lower loss, which is then read
    seed=0,
    save_memory=False,  # True: fewer pictures at once
    device="auto",  # a GPU where there is one
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
import time
from functools import partial

from tqdm import trange

from cldm.evidence import check_evidence
from cldm.model import load_model
from cldm.reading import read_and_profile, read_controls
from cldm.report import describe_reading, draw_pictures, draw_reading
from cldm.results import digest_model, resume, summarize, tell_reading
from cldm.rows import find_rows, parse_known
from ldm.files import digest, report_folder, write_whole
from ldm.pictures import check_picture, fit_picture, load_picture, tell_fit
from ldm.schema import FLAG, expect, or_null


def read(model, s, known, rows, unlike, figures):
    """Read some rows together.

    known: {name: number}. unlike: whether each row's A and B have unlike shapes. figures: whether they will be drawn.
    Returns: their Reading; a function that draws the figure of target i.
    Raises: InputError if a number that was read is not finite.
    """
    began, config = time.perf_counter(), model.control_net.config
    pictures, sides = [], []  # as fitted, target and reference or None; the shorter side that they had
    for row in rows:
        loaded = [load_picture(file) for file in (row.target, row.reference) if file]
        fitted = [fit_picture(picture, model.config.image_size) for picture in loaded]
        pictures.append((*fitted, None)[:2])
        sides.append(min(min(picture.size) for picture in loaded))
    targets, references = zip(*pictures)
    references = references if model.control_net.uses_reference else None
    target = model.encode([row.prompt for row in rows], targets, references, s.a_prompt)
    if figures:
        reading, profiles = read_and_profile(model, target, known, s.draws, s.seed)
    else:
        reading = read_controls(model, target, known, s.draws, s.seed)
    for i, row in enumerate(rows):
        if not reading.control[i].isfinite().all():
            raise InputError(f"{row.target}: what was read is not finite ({reading.control[i].tolist()})")
        reading.flags[i] += ["unlike_shapes"] * unlike[i]
    if references:
        reading = check_evidence(reading, pictures, config, known, sides)
    reading.seconds = (time.perf_counter() - began) / len(rows)

    def draw(i):
        (drawn,) = draw_pictures(model, target.select(slice(i, i + 1)), reading.control[i : i + 1], s.seed)
        return draw_reading(config, reading, i, profiles, rows[i], (*pictures[i], drawn))

    return reading, draw


def save_figure(figure, file):
    write_whole(file, partial(figure.savefig, format="png", dpi=100))


def read_one(model, s, known, rows, unlike, out_dir):
    """Read one target; leaves result.json, then figure.png."""
    config, figure = model.control_net.config, s.figures is not False
    reading, draw = read(model, s, known, rows, unlike, figure)
    result = describe_reading(config, reading, 0, rows[0], s.seed)
    write_whole(out_dir / "result.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    tell_reading(config, reading, result)
    if figure:
        save_figure(draw(0), out_dir / "figure.png")
    print(f"{result['seconds']:.1f} seconds; see {out_dir}/{'figure.png' if figure else 'result.json'}")


def read_many(model, s, known, rows, unlike, out_dir):
    """Read all targets, batch after batch, each kept in results.jsonl before the next begins."""
    config, about = model.control_net.config, dict(known=known, a_prompt=s.a_prompt, draws=s.draws, seed=s.seed)
    about["sha256"] = digest_model(s.model_path, model.config.base)
    lines = resume(out_dir, about, [f"{row} {digest(row.pictures)}" for row in rows])
    for first in trange(len(lines), len(rows), s.batch_size, desc="reading", leave=False):
        some = slice(first, first + s.batch_size)
        reading, draw = read(model, s, known, rows[some], unlike[some], s.figures)
        for i, row in enumerate(rows[some]):
            lines.append(json.dumps(describe_reading(config, reading, i, row, s.seed)) + "\n")
        write_whole(out_dir / "results.jsonl", lambda file: file.write_text("".join(lines)))
        for i, row in enumerate(rows[some] if s.figures else []):
            save_figure(draw(i), out_dir / f"{first + i + 1:05d}_{row.target.stem}.png")
    summarize(config, lines)


def main(s):
    check_numbers(s, int, draws=(4, 1000), batch_size=(1, math.inf), seed=(0, 2**63 - 1))
    expect('setting "figures": expected', s.figures, or_null(FLAG))
    if s.draws % 2:
        raise InputError(f'setting "draws": expected an even number, since noise comes in pairs, got {s.draws}')
    many = ("settings.yaml", "sha256", "results.jsonl", *(["?????_*.png"] if s.figures else []))
    out_dir = report_folder(s.out_dir, *(many if s.targets else ("result.json", "interval90", "figure.png")))
    model = load_model(s.model_path, device=s.device, save_memory=s.save_memory)
    known = parse_known(s.known, model.control_net.config.control_names)
    rows = find_rows(s, settings, model.control_net)
    sizes = [[check_picture(file) for file in (row.reference, row.target) if file] for row in rows]
    unlike = tell_fit(sizes, model.config.image_size)
    (read_many if s.targets else read_one)(model, s, known, rows, unlike, out_dir)


if __name__ == "__main__":
    run_script(main, settings, resume="a run over targets goes on when it is started again with the same out_dir")
