"""What a training minimises: the denoising loss of a ControlLDM, as a Lightning module."""

import math
from contextlib import contextmanager
from functools import partial

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ldm.ddim import draw_timesteps
from ldm.settings import InputError

LIKELIHOOD = 0.1  # of the log-likelihood in the loss, about the mean squares that it stands for; gradients are clipped
SMALLEST = 1e-8  # mean square of a channel that counts
VALIDATION_TIMESTEPS = 4  # noise levels at which validation pictures are judged, always the same


class FullAttention(TorchFunctionMode):
    """Attention in float32 on a CPU, whose fused kernel is slower in bfloat16, most of all backwards."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention or args[0].device.type != "cpu":
            return function(*args, **(kwargs or {}))
        query, key, value, *rest = args
        with torch.autocast("cpu", enabled=False):
            return function(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)


@contextmanager
def checkpointing(model, enabled):
    """While open, and if enabled, gradients through a ControlLDM recompute activations block by block."""
    networks = (model.base.unet, model.control_net) if enabled else ()
    alike = partial(checkpoint, use_reentrant=False, context_fn=lambda: (FullAttention(), FullAttention()))
    for network in networks:
        network.enable_gradient_checkpointing(alike)
    yield
    for network in networks:
        network.disable_gradient_checkpointing()


def half_cosine(step, steps):
    """Returns: the share of its peak that a learning rate has at a step of `steps`, from 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))


def anywhere(trainer, condition):
    """Returns: whether a condition holds in any of the processes that train together."""
    return trainer.strategy.reduce_boolean_decision(bool(condition), all=False)


class ControlTraining(pl.LightningModule):
    """Trains the control of a ControlLDM, and with sd_locked=False the decoder of the base's UNet too.

    learning_rate: at its peak; it falls to zero over `steps` steps as half a cosine. prompt_dropout: share of prompts
    replaced by the empty one. likelihood: minimise the log of every picture's and channel's mean square, which is the
    likelihood of cldm.objective, in place of mean squares. run: what describe_run returns, by which a checkpoint knows
    its run.
    """

    def __init__(
        self, model, *, learning_rate, steps, sd_locked=True, prompt_dropout=0.1, likelihood=False, seed=0, run=None
    ):
        super().__init__()
        self.model = model
        self.learning_rate, self.steps = learning_rate, steps
        self.prompt_dropout, self.likelihood, self.seed, self.run = prompt_dropout, likelihood, seed, run or {}
        self.sd_locked, self.base_losses = sd_locked, {}  # of validation batches; they change if the UNet does
        self.strict_loading = False  # checkpoints hold only what is trained
        model.control_net.requires_grad_(True)
        model.control_net.controlnet_down_blocks.requires_grad_(not model.control_net.config.only_mid_control)
        if not sd_locked:
            model.own_unet = True
            model.base.unet.float()  # what is trained is kept in full precision
            for part in (model.base.unet.up_blocks, model.base.unet.conv_norm_out, model.base.unet.conv_out):
                part.requires_grad_(True)

    def squared_errors(self, batch, noise, timesteps, kept):
        """Mean squared errors of the predicted noise or velocity.

        batch: items of a ControlDataset. noise: (B, C, h, w). timesteps: (B,). kept: (B,) bool, prompts not dropped.
        Returns: (B, C). Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022 for velocity.
        """
        latents = batch["latents"]
        embeddings = torch.where(kept[:, None, None], batch["embeddings"], batch["empty"])
        noisy = self.model.base.scheduler.add_noise(latents, noise, timesteps)
        with FullAttention():
            prediction = self.model.predict(noisy, timesteps, embeddings, batch["control"], batch.get("reference"))
        target = self.model.base.prediction_target(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target, reduction="none").mean((2, 3))

    def training_step(self, batch, _):
        place = self.seed, self.global_step, self.global_rank  # so that a resumed run draws what it would have drawn
        generator = torch.Generator().manual_seed(hash(place) % 2**63)
        size = len(batch["latents"])
        noise = torch.randn(batch["latents"].shape, generator=generator).to(self.device)
        total = self.model.base.scheduler.config.num_train_timesteps
        timesteps = draw_timesteps(size, total, generator).to(self.device)
        kept = (torch.rand(size, generator=generator) >= self.prompt_dropout).to(self.device)
        squares = self.squared_errors(batch, noise, timesteps, kept)
        self.loss = squares.mean().detach()
        self.log("loss", self.loss)
        return LIKELIHOOD * squares.clamp_min(SMALLEST).log().mean() if self.likelihood else squares.mean()

    def validation_step(self, batch, index):
        """Log val_loss and, without the control, base_loss, by the same noise and noise levels every time."""
        total = self.model.base.scheduler.config.num_train_timesteps
        generator = torch.Generator().manual_seed(self.seed)
        latents, draws = batch["latents"], []
        kept = torch.ones(len(latents), dtype=torch.bool, device=self.device)
        for level in torch.linspace(0, total - 1, 2 * VALIDATION_TIMESTEPS + 1)[1::2].long().to(self.device):
            noise = torch.randn(latents.shape[1:], generator=generator).to(self.device)
            draws.append((noise.expand_as(latents), level.expand(len(kept)), kept))

        def mean_loss(batch):
            return torch.stack([self.squared_errors(batch, *draw) for draw in draws]).mean()

        if index not in self.base_losses or not self.sd_locked:
            self.base_losses[index] = mean_loss(batch | {"control": None})
        means = dict(val_loss=mean_loss(batch), base_loss=self.base_losses[index])
        self.log_dict(means, sync_dist=True, batch_size=len(kept))

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.parameters() if p.grad is not None], gradient_clip_val)
        rescaled = self.trainer.precision == "16-mixed"  # its scaler skips steps with infinite gradients
        if anywhere(self.trainer, not (rescaled or norm.isfinite()) or not self.loss.isfinite()):
            raise self.diverged("loss", self.loss)

    def diverged(self, what, value):
        """Returns: the InputError of a loss that is not finite."""
        return InputError(
            f"step {self.global_step}: the {what} or its gradient is not finite ({value:g}); what was saved before is "
            f"kept; start again with a learning_rate below {self.learning_rate:g} and another out_dir"
        )

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.01)
        warmup = min(100, self.steps // 10 + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda n: min(1, (n + 1) / warmup) * half_cosine(n, self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["run"] = self.run
