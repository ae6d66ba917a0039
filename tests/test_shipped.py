"""The shipped base and control do what the README says: photographs at angles that training never saw."""

from dataclasses import replace

import pytest
import torch
from PIL import ImageEnhance

import test5
import test5_s1
from cldm.calibration import draw_latents
from cldm.conversion import add_control
from cldm.dataset import read_rows
from cldm.hints import wrap
from cldm.matcher import REACHES, Matcher
from cldm.model import load_base, load_model
from cldm.reading import read_controls
from dataForTrain.make_dataset import HELD_OUT, TRAIN, render_framed
from ldm.files import find_path
from ldm.pictures import load_picture, pictures_to_tensor
from ldm.settings import Settings


@pytest.fixture(scope="module")
def shipped():
    return load_model("models/control_tiny")


def test_angles_are_read_and_flags_raised(shipped):
    targets = [(TRAIN["coffee"], -3.37), (TRAIN["rocket"], 1.61), (TRAIN["camera"], -8.0), (HELD_OUT["gravel"], 1.0)]
    pictures = [render_framed(photo, shipped.config.image_size, angle) for photo, angle in targets]
    found = read_controls(shipped, shipped.encode([photo.prompt for photo, _ in targets], pictures))
    for i in range(2):
        assert found.control[i].item() == pytest.approx(targets[i][1], abs=0.3) and found.flags[i] == []
        assert 0.01 < found.std[i].item() < 0.3
    assert "outside_range" in found.flags[2] and "unexplained" in found.flags[3]


@pytest.mark.slow
def test_four_numbers_are_read_at_once():
    """Rotation (degrees), zoom (ratio), exposure (stops) and blur (pixels) of a view that training never saw."""
    model, control = load_model("models/control_views"), (3.37, 1.1, 0.4, 0.8)
    assert model.control_net.config.control_names == ["rotation", "zoom", "exposure", "blur"]
    picture = render_framed(TRAIN["astronaut"], model.config.image_size, *control)
    found = read_controls(model, model.encode([TRAIN["astronaut"].prompt], [picture]))
    for value, true, near in zip(found.control[0].tolist(), control, (0.5, 0.02, 0.15, 0.4)):
        assert value == pytest.approx(true, abs=near)
    assert found.flags == [[]]


def test_the_meter_draws_what_it_reads():
    """Needles of two dials, one at the seam; the photographs that it was trained on do not ship."""
    model, control = load_model("models/control_meter"), torch.tensor([[9.96], [3.3]]).double()
    picture = render_framed(TRAIN["coffee"], model.config.image_size)  # not looked at
    target = model.encode([f"dial {i} of a water meter" for i in (1, 3)], [picture] * 2)
    drawn = replace(target, latents=draw_latents(model, target, control))
    found = read_controls(model, drawn)
    assert (wrap(found.control - control, model.control_net.config.periods).abs() < 0.2).all()
    assert (found.margin < 0.6).all()


def test_the_change_between_two_pictures_is_read():
    """Six numbers of a photograph that no training has seen."""
    model, (row,) = load_model("models/control_tiny_pair"), read_rows(find_path("dataForTrain/demo/prompt.json"))
    found = read_controls(model, model.encode([""], [load_picture(row.target)], [load_picture(row.reference)]))
    for value, true, near in zip(found.control[0].tolist(), row.control, (0.3, 0.01, 0.005, 0.005, 0.15, 0.3)):
        assert value == pytest.approx(true, abs=near)
    assert found.flags == [[]]


def test_a_thing_never_seen_is_read_within_its_intervals():
    """How it turned, and the camera moved, and where its lamp stands: rendered, of the demo."""
    model, (row,) = load_model("models/control_things"), read_rows(find_path("dataForTrain/demo/things/prompt.json"))
    found = read_controls(model, model.encode([""], [load_picture(row.target)], [load_picture(row.reference)]))
    error = wrap(found.control[0] - torch.tensor(row.control), model.control_net.config.periods).abs()
    assert (error <= found.margin[0]).all() and found.flags == [[]]
    for own, most in zip(found.margin[0].tolist(), (30, 8, 0.15, 45, 25)):
        assert own < most


def test_the_matcher_finds_what_moved():
    """Two crops of a photograph that it never saw: what B, darker, shows lies 12 pixels to the right in A, 4 above."""
    base, config = load_base("models/tiny.yaml")
    photo = render_framed(HELD_OUT["gravel"], 144)
    reference, target = (photo.crop((x, y, x + 128, y + 128)) for x, y in ((0, 4), (12, 0)))
    pictures = [reference, ImageEnhance.Brightness(target).enhance(0.7)]
    latents = base.encode(pictures_to_tensor(pictures))
    matcher = add_control(base, config, hint="reference", proposals=1, flows=True).control_net.proposal
    with torch.no_grad():
        fine, coarse = matcher.compare(*(matcher.encode(own[None]) for own in latents.flip(0)))
    for logits, reach, places, near in ((fine, REACHES[0], 32, 2), (coarse, REACHES[1], 16, 5)):
        right, down = Matcher.flow(logits.mean(1, keepdim=True), reach)[0, :, 4:-4, 4:-4].flatten(1) * reach
        moved = [way.median().item() * 128 / places for way in (right, down)]
        assert moved == pytest.approx([12, -4], abs=near)


@pytest.mark.slow
def test_known_numbers_are_kept_and_other_pictures_flagged():
    model, (row,) = load_model("models/control_tiny_pair"), read_rows(find_path("dataForTrain/demo/prompt.json"))
    other = render_framed(HELD_OUT["gravel"], model.config.image_size)
    target = model.encode(["", ""], [load_picture(row.target), other], [load_picture(row.reference)] * 2)
    assert "unexplained" in read_controls(model, target.select(slice(1, 2))).flags[0]
    zoom, shift_x, shift_y, exposure, blur = row.control[1:]
    known = {"zoom": zoom, "shift x": shift_x, "shift y": shift_y, "exposure": exposure, "blur": blur}
    alone = read_controls(model, target.select(slice(1)), known)
    assert alone.control[0, 0].item() == pytest.approx(row.control[0], abs=0.2) and alone.flags == [[]]


@pytest.mark.slow
def test_warm_started_descent_arrives(shipped):
    """From -4 toward +2, as test5_s1.py does; half as many samples, for time."""
    s = Settings({**test5_s1.settings, "num_samples": 2})
    start, target = (render_framed(TRAIN["astronaut"], shipped.config.image_size, angle) for angle in (-4, 2))
    start, target = (shipped.encode([TRAIN["astronaut"].prompt], [picture]) for picture in (start, target))
    result = test5.infer(shipped, s, start.latents, target, torch.tensor([-4.0]).double())
    assert result.control.item() == pytest.approx(2, abs=0.3) and len(result.history) < 20
