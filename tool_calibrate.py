"""Calibrate a control again: how far its readings can be trusted. Error bars, flags and probes change, not its weights.

    python tool_calibrate.py MODEL_PATH data_root=my_data
    python tool_calibrate.py models/control_tiny_pair pairs=train
    python tool_calibrate.py models/control_things data_root=runs/things pictures=400

It is done on the validation pictures, those that a training with the same settings would set aside; of pairs these
are now other ones than those of older trainings, which therefore need a validation.json.
"""

from ldm.settings import InputError, answer, check_numbers, run_script

settings = dict(
    data_root="dataForTrain",
    pairs="",  # for a control of changes, in place of data_root: a folder of pictures, or "train"
    controls=None,  # of pairs, as in tutorial_train.py
    pictures=36,  # that are read, of 1000 at most, with pairs of 144; more tell better how wide intervals must be
    seed=0,
    device="auto",  # a GPU where there is one
)
if __name__ == "__main__":
    answer(__file__, "MODEL_PATH")

import torch

from cldm.calibration import calibrate
from cldm.conversion import MOST_PROMPTS
from cldm.logger import describe_bars
from cldm.model import load_model
from cldm.pairs import training_set, validation_set
from cldm.reading import search_bounds
from ldm.files import find_path, output_folder
from tutorial_train import read


def main(s, paths):
    check_numbers(s, int, pictures=(1, 10**6), seed=(0, 2**32 - 1))
    model, data = load_model(paths[0], device=s.device), read(s)
    folder = output_folder(find_path(paths[0]))
    config, (low, high) = model.control_net.config, search_bounds(model.control_net.config)
    rows = not data.ranges and data.validation
    controls = torch.tensor(rows.controls if rows else data.controls, dtype=torch.float64)
    same = dict(names=config.control_names, units=config.control_units, absolute=config.absolute or len(low) * [False])
    fits = all(getattr(data, key) in (None, list(own)) for key, own in same.items())
    fits = fits and data.periods_beside(config.periods) == list(config.periods)
    fits = fits and bool(s.pairs) <= model.control_net.uses_reference and controls.shape[1:] == low.shape
    if not fits or not ((low <= (own := model.control_net.wrap(controls))) & (own <= high)).all():
        numbers = (f"{name} {unit}".rstrip() for name, unit in zip(config.control_names, config.control_units))
        raise InputError(
            f"{s.pairs or s.data_root}: not what {folder} reads, {', '.join(numbers)} from {list(config.control_low)} "
            f"to {list(config.control_high)}; of pairs, controls= says names and ranges"
        )
    known, given = set(config.prompts or ()), {*data.prompts, *(rows.prompts if rows else ())}
    if 0 < len(known) < MOST_PROMPTS and not known & given:
        raise InputError(f"{s.data_root}: none of its prompts is one of {folder}, such as {[*config.prompts][:3]}")
    chosen = model.base, model.config.image_size, s.seed
    dataset = validation_set(data, *chosen) or training_set(data, *chosen)
    calibrate(model, folder, dataset, s.pictures)
    print(describe_bars(config, dataset, not data.validation, s.pictures))


if __name__ == "__main__":
    run_script(main, settings, paths=("MODEL_PATH",))
