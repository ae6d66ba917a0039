"""From prompt.json to checked rows, and from rows to latents and text embeddings, computed once."""

import difflib
import json
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import chain, islice, zip_longest
from pathlib import Path

import torch
from einops import rearrange
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from cldm.hints import circle_middle, wrap
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tell_fit
from ldm.schema import POSITIVE, TEXT, Rule, check, each, or_null, read_config
from ldm.settings import InputError

TRAINING_FILE, VALIDATION_FILE, CONTROLS_FILE = "prompt.json", "validation.json", "controls.yaml"
SMALLEST_SPLIT = 5  # distinct controls below which none is held out
GOLDEN = 0.618034  # fraction of the golden ratio: its multiples modulo 1 are spread evenly
JSON_TEXT = Rule("a text", lambda value: isinstance(value, str) and value.encode(errors="ignore").decode() == value)


def parse_time(text):
    """Returns: the datetime of a text in ISO 8601; None if it is none."""
    with suppress(ValueError):
        return datetime.fromisoformat(text)


TIME = Rule("a time in ISO 8601, such as 2019-06-21T14:05:00", lambda v: isinstance(v, str) and parse_time(v))
ROW = {"source": Rule("a number or a list of numbers", lambda _: True), "time": TIME}
ROW |= dict.fromkeys(("target", "prompt", "reference"), JSON_TEXT)


@dataclass(frozen=True)
class Row:
    control: tuple[float, ...] | None  # d numbers, in the dataset's units
    target: Path  # or a PIL picture, as is the reference
    prompt: str
    reference: Path | None = None  # the picture that the control is a change from
    time: str | None = None  # when the target was taken, ISO 8601
    place: str = ""  # file and line that it stands in

    @property
    def pictures(self):
        return [picture for picture in (self.target, self.reference) if picture is not None]

    def load(self):
        """Returns: its PIL pictures, target and perhaps reference. Raises: InputError that names the row's place."""
        loaded = []
        for key, picture in zip(("target", "reference"), self.pictures):
            try:
                loaded.append(load_picture(picture))
            except InputError as error:
                raise InputError(f'{self.place}: "{key}" {error}' if self.place else str(error)) from None
        return loaded


@dataclass(frozen=True)
class TrainingData:
    """What a control is trained on: rows, or photographs that pairs are cut from."""

    train: list  # of Rows, or of paths of photographs
    validation: list  # likewise; may be empty
    controls: list  # of d numbers each: every row's, or a sample of the changes that are drawn
    names: list | None  # d texts; None where nobody named the numbers
    units: list | None
    periods: list | None = None  # d numbers, None where a number does not go round
    ranges: dict | None = None  # of pairs: {name: (low, high)}

    @property
    def prompts(self):
        return [""] if self.ranges else [row.prompt for row in self.train]

    @property
    def has_references(self):
        return bool(self.ranges) or self.train[0].reference is not None


