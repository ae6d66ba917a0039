"""From Rows to readings: their pictures loaded and read together, and what is said of each, which the caller keeps."""

import time
from functools import partial

from cldm.confidence import is_guess
from cldm.evidence import check_evidence
from cldm.fit import refine_reading
from cldm.model import MODEL_YAML
from cldm.reading import read_and_profile, read_controls
from cldm.report import describe_failure, describe_reading, draw_pictures, draw_reading
from cldm.results import fingerprint
from ldm.pictures import describe_shapes, fit_picture, tell_fit
from ldm.settings import InputError


def load(row, image_size):
    """Returns: a Row's target and its reference or None, PIL, fitted; the sizes that they had, reference first."""
    pictures = row.load()
    fitted = [fit_picture(picture, image_size) for picture in pictures]
    return (*fitted, None)[:2], [picture.size for picture in pictures[::-1]]


def read(model, s, known, rows, loaded, figures):
    """Read some rows together.

    s: Settings with a_prompt, draws and seed. known: {name: number}. loaded: what `load` returns for each.
    figures: whether they will be drawn.
    Returns: their Reading; a function that draws the figure of target i.
    Raises: InputError if latents, or a number that was read, are not finite.
    """
    began, config = time.perf_counter(), model.control_net.config
    pictures, sizes = zip(*loaded)
    targets, references = zip(*pictures)
    references = references if model.control_net.uses_reference else None
    target = model.encode([row.prompt for row in rows], targets, references, s.a_prompt)
    for seen, key in ((target.latents, "target"), (target.reference, "reference")):
        for row, own in zip(rows, [] if seen is None else seen):
            if not own.isfinite().all():
                what = f"its latents are not finite; try precision: float32 in {MODEL_YAML}"
                raise InputError(f"{getattr(row, key)}: {what}")
    if figures:
        reading, profiles = read_and_profile(model, target, known, s.draws, s.seed)
    else:
        reading = read_controls(model, target, known, s.draws, s.seed)
    for i, row in enumerate(rows):
        if not reading.control[i].isfinite().all():
            raise InputError(f"{row.target}: what was read is not finite ({reading.control[i].tolist()})")
        reading.flags[i] += ["unlike_shapes"] * (len(sizes[i]) == 2 and bool(describe_shapes(*sizes[i])))
    if references:
        reading = refine_reading(reading, pictures, config, known)
        reading = check_evidence(reading, pictures, config, known, [min(map(min, own)) for own in sizes])
    if reading.calibrated:
        for flags, guessed in zip(reading.flags, is_guess(config, reading).any(1).tolist()):
            flags += ["guess"] * guessed
    reading.seconds = (time.perf_counter() - began) / len(rows)

    def draw(i):
        (drawn,) = draw_pictures(model, target.select(slice(i, i + 1)), reading.control[i : i + 1], s.seed)
        return draw_reading(config, reading, i, profiles, rows[i], (*pictures[i], drawn))

    return reading, draw


def read_each(model, s, known, rows, tell):
    """As read, for some of many targets: what cannot be read does not stop the others.

    s: Settings with a_prompt, draws, seed and figures. tell: whether to say how the pictures are fitted.
    Returns: their dicts of results.jsonl; {index: the function that draws the figure} of those that were read.
    """
    config, size, results, loaded, draws = model.control_net.config, model.config.image_size, {}, {}, {}
    seen = [fingerprint(row) for row in rows]  # before they are read, since they may change meanwhile
    for i, row in enumerate(rows):
        try:
            loaded[i] = load(row, size)
        except InputError as error:
            results[i] = describe_failure(config, row, str(error), s.seed)
    if tell and loaded:
        tell_fit([sizes for _, sizes in loaded.values()], size)

    groups = [[*loaded]] if loaded else []
    while groups:
        group = groups.pop()
        try:
            reading, draw = read(model, s, known, [rows[i] for i in group], [loaded[i] for i in group], s.figures)
            for k, i in enumerate(group):
                results[i], draws[i] = describe_reading(config, reading, k, rows[i], s.seed), partial(draw, k)
        except InputError as error:
            if len(group) > 1:
                groups += [[i] for i in group]
            else:
                results[group[0]] = describe_failure(config, rows[group[0]], str(error), s.seed)
    return [results[i] | seen[i] for i in range(len(rows))], draws
