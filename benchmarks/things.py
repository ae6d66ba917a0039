"""Reading how a thing turned, was seen and was lit, from two pictures of it: every method on the same held-out pairs.

    python benchmarks/things.py                              # all, about an hour on two cores
    python benchmarks/things.py methods=ours pairs=48

data_root: as make_things.py renders it. A Siamese ResNet-18 learns from the pairs that the control learned from, for
minutes; its error bars, and the proposal's, are split conformal, by validation pairs. Prints the tables of
docs/things.md, and leaves every reading in out_dir/readings.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import answer, check_numbers, run_script

settings = dict(
    data_root="runs/things",
    model_path="models/control_things",
    methods="all",
    pairs=300,
    minutes=150.0,  # of the Siamese network's training, as long as the control's
    out_dir="outputs/things",
)
if __name__ == "__main__":
    answer(__file__)

import time
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import resnet18
from tqdm import tqdm

from benchmarks.baselines import train_regressor
from benchmarks.common import choose, read_lines, read_targets, save_json, start_report, write_lines
from benchmarks.doubt import area_under
from cldm.calibration import nine_in_ten
from cldm.dataset import TRAINING_FILE, VALIDATION_FILE, read_control_names
from cldm.hints import decode, encode, wrap
from cldm.model import load_model
from cldm.proposal import Proposal
from ldm.files import find_path, write_whole
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor
from ldm.settings import Settings

SIZE, BATCH = 128, 12  # pixels; pairs read together
TEST_FILE, REPORT = "test/targets.json", "readings.json"
CLOSE = 15.0  # degrees, within which a turn is found
AREAS = 5, 10, 20  # degrees, up to which the area under the curve of errors is taken


def load_rows(file, count=None):
    """Returns: rows of a prompt.json, with whole paths; `count` from the first to the last, or all."""
    rows = read_lines(file)
    which = np.linspace(0, len(rows) - 1, min(count or len(rows), len(rows))).round().astype(int)
    rows = [rows[i] for i in which]
    return [row | {key: str(file.parent / row[key]) for key in ("target", "reference")} for row in rows]


def find_statistics(rows, names, units, periods):
    """Returns: what cldm.hints.decode needs to know of the numbers of rows, as a control's config has it."""
    controls = np.array([row["source"] for row in rows])
    mean, std = controls.mean(0), controls.std(0)
    for k, period in enumerate(periods):
        if period:
            mean[k], std[k] = period / 2, period / 12**0.5
    return Settings(names=names, units=units, periods=periods, control_mean=mean.tolist(), control_std=std.tolist())


class SiameseNetwork(nn.Module):
    """A ResNet-18 that sees both pictures, and three layers from what it says of them to the numbers."""

    def __init__(self, outputs):
        super().__init__()
        self.trunk = resnet18(num_classes=256)
        self.head = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, outputs))

    def forward(self, reference, target):
        """reference, target: (B, 3, H, W). Returns: (B, outputs)."""
        return self.head(torch.cat(self.trunk(torch.cat([reference, target])).chunk(2), 1))


def siamese(s, training, statistics, out):
    """Returns: function(rows) -> controls (n, d), of a SiameseNetwork that was trained for s.minutes."""
    periods, file = statistics.periods, out / "siamese.safetensors"
    network = SiameseNetwork(len(periods) + sum(map(bool, periods)))

    def load(rows):
        keys = [[row[key] for row in rows] for key in ("reference", "target")]
        seen = {path: None for own in keys for path in own}
        for path in tqdm(seen, desc="reading pictures", disable=len(seen) < 1000):
            tensor = pictures_to_tensor([fit_picture(load_picture(path), SIZE)])[0]
            seen[path] = ((tensor + 1) * 127.5).round().byte()  # a quarter of the memory
        return [[seen[path] for path in own] for own in keys]

    def pair(pictures, which):
        return [torch.stack([own[i] for i in which]).float() / 127.5 - 1 for own in pictures]

    if not file.exists():
        pictures, control = load(training), torch.tensor([row["source"] for row in training])
        wanted = encode(control, statistics.control_mean, statistics.control_std, periods)

        def draw_batch(step):
            chosen = torch.randint(len(training), (64,))
            gain, light = 0.85 + 0.3 * torch.rand(64, 3, 1, 1), 0.2 * torch.rand(64, 1, 1, 1) - 0.1
            return [own * gain + light for own in pair(pictures, chosen.tolist())], wanted[chosen]

        torch.manual_seed(0)
        train_regressor(network, s.minutes, draw_batch, nn.functional.mse_loss)
        write_whole(file, partial(save_file, network.state_dict()))
    network.load_state_dict(load_file(file))
    network.eval()

    @torch.no_grad()
    def read(rows):
        pictures, found = load(rows), []
        for first in range(0, len(rows), BATCH):
            found.append(network(*pair(pictures, range(first, min(first + BATCH, len(rows))))))
        return decode(torch.cat(found).double(), statistics).numpy()

    return read


