"""What a training shows of its control while it learns: how strongly pictures answer the numbers, how well it reads."""

import csv
import math

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure

from cldm.calibration import find_guessed, load_batch, median_errors, spread_out
from cldm.hints import wrap
from cldm.reading import read_controls
from cldm.report import BLUE, label, make_panels, plain
from cldm.training import mid_step
from ldm.ddim import draw_noise
from ldm.files import write_whole

HANDFUL = 12  # pictures that are read, always the same
RESPONSE_EVERY = 100  # steps
RESPONSE_LEVELS = 0.5, 0.75  # of the noise schedule
CAUGHT = 0.02  # the response from which on a control has caught
BY_HEART = 2.0  # times the response of validation pictures, that of training pictures which are known by heart


def tell_errors(config, errors):
    """errors: d absolute errors. Returns: them with names and units, in words."""
    numbers = zip(config.control_names, errors, config.control_units)
    return ", ".join(f"{name} to {float(f'{error:.2g}'):g} {unit}".rstrip() for name, error, unit in numbers)


def take_handful(model, dataset):
    """Returns: the Target and the controls (B, d) of HANDFUL items of a ControlDataset, always the same."""
    return load_batch(model, dataset, spread_out(HANDFUL, dataset))


def across(control_net, control):
    """Returns: (B, d), of each of (B, d) numbers the trained one that is farthest away."""
    config = control_net.config
    low, high = (control.new_tensor(ends) for ends in (config.control_low, config.control_high))
    half = control.new_tensor([(period or 0.0) / 2 for period in config.periods])
    ends = torch.where(control - low > high - control, low, high)
    return torch.where(half > 0, control_net.wrap(control + half), ends)


def read_handful(model, dataset):
    """Read HANDFUL items of a ControlDataset as invert.py reads them.

    Returns: (d,), the median absolute error of each number; their mean in units of each number's spread, a float.
    """
    target, control = take_handful(model, dataset)
    errors = median_errors(model.control_net.config, read_controls(model, target), control)
    return errors, (errors / model.control_net.spread(control)).mean().item()


def describe_asked(config, control, reading, drawn, seen):
    """A training's last lines, on what calibrate returns.

    control: (N, d), of pictures. reading, drawn: Readings of them, and of drawings at their numbers. seen: whether
    training saw the pictures. Returns: a line on how well they are read; lines on numbers that are not.
    """
    errors, shown = (median_errors(config, own, control) for own in (reading, drawn))
    kind, guessed = "training" if seen else "validation", find_guessed(config, reading, control)
    lines = [f"reads {tell_errors(config, errors.tolist())} (median of {len(control)} {kind} pictures)"]
    if not all(guessed):  # which would read its own noise
        told = tell_errors(config, shown.tolist())
        lines.append(f"draws {told}, as read back from drawings at those numbers: asked.png")
    for name, own in zip(config.control_names, guessed):
        if own:
            lines.append(
                f"warning: {name} is read no better than by guessing: is it to be seen in the pictures, and told from "
                "other things that change? If so, more steps (max_steps) or more pictures may help"
            )
    return lines


def draw_asked(config, control, drawn):
    """Returns: a matplotlib Figure, numbers (N, d) asked for against those of a Reading of what was drawn at them."""
    count = len(config.control_names)
    figure = Figure((4.2 * min(count, 3), 0.4 + 4 * math.ceil(count / 3)), layout="constrained")
    read = control + wrap(drawn.control - control, config.periods)
    for k, axes in enumerate(make_panels(figure, count)[0]):
        what = plain(label(config.control_names[k], config.control_units[k]))
        axes.axline((0, 0), slope=1, color="black", linewidth=0.8, label="as asked")
        bars = dict(fmt="o", color=BLUE, markersize=4, elinewidth=0.8, label="read back, 90% intervals")
        axes.errorbar(control[:, k], read[:, k], drawn.margin[:, k], **bars)
        low, high = control[:, k].min().item(), control[:, k].max().item()
        room = 0.06 * (high - low) or 1.0
        axes.set(xlabel=f"{what}, asked for", ylabel="read back from the drawing", xlim=(low - room, high + room))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


