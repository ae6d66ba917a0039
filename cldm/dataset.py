"""prompt.json -> checked rows -> latents and text embeddings, computed once."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from cldm.controlnet import default_names
from ldm.pictures import describe_fit, fit_picture, load_picture, pictures_to_tensor
from ldm.settings import InputError, read_yaml

TRAINING_FILE, VALIDATION_FILE, CONTROLS_FILE = "prompt.json", "validation.json", "controls.yaml"


@dataclass(frozen=True)
class Row:
    control: tuple[float, ...] | None  # d numbers, in the dataset's units
    target: Path  # or a PIL picture, here and below
    prompt: str
    reference: Path | None = None  # the picture that the control is a change from


def parse_control(source):
    """Read a control: a number, a numeric text, or a list of either.

    Returns: tuple of d floats. Raises: ValueError if it is none of these, or not finite.
    """
    values = source if isinstance(source, (list, tuple)) else [source]
    if not values or any(isinstance(v, bool) or not isinstance(v, (int, float, str)) for v in values):
        raise ValueError
    try:
        control = tuple(float(v) for v in values)
    except OverflowError:
        raise ValueError from None
    if not all(map(math.isfinite, control)):
        raise ValueError
    return control


def read_rows(file, known=True):
    """Read and check a prompt.json: JSON lines of {"source", "target", "prompt"}; targets relative to its folder.

    All rows, or none, may have a "reference", a picture that the source is a change from.
    known: whether every row needs a source; without one, its control is None.
    Returns: list of Row, all controls of one length.
    Raises: InputError naming the file, the line, what was expected and what was found.
    """
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected one JSON object a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = _read_row(line, file.parent, f"{file} line {number}", known)
            first = next((r.control for r in rows if r.control), row.control)
            if row.control and len(row.control) != len(first):
                raise InputError(
                    f'{file} line {number}: "source" has {len(row.control)} numbers, the first row has '
                    f"{len(first)}; every row needs the same"
                )
            if rows and (row.reference is None) != (rows[0].reference is None):
                has = "no" if row.reference is None else "a"
                raise InputError(f'{file} line {number}: has {has} "reference", unlike the first row; all or none')
            rows.append(row)
    if not rows:
        raise InputError(f"{file}: no rows; expected one JSON object a line")
    return rows


def _read_row(line, folder, where, known):
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or a number of too many digits
        raise InputError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {line.strip()[:40]}")
    for key in ("source", "target", "prompt"):
        if key not in row and (known or key != "source"):
            raise InputError(f'{where}: no "{key}"; expected the keys source, target and prompt')
    for key in ("target", "prompt", "reference"):
        if not isinstance(row.get(key, ""), str):
            raise InputError(f'{where}: "{key}" must be a text, got {json.dumps(row[key])}')
    try:
        control = parse_control(row["source"]) if "source" in row else None
    except ValueError:
        got = json.dumps(row["source"])
        raise InputError(f'{where}: "source" must be a finite number or a list of them, got {got}') from None
    files = {key: folder / row[key] for key in ("target", "reference") if key in row}
    for key, file in files.items():
        try:
            with Image.open(file) as picture:
                picture.verify()
        except FileNotFoundError:
            raise InputError(f'{where}: "{key}" {file} does not exist') from None
        except Exception:  # Pillow raises many kinds
            raise InputError(f'{where}: "{key}" {file} is not a picture') from None
    return Row(control, prompt=row["prompt"], **files)


def split_rows(data_root):
    """Read a dataset's training rows, and rows at controls that training does not see.

    Those are validation.json where the folder has one. Otherwise one in ten of the distinct controls is taken out,
    never the lowest or the highest; with fewer than five distinct controls there is no validation.
    Returns: (training rows, validation rows).
    """
    rows = read_rows(Path(data_root) / TRAINING_FILE)
    if (Path(data_root) / VALIDATION_FILE).exists():
        validation = read_rows(Path(data_root) / VALIDATION_FILE)
        if len(validation[0].control) != len(rows[0].control):
            raise InputError(
                f'{Path(data_root) / VALIDATION_FILE}: "source" has {len(validation[0].control)} numbers, '
                f"{TRAINING_FILE} has {len(rows[0].control)}"
            )
        if (validation[0].reference is None) != (rows[0].reference is None):
            raise InputError(f'{Path(data_root)}: "reference" must be in all rows of both files, or in none')
        return rows, validation
    distinct = sorted({row.control for row in rows})
    held_out = set(distinct[5:-1:10] or distinct[2:3]) if len(distinct) >= 5 else set()
    return [r for r in rows if r.control not in held_out], [r for r in rows if r.control in held_out]


def read_control_names(data_root, control_dim):
    """Read what a dataset calls its controls: controls.yaml, {names: [angle], units: [degrees]}, where there is one.

    Returns: (names, units), control_dim texts each.
    Raises: InputError if the file has another number of them.
    """
    file = Path(data_root) / CONTROLS_FILE
    if not file.exists():
        return default_names(control_dim), [""] * control_dim
    config = read_yaml(file)
    names, units = ([str(text) for text in config.get(key, [])] for key in ("names", "units"))
    if not len(names) == len(units) == control_dim:
        raise InputError(f"{file}: expected {control_dim} names and units, got {names} and {units}")
    return names, units


def _name(picture):
    return picture if isinstance(picture, Path) else id(picture)


class ControlDataset(Dataset):
    """Latents, text embeddings and controls of rows, all computed once by a LatentDiffusion.

    An item is a dict of latents (C, h, w), embeddings (77, D), empty (77, D; of the empty prompt), control (d,), and
    reference (C, h, w) where the rows have one.
    Pictures of another size than image_size are resized. label: of the progress bar, None for none.
    """

    @torch.no_grad()
    def __init__(self, rows, base, image_size, batch_size=16, label="encoding"):
        self.rows = rows
        self.controls = torch.tensor([row.control for row in rows])
        prompts = sorted({row.prompt for row in rows})
        self.prompt_index = [prompts.index(row.prompt) for row in rows]
        self.embeddings = torch.cat([base.embed([prompt]) for prompt in prompts]).float().cpu()
        self.empty = base.embed([""])[0].float().cpu()
        pictures = {_name(p): p for row in rows for p in (row.target, row.reference) if p is not None}
        self.where = {name: i for i, name in enumerate(pictures)}
        pictures = list(pictures.values())
        latents, sizes = [], set()
        for start in tqdm(range(0, len(pictures), batch_size), desc=label, disable=label is None):
            fitted = []
            for picture in pictures[start : start + batch_size]:
                picture = load_picture(picture)
                sizes.add(picture.size)
                fitted.append(fit_picture(picture, image_size))
            latents.append(base.encode(pictures_to_tensor(fitted).to(base.device)).float().cpu())
        self.latents = torch.cat(latents)
        if line := describe_fit(sizes, image_size):
            print(line)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        item = dict(
            latents=self.latents[self.where[_name(row.target)]],
            embeddings=self.embeddings[self.prompt_index[i]],
            empty=self.empty,
            control=self.controls[i],
        )
        if row.reference is not None:
            item["reference"] = self.latents[self.where[_name(row.reference)]]
        return item
