"""Infer the control that explains a target picture: 32 DDIM steps, exact gradient through all of them, SGD.

Edit the settings and run `python test5.py`, or give them as key=value. Every weight is frozen; only the control
moves. Leaves result.json and figure.png in out_dir.
"""

from ldm.settings import InputError, answer, check_kinds, check_numbers, check_used, run_script

settings = dict(
    model_path="models/control_tiny",  # the out_dir of a training
    input_image_path="dataForTrain/resultData/astronaut_-4.png",
    target_image_path="dataForTrain/resultData/astronaut_+2.png",
    prompt="a photo of an astronaut in an orange suit",
    a_prompt=None,  # added to the prompt; None: as the base's YAML says
    n_prompt=None,  # what guidance leads away from; None: as the base's YAML says
    control=[-4.0],  # where to start, in the dataset's units: one number, or as many as the model has
    ddim_steps=32,
    num_samples=4,  # pictures drawn in every iteration, each from noise of its own; their losses are averaged
    strength=1.0,  # factor on what the ControlNet adds
    scale=1.0,  # of the guidance; 1: none
    seed=0,
    eta=1.0,  # 0: deterministic DDIM; 1: fresh noise at every step
    denoise_strength=1.0,  # how much of the input picture is noised away before it is drawn anew; 1: all
    learning_rate=None,  # of plain SGD; None: found from the first gradient
    iterations=100,  # at the most; ends earlier when the control has settled
    guess_mode=False,  # True: the control acts less the further out, and not on the negative prompt
    save_memory=False,  # True: the chain's activations are computed twice and not kept
    device="auto",  # a GPU where there is one
    out_dir="outputs/test5",
)
if __name__ == "__main__":
    answer(__file__)

import math

import torch
from tqdm import tqdm

from cldm.dataset import parse_control, recognize_prompt
from cldm.inversion import invert_by_sampling
from cldm.model import load_model
from cldm.reading import FLAGS
from cldm.report import save_inversion
from ldm.files import find_path, report_folder
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tell_fit


def complete(s, model):
    """Fill in the prompts that the base's YAML adds where `s` says None. Raises: InputError for what cannot be."""
    for key in ("a_prompt", "n_prompt"):
        s[key] = model.config[key] if s[key] is None else s[key]
    check_kinds(s, str, "a_prompt", "n_prompt")
    check_numbers(s, int, ddim_steps=(1, 1000), warm_steps=(1, 1000), num_samples=(1, math.inf))
    check_numbers(s, int, iterations=(1, math.inf), seed=(0, 2**63 - 1))
    check_numbers(s, denoise_strength=(1e-3, 1), warm_denoise_strength=(1e-3, 1), eta=(0, 1))
    check_numbers(s, learning_rate=(1e-6, math.inf), scale=(0, math.inf), strength=(0, math.inf))


def infer(model, s, input_pictures, target_pictures, control):
    """Invert B targets (PIL pictures) of one prompt as the settings `s` say.

    control: (B, d), where to start.
    Returns: Inversion.
    """
    complete(s, model)
    names = model.control_net.config.control_names
    if control.shape[1] != len(names):
        expected = f"{len(names)} number(s) ({', '.join(names)})"
        raise InputError(f"control: the model takes {expected}, got {control.shape[1]}: {control[0].tolist()}")
    with torch.no_grad():
        pictures = pictures_to_tensor([*input_pictures, *target_pictures]).to(model.base.device)
        start, target = model.base.encode(pictures).chunk(2)
        prompt = recognize_prompt(s.prompt, tuple(model.control_net.config.prompts or ()))
        prompt = ", ".join(filter(None, [prompt, s.a_prompt]))
        embeddings, negative = model.base.embed([prompt, s.n_prompt]).repeat_interleave(len(control), 0).chunk(2)
    with tqdm(total=s.iterations, desc="inferring", leave=False) as bar:

        def show(entry):
            found = ", ".join(f"{name} {value:+.3f}" for name, value in zip(names, entry["control"][0]))
            bar.set_postfix_str(f"loss {entry['loss'][0]:.5f}, {found}")
            bar.update()

        return invert_by_sampling(
            model,
            start,
            target,
            embeddings,
            control.to(target.device),
            negative=negative,
            ddim_steps=s.ddim_steps,
            denoise_strength=s.denoise_strength,
            warm_steps=s.get("warm_steps"),
            warm_denoise_strength=s.get("warm_denoise_strength"),
            num_samples=s.num_samples,
            scale=s.scale,
            strength=s.strength,
            eta=s.eta,
            guess_mode=s.guess_mode,
            seed=s.seed,
            learning_rate=s.learning_rate,
            iterations=s.iterations,
            on_iteration=show,
        )


def main(s):
    out_dir = report_folder(s.out_dir, "result.json", "history", "figure.png")
    model = load_model(s.model_path, device=s.device, save_memory=s.save_memory)
    try:
        control = torch.tensor([parse_control(list(s.control))], dtype=torch.float64)
    except ValueError:
        raise InputError(f"control: expected finite numbers, got {s.control}") from None
    paths = (s.input_image_path, s.target_image_path)
    pictures = [load_picture(find_path(path)) for path in paths]
    tell_fit([[picture.size] for picture in pictures], model.config.image_size)
    pictures = [fit_picture(picture, model.config.image_size) for picture in pictures]
    if s.scale == 1:
        check_used(s, settings, "with scale=1, which is no guidance", "n_prompt")
    complete(s, model)
    result = infer(model, s, pictures[:1], pictures[1:], control)
    save_inversion(out_dir, model, result, *pictures, seed=s.seed)
    config = model.control_net.config
    for name, unit, value in zip(config.control_names, config.control_units, result.control[0].tolist()):
        print(f"{name}: {value:+.3f} {unit}".rstrip())
    for flag in result.flags[0]:
        print(f"{flag}: {FLAGS[flag]}")
    print(f"{result.iterations[0]} iterations, {result.seconds:.1f} seconds; {out_dir}/figure.png shows them")


if __name__ == "__main__":
    run_script(main, settings)
