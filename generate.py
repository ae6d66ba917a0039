"""Draw pictures at numbers: what the model has learned that they do.

    python generate.py control=3           # one picture
    python generate.py control=[-5,0,5]    # three; of several numbers: control=[[5,1.1],[-5,0.9]]
    python generate.py control=-5..5       # `count` of them, evenly spaced

All are drawn from the same noise, so that only the number differs. A control that is the change from a picture A takes
it as input_image_path. Leaves a picture for every control and all of them in strip.png in out_dir.
"""

from ldm.settings import InputError, answer, check_numbers, check_used, run_script

settings = dict(
    model_path="models/control_tiny",  # the out_dir of a training
    control="-5..5",  # a number, a list, or a range from..to; each as many numbers as the model has
    count=7,  # pictures of a range
    prompt="a photo of an astronaut in an orange suit",
    input_image_path="",  # picture A, for a control that is the change from it
    a_prompt=None,  # added to the prompt; None: as the base's YAML says
    n_prompt=None,  # what guidance leads away from; None: as the base's YAML says
    ddim_steps=32,
    strength=1.0,  # factor on what the ControlNet adds
    scale=1.0,  # of classifier-free guidance; 1: none
    eta=1.0,  # 0: deterministic DDIM; 1: fresh noise at every step
    seed=0,
    device="auto",  # a GPU where there is one
    out_dir="outputs/generate",
)
if __name__ == "__main__":
    answer(__file__)

import json
import math

import torch
from tqdm import tqdm

from cldm.confidence import is_outside
from cldm.dataset import parse_control
from cldm.model import Sampling, load_model
from cldm.report import describe_control, draw_pictures, draw_strip
from ldm.files import find_path, report_folder, whole_folder
from ldm.pictures import load_picture


def parse_controls(text, count, names):
    """Read a number, a list or a range of controls. Returns: (B, d) float64. Raises: InputError."""
    try:
        if "..." in text:
            raise ValueError
        ends = [json.loads(part) if part.lstrip()[:1] == "[" else float(part) for part in text.split("..")]
        if len(ends) == 1:
            (value,) = ends
            several = isinstance(value, list) and (len(names) == 1 or isinstance(value[0], list))
            rows = [parse_control(one) for one in (value if several else [value])]
        else:
            low, high = (torch.tensor(parse_control(end)).double() for end in ends)
            rows = torch.lerp(low, high, torch.linspace(0, 1, count)[:, None].double()).tolist()
        if {*map(len, rows)} != {len(names)}:
            raise ValueError
    except (ValueError, IndexError, RuntimeError):
        expected = f"{len(names)} number(s) each ({', '.join(names)}), like 3, [-5,0,5] or -5..5"
        raise InputError(f'setting "control": expected {expected}, got {text}') from None
    return torch.tensor(rows, dtype=torch.float64)


def main(s):
    check_numbers(s, int, count=(2, 1000), ddim_steps=(1, 1000), seed=(0, 2**63 - 1))
    check_numbers(s, eta=(0, 1), scale=(0, math.inf), strength=(0, math.inf))
    out_dir = report_folder(s.out_dir, "controls.json", "files", "control_*.png", "strip.png")
    model = load_model(s.model_path, device=s.device)
    config = model.control_net.config
    controls = model.control_net.wrap(parse_controls(s.control, s.count, config.control_names)).to(model.base.device)
    if not model.control_net.uses_reference:
        check_used(s, settings, "with a control that is no change of a picture", "input_image_path")
    if ".." not in s.control:
        check_used(s, settings, "without a range", "count")
    if s.scale == 1:
        check_used(s, settings, "with scale=1, which is no guidance", "n_prompt")
    reference = load_picture(find_path(s.input_image_path)) if s.input_image_path else None
    prompt = model.choose_prompt(s.prompt, settings["prompt"])
    target = model.encode([prompt], None, reference and [reference], s.a_prompt, s.n_prompt)
    sampling = Sampling(s.ddim_steps, s.scale, s.strength, s.eta)
    if config.control_low and (outside := is_outside(config, controls, torch.full_like(controls, math.inf)).sum()):
        print(f"outside_range: {outside} of {len(controls)} control(s) lie beyond the trained range")
    files = [f"control_{i:03d}.png" for i in range(1, len(controls) + 1)]
    report, pictures, file = {"files": files, "controls": controls.tolist()}, {}, out_dir / "controls.json"
    before = json.loads(file.read_text())["files"] if file.exists() else []
    with whole_folder(out_dir, removes=before) as out:
        for name, control in zip(files, tqdm(controls, desc="drawing", leave=False)):
            (picture,) = draw_pictures(model, target, control[None], s.seed, sampling)
            picture.save(out / name)
            pictures[f"{describe_control(config, control.tolist())}\n{name}"] = picture
        draw_strip(pictures).savefig(out / "strip.png", dpi=100)
        (out / file.name).write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(pictures)} picture(s); {out_dir}/strip.png shows them")


if __name__ == "__main__":
    run_script(main, settings)
