"""Figures say what is what: flags in words, intervals as read, and nothing lies on anything else."""

import math
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from cldm.confidence import FLAGS
from cldm.report import Inversion, draw_inversion, draw_reading, draw_strip

PICTURE = Image.new("RGB", (32, 32), "gray")


@pytest.fixture
def config():
    names, units = ["rotation", "zoom", "shift x", "exposure", "hour"], ["degrees", "ratio", "widths", "stops", "h"]
    ends = dict(control_low=[-10.0, 0.8, -0.1, -1.0, 0.0], control_high=[10.0, 1.25, 0.1, 1.0, 12.0])
    kinds = dict(periods=[None] * 4 + [12.0], absolute=[False] * 4 + [True])
    return SimpleNamespace(control_names=names, control_units=units, hint="dense", **kinds, **ends)


def boxes(figure):
    """Returns: where every text and legend of a rendered figure lies, in pixels; where its axes do."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    ticks = {}
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            own = [tick.label1.get_window_extent(renderer) for tick in axis.get_major_ticks() if axes.axison]
            ticks[axis] = [box for box in own if box.width > 1]  # those beyond the ends of the axis are not drawn
    texts = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    texts += [part._suptitle.get_window_extent(renderer) for part in figure.subfigs if part.get_suptitle()]
    legends = [*figure.legends, *(own for part in figure.subfigs for own in part.legends)]
    legends += [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return ticks, texts, [own.get_window_extent(renderer) for own in legends], [own.bbox for own in figure.axes]


def check_apart(figure):
    ticks, texts, legends, axes = boxes(figure)
    assert not any(a.overlaps(b) for own in [*ticks.values(), texts] for a, b in combinations(own, 2))
    assert not any(legend.overlaps(box) for legend in legends for box in axes)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in [*texts, *legends])


def test_a_reading(config):
    control, margin = torch.tensor([[-4.6, 0.85, 0.06, 0.5, 11.5]]), torch.tensor([[0.2, 0.01, 0.001, 0.3, 1.0]])
    known = dict(control=control, margin=margin, std=margin / 1.645, reach=torch.tensor([[0, 0, 0, 1.5, 0]]))
    known["given"] = control == 0
    reading = SimpleNamespace(flags=[["outside_range", "unexplained"]], calibrated=True, **known)
    points = torch.stack([torch.linspace(low, high, 9) for low, high in [(-17, 17), (0.6, 1.4), (-0.2, 0.2), (-2, 2)]])
    points = torch.cat([points, torch.linspace(5.5, 17.5, 9)[None]])
    profiles = points[None, :, :, None].expand(1, 5, 9, 5), (points - control[0, :, None])[None].abs()
    figure = draw_reading(config, reading, 0, profiles, SimpleNamespace(prompt=""), (PICTURE, PICTURE, PICTURE))
    check_apart(figure)
    assert FLAGS["outside_range"] in figure.subfigs[0].get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title[:2] for title in titles[:3]] == ["A:", "B:", "B "]
    assert titles[-1].startswith("hour of B +11.5") and titles[-2].startswith("exposure +0.5")
    for k, axes in enumerate(axes for axes in figure.axes if axes.containers):
        (bars,) = axes.containers[0].lines[2]
        ends = torch.stack([control[0, k] - margin[0, k], control[0, k] + margin[0, k]])
        assert bars.get_segments()[0][:, 0] == pytest.approx(ends.tolist())
        for compass in axes.child_axes:
            (interval,), (hand,) = compass.patches, compass.lines
            assert hand.get_xdata() == pytest.approx([2 * math.pi * 11.5 / 12] * 2)
            assert [interval.get_x(), interval.get_width()] == pytest.approx([2 * math.pi * 10.5 / 12, math.pi / 3])
    assert [len(axes.child_axes) for axes in figure.axes if axes.containers] == [0, 0, 0, 0, 1]


def test_a_reading_beyond_the_seam_is_drawn_on_its_axis():
    """The lowest loss lies at 11.5 o'clock, what is read with the proposal's help at 0.5."""
    names = dict(control_names=["hour"], control_units=["h"], absolute=None, periods=[12.0])
    config = SimpleNamespace(control_low=[0.0], control_high=[12.0], **names)
    told = dict(control=torch.tensor([[0.5]]), margin=torch.tensor([[0.2]]), std=torch.tensor([[0.1]]))
    told["given"] = torch.tensor([[False]])
    reading = SimpleNamespace(flags=[[]], calibrated=True, reach=torch.zeros(1, 1), **told)
    points = torch.linspace(5.5, 17.5, 9)
    profiles = points[None, None, :, None], (points - 11.5).abs()[None, None]
    figure = draw_reading(config, reading, 0, profiles, SimpleNamespace(prompt=""), (PICTURE, None, PICTURE))
    (axes,) = (axes for axes in figure.axes if axes.containers)
    dot, _, (bars,) = axes.containers[0].lines
    assert dot.get_xydata()[0].tolist() == pytest.approx([12.5, 1]) and axes.get_xlim() == (5.5, 17.5)
    assert bars.get_segments()[0][:, 0] == pytest.approx([12.3, 12.7]) and axes.get_title() == "hour +0.500 ± 0.100 h"


def test_an_inversion_of_several_numbers(config):
    result = Inversion(start=torch.zeros(5), flags=["outside_range", "unsettled"])
    for i in range(8):
        result.add(torch.arange(5) * 0.1 + i, 0.8 * 0.7**i, torch.zeros(1))
    figure = draw_inversion(config, result, *[PICTURE] * 4)
    check_apart(figure)
    assert FLAGS["unsettled"] in figure.subfigs[0].get_suptitle()


def test_long_titles_of_a_strip_stay_apart():
    check_apart(draw_strip({f"rotation -4.59748 degrees, zoom +0.848454 ratio\n{i}.png": PICTURE for i in range(7)}))