def proposal(s, training, statistics, out):
    """Returns: function(rows) -> controls (n, d), the mean of what the control's Proposal says."""
    model = load_model(s.model_path)

    @torch.no_grad()
    def read(rows):
        found = []
        for first in range(0, len(rows), BATCH):
            some = rows[first : first + BATCH]
            pictures = ([load_picture(row[key]) for row in some] for key in ("target", "reference"))
            target = model.encode([row["prompt"] for row in some], *pictures)
            found.append(Proposal.moments(*model.control_net.propose(target), model.control_net.config)[0])
        return torch.cat(found).numpy()

    return read


def with_bars(read, rows, validation, statistics):
    """Give a method split conformal error bars. Returns: as `ours`. Source: Angelopoulos & Bates 2021, eq. 1."""
    half = nine_in_ten(torch.from_numpy(find_errors(read(validation), validation, statistics)))
    began = time.perf_counter()
    found = read(rows)
    seconds = (time.perf_counter() - began) / len(rows)
    return dict(found=found.tolist(), half=[half.tolist()] * len(rows), flags=[[]] * len(rows), seconds=seconds)


def ours(s, rows, statistics, out):
    """Returns: what the control reads: found and half the intervals (n, d), n lists of flags, seconds a pair."""
    write_lines(out / "targets.json", rows)
    results = read_targets(s.model_path, out / "targets.json", out / "ours")
    interval = np.array([result["interval90"] for result in results])
    width, periods = interval[..., 1] - interval[..., 0], [period or np.inf for period in statistics.periods]
    width = np.where(width < 0, width + periods, width)
    return dict(
        found=[result["control"] for result in results],
        half=(width / 2).tolist(),
        flags=[result["flags"] for result in results],
        seconds=float(np.mean([result["seconds"] for result in results])),
    )


def find_errors(found, rows, statistics):
    """Returns: (n, d), absolute errors, the short way round."""
    gaps = torch.tensor(np.asarray(found) - np.array([row["source"] for row in rows]))
    return wrap(gaps, statistics.periods).abs().numpy()


METHODS = {"ours": None, "proposal": proposal, "siamese": siamese}


def tell(readings, rows, statistics):
    """Prints the tables."""
    turn = statistics["names"].index("turn")
    print("\n| | number | median | 90% | intervals hold | median half width |\n| --- | --- | --- | --- | --- | --- |")
    for method, own in readings.items():
        errors, half = find_errors(own["found"], rows, statistics), np.array(own["half"])
        for k, (name, unit) in enumerate(zip(statistics["names"], statistics.units)):
            middle, most = np.quantile(errors[:, k], [0.5, 0.9])
            held = (errors[:, k] <= half[:, k]).mean()
            print(
                f"| {method} | {name} ({unit}) | {middle:.3g} | {most:.3g} | {held:.0%} | {np.median(half[:, k]):.3g} |"
            )
    heads = [f"AUC at {limit}" for limit in AREAS]
    print(f"\n| turn | within {CLOSE:g} degrees | {' | '.join(heads)} | flagged | seconds a pair |")
    print("| --- " * (4 + len(AREAS)) + "|")
    for method, own in readings.items():
        errors = find_errors(own["found"], rows, statistics)[:, turn]
        areas = " | ".join(f"{area_under(errors, limit):.3f}" for limit in AREAS)
        flagged = np.mean([bool(flags) for flags in own["flags"]])
        print(f"| {method} | {(errors <= CLOSE).mean():.0%} | {areas} | {flagged:.0%} | {own['seconds']:.2f} |")


def main(s):
    check_numbers(s, int, pairs=(1, 10**6))
    check_numbers(s, minutes=(1e-3, 1e4))
    methods, root = choose(s.methods, METHODS, "methods"), find_path(s.data_root)
    out = start_report(s.out_dir, REPORT, "readings", "targets.json", "ours", "siamese.safetensors")
    rows, validation = load_rows(root / TEST_FILE, s.pairs), load_rows(root / VALIDATION_FILE)
    training = load_rows(root / TRAINING_FILE)
    names, units, periods, _ = read_control_names(root, len(rows[0]["source"]))
    statistics, readings = find_statistics(training, names, units, periods), {}
    for method in methods:
        if method == "ours":
            readings[method] = ours(s, rows, statistics, out)
        else:
            readings[method] = with_bars(METHODS[method](s, training, statistics, out), rows, validation, statistics)
        save_json(out / REPORT, {"readings": readings})
    tell(readings, rows, statistics)


if __name__ == "__main__":
    run_script(main, settings)
