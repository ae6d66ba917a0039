"""Give a base model a fresh numeric ControlNet, to start trainings from: encoder copied, zero convolutions, new MLP.

    python tool_add_control.py INPUT OUTPUT [key=value ...]
    python tool_add_control.py models/tiny_sd models/control_tiny_init

INPUT: a base's YAML, or its folder in diffusers' layout. OUTPUT: a folder, for tutorial_train.py resume_path=OUTPUT.
With the result the model draws exactly what the base draws.
"""

import math
import sys

from cldm.model import add_control, load_base, save_model
from ldm.settings import InputError, check_numbers, run_script

settings = dict(
    control_dim=1,  # how many numbers
    hint="dense",  # dense (as the original: one resolution) or coordinate (any)
)


def main(s, paths):
    if len(paths) != 2:
        raise InputError("expected two paths: python tool_add_control.py INPUT OUTPUT")
    check_numbers(s, control_dim=(1, math.inf))
    model = add_control(*load_base(paths[0]), **s)
    save_model(model, paths[1])
    weights = sum(p.numel() for p in model.control_net.parameters())
    print(f"{paths[1]}: {weights / 1e6:.1f} M weights, hint={s.hint} on {s.control_dim} number(s)")


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    run_script(lambda s: main(s, paths), settings, overrides)
