"""Sort photographs of a meter's dials into some that are labelled, to train on, and the others, to be read.

    python dataForTrain/make_meter.py folder=FOLDER                                 # 60 a dial, into runs/meter
    python dataForTrain/make_meter.py folder=FOLDER labelled=20 out_dir=runs/meter_20

FOLDER/readings.csv has a line for every picture: file, dial, time (ISO 8601), value from 0 to 10 and
value_from_next_dial; the last two may be empty. prompt.json gets the first N labelled pictures of every dial, some of
which training itself sets aside for its error bars; they are copied, so that out_dir can be trained on anywhere.
targets.json gets the others, dial by dial in order of time, and names them where they lie.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.schema import write_yaml
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    folder="",  # of the photographs and readings.csv
    labelled=60,  # pictures of every dial
    order="spread",  # of labelling: "spread" over the circle, each the farthest from those before, or as in "time"
    out_dir="runs/meter",
    overwrite=False,  # True: a dataset in out_dir is replaced
)
if __name__ == "__main__":
    answer(__file__)

import csv
import json
import math
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch

from cldm.dataset import CONTROLS_FILE, TRAINING_FILE, VALIDATION_FILE, is_text
from cldm.hints import wrap
from ldm.files import find_path, fresh_folder, whole_folder
from ldm.pictures import check_pictures
from ldm.schema import expect, one_of

READINGS, PICTURES, TARGETS_FILE = "readings.csv", "pictures", "targets.json"
COLUMNS = "file", "dial", "time", "value", "value_from_next_dial"
PERIOD = 10  # a dial goes from 0 to 10, where it is at 0 again


@dataclass(frozen=True)
class Photograph:
    file: Path
    dial: str
    time: datetime
    value: float | None  # as labelled
    second: float | None  # as the next dial tells

    @property
    def prompt(self):
        return f"dial {self.dial} of a water meter"


def read_readings(folder):
    """Returns: {dial: its Photographs in order of time}, of a folder's readings.csv. Raises: InputError."""
    file = folder / READINGS
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; expected lines of {', '.join(COLUMNS)}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read as UTF-8 text with commas ({error})") from None
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise InputError(f"{file}: no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    dials, lines = {}, {}
    for number, row in rows:
        photograph = read_photograph(f"{file} line {number}", folder, row)
        if (first := lines.setdefault((photograph.file, photograph.dial), number)) != number:
            raise InputError(
                f'{file} line {number}: {row["file"]} of dial "{photograph.dial}" stands in line {first}, too'
            )
        dials.setdefault(photograph.dial, []).append(photograph)
    if len({p.time.tzinfo is None for own in dials.values() for p in own}) != 1:
        found = "some times have an offset from UTC, others none" if dials else "no rows"
        raise InputError(f"{file}: {found}; expected lines of {', '.join(COLUMNS)}, times all alike")
    check_pictures([photograph.file for own in dials.values() for photograph in own])
    return {dial: sorted(dials[dial], key=lambda photograph: photograph.time) for dial in sorted(dials)}


def read_photograph(where, folder, row):
    """row: {column: text}, or None where the line is short. Returns: a Photograph. Raises: InputError."""

    def value(column):
        with suppress(ValueError):
            if not row[column]:
                return None
            if 0 <= (number := float(row[column])) <= PERIOD:
                return number
        raise InputError(f'{where}: "{column}" must be a number from 0 to {PERIOD}, or empty, got "{row[column]}"')

    try:
        time = datetime.fromisoformat(row["time"] or "")
    except ValueError:
        raise InputError(f'{where}: "time" must be like 2019-06-01T16:10:12, got "{row["time"] or ""}"') from None
    return Photograph(
        folder / (row["file"] or ""), row["dial"] or "", time, value("value"), value("value_from_next_dial")
    )


def shortest(differences):
    """Returns: (n,) differences of values, the short way round the circle."""
    return wrap(torch.as_tensor(differences)[:, None], [PERIOD])[:, 0].numpy()


def spread(photographs, count):
    """Choose pictures: the first in time, then each the farthest from those before, on the circle and then in time.

    photographs: in order of time. Returns: a list of `count` Photographs; with a smaller one, it begins alike.
    """
    values = np.array([photograph.value for photograph in photographs])
    start = photographs[0].time
    times = np.array([(photograph.time - start).total_seconds() for photograph in photographs])
    chosen, apart = [0], np.full((2, len(values)), math.inf)  # in time and in value, from the nearest of the chosen
    for _ in range(count - 1):
        distances = np.abs(shortest(values - values[chosen[-1]])).round(6)
        apart = np.minimum(apart, [np.abs(times - times[chosen[-1]]), distances])
        apart[1, chosen] = -1
        chosen.append(int(np.lexsort(apart)[-1]))
    return [photographs[i] for i in chosen]


def describe(photograph, target):
    """Returns: a line of a prompt.json."""
    row = {"source": photograph.value, "target": str(target), "prompt": photograph.prompt}
    row |= {"time": photograph.time.isoformat(), "value_from_next_dial": photograph.second}
    return json.dumps({key: value for key, value in row.items() if value is not None})


def main(s):
    check_numbers(s, int, labelled=(2, 10**6))
    expect('setting "order": expected', s.order, one_of("spread", "time"))
    folder = find_path(s.folder)
    if not is_text(str(folder)):
        raise InputError(f"folder {s.folder}: expected a name in UTF-8, since {TARGETS_FILE} tells it")
    if not s.folder or not folder.is_dir():
        raise InputError(f'setting "folder": expected a folder of photographs and {READINGS}, got "{s.folder}"')
    out_dir, dials = fresh_folder(s.out_dir, s.overwrite, inputs=[folder]), read_readings(folder)
    lines = {TRAINING_FILE: [], TARGETS_FILE: []}
    with whole_folder(out_dir, removes=[VALIDATION_FILE], synced=False) as out:  # that would be of other pictures
        (out / PICTURES).mkdir()
        for dial, own in dials.items():
            known = [photograph for photograph in own if photograph.value is not None]
            if len(known) < s.labelled or len(own) == s.labelled:
                found = f'dial "{dial}" has {len(own)} pictures, {len(known)} with a value'
                raise InputError(f"{folder / READINGS}: {found}; labelled={s.labelled} needs as many, and one to read")
            chosen = set(spread(known, s.labelled) if s.order == "spread" else known[: s.labelled])
            for photograph in own:
                file, target = TARGETS_FILE, photograph.file.absolute()
                if photograph in chosen:
                    file, target = TRAINING_FILE, Path(PICTURES, f"{len(lines[TRAINING_FILE]):05d}_{target.name}")
                    shutil.copyfile(photograph.file, out / target)
                lines[file].append(describe(photograph, target))
        for file, own in lines.items():
            (out / file).write_text("\n".join(own) + "\n")
        write_yaml({"names": ["value"], "units": [f"of {PERIOD}"], "periods": [PERIOD]}, out / CONTROLS_FILE)
    for file, own in lines.items():
        print(f"{len(own)} pictures: {Path(s.out_dir) / file}")


if __name__ == "__main__":
    run_script(main, settings)