class Monitor(pl.Callback):
    """Reads HANDFUL pictures of a ControlDataset, best of those not trained on, in out_dir/log.csv and TensorBoard.

    Response, every RESPONSE_EVERY steps: the share of the denoising loss at other pictures' numbers that their own
    take away; 0: the number is ignored. Control error, after every validation: the median of each number's absolute
    errors when the pictures are read as invert.py reads them.
    history: dicts of what was found, by step. error: the last control errors' mean, in units of each number's spread.
    said: them in words.
    """

    def __init__(self, dataset, out_dir):
        self.dataset, self.file, self.history = dataset, out_dir / "log.csv", []
        self.error, self.said = math.inf, ""

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state_dict):
        self.history = state_dict["history"]

    @property
    def response(self):
        """The last one; 0 before the first."""
        return self.history[-1]["response"] if self.history else 0.0

    @property
    def caught(self):
        """The step at which the control caught; None: it did not yet."""
        steps = [row["step"] for row in self.history if row["response"] >= CAUGHT]
        return steps[0] if steps else None

    @torch.no_grad()
    def find_response(self, model, dataset):
        """Returns: the mean response of HANDFUL pictures of a ControlDataset."""
        target, control = take_handful(model, dataset)
        gaps = wrap(control - control[:, None], model.control_net.config.periods) / model.control_net.spread(control)
        gaps, others = gaps.norm(dim=2).max(1)  # of each, the numbers farthest from its own
        others = torch.where(gaps[:, None] > 0, control[others], across(model.control_net, control))
        scheduler, latents = model.base.scheduler, target.latents
        noises = draw_noise(latents.shape, len(RESPONSE_LEVELS), 0, latents.device)
        losses = torch.zeros(2, device=latents.device)
        for share, noise in zip(RESPONSE_LEVELS, noises):
            level = round(share * (scheduler.config.num_train_timesteps - 1))
            timesteps = torch.full((len(latents),), level, device=latents.device)
            noise = noise.expand_as(latents)
            given = scheduler.add_noise(latents, noise, timesteps), timesteps, target.embeddings
            wanted = model.base.prediction_target(latents, noise, timesteps)
            for k, own in enumerate((control, others)):
                losses[k] += (model.predict(*given, own, target.reference) - wanted).square().mean()
        return 1 - (losses[0] / losses[1]).item()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        step = trainer.global_step
        due = step % RESPONSE_EVERY == 0 or step == trainer.max_steps
        if due and not (mid_step(trainer, batch_index) or module.untrained):
            self.look(trainer, module)

    def look(self, trainer, module):
        """Find the response, and say so if the control has caught."""
        before = self.caught
        with trainer.precision_plugin.forward_context():
            response = self.find_response(module.model, self.dataset)
        self.note(trainer, loss=module.loss.item(), response=response)
        if self.caught and not before and trainer.is_global_zero:
            print(f"step {trainer.global_step}: the control has caught, drawings begin to follow the numbers")

    def on_validation_end(self, trainer, module):
        if module.untrained:
            return
        losses = {key: trainer.callback_metrics[key].item() for key in ("val_loss", "base_loss")}
        if not math.isfinite(losses["val_loss"]):
            raise module.diverged("the val_loss is not finite", losses["val_loss"])
        if module.average or not self.history or self.history[-1]["step"] != trainer.global_step:
            self.look(trainer, module)  # with the average, which is judged
        net = module.model.control_net
        median, error = read_handful(module.model, self.dataset)
        self.error = trainer.strategy.broadcast(error)  # by which all processes stop at the same step
        self.said = tell_errors(net.config, median.tolist())
        named = {f"error of {name}": own for name, own in zip(net.config.control_names, median.tolist())}
        self.note(trainer, **losses, **named, control_error=self.error)

    def describe(self, model, rows):
        """Returns: lines on what went wrong. rows: a ControlDataset that was trained on, or None."""
        if not self.caught:
            return [
                f"warning: the numbers are ignored (response {self.response:.1%}): try more steps (max_steps), a "
                "higher learning_rate, or pictures of which fewer other things change under one prompt"
            ]
        if rows and self.find_response(model, rows) > BY_HEART * self.response + CAUGHT:
            return ["warning: it knows the training pictures by heart: more of them would help, not more steps"]
        return []

    def note(self, trainer, **found):
        """Add what was found at a step to the history, to log.csv and to TensorBoard."""
        step = trainer.global_step
        if not self.history or self.history[-1]["step"] != step:
            self.history.append({"step": step})
        self.history[-1] |= found
        if trainer.is_global_zero:
            write_whole(self.file, self.write)
            trainer.logger.log_metrics(found, step)

    def write(self, file):
        with file.open("w", newline="", encoding="utf-8") as lines:
            columns = list(dict.fromkeys(key for row in self.history for key in row))
            writer = csv.DictWriter(lines, columns)
            writer.writeheader()
            writer.writerows(self.history)
