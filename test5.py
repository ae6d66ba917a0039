"""Infer the control that explains a target picture: 32 DDIM steps, exact gradient through all of them, SGD.

Edit the settings and run `python test5.py`, or give them as key=value. Every weight is frozen; only the control
moves. Leaves result.json and figure.png in out_dir.
"""

from ldm.settings import InputError, answer, check_numbers, check_used, run_script

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
    scale=1.0,  # of classifier-free guidance; 1: none
    seed=0,
    eta=1.0,  # 0: deterministic DDIM; 1: fresh noise at every step
    denoise_strength=1.0,  # share of the noise that the input picture is given before it is drawn anew; 1: all
    warm_steps=None,  # DDIM steps of later generations, if they start from the previous; None: from the input picture
    warm_denoise_strength=0.9,  # with warm_steps: share of the noise that the previous result is given
    learning_rate=None,  # of SGD, in spreads of the training set, no step above half of one; None: found as it descends
    iterations=100,  # at most; it ends earlier once the control has settled
    guess_mode=False,  # True: the control acts less in the outer blocks, and not on the negative prompt
    save_memory=False,  # True: activations are computed twice instead of kept
    device="auto",  # a GPU where there is one
    out_dir="outputs/test5",
)
if __name__ == "__main__":
    answer(__file__)

import math
import time
from dataclasses import replace

import torch
from tqdm import trange

from cldm.confidence import FLAGS, flag_inversion
from cldm.dataset import parse_control
from cldm.model import Sampling, load_model
from cldm.report import Inversion, save_inversion
from cldm.solvers import GradientDescent
from ldm.ddim import ddim_schedule, draw_noise
from ldm.files import find_path, report_folder
from ldm.pictures import describe_shapes, fit_picture, load_picture, tell_fit


def infer(model, s, start, target, control):
    """Find the control at which the model generates the target.

    model: ControlLDM, frozen. start: (1, C, h, w), latents of the input picture. target: Target of one picture.
    control: (d,) float64, where to start.
    Returns: Inversion.
    """
    began, config = time.perf_counter(), model.control_net.config
    sampling = Sampling(s.ddim_steps, s.scale, s.strength, s.eta, s.denoise_strength, s.guess_mode)
    warm = None
    if s.warm_steps:
        warm = replace(sampling, ddim_steps=s.warm_steps, denoise_strength=s.warm_denoise_strength)
        ddim_schedule(model.base.scheduler, s.warm_steps, s.warm_denoise_strength)  # what does not fit is said now
    noise = draw_noise(start.shape, 1 + max(s.ddim_steps, s.warm_steps or 0), s.seed, start.device, s.num_samples)
    samples = target.select(torch.zeros(s.num_samples, dtype=torch.long))
    start, control = start.expand_as(samples.latents), control.to(start.device)
    descent = GradientDescent(model.control_net.spread(control), s.learning_rate)
    result = Inversion(start=control)
    bar = trange(s.iterations, desc="inferring", leave=False)
    for _ in bar:
        # generate: all DDIM steps, with the same noise in every iteration
        control = control.detach().requires_grad_(True)
        drawn = model.generate(noise, control.expand(s.num_samples, -1), samples, sampling, start)
        # loss: the difference from the target, in latents
        loss = (drawn - target.latents).square().mean()
        # backward: through all DDIM steps, into the control alone
        (gradient,) = torch.autograd.grad(loss, control)
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise InputError(f"the loss or its gradient at {control.tolist()} is not finite; start elsewhere (control)")
        control, drawn = control.detach(), drawn.detach()
        result.add(control, loss.item(), drawn[:1])
        found = ", ".join(f"{name} {value:+.3f}" for name, value in zip(config.control_names, control.tolist()))
        bar.set_postfix_str(f"loss {loss:.5f}, {found}")
        # step, until it has settled
        step = descent.step(gradient)
        if descent.settled:
            break
        control = model.control_net.wrap(control + step)
        if warm:  # the next generation starts from this one, and takes fewer steps
            start, sampling = drawn, warm
    result.flags = flag_inversion(config, result.control, result.loss, descent.settled)
    result.seconds = time.perf_counter() - began
    return result


def check(s, model):
    """Returns: the control to start from, (d,). Raises: InputError for a setting that cannot be."""
    check_numbers(s, int, ddim_steps=(1, 1000), warm_steps=(1, 1000), num_samples=(1, math.inf))
    check_numbers(s, int, iterations=(1, math.inf), seed=(0, 2**63 - 1))
    check_numbers(s, denoise_strength=(1e-3, 1), warm_denoise_strength=(1e-3, 1), eta=(0, 1))
    check_numbers(s, learning_rate=(1e-6, math.inf), scale=(0, math.inf), strength=(0, math.inf))
    if not s.warm_steps:
        check_used(s, settings, "without warm_steps", "warm_denoise_strength")
    if s.scale == 1:
        check_used(s, settings, "with scale=1, which is no guidance", "n_prompt")
    try:
        control = parse_control(list(s.control))
    except ValueError:
        raise InputError(f"control: expected finite numbers, got {s.control}") from None
    names = model.control_net.config.control_names
    if len(control) != len(names):
        raise InputError(f"control: the model takes {len(names)} number(s) ({', '.join(names)}), got {s.control}")
    return model.control_net.wrap(torch.tensor(control, dtype=torch.float64))


def main(s):
    out_dir = report_folder(s.out_dir, "result.json", "history", "figure.png")
    model = load_model(s.model_path, device=s.device, save_memory=s.save_memory)
    control = check(s, model)
    pictures = [load_picture(find_path(path)) for path in (s.input_image_path, s.target_image_path)]
    sizes, changes = [picture.size for picture in pictures], model.control_net.uses_reference
    tell_fit([sizes] if changes else [[size] for size in sizes], model.config.image_size)
    pictures = [fit_picture(picture, model.config.image_size) for picture in pictures]
    prompt = model.choose_prompt(s.prompt, settings["prompt"])
    start, target = (model.encode([prompt], [p], a_prompt=s.a_prompt, n_prompt=s.n_prompt) for p in pictures)
    if changes:
        target = replace(target, reference=start.latents)
    result = infer(model, s, start.latents, target, control)
    result.flags += ["unlike_shapes"] * (changes and bool(describe_shapes(*sizes)))
    save_inversion(out_dir, model, result, *pictures, seed=s.seed)
    config = model.control_net.config
    for name, unit, value in zip(config.control_names, config.control_units, result.control.tolist()):
        print(f"{name}: {value:+.3f} {unit}".rstrip())
    for flag in result.flags:
        print(f"{flag}: {FLAGS[flag]}")
    print(f"{len(result.history)} iterations, {result.seconds:.1f} seconds; {out_dir}/figure.png shows them")


if __name__ == "__main__":
    run_script(main, settings)
