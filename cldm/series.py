"""The numbers of many readings, some bytes each, and their curve over time."""

import textwrap
from array import array
from collections import Counter
from datetime import UTC

import numpy as np
import torch
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cldm.confidence import half_interval, largest_std
from cldm.dataset import parse_time
from cldm.hints import wrap
from cldm.report import COLOURS, VERMILION, WIDTH, label, plain

POINTS, BINS = 2000, 1000  # most readings that are drawn one by one; bins of the axis else, of about a pixel each
SPREAD = 0.05, 0.95  # quantiles of a bin's readings between which its bar reaches
HUES = [colour for colour in COLOURS if colour != VERMILION]  # of prompts, as far as they go; else all look alike


def listed(value, count, nothing=np.nan):
    """Returns: the list of `count` values that results.jsonl has, be it as one number; of nothing where it has null."""
    return [nothing] * count if value is None else value if isinstance(value, list) else [value]


class Series:
    """n readings of d numbers, gathered one by one from the dicts of results.jsonl; nan where nothing is known."""

    def __init__(self, config):
        self.config, self.count = config, len(config.control_names)
        self.x, self.clock = array("d"), ""  # (n,), seconds of a clock, else numbers of rows
        self.control, self.std, self.errors = array("d"), array("f"), array("f")  # (n, d)
        self.flagged, self.flags = array("b"), Counter()  # (n,)
        self.prompts, self.prompt = {}, array("l")  # their places; (n,)
        self.iterations, self.model_calls, self.seconds = 0, 0.0, 0.0  # at most; in all

    def __len__(self):
        return len(self.x)

    def add(self, result):
        if time := parse_time(result.get("time", "")):
            self.clock = "time (UTC)" if time.tzinfo else "time"
            self.x.append((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
        else:
            self.x.append(len(self) + 1)
        for column, key in ((self.control, "control"), (self.std, "std"), (self.errors, "error")):
            column.extend(listed(result.get(key), self.count))
        self.flagged.append(bool(result["flags"]))
        self.flags.update(result["flags"])
        self.prompt.append(self.prompts.setdefault(result.get("prompt", ""), len(self.prompts)))
        if "problem" not in result:
            self.iterations = max(self.iterations, result["iterations"])
            self.model_calls += result["model_calls"]
            self.seconds += result["seconds"]

    def arrays(self):
        """Returns: x (n,); control, half of its 90% interval, error (n, d) each; flagged and place of the prompt (n,).

        All in the order of x.
        """
        order = np.argsort(self.x, kind="stable")
        control, std, errors = (np.reshape(own, (-1, self.count)) for own in (self.control, self.std, self.errors))
        flagged, prompt = np.array(self.flagged, bool), np.array(self.prompt)
        bars = half_interval(torch.from_numpy(std), largest_std(self.config.periods)).numpy()
        return [own[order] for own in (np.array(self.x), control, bars, errors, flagged, prompt)]


def unroll(values, trusted, period):
    """Continue a number that goes round across its seam: each reading lies within half a period of the one before.

    Those not trusted may lie anywhere: none is continued from them.
    values: (n,), in their order. trusted: (n,) bool. Returns: (n,), values plus whole periods.
    """
    anchors = np.flatnonzero(trusted) if trusted.any() else np.arange(len(values))
    path = np.unwrap(values[anchors], period=period)
    last = (np.searchsorted(anchors, np.arange(len(values)), side="right") - 1).clip(0)
    values, path = (torch.from_numpy(own)[:, None] for own in (values, path[last]))
    return wrap(values, [period], path)[:, 0].numpy()


def thin(x, values, bars):
    """Stand for more than POINTS readings by the medians of BINS equal parts of the axis.

    x, values: (n,). bars: (n,), half of the intervals.
    Returns: x (m,), values (m,) and bars (2, m), down and up; a median's bar reaches over SPREAD of its readings.
    """
    if len(x) <= POINTS:
        return x, values, np.stack([bars, bars])
    place = np.digitize(x, np.linspace(x.min(), x.max(), BINS + 1)[1:-1])
    order = np.argsort(place, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(place[order])) + 1)
    middle, low, high = np.array([np.quantile(values[part], (0.5, *SPREAD)) for part in parts]).T
    return np.array([np.median(x[part]) for part in parts]), middle, np.stack([middle - low, high - middle])


def draw_series(series):
    """Returns: a matplotlib Figure of a Series' numbers over time, or over rows; what is flagged looks different.

    So does every prompt, such as that of one dial of several, if they are few, and each has a curve of its own.
    """
    config, (x, control, bars, _, flagged, prompt) = series.config, series.arrays()
    read, several = ~np.isnan(control[:, 0]), 1 < len(series.prompts) <= len(HUES)
    coloured = prompt if several else np.zeros_like(prompt)
    flags = dict(color=VERMILION, fmt="s", markersize=6, markerfacecolor="none")
    named = ", ".join(f"{count:,} {flag}" for flag, count in series.flags.items() if flag != "unreadable")
    groups = [(f"flagged ({named})", read & flagged, flags)]
    for i, (text, colour) in enumerate(zip(series.prompts, HUES) if several else [("", HUES[0])]):
        said = f"readings of {plain(textwrap.shorten(text, 32) or 'no prompt')}" if several else "readings"
        groups.append((said, read & ~flagged & (coloured == i), dict(color=colour, fmt="o", markersize=3)))

    def place(x):
        return (1e6 * x).round().astype("datetime64[us]") if series.clock else x

    figure = Figure((WIDTH, 1 + 2.8 * series.count), layout="constrained")
    panels = figure.subplots(series.count, 1, sharex=True, squeeze=False)[:, 0]
    for k, (axes, name, unit) in enumerate(zip(panels, config.control_names, config.control_units)):
        if config.periods[k]:
            for own in (read & (prompt == i) for i in np.unique(prompt)):
                control[own, k] = unroll(control[own, k], ~flagged[own], config.periods[k])
        for what, own, style in groups:
            where, values, sides = thin(x[own], control[own, k], bars[own, k])
            said = f"{own.sum():,} {what}"
            if own.sum() > POINTS:
                said += f": medians and 5% to 95% of each 1/{BINS} of the axis"
            elif not np.isnan(sides).all():
                said += ": 90% intervals"
            if len(where):
                axes.errorbar(place(where), values, sides, label=said, elinewidth=0.8, **style)
        if not read.all():
            where, _, _ = thin(x[~read], x[~read], bars[~read, k])
            foot = dict(transform=axes.get_xaxis_transform(), label=f"{(~read).sum():,} unreadable")
            axes.plot(place(where), np.full(len(where), 0.03), "kx", **foot)
        axes.set_ylabel(plain(label(name, unit)) + "\nturns added up" * bool(config.periods[k]))
        axes.grid(alpha=0.3)
    if series.clock:
        locator = AutoDateLocator()
        axes.xaxis.set(major_locator=locator, major_formatter=ConciseDateFormatter(locator))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(series.clock or "row")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2 if several else 3, fontsize=9)
    return figure
