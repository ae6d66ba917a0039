"""What a training tells while it runs: lines on its data and progress, grids of pictures."""

import math
import textwrap
import time
from collections import deque
from functools import partial

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from cldm.calibration import PICTURES, spread_out
from cldm.confidence import is_outside
from cldm.model import Target
from cldm.report import describe_control, draw_pictures, plain
from cldm.training import mid_step
from ldm.files import write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tensor_to_pictures

GRID_SUBJECTS, GRID_CONTROLS, GRID_PICTURES = 12, 5, 24  # in a grid, at most; but two controls of every subject
SIDE = 1.6  # inches of a picture in it
LEAST_PSNR = 20  # dB, between pictures and the VAE's reconstruction of them
TOLD_EVERY = 15  # seconds between progress lines
FLAT = 0.02  # val_loss has not changed if it changed by less than this share


def count_values(values):
    """Returns: how many different ones there are, in words."""
    count = len(np.unique(values))
    return f"{count} values" + "; two values only: what lies between them is never seen" * (count == 2)


def describe_data(data, config):
    """Returns: lines on the TrainingData of a control; config: the control's."""
    kind = "photographs" if data.ranges else "pictures"
    lines = [f"{len(data.train)} training and {len(data.validation)} validation {kind}"]
    numbers = zip(config.control_names, config.control_units, config.periods, data.controls.T)
    for name, unit, period, values in numbers:
        count = "drawn at random" if data.ranges else count_values(values)
        goes_round = f", which goes round every {period:.10g}" if period else ""
        lines.append(f"{f'{name}: {values.min():.10g} to {values.max():.10g} {unit}'.rstrip()}, {count}{goes_round}")
    if texts := sorted({*data.prompts} - {""}):
        shown = ", ".join(f'"{text}"' for text in texts[:GRID_SUBJECTS])
        lines.append(f"{len(texts)} prompt(s): {shown}{', …' if len(texts) > GRID_SUBJECTS else ''}")
    return lines


def describe_bars(config, dataset, seen, pictures=PICTURES):
    """Returns: a line on what error bars were learned from, as calibrate has it.

    config: of the control. dataset: a ControlDataset. seen: whether training saw it.
    """
    count = min(pictures, len(dataset))
    values = len(dataset.controls[spread_out(pictures, dataset)].unique(dim=0))
    kind = "training" if seen else "validation"
    text = f"error bars come from {count} {kind} picture(s) of {values} different value(s)"
    if beyond := int(is_outside(config, dataset.controls, torch.full_like(dataset.controls, math.inf)).sum()):
        text += f"; {beyond} of all {len(dataset)} lie beyond the trained range, which makes the bars wider"
    if seen:
        return f"{text}: too narrow for new pictures; a validation.json would mend that"
    few = ": too few to rely on; 10 pictures of 3 values in validation.json, or more rows, are enough"
    return text + few * (count < 10 or values < 3)


def describe_losses(history, held_out, caught):
    """Returns: a sentence on SaveBestAndLast's history; held_out: whether validation shows what training does not.

    caught: whether the control did; without that, the losses have no trend to tell of.
    """
    if not history:
        return "no validation: five different numbers, or a validation.json, would tell how good it is"
    _, losses, (base, *_), _ = zip(*history)
    best, last = min(losses), losses[-1]
    if last > (1 + FLAT) * best:
        step = history[losses.index(best)][0]
        trend = f"it has risen since step {step}, so more pictures would help, not more steps"
    elif len(losses) == 1:
        trend = "a single validation tells no trend"
    elif last < (1 - FLAT) * min(losses[:-1]):
        trend = "it was still falling: more steps would help (max_steps)"
    else:
        trend = "it has levelled off"
    trend = f": {trend}" if caught else ""
    shown = "pictures that were not trained on" if held_out else "new pairs from the training photographs"
    return f"val_loss {best:.4f} on {shown} (0 would be perfect; {base:.4f} without the control){trend}"


