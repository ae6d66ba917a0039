"""What the page draws and reads, as pieces of HTML that carry their pictures and downloads, so that no file is left.

Each is a generator: between two of its steps, other visitors have their turn.
"""

import io
import json
import shutil
import tempfile
from base64 import b64encode
from dataclasses import replace
from functools import lru_cache
from html import escape
from pathlib import Path

import torch

from cldm.confidence import decimals, is_outside
from cldm.dataset import Row, find_prompt
from cldm.model import Sampling
from cldm.readers import load, read, read_each
from cldm.report import (
    describe_control,
    describe_flags,
    describe_reading,
    draw_pictures,
    draw_strip,
    label,
    tell_names,
)
from cldm.results import write_table
from cldm.rows import find_rows, parse_known
from cldm.series import Series, draw_series, listed
from ldm.files import unpack
from ldm.pictures import load_picture
from ldm.schema import InputError, Settings, expect, number

BATCH = 4  # pictures read between two signs of progress
NAMED = 10  # files that are told not to be read, prompts that are told not to be known
UNPACKED = 20  # times max_upload_mb that a zip may come to


def tell_error(line):
    """Returns: HTML of the line that a script would end with."""
    return f'<p class="wrong">error: {escape(line)}</p>'


def to_png(save):
    """save: that of a PIL picture, or savefig of a Figure. Returns: the bytes of a PNG."""
    file = io.BytesIO()
    save(file, format="png")
    return file.getvalue()


def embed(kind, content):
    return f"data:{kind};base64,{b64encode(content).decode()}"


def show(content, caption=""):
    """content: of a PNG. Returns: HTML of the picture."""
    text = escape(caption)
    return f'<figure><img src="{embed("image/png", content)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def offer(name, kind, content):
    """Returns: HTML of a link that downloads bytes as a file."""
    return f'<a class="offer" download="{name}" href="{embed(kind, content)}">{name}</a>'


def tabulate(head, rows):
    """Returns: HTML of a table of texts."""

    def line(kind, cells):
        return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    lines = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{lines}</table></div>'


def tell_flags(flags):
    """flags: {flag: what it says}. Returns: HTML."""
    return "".join(f'<p class="flag"><b>{flag}</b> {escape(text)}</p>' for flag, text in flags.items())


def tell_prompts(model, prompts):
    """Returns: HTML of what is said of prompts that training did not know, NAMED at most."""
    known = tuple(model.control_net.config.prompts or ())
    unknown = [prompt for prompt in dict.fromkeys(prompt or "" for prompt in prompts) if prompt not in known]
    lines = dict.fromkeys(find_prompt(prompt, known)[1] for prompt in unknown[:NAMED])
    return "".join(f'<p class="fine">{escape(line)}</p>' for line in lines if line)


def named(model, picture, name):
    """Returns: the Path of a picture that the model needs. Raises: InputError if there is none."""
    if not picture:
        raise InputError(f"picture {name}: none is there; drop one, or click an example")
    return Path(picture)


@lru_cache(32)
def encode(model, prompt, reference, a_prompt):
    """Returns: the Target of a drawing, kept while its numbers move. reference: the path of picture A, or None."""
    return model.encode([prompt or ""], None, reference and [load_picture(reference)], a_prompt)


def prepare(model, s, prompt, reference, seed):
    """Returns: a function that draws at a control (1, d) with few steps, as a PIL picture. Raises: InputError."""
    expect("seed: expected", seed, number(0, 2**63 - 1, whole=True))
    reference = named(model, reference, "A") if model.control_net.uses_reference else None
    target, sampling = encode(model, prompt, reference, s.a_prompt), Sampling(s.ddim_steps)
    return lambda control: draw_pictures(model, target, control, seed, sampling)[0]


def to_control(model, numbers):
    """Returns: (1, d), periodic numbers within their circle. Raises: InputError for what is no number."""
    for name, value in zip(model.control_net.config.control_names, numbers):
        expect(f"{name}: expected", value, number())
    return model.control_net.wrap(torch.tensor([numbers], dtype=torch.float64)).to(model.base.device)


