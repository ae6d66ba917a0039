"""From prompt.json to checked rows, and from rows to latents and text embeddings, computed once."""

import difflib
import hashlib
import json
import math
import os
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from cldm.hints import circle_middle, wrap
from cldm.latents import CachedLatents, identify
from ldm.files import digest
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tell_fit
from ldm.schema import FLAG, POSITIVE, TEXT, Rule, check, each, or_null, read_config
from ldm.settings import InputError

TRAINING_FILE, VALIDATION_FILE, CONTROLS_FILE = "prompt.json", "validation.json", "controls.yaml"
FEW_SUBJECTS = 10  # of pairs, below which numbers are held out in place of one subject in ten
MOST_HELD_OUT = 0.3  # of the rows, beyond which, too
COLUMNS = {"file", "flags", "time"}  # of a table of readings, beside the numbers
SMALLEST_SPLIT = 5  # distinct controls below which none is held out
GOLDEN = 0.618034  # fraction of the golden ratio: its multiples modulo 1 are spread evenly
FEW = 512  # pictures that are encoded at every start, in full precision, and kept in memory
EMBEDDED = 512  # prompts whose embeddings are kept in memory
HASHED = 10_000  # rows whose pictures are told apart by content; beyond, by size and time of last change
FITTED = 64  # pictures whose sizes are told where not all are looked at


def make_object(pairs):
    """Returns: the dict of a JSON object's (key, value) pairs. Raises: ValueError if one comes twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("it has a key twice")
    return result


DECODE = json.JSONDecoder(object_pairs_hook=make_object).decode  # as json.loads, which asks more of each text first


def is_text(value):
    """Returns: whether a value is a text that UTF-8 can write."""
    return isinstance(value, str) and (value.isascii() or value.encode(errors="ignore").decode() == value)


JSON_TEXT = Rule("a text", is_text)


def parse_time(text):
    """Returns: the datetime of a text in ISO 8601; None if it is none."""
    with suppress(ValueError):
        return datetime.fromisoformat(text)


TIME = Rule("a time in ISO 8601, such as 2019-06-21T14:05:00", lambda v: isinstance(v, str) and parse_time(v))
ROW = {"source": Rule("a number or a list of numbers", lambda _: True), "time": TIME}
PICTURES = {"target", "reference"}
ROW |= dict.fromkeys(PICTURES | {"prompt"}, JSON_TEXT)


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

    @property
    def shown(self):
        """What a model sees of it: two rows that show the same should have the same numbers."""
        return self.target, self.reference, self.prompt

    def load(self):
        """Returns: its PIL pictures, target and perhaps reference. Raises: InputError that names the row's place."""
        loaded = []
        for key, picture in zip(("target", "reference"), self.pictures):
            try:
                loaded.append(load_picture(picture))
            except InputError as error:
                raise InputError(f'{self.place}: "{key}" {error}' if self.place else str(error)) from None
        return loaded


class Line(NamedTuple):
    """A Row as it stands in its file: pictures are texts, relative to the file's folder."""

    control: tuple[float, ...] | None
    target: str
    prompt: str
    number: int
    reference: str | None = None
    time: str | None = None


class Texts:
    """Many texts in one block of memory; each takes its bytes and eight more."""

    def __init__(self):
        self.block, self.ends = bytearray(), array("q", [0])

    def append(self, text):
        self.block += text.encode()
        self.ends.append(len(self.block))

    def __getitem__(self, i):
        return self.block[self.ends[i] : self.ends[i + 1]].decode()


