"""Pairs: the target is the reference, changed as the numbers say; changes invert and compose; all scripts take them."""

import json
import math
import random
import signal
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CHANNELS, IMAGE_SIZE, LATENT_SIZE, send, trained_state
from PIL import Image, ImageFilter
from torch.nn import functional as F

import invert
import test5
import tutorial_train
from benchmarks.common import compose, inverse
from cldm.changes import CHANGES, NO_CHANGE, choose_changes
from cldm.confidence import Reading
from cldm.dataset import Row, read_rows, split_rows
from cldm.evidence import BEYOND
from cldm.fit import NAMES, WIDTHS, Fit, has_formula, refine_reading
from cldm.hints import encode
from cldm.matcher import compare
from cldm.model import Sampling, Target, load_model, save_model
from cldm.pairs import FreshPairs, draw_pair, draw_views, list_pictures, read_photos
from cldm.proposal import Proposal, hide
from cldm.reading import fill_range, read_controls
from cldm.reference import MATCHES, ReferenceHint, find_moving, match_reference, sample_bilinear
from cldm.solvers import levenberg_marquardt
from dataForTrain import make_dataset
from ldm.files import find_path
from ldm.settings import InputError, override, run_script


@pytest.fixture
def photos(tmp_path):
    """A folder of three smooth pictures, one of them below it."""
    folder, noise = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "more/c.png"):
        pixels = noise.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def paired(make_model, tmp_path):
    """The folder of a control that takes references, of two numbers."""
    model = make_model(2, "reference")
    names = dict(control_names=["rotation", "exposure"], control_units=["degrees", "stops"])
    calibrated = dict(error_scale=[0.1, 0.1], error_floor=[0.01, 0.01])
    bounds = dict(control_low=[-5.0, -1.0], control_high=[5.0, 1.0])
    model.control_net.register_to_config(**bounds, **names, **calibrated)
    save_model(model, tmp_path / "control")
    return tmp_path / "control"


def changed(picture, change):
    """Returns: a PIL picture changed as Pillow itself does it, one number after the other."""
    size = picture.width
    picture = picture.rotate(change["rotation"], Image.Resampling.BICUBIC)
    side = size / change["zoom"]
    x, y = (size * (0.5 - change[k] / change["zoom"]) - side / 2 for k in ("shift x", "shift y"))
    picture = picture.transform(picture.size, Image.Transform.EXTENT, (x, y, x + side, y + side), Image.BICUBIC)
    return picture.filter(ImageFilter.GaussianBlur(change["blur"]))


@pytest.mark.parametrize(
    "ranges",
    [{"rotation": [8, 8]}, {"zoom": [1.2, 1.2]}, {"shift x": [0.1, 0.1]}, {"shift y": [0.1, 0.1]}, {"blur": [2, 2]}],
    ids=lambda ranges: next(iter(ranges)),
)
def test_the_target_is_the_reference_changed(photos, ranges):
    files, middle = sorted(photos.glob("*.*")), slice(20, 76)
    for seed in range(4):
        reference, target, change = draw_pair(random.Random(seed), files, 96, choose_changes(ranges))
        assert change == NO_CHANGE | {name: value for name, (value, _) in ranges.items()}

        def difference(change, reference=reference, target=target):
            pictures = (np.asarray(p, float)[middle, middle] for p in (changed(reference, change), target))
            return np.abs(np.subtract(*pictures)).mean()

        assert difference(change) < 0.2 * difference(NO_CHANGE)


def test_what_is_learned_from_is_what_was_cut(photos):
    """Also of a photograph with a profile, which is applied neither when it is cut nor after."""
    (page,) = (file for file in make_dataset.find_pictures("validation") if file.stem == "page")
    assert Image.open(page).info["icc_profile"]
    for file in (photos / "a.png", page):
        reference, target, _ = draw_pair(random.Random(1), [file], 32, choose_changes(["rotation"]))
        row = Row((0.0,), target, "", reference)
        assert [own.tobytes() for own in row.load()] == [target.tobytes(), reference.tobytes()]


def test_exposure_multiplies_light(photos):
    ranges = choose_changes({"exposure": [-1, -1]})
    reference, target, _ = draw_pair(random.Random(1), sorted(photos.glob("*.*")), 64, ranges)
    light = [(np.asarray(picture, float) / 255) ** 2.2 for picture in (reference, target)]
    inner = (light[0] > 0.05) & (light[0] < 0.9)
    assert np.median(light[1][inner] / light[0][inner]) == pytest.approx(0.5, abs=0.03)


