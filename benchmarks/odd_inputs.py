"""Odd inputs to invert.py: is any of them read wrong without a flag?

    python benchmarks/odd_inputs.py                      # all, an hour and a half on one core
    python benchmarks/odd_inputs.py quick=true           # two of every sort
    python benchmarks/odd_inputs.py sorts=flat,stripes   # some

More than 500 inputs are drawn, with a fixed seed, from the photographs that no training has seen, from formulas, and
from the photographs that the shipped controls know. Each is read as invert.py reads it and must end in one of three
ways. Right: every number lies within three standard errors of the truth, or in its interval, and the interval covers at
least half the range where the picture cannot show the number. Flagged. Or refused, in one line. Anything else is wrong.
Prints a table of sorts, and what was wrong; leaves out_dir/cases.json and the pictures. Exit code 1 if anything was
wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    sorts="all",
    quick=False,  # True: two inputs of every sort
    seed=5,
    out_dir="outputs/odd_inputs",
)
if __name__ == "__main__":
    answer(__file__)

import contextlib
import io
import json
import random
import shutil

import numpy as np
from tqdm import tqdm

from benchmarks.common import choose, read_targets, save_json, start_report
from benchmarks.odd_cases import sorts, write_case
from ldm.files import ROOT

ERRORS = 3.0  # standard errors
NAMING = "no_effect", "guess"  # flags that name the numbers that they are said of
ENDS = ("right", "flagged", "refused", "wrong")


def read_cases(cases, folder):
    """Returns: for every case a dict: how it "ended", and its "reading", the "line" that refused it or the "wrong"."""
    folder.mkdir(parents=True)
    rows = [write_case(case, folder, number) for number, case in enumerate(cases)]
    models, ended = {case.model for case in cases}, {}
    for model in models:
        own = {number: row for number, row in enumerate(rows) if cases[number].model == model}
        ended |= read_rows_of(model, own, folder, model)
    return [end if "ended" in (end := ended[number]) else judge(case, end) for number, case in enumerate(cases)]


def read_rows_of(model, rows, folder, name):
    """Read rows {number: row} in one run of invert.py, or each in a run of its own if that one fails.

    Returns: {number: its dict in results.jsonl, or how it ended}.
    """
    file, output = folder / f"{name}.json", io.StringIO()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            results = read_targets(ROOT / "models" / model, file, folder / f"{name}_out")
        ended = [dict(ended="refused", line=own["problem"]) if "problem" in own else own for own in results]
        return dict(zip(rows, ended, strict=True))
    except InputError as error:
        ended = dict(ended="refused", line=str(error))
    except Exception as error:
        ended = dict(ended="wrong", wrong=f"{type(error).__name__}: {error}")
    if len(rows) == 1:
        return dict.fromkeys(rows, ended)
    alone = [read_rows_of(model, {number: row}, folder, f"{model}_{number:03d}") for number, row in rows.items()]
    return {number: result for own in alone for number, result in own.items()}


def judge(case, result):
    """Returns: how a reading ended, as read_cases has it."""
    flags, faults = result["flags"], []
    if set(flags) - {*NAMING}:  # those excuse only the numbers that they name
        return dict(ended="flagged", flags=flags, reading=result)
    if case.truth is None:
        faults = [] if flags else ["no control explains it"]
    else:
        config = json.loads((ROOT / "models" / case.model / "config.json").read_text())
        halves = np.subtract(config["control_high"], config["control_low"]) / 2
        numbers = zip(
            *(np.atleast_1d(result[key]) for key in ("names", "control", "std")), result["interval90"], halves
        )
        for name, found, std, (low, high), half in numbers:
            true = case.truth.get(name, found)
            hidden = name in case.unseen
            off = high - low < half if hidden else abs(found - true) > ERRORS * std and not low <= true <= high
            if off and not any(name in result.get(flag, ()) for flag in NAMING):
                what = "which cannot be seen" if hidden else f"for {true:.3f}"
                faults.append(f"{name} {found:.3f} ± {std:.3f} {what}")
    ended = "wrong" if faults else "flagged" if flags else "right"
    return dict(ended=ended, wrong="; ".join(faults), flags=flags, reading=result)


def tabulate(report):
    """Print a table of sorts and a line for everything that was wrong. Returns: whether anything was."""
    print(f"| | inputs | {' | '.join(ENDS)} | flags |\n| --- | --- | --- | --- | --- | --- | --- |")
    everything = [case for own in report.values() for case in own]
    for sort, own in [*report.items(), ("all", everything)]:
        counts = [sum(case["ended"] == end for case in own) for end in ENDS]
        flags = [flag for case in own for flag in case.get("flags", [])]
        named = ", ".join(f"{flag} {flags.count(flag)}" for flag in sorted(set(flags)))
        print(f"| {sort.replace('_', ' ')} | {len(own)} | {' | '.join(map(str, counts))} | {named} |")
    faults = [(s, c["name"], c["wrong"]) for s, own in report.items() for c in own if c["ended"] == "wrong"]
    print("\n".join(["", *map(", ".join, faults)]))
    return bool(faults)


def main(s):
    check_numbers(s, int, seed=(0, 2**32 - 1))
    out_dir = start_report(s.out_dir, "cases.json", "ended", "pictures", "formulas")
    for old in ("pictures", "formulas"):
        shutil.rmtree(out_dir / old, ignore_errors=True)
    (out_dir / "formulas").mkdir()
    every, cases = sorts(out_dir / "formulas"), {}
    for sort in choose(s.sorts, every, "sorts"):
        own = list(every[sort](random.Random(f"{s.seed} {sort}")))
        cases[sort] = own[:: max(1, len(own) // 2)][:2] if s.quick else own
    report = {sort: [dict(name=case.name, ended="not read") for case in own] for sort, own in cases.items()}
    with tqdm(total=sum(map(len, cases.values()))) as bar:
        for sort, own in cases.items():
            bar.set_description(sort)
            outcomes = read_cases(own, out_dir / "pictures" / sort)
            report[sort] = [dict(name=case.name) | outcome for case, outcome in zip(own, outcomes)]
            save_json(out_dir / "cases.json", report)
            bar.update(len(own))
    if tabulate(report):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, settings)