def parse_control(source):
    """Returns: a tuple of d floats from a number, a numeric text, or a list of either.

    Raises: ValueError if it is none of these, not finite, or a whole number with more digits than a float holds.
    """
    values = source if isinstance(source, (list, tuple)) else [source]
    try:
        control = tuple(math.nan if isinstance(value, bool) else float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        control = ()
    if not control or not all(map(math.isfinite, control)):
        raise ValueError("must be a finite number or a list of them")
    whole = [int(v) for v in values if isinstance(v, int) or isinstance(v, str) and v.strip().lstrip("+-").isdigit()]
    if any(number != float(number) for number in whole):
        raise ValueError("must have no more digits than 64 bits hold (subtract what all rows have in common)")
    return control


def read_rows(file):
    """Returns: a list of all Rows that iterate_rows finds; every row needs a source."""
    return list(iterate_rows(file))


def iterate_rows(file, known=True, like=None, problems=None):
    """Read and check a prompt.json line by line: {"source", "target", "prompt"}, targets relative to its folder.

    All rows or none have a "reference", the picture that the source is a change from, and a "time". Pictures are not
    looked at: Row.load does that.
    known: whether every row needs a source; a row without one has control None. like: a Row of another file, as long.
    problems: a list that takes the InputErrors of lines, which are then left out; None: the first is raised.
    Yields: Rows, all controls of one length. Raises: InputError naming the file and the line.
    """
    file, first = Path(file), None
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = _read_row(line, file.parent, f"{file} line {number}", known)
                        _check_alike(row, like or first or row)
                        _check_times(row, first or row)
                    except InputError as error:
                        if problems is None:
                            raise
                        problems.append(error)
                        continue
                    first = first if first and first.control else row
                    yield row
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected one JSON object a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if not (first or problems):
        raise InputError(f"{file}: no rows; expected one JSON object a line")


def _read_row(line, folder, where, known):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, a number of too many digits, lists within lists
        raise InputError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {line.strip()[:40]}")
    check(where, row, ROW, ["source", "target", "prompt"] if known else ["target", "prompt"], complete=False)
    try:
        control = parse_control(row["source"]) if "source" in row else None
    except ValueError as error:
        raise InputError(f'{where}: "source" {error}, got {json.dumps(row["source"])[:80]}') from None
    reference = folder / row["reference"] if "reference" in row else None
    return Row(control, folder / row["target"], row["prompt"], reference, row.get("time"), where)


def _check_alike(row, first):
    """Raises: InputError if two rows have unlike numbers of numbers, or only one has a reference."""
    where = row.place
    if row.control and len(row.control) != len(first.control):
        found = f'"source" has {len(row.control)} numbers, the first row has {len(first.control)}'
        raise InputError(f"{where}: {found}; every row needs as many")
    if (row.reference is None) != (first.reference is None):
        has = "no" if row.reference is None else "a"
        raise InputError(f'{where}: has {has} "reference", unlike the first row; all rows need one, or none')


def _check_times(row, first):
    """Raises: InputError if only one of two rows has a time, or only one of two times an offset from UTC."""
    if (row.time is None) != (first.time is None):
        has = "no" if row.time is None else "a"
        raise InputError(f'{row.place}: has {has} "time", unlike the first row; all rows need one, or none')
    if row.time and (parse_time(row.time).tzinfo is None) != (parse_time(first.time).tzinfo is None):
        found = f'"time" {row.time}, the first row has {first.time}'
        raise InputError(f"{row.place}: {found}; all need an offset from UTC (+02:00, Z), or none")


def split_rows(data_root):
    """Returns: a dataset's training rows; the rows of its validation.json if there is one, else what is held out.

    Periodic numbers are brought into one turn.
    """
    rows, other = read_rows(Path(data_root) / TRAINING_FILE), Path(data_root) / VALIDATION_FILE
    periods = read_control_names(data_root, len(rows[0].control))[2] or ()
    middle = circle_middle([row.control for row in rows], periods)
    if other.exists():
        validation = list(iterate_rows(other, like=rows[0]))
        return tuple(wrap_rows(own, periods, middle) for own in (rows, validation))
    rows = wrap_rows(rows, periods, middle)
    held_out = hold_out([(row.prompt, row.control) for row in rows], periods)
    return tuple([r for r in rows if ((r.prompt, r.control) in held_out) == out] for out in (False, True))


def wrap_rows(rows, periods, middle):
    """Returns: Rows with their controls as hints.wrap brings them into one turn; tells how many that changed."""
    controls = wrap(torch.tensor([row.control for row in rows], dtype=torch.float64), periods, middle).tolist()
    wrapped = [replace(row, control=tuple(control)) for row, control in zip(rows, controls)]
    if moved := sum(row != own for row, own in zip(rows, wrapped)):
        print(f"{moved} of {len(rows)} rows have periodic numbers beyond one turn, which are taken back into it")
    return wrapped


def hold_out(pairs, periods=()):
    """Choose one in ten of every prompt's distinct controls, spread over the range, never one with an extreme value.

    Prompts with fewer than five controls are left whole; if all are such, they count as one prompt.
    pairs: (prompt, control) of every row. periods: as in hints.wrap; what goes round has no extremes.
    Returns: a set of such pairs.
    """
    groups = {}
    for prompt, control in pairs:
        groups.setdefault(prompt, set()).add(control)
    merged = all(len(controls) < SMALLEST_SPLIT for controls in groups.values())
    groups, chosen = {None: set().union(*groups.values())} if merged else groups, set()
    groups = {prompt: controls for prompt, controls in groups.items() if len(controls) >= SMALLEST_SPLIT}
    for k, (prompt, controls) in enumerate(groups.items()):
        ends = [{min(column), max(column)} for column in zip(*controls)]
        ends = [set() if period else end for end, period in zip_longest(ends, periods)]
        inner = sorted(c for c in controls if not any(value in end for value, end in zip(c, ends)))
        count, phase = min(len(inner), max(1, round(len(controls) / 10))), (0.5 + GOLDEN * k) % 1  # others for each
        chosen |= {(prompt, inner[int((i + phase) * len(inner) / count)]) for i in range(count)}
    return {pair for pair in pairs if (None if merged else pair[0], pair[1]) in chosen}


def read_data(data_root):
    """Returns: the TrainingData in a folder: prompt.json, perhaps validation.json and controls.yaml."""
    train, validation = split_rows(data_root)
    controls = [row.control for row in train]
    return TrainingData(train, validation, controls, *read_control_names(data_root, len(controls[0])))


def read_control_names(data_root, control_dim):
    """Returns: the control_dim names, units and periods in a dataset's controls.yaml; three None without the file."""
    file = Path(data_root) / CONTROLS_FILE
    if not file.exists():
        return None, None, None
    config = read_config(file)
    schema = dict.fromkeys(("names", "units"), each(TEXT, control_dim))
    check(file, config, schema | {"periods": each(or_null(POSITIVE), control_dim)}, schema, complete=False)
    if len(set(config.names)) < control_dim:
        raise InputError(f"{file}: expected {control_dim} different names, got {config.names}")
    return config.names, config.units, config.get("periods") or [None] * control_dim


@lru_cache  # prints every message once
def recognize_prompt(prompt, known):
    """Find the training prompt that a prompt is meant to be, since to the model every character counts.

    known: a tuple of training prompts. Capitals, spaces, and quotation marks and dots around a prompt do not count.
    Returns: the training prompt; else, after a line that names the nearest ones, `prompt` itself.
    """

    def plain(text):
        return " ".join(text.casefold().split()).strip(" .,\"'`´“”„‘’«»")

    if not known or prompt in known:
        return prompt
    for own in known:
        if plain(own) == plain(prompt):
            print(f'prompt: taken as "{own}", as in training')
            return own
    near = difflib.get_close_matches(prompt, known, 3, cutoff=0) or known[:3]
    print(f'prompt "{prompt}": not one of the {len(known)} that this control was trained with, such as {near}')
    return prompt


class ControlDataset(Dataset):
    """Latents, text embeddings and controls of rows, computed once by a LatentDiffusion.

    An item is a dict of latents (C, h, w), embeddings (77, D), empty (77, D; the empty prompt's), control (d,), and
    reference (C, h, w) if the rows have one. Pictures of another size than image_size are resized.
    """

    @torch.no_grad()
    def __init__(self, rows, base, image_size, batch_size=16):
        self.rows = rows
        self.controls = torch.tensor([row.control for row in rows], dtype=torch.float64)
        prompts = sorted({row.prompt for row in rows})
        self.prompt_index = [prompts.index(row.prompt) for row in rows]
        self.embeddings = torch.cat([base.embed([prompt]) for prompt in prompts]).float().cpu()
        self.empty = base.embed([""])[0].float().cpu()
        count, latents, sizes = sum(len(row.pictures) for row in rows), [], set()
        pictures = chain.from_iterable(row.load() for row in rows)
        for _ in tqdm(range(0, count, batch_size), desc="encoding", delay=2, leave=False):
            loaded = list(islice(pictures, batch_size))
            sizes |= {picture.size for picture in loaded}
            fitted = pictures_to_tensor([fit_picture(picture, image_size) for picture in loaded])
            latents.append(base.encode(fitted.to(base.device)).float().cpu())
        self.latents = rearrange(torch.cat(latents), "(n k) c h w -> n k c h w", n=len(rows))  # k: target, reference
        tell_fit([[size] for size in sizes], image_size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        words = dict(embeddings=self.embeddings[self.prompt_index[i]], empty=self.empty)
        return dict(zip(("latents", "reference"), self.latents[i])) | words | dict(control=self.controls[i])


class TrainingOrder(Sampler):
    """The order in which training takes rows: all of them, shuffled, again and again.

    The n-th depends on the seed and n alone, so that a killed run goes on, and several processes share the rows.
    rows: their number; None: endless, row n is the n-th. length: rows that each process takes in the whole run.
    first: rows that it has taken already.
    """

    def __init__(self, rows, length, seed, first=0, rank=0, processes=1):
        self.rows, self.length, self.seed = rows, length, seed
        self.places = range(first * processes + rank, length * processes, processes)

    def __len__(self):
        return self.length  # Lightning counts those before `first` too

    def __iter__(self):
        @lru_cache(1)
        def shuffled(turn):
            return torch.randperm(self.rows, generator=torch.Generator().manual_seed(hash((self.seed, turn)) % 2**63))

        for n in self.places:
            yield n if self.rows is None else shuffled(n // self.rows)[n % self.rows].item()
