"""What invert.py leaves and says: results.jsonl, which a killed run is resumed from, a reading, a summary of many."""

import json

import numpy as np

from cldm.confidence import FLAGS, Z90
from ldm.files import digest, find_path, write_whole
from ldm.settings import InputError


def resume(out_dir, about, rows):
    """Take up results.jsonl where it ends, and write down in settings.yaml what its results depend on.

    about: {what: value}, of settings and digests. rows: a text for every target, which changes with what is read.
    Returns: the lines there already. Raises: InputError if they depend on something else.
    """
    file, settings_file, lines = out_dir / "results.jsonl", out_dir / "settings.yaml", []
    if file.exists():
        try:
            lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            before = json.loads(settings_file.read_text())
            same = before.pop("rows")[: len(lines)] == rows[: len(lines)] and before == about
            same = same and all("flags" in json.loads(line) for line in lines)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            same = False
        if not same:
            what = "results of another model, other targets, pictures or settings"
            raise InputError(f"{file}: {what}; delete it, or choose another out_dir")
        print(f"going on after {len(lines)} of {len(rows)} targets")
    write_whole(settings_file, lambda partial: partial.write_text(json.dumps(about | {"rows": rows}, indent=1)))
    return lines


def digest_model(path, base):
    """Returns: a text that changes with the files of a control's folder, but for checkpoints, and of its base."""
    kinds = (".json", ".yaml", ".safetensors")
    files = [file for file in find_path(path).iterdir() if file.suffix in kinds or file.name == "unet"]
    return digest([*sorted(files), find_path(base)])


def tell_reading(config, reading, result):
    """Print what was read from one target, with its flags. result: as describe_reading has it."""
    for k, (name, unit) in enumerate(zip(config.control_names, config.control_units)):
        error = f" ± {reading.std[0, k]:.3f}" if reading.calibrated else ""
        print(f"{name}: {reading.control[0, k]:+.3f}{error} {unit}".rstrip())
    for flag in result["flags"]:
        of = f" ({', '.join(result['no_effect'])})" if flag == "no_effect" else ""
        print(f"{flag}{of}: {FLAGS[flag]}")
    if not result["flags"]:
        print("no flags")


def summarize(config, lines):
    """Print the errors of results.jsonl's lines where they are known, their flags, model calls and seconds."""
    results = [json.loads(line) for line in lines]
    known = [r for r in results if "error" in r]
    if known:
        errors = np.stack([np.atleast_1d(r["error"]) for r in known])  # (n, d)
        if calibrated := all(r["interval90"] for r in known):
            inside = np.abs(errors) <= Z90 * np.stack([np.atleast_1d(r["std"]) for r in known])
        for i, (name, unit) in enumerate(zip(config.control_names, config.control_units)):
            e = np.abs(errors[:, i])
            numbers = f"error median {np.median(e):.3f}, 95% within {np.quantile(e, 0.95):.3f}, worst {e.max():.3f}"
            share = f"; interval90 holds the truth for {inside[:, i].mean():.0%}" if calibrated else ""
            print(f"{name}: {numbers} {unit}".rstrip() + f"{share} of {len(e)} targets")
    for flag, meaning in FLAGS.items():
        if flagged := sum(flag in r["flags"] for r in results):
            print(f"{flag}: {flagged} of {len(results)} ({meaning})")
    calls, seconds = (np.mean([r[key] for r in results]) for key in ("model_calls", "seconds"))
    iterations = max(r["iterations"] for r in results)
    print(f"at most {iterations} iterations; {calls:.0f} model calls, {seconds:.2f} seconds a target")
