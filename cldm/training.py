"""Training a numeric ControlNet with PyTorch Lightning."""

import hashlib
import math
import signal
import sys
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities import rank_zero_only

from cldm.model import save_model
from ldm.ddim import draw_timesteps
from ldm.files import write_whole
from ldm.settings import InputError

RESUME_FILE = "resume.ckpt"
PRECISIONS = "32-true", "bf16-mixed", "16-mixed"  # the others would round the controls, or the noise levels
VALIDATION_TIMESTEPS = 4  # noise levels that a validation picture is judged at, always the same
FLAT = 0.02  # a change of val_loss by less than this share of it is none


@contextmanager
def checkpointing(model, enabled):
    """While open, and if enabled, gradients through a ControlLDM recompute activations block by block."""
    networks = (model.base.unet, model.control_net) if enabled else ()
    for network in networks:
        network.enable_gradient_checkpointing()
    yield
    for network in networks:
        network.disable_gradient_checkpointing()


class ControlTraining(pl.LightningModule):
    """The denoising loss of a ControlLDM, its base frozen (sd_locked) or with the UNet's decoder trained too.

    learning_rate falls to zero over `steps` steps as half a cosine. prompt_dropout: share of empty prompts.
    Every step's noise comes from (seed, step, rank), so that a resumed run draws what the killed one would have.
    run: {what: text or number} by which a checkpoint knows whose it is.
    """

    def __init__(self, model, *, learning_rate, steps, sd_locked=True, prompt_dropout=0.1, seed=0, run=None):
        super().__init__()
        self.model = model
        self.learning_rate, self.steps = learning_rate, steps
        self.prompt_dropout, self.seed, self.run = prompt_dropout, seed, run or {}
        self.strict_loading = False  # checkpoints hold only what is trained
        self.compared = False  # whether validation has told how much the base alone would lose
        model.control_net.requires_grad_(True)
        model.control_net.controlnet_down_blocks.requires_grad_(not model.control_net.config.only_mid_control)
        if not sd_locked:
            model.own_unet = True
            model.base.unet.float()  # what is trained, in full precision
            for part in (model.base.unet.up_blocks, model.base.unet.conv_norm_out, model.base.unet.conv_out):
                part.requires_grad_(True)

    def denoising_loss(self, batch, noise, timesteps, kept):
        """Mean squared error of the predicted noise, or velocity, per picture.

        batch: an item of ControlDataset, batched. noise: (B, C, h, w). timesteps: (B,). kept: (B,) bool, prompts.
        Returns: (B,). Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022 for velocity.
        """
        latents = batch["latents"]
        embeddings = torch.where(kept[:, None, None], batch["embeddings"], batch["empty"])
        noisy = self.model.base.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.model.predict(noisy, timesteps, embeddings, batch["control"], batch.get("reference"))
        target = self.model.base.prediction_target(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target, reduction="none").mean((1, 2, 3))

    def training_step(self, batch, _):
        generator = torch.Generator().manual_seed(hash((self.seed, self.global_step, self.global_rank)) % 2**63)
        size = len(batch["latents"])
        noise = torch.randn(batch["latents"].shape, generator=generator).to(self.device)
        total = self.model.base.scheduler.config.num_train_timesteps
        timesteps = draw_timesteps(size, total, generator).to(self.device)
        kept = (torch.rand(size, generator=generator) >= self.prompt_dropout).to(self.device)
        loss = self.denoising_loss(batch, noise, timesteps, kept).mean()
        self.log("loss", loss)
        self.loss = loss.detach()
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], gradient_clip_val)
        rescaled = self.trainer.precision == "16-mixed"  # whose scaler leaves steps with infinite gradients out
        if anywhere(self.trainer, not (rescaled or norm.isfinite()) or not self.loss.isfinite()):
            raise self.diverged("loss", self.loss)

    def diverged(self, what, value):
        return InputError(
            f"step {self.global_step}: the {what} or its gradient is not finite ({value:g}); what was saved before is "
            f"kept; start again with a learning_rate below {self.learning_rate:g} and another out_dir"
        )

    def validation_step(self, batch, _):
        scheduler = self.model.base.scheduler
        generator = torch.Generator().manual_seed(self.seed)
        levels = torch.linspace(0, scheduler.config.num_train_timesteps - 1, 2 * VALIDATION_TIMESTEPS + 1)[1::2]
        kept = torch.ones(len(batch["latents"]), dtype=torch.bool, device=self.device)
        tried = {"val_loss": batch} | ({} if self.compared else {"base_loss": batch | {"control": None}})
        losses = {name: [] for name in tried}
        for level in levels.long():
            noise = torch.randn(batch["latents"].shape[1:], generator=generator).to(self.device)
            timesteps = level.to(self.device).expand(len(kept))
            for name, given in tried.items():
                losses[name].append(self.denoising_loss(given, noise.expand_as(given["latents"]), timesteps, kept))
        means = {name: torch.stack(values).mean() for name, values in losses.items()}
        self.log_dict(means, sync_dist=True, batch_size=len(kept))

    def on_validation_epoch_end(self):
        self.compared = True

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.01)
        warmup = min(100, self.steps // 10 + 1)

        def factor(step):
            return min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["run"] = self.run


def anywhere(trainer, condition):
    """Returns: whether a condition holds in any of the processes that train together."""
    if trainer.world_size == 1:
        return bool(condition)
    return trainer.strategy.reduce_boolean_decision(bool(condition), all=False)


def digest_weights(module, *more):
    """Returns: a digest of a module's weights, and of what more there is to know it by, a text."""
    total = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def find_checkpoint(out_dir, module):
    """Returns: the path of a killed run's checkpoint in out_dir, and its step; None, 0 without one.

    Raises: InputError if it is broken, or of another run than `module`'s; its max_steps may differ, if there are steps
    left.
    """
    file = out_dir / RESUME_FILE
    if not file.exists():
        return None, 0
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        saved, step, run = checkpoint["state_dict"], checkpoint["global_step"], checkpoint["run"]
    except Exception as error:  # zip, pickle, key: torch raises many kinds
        raise InputError(f"{file}: not a whole checkpoint ({type(error).__name__}); delete it to start anew") from None
    other = {key: run.get(key) for key in module.run if run.get(key) != module.run[key] and key != "max_steps"}
    said = [key if key.startswith("the ") else f"{key}={was} (now {module.run[key]})" for key, was in other.items()]
    remedy = (
        "start as before to go on, choose another out_dir, or delete the file and give overwrite=true to begin again"
    )
    if other:
        raise InputError(f"{file}: a run with other settings or data: {', '.join(said)}; {remedy}")
    trained = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in saved.items()} != trained:
        raise InputError(f"{file}: checkpoint of another model; {remedy}")
    if step > module.steps:
        raise InputError(f"{file}: has done {step} steps already, more than max_steps={module.steps}; {remedy}")
    print(f"going on from step {step} of {file}")
    if run["max_steps"] != module.steps:
        rate = 0.5 + 0.5 * math.cos(math.pi * step / module.steps)
        print(
            f"max_steps was {run['max_steps']}: the learning rate goes on at {rate:.0%} of its peak, as {module.steps} "
            "steps have it; the result is near what they give from the start, not the same"
        )
    return file, step


