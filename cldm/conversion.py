"""Where controls come from and where they go: fresh on a base, fitted to a dataset, from and to the original fork."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from cldm.controlnet import NumericControlNet, default_names
from cldm.hints import circle_middle
from cldm.matcher import MATCHER_FILE
from cldm.model import CALIBRATED, ControlLDM
from ldm.checkpoints import CONTROL, HINT, fill_control, find_control, identify, original_key, read_weights, to_half
from ldm.files import find_path, write_whole
from ldm.settings import InputError, Settings

MOST_PROMPTS = 1000  # kept in a control's config


def add_control(
    base, config, *, control_dim=1, periods=None, hint="dense", hint_hidden=None, encoder="", modulated=False, **others
):
    """Give a base a fresh control: the UNet's encoder copied, zero convolutions, a new MLP on control_dim numbers.

    periods, hint, hint_hidden: as NumericControlNet has them. encoder: a file with a ControlNet in the original
    layout, whose encoder is copied instead of the UNet's. modulated: whether the numbers act in every block.
    others: fusion, proposals and flows of NumericControlNet; with flows, a proposal begins with the base's matcher.
    Returns: ControlLDM whose output equals the base's exactly until it is trained.
    """
    control_net = NumericControlNet.from_unet(
        base.unet,
        hint=hint,
        hint_hidden=hint_hidden,
        latent_size=config.image_size // base.downsampling if hint in ("dense", "original") else None,
        control_names=default_names(control_dim),
        control_units=[""] * control_dim,
        control_mean=[0.0] * control_dim,
        control_std=[1.0] * control_dim,
        periods=periods,
        class_embed_type="projection" if modulated else None,
        projection_class_embeddings_input_dim=control_dim + sum(map(bool, periods or ())) if modulated else None,
        **others,
    )
    matcher = find_path(config.base) / MATCHER_FILE
    if control_net.config.flows and matcher.is_file():
        control_net.proposal.load_state_dict(read_weights(matcher), strict=False)
    if encoder:
        weights = read_weights(find_path(encoder))
        if not (found := find_control(weights)):
            what = f"holds {identify(weights)}, expected a ControlNet in the original layout"
            raise InputError(f"encoder {encoder}: {what}")
        fill_control(control_net, found, encoder, keep="controlnet_")
    return ControlLDM(base, control_net, config)


def import_control(base, config, weights, file, control_range=None):
    """Take over a control trained by the original fork, whose ReLU MLP takes the number unnormalised.

    weights: ldm.checkpoints.find_control's, of the `file`. control_range: [low, high] of every number in training.
    Returns: ControlLDM at the picture size that the MLP was made for.
    """
    try:
        (first, numbers), (second, _), (last, _) = (weights[f"mlp.fc{i}.weight"].shape for i in (1, 2, 3))
    except (LookupError, ValueError):
        raise InputError(f"{file}: not a whole control of the original fork, expected mlp.fc1 to mlp.fc3") from None
    latent_size = math.isqrt(last // base.unet.config.block_out_channels[0])
    config = Settings(config | {"image_size": latent_size * base.downsampling})
    model = add_control(base, config, control_dim=numbers, hint="original", hint_hidden=(first, second))
    fill_control(model.control_net, weights, file)
    if control_range:
        low, high = ([bound] * numbers for bound in control_range)
        model.control_net.register_to_config(control_low=low, control_high=high)
    return model


def export_control(control_net, file):
    """Write a NumericControlNet as one .safetensors file in the original layout: control_model.…, mlp.fc1 to mlp.fc3.

    The original's MLP takes numbers unnormalised, so the training's mean and spread are folded into its first layer. In
    place of a periodic number it takes two, its sine and cosine.
    The file's metadata holds the config.
    A Proposal, which the original lacks, is left out.
    Raises: InputError if the original has no such hint, or no layers for modulation.
    """
    config = control_net.config
    if config.hint != "original":
        raise InputError(
            f"hint={config.hint} is not in the original, whose code computes hint=original alone; diffusers loads the "
            "control's folder itself"
        )
    if config.class_embed_type:
        raise InputError("modulated=true: the original's code lets numbers act by the hint alone")
    weights = {key: own for key, own in control_net.state_dict().items() if not key.startswith("proposal.")}
    weight, bias = (weights[f"{HINT}mlp.0.{kind}"].double() for kind in ("weight", "bias"))
    inputs = []  # mean and spread of each
    for period, *own in zip(config.periods, config.control_mean, config.control_std):
        inputs += [(0.0, 0.5**0.5)] * 2 if period else [own]
    mean, std = weight.new_tensor(inputs).T
    weights[f"{HINT}mlp.0.weight"] = (weight / std).float()
    weights[f"{HINT}mlp.0.bias"] = (bias - weight @ (mean / std)).float()
    others = {key: t for key, t in weights.items() if not key.startswith(f"{HINT}mlp.0.")}
    weights |= to_half(others)  # which would round away what a large mean leaves of a number
    weights = {CONTROL + original_key(key, config.layers_per_block): t for key, t in weights.items()}
    if config.only_mid_control:  # which the original says elsewhere
        weights |= {key: torch.zeros_like(t) for key, t in weights.items() if key.startswith(f"{CONTROL}zero_convs.")}
    own = json.loads(control_net.to_json_string())
    count = control_net.control_dim
    own |= {"control_mean": [0.0] * count, "control_std": [1.0] * count}
    metadata = {"format": "pt", "config": json.dumps(own)}
    write_whole(Path(file), lambda partial: save_file(weights, partial, metadata))


def fit_statistics(control_net, controls, names, units, prompts=(), absolute=None):
    """Take over what a training set says of its numbers, their names, units, mean, spread and range, and its prompts.

    A control that was trained before keeps the mean and spread that its weights rely on, and its range only grows.
    Those of a periodic number are a whole circle's.
    controls: (N, d) numbers. names, units: d texts, or None where nobody named the numbers. prompts: one for each row.
    absolute: as NumericControlNet has it; None where nobody says.
    Raises: InputError if the control was trained on other numbers, or if a number never changes.
    """
    config, controls = control_net.config, torch.tensor(controls, dtype=torch.float64)
    zero_convolutions = *control_net.controlnet_down_blocks, control_net.controlnet_mid_block
    trained = any(layer.weight.any() for layer in zero_convolutions)
    controls = control_net.wrap(controls) if trained else controls
    low, high = controls.amin(0), controls.amax(0)
    own, unnamed = (list(config.control_names), list(config.control_units)), (default_names(len(low)), [""] * len(low))
    if not trained:
        names, units = (names, units) if names else unnamed
        for name, value, constant in zip(names, low, high == low):
            if constant:
                raise InputError(f"nothing to learn: {name} is {value:.10g} in all rows of the training data")
        size = controls.abs().amax(0)  # without it, squares of numbers near the ends of float64 overflow
        mean, std = (controls / size).mean(0) * size, (controls / size).std(0, correction=0) * size
        middle, period = circle_middle(controls, config.periods), low.new_tensor([p or 0.0 for p in config.periods])
        circles = torch.stack([middle, period / 12**0.5, middle - period / 2, middle + period / 2])
        mean, std, low, high = torch.where(period > 0, circles, torch.stack([mean, std, low, high]))
        control_net.register_to_config(control_mean=mean.tolist(), control_std=std.tolist())
    else:
        if names and own not in ((names, units), unnamed):
            said = [", ".join(f"{name} {unit}".strip() for name, unit in zip(*both)) for both in (own, (names, units))]
            raise InputError(
                f"resume_path: was trained on {said[0]}, the data has {said[1]}; if they are the same, name them so in "
                "controls.yaml, else train a fresh control (no resume_path)"
            )
        names, units = (names, units) if names else own
        if absolute and absolute != list(config.absolute or absolute):
            what = f"absolute: {list(config.absolute)}, the data has {absolute}"
            raise InputError(f"resume_path: was trained with {what}; train a fresh control")
        if config.control_low is not None:
            before = [low.new_tensor(bound) for bound in (config.control_low, config.control_high)]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            for name, unit, *ends in zip(names, units, low, high, *before):
                if ends[:2] != ends[2:]:
                    text = "{:.10g} to {:.10g}, which was {:.10g} to {:.10g}".format(*ends)
                    print(f"the range of {name} is now {text} {unit}".rstrip())
    prompts = [prompt for prompt, _ in Counter(prompts).most_common()] + list(config.get("prompts") or [])
    control_net.register_to_config(
        control_names=names,
        control_units=units,
        control_low=low.tolist(),
        control_high=high.tolist(),
        absolute=absolute or config.absolute,
        prompts=list(dict.fromkeys(prompts))[:MOST_PROMPTS],
        **dict.fromkeys(CALIBRATED),  # they were learned for weights that training will change
    )