def draw(model, s, prompt, reference, seed, *numbers):
    """Yields: HTML of the picture drawn at d numbers."""
    config, control = model.control_net.config, to_control(model, numbers)
    png = to_png(prepare(model, s, prompt, reference, seed)(control).save)
    outside = is_outside(config, control, torch.full_like(control, torch.inf))[0]
    flags = {"outside_range": "a number lies beyond the trained range"} if outside else {}
    caption = f"{'B, ' * model.control_net.uses_reference}drawn at {describe_control(config, control[0].tolist())}"
    said = tell_flags(flags) + tell_prompts(model, [prompt])
    yield show(png, caption) + said + offer("drawing.png", "image/png", png)


def draw_range(model, s, prompt, reference, seed, name, *numbers):
    """Yields: progress, then HTML of a strip over the trained range of the number called `name`, the others staying."""
    config, drawing, panels = model.control_net.config, prepare(model, s, prompt, reference, seed), {}
    k = config.control_names.index(name)
    ends = config.control_low[k], config.control_high[k]
    values = torch.linspace(*ends, s.count + bool(config.periods[k]), dtype=torch.float64)[: s.count]  # ends meet
    digits = 3 if len({f"{value:.3g}" for value in values.tolist()}) == s.count else 6
    for value in values.tolist():
        control = to_control(model, [*numbers[:k], value, *numbers[k + 1 :]])
        panels[f"{name}\n{value:+.{digits}g} {config.control_units[k]}"] = drawing(control)
        yield f"<p>{len(panels)} of {s.count} drawn</p>"
    png = to_png(draw_strip(panels).savefig)
    yield show(png) + tell_prompts(model, [prompt]) + offer("strip.png", "image/png", png)


def read_picture(model, s, reference, target, prompt, known):
    """Yields: HTML of what is read from one picture, or of the change from A to B. known: as invert.py takes it."""
    config, prompt = model.control_net.config, prompt or ""
    known = parse_known(known or "", config.control_names)
    reference = named(model, reference, "A") if model.control_net.uses_reference else None
    row = Row(None, named(model, target, "B" if reference else "to read"), prompt, reference)
    reading, figure = read(model, s, known, [row], [load(row, model.config.image_size)], figures=True)
    result = describe_reading(config, reading, 0, row, s.seed)
    result |= {key: Path(result[key]).name for key in ("reference", "target") if key in result}
    lines = zip(tell_names(config), tell_numbers(result, known), config.control_units)
    table = [[name, *cells, unit] for name, (_, *cells), unit in lines]
    flags = describe_flags(result["flags"], result)
    png, text = to_png(figure(0).savefig), (json.dumps(result, indent=1) + "\n").encode()
    yield (
        tabulate(["number", "read", "± standard error", "90% interval", "unit"], table)
        + (tell_flags(flags) or f'<p class="fine">no flags; {result["seconds"]:.1f} seconds</p>')
        + tell_prompts(model, [prompt])
        + offer("result.json", "application/json", text)
        + offer("figure.png", "image/png", png)
        + show(png)
    )


def tell_numbers(result, known=()):
    """result: a dict of results.jsonl. known: names of given numbers. Returns: for each number a list of texts."""
    names, lines = result["names"], []
    bars = listed(result["std"], len(names), None), listed(result["interval90"], len(names), None)
    for name, value, std, interval in zip(names, listed(result["control"], len(names), None), *bars):
        if name in known or value is None or std is None:
            bar, digits = ["given" if name in known else "unknown", ""], 3
        else:
            digits = decimals(std)
            bar = [f"± {std:.{digits}f}", f"{interval[0]:.{digits}f} … {interval[1]:.{digits}f}"]
        lines.append([name, "" if value is None else f"{value:+.{digits}f}", *bar])
    return lines


