"""What people look at: grids of pictures during training, result.json and figure.png of an inversion."""

import itertools
import json
import textwrap
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from cldm.evidence import NOT_SHOWN
from cldm.objectives import draw_noise
from cldm.reading import CALIBRATION
from ldm.ddim import ddim_timesteps
from ldm.files import write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tensor_to_pictures

GRID_SUBJECTS, GRID_CONTROLS, GRID_PICTURES, GRID_STEPS = 12, 5, 24, 16
GRID_SIDE = 160  # pixels of a picture in a grid, at most
LEAST_PSNR = 20  # dB, between pictures and what the VAE makes of them


def number(values):
    """Returns: the number in a list of one, else the list."""
    return values[0] if len(values) == 1 else values


def save_inversion(out_dir, model, result, input_picture, target_picture, seed):
    """Write result.json and figure.png of the inversion of one target (B = 1) to the folder out_dir."""

    report = {
        "control": number(result.control[0].tolist()),
        "start": number(result.start[0].tolist()),
        "loss": result.loss[0].item(),
        "flags": result.flags[0],
        "iterations": result.iterations[0].item(),
        "seconds": result.seconds,
        "seed": seed,
        "history": [{"control": number(entry["control"][0]), "loss": entry["loss"][0]} for entry in result.history],
    }
    write_whole(Path(out_dir) / "result.json", lambda file: file.write_text(json.dumps(report, indent=1) + "\n"))
    with torch.no_grad():
        first, last = tensor_to_pictures(model.base.decode(torch.cat([result.first, result.last])))
    figure = draw_inversion(model.control_net.config, result, input_picture, first, last, target_picture)
    write_whole(Path(out_dir) / "figure.png", lambda file: figure.savefig(file, format="png", dpi=100))


