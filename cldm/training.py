"""What a training minimises: the denoising loss of a ControlLDM, as a Lightning module."""

import math
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
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
EXPLODED = 5.0  # mean loss, of 1 that a network has which predicts nothing
RECENT = 20  # steps that it is the mean of
SCHEDULES = "cosine", "constant"  # of the learning rate, after the warm-up
NAMED = 8  # pictures, in an error
DRAFT, PROPOSAL = 1.0, 0.1  # of the loss: mean square of a hint's draft, nats of a Proposal
VALIDATION_TIMESTEPS = 4  # noise levels at which validation pictures are judged, always the same


class FullAttention(TorchFunctionMode):
    """Attention in float32 on a CPU, whose fused kernel is slower in bfloat16, most of all backwards."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
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


def mid_step(trainer, batch_index):
    """Returns: whether further batches belong to the optimiser's step."""
    return (batch_index + 1) % trainer.accumulate_grad_batches > 0


def anywhere(trainer, condition):
    """Returns: whether a condition holds in any of the processes that train together."""
    return trainer.strategy.reduce_boolean_decision(bool(condition), all=False)


@dataclass(frozen=True)
class Method:
    """How a control is trained, by the settings of tutorial_train.py that have these names."""

    learning_rate: float  # at its peak
    max_steps: int
    warmup_steps: int = 100  # in which the rate rises to its peak
    schedule: str = "cosine"  # it falls to zero at max_steps; "constant": it stays
    prompt_dropout: float = 0.1  # share of prompts replaced by the empty one
    timesteps: tuple = (0, 1)  # the share of the noise schedule that is trained
    accumulate: int = 1  # batches that make one step
    min_snr: float | None = None  # gamma of the weights of Hang et al. 2023
    likelihood: bool = False  # minimise that of cldm.objective in place of mean squares
    ema: float | None = None  # decay of an average of the weights, which is judged and kept as the control
    sd_locked: bool = True  # False: the decoder of the base's UNet learns too
    proposal_steps: int = 0  # at the start, in which a Proposal alone learns
    seed: int = 0


