"""What inference leaves: result.json, lines of results.jsonl, and figure.png."""

import json
import math
import textwrap
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from cldm.confidence import FLAGS, is_guess, tell_value
from cldm.evidence import unseen_numbers
from cldm.hints import wrap
from cldm.model import Sampling
from ldm.ddim import draw_noise
from ldm.files import write_whole
from ldm.pictures import tensor_to_pictures

DRAWN = Sampling(ddim_steps=16)  # pictures that are only looked at
BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's colours, which colour-blind people tell apart too
COLOURS = BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
WIDTH = 10  # inches of a figure, so that it can be read at the width of a README
ROOM = 1.1, 2.1  # height of a plot of the loss, over the highest loss; with a compass above the curve


def number(values):
    """Returns: the number in a list of one, else the list."""
    return values[0] if len(values) == 1 else values


def plain(text):
    """Returns: the text, escaped so that matplotlib reads no formula in it."""
    return text.replace("$", r"\$")


def label(name, unit):
    """Returns: the name of a number, with its unit if it has one."""
    return f"{name} ({unit})" if unit else name


def tell_names(config):
    """Returns: d texts, the names of numbers; of those that are no changes, whose they are."""
    return [name + " of B" * own for name, own in zip(config.control_names, config.absolute or repeat(False))]


def describe_flags(flags, names=None):
    """names: {flag: names of the numbers that it is said of}, where it is. Returns: {flag: what it says}."""
    of = {flag: f" ({', '.join(names[flag])})" for flag in flags if names and names.get(flag)}
    return {flag: FLAGS[flag] + of.get(flag, "") for flag in flags}


def name_flagged(config, reading, i):
    """Returns: {flag: names of the numbers that it is said of}, of the flags of target i that say so."""
    names = {}
    if "no_effect" in reading.flags[i]:
        names["no_effect"] = unseen_numbers(config, reading.control[i], reading.reach[i])
    if "guess" in reading.flags[i]:
        own = is_guess(config, reading)[i].tolist()
        names["guess"] = [name for name, guessed in zip(config.control_names, own) if guessed]
    return names


def show_flags(figure, flags):
    """Write {flag: what it says} above a figure, a line each."""
    lines = "\n".join(f"{flag}: {text}" for flag, text in flags.items())
    figure.suptitle(plain(lines), color=VERMILION, fontsize=10)


def describe_control(config, control):
    """control: d numbers. Returns: a line with their names and units."""
    numbers = zip(tell_names(config), control, config.control_units)
    return ", ".join(f"{name} {value:+.6g} {unit}".rstrip() for name, value, unit in numbers)


@torch.no_grad()
def draw_pictures(model, target, control, seed=0, sampling=DRAWN):
    """Returns: B PIL pictures drawn at a control (B, d) from the same noise, and a Target's latents if it has some."""
    base, side = model.base, model.config.image_size // model.base.downsampling
    noise = draw_noise((1, base.unet.config.in_channels, side, side), 1 + sampling.ddim_steps, seed, base.device)
    drawn = model.generate(noise, control, target, sampling, target.latents)
    return tensor_to_pictures(base.decode(drawn))


def show_panels(figure, panels):
    """Show {title: PIL picture or (H, W) array} side by side. Returns: the last one's matplotlib image and axes."""
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        image = axes.imshow(panel, cmap="magma", vmin=0, vmax=255)
        axes.set_title(plain(title), fontsize=10)
        axes.axis("off")
        axes.set_anchor("N")  # so that the layout knows where the title begins
    return image, axes


def make_panels(figure, count):
    """Returns: the axes of `count` plots, three in a line at most; those that begin a line."""
    lines = math.ceil(count / 3)
    table = figure.subplots(lines, math.ceil(count / lines), squeeze=False)
    for spare in table.flat[count:]:
        spare.remove()
    return table.flat[:count], table[:, 0]


def draw_strip(panels):
    """Returns: a matplotlib Figure of {title: PIL picture} side by side."""
    panels = {"\n".join(textwrap.fill(line, 20) for line in title.split("\n")): own for title, own in panels.items()}
    lines = 1 + max(title.count("\n") for title in panels)
    side = 1.5 if len(panels) > 4 else 2.2  # inches
    figure = Figure(figsize=(side * len(panels), side + 0.2 * lines), layout="constrained")
    show_panels(figure, panels)
    return figure


def difference(first, second):
    """Returns: the mean absolute difference of two PIL pictures over their channels, (H, W)."""
    return np.abs(np.asarray(first, float) - np.asarray(second, float)).mean(2)


