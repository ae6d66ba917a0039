"""Read the control from a picture, or from many, in about a second each: no start, with error bars and flags.

    python invert.py input_image_path=before.png target_image_path=after.png known=zoom=1 out_dir=OUT
    python invert.py model_path=runs/my_control target_image_path=x.png prompt="a photo of a leather bag" out_dir=OUT
    python invert.py model_path=runs/my_control targets=my_data/prompt.json out_dir=OUT
    python invert.py model_path=runs/my_control targets="photos/*.jpg" prompt="a photo of a leather bag" out_dir=OUT

Leaves OUT/result.json and OUT/figure.png for one picture. For many: a line each in OUT/results.jsonl, where a "problem"
says why a picture could not be read; OUT/results.csv; OUT/series.png, the numbers over rows or, if every row of a
prompt.json has a "time" (ISO 8601), over time. A run over many that was killed goes on when it is started again with
the same out_dir. A "source" in a prompt.json is only compared with what is read. devices=4 shares many between four
processes, on as many GPUs where there are any; several machines, num_nodes: docs/processes.md.
"""

from ldm.settings import InputError, answer, check_numbers, check_used, run_script

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
    devices=1,  # processes on this machine that share many targets; they leave what one would
    num_nodes=1,  # machines, on each of which the same command is started
    strategy="auto",  # of several processes: as tutorial_train.py has it
)
if __name__ == "__main__":
    answer(__file__)

import json
import math
from functools import partial
from itertools import islice

from tqdm import tqdm

from cldm.model import load_model
from cldm.readers import load, read, read_each
from cldm.report import describe_reading
from cldm.results import digest_model, resume, save_series, tell_reading
from cldm.rows import find_rows, parse_known
from ldm.files import append_whole, report_folder, write_whole
from ldm.pictures import tell_fit
from ldm.schema import FLAG, expect, or_null


def save_figure(figure, file):
    write_whole(file, partial(figure.savefig, format="png", dpi=100))


def read_one(model, s, known, row, out_dir):
    """Read one target; leaves result.json, then figure.png."""
    config, figure = model.control_net.config, s.figures is not False
    loaded = load(row, model.config.image_size)
    tell_fit([loaded[1]], model.config.image_size)
    reading, draw = read(model, s, known, [row], [loaded], figure)
    result = describe_reading(config, reading, 0, row, s.seed)
    (out_dir / "figure.png").unlink(missing_ok=True)  # an earlier reading's
    write_whole(out_dir / "result.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    tell_reading(config, reading, result)
    if figure:
        save_figure(draw(0), out_dir / "figure.png")
    print(f"{result['seconds']:.1f} seconds; see {out_dir}/{'figure.png' if figure else 'result.json'}")


def read_many(model, s, known, rows, count, out_dir, first=True):
    """Read `count` targets, batch after batch, each kept in results.jsonl before the next begins.

    rows: an iterator over their Rows. first: whether this is the only process, or the first, which keeps the results.
    Raises: InputError if the very first cannot be read: then more may be wrong.
    """
    config, start = model.control_net.config, 0
    if first:
        about = dict(known=known, a_prompt=s.a_prompt, draws=s.draws, figures=bool(s.figures), seed=s.seed)
        about["sha256"] = digest_model(s.model_path, model.config.base)
        start = resume(out_dir, config, about, rows, count)

    def read_batch(batch, before):
        results, draws = read_each(model, s, known, batch, tell=before == start)
        if before == 0 and "problem" in results[0]:
            raise InputError(results[0]["problem"])
        for i, draw in draws.items() if s.figures else ():
            save_figure(draw(), out_dir / f"{before + i + 1:05d}_{batch[i].target.stem}.png")
        return "".join(json.dumps(result) + "\n" for result in results)

    def keep(lines, number):
        append_whole(out_dir / "results.jsonl", lines)
        bar.update(number)

    with tqdm(desc="reading", total=count, initial=start, delay=0.1, leave=False, disable=not first) as bar:
        if is_shared(s):
            from cldm.processes import read_together

            read_together(s, model, rows, count, start, read_batch, keep)
        else:
            for before in range(start, count, s.batch_size):
                batch = list(islice(rows, s.batch_size))
                keep(read_batch(batch, before), len(batch))
    if first:
        save_series(out_dir, config, count)


def is_shared(s):
    """Returns: whether several processes read; only they need Lightning, whose import takes seconds."""
    return s.devices * s.num_nodes > 1


def main(s):
    check_numbers(s, int, draws=(4, 1000), batch_size=(1, math.inf), seed=(0, 2**63 - 1))
    check_numbers(s, int, devices=(1, math.inf), num_nodes=(1, math.inf))
    expect('setting "figures": expected', s.figures, or_null(FLAG))
    if s.draws % 2:
        raise InputError(f'setting "draws": expected an even number, since noise comes in pairs, got {s.draws}')
    if not (s.targets and is_shared(s)):
        why = "with one process" if s.targets else "without targets"
        check_used(s, settings, why, *(["strategy"] if s.targets else ["devices", "num_nodes", "strategy"]))
    figures = ["[0-9]*_*.png"] if s.figures else []
    many = ("settings.yaml", "sha256", "results.jsonl", "results.csv", "series.png", *figures)
    names, first, device = many if s.targets else ("result.json", "interval90", "figure.png"), True, s.device
    if is_shared(s):
        from cldm.processes import hold_together

        out_dir, first = hold_together(s.out_dir, lambda path: report_folder(path, *names))
        device = "cpu"  # from where Lightning moves it to the process's own
    else:
        out_dir = report_folder(s.out_dir, *names)
    model = load_model(s.model_path, device=device, save_memory=s.save_memory)
    known = parse_known(s.known, model.control_net.config.control_names)
    rows, count = find_rows(s, settings, model.control_net)
    if s.targets:
        read_many(model, s, known, islice(rows(), count), count, out_dir, first)
    else:
        read_one(model, s, known, next(rows()), out_dir)


if __name__ == "__main__":
    run_script(main, settings, resume="a run over targets goes on when it is started again with the same out_dir")