class Stop:
    """What Ctrl-C and SIGTERM do to a training: it ends after the step that is under way, with a checkpoint.

    Between steps, or when asked twice, it ends at once. Either way with one line, and the shell's exit code.
    """

    def __init__(self):
        self.signal, self.stepping = None, False
        self.where = "before the first step"

    def listen(self):
        """Returns: {signal: what received it before}."""
        return {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, _):
        if not self.stepping or self.signal:
            self.end(number)
        self.signal = number

    def end(self, number=None):
        number = number or self.signal or signal.SIGTERM  # another process received it
        name = {signal.SIGINT: "Ctrl-C"}.get(number, "SIGTERM")
        if rank_zero_only.rank == 0:
            print(f"\nstopped by {name} {self.where}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + number)


@contextmanager
def stoppable():
    """Within it, Ctrl-C and SIGTERM do to a training what the Stop does that it gives."""
    stop = Stop()
    before = stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SaveBestAndLast(pl.Callback):
    """Writes out_dir (the lowest val_loss so far; the last without validation), out_dir/last and out_dir/resume.ckpt.

    The checkpoint is written after every validation; without validation, every `every` steps; and when a Stop says so.
    history: [step, val_loss] of all validations. base_loss: the first one's, of the base without the control.
    """

    def __init__(self, out_dir, every, stop):
        self.out_dir, self.every, self.stop = out_dir, every, stop
        self.history, self.base_loss = [], None

    @property
    def best(self):
        return min((loss for _, loss in self.history), default=math.inf)

    def state_dict(self):
        return {"history": self.history, "base_loss": self.base_loss}

    def load_state_dict(self, state_dict):
        self.history, self.base_loss = state_dict["history"], state_dict["base_loss"]

    def save(self, trainer, module, folder):
        if trainer.is_global_zero:
            save_model(module.model, folder)

    def checkpoint(self, trainer):
        write_whole(self.out_dir / RESUME_FILE, trainer.save_checkpoint)
        self.stop.where = f"at step {trainer.global_step} of {trainer.max_steps}"

    def on_train_start(self, trainer, module):
        self.stop.listen()  # in place of Lightning, whose own answer to SIGTERM saves nothing and says nothing
        self.stop.stepping = True
        self.stop.where = f"at step {trainer.global_step} of {trainer.max_steps}"

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        last = trainer.global_step == trainer.max_steps
        stopping, due = anywhere(trainer, self.stop.signal), last or trainer.global_step % self.every == 0
        trainer.should_stop = last  # which has it validated
        if stopping or (due and not trainer.val_dataloaders):
            self.checkpoint(trainer)
        if stopping and not (due and trainer.val_dataloaders):  # else after the validation, which is part of the step
            self.stop.end()

    def on_validation_end(self, trainer, module):
        loss = trainer.callback_metrics["val_loss"].item()
        if not math.isfinite(loss):
            raise module.diverged("val_loss", loss)
        if "base_loss" in trainer.callback_metrics and self.base_loss is None:
            self.base_loss = trainer.callback_metrics["base_loss"].item()
        if loss < self.best:
            self.save(trainer, module, self.out_dir)
        self.history.append([trainer.global_step, loss])
        self.checkpoint(trainer)
        if anywhere(trainer, self.stop.signal):
            self.stop.end()

    def on_train_end(self, trainer, module):
        self.stop.stepping = False
        self.stop.where = "after the last step"

    def finish(self, trainer, module):
        """Write what there is after the last step, though a run was killed before it could."""
        self.save(trainer, module, self.out_dir / "last")
        if not self.history:
            self.save(trainer, module, self.out_dir)

    def verdict(self):
        """Returns: a sentence on what the validations say."""
        if not self.history:
            return "no validation: five different numbers, or a validation.json, would tell how good it is"
        (step, best), (_, last) = min(self.history, key=lambda entry: entry[1]), self.history[-1]
        base = f"; {self.base_loss:.4f} without the control" if self.base_loss else ""
        text = f"val_loss {best:.4f} on pictures that were not trained on (0 would be perfect{base}): "
        if last > (1 + FLAT) * best:
            return f"{text}it has risen since step {step}, which is kept: more pictures would help, not more steps"
        if best > (1 - FLAT) * (self.base_loss or math.inf):
            return f"{text}the numbers are hardly used yet: try more steps (max_steps) or a higher learning_rate"
        if len(self.history) == 1:
            return f"{text}a single validation tells no trend"
        if last < (1 - FLAT) * min(loss for _, loss in self.history[:-1]):
            return f"{text}it was still falling: more steps would help (max_steps)"
        return f"{text}it has levelled off"
