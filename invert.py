"""Read the control from a picture, or from many, in about a second each: no start, with error bars and doubts.

    python invert.py input_image_path=before.png target_image_path=after.png known=zoom=1 out_dir=OUT
    python invert.py model_path=runs/my_control target_image_path=x.png prompt="a photo of a leather bag" out_dir=OUT
    python invert.py model_path=runs/my_control targets=my_data/prompt.json out_dir=OUT

Leaves OUT/result.json and OUT/figure.png of one picture; OUT/results.jsonl, a line each, of many. A run over many that
was killed goes on when started again with the same out_dir.
"""

from ldm.settings import (
    InputError,
    answer,
    check_kinds,
    check_numbers,
    check_used,
    fill_settings,
    nearest,
    run_script,
)

settings = dict(
    model_path="models/control_tiny_pair",  # the out_dir of a training
    input_image_path="dataForTrain/demo/resultData/00000_reference.png",  # picture A, where the control is a change
    target_image_path="dataForTrain/demo/resultData/00000_target.png",  # picture B, or the only one
    prompt="",  # as in training; pairs need none
    known="",  # what need not be found: "zoom=1,exposure=0"
    targets="",  # a prompt.json of many targets, in place of those above; a row's "source" is only compared with
    out_dir="outputs/invert",
    objective="denoising",  # denoising: the likelihood bound; sampling: generate and compare, as test5.py
    solver="lm",  # lm: Levenberg-Marquardt; sgd; adam
    control=None,  # where to start; None: found by probing the trained range
    draws=8,  # of noise, in pairs, for the denoising objective
    batch_size=12,  # targets read together
    figures=None,  # per target: true, false; None: for a single one
    both_ways=None,  # read the change from target to reference too, as a check; None: for a single pair by denoising
    seed=0,
    save_memory=False,  # True: fewer pictures at once
    device="auto",  # a GPU where there is one
    # of the sampling objective, as in test5.py
    a_prompt=None,
    n_prompt=None,
    ddim_steps=10,
    num_samples=None,
    strength=1.0,
    scale=None,
    eta=None,
    guess_mode=False,
)
if __name__ == "__main__":
    answer(__file__)

import hashlib
import json
import math
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from cldm.dataset import Row, parse_control, read_rows
from cldm.memory import Estimate
from cldm.model import load_model
from cldm.objectives import SamplingObjective
from cldm.pairs import known_back
from cldm.reading import SOLVERS, read_controls
from cldm.report import describe_reading, draw_reading
from ldm.files import find_path, report_folder, write_whole
from ldm.pictures import check_picture, fit_picture, load_picture, pictures_to_tensor, tell_fit


def read_batch(model, s, rows):
    """Returns: the Reading of some rows; that of their ways back, or None; pictures (PIL) of targets, and of references
    or None; embeddings (B, 77, D).
    """

    def encode(files):
        pictures = [fit_picture(load_picture(file), model.config.image_size) for file in files]
        return pictures, model.base.encode(pictures_to_tensor(pictures).to(model.base.device))

    with torch.no_grad():
        pictures, latents = encode([row.target for row in rows])
        paired = rows[0].reference is not None
        references, reference = encode([row.reference for row in rows]) if paired else ([None] * len(rows), None)
        prompts = [", ".join(filter(None, [row.prompt, s.a_prompt])) for row in rows]
        embeddings = model.base.embed(prompts)
        negative = model.base.embed([s.n_prompt]).expand_as(embeddings)
    sampling = start = None
    if s.objective == "sampling":
        how = dict(strength=s.strength, scale=s.scale, eta=s.eta, guess_mode=s.guess_mode, seed=s.seed, recompute=True)
        sampling = SamplingObjective(
            model,
            latents if reference is None else reference,
            latents,
            embeddings,
            negative=negative,
            draws=s.num_samples,
            ddim_steps=s.ddim_steps,
            **how,
        )
    if s.control is not None:
        start = torch.tensor([[s.control]]).repeat(len(rows), 1, 1).to(latents)
    how = dict(solver=s.solver, draws=s.draws, seed=s.seed)
    reading = read_controls(model, latents, embeddings, reference, known=s.known, sampling=sampling, start=start, **how)
    known = known_back(s.known, model.control_net.config.control_names) if s.both_ways else {}
    read_back = s.both_ways and len(known) < model.control_net.control_dim
    back = read_controls(model, reference, embeddings, latents, known=known, **how) if read_back else None
    return reading, back, pictures, references, embeddings


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


