"""The curve of many readings: in order, continued across the seam of a periodic number, thinned where they are many."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from matplotlib.dates import date2num

from cldm.confidence import Z90
from cldm.series import BINS, POINTS, Series, draw_series, thin, unroll
from ldm.schema import Settings

START = datetime(2019, 6, 21, 14, tzinfo=UTC)
FLOW = np.array([0.0, 2.0, 4.5, 6.0, 8.9, 11.0, 12.5, 12.4, 15.0])  # litres, of which a dial shows the last digit


def gather(controls, periods=(10,), flagged=(), minutes=None, prompts=None):
    """Returns: the Series of readings (n, d), None where nothing was read, give or take 0.5; at minutes from START.

    prompts: of each.
    """
    names, units = [f"number {k}" for k in range(len(periods))], ["l"] * len(periods)
    series = Series(Settings(control_names=names, control_units=units, periods=list(periods)))
    for i, control in enumerate(controls):
        result = dict(control=control, std=None, flags=["ambiguous"] * (i in flagged))
        if control is None:
            result |= dict(flags=["unreadable"], problem="no such file")
        else:
            result |= dict(std=[0.5 / Z90] * len(control), iterations=3, model_calls=4, seconds=1)
        if minutes is not None:
            result["time"] = (START + timedelta(minutes=minutes[i])).isoformat()
        if prompts is not None:
            result["prompt"] = prompts[i]
        series.add(result)
    return series


def drawn(axes):
    """Returns: {the first word after the count in a legend's label: its marker line, its bars (n, 2, 2)}."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container
        found[container.get_label().split()[1].strip(":")] = line, np.array(bars.get_segments())
    return found


def test_a_periodic_number_goes_on_across_its_seam():
    assert unroll(FLOW % 10, np.ones(9, bool), 10) == pytest.approx(FLOW)
    assert unroll(-FLOW % 10, np.ones(9, bool), 10) == pytest.approx(-FLOW)


def test_nothing_is_continued_from_what_cannot_be_trusted():
    """Half a turn off and back again would make the curve lose a turn."""
    values, trusted = FLOW % 10, np.ones(9, bool)
    trusted[[2, 5]], values[[2, 5]] = False, (0.5, 9.0)
    path = unroll(values, trusted, 10)
    assert path[trusted] == pytest.approx(FLOW[trusted])
    assert path[~trusted] == pytest.approx([0.5, 9.0])  # the nearest to 2 and to 8.9
    assert unroll(FLOW % 10, np.zeros(9, bool), 10) == pytest.approx(FLOW)


def test_many_readings_are_drawn_as_medians():
    x, noise = np.arange(50.0 * BINS), np.random.default_rng(0).uniform(-1, 1, 50 * BINS)
    few = x[:POINTS], noise[:POINTS], np.zeros(POINTS)
    assert all(np.allclose(own, given) for own, given in zip(thin(*few), few))
    where, middle, bars = thin(x, x + noise, np.zeros(len(x)))
    assert len(where) == BINS and np.allclose(where, np.arange(BINS) * 50 + 24.5, atol=1)
    assert np.allclose(middle, where, atol=1) and np.allclose(bars, 22.5, atol=3)  # 45% of 50, up and down
    same, *_ = thin(np.ones(2 * POINTS), noise[: 2 * POINTS], np.zeros(2 * POINTS))
    assert same == [1.0]


def test_the_curve_is_in_the_order_of_time_and_flags_are_marked():
    order = [3, 0, 8, 1, 2, 7, 6, 5, 4]
    controls = [[FLOW[i] % 10, float(i)] for i in order]
    controls[2] = None  # the last
    figure = draw_series(gather(controls, (10, None), flagged=[order.index(5)], minutes=order))
    dial, ordinary = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["number 0 (l)\nturns added up", "number 1 (l)"]
    assert ordinary.get_xlabel() == "time (UTC)"
    marks = drawn(dial)
    (read, bars), (flagged, _) = marks["readings"], marks["flagged"]
    assert any("1 flagged (1 ambiguous)" in text.get_text() for text in figure.legends[0].get_texts())
    kept = [0, 1, 2, 3, 4, 6, 7]
    assert np.allclose(date2num(read.get_xdata()), date2num([START + timedelta(minutes=i) for i in kept]))
    assert read.get_ydata() == pytest.approx(FLOW[kept]) and flagged.get_ydata() == pytest.approx(FLOW[[5]])
    assert bars[:, :, 1] == pytest.approx(FLOW[kept][:, None] + [[-0.5, 0.5]], abs=1e-5)
    assert drawn(ordinary)["readings"][0].get_ydata() == pytest.approx(kept)
    assert read.get_color() != flagged.get_color() and read.get_marker() != flagged.get_marker()
    (unread,) = (line for line in dial.lines if line.get_label() == "1 unreadable")
    assert np.allclose(date2num(unread.get_xdata()), date2num(START + timedelta(minutes=8)))


def test_without_times_the_curve_is_over_rows():
    figure = draw_series(gather([[5.0], None, [6.0]], periods=(None,)))
    assert figure.axes[0].get_xlabel() == "row"
    assert list(drawn(figure.axes[0])["readings"][0].get_xdata()) == [1, 3]


def test_every_prompt_has_a_curve_of_its_own():
    """Of two dials, one runs ten times as fast; none is continued from the other."""
    slow = FLOW / 10
    controls = np.stack([FLOW % 10, slow], 1).reshape(-1, 1).tolist()
    minutes = np.repeat(np.arange(9), 2).tolist()
    figure = draw_series(gather(controls, minutes=minutes, prompts=["litres", "tens"] * 9))
    lines = {own.get_label().split()[3].strip(":"): own[0] for own in figure.axes[0].containers}
    assert lines["litres"].get_ydata() == pytest.approx(FLOW) and lines["tens"].get_ydata() == pytest.approx(slow)
    assert lines["litres"].get_color() != lines["tens"].get_color()
    many = draw_series(gather(controls, minutes=minutes, prompts=[str(i) for i in range(18)]))
    assert len(many.axes[0].containers) == 1


def test_of_many_prompts_none_is_continued_from_another():
    """Six dials that stand still, of which three have the same colour."""
    controls, prompts = [[float(i % 6) * 1.5] for i in range(60)], [str(i % 6) for i in range(60)]
    (line,) = (own[0] for own in draw_series(gather(controls, prompts=prompts)).axes[0].containers)
    assert line.get_ydata() == pytest.approx(np.ravel(controls))


def test_an_interval_may_be_the_whole_circle():
    series = gather([[5.0], [2.0]])
    series.std[0] = 10 / 12**0.5
    assert series.arrays()[2][:, 0] == pytest.approx([5.0, 0.5])