@dataclass(frozen=True, eq=False)
class Rows(Sequence):
    """The Rows of a file in arrays, of which a million fit 100 MB. rows[i] is a Row; a slice or a mask gives Rows."""

    file: Path
    controls: np.ndarray  # (N, d) float64
    texts: list  # the different prompts, in the order in which they come first
    prompt_index: np.ndarray  # (N,), of each row's prompt among them
    places: np.ndarray  # (N,), of each row among all of the file, whose columns follow
    columns: dict  # {"target", and if rows have them "reference" and "time": Texts}
    numbers: array  # of lines in the file

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        if not isinstance(i, (int, np.integer)):
            parts = {name: getattr(self, name)[i] for name in ("controls", "prompt_index", "places")}
            return replace(self, **parts)
        place = self.places[i]
        own = {name: texts[place] for name, texts in self.columns.items()}
        own |= dict(prompt=self.texts[self.prompt_index[i]], number=self.numbers[place])
        return make_row(self.file, Line(tuple(self.controls[i].tolist()), **own))

    @property
    def prompts(self):
        return [self.texts[i] for i in self.prompt_index]

    def digest(self):
        """Returns: a sha256, as text, of controls and prompts."""
        total = hashlib.sha256(self.controls.tobytes() + self.prompt_index.tobytes())
        for text in self.texts:
            total.update(f"{len(text)} {text}".encode())
        return total.hexdigest()

    def digest_pictures(self):
        """Returns: a sha256, as text, that changes with the pictures. Raises: InputError for one that is not there."""
        if len(self) <= HASHED:
            for row in self:
                identify(row)
            return digest([file for row in self for file in row.pictures])
        total, folder = hashlib.sha256(), os.open(self.file.parent, os.O_RDONLY)
        try:
            for name, texts in self.columns.items():
                for i, place in enumerate(self.places) if name != "time" else ():
                    text = texts[place]
                    try:
                        seen = os.stat(text, dir_fd=folder)
                    except (OSError, ValueError):
                        self[i].load()  # says what is wrong
                        raise
                    total.update(f"{text}\n{seen.st_size} {seen.st_mtime_ns}\n".encode())
        finally:
            os.close(folder)
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingData:
    """What a control is trained on: rows, or photographs that pairs are cut from."""

    train: Rows | list  # or paths of photographs
    validation: Rows | list  # likewise; may be empty
    controls: np.ndarray  # (N, d): every row's, or a sample of the changes that are drawn
    names: list | None  # d texts; None where nobody named the numbers
    units: list | None
    periods: list | None = None  # d numbers, None where a number does not go round
    absolute: list | None = None  # d bools, of pairs: whether a number is of the target alone, no change
    ranges: dict | None = None  # of pairs: {name: (low, high)}

    @property
    def prompts(self):
        return [""] if self.ranges else self.train.prompts

    def periods_beside(self, own):
        """own: d periods of a control. Returns: the data's; where it names its numbers alone, the control's."""
        return self.periods or (list(own) if self.names else [None] * len(own))  # a circle takes any number

    @property
    def has_references(self):
        return bool(self.ranges) or self.train[0].reference is not None


def parse_control(source):
    """Returns: a tuple of d floats from a number, a numeric text, or a list of either.

    Raises: ValueError if it is none of these, not finite, or a whole number with more digits than a float holds.
    """
    if type(source) is float and math.isfinite(source):  # so are most of a million
        return (source,)
    values = source if isinstance(source, (list, tuple)) else [source]
    try:
        control = tuple(map(float, values))
    except (TypeError, ValueError, OverflowError):
        control = ()
    odd = any(isinstance(value, bool) or isinstance(value, str) and "_" in value for value in values)  # True, "1_0"
    if odd or not control or not all(map(math.isfinite, control)):
        raise ValueError("must be a finite number or a list of them")
    whole = [int(v) for v in values if isinstance(v, int) or isinstance(v, str) and v.strip().lstrip("+-").isdigit()]
    if any(number != float(number) for number in whole):
        raise ValueError("must have no more digits than 64 bits hold (subtract what all rows have in common)")
    return control


def read_rows(file, like=None):
    """Returns: the Rows that iterate_rows finds; every row needs a source."""
    controls, index, numbers, prompts, columns = array("d"), array("i"), array("i"), {}, {}
    for line in _scan(file, like=like):
        if not columns:  # what the first line has, all have
            columns = {name: Texts() for name in ("target", "reference", "time") if getattr(line, name) is not None}
        controls.extend(line.control)
        index.append(prompts.setdefault(line.prompt, len(prompts)))
        numbers.append(line.number)
        for name, texts in columns.items():
            texts.append(getattr(line, name))
    controls, places = np.frombuffer(controls).reshape(len(index), -1), np.arange(len(index), dtype=np.int32)
    return Rows(Path(file), controls, [*prompts], np.frombuffer(index, np.int32), places, columns, numbers)