class PictureLogger(pl.Callback):
    """Every `every` steps, draws a row of pictures for every subject: target, reconstruction, generation.

    They go to TensorBoard and to a PNG in `folder`. dataset: a ControlDataset. batch: pictures drawn at once.
    """

    def __init__(self, dataset, folder, every, batch):
        self.folder, self.every, self.batch = folder, every, batch
        subjects = sorted(np.unique(dataset.prompt_index), key=dataset.texts.__getitem__)[:GRID_SUBJECTS]
        most = min(GRID_CONTROLS, max(2, GRID_PICTURES // len(subjects)))
        picked = []
        for subject in subjects:
            own = (dataset.prompt_index == subject).nonzero()[0]
            own = own[np.lexsort(dataset.controls[own].numpy().T[::-1])]
            picked += [own[int(i)].item() for i in np.linspace(0, len(own) - 1, min(most, len(own))).round()]
        self.rows = [dataset.rows[i] for i in picked]
        self.items = default_collate([dataset[i] for i in picked])
        self.columns = math.ceil(len(picked) / len(subjects))

    @torch.no_grad()
    def on_train_start(self, trainer, module):
        if not trainer.is_global_zero:
            return
        base, latents = module.model.base, self.items["latents"]
        size = latents.shape[-1] * base.downsampling
        targets = [fit_picture(load_picture(row.target), size) for row in self.rows]
        decoded = torch.cat([base.decode(part.to(module.device)).cpu() for part in latents.split(self.batch)])
        errors = (pictures_to_tensor(targets) - decoded.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
        psnr, self.panels = -10 * errors.clamp_min(1e-10).log10(), []
        for row, target, picture, own in zip(self.rows, targets, tensor_to_pictures(decoded), psnr.tolist()):
            reference = {"reference": fit_picture(load_picture(row.reference), size)} if row.reference else {}
            self.panels.append(reference | {"target": target, f"VAE, {own:.0f} dB": picture})
        middle = psnr.median().item()
        print(f"the base's own reconstruction of the pictures: {middle:.1f} dB (median of {len(psnr)})")
        if middle < LEAST_PSNR:
            print(
                f"warning: below {LEAST_PSNR} dB the base hardly shows such pictures, and what it does not show cannot "
                "be learned: see pictures/, and train another base (tool_train_base.py) or take a larger one"
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if not trainer.is_global_zero or mid_step(trainer, batch_index) or not due:
            return
        drawn = []
        with module.averaged():
            for start in range(0, len(self.rows), self.batch):
                some = {key: part[start : start + self.batch].to(module.device) for key, part in self.items.items()}
                target = Target(some["embeddings"], reference=some.get("reference"))
                drawn += draw_pictures(module.model, target, some["control"])
        figure = self.compose(module.model.control_net.config, drawn)
        write_whole(self.folder / f"{step:06d}.png", partial(figure.savefig, format="png"))
        trainer.logger.experiment.add_figure("target, VAE, generation", figure, step)

    def compose(self, config, drawn):
        """Returns: a matplotlib Figure, the pictures of all subjects with their prompts and the numbers asked for."""
        count, lines = 1 + len(self.panels[0]), math.ceil(len(drawn) / self.columns)
        figure = Figure(((count * SIDE + 0.2) * self.columns, (SIDE + 0.8) * lines), layout="constrained")
        for k, (row, panels, generated) in enumerate(zip(self.rows, self.panels, drawn), 1):
            texts = row.prompt, describe_control(config, row.control), " | ".join([*panels, "drawn"])
            texts = [textwrap.fill(text, 24 * count) for text in texts if text]
            axes = figure.add_subplot(lines, self.columns, k)
            axes.axis("off")
            axes.imshow(np.hstack([*panels.values(), generated]))
            axes.set_title(plain("\n".join(texts)), fontsize=8)
        return figure


class Progress(pl.Callback):
    """Prints how far training is, every TOLD_EVERY seconds and after every validation; monitor: a Monitor."""

    def __init__(self, monitor):
        self.monitor = monitor

    def on_train_start(self, trainer, module):
        self.began = self.told = time.monotonic()
        self.first, self.losses = trainer.global_step, deque(maxlen=100)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.losses.append(module.loss)
        if trainer.global_step == module.method.proposal_steps and not mid_step(trainer, batch_index):
            self.began, self.first = time.monotonic(), trainer.global_step
            self.losses.clear()  # which was another one
            return
        last = trainer.global_step == trainer.max_steps and not trainer.val_dataloaders
        if last or time.monotonic() - self.told > TOLD_EVERY:
            self.tell(trainer)

    def on_validation_end(self, trainer, module):
        if not module.untrained:
            val_loss = trainer.callback_metrics["val_loss"].item()
            self.tell(trainer, f", val_loss {val_loss:.4f}, reads {self.monitor.said}")

    def tell(self, trainer, more=""):
        self.told, step, module = time.monotonic(), trainer.global_step, trainer.lightning_module
        steps, alone = trainer.max_steps, ""
        if module.proposes:
            steps, alone = module.method.proposal_steps, " of the proposal alone"
        left = (self.told - self.began) / max(1, step - self.first) * (steps - step)
        more = f", response {self.monitor.response:.0%}{more}" if self.monitor.history else more
        left = f"{left / 60:.0f} min left" if left > 90 else f"{left:.0f} s left"
        print(f"step {step} of {steps}{alone}, loss {torch.stack([*self.losses]).mean():.4f}{more}, {left}", flush=True)
