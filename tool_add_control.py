"""Give a base model a fresh numeric ControlNet, to start trainings from: encoder copied, zero convolutions, new MLP.

    python tool_add_control.py INPUT OUTPUT [key=value ...]
    python tool_add_control.py models/tiny_sd models/control_tiny_init

INPUT: a base's YAML (models/cldm_v15.yaml), its folder in diffusers' layout or its single file. OUTPUT: a folder, for
tutorial_train.py resume_path=OUTPUT. With the result the model draws exactly what the base draws; but the control in a
file of the original fork is taken over as it was trained, for test5.py model_path=OUTPUT.
"""

import math
import sys

from cldm.model import add_control, import_control, load_base, save_model
from ldm.checkpoints import HINT, controlnet_weights, read_weights
from ldm.files import find_path
from ldm.settings import InputError, check_numbers, run_script

settings = dict(
    control_dim=1,  # how many numbers
    hint="dense",  # dense (as the original: one resolution) or coordinate (any)
    encoder="",  # a ControlNet in the original layout, whose encoder is copied in place of the UNet's
    control_range=None,  # [low, high] that the original fork trained on, for invert.py to search
)


def main(s, paths):
    if len(paths) != 2:
        raise InputError("expected two paths: python tool_add_control.py INPUT OUTPUT")
    check_numbers(s, control_dim=(1, math.inf))
    base, config = load_base(paths[0])
    file = find_path(config.base)
    found = controlnet_weights(read_weights(file), base.unet.config) if file.is_file() else {}
    if f"{HINT}mlp.0.weight" in found:
        model = import_control(base, config, found, file, s.control_range)
    else:
        model = add_control(base, config, control_dim=s.control_dim, hint=s.hint, encoder=s.encoder)
    save_model(model, paths[1])
    weights = sum(p.numel() for p in model.control_net.parameters())
    hint, numbers = model.control_net.config.hint, model.control_net.control_dim
    print(f"{paths[1]}: {weights / 1e6:.1f} M weights, hint={hint} on {numbers} number(s)")


if __name__ == "__main__":
    paths = [argument for argument in sys.argv[1:] if "=" not in argument]
    overrides = [argument for argument in sys.argv[1:] if "=" in argument]
    run_script(lambda s: main(s, paths), settings, overrides)