def gather(model, s, files, reference, prompt, folder):
    """Put what was uploaded into a folder; a zip is unpacked there, several into folders of their names.

    Returns: its Rows, those of a prompt.json if it has one. Raises: InputError if it has several.
    """
    zips = [file for file in map(Path, files) if file.suffix.lower() == ".zip"]
    for file in [*zips, *(file for file in map(Path, files) if file not in zips)]:
        place = folder / (file.stem if file in zips else file.name)
        place = folder / file.parent.name / place.name if place.exists() else place
        if file in zips:
            unpack(file, place if len(zips) > 1 else folder, 3 * s.max_pictures, UNPACKED * 1e6 * s.max_upload_mb)
        else:
            place.parent.mkdir(exist_ok=True)
            shutil.copy(file, place)
    index, *others = sorted(folder.rglob("prompt.json")) or [None]
    if others:
        names = ", ".join(str(file.relative_to(folder)) for file in [index, *others])
        raise InputError(f"{names}: more than one prompt.json; read one after the other")
    asked = dict(targets=str(index or folder), target_image_path="", input_image_path=reference or "")
    asked["prompt"] = "" if index else prompt or ""
    rows, count = find_rows(Settings(s | asked), dict.fromkeys(asked, ""), model.control_net)
    if count > s.max_pictures:
        raise InputError(f"{count} pictures, at most {s.max_pictures} are read at once; invert.py reads any number")
    rows = [find_loose(row, folder) for row in rows()]
    for path in (path for row in rows for path in row.pictures):
        if path != reference and not path.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{path}: lies outside of what was uploaded")
    return rows


def find_loose(row, folder):
    """Returns: a Row whose pictures are found in a folder by name where they are not in their places, since of a folder
    that is uploaded the files come without their places. Raises: InputError if several have such a name.
    """
    parts = {}
    for key in ("target", "reference"):
        path = getattr(row, key)
        if path is None or path.exists() or not path.parent.resolve().is_relative_to(folder.resolve()):
            continue
        there = [file for file in folder.rglob("*") if file.name == path.name]
        if len(there) > 1:
            raise InputError(f"{path.name}: {len(there)} files are called so; upload a zip of the folder instead")
        if there:
            parts[key] = there[0]
    return replace(row, **parts)


def list_left(folder, rows):
    """Returns: names of files in a folder that none of its Rows is of, but for hidden ones and prompt.json."""
    used = {path.resolve() for row in rows for path in row.pictures}
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "prompt.json")
    names = (file.relative_to(folder) for file in files if file.resolve() not in used)
    return [str(name) for name in names if not any(part[0] in "._" for part in name.parts)]


def read_many(model, s, files, folder, reference, prompt):
    """Yields: progress, then HTML of all that was read from many pictures, and of its curve."""
    files = [*(files or []), *(folder or [])]
    if not files:
        raise InputError("pictures: none are there; drop some, or a zip of them")
    config, results, how = model.control_net.config, [], Settings(s | {"figures": False})
    with tempfile.TemporaryDirectory(dir=s.uploads) as own:
        folder = Path(own).resolve() / "given"
        folder.mkdir()
        if reference:  # copied, since the page deletes uploads after a while
            reference = Path(shutil.copy(reference, own))
        rows = gather(model, s, files, reference, prompt, folder)
        left = list_left(folder, rows)
        for first in range(0, len(rows), BATCH):
            yield tell_progress(first, len(rows)) + tabulate_results(config, results[-20:])
            batch = rows[first : first + BATCH]
            read_now, _ = read_each(model, how, {}, batch, tell=False)
            for row, result in zip(batch, read_now):
                result["target"] = str(row.target.relative_to(folder))
                if "problem" in result:  # a visitor knows only the name
                    result["problem"] = result["problem"].replace(f"{folder}/", "")
            results += read_now
    series, table = Series(config), io.StringIO()
    write_table(table, results, series)
    csv, png = table.getvalue().encode(), to_png(draw_series(series).savefig)
    offers = offer("results.csv", "text/csv", csv) + offer("series.png", "image/png", png)
    offers += tell_prompts(model, [row.prompt for row in rows])
    offers += tell_flags({"not read:": ", ".join(left[:NAMED]) + ", …" * (len(left) > NAMED)} if left else {})
    yield tell_progress(len(rows), len(rows)) + offers + show(png) + tabulate_results(config, results)


def tell_progress(done, count):
    return f'<p><progress value="{done}" max="{count}"></progress> {done} of {count} read</p>'


def tabulate_results(config, results):
    """Returns: HTML of the table of many results."""
    timed, rows = any("time" in result for result in results), []
    for result in results:
        numbers = [f"{value} {bar}" if value else "" for _, value, bar, _ in tell_numbers(result)]
        said = result.get("problem", ", ".join(result["flags"]))
        rows.append([result["target"], *[result.get("time", "")] * timed, *numbers, said])
    names = [*map(label, tell_names(config), config.control_units)]
    return tabulate(["file", *["time"] * timed, *names, "flags"], rows)
