"""Training a numeric ControlNet with PyTorch Lightning."""

import math

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from cldm.model import save_model
from ldm.ddim import draw_timesteps
from ldm.files import write_whole
from ldm.settings import InputError

RESUME_FILE = "resume.ckpt"
VALIDATION_TIMESTEPS = 4  # noise levels that a validation picture is judged at, always the same


class ControlTraining(pl.LightningModule):
    """The denoising loss of a ControlLDM, its base frozen (sd_locked) or with the UNet's decoder trained too.

    learning_rate falls to zero over `steps` steps as half a cosine. prompt_dropout: share of empty prompts.
    Every step's noise comes from (seed, step, rank), so that a resumed run draws what the killed one would have.
    """

    def __init__(self, model, *, learning_rate, steps, sd_locked=True, prompt_dropout=0.1, seed=0):
        super().__init__()
        self.model = model
        self.learning_rate, self.steps = learning_rate, steps
        self.prompt_dropout, self.seed = prompt_dropout, seed
        self.strict_loading = False  # checkpoints hold only what is trained
        model.control_net.requires_grad_(True)
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
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        scheduler = self.model.base.scheduler
        generator = torch.Generator().manual_seed(self.seed)
        levels = torch.linspace(0, scheduler.config.num_train_timesteps - 1, 2 * VALIDATION_TIMESTEPS + 1)[1::2]
        kept = torch.ones(len(batch["latents"]), dtype=torch.bool, device=self.device)
        losses = []
        for level in levels.long():
            noise = torch.randn(batch["latents"].shape[1:], generator=generator).to(self.device)
            timesteps = level.to(self.device).expand(len(kept))
            losses.append(self.denoising_loss(batch, noise.expand_as(batch["latents"]), timesteps, kept))
        self.log("val_loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=True, batch_size=len(kept))

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


def find_checkpoint(out_dir, module):
    """Returns: the path of a killed run's checkpoint in out_dir, and its step; None, 0 without one.

    Raises: InputError if it is broken, or of another model than `module`.
    """
    file = out_dir / RESUME_FILE
    if not file.exists():
        return None, 0
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        saved, step = checkpoint["state_dict"], checkpoint["global_step"]
    except Exception as error:  # zip, pickle, key: torch raises many kinds
        raise InputError(f"{file}: not a whole checkpoint ({type(error).__name__}); delete it to start anew") from None
    trained = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    if {name: p.shape for name, p in saved.items()} != trained:
        raise InputError(f"{file}: checkpoint of another model; delete it to start anew, or choose another out_dir")
    print(f"going on from step {step} of {file}")
    return file, step


class SaveBestAndLast(pl.Callback):
    """Writes out_dir (the lowest val_loss so far; the last without validation), out_dir/last and out_dir/resume.ckpt.

    The checkpoint is written after every validation; without validation, every `every` steps.
    """

    def __init__(self, out_dir, every):
        self.out_dir, self.every, self.best = out_dir, every, math.inf

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state_dict):
        self.best = state_dict["best"]

    def save(self, trainer, module, folder):
        if trainer.is_global_zero:
            save_model(module.model, folder)

    def checkpoint(self, trainer):
        write_whole(self.out_dir / RESUME_FILE, trainer.save_checkpoint)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if not trainer.val_dataloaders and trainer.global_step % self.every == 0:
            self.checkpoint(trainer)

    def on_validation_end(self, trainer, module):
        loss = trainer.callback_metrics["val_loss"].item()
        if not trainer.sanity_checking and loss < self.best:
            self.best = loss
            self.save(trainer, module, self.out_dir)
        self.checkpoint(trainer)

    def on_train_end(self, trainer, module):
        self.save(trainer, module, self.out_dir / "last")
        if not math.isfinite(self.best):
            self.save(trainer, module, self.out_dir)