class ControlTraining(pl.LightningModule):
    """Trains the control of a ControlLDM by a Method. run: what describe_run returns, by which a checkpoint knows it.

    recent: the last losses. saved: the last checkpoint's file.
    """

    def __init__(self, model, method, run=None):
        super().__init__()
        self.model, self.method, self.run = model, method, run or {}
        self.recent, self.saved = deque(maxlen=RECENT), None
        self.base_losses = {}  # of validation batches; they change if the UNet does
        self.strict_loading = False  # checkpoints hold only what is trained
        model.control_net.requires_grad_(True).train()  # which one that was read from a file is not
        model.control_net.controlnet_down_blocks.requires_grad_(not model.control_net.config.only_mid_control)
        if not method.sd_locked:
            model.own_unet = True
            model.base.unet.float()  # what is trained is kept in full precision
            for part in (model.base.unet.up_blocks, model.base.unet.conv_norm_out, model.base.unet.conv_out):
                part.requires_grad_(True)
        self.average = None
        if method.ema:
            from diffusers.training_utils import EMAModel  # which imports for seconds

            self.average = EMAModel(self.trained.values(), method.ema, use_ema_warmup=True, power=3 / 4)

    @property
    def trained(self):
        """{name: parameter} of what learns."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def proposes(self):
        """Whether the Proposal alone learns yet."""
        return self.global_step < self.method.proposal_steps

    @property
    def untrained(self):
        """Whether nothing but the Proposal has learned so far."""
        return self.method.proposal_steps > 0 and self.global_step <= self.method.proposal_steps

    @property
    def later(self):
        """{name: parameter} of what does not learn from the first step on."""
        alone = self.method.proposal_steps
        return {name: p for name, p in self.trained.items() if alone and ".proposal." not in name}

    def squared_errors(self, batch, noise, timesteps, kept):
        """Mean squared errors of the predicted noise or velocity.

        batch: items of a ControlDataset. noise: (B, C, h, w). timesteps: (B,). kept: (B,) bool, prompts not dropped.
        Returns: (B, C). Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022 for velocity.
        """
        latents = batch["latents"]
        embeddings = torch.where(kept[:, None, None], batch["embeddings"], batch["empty"])
        noisy = self.model.base.scheduler.add_noise(latents, noise, timesteps)
        with FullAttention() if self.device.type == "cpu" else nullcontext():  # which a GPU would wait for
            prediction = self.model.predict(noisy, timesteps, embeddings, batch["control"], batch.get("reference"))
        target = self.model.base.prediction_target(latents, noise, timesteps)
        return F.mse_loss(prediction.float(), target, reduction="none").mean((2, 3))

    def training_step(self, batch, index):
        """Draws for the batches of all processes and takes its own, dealt as TrainingOrder deals rows.

        So they train as one process does with a batch of as many rows.
        """
        place = self.global_step * self.method.accumulate + index % self.method.accumulate  # of all batches
        place = self.method.seed, place, 0  # so that a resumed run draws what it would have drawn
        generator = torch.Generator().manual_seed(hash(place) % 2**63)
        processes, shape = self.trainer.world_size, batch["latents"].shape
        size, own = processes * len(batch["latents"]), slice(self.trainer.global_rank, None, processes)
        noise = torch.randn(size, *shape[1:], generator=generator)[own]
        total = self.model.base.scheduler.config.num_train_timesteps
        low, high = (share * total for share in self.method.timesteps)
        timesteps = (low + draw_timesteps(size, total, generator)[own] * (high - low) / total).long()
        kept = (torch.rand(size, generator=generator) >= self.method.prompt_dropout)[own]
        hidden = torch.rand(size, 5, generator=generator)[own]  # of the Proposal
        noises = torch.stack([noise, torch.randn(size, *shape[1:], generator=generator)[own]], 1)  # the reference's too
        noises, timesteps, kept, hidden = (
            drawn.to(self.device, non_blocking=True) for drawn in (noises, timesteps, kept, hidden)
        )
        if self.proposes:
            loss = self.proposal_loss(batch, noises, hidden)
            self.note(loss, batch)
            unused = sum(p.sum() for p in self.later.values())  # whose gradients other processes wait for
            return PROPOSAL * loss + 0 * unused
        if self.average and self.untrained:
            self.average.optimization_step = 0  # its warm-up is anew, for what begins to learn
        squares = self.squared_errors(batch, noises[:, 0], timesteps, kept)
        self.note(squares.mean(), batch)
        others = self.other_losses(batch, noises, hidden)
        if self.method.likelihood:
            return LIKELIHOOD * squares.clamp_min(SMALLEST).log().mean() + others
        weights = self.snr_weights(timesteps)[:, None] if self.method.min_snr else 1
        return (weights * squares).mean() + others

    def note(self, loss, batch):
        self.loss, self.batch = loss.detach(), batch
        if not self.proposes:
            self.recent.append(self.loss)
        self.log("loss", self.loss)

    def other_losses(self, batch, noises, hidden):
        """Returns: of what is trained beside the denoising, a hint's draft and a Proposal; 0 without them."""
        net, latents, losses = self.model.control_net, batch["latents"], 0
        if net.config.fusion != "affine":
            hint = net.controlnet_cond_embedding
            losses, hint.draft = DRAFT * F.mse_loss(hint.draft.float(), latents), None
        if net.proposal is not None:
            losses = losses + PROPOSAL * self.proposal_loss(batch, noises, hidden)
        return losses

    def proposal_loss(self, batch, noises, hidden):
        """Returns: the mean loss of the Proposal. noises: (B, 2, C, h, w). hidden: (B, 5), what it does not see."""
        net, seen = self.model.control_net, [batch[key] for key in ("latents", "reference") if key in batch]
        control = net.normalize(batch["control"])
        return net.proposal.loss(torch.stack(seen, 1), noises[:, : len(seen)], hidden, control).mean()

    def snr_weights(self, timesteps):
        """Returns: (B,), what the squared errors at timesteps count. Source: Hang et al. 2023, eq. 9, table 4."""
        scheduler = self.model.base.scheduler
        alphas = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        ratio = (alphas / (1 - alphas)).clamp_min(SMALLEST)
        return ratio.clamp_max(self.method.min_snr) / (ratio + (scheduler.config.prediction_type == "v_prediction"))

    def validation_step(self, batch, index):
        """Log val_loss and, without the control, base_loss, by the same noise and noise levels every time."""
        if self.untrained:
            return
        total = self.model.base.scheduler.config.num_train_timesteps
        generator = torch.Generator().manual_seed(self.method.seed)
        latents, draws = batch["latents"], []
        kept = torch.ones(len(latents), dtype=torch.bool, device=self.device)
        for level in torch.linspace(0, total - 1, 2 * VALIDATION_TIMESTEPS + 1)[1::2].long().to(self.device):
            noise = torch.randn(latents.shape[1:], generator=generator).to(self.device)
            draws.append((noise.expand_as(latents), level.expand(len(kept)), kept))

        def mean_loss(batch):
            return torch.stack([self.squared_errors(batch, *draw) for draw in draws]).mean()

        if index not in self.base_losses or not self.method.sd_locked:
            self.base_losses[index] = mean_loss(batch | {"control": None})
        means = dict(val_loss=mean_loss(batch), base_loss=self.base_losses[index])
        self.log_dict(means, sync_dist=True, batch_size=len(kept))

    def on_before_optimizer_step(self, optimizer):
        for parameter in self.later.values() if self.proposes else ():
            parameter.grad = None  # so that nothing is done to it

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        if self.average:
            self.average.step(self.trained.values())

    def on_train_start(self):
        if self.average:
            self.average.to(self.device)
        (own,) = (config.scheduler for config in self.trainer.lr_scheduler_configs)
        for group, peak, share in zip(own.optimizer.param_groups, own.base_lrs, own.lr_lambdas):
            group["lr"] = peak * share(own.last_epoch)  # not as the checkpoint has it: max_steps may have grown

    def on_validation_start(self):
        if self.average:
            self.average.store(self.trained.values())
            self.average.copy_to(self.trained.values())

    def on_validation_end(self):  # after those of the callbacks, which judge and save the average
        if self.average:
            self.average.restore(self.trained.values())

    @contextmanager
    def averaged(self):
        """While open, the weights are those that a validation judges."""
        self.on_validation_start()
        yield
        self.on_validation_end()

    def take_average(self):
        """After the training, which may have ended before it was started again, make the average the control."""
        if self.average:
            self.average.copy_to(self.trained.values())

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        parameters = [p for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        rescaled = self.trainer.precision == "16-mixed"  # its scaler skips steps with infinite gradients
        if anywhere(self.trainer, not (rescaled or norm.isfinite()) or not self.loss.isfinite()):
            raise self.diverged("the loss or its gradient is not finite", self.loss, self.batch)
        mean = sum(self.recent) / RECENT
        if anywhere(self.trainer, len(self.recent) == RECENT and mean > EXPLODED):
            raise self.diverged(
                f"the loss explodes, over the last {RECENT} batches it is far above 1", mean, self.batch
            )

    def diverged(self, what, value, batch=None):
        """Returns: the InputError of a loss that is not finite, or too large, perhaps in a batch."""
        places, data = (batch or {}).get("row", torch.empty(0)).tolist(), self.trainer.train_dataloader.dataset
        places = places if hasattr(data, "rows") else []  # pairs are cut while training
        names = [data.rows[i].target.name for i in places[:NAMED]] + ["…"] * (len(places) > NAMED)
        seen = f" (of {', '.join(names)})" if names else ""
        return InputError(
            f"step {self.global_step}: {what}{seen}: {value:g}; last checkpoint: {self.saved or 'none'}; start again "
            f"with a learning_rate below {self.method.learning_rate:g} and another out_dir"
        )

    def configure_optimizers(self):
        method = self.method
        later = self.later
        at_once = [p for name, p in self.trained.items() if name not in later]
        parts = [(first, own) for first, own in ((0, at_once), (method.proposal_steps, [*later.values()])) if own]
        groups = [dict(params=own) for _, own in parts]
        optimizer = torch.optim.AdamW(groups, lr=method.learning_rate, weight_decay=0.01)

        def rate(first, step):
            """The share of its peak that the rate of a group has which learns from step `first` on."""
            step, steps = max(0, step - first), method.max_steps - first
            warmup = max(1, min(method.warmup_steps, steps // 10 + 1))
            return min(1, (step + 1) / warmup) * (half_cosine(step, steps) if method.schedule == "cosine" else 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(rate, first) for first, _ in parts])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        trained, average = self.trained, self.average
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if average:
            checkpoint["average"] = average.state_dict()
            if average.temp_stored_params:  # validation: what learns is set aside
                checkpoint["state_dict"] = dict(zip(trained, average.temp_stored_params))
        checkpoint["run"] = self.run

    def on_load_checkpoint(self, checkpoint):
        if self.average:
            self.average.load_state_dict(checkpoint["average"])