@dataclass
class Inversion:
    """What test5.py found for one target, d numbers."""

    start: torch.Tensor  # (d,), in the dataset's units
    history: list = field(default_factory=list)  # {"control": d numbers, "loss": latent mean square} per iteration
    first: torch.Tensor = None  # (1, C, h, w) latents, the first sample generated at the start
    last: torch.Tensor = None  # (1, C, h, w) latents, the first sample generated at the control
    flags: list = field(default_factory=list)  # of confidence.FLAGS
    seconds: float = 0.0

    def add(self, control, loss, drawn):
        """Note what an iteration drew, (1, C, h, w), at a control (d,), and its loss."""
        self.history.append({"control": control.tolist(), "loss": loss})
        self.first, self.last = drawn if self.first is None else self.first, drawn

    @property
    def control(self):
        """(d,), that of the last generation."""
        return torch.tensor(self.history[-1]["control"], dtype=torch.float64)

    @property
    def loss(self):
        return self.history[-1]["loss"]


def save_inversion(out_dir, model, result, input_picture, target_picture, seed):
    """Write result.json and figure.png of an Inversion to the folder out_dir."""
    report = dict(control=number(result.control.tolist()), start=number(result.start.tolist()), loss=result.loss)
    report |= dict(flags=result.flags, iterations=len(result.history), seconds=result.seconds, seed=seed)
    report["history"] = [{"control": number(entry["control"]), "loss": entry["loss"]} for entry in result.history]
    write_whole(Path(out_dir) / "result.json", lambda file: file.write_text(json.dumps(report, indent=1) + "\n"))
    with torch.no_grad():
        first, last = tensor_to_pictures(model.base.decode(torch.cat([result.first, result.last])))
    figure = draw_inversion(model.control_net.config, result, input_picture, first, last, target_picture)
    write_whole(Path(out_dir) / "figure.png", lambda file: figure.savefig(file, format="png", dpi=100))