def check(s, model, rows):
    """Fill in what the model's YAML says. Raises: InputError for a setting that cannot be."""
    if s.objective == "denoising":
        sampling = ("n_prompt", "ddim_steps", "num_samples", "strength", "scale", "eta", "guess_mode")
        check_used(s, settings, "with objective=denoising", *sampling)
    elif (model.config.sampling.scale if s.scale is None else s.scale) == 1:
        check_used(s, settings, "with scale=1, which is no guidance", "n_prompt")
    fill_settings(s, model.config, model.config.sampling)
    check_kinds(s, str, "a_prompt", "n_prompt")
    check_kinds(s, bool, "figures", "both_ways")
    for key, known in dict(objective=("denoising", "sampling"), solver=SOLVERS).items():
        if s[key] not in known:
            raise InputError(f'setting "{key}": expected one of {", ".join(known)}, got "{s[key]}"')
    check_numbers(s, int, draws=(4, 1000), batch_size=(1, math.inf), ddim_steps=(1, 1000), num_samples=(1, math.inf))
    check_numbers(s, int, seed=(0, 2**63 - 1))
    check_numbers(s, scale=(0, math.inf), strength=(0, math.inf), eta=(0, 1))
    if s.draws % 2:
        raise InputError(f'setting "draws": expected an even number, since noise comes in pairs, got {s.draws}')
    config = model.control_net.config
    s.known = parse_known(s.known, config.control_names)
    if model.control_net.uses_reference and s.known.get("zoom", 1) <= 0:
        raise InputError(f'setting "known": zoom is a ratio, above 0, got {s.known["zoom"]:g}')
    able = model.control_net.uses_reference and s.objective == "denoising"
    if s.both_ways and not able:
        raise InputError('setting "both_ways": needs a model that takes a reference, and objective=denoising')
    if s.both_ways is None:
        s.both_ways = able and not s.targets
    if model.control_net.uses_reference and rows[0].reference is None:
        raise InputError(f"model_path {s.model_path} reads changes between two pictures: give input_image_path too")
    if rows[0].reference is not None and not model.control_net.uses_reference:
        raise InputError(
            f"model_path {s.model_path} takes no reference: leave out input_image_path, {rows[0].reference}"
        )
    if config.control_low is None:
        raise InputError(f"model_path {s.model_path}: never trained, so its range is not known; run tutorial_train.py")
    try:
        s.control = None if s.control is None else list(parse_control(s.control))
    except ValueError:
        raise InputError(f"control: expected finite numbers, got {s.control}") from None
    for what, control in {"control": s.control, **{f"{s.targets}, {r.target}": r.control for r in rows}}.items():
        if control is not None and len(control) != model.control_net.control_dim:
            names = ", ".join(config.control_names)
            raise InputError(f"{what}: the model takes {len(config.control_names)} number(s) ({names}), got {control}")


def tell_memory(s, model, targets):
    """Print what reading some targets at once will need, and what would help if there is less."""
    estimate = Estimate(model)
    reverse = s.objective == "sampling" and s.solver != "lm"

    def need(targets, save_memory):
        read = estimate.reading(targets, s.draws, save_memory)
        return max(read, estimate.sampling(1, 1, s.scale != 1, True)) if reverse else read

    remedies = {
        "save_memory=true": lambda: need(targets, True),
        "save_memory=true batch_size=1": lambda: need(1, True),
    }
    estimate.announce(need(targets, s.save_memory), remedies)


def resume(out_dir, s, rows):
    """Returns: the lines of out_dir/results.jsonl that a killed run with the same settings left."""
    own = {key: s[key] for key in s if key not in ("out_dir", "batch_size", "figures", "save_memory", "device")}
    of = [*sorted(find_path(s.model_path).glob("*.*")), find_path(s.targets)]
    own["sha256"] = hashlib.sha256(b"".join(file.read_bytes() for file in of)).hexdigest()
    own = json.dumps(own, indent=1)
    file, settings_file = out_dir / "results.jsonl", out_dir / "settings.yaml"
    if not file.exists():
        write_whole(settings_file, lambda file: file.write_text(own))
        return []
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        done = [(result["target"], result["prompt"]) for result in map(json.loads, lines)]
        same = settings_file.read_text() == own and done == [(str(r.target), r.prompt) for r in rows[: len(lines)]]
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(
            f"{file}: results of another model, other targets or settings; delete it, or choose another out_dir"
        )
    print(f"going on after {len(lines)} of {len(rows)} targets")
    return lines


