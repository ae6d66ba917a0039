"""What a training tells while it runs: lines on its data and progress, grids of pictures."""

import itertools
import sys
import textwrap
import time
from collections import deque

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import default_collate

from cldm.calibration import PICTURES
from cldm.model import Target
from cldm.report import draw_pictures, plain
from ldm.files import write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tensor_to_pictures

GRID_SUBJECTS, GRID_CONTROLS, GRID_PICTURES = 12, 5, 24  # in a grid, at most; but two controls of every subject
GRID_SIDE = 160  # pixels of a picture in a grid, at most
LETTER = 6  # pixels, the width of a letter in it
LEAST_PSNR = 20  # dB, between pictures and the VAE's reconstruction of them
TOLD_EVERY = 30  # seconds between progress lines where stdout is no terminal


def describe_data(data, config):
    """Returns: lines on the TrainingData of a control; config: the control's."""
    kind = "photographs" if data.ranges else "pictures"
    lines = [f"{len(data.train)} training and {len(data.validation)} validation {kind}"]
    for name, unit, values in zip(config.control_names, config.control_units, zip(*data.controls)):
        count = "drawn at random" if data.ranges else f"{len({*values})} values"
        lines.append(f"{f'{name}: {min(values):.10g} to {max(values):.10g} {unit}'.rstrip()}, {count}")
    texts = sorted(set(data.prompts))
    if texts != [""]:
        shown = ", ".join(f'"{text}"' for text in texts[:GRID_SUBJECTS])
        lines.append(f"{len(texts)} prompt(s): {shown}{', …' if len(texts) > GRID_SUBJECTS else ''}")
    return lines


def tell_bars(dataset, seen):
    """Returns: a line on what error bars were learned from. seen: whether the control was trained on it."""
    count = min(PICTURES, len(dataset))
    values = min(count, len(set(map(tuple, dataset.controls.tolist()))))
    kind = "training" if seen else "validation"
    text = f"error bars come from {count} {kind} picture(s) of {values} different value(s)"
    if seen:
        return f"{text}: too narrow for new pictures; a validation.json would mend that"
    if count < 10 or values < 3:
        return f"{text}: too few to rely on; 10 pictures of 3 values in validation.json, or more rows, are enough"
    return text


def pick_rows(dataset):
    """Returns: for each of at most GRID_SUBJECTS prompts, indices of rows spread over its controls."""
    subjects = sorted(set(dataset.prompt_index))[:GRID_SUBJECTS]
    most = min(GRID_CONTROLS, max(2, GRID_PICTURES // len(subjects)))
    picked = []
    for subject in subjects:
        own = [i for i, prompt in enumerate(dataset.prompt_index) if prompt == subject]
        own.sort(key=lambda i: dataset.rows[i].control)
        picked.append([own[i] for i in np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int)])
    return picked


class PictureLogger(pl.Callback):
    """Every `every` steps, draws a row of pictures for every subject: target, reconstruction, generation.

    They go to TensorBoard and to a PNG in `folder`. batch: pictures drawn at once.
    """

    def __init__(self, dataset, folder, every, batch):
        self.folder, self.every, self.batch = folder, every, batch
        picked = pick_rows(dataset)
        self.rows = [[dataset.rows[i] for i in own] for own in picked]
        self.items = default_collate([dataset[i] for i in itertools.chain(*picked)])

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
                f"warning: below {LEAST_PSNR} dB the base hardly shows such pictures, and what it does not show cannot "
                "be learned: see pictures/, and train another base (tool_train_base.py) or take a larger one"
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        if not trainer.is_global_zero or (step % self.every and step != trainer.max_steps):
            return
        drawn = []
        for start in range(0, len(self.targets), self.batch):
            some = {key: part[start : start + self.batch].to(module.device) for key, part in self.items.items()}
            target = Target(some["embeddings"], reference=some.get("reference"))
            drawn += draw_pictures(module.model, target, some["control"])
        pixels = self.compose(module.model.control_net.config, drawn)
        write_whole(self.folder / f"{step:06d}.png", lambda file: Image.fromarray(pixels).save(file, "png"))
        if trainer.logger:
            trainer.logger.experiment.add_image("target, VAE, generation", pixels, step, dataformats="HWC")

    def compose(self, config, drawn):
        """Returns: (H, W, 3) bytes, the pictures of all subjects with their prompts and the numbers asked for."""
        side, columns, cells = min(GRID_SIDE, self.targets[0].width), max(map(len, self.rows)), []
        pictures = zip(itertools.chain(*self.rows), self.targets, self.decoded, drawn, self.psnr.tolist())
        for row, target, decoded, generated, psnr in pictures:
            panels = {"reference": load_picture(row.reference)} if row.reference else {}
            panels |= {"target": target, f"VAE, {psnr:.0f} dB": decoded, "drawn": generated}
            numbers = zip(config.control_names, row.control, config.control_units)
            text = ", ".join(f"{name} {value:.6g} {unit}".rstrip() for name, value, unit in numbers)
            cells.append((panels, textwrap.fill(text, len(panels) * side // LETTER)))
        height = side + 46 + 13 * max(text.count("\n") + 1 for _, text in cells)  # pixels, with the lines above
        figure = Figure(((len(panels) * side + 10) * columns / 100, height * len(self.rows) / 100), dpi=100)
        grid, cells = figure.subplots(len(self.rows), columns, squeeze=False), iter(cells)
        top = 1 - (height - side) / height / len(self.rows)
        figure.subplots_adjust(0, 0, 1, top, wspace=10 / (len(panels) * side), hspace=(height - side) / side)
        for axes in grid.flat:
            axes.tick_params(top=False, labeltop=True, bottom=False, labelbottom=False, left=False, labelleft=False)
            axes.spines[:].set_visible(False)
        for own, line in zip(self.rows, grid):
            for row, axes, (panels, text) in zip(own, line, cells):
                axes.imshow(np.hstack([fit_picture(panel, side) for panel in panels.values()]))
                axes.set_xticks(side * (np.arange(len(panels)) + 0.5), list(panels), fontsize=8)
                axes.set_title(plain(f"{row.prompt if row is own[0] else ''}\n{text}"), fontsize=8, loc="left")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


class Progress(pl.Callback):
    """Prints how far training is: in place on a terminal, else a line every TOLD_EVERY seconds."""

    def on_train_start(self, trainer, module):
        self.began = self.told = time.monotonic()
        self.first, self.losses = trainer.global_step, deque(maxlen=100)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.losses.append(module.loss)
        now, watched = time.monotonic(), trainer.is_global_zero and sys.stdout.isatty()
        last = trainer.global_step == trainer.max_steps and not trainer.val_dataloaders
        if last or now - self.told > (1 if watched else TOLD_EVERY):
            self.told = now
            self.tell(trainer, end="\r" if watched else "\n")

    def on_validation_end(self, trainer, module):
        self.tell(trainer, f", val_loss {trainer.callback_metrics['val_loss'].item():.4f}")

    def tell(self, trainer, more="", end="\n"):
        step, steps = trainer.global_step, trainer.max_steps
        loss = torch.stack([*self.losses]).mean()
        left = (time.monotonic() - self.began) / max(1, step - self.first) * (steps - step)
        left = f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
        print(f"step {step} of {steps}, loss {loss:.4f}{more}, {left}".ljust(79), end=end, flush=True)