def draw_inversion(config, result, input_picture, first, last, target_picture):
    """Returns: a matplotlib Figure, the pictures above, loss and control over the iterations below."""
    missed = difference(last, target_picture)
    drawn = [describe_control(config, own.tolist()).replace(", ", "\n") for own in (result.start, result.control)]
    is_pair = config.hint == "reference"
    panels = {
        "A: input" if is_pair else "input": input_picture,
        f"first drawing\n{drawn[0]}": first,
        f"last drawing\n{drawn[1]}": last,
        "B: target" if is_pair else "target": target_picture,
        f"last drawing − target\nmean {missed.mean():.1f} of 255": missed,
    }
    height = 2.4 + 0.18 * (len(config.control_names) + len(result.flags))  # inches, of pictures below their titles
    figure = Figure(figsize=(WIDTH, height + 2.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[height, 2.4])
    show_panels(above, panels)
    show_flags(above, describe_flags(result.flags))
    loss_axes, control_axes = below.subplots(1, 2)
    iterations = range(1, len(result.history) + 1)
    loss_axes.semilogy(iterations, [entry["loss"] for entry in result.history], ".-", color=BLUE)
    loss_axes.set(xlabel="iteration", ylabel="loss (mean square)")
    loss_axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    loss_axes.yaxis.set_minor_formatter(NullFormatter())
    labels = [plain(label(*own)) for own in zip(config.control_names, config.control_units)]
    control_axes.set_prop_cycle(color=COLOURS)
    for name, values, period in zip(labels, zip(*(entry["control"] for entry in result.history)), config.periods):
        control_axes.plot(iterations, np.unwrap(values, period=period) if period else values, ".-", label=name)
    control_axes.set(xlabel="iteration", ylabel=labels[0] if len(labels) == 1 else "number")
    if len(labels) > 1:
        control_axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    for axes in (loss_axes, control_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def describe_row(config, row):
    """Returns: the part of a dict of results.jsonl that says which Row was read, and which numbers."""
    given = dict(reference=row.reference and str(row.reference), target=str(row.target), time=row.time)
    given |= dict(prompt=row.prompt, source=row.control and list(row.control))
    given |= dict(names=list(config.control_names), units=list(config.control_units))
    given |= dict(periods=list(config.periods)) if any(config.periods) else {}
    given |= dict(absolute=list(config.absolute)) if any(config.absolute or ()) else {}
    return {key: value for key, value in given.items() if value is not None}


def describe_failure(config, row, problem, seed):
    """Returns: the dict of results.jsonl for a Row that could not be read. problem: why, one line."""
    nothing = dict.fromkeys(("control", "std", "interval90", "covariance"))
    return describe_row(config, row) | nothing | dict(flags=["unreadable"], problem=problem, seed=seed)


def describe_reading(config, reading, i, row, seed):
    """Returns: the dict of results.jsonl for target i of a Reading, whose Row is `row`."""
    control = reading.control[i].tolist()
    bars = (getattr(reading, key)[i].tolist() for key in ("std", "interval90", "covariance"))
    std, interval90, covariance = bars if reading.calibrated else (None, None, None)
    result = describe_row(config, row)
    result |= dict(control=number(control), std=std and number(std), interval90=interval90, covariance=covariance)
    result |= dict(flags=reading.flags[i]) | name_flagged(config, reading, i)
    result |= dict(others=reading.others[i], loss=reading.loss[i].item(), iterations=reading.iterations[i].item())
    result |= dict(unexplained_share=reading.unexplained_share[i].item(), model_calls=reading.model_calls)
    result |= dict(seconds=reading.seconds, seed=seed)
    if row.control:
        error = wrap(reading.control[i] - reading.control.new_tensor(row.control), config.periods)
        result["error"] = number(error.tolist())
    return result


def draw_compass(axes, value, margin, low, period):
    """Add a small dial to axes: where a number that goes round points, clockwise from the top, and its interval."""
    compass = axes.inset_axes([0.8, 0.58, 0.18, 0.32], projection="polar", theta_offset=math.pi / 2, theta_direction=-1)
    angle = 2 * math.pi * value / period
    compass.bar(angle, 1, min(2 * math.pi, 4 * math.pi * margin / period), color=VERMILION, alpha=0.3)
    compass.plot([angle, angle], [0, 1], color=VERMILION)
    names = [f"{low + (period * quarter / 4 - low) % period:.6g}" for quarter in range(4)]
    compass.set(ylim=(0, 1), yticks=[], xticks=np.arange(4) * math.pi / 2, xticklabels=names)
    compass.tick_params(labelsize=8, pad=-3)


def draw_reading(config, reading, i, profiles, row, pictures):
    """Returns: a matplotlib Figure, the pictures of target i above, the loss over every number's range below.

    profiles: as reading.profile returns them. pictures: PIL: target, reference or None, what is drawn at the reading.
    """
    control, (target, reference, generated) = reading.control[i], pictures
    missed, lines = difference(generated, target), math.ceil(len(control) / 3)
    panels = {"A: reference": reference} if reference else {}
    panels |= {
        "B: target" if reference else textwrap.shorten(f"target: {row.prompt}", 48): target,
        f"{'B ' if reference else ''}drawn as read": generated,
        f"difference, mean {missed.mean():.1f} of 255": missed,
    }
    figure = Figure(figsize=(WIDTH, 3.4 + 2.2 * lines), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.8, 0.6 + 2.2 * lines])
    image, axes = show_panels(above, panels)
    above.colorbar(image, ax=axes, shrink=0.8)  # of the difference
    plots, first = make_panels(below, len(control))
    for k, axes in enumerate(plots):
        name, unit = plain(tell_names(config)[k]), plain(config.control_units[k])
        points, losses = (part[i, k].cpu().numpy() for part in profiles[:2])
        axes.plot(points[:, k], losses, color=BLUE, label="denoising loss")
        value, std, read = control[k].item(), None, dict(color=VERMILION, fmt="o", label="read")
        period, middle = config.periods[k], points[[0, -1], k].mean()
        place = value - period * round((value - middle) / period) if period else value  # on the axis
        if reading.given[i, k]:
            read["label"] = "given"
        elif reading.calibrated:
            std, read["label"] = reading.std[i, k].item(), "read, with its 90% interval"
            read |= dict(xerr=reading.margin[i, k].item(), capsize=6, elinewidth=2.5)
        axes.errorbar(place, np.interp(place, points[:, k], losses), **read)
        ends = points[[0, -1], k] if period else (config.control_low[k], config.control_high[k])
        axes.axvspan(*ends, color="gray", alpha=0.12, lw=0, label="trained range")
        highest = ROOM[bool(period)] * losses.max()
        axes.set(xlim=(points[0, k], points[-1, k]), xlabel=label(name, unit), ylim=(0, highest))
        axes.set_title(f"{name} {tell_value(value, std)} {unit}".rstrip(), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        if period:  # the axis runs half a turn either way of the lowest loss, through the seam
            low = config.control_low[k]
            axes.xaxis.set_major_locator(MultipleLocator(period / 4))
            axes.xaxis.set_major_formatter(lambda x, _, low=low, period=period: f"{low + (x - low) % period:.6g}")
            draw_compass(axes, value, reading.margin[i, k].item() if reading.calibrated else 0.0, low, period)
        axes.tick_params(labelsize=9)
    for axes in first:
        axes.set_ylabel("loss")
    below.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    show_flags(above, describe_flags(reading.flags[i], name_flagged(config, reading, i)))
    return figure