def iterate_rows(file, known=True, like=None, problems=None):
    """Read and check a prompt.json line by line: {"source", "target", "prompt"}, targets relative to its folder.

    All rows or none have a "reference", the picture that the source is a change from, and a "time". Pictures are not
    looked at: Row.load does that.
    known: whether every row needs a source; a row without one has control None. like: a Row of another file, as long.
    problems: a list that takes the InputErrors of lines, which are then left out; None: the first is raised.
    Yields: Rows, all controls of one length. Raises: InputError naming the file and the line.
    """
    return (make_row(Path(file), line) for line in _scan(file, known, like, problems))


def make_row(file, line):
    """Returns: the Row of a Line of a file."""
    reference = None if line.reference is None else file.parent / line.reference
    where = f"{file} line {line.number}"
    return Row(line.control, file.parent / line.target, line.prompt, reference, line.time, where)


def _scan(file, known=True, like=None, problems=None):
    """As iterate_rows. Yields: Lines."""
    file, first = Path(file), None
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, text in enumerate(lines, 1):
                if text.strip():
                    if text.lstrip()[0] == "[" and not first:
                        raise InputError(f"{file}: a JSON list; expected one JSON object a line, without [ and commas")
                    try:
                        line = _read_line(text, file, number, known)
                        _check_alike(file, line, like or first or line)
                        _check_times(file, line, first or line)
                    except InputError as error:
                        if problems is None:
                            raise
                        problems.append(error)
                        continue
                    first = first if first and first.control else line
                    yield line
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{file}: no such file; expected one JSON object a line"
        if file.parent.is_file():
            problem = f"{file.parent}: a file, expected the folder that it lies in"
        raise InputError(problem) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    if not (first or problems):
        raise InputError(f"{file}: no rows; expected one JSON object a line")


def _read_line(text, file, number, known):
    where = f"{file} line {number}"
    try:
        row = DECODE(text)
    except (ValueError, RecursionError) as error:  # no JSON, a number of too many digits, lists within lists
        raise InputError(f"{where}: not JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {text.strip()[:40]}")
    check(where, row, ROW, ["source", "target", "prompt"] if known else ["target", "prompt"], complete=False)
    try:
        control = parse_control(row["source"]) if "source" in row else None
    except ValueError as error:
        raise InputError(f'{where}: "source" {error}, got {json.dumps(row["source"])[:80]}') from None
    return Line(control, row["target"], row["prompt"], number, row.get("reference"), row.get("time"))


def _check_alike(file, line, first):
    """Raises: InputError if two Lines have unlike numbers of numbers, or only one has a reference."""
    if line.control and first.control and len(line.control) != len(first.control):
        found = f'"source" has {len(line.control)} numbers, the first row has {len(first.control)}'
        raise InputError(f"{file} line {line.number}: {found}; every row needs as many")
    if (line.reference is None) != (first.reference is None):
        has = "no" if line.reference is None else "a"
        where = f"{file} line {line.number}"
        raise InputError(f'{where}: has {has} "reference", unlike the first row; all rows need one, or none')


def _check_times(file, line, first):
    """Raises: InputError if only one of two Lines has a time, or only one of two times an offset from UTC."""
    if line.time is None and first.time is None:
        return
    where = f"{file} line {line.number}"
    if (line.time is None) != (first.time is None):
        has = "no" if line.time is None else "a"
        raise InputError(f'{where}: has {has} "time", unlike the first row; all rows need one, or none')
    if (parse_time(line.time).tzinfo is None) != (parse_time(first.time).tzinfo is None):
        found = f'"time" {line.time}, the first row has {first.time}'
        raise InputError(f"{where}: {found}; all need an offset from UTC (+02:00, Z), or none")