def test_a_target_alone_does_not_tell_the_exposure(photos):
    """Its reference was exposed at random before."""
    drawn = [
        draw_pair(random.Random(i), sorted(photos.glob("*.*")), 16, choose_changes(["exposure"])) for i in range(60)
    ]
    light = np.array([np.asarray(target).mean() for _, target, _ in drawn])
    ratio = np.log([np.asarray(t).mean() / np.asarray(r).mean() for r, t, _ in drawn])
    change = [change["exposure"] for *_, change in drawn]
    assert abs(np.corrcoef(ratio, change)[0, 1]) > 0.95 > 0.9 > abs(np.corrcoef(light, change)[0, 1])


def test_a_full_turn_of_a_reference_has_no_seam():
    """Latents move as the turn says, the same on both sides of half a turn."""
    hint, half = ReferenceHint(2, 16, (8, 8), 4, goes_round=True), 0.5**0.5
    with torch.no_grad():
        hint.mlp[-1].weight.zero_()
        hint.mlp[-1].bias[:6] = torch.tensor([-1.0, 0, 0, 0, -1, 0])
        hint.generators.weight[:] = half * torch.tensor([[0, 1], [-1, 0], [0, 0], [1, 0], [0, 1], [0, 0]])
        degrees = torch.tensor([[30.0], [179.999], [180.001], [300.0]])
        positions, *_ = hint.motion(encode(degrees, [0.0], [1.0], [360.0]), 9, 9)
    sin, cos = degrees.deg2rad().sin()[:, 0], degrees.deg2rad().cos()[:, 0]
    torch.testing.assert_close(positions[:, :, 4, 8], torch.stack([4 + 4 * cos, 4 + 4 * sin], 1))


def test_a_change_and_its_inverse_are_no_change():
    change = {"rotation": 7.0, "zoom": 1.2, "shift x": 0.1, "shift y": -0.05, "exposure": 0.5, "blur": 0.0}
    assert compose(change, inverse(change)) == pytest.approx(NO_CHANGE, abs=1e-12)
    assert compose(NO_CHANGE, change) == pytest.approx(change) and compose(change, NO_CHANGE) == pytest.approx(change)
    assert inverse({"exposure": 0.5, "tilt": 2.0}) == {"exposure": -0.5, "tilt": -2.0}
    round_about = {"hour": 10.0}
    assert compose({"hour": 4.0, "tilt": 4.0}, {"hour": 5.0, "tilt": 5.0}, round_about) == {"hour": -1.0, "tilt": 9.0}
    assert inverse({"hour": 9.0}, round_about) == {"hour": 1.0}


def test_views_of_one_reference(photos):
    """The change from one to another is the way back from the first and then to the second."""
    ranges = choose_changes({"rotation": [-5, 5], "shift x": [-0.05, 0.05]})
    reference, views = draw_views(random.Random(2), [photos / "a.png"], 96, ranges, 2)
    (one, first), (other, second) = views
    middle = slice(20, 76)

    def difference(*pictures):
        return np.abs(np.subtract(*(np.asarray(p, float)[middle, middle] for p in pictures))).mean()

    assert difference(changed(reference, second), other) < 0.2 * difference(reference, other)
    assert difference(changed(one, compose(inverse(first), second)), other) < 0.2 * difference(one, other)