def draw_inversion(config, result, input_picture, first, last, target_picture):
    """Returns: a matplotlib Figure: the pictures above, loss and control over the iterations below."""

    names, units = (list(map(plain, texts)) for texts in (config.control_names, config.control_units))

    def describe(control):
        values = zip(names, control.tolist(), units)
        return ", ".join(f"{name} {value:+.2f} {unit}".rstrip() for name, value, unit in values)

    difference = np.abs(np.asarray(last, float) - np.asarray(target_picture, float)).mean(2)
    figure = Figure(figsize=(13, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    panels = {
        "input": input_picture,
        f"first generation\n{describe(result.start[0])}": first,
        f"final generation\n{describe(result.control[0])}": last,
        "target": target_picture,
        f"final − target\nmean {difference.mean():.1f} of 255": difference,
    }
    for axes, (title, picture) in zip(above.subplots(1, len(panels)), panels.items()):
        axes.imshow(picture, cmap="magma", vmin=0, vmax=255)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    loss_axes, control_axes = below.subplots(1, 2)
    iterations = range(1, len(result.history) + 1)
    loss_axes.semilogy(iterations, [entry["loss"][0] for entry in result.history], color="tab:red")
    loss_axes.set(xlabel="iteration", ylabel="latent mean squared error")
    for i, (name, unit) in enumerate(zip(names, units)):
        values = [entry["control"][0][i] for entry in result.history]
        control_axes.plot(iterations, values, label=f"{name} ({unit})" if unit else name)
    control_axes.set(xlabel="iteration", ylabel="control")
    control_axes.legend()
    for axes in (loss_axes, control_axes):
        axes.grid(alpha=0.3)
    return figure


def no_effect(config, reading, i):
    """Returns: the names of the numbers of target i that its pictures do not show."""
    ranges = zip(config.control_names, config.control_low, config.control_high, reading.reach[i].tolist())
    return [name for name, low, high, far in ranges if far > NOT_SHOWN * (high - low)]


def describe_reading(config, reading, i, row, seed):
    """Returns: the dict of results.jsonl for target i of a Reading, whose Row is `row`."""
    control = reading.control[i].tolist()
    bars = (getattr(reading, key)[i].tolist() for key in ("std", "interval90", "covariance"))
    std, interval90, covariance = bars if reading.calibrated else (None, None, None)
    result = {
        **({"reference": str(row.reference)} if row.reference else {}),
        "target": str(row.target),
        "prompt": row.prompt,
        "names": list(config.control_names),
        "units": list(config.control_units),
        "control": number(control),
        "std": std and number(std),
        "interval90": interval90,
        "covariance": covariance,
        "flags": reading.flags[i],
        **({"no_effect": no_effect(config, reading, i)} if "no_effect" in reading.flags[i] else {}),
        "others": reading.others[i],
        "loss": reading.loss[i].item(),
        "iterations": reading.iterations[i].item(),
        "model_calls": reading.model_calls,
        "seconds": reading.seconds,
        "seed": seed,
    }
    if row.control is not None:
        result["source"] = list(row.control)
        result["error"] = number([found - true for found, true in zip(control, row.control)])
    return result


@torch.no_grad()
def draw_reading(model, reading, profiles, i, row, pictures, latents, embeddings, seed):
    """Returns: a matplotlib Figure: target i, the generation at its control, their difference; the loss over the range.

    profiles: as reading.profile has them. pictures: PIL, of the target and of what it is a change from, or None.
    latents: (1, C, h, w) of both. embeddings: (1, 77, D), its prompt's.
    """
    config, control, (picture, reference) = model.control_net.config, reading.control[i], pictures
    timesteps = ddim_timesteps(model.base.scheduler, GRID_STEPS)
    noise = draw_noise(latents[0].shape, GRID_STEPS + 1, seed, latents[0].device)
    start = model.base.scheduler.add_noise(latents[0], noise[0], timesteps[:1])
    how = dict(reference=latents[1], eta=model.config.sampling.eta, noise=noise[1:])
    drawn = model.generate(start, timesteps, embeddings, control[None], **how)
    generated = tensor_to_pictures(model.base.decode(drawn))[0]
    difference = np.abs(np.asarray(generated, float) - np.asarray(picture, float)).mean(2)
    panels = {"A: reference": reference} if reference else {}
    panels |= {
        plain(textwrap.shorten(f"{'B: ' if reference else ''}target {row.prompt}", 48)): picture,
        "drawn at what was read": generated,
        f"difference, mean {difference.mean():.1f} of 255": difference,
    }
    figure = Figure(figsize=(max(12, 2.6 * len(control)), 7), layout="constrained")
    above, below = figure.subfigures(2, 1)
    for axes, (title, panel) in zip(above.subplots(1, len(panels)), panels.items()):
        shown = axes.imshow(panel, cmap="magma", vmin=0, vmax=255)
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    above.colorbar(shown, ax=axes, shrink=0.8)  # of the last, the difference
    for k, axes in enumerate(below.subplots(1, len(control), squeeze=False)[0]):
        name, unit = plain(config.control_names[k]), plain(config.control_units[k])
        points, losses = (part[i, k].cpu().numpy() for part in profiles[:2])
        axes.plot(points[:, k], losses, color="tab:blue", label="denoising loss")
        error = ""
        if reading.calibrated:
            error = f" ± {reading.std[i, k]:.3f}"
            axes.axvspan(*reading.interval90[i, k].tolist(), color="tab:orange", alpha=0.4, label="90% interval")
        axes.axvline(control[k].item(), color="tab:red", label="read")
        axes.axvspan(config.control_low[k], config.control_high[k], color="gray", alpha=0.1, label="trained range")
        axes.set(xlim=(points[0, k], points[-1, k]), xlabel=unit, ylim=(0, None))
        axes.set_title(f"{name}\n{control[k]:+.3f}{error} {unit}".rstrip(), fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=8)
    below.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(", ".join(reading.flags[i]), color="tab:red")
    return figure


def plain(text):
    """Returns: a text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def describe_data(controls, names, units, prompts, drawn):
    """Returns: lines that tell what a control is trained on.

    controls: (N, d) numbers. names, units: d texts. prompts: of all rows. drawn: whether controls are drawn at random.
    """
    lines = []
    for name, unit, values in zip(names, units, zip(*controls)):
        lines.append(f"{name}: {min(values):.10g} to {max(values):.10g} {unit}".rstrip())
        lines[-1] += ", drawn at random" if drawn else f", {len({*values})} values"
    texts = sorted(set(prompts))
    if texts != [""]:
        shown = ", ".join(f'"{text}"' for text in texts[:GRID_SUBJECTS])
        lines.append(f"{len(texts)} prompt(s): {shown}{', …' if len(texts) > GRID_SUBJECTS else ''}")
    return lines


def tell_bars(dataset, seen):
    """Returns: a line on what error bars were learned from. seen: whether it is what the control was trained on."""
    count = min(CALIBRATION, len(dataset))
    values = min(count, len(set(map(tuple, dataset.controls.tolist()))))
    text = (
        f"error bars come from {count} {'training' if seen else 'validation'} picture(s) of {values} different value(s)"
    )
    if seen:
        return f"{text}: they are too narrow for new pictures; a validation.json would tell"
    few = count < 10 or values < 3
    return text + (
        ": too few to rely on; 10 pictures of 3 values in validation.json, or more rows, would do" if few else ""
    )


class PictureLogger(pl.Callback):
    """Every `every` steps, a row for every subject: targets, what the VAE makes of them, generations at their numbers.

    To TensorBoard and a PNG in `folder`. batch: pictures drawn at once.
    """

    def __init__(self, dataset, folder, every, batch):
        self.folder, self.every, self.batch = folder, every, batch
        self.rows = [[dataset.rows[i] for i in own] for own in self.pick(dataset)]
        items = [dataset[i] for own in self.pick(dataset) for i in own]
        self.items = torch.utils.data.default_collate(items)

    @staticmethod
    def pick(dataset):
        """Returns: for each of at most GRID_SUBJECTS prompts, indices of rows spread over its controls."""
        subjects = sorted(set(dataset.prompt_index))[:GRID_SUBJECTS]
        most = min(GRID_CONTROLS, max(2, GRID_PICTURES // len(subjects)))
        picked = []
        for subject in subjects:
            own = [i for i, prompt in enumerate(dataset.prompt_index) if prompt == subject]
            own.sort(key=lambda i: dataset.rows[i].control)
            chosen = np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int)
            picked.append([own[i] for i in chosen])
        return picked

    @torch.no_grad()
    def on_train_start(self, trainer, module):
        if not trainer.is_global_zero:
            return
        base, latents = module.model.base, self.items["latents"]
        size = latents.shape[-1] * base.downsampling
        self.targets = [fit_picture(load_picture(row.target), size) for row in itertools.chain(*self.rows)]
        decoded = torch.cat([base.decode(part.to(module.device)).cpu() for part in latents.split(self.batch)])
        errors = (pictures_to_tensor(self.targets) - decoded.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
        self.decoded, self.psnr = tensor_to_pictures(decoded), -10 * errors.clamp_min(1e-10).log10()
        middle = self.psnr.median().item()
        print(f"the base's own reconstruction of the pictures: {middle:.1f} dB (median of {len(self.psnr)})")
        if middle < LEAST_PSNR:
            print(
                f"warning: below {LEAST_PSNR} dB the base hardly shows such pictures, and what it does not show is not "
                "learned: see pictures/, and train another base (tool_train_base.py) or take a larger one"
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.every and step != trainer.max_steps):
            return
        drawn = []
        for start in range(0, len(self.targets), self.batch):
            drawn += self.draw(module.model, {k: v[start : start + self.batch] for k, v in self.items.items()})
        picture = self.compose(module.model.control_net.config, drawn)
        self.folder.mkdir(exist_ok=True)
        write_whole(self.folder / f"{step:06d}.png", lambda file: picture.save(file, "png"))
        if trainer.logger:
            trainer.logger.experiment.add_image("target, VAE, generation", np.asarray(picture), step, dataformats="HWC")

    @staticmethod
    def draw(model, items):
        """Returns: list of PIL pictures, generations at the items' controls, all from the same noise."""
        device = model.base.device
        latents, embeddings, control = (items[k].to(device) for k in ("latents", "embeddings", "control"))
        timesteps = ddim_timesteps(model.base.scheduler, GRID_STEPS)
        noise = draw_noise(latents.shape, GRID_STEPS + 1, 0, device)
        start = model.base.scheduler.add_noise(torch.zeros_like(latents), noise[0].expand_as(latents), timesteps[:1])
        eta = model.config.sampling.eta
        reference = items["reference"].to(device) if "reference" in items else None
        drawn = model.generate(start, timesteps, embeddings, control, reference=reference, eta=eta, noise=noise[1:])
        return tensor_to_pictures(model.base.decode(drawn))

    def compose(self, config, drawn):
        """Returns: the PIL picture of all subjects, with their prompts and the numbers asked for."""
        side, line = min(GRID_SIDE, self.targets[0].width), 14
        ready, rows = zip(self.targets, self.decoded, drawn, self.psnr.tolist()), []
        for own in self.rows:
            cells = []
            for row, (target, decoded, generated, psnr) in zip(own, ready):
                panels = {"reference": fit_picture(load_picture(row.reference), side)} if row.reference else {}
                panels |= {"target": target, f"VAE, {psnr:.0f} dB": decoded, "drawn": generated}
                cell = Image.new("RGB", (len(panels) * side + 8, side + 2 * line + 4), "white")
                values = zip(config.control_names, row.control, config.control_units)
                text = ", ".join(f"{name} {value:.6g} {unit}".rstrip() for name, value, unit in values)
                ImageDraw.Draw(cell).text((0, 0), text, "black")
                for k, (name, panel) in enumerate(panels.items()):
                    ImageDraw.Draw(cell).text((k * side, line), name, "gray")
                    cell.paste(fit_picture(panel, side), (k * side, 2 * line))
                cells.append(cell)
            strip = Image.new("RGB", (sum(cell.width for cell in cells), cells[0].height + line), "white")
            ImageDraw.Draw(strip).text((0, 0), own[0].prompt, "black")
            for k, cell in enumerate(cells):
                strip.paste(cell, (k * cell.width, line))
            rows.append(strip)
        whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
        for k, row in enumerate(rows):
            whole.paste(row, (0, k * row.height))
        return whole
