"""Write a trained control as one file in the original ControlNet's layout.

    python tool_export_control.py MODEL_PATH FILE.safetensors

Weights are named as in the original (control_model.input_blocks.…), those of the MLP mlp.fc1 to mlp.fc3; the metadata
has the config, with the training's statistics. What diffusers loads is the folder MODEL_PATH itself.
"""

import sys

from cldm.model import export_control, load_model
from ldm.settings import InputError, run_script


def main(s, paths):
    if len(paths) != 2 or not paths[1].endswith(".safetensors"):
        raise InputError("expected two paths: python tool_export_control.py MODEL_PATH FILE.safetensors")
    export_control(load_model(paths[0]).control_net, paths[1])
    print(f"{paths[1]}: the control of {paths[0]}")


if __name__ == "__main__":
    run_script(lambda s: main(s, sys.argv[1:]), {}, [])
