"""Write a trained control as one file in the original ControlNet's layout.

    python tool_export_control.py MODEL_PATH FILE.safetensors

Only for hint=original, the one hint that the original's code knows. Weights are named as there
(control_model.input_blocks.…), and the MLP's layers mlp.fc1 to mlp.fc3, which take the number unnormalised, or the sine
and cosine of a periodic one; the file's metadata holds the config. diffusers loads the folder MODEL_PATH itself,
whatever its hint.
"""

from ldm.settings import InputError, answer, run_script

settings = dict(
    overwrite=False,  # True: replace FILE if it exists
)
PATHS = ("MODEL_PATH", "FILE.safetensors")
if __name__ == "__main__":
    answer(__file__, *PATHS)

import os
from pathlib import Path

import torch

from cldm.conversion import export_control
from cldm.model import load_model
from ldm.files import find_path, fresh_folder


def main(s, paths):
    file, control = Path(os.path.expanduser(paths[1])), find_path(paths[0])
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: expected a name that ends in .safetensors")
    own = [file.name] if file.resolve().is_relative_to(control.resolve()) else []
    fresh_folder(file.parent, s.overwrite, only=[file.name], never=own)
    model = load_model(paths[0], dtype=torch.float32)
    if model.own_unet:
        what = "its UNet was trained, too (sd_locked=false), for which a control's file has no room"
        raise InputError(f"{paths[0]}: {what}; diffusers loads both folders, as docs/stable_diffusion.md shows")
    export_control(model.control_net, file)
    print(f"{file}: the control of {paths[0]}")


if __name__ == "__main__":
    run_script(main, settings, paths=PATHS)