def summarize(config, lines):
    """Print errors where they are known, flags, calls and seconds of results.jsonl's lines."""
    results = [json.loads(line) for line in lines]
    known = [r for r in results if "error" in r]
    if known:
        errors, found = (np.stack([np.atleast_1d(r[key]) for r in known]) for key in ("error", "control"))  # (n, d)
        low, high = np.moveaxis([r["interval90"] for r in known], 2, 0)
        inside = (low <= found - errors) & (found - errors <= high)
        for i, (name, unit) in enumerate(zip(config.control_names, config.control_units)):
            e = np.abs(errors[:, i])
            numbers = f"error median {np.median(e):.3f}, 95% within {np.quantile(e, 0.95):.3f}, worst {e.max():.3f}"
            share = f"{inside[:, i].mean():.0%} of {len(e)} targets"
            print(f"{name}: {numbers} {unit}".rstrip() + f"; interval90 holds the truth for {share}")
    for flag in ("outside_range", "ambiguous", "unexplained", "unlike_shapes"):
        flagged = sum(flag in r["flags"] for r in results)
        print(f"{flag}: {flagged} of {len(results)}")
    calls, seconds = (np.mean([r[key] for r in results]) for key in ("model_calls", "seconds"))
    iterations = max(r["iterations"] for r in results)
    print(f"at most {iterations} iterations; {calls:.0f} model calls, {seconds:.2f} seconds a target")


def main(s):
    many = ("settings.yaml", "sha256", "results.jsonl", *(["?????_*.png"] if s.figures else []))
    out_dir = report_folder(s.out_dir, *(many if s.targets else ("result.json", "interval90", "figure.png")))
    model = load_model(s.model_path, device=s.device, save_memory=s.save_memory)
    if s.targets:
        rows = read_rows(find_path(s.targets), known=False)
    else:
        if s.target_image_path != settings["target_image_path"] and s.input_image_path == settings["input_image_path"]:
            s.input_image_path = ""  # the demo's reference belongs to the demo's target
        reference = find_path(s.input_image_path) if s.input_image_path else None
        rows = [Row(None, find_path(s.target_image_path), s.prompt, reference)]
    check(s, model, rows)
    sizes = [[check_picture(file) for file in (row.reference, row.target) if file] for row in rows]
    unlike = tell_fit(sizes, model.config.image_size)
    tell_memory(s, model, min(s.batch_size, len(rows)))
    lines, config = resume(out_dir, s, rows) if s.targets else [], model.control_net.config
    with tqdm(total=len(rows), initial=len(lines), desc="reading", leave=False) as bar:
        while len(lines) < len(rows):
            some = rows[len(lines) : len(lines) + s.batch_size]
            reading, back, pictures, references, embeddings = read_batch(model, s, some)
            for i, row in enumerate(some):
                reading.flags[i] += ["unlike_shapes"] * unlike[len(lines)]
                lines.append(json.dumps(describe_reading(config, reading, back, i, row, s.seed)) + "\n")
                if s.figures or (s.figures is None and not s.targets):
                    name = f"{len(lines):05d}_{row.target.stem}.png" if s.targets else "figure.png"
                    shown = (pictures[i], references[i], embeddings[i : i + 1])
                    figure = draw_reading(model, reading, i, row, *shown, s.seed)
                    write_whole(out_dir / name, partial(figure.savefig, format="png", dpi=100))
            if s.targets:
                write_whole(out_dir / "results.jsonl", lambda file: file.write_text("".join(lines)))
            bar.update(len(some))
    if s.targets:
        summarize(config, lines)
        return
    result = json.loads(lines[0])
    write_whole(out_dir / "result.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))
    for k, (name, unit) in enumerate(zip(config.control_names, config.control_units)):
        trip = f"; there and back {result['round_trip'][name]:+.3f}" if name in result.get("round_trip", {}) else ""
        print(f"{name}: {reading.control[0, k]:+.3f} ± {reading.std[0, k]:.3f} {unit}".rstrip() + trip)
    shown = "result.json has it" if s.figures is False else "figure.png shows it"
    print(f"{', '.join(result['flags']) or 'no doubts'}; {result['seconds']:.1f} seconds; {out_dir}/{shown}")


if __name__ == "__main__":
    run_script(main, settings, resume="a run over targets goes on when it is started again with the same out_dir")
