"""What one might train instead of a control: CNNs from pictures to numbers."""

import hashlib
import math
import time
from functools import partial

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

from cldm.calibration import nine_in_ten
from cldm.hints import decode, encode, wrap
from ldm.base import roughly
from ldm.files import write_whole
from ldm.pictures import fit_picture, load_picture

BATCH = 64, 12  # rows that a Regressor learns from at once, and reads


def train_regressor(network, minutes, draw_batch, loss):
    """Train a network for some minutes, at a rate that falls by a cosine.

    draw_batch: function(step) -> inputs, a tuple of tensors, and what the network should return for them.
    loss: function(found, wanted) -> number.
    """
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    began, share, step = time.perf_counter(), 0.0, 0
    with tqdm(total=100, desc="training a CNN", leave=False) as bar:
        while share < 1:
            inputs, wanted = draw_batch(step)
            warm = min(1, max((step + 1) / 100, 10 * share))  # after 100 batches, or a tenth of the time
            optimizer.param_groups[0]["lr"] = 1e-3 * warm * (0.5 + 0.5 * math.cos(math.pi * share))
            with roughly(torch.device("cpu")):
                found = network(*inputs)
            optimizer.zero_grad()
            loss(found.float(), wanted).backward()
            optimizer.step()
            step, share = step + 1, min(1.0, (time.perf_counter() - began) / (60 * minutes))
            bar.n = round(100 * share)
            bar.refresh()
    network.eval()


def augment(pictures):
    """Returns: (B, 3, H, W) pictures moved by up to 2 pixels of 128, zoomed by 3% and of 10% other contrast."""
    count = len(pictures)
    move = torch.zeros(count, 2, 3)
    move[:, 0, 0] = move[:, 1, 1] = 1 + 0.06 * torch.rand(count) - 0.03
    move[:, :, 2] = (torch.rand(count, 2) - 0.5) / 16
    grid = nn.functional.affine_grid(move, pictures.shape, align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
    return moved * (0.9 + 0.2 * torch.rand(count, 1, 1, 1))


def tint(pictures):
    """Returns: (B, n, 3, H, W) pictures, the n of a row with the same other contrast of every colour and brightness."""
    count = len(pictures)
    gain, light = 0.85 + 0.3 * torch.rand(count, 1, 3, 1, 1), 0.2 * torch.rand(count, 1, 1, 1, 1) - 0.1
    return pictures * gain + light


class Regressor(nn.Module):
    """A ResNet-18 that sees every picture of a row, and two layers from what it says of them to the numbers.

    pictures: of a row, 2 where there are references. prompts: different ones, of which the layers are told which it is.
    Source: He et al. 2016; Bromley et al. 1993, Siamese networks.
    """

    def __init__(self, pictures, prompts, outputs):
        super().__init__()
        self.prompts, self.trunk = prompts, resnet18(num_classes=256)
        self.head = nn.Sequential(nn.Linear(256 * pictures + prompts, 256), nn.ReLU(), nn.Linear(256, outputs))

    def forward(self, pictures, prompt):
        """pictures: (B, n, 3, H, W). prompt: (B,) int. Returns: (B, outputs)."""
        return self.head(torch.cat([self.see(pictures), nn.functional.one_hot(prompt, self.prompts)], 1))

    def see(self, pictures):
        """Returns: (B, 256 n)."""
        return self.trunk(pictures.flatten(0, 1)).view(len(pictures), -1)


def regress(rows, config, size, minutes, folder, change=tint):
    """Train a Regressor on rows of a dataset for some minutes, or take the one of such a training from a folder.

    rows: Rows. config: of a control on their numbers. size: pixels of a picture's side. change: function of pictures
    that leaves their numbers alone.
    Returns: function(rows) -> controls (n, d); function(rows) -> what its trunk says of them, (n, 256 or 512).
    """
    about = repr((rows.digest(), rows.digest_pictures(), size, minutes, change.__name__, config.control_mean))
    file = folder / f"network_{hashlib.sha256(about.encode()).hexdigest()[:12]}.safetensors"
    prompts = sorted(set(rows.prompts))
    outputs = rows.controls.shape[1] + sum(map(bool, config.periods))
    network = Regressor(len(rows[0].pictures), len(prompts), outputs)

    def load(rows):
        """Returns: pictures, each once, (m, H, W, 3) uint8; which of them rows have; their prompts (n,)."""
        files = list(dict.fromkeys(path for row in rows for path in row.pictures))
        seen = [fit_picture(load_picture(f), size) for f in tqdm(files, "reading pictures", delay=2, leave=False)]
        place = {path: i for i, path in enumerate(files)}
        which = torch.tensor([[place[path] for path in row.pictures] for row in rows])
        return torch.from_numpy(np.stack(seen)), which, torch.tensor([prompts.index(row.prompt) for row in rows])

    def pick(loaded, rows):
        """Returns: (B, n, 3, H, W), from -1 to 1, and prompts (B,), of some rows."""
        pictures, which, prompt = loaded
        return rearrange(pictures[which[rows]], "b n h w c -> b n c h w") / 127.5 - 1, prompt[rows]

    if not file.exists():
        torch.manual_seed(0)
        loaded, control = load(rows), torch.from_numpy(rows.controls)
        wanted = encode(control, config.control_mean, config.control_std, config.periods).float()

        def draw_batch(step):
            chosen = torch.randint(len(rows), BATCH[:1])
            pictures, prompt = pick(loaded, chosen)
            return (change(pictures), prompt), wanted[chosen]

        train_regressor(network, minutes, draw_batch, nn.functional.mse_loss)
        write_whole(file, partial(save_file, network.state_dict()))
    network.load_state_dict(load_file(file))
    network.eval()

    @torch.no_grad()
    def run(network, rows):
        """network: function(pictures, prompt). Returns: (n, …)."""
        loaded = load(rows)
        return torch.cat([network(*pick(loaded, some)) for some in torch.arange(len(rows)).split(BATCH[1])])

    def read(rows):
        return decode(run(network, rows).double(), config)

    return read, lambda rows: run(lambda pictures, _: network.see(pictures), rows)


def find_errors(found, rows, config):
    """found: (n, d). Returns: (n, d) tensor, absolute errors, the short way round; NaN where nothing was found."""
    found = torch.as_tensor(np.asarray(found, float))  # None: NaN
    return wrap(found - torch.from_numpy(rows.controls), config.periods).abs()


def with_bars(read, rows, judged, validation, config):
    """Read rows, with error bars by split conformal prediction.

    read: function(rows) -> controls (n, d), NaN where it does not answer; or these, covariances (n, d, d) or None, and
    halves of 90% intervals (n, d), which are scaled. judged: what it says of validation, rows that it has not learned
    from.
    Returns: as read_by_control, None in place of NaN. Source: Angelopoulos & Bates 2021, eq. 1; Lei et al. 2018.
    """

    def complete(found):
        return found if isinstance(found, tuple) else (found, None, torch.ones_like(found))

    before, _, width = complete(judged)
    errors = (find_errors(before, validation, config) / width).unbind(1)
    scale = torch.stack([nine_in_ten(own[own.isfinite()]) if own.isfinite().any() else own[0] for own in errors])
    began = time.perf_counter()
    found, covariance, half = complete(read(rows))
    seconds = (time.perf_counter() - began) / len(rows)
    if covariance is not None:
        covariance = (covariance * scale[:, None] * scale).tolist()
    found, half = (np.where(own.isfinite(), own.numpy(), None).tolist() for own in (found, half * scale))
    return dict(found=found, half=half, covariance=covariance, flags=[[]] * len(rows), seconds=seconds)