def split_rows(data_root):
    """Returns: a dataset's training Rows; those of its validation.json if there is one, else what is held out.

    That is one subject in ten of pairs of FEW_SUBJECTS or more, and it says so: error bars are then those of subjects
    never seen. Else it is one number in ten, with all rows of the pictures that show it, and of a pair its reverse.
    Periodic numbers are brought into one turn.
    """
    rows, other = read_rows(Path(data_root) / TRAINING_FILE), Path(data_root) / VALIDATION_FILE
    periods = read_control_names(data_root, rows.controls.shape[1])[2] or ()
    middle = circle_middle(rows.controls, periods)
    if other.exists():
        validation = read_rows(other, like=rows[0])
        if shared := count_shared(validation, rows):
            print(f"warning: {other}: {shared} of {len(validation)} rows are training's, too; their errors are smaller")
        return tuple(wrap_rows(own, periods, middle) for own in (rows, validation))
    rows = wrap_rows(rows, periods, middle)
    subjects = find_subjects(rows)
    held_out = subjects % 10 == 10 * (0.5 + GOLDEN * (subjects // 10)) % 10 // 1  # others of every ten
    if subjects.max() + 1 < FEW_SUBJECTS or held_out.mean() > MOST_HELD_OUT:
        order = np.lexsort(rows.controls.T[::-1])[::-1]  # of a pair there and back, the larger stands for both
        _, first, which = np.unique(name_pictures(rows)[order], return_index=True, return_inverse=True)
        first = order[first]
        held_out[order] = hold_out(rows.controls[first], rows.prompt_index[first], periods)[which]
    else:
        kept = len(np.unique(subjects[held_out]))
        print(f"pairs show {subjects.max() + 1} subjects, of which {kept} are kept for validation as a whole")
    return rows[~held_out], rows[held_out]


def list_names(rows, key):
    """Yields: of Rows, each one's path in a column, the same for all ways to write it."""
    folder, texts = f"{rows.file.parent.absolute()}{os.sep}", rows.columns[key]
    for place in rows.places:
        text = texts[place]
        yield os.path.normpath(text if os.path.isabs(text) else folder + text)


def count_shared(rows, others):
    """Returns: how many of Rows show what some of other Rows show."""
    targets = {*list_names(rows, "target")}
    found = {others[i].shown for i, name in enumerate(list_names(others, "target")) if name in targets}
    return sum(row.shown in found for row in rows) if found else 0  # of a million, none need be made


def find_subjects(rows):
    """Number what Rows with references show, in the order of the file: those that share a picture show the same, and so
    do those that others join, of which each shares one with the next. Of up to HASHED rows, copies of a reference are
    one picture.

    Returns: (N,); all 0 without references, where prompts tell subjects apart.
    """
    if "reference" not in rows.columns:
        return np.zeros(len(rows), int)

    contents = {}  # of references
    for name in set(list_names(rows, "reference")) if len(rows) <= HASHED else ():
        with suppress(OSError, ValueError), open(name, "rb") as file:  # else, it is told later
            contents[name] = hashlib.file_digest(file, "sha256").digest()
    names = [
        np.fromiter((hash(contents.get(name, name)) for name in list_names(rows, key)), np.int64, len(rows))
        for key in ("target", "reference")
    ]
    pictures, ends = np.unique(names, return_inverse=True)
    ends = ends.reshape(2, -1)
    graph = coo_array((np.ones(len(rows)), ends), shape=2 * pictures.shape)
    own = connected_components(graph, directed=False)[1][ends[0]]
    _, first, which = np.unique(own, return_index=True, return_inverse=True)
    return first.argsort().argsort()[which]


def name_pictures(rows):
    """Returns: (N,) a number for the pictures of each of Rows, the same for a pair and its reverse."""
    shown = map(frozenset, zip(*(list_names(rows, key) for key in PICTURES & {*rows.columns})))
    return np.fromiter(map(hash, shown), np.int64, len(rows))


def wrap_rows(rows, periods, middle):
    """Returns: Rows with their controls as hints.wrap brings them into one turn; tells how many that changed."""
    controls = wrap(torch.from_numpy(rows.controls), periods, middle).numpy()
    if moved := (controls != rows.controls).any(1).sum():
        what = f"{moved} of {len(rows)} rows have periodic numbers beyond one turn, which are taken back into it"
        print(f"{what}; if they should not be, periods in {CONTROLS_FILE} are not in the unit of source")
    return replace(rows, controls=controls)


def hold_out(controls, prompts, periods=()):
    """Choose one in ten of every prompt's distinct controls, spread over the range, never one with an extreme value.

    Prompts with fewer than five controls are left whole; if all are such, they count as one prompt.
    controls: (N, d). prompts: (N,), the number of each row's. periods: as in hints.wrap; what goes round has no
    extremes. Returns: (N,) bool, the rows that are held out.
    """
    order = np.lexsort([*controls.T[::-1], prompts])
    keys = np.column_stack([prompts, controls])[order]
    new = np.append(True, (keys[1:] != keys[:-1]).any(1))  # the first of equal rows
    keys, which = keys[new], np.empty(len(order), np.int64)
    which[order] = new.cumsum() - 1  # of each row, its key
    starts = np.append(True, keys[1:, 0] != keys[:-1, 0]).nonzero()[0]
    ends = np.append(starts[1:], len(keys))
    if prompts.any() and (ends - starts).max() < SMALLEST_SPLIT:
        return hold_out(controls, np.zeros_like(prompts), periods)
    chosen, circles = np.zeros(len(keys), bool), [bool(p) for _, p in zip_longest(controls.T, periods)]
    large = ends - starts >= SMALLEST_SPLIT
    for k, (start, end) in enumerate(zip(starts[large], ends[large])):
        own = keys[start:end, 1:]
        extreme = ((own == own.min(0)) | (own == own.max(0))) & ~np.array(circles)
        inner = start + (~extreme.any(1)).nonzero()[0]
        count, phase = min(len(inner), max(1, round(len(own) / 10))), (0.5 + GOLDEN * k) % 1  # others for each
        chosen[[inner[int((i + phase) * len(inner) / count)] for i in range(count)]] = True
    return chosen[which]


def read_data(data_root):
    """Returns: the TrainingData in a folder: prompt.json, perhaps validation.json and controls.yaml."""
    train, validation = split_rows(data_root)
    data = TrainingData(train, validation, train.controls, *read_control_names(data_root, train.controls.shape[1]))
    if any(data.absolute or ()) and not data.has_references:
        where = Path(data_root) / CONTROLS_FILE
        raise InputError(f'{where}: "absolute" is said of pairs, but no row has a "reference"; leave it out')
    return data


def read_control_names(data_root, control_dim):
    """Returns: control_dim names, units and periods of a dataset, and which are absolute; None where nobody says."""
    file = Path(data_root) / CONTROLS_FILE
    if not file.exists():
        if (other := file.with_suffix(".yml")).exists():
            raise InputError(f"{other}: would not be read; call it {file.name}")
        return None, None, None, None
    config = read_config(file)
    schema = dict.fromkeys(("names", "units"), each(TEXT, control_dim))
    own = {"periods": each(or_null(POSITIVE), control_dim), "absolute": each(FLAG, control_dim)}
    check(file, config, schema | own, schema)
    if len(set(config.names)) < control_dim or COLUMNS & {*config.names}:
        others = f", other than {', '.join(sorted(COLUMNS))} (columns of results.csv)" * bool(COLUMNS & {*config.names})
        raise InputError(f"{file}: expected {control_dim} different names{others}, got {config.names}")
    return config.names, config.units, config.get("periods") or [None] * control_dim, config.get("absolute")


@lru_cache  # prints every message once
def recognize_prompt(prompt, known):
    """As find_prompt, whose line is printed. Returns: the prompt to use."""
    own, line = find_prompt(prompt, known)
    if line:
        print(line)
    return own


def find_prompt(prompt, known):
    """Find the training prompt that a prompt is meant to be, since to the model every character counts.

    known: a tuple of training prompts. Capitals, spaces, and quotation marks and dots around a prompt do not count.
    Returns: the training prompt, or `prompt` itself; a line that says which, or names the nearest ones, "" where it is
    one of them.
    """

    def plain(text):
        return " ".join(text.casefold().split()).strip(" .,\"'`´“”„‘’«»")

    if not known or prompt in known:
        return prompt, ""
    for own in known:
        if plain(own) == plain(prompt):
            return own, f'prompt: taken as "{own}", as in training'
    near = difflib.get_close_matches(prompt, known, 3, cutoff=0) or known[:3]
    return prompt, f'prompt "{prompt}": not one of the {len(known)} that this control was trained with, such as {near}'


class ControlDataset(Dataset):
    """Latents, text embeddings and controls of rows, computed once by a LatentDiffusion.

    An item is a dict of latents (C, h, w), embeddings (77, D), empty (77, D; the empty prompt's), control (d,), the
    row's index, and reference (C, h, w) if rows have one. Pictures of another size than image_size are resized.
    rows: Rows, or a list of Rows. cache: a folder; latents of more than FEW pictures are then encoded when they are
    asked for, and kept there. "": all are encoded now.
    """

    def __init__(self, rows, base, image_size, cache="", batch_size=16):
        self.rows = rows
        if isinstance(rows, Rows):
            self.controls = torch.from_numpy(rows.controls)
            self.texts, self.prompt_index = rows.texts, rows.prompt_index
        else:
            self.controls = torch.tensor([row.control for row in rows], dtype=torch.float64)
            self.texts = list(dict.fromkeys(row.prompt for row in rows))
            self.prompt_index = np.array([self.texts.index(row.prompt) for row in rows])

        @lru_cache(EMBEDDED)
        @torch.no_grad()
        def embed(prompt):
            return base.embed([prompt])[0].float().cpu()

        self.base, self.embed, self.empty = base, embed, embed("")
        for text in self.texts if len(self.texts) < EMBEDDED else ():
            embed(text)
        if cache and are_many(rows):
            self.latents = CachedLatents(rows, base, image_size, cache)
            some = [rows[i] for i in np.linspace(0, len(rows) - 1, FITTED).astype(int)]
            sizes = {picture.size for row in some for picture in row.load()}
        else:
            self.latents, sizes = encode_rows(rows, base, image_size, batch_size)
        tell_fit([[size] for size in sizes], image_size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, which):
        """Returns: a list of items; what a DataLoader asks for."""
        with torch.autocast(self.base.device.type, enabled=False):  # whoever asks
            words = [self.embed(self.texts[self.prompt_index[i]]) for i in which]
        return [
            dict(
                zip(("latents", "reference"), latents),
                embeddings=own,
                empty=self.empty,
                control=self.controls[i],
                row=torch.tensor(i),
            )
            for i, latents, own in zip(which, self.latents[which], words)
        ]


def are_many(rows):
    """Returns: whether rows have more pictures than are encoded at every start."""
    return len(rows) * len(rows[0].pictures) > FEW


@torch.no_grad()
def encode_rows(rows, base, image_size, batch_size):
    """Returns: (N, 1, C, h, w) latents, or (N, 2, C, h, w) with references; the pictures' different sizes."""
    count, latents, sizes = sum(len(row.pictures) for row in rows), [], set()
    pictures = chain.from_iterable(row.load() for row in rows)
    for _ in tqdm(range(0, count, batch_size), desc="encoding", delay=2, leave=False):
        loaded = list(islice(pictures, batch_size))
        sizes |= {picture.size for picture in loaded}
        fitted = pictures_to_tensor([fit_picture(picture, image_size) for picture in loaded])
        latents.append(base.encode(fitted.to(base.device)).float().cpu())
    return rearrange(torch.cat(latents), "(n k) c h w -> n k c h w", n=len(rows)), sizes  # k: target, reference


class Ahead(DataLoader):
    """A DataLoader that makes the next batch in a thread, while the last one is trained on."""

    def __iter__(self):
        batches = super().__iter__()
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = thread.submit(next, batches, None)
                yield batch


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
