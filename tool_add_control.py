"""Give a base model a fresh numeric ControlNet to start trainings from: encoder copied, zero convolutions, new MLP.

    python tool_add_control.py INPUT OUTPUT [key=value ...]
    python tool_add_control.py models/tiny_sd models/control_tiny_init

INPUT: a base's YAML (models/cldm_v15.yaml), its folder in diffusers' layout or its single file. OUTPUT: a folder, for
tutorial_train.py resume_path=OUTPUT. Until it is trained, the model draws exactly what the base draws. If the file is
one of the original fork, its trained control is taken over as it is, for test5.py model_path=OUTPUT.
"""

from ldm.settings import InputError, answer, check_numbers, check_used, run_script

settings = dict(
    control_dim=1,  # how many numbers
    periods=None,  # of each number, null where it does not go round: [360,null]; None: none does
    hint="dense",  # dense (one resolution), coordinate (any), original (the fork's) or reference (a change from A)
    encoder="",  # a ControlNet in the original layout, whose encoder is copied instead of the UNet's
    control_range=None,  # [low, high] that the original fork trained on, for invert.py to search
    overwrite=False,  # True: replace a control in OUTPUT
    prediction_type=None,  # of a Stable Diffusion 2 file: v_prediction or epsilon; None: as the base's YAML says
)
PATHS = ("INPUT", "OUTPUT")
if __name__ == "__main__":
    answer(__file__, *PATHS)

import math

from cldm.conversion import add_control, import_control
from cldm.model import control_folder, load_base, save_model
from ldm.base import PREDICTION
from ldm.checkpoints import find_control, read_weights
from ldm.files import find_path
from ldm.schema import POSITIVE, Rule, each, expect, number, or_null

RANGE = Rule("[low, high], two numbers", lambda value: each(number(), 2).holds(value) and value[0] < value[1])


def main(s, paths):
    check_numbers(s, int, control_dim=(1, math.inf))
    expect('setting "prediction_type": expected', s.prediction_type, or_null(PREDICTION))
    expect('setting "control_range": expected', s.control_range, or_null(RANGE))
    periods = each(or_null(POSITIVE), s.control_dim)
    expect('setting "periods": expected', s.periods, or_null(periods))
    output = control_folder(paths[1], s.overwrite, inputs=[find_path(path) for path in (paths[0], s.encoder) if path])
    base, config = load_base(paths[0], s.prediction_type, precision="float32")  # the copy is not rounded
    file = find_path(config.base)
    found = find_control(read_weights(file)) if file.is_file() else {}
    if any(name.startswith("mlp.") for name in found):
        check_used(s, settings, "on a control that the file brings", "control_dim", "periods", "hint", "encoder")
        model = import_control(base, config, found, file, s.control_range)
    elif found and not s.encoder:
        raise InputError(f"{file}: holds a ControlNet on pictures; encoder={file} starts from its encoder")
    else:
        check_used(s, settings, "without a trained control in INPUT", "control_range")
        how = {key: s[key] for key in ("control_dim", "periods", "hint", "encoder")}
        model = add_control(base, config, **how)
    save_model(model, output)
    weights = sum(p.numel() for p in model.control_net.parameters())
    hint, numbers = model.control_net.config.hint, model.control_net.control_dim
    print(f"{output}: {weights / 1e6:.1f} M weights, hint={hint} on {numbers} number(s)")


if __name__ == "__main__":
    run_script(main, settings, paths=PATHS)
