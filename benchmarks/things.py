"""Reading how a thing turned, was seen and was lit, from two pictures of it: every method on the same held-out pairs.

    python benchmarks/things.py                              # all; the network alone learns for minutes=150
    python benchmarks/things.py methods=ours,proposal pairs=48

data_root: as make_things.py renders it. Beside invert.py's readings (ours) and what the control's proposal says by
itself: a Siamese ResNet-18 that learns for minutes from the pairs that the control learned from; neural posterior
estimation on what that network sees; and SIFT with an essential matrix, which knows the camera and does not always
answer: its medians are of the pairs where it does. All error bars but ours are split conformal, by validation pairs.
Prints the tables of docs/things.md; leaves every reading in out_dir/readings.json, to which a later run of the same
pairs and control adds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ldm.settings import InputError, answer, check_numbers, run_script

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

import json
import math
import shutil
import time
import warnings

import cv2
import numpy as np
import torch
from sbi.inference import NPE
from sbi.utils.tracking import TensorBoardTracker
from scipy.spatial.transform import Rotation
from scipy.stats import kstest
from torch.utils.tensorboard import SummaryWriter

from benchmarks.common import check_fits, choose, read_by_control, save_json, start_report
from benchmarks.doubt import area_under, distance_ranks, middle_shares
from benchmarks.regressors import BATCH, find_errors, regress, with_bars
from cldm.dataset import read_data, read_rows
from cldm.hints import decode, encode, wrap
from cldm.model import load_model
from cldm.proposal import Proposal
from cldm.report import label, tell_names
from cldm.results import digest_model
from dataForTrain.solids import FIELD_DEG
from ldm.files import find_path
from ldm.pictures import fit_picture

TEST_FILE, REPORT = "test/targets.json", "readings.json"
TURN, CLOSE = "turn", 15.0  # degrees, within which it is found
AREAS = 5, 10, 20  # degrees, up to which the area under the curve of errors is taken
RATIO, FEWEST, INLIER = 0.85, 8, 1.0  # of SIFT's matches: Lowe's ratio, how many are needed, pixels of 128
DRAWS = 500  # of a posterior


def proposal(s, model, training, out):
    """Returns: function(rows) -> controls (n, d), None, spreads (n, d), by the moments of what the Proposal says."""

    @torch.no_grad()
    def read(rows):
        found = []
        for some in torch.arange(len(rows)).split(BATCH[1]):
            some = [rows[i] for i in some.tolist()]
            target = model.encode([row.prompt for row in some], *zip(*(row.load() for row in some)))
            found.append(Proposal.moments(*model.control_net.propose(target), model.control_net.config))
        middle, std = map(torch.cat, zip(*found))
        return middle, None, std

    return read


def learn(s, model, training, out):
    return regress(training, model.control_net.config, model.config.image_size, s.minutes, out)


def siamese(s, model, training, out):
    """Returns: function(rows) -> controls (n, d) of a Regressor that is trained for s.minutes."""
    return learn(s, model, training, out)[0]


def posterior(s, model, training, out):
    """Neural posterior estimation, by sbi's flow, on what the Siamese network sees of the pairs that it learned from.

    Returns: function(rows) -> controls (n, d), covariances (n, d, d), 90% intervals' halves (n, d).
    Source: Greenberg et al. 2019; Tejero-Cantero et al. 2020, sbi.
    """
    config, (_, see) = model.control_net.config, learn(s, model, training, out)
    circles = config.control_mean, config.control_std, config.periods
    wanted = encode(torch.from_numpy(training.controls), *circles).float()
    torch.manual_seed(0)
    tracker = TensorBoardTracker(SummaryWriter(out / "tensorboard"))
    trainer = NPE(density_estimator="zuko_nsf", tracker=tracker).append_simulations(wanted, see(training))
    flow = trainer.train(training_batch_size=200)

    @torch.no_grad()
    def read(rows):
        drawn = decode(flow.sample((DRAWS,), condition=see(rows)).double(), config)  # (DRAWS, n, d)
        middle = decode(encode(drawn, *circles).mean(0), config)
        away = wrap(drawn - middle, config.periods)
        return middle, torch.einsum("kni,knj->nij", away, away) / DRAWS, away.abs().quantile(0.9, 0)

    return read


def match_points(reference, target):
    """Returns: (n, 2) places in the reference that SIFT matches with (n, 2) places in the target, pixels."""
    detector = cv2.SIFT_create(contrastThreshold=0.01)
    (points, features), (others, theirs) = (
        detector.detectAndCompute(np.asarray(own.convert("L")), None) for own in (reference, target)
    )
    pairs = cv2.BFMatcher().knnMatch(features, theirs, 2) if min(len(points), len(others)) >= FEWEST else []
    good = [first for first, second in pairs if first.distance < RATIO * second.distance]
    here, there = ([points[own.queryIdx].pt for own in good], [others[own.trainIdx].pt for own in good])
    return np.reshape(here, (-1, 2)), np.reshape(there, (-1, 2))


def find_pose(here, there, size):
    """Find how a thing turned before the camera of make_things.py, and how much higher this was, by matched places.

    here, there: (n, 2), pixels of size x size. Returns: degrees of turn and height; None if no essential matrix fits.
    Source: Nister 2004.
    """
    focal, middle = size / 2 / math.tan(math.radians(FIELD_DEG / 2)), (size - 1) / 2
    camera = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])
    if len(here) < FEWEST:
        return None
    matrix, inside = cv2.findEssentialMat(here, there, camera, cv2.RANSAC, 0.999, INLIER * size / 128)
    if matrix is None or matrix.shape != (3, 3) or inside.sum() < FEWEST:
        return None
    _, rotation, _, _ = cv2.recoverPose(matrix, here, there, camera, mask=inside)
    with warnings.catch_warnings(action="ignore"):  # without a turn, only the sum of the others is known
        first, turn, last = Rotation.from_matrix(rotation).as_euler("XYX", degrees=True)  # of camera, thing, camera
    if abs(first) > 90:  # the same rotation, as an upright camera sees it
        first, turn, last = first % 360 - 180, -turn, last % 360 - 180
    return -turn, first + last  # y points down


def essential(s, model, training, out):
    """Returns: function(rows) -> controls (n, d), turn and height by find_pose; NaN where it does not answer."""
    names, size = model.control_net.config.control_names, model.config.image_size

    def read(rows):
        found = torch.full((len(rows), len(names)), math.nan, dtype=torch.float64)
        for i, row in enumerate(rows):
            target, reference = (fit_picture(own, size) for own in row.load())
            if pose := find_pose(*match_points(reference, target), size):
                found[i, [names.index("turn"), names.index("height")]] = found.new_tensor(pose)
        return found

    return read


METHODS = {"ours": None, "proposal": proposal, "siamese": siamese, "posterior": posterior, "essential": essential}


def tell(readings, rows, config):
    """Prints the tables. readings: {method: as read_by_control returns them}."""
    errors = {method: find_errors(own["found"], rows, config).numpy() for method, own in readings.items()}
    print("\n| | number | median | 90% | intervals hold | median half width |\n| --- | --- | --- | --- | --- | --- |")
    for k, (name, unit) in enumerate(zip(tell_names(config), config.control_units)):
        for method, own in readings.items():
            answered = np.isfinite(errors[method][:, k])
            if answered.any():
                error, half = errors[method][answered, k], np.array(own["half"], float)[answered, k]
                told = [f"{value:.3g}" for value in (*np.quantile(error, [0.5, 0.9]), np.median(half))]
                told.insert(2, f"{(error <= half).mean():.0%}")
                print(f"| {method} | {label(name, unit)} | {' | '.join(told)} |")
    if TURN in config.control_names:
        tell_turns({name: own[:, config.control_names.index(TURN)] for name, own in errors.items()}, readings)
    for method, own in readings.items():
        if own["covariance"]:
            tell_ranks(method, own, rows, config)


def tell_turns(errors, readings):
    """errors: {method: (n,) of the turn}, NaN where there is no answer."""
    heads = [f"AUC at {limit}" for limit in AREAS]
    print(f"\n| turn | within {CLOSE:g} degrees | {' | '.join(heads)} | answered | flagged | seconds a pair |")
    print("| --- " * (5 + len(AREAS)) + "|")
    for method, own in readings.items():
        far = np.nan_to_num(errors[method], nan=math.inf)
        areas = " | ".join(f"{area_under(far, limit):.3f}" for limit in AREAS)
        shares = f"{np.isfinite(far).mean():.0%} | {np.mean([bool(flags) for flags in own['flags']]):.0%}"
        print(f"| {method} | {(far <= CLOSE).mean():.0%} | {areas} | {shares} | {own['seconds']:.2f} |")


def tell_ranks(method, own, rows, config):
    """Print where truths lie among draws of normal distributions with a method's covariances: TARP's ranks."""
    low, high = np.array([config.control_low, config.control_high])
    width, truth = high - low, rows.controls
    error = wrap(torch.from_numpy(np.array(own["found"]) - truth), config.periods).numpy()
    covariance, goes_round = np.array(own["covariance"]) / (width[:, None] * width), [*map(bool, config.periods)]
    ranks = distance_ranks(error / width, covariance, (truth - low) / width, np.random.default_rng(0), goes_round)
    half, most, mean = middle_shares(ranks)
    told = f"{half:.0%} / {most:.0%} / {mean:.2f} / {kstest(ranks, 'uniform').pvalue:.2g}"
    print(f"\nTARP of {method}, truths in the middle 50% / 90% / mean rank / p of uniform ranks: {told}")


def main(s):
    check_numbers(s, int, pairs=(1, 10**6))
    check_numbers(s, minutes=(1e-3, 1e4))
    methods, root = choose(s.methods, METHODS, "methods"), find_path(s.data_root)
    out = start_report(s.out_dir, REPORT, "readings", "targets.json", "ours", "network_*", "tensorboard")
    model, data, rows = load_model(s.model_path), read_data(root), read_rows(root / TEST_FILE)
    check_fits(model, data, root)
    config = model.control_net.config
    if "proposal" in methods and model.control_net.proposal is None:
        raise InputError('setting "methods": the control has no proposal (proposals=0); leave it out')
    if "essential" in methods and not {TURN, "height"} <= {*config.control_names}:
        raise InputError('setting "methods": essential tells "turn" and "height", which the control does not read')
    rows = rows[np.linspace(0, len(rows) - 1, min(s.pairs, len(rows))).round().astype(int)]
    about, before = (
        [rows.digest(), digest_model(s.model_path, model.config.base)],
        json.loads((out / REPORT).read_text()),
    )
    same = before.get("about") == about
    readings = before["readings"] if same else {}
    if not same:
        shutil.rmtree(out / "ours", ignore_errors=True)
    save_json(out / REPORT, {"about": about, "readings": readings})
    for method in methods:
        began = time.perf_counter()
        if method == "ours":
            readings[method] = read_by_control(s.model_path, rows, config, out)
        else:
            read = METHODS[method](s, model, data.train, out)
            readings[method] = with_bars(read, rows, read(data.validation), data.validation, config)
        save_json(out / REPORT, {"about": about, "readings": readings})
        print(f"{method}: {(time.perf_counter() - began) / 60:.0f} minutes")
    tell({name: readings[name] for name in methods}, rows, config)


if __name__ == "__main__":
    run_script(main, settings)