def test_changes_after_each_other_compose(photos):
    first = NO_CHANGE | {"rotation": 6.0, "shift x": 0.08}
    second = NO_CHANGE | {"zoom": 1.2, "rotation": 3.0, "blur": 1.0}
    whole = compose(first, second)
    assert whole["rotation"] == pytest.approx(9) and whole["shift x"] == pytest.approx(
        1.2 * 0.08 * math.cos(math.radians(3))
    )
    assert compose({"blur": 3.0}, {"blur": 4.0}) == {"blur": 5.0}
    picture = Image.open(photos / "a.png").crop((0, 0, 128, 128))
    middle = slice(40, 88)
    step, once = changed(changed(picture, first), second), changed(picture, whole)
    pictures = [np.asarray(p, float)[middle, middle] for p in (step, once, picture)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.1 * np.abs(pictures[0] - pictures[2]).mean()


def test_item_of_a_killed_run_is_what_it_would_have_been(photos, base, monkeypatch):
    monkeypatch.setattr("cldm.pairs.POOL", 3)
    monkeypatch.setattr("cldm.pairs.PASSES", 2)

    def make(seed=0):
        return FreshPairs(sorted(photos.glob("*.*")), choose_changes(["zoom"]), base, IMAGE_SIZE, seed)

    def same(a, b):
        return all(torch.equal(a[key], b[key]) for key in a)

    whole, resumed, other = make(), make(), make(1)
    items = [whole[i] for i in range(12)]
    assert all(same(items[i], resumed[i]) for i in range(8, 12)) and not same(items[0], other[0])
    assert len({item["control"].item() for item in items}) > 3  # of two pools
    assert items[0]["reference"].shape == items[0]["latents"].shape == (CHANNELS, LATENT_SIZE, LATENT_SIZE)


@pytest.mark.parametrize(
    "controls",
    [["tilt"], [], 5, "rotation", *({"rotation": bounds} for bounds in ([5], [5, -5], 5, ["a", "b"], [0, math.inf]))]
    + [{"zoom": [0, 1]}, {"blur": [-2, 2]}],
)
def test_changes_that_are_none_are_named(controls):
    with pytest.raises(InputError, match="controls"):
        choose_changes(controls)


def test_bilinear_samples_are_torchs(normal):
    features, positions = normal(2, 3, 5, 7), 4 * normal(2, 2, 4, 6) + 2
    size = torch.tensor([7, 5])[:, None, None]
    grid = ((2 * positions + 1) / size - 1).movedim(1, 3)
    expected = F.grid_sample(features, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(sample_bilinear(features, positions), expected)


def test_motions_that_are_not_finite_are_told_by_what_they_move():
    """So that the loss is found out, and no index."""
    positions = torch.full((1, 2, 4, 4), torch.nan)
    assert sample_bilinear(torch.ones(1, 3, 8, 8), positions).isnan().all()
    assert sample_bilinear(torch.ones(1, 3, 8, 8), positions.fill_(torch.inf)).eq(1).all()


def test_generators_move_the_reference():
    """A quarter turn takes a corner to the next; a shift is in half sides."""
    motion = torch.zeros(2, 3, 3)
    motion[0, 0, 1], motion[0, 1, 0], motion[1, 0, 2] = math.pi / 2, -math.pi / 2, 0.25
    turned, moved = ReferenceHint.positions(torch.linalg.matrix_exp(motion), 8, 8)
    torch.testing.assert_close(turned[:, 0, 7], torch.tensor([0.0, 0.0]), atol=1e-5, rtol=0)  # a corner, to the next
    torch.testing.assert_close(moved[:, 3, 2], torch.tensor([3.0, 3.0]))


def test_the_reference_is_moved_onto_the_target_without_a_start(make_model, normal):
    """The first number turns by as many degrees, the second moves nothing."""
    model = make_model(2, "reference")
    low, high = [-10.0, -1.0], [10.0, 1.0]
    names = dict(control_mean=[0.0, 0.0], control_std=[5.0, 0.5])
    model.control_net.register_to_config(control_low=low, control_high=high, **names)
    hint = model.control_net.controlnet_cond_embedding
    for weights in (*hint.mlp[-1].parameters(), hint.generators.weight):
        weights.data.zero_()
    hint.generators.weight.data[1, 0], hint.generators.weight.data[3, 0] = math.radians(5), -math.radians(5)
    reference = F.interpolate(normal(3, CHANNELS, 8, 8), size=(32, 32), mode="bicubic")
    truth = torch.tensor([[7.0, 0.3], [-4.0, -0.9], [0.5, 0.5]])
    positions, _, _ = hint.motion(model.control_net.normalize(truth), 32, 32)
    target = sample_bilinear(reference, positions)
    moving, bounds = find_moving(model.control_net, (32, 32)), torch.tensor([low, high]).double()
    assert moving.tolist() == [True, False]
    target = Target(torch.zeros(3, 77, 16), target, reference)
    places, index = match_reference(model, target, fill_range(MATCHES, bounds, moving), moving, bounds)
    assert index.unique().tolist() == [0, 1, 2] and not places[:, 1].any()
    for i in range(3):
        assert places[index == i][0, 0].item() == pytest.approx(truth[i, 0].item(), abs=0.05)


@pytest.mark.parametrize("fusion, moves", [("attention", False), ("affine", True), ("both", True)])
def test_only_what_is_fused_by_motion_moves(make_model, fusion, moves):
    """A fresh hint's motion is small, but not nothing; with attention alone it acts on nothing."""
    model = make_model(1, "reference", fusion=fusion)
    model.control_net.register_to_config(control_low=[-1.0], control_high=[1.0])
    model.control_net.controlnet_cond_embedding.mlp[-1].weight.data *= 100
    assert find_moving(model.control_net, (32, 32)).tolist() == [moves]


def test_where_nothing_moves_a_reading_takes_a_step_from_what_is_proposed(make_model, normal, monkeypatch):
    """The last number goes round, and its proposal lies beyond its circle; the first is known, the second too large."""
    model = make_model(3, "reference", proposals=1, periods=[None, None, 360.0])
    bounds = dict(control_low=[-10.0, -1.0, 0.0], control_high=[10.0, 1.0, 360.0])
    model.control_net.register_to_config(control_mean=[0.0, 0.0, 180.0], control_std=[5.0, 0.5, 104.0], **bounds)
    said, starts = torch.tensor([[9.0, 3.0, -20.0], [1.0, 0.5, 40.0]], dtype=torch.float64), []

    def solve(objective, control, index, bounds, **options):
        starts.append((control, index, options))
        return levenberg_marquardt(objective, control, index, bounds, **options)

    monkeypatch.setattr(Proposal, "moments", lambda *_: (said, torch.ones_like(said)))
    monkeypatch.setattr("cldm.reading.find_moving", lambda *_: torch.zeros(3).bool())
    monkeypatch.setattr("cldm.reading.levenberg_marquardt", solve)
    target = Target(torch.zeros(2, 77, 16), normal(2, CHANNELS, 8, 8), normal(2, CHANNELS, 8, 8))
    reading = read_controls(model, target, {"control 1": 2.5}, draws=2)
    ((control, index, options),) = starts
    assert control.tolist() == [[2.5, 1 + 2 * BEYOND, 340], [2.5, 0.5, 40]] and index.tolist() == [0, 1]
    assert options == {"iterations": 1} and reading.iterations.tolist() == [1, 1]
    assert reading.control.tolist() == [[2.5, 3, 340], [2.5, 0.5, 40]]  # until calibration knows how far to trust it
    assert "outside_range" in reading.flags[0] and "outside_range" not in reading.flags[1]


def test_where_the_reference_moves_a_reading_settles_from_what_is_proposed(make_model, normal, monkeypatch):
    """Even where what moves it is known; until calibration, what is proposed counts."""
    model, solved = make_model(2, "reference", proposals=1), []
    model.control_net.register_to_config(control_low=[-10.0, -1.0], control_high=[10.0, 1.0])
    said = torch.tensor([[9.0, 0.8]], dtype=torch.float64)

    def solve(objective, control, *rest, **options):
        solved.append((control, options))
        return levenberg_marquardt(objective, control, *rest, **options)

    monkeypatch.setattr(Proposal, "moments", lambda *_: (said, torch.ones_like(said)))
    monkeypatch.setattr("cldm.reading.find_moving", lambda *_: torch.tensor([True, False]))
    monkeypatch.setattr("cldm.reading.levenberg_marquardt", solve)
    target = Target(torch.zeros(1, 77, 16), normal(1, CHANNELS, 8, 8), normal(1, CHANNELS, 8, 8))
    for known in {}, {"control 1": 9.0}:
        solved.clear()
        reading = read_controls(model, target, known, draws=2)
        (start, options), robust = solved
        assert torch.equal(start, said) and options == {} and [*robust[1]] == ["scale"]
        assert reading.others == [[]] and torch.equal(reading.control, said)
        assert not torch.equal(reading.lowest, said)


def test_a_proposal_compares_places(normal):
    """A moved picture is most like the reference at the place that it was moved from, and nothing lies beyond it."""
    reference = normal(2, 16, 6, 7)
    target = reference.roll((1, -2), (2, 3))  # down and to the left
    near = compare(target, reference, 2, 4).unflatten(2, (9, 9))
    torch.testing.assert_close(near[:, :, 3, 6, 1:, :-2], torch.ones(2, 2, 5, 5))
    assert not near[:, :, 0, :, :4].any() and near.abs().max() <= 1 + 1e-6
    assert (near.flatten(2, 3).argmax(2)[..., 1:, :-2] == 3 * 9 + 6).all()


@pytest.mark.parametrize("side", [2, 9, 25, 32, 64])
def test_a_proposal_takes_latents_of_any_size(make_model, normal, side):
    net = make_model(2, "reference", proposals=3, flows=True).control_net
    weights, mean, std = net.proposal(normal(2, CHANNELS, side, side), normal(2, CHANNELS, side, side))
    assert weights.shape == (2, 3) and mean.shape == std.shape == (2, 3, 2) and std.min() > 0


def test_a_place_is_hidden_in_both_pictures_of_some_rows(normal):
    latents, noise = normal(200, 2, 3, 16, 8), normal(200, 2, 3, 16, 8)
    hidden = hide(latents, noise, torch.rand(200, 5, generator=torch.Generator().manual_seed(0)))
    gone = hidden != latents
    assert torch.equal(hidden[gone], noise[gone])
    assert (gone == gone[:, :1, :1]).all()  # alike in all channels of both
    gone = gone[:, 0, 0]
    assert 0.4 < gone.any(2).any(1).float().mean() < 0.6
    for one in gone[gone.any(2).any(1)]:
        sides = [one.any(1 - axis).nonzero() for axis in (0, 1)]
        tall, wide = (side.max() - side.min() + 1 for side in sides)
        assert one.sum() == tall * wide and 2 <= tall <= 8 and 1 <= wide <= 4


@pytest.fixture
def nearly(make_model, photos):
    """nearly(names) -> a control's config, a pair, its change, and a Reading of it that is off by 2% of each range."""

    def make(names):
        ranges = choose_changes(names)
        reference, target, change = draw_pair(random.Random(4), [photos / "a.png"], 96, ranges)
        control_net = make_model(len(names), "reference").control_net
        units = [CHANGES[name][0] for name in names]
        learned = dict(fit_scale=[1.0] * len(names), fit_floor=[0.0] * len(names))
        learned |= dict(zip(("control_low", "control_high"), map(list, zip(*ranges.values()))))
        control_net.register_to_config(control_names=names, control_units=units, **learned)
        width = torch.tensor([high - low for low, high in ranges.values()]).double()
        truth = torch.tensor([[change[name] for name in names]]).double()
        covariance = torch.diag((0.02 * width).square())[None]
        learned = torch.ones(len(names)).double(), torch.zeros(len(names)).double()
        reading = Reading(truth + 0.02 * width, 0 * covariance, covariance, *[None] * 3, [[]], *learned)
        return control_net.config, [(target, reference)], truth, reading

    return make


@pytest.mark.parametrize("names", [["exposure", "rotation"], list(CHANGES)], ids=["two", "six"])
def test_pixels_give_the_last_digits(nearly, names):
    config, pictures, truth, reading = nearly(names)
    assert has_formula(config)
    fitted = refine_reading(reading, pictures, config)
    before, after = ((own.control - truth).abs()[0] for own in (reading, fitted))
    assert (after[:5] < 0.25 * before[:5]).all()
    assert (fitted.std < 0.2 * reading.std).all() and torch.equal(fitted.lowest, reading.control)
    known = refine_reading(reading, pictures, config, names[:1])
    assert known.control[0, 0] == reading.control[0, 0] and known.std[0, 0] == reading.std[0, 0]
    assert refine_reading(reading, pictures, config, names) is reading  # all is known
    config.fit_scale = None
    assert refine_reading(reading, pictures, config) is reading


@pytest.mark.parametrize("name, low, high, truth", [("shift x", -0.25, 0.25, 0.18), ("exposure", -2, 2, 1.75)])
def test_a_fit_looks_where_the_control_was_trained(nearly, photos, name, low, high, truth):
    config, _, _, reading = nearly([name])
    reference, target, _ = draw_pair(random.Random(4), [photos / "a.png"], 96, {name: (truth, truth)})
    near = replace(reading, control=torch.tensor([[truth - 0.002 * (high - low)]]).double())
    config.control_low, config.control_high = [low], [high]
    assert refine_reading(near, [(target, reference)], config).control.item() == pytest.approx(truth, abs=0.002)
    config.control_low, config.control_high = [low / 5], [high / 5]  # the fit ends on a bound, and is left out
    assert torch.equal(refine_reading(near, [(target, reference)], config).control, near.control)


@pytest.mark.parametrize("most, before, after", [(0.3, [], ["outside_range"]), (0.5, ["outside_range"], [])])
def test_the_range_is_judged_by_what_the_fit_found(nearly, photos, most, before, after):
    """Truth is 0.4, which is what was read, give or take 0.07."""
    config, _, _, reading = nearly(["exposure"])
    reference, target, _ = draw_pair(random.Random(4), [photos / "a.png"], 96, {"exposure": (0.4, 0.4)})
    reading = replace(reading, control=torch.tensor([[0.4]]).double(), flags=[[*before, "ambiguous"]])
    config.control_low, config.control_high = [-1.0], [most]
    assert refine_reading(reading, [(target, reference)], config).flags == [[*after, "ambiguous"]]
    assert reading.flags == [[*before, "ambiguous"]]


def test_a_fit_that_goes_elsewhere_is_left_out(nearly, monkeypatch):
    config, pictures, _, reading = nearly(["rotation"])
    for far, loss in ((2.5, 0.1), (0.0, math.inf)):
        found = NO_CHANGE | {"rotation": reading.control.item() + far}, loss, 1e-9 * np.eye(6)
        monkeypatch.setattr(Fit, "solve", Mock(return_value=found))
        kept = refine_reading(reading, pictures, config)
        assert torch.equal(kept.control, reading.control) and torch.equal(kept.std, reading.std)


def test_a_formula_knows_numbers_by_name_and_unit(nearly):
    config, *_ = nearly(["rotation", "zoom"])
    config.absolute = [True, False]
    assert not has_formula(config)
    for names, units in (["rotation", "zoom"], ["radians", "ratio"]), (["control 1", "size"], ["", ""]):
        config.absolute, config.control_names, config.control_units = None, names, units
        assert not has_formula(config)


def test_what_pixels_do_not_show_is_as_unsure_as_its_range_is_wide():
    """Nothing in the dark; of upright stripes, no shift along them."""
    stripes = np.tile(np.sin(np.arange(32)[None, :, None]) * 100 + 128, (32, 1, 3)).astype(np.uint8)
    for pixels, unseen in (np.zeros_like(stripes), NAMES), (stripes, ["shift y"]):
        picture = Image.fromarray(pixels)
        _, _, covariance = Fit(picture, picture).solve(NO_CHANGE | {"blur": 0.3}, NAMES)
        shares = dict(zip(NAMES, np.sqrt(covariance.diagonal()) / WIDTHS))
        assert min(shares[name] for name in unseen) > 0.1  # bar rounding
    assert shares["shift x"] < 0.01


def test_known_numbers_are_kept_and_the_others_read(paired, photos, tmp_path, capsys):
    pair = [f"input_image_path={photos / 'a.png'}", f"target_image_path={photos / 'b.jpg'}", "prompt="]
    arguments = [f"model_path={paired}", *pair, f"out_dir={tmp_path / 'out'}"]
    run_script(invert.main, invert.settings, [*arguments, "known=exposure=0.25"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["control"][1] == 0.25 and result["std"][1] == 0 and result["std"][0] > 0
    printed = capsys.readouterr().out.splitlines()
    first, second = (line for line in printed if line.startswith(tuple(result["names"])))
    assert " ± " in first and second.endswith("+0.250 stops (given)")
    assert result["covariance"][0][0] == pytest.approx(result["std"][0] ** 2) and result["covariance"][0][1] == 0
    run_script(invert.main, invert.settings, arguments)
    free = json.loads((tmp_path / "out" / "result.json").read_text())
    covariance = free["covariance"]
    assert free["loss"] <= result["loss"] * 1.001 and covariance[0][1] == pytest.approx(covariance[1][0]) != 0


def test_pictures_of_unlike_shapes_are_named_and_flagged(paired, picture, tmp_path, capsys):
    wide, out = Image.open(picture).resize((48, 32)), f"out_dir={tmp_path / 'out'}"
    wide.save(tmp_path / "wide.png")
    pair = [f"input_image_path={picture}", f"target_image_path={tmp_path / 'wide.png'}"]
    run_script(invert.main, invert.settings, [f"model_path={paired}", *pair, out])
    printed = capsys.readouterr().out
    assert "pictures of 48 x 32 cut to their middle squares and resized to 32 x 32\n" in printed
    assert "A of 32 x 32 and B of 48 x 32 differ in shape" in printed and "by up to 0.250 widths" in printed
    assert "unlike_shapes" in json.loads((tmp_path / "out" / "result.json").read_text())["flags"]


@pytest.mark.parametrize(
    "known, message",
    [
        ("tilt=1", "tilt"),
        ("exposure=x", "exposure=x"),
        ("exposure", "name=number"),
        ("rotation=0,exposure=0", "all of"),
        ("zoom=0", "above 0"),
    ],
)
def test_known_numbers_that_are_none_are_named(paired, picture, tmp_path, fails_in_one_line, known, message):
    pair = [f"input_image_path={picture}", f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    model = load_model(paired)
    model.control_net.register_to_config(control_names=["rotation", "zoom" if "zoom" in known else "exposure"])
    save_model(model, paired)
    arguments = [f"model_path={paired}", *pair, f"known={known}"]
    assert message in fails_in_one_line(invert.main, invert.settings, arguments)


def test_a_reference_is_asked_for_and_refused_where_it_has_no_place(
    paired, make_model, picture, tmp_path, fails_in_one_line
):
    arguments = [f"target_image_path={picture}", f"out_dir={tmp_path / 'out'}"]
    line = fails_in_one_line(invert.main, invert.settings, [f"model_path={paired}", *arguments])
    assert "input_image_path" in line
    plain = make_model()
    plain.control_net.register_to_config(control_low=[-1.0], control_high=[1.0])
    save_model(plain, tmp_path / "plain")
    arguments += [f"model_path={tmp_path / 'plain'}", f"input_image_path={picture}"]
    assert "takes no reference" in fails_in_one_line(invert.main, invert.settings, arguments)


def test_rows_that_lack_a_reference_are_named(paired, write_dataset, tmp_path, fails_in_one_line):
    arguments = [f"model_path={paired}", f"targets={write_dataset([1, 2]) / 'prompt.json'}"]
    line = fails_in_one_line(invert.main, invert.settings, [*arguments, f"out_dir={tmp_path / 'out'}"])
    assert 'prompt.json line 1 has no "reference"; every row needs one' in line


def test_rows_with_and_without_a_reference_do_not_mix(photos, tmp_path):
    row = {"source": 1, "target": str(photos / "a.png"), "prompt": ""}
    file = tmp_path / "prompt.json"
    file.write_text("\n".join(map(json.dumps, [row | {"reference": str(photos / "b.jpg")}, row])))
    with pytest.raises(InputError, match='line 2: has no "reference"'):
        read_rows(file)


@pytest.fixture
def train(base_yaml, tmp_path, monkeypatch):
    """train(*arguments) -> out_dir, after 4 steps of two pairs."""
    monkeypatch.setattr("cldm.report.DRAWN", Sampling(2))

    def run(*arguments):
        own = [f"base={base_yaml}", f"out_dir={tmp_path / 'out'}", "batch_size=2", "max_steps=4"]
        own += ["logger_freq=2", "precision=32-true", "accelerator=cpu", "devices=1"]
        s = override(tutorial_train.settings, [*own, *arguments])
        tutorial_train.main(s)
        return find_path(s.out_dir)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [[], ["fusion=both", "modulated=true", "proposals=2", "proposal_steps=2"]], ids=["affine", "both"]
)
def test_from_pictures_to_a_reading(photos, train, tmp_path, monkeypatch, way):
    """Fresh pairs in training, stopped and gone on with; pairs on disk, for training, reading and test5."""
    monkeypatch.setattr("cldm.pairs.POOL", 4)
    monkeypatch.setattr("cldm.pairs.VALIDATION_PAIRS", 6)
    controls = ["controls={rotation: [-5, 5], exposure: [-1, 1]}"]
    with monkeypatch.context() as patched:
        patched.setattr(tutorial_train, "finish", lambda *_: None)
        whole = train(f"pairs={photos}", *controls, *way, f"out_dir={tmp_path / 'whole' / 'out'}")
        send(signal.SIGTERM, 3, patched)
        with pytest.raises(SystemExit):
            train(f"pairs={photos}", *controls, *way)
    seen, item = [], FreshPairs.__getitem__
    monkeypatch.setattr(FreshPairs, "__getitem__", lambda pairs, i: seen.append(i) or item(pairs, i))
    folder = train(f"pairs={photos}", *controls, *way)
    states = [trained_state(path) for path in (whole, folder)]
    assert seen == [6, 7] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    config = load_model(folder).control_net.config
    assert list(config.control_names) == ["rotation", "exposure"] and list(config.control_units) == ["degrees", "stops"]
    assert config.control_low == [-5, -1] and config.control_high == [5, 1] and config.error_scale is not None
    assert config.explained_loss is None  # of pairs, the share that is left tells
    assert load_model(folder).control_net.controlnet_cond_embedding.generators.weight.any()

    again = train(f"pairs={photos}", *controls, f"resume_path={folder}", f"out_dir={tmp_path / 'again'}", "max_steps=1")
    before, after = ((path / "diffusion_pytorch_model.safetensors").read_bytes() for path in (folder, again))
    assert before != after
    with pytest.raises(InputError, match="on rotation degrees, exposure stops, the data has zoom ratio, blur pixels"):
        train(f"pairs={photos}", "controls=[zoom, blur]", f"resume_path={folder}", f"out_dir={tmp_path / 'other'}")

    s = override(make_dataset.settings, ["pairs=5", f"photos={photos}", *controls, "image_size=32"])
    s.out_dir = str(tmp_path / "pairs")
    make_dataset.main(s)
    rows = read_rows(tmp_path / "pairs" / "prompt.json")
    assert len(rows) == 5 and all(abs(row.control[0]) <= 5 and row.reference.is_file() for row in rows)
    disk = train(f"data_root={tmp_path / 'pairs'}", *way, f"out_dir={tmp_path / 'disk'}")
    targets = f"targets={tmp_path / 'pairs' / 'prompt.json'}"
    out = f"out_dir={tmp_path / 'read'}"
    run_script(invert.main, invert.settings, [f"model_path={disk}", targets, out, "known=exposure=0"])
    results = [json.loads(line) for line in (tmp_path / "read" / "results.jsonl").read_text().splitlines()]
    assert [result["reference"] for result in results] == [str(row.reference) for row in rows]
    assert all(len(result["error"]) == 2 for result in results)

    pair = [f"input_image_path={rows[0].reference}", f"target_image_path={rows[0].target}", "prompt="]
    arguments = [f"model_path={disk}", *pair, f"out_dir={tmp_path / 'test5'}", "control=[1,0]"]
    run_script(test5.main, test5.settings, [*arguments, "iterations=2", "ddim_steps=2"])
    assert len(json.loads((tmp_path / "test5" / "result.json").read_text())["control"]) == 2


def test_pairs_that_cannot_be_cut_are_named(photos, base_yaml, control_folder, tmp_path, fails_in_one_line):
    arguments = [f"pairs={photos}", f"out_dir={tmp_path / 'out'}"]
    more = [f"resume_path={control_folder}", "controls=[rotation]"]
    line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, [*arguments, *more])
    assert "without references, the data has 1 number(s), with references" in line
    line = fails_in_one_line(tutorial_train.main, tutorial_train.settings, [*arguments, "hint=coordinate"])
    assert 'setting "hint": has no effect with references' in line
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = [f"base={base_yaml}", f"pairs={empty}", f"out_dir={tmp_path / 'out'}"]
    assert "no pictures" in fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)
    arguments = [f"base={base_yaml}", f"pairs={tmp_path / 'nowhere'}", f"out_dir={tmp_path / 'out'}"]
    assert "no such folder" in fails_in_one_line(tutorial_train.main, tutorial_train.settings, arguments)


def test_pictures_of_other_kinds_are_not_left_out_silently(photos, capsys):
    good = list_pictures(photos)
    assert not capsys.readouterr().out
    (photos / "x.HEIC").touch()
    assert (
        list_pictures(photos) == good and "1 picture(s) of other kinds are left out (.heic)" in capsys.readouterr().out
    )


def test_photographs_count_once_and_those_of_trainings_not(photos, capsys):
    good = make_dataset.find_pictures(str(photos))
    for name in ("run/pictures/1.png", "early/pictures/1.png"):
        (photos / name).parent.mkdir(parents=True)
        (photos / name).write_bytes((photos / "a.png").read_bytes())
    (photos / "run" / "model.yaml").touch()
    (photos / "early" / "tensorboard").mkdir()
    (photos / "link.png").symlink_to(photos / "a.png")
    assert len(make_dataset.find_pictures(f"{photos},{photos.parent}/./photos")) == len(good) == 3
    assert "pictures of 2 training(s) are left out" in capsys.readouterr().out
    assert len(list_pictures(photos / "run")) == 1  # whoever names it, means it


def test_broken_pictures_are_found_before_the_first_step(photos, tmp_path):
    """Where what a file lacks is at its end, too; what is hidden, or is no file, is no picture."""
    for name in ("._a.png", ".thumbnails/x.png", "__MACOSX/._b.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"no picture")
    (photos / "x.png").mkdir()
    good = list_pictures(photos)
    (photos / "round").symlink_to(photos)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "album").symlink_to(photos)
    assert [file.name for file in list_pictures(tmp_path / "linked")] == [file.name for file in good]
    assert list_pictures(photos) == good
    assert {file.name for file in good} >= {"a.png", "b.jpg"} and all(file.is_file() for file in good)
    ranges = choose_changes(["zoom"])
    read_photos(good, [], ranges, 0)
    for name in ("a.png", "b.jpg"):
        cut = tmp_path / name
        cut.write_bytes((photos / name).read_bytes()[:-400])
        with pytest.raises(InputError, match=f"{name}: damaged or cut off"):
            read_photos(good, [cut], ranges, 0)


def test_a_folder_does_not_hide_the_photographs_of_a_group(tmp_path, monkeypatch):
    known = make_dataset.find_pictures("train")
    (tmp_path / "train").mkdir()
    monkeypatch.chdir(tmp_path)
    assert make_dataset.find_pictures("train") == known and len(known) == 16


def test_training_and_validation_both_have_references_or_neither(photos, tmp_path):
    row = {"source": 1, "target": str(photos / "a.png"), "prompt": ""}
    (tmp_path / "prompt.json").write_text(json.dumps(row | {"reference": str(photos / "b.jpg")}))
    (tmp_path / "validation.json").write_text(json.dumps(row))
    with pytest.raises(InputError, match='validation.json line 1: has no "reference"'):
        split_rows(tmp_path)
