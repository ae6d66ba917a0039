"""What two pictures show of the change between them, judged pixel by pixel, without the model.

The model's own derivative is no evidence: even on a blank wall it prefers one shift to another. Here picture A is
changed by other numbers than those that were read. Where the result fits picture B just as well, those numbers are as
likely, and the interval is widened until it holds them.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from torch.nn import functional as F

from cldm.changes import CHANGES, NO_CHANGE, SMALLEST, are_changes, expose, similarity
from cldm.confidence import raise_flags
from cldm.hints import wrap

AS_GOOD = 0.2  # fits are as good as each other if their log mean squared errors differ by less
GREY_LEVEL = 2 / 255  # root mean squared error that resampling alone leaves
CLIPPED = 254, 0.05  # brightest level that still means itself; share of clipped light that makes a pixel uncertain
STEPS = 0.1, 0.2, 0.35, 0.5, 0.7, 1.0  # how far from the reading others are tried, as shares of a number's range
BEYOND = 0.35  # share of a trained range within which numbers are looked for outside it, by readings, too
LEAST = {"blur": 0.75}  # nearer ones do not count (elsewhere STEPS[0]): blur hardly changes a mean squared error
NOT_SHOWN = 0.3  # of its range: a number that may be further away is not shown at all
NEARLY, REFINED, ITERATIONS = 3.0, 24, 2  # fits worse by less are refined: how many at most, by how many iterations
DIFFERENCE = 0.01  # of a range, for derivatives
REPETITIONS, APART = 6, 3  # places where a picture repeats itself, and pixels between them
LEAST_SHARED = 0.25  # share of B that the changed A must cover for a comparison
CHUNK = 2**20  # pixels in one chunk


def check_evidence(reading, pictures, config, known=(), sides=None):
    """Widen the intervals of a Reading to what the pictures themselves show, and flag what they do not.

    pictures: B pairs of PIL pictures, target and reference. config: of the control. known: names of given numbers.
    sides: B numbers of pixels, the shorter side of each pair before it was fitted: a picture that was enlarged does not
    show a blur of less than half of its own pixels. None: nothing was enlarged.
    Returns: a Reading with `reach` and, where due, the flags "no_effect" and "ambiguous".
    """
    named = are_changes(config.control_names, config.control_units, config.absolute)
    rows = zip(config.control_names, named, zip(config.control_low, config.control_high))
    numbers = {name: bounds if own else None for name, own, bounds in rows}
    ours = [k for k, own in enumerate(named) if own]  # nothing is known of others
    ranges = {name: bounds for name, bounds in numbers.items() if bounds}
    periods = dict(zip(config.control_names, config.periods))
    reach = torch.zeros_like(reading.control)
    for i, (target, reference) in enumerate(pictures if ours else ()):
        reach[i, ours] = find_reach(reference, target, ranges, reading.control[i, ours], known, periods).to(reach)
        if sides and sides[i] < target.width and "blur" in set(ranges) - set(known):
            reach[i, list(numbers).index("blur")].clamp_(min=target.width / sides[i] / 2)
    reading = replace(reading, reach=reach)
    raised = raise_flags(
        len(pictures),
        no_effect=[bool(unseen_numbers(config, *of_one)) for of_one in zip(reading.control, reach)],
        ambiguous=reading.anywhere.any(1),
    )
    return replace(reading, flags=[[*dict.fromkeys(own + new)] for own, new in zip(reading.flags, raised)])


def unseen_numbers(config, control, reach):
    """Name the numbers that pictures do not show: they may lie far away; a blur, hard to tell anyway, anywhere at all.

    control, reach: (d,), of one reading. Returns: a list of names.
    """
    names = []
    rows = zip(config.control_names, config.control_low, config.control_high, control.tolist(), reach.tolist())
    for name, low, high, number, far in rows:
        anywhere = number - far <= low and number + far >= high
        if anywhere if name in LEAST else far > NOT_SHOWN * (high - low):
            names.append(name)
    return names


def find_reach(reference, target, ranges, control, known=(), periods=None):
    """How far from a reading lie other numbers that explain a pair of pictures as well.

    Others are tried along each number, along the combinations of numbers that change A's pixels least, and where the
    picture repeats itself; what fits nearly as well is refined by Gauss-Newton first.
    reference, target: PIL pictures of one size. ranges: {name: (low, high)}. control: (d,), as read. known: names of
    given numbers, which stay. periods: {name: number} of those that go round.
    Returns: (d,) the largest distances, in the numbers' units; 0 where none is far, and for names not in CHANGES.
    """
    a, b = grey_levels(reference), grey_levels(target)[0]
    sought = {name: bounds for name, bounds in ranges.items() if name not in known}
    low, high = torch.tensor([sought.get(name, (none, none)) for name, none in NO_CHANGE.items()]).double().T
    numbers = NO_CHANGE | dict(zip(ranges, control.tolist()))
    read = torch.tensor([numbers[name] for name in NO_CHANGE]).double()
    at = read.clamp(min=torch.tensor(SMALLEST))
    width, least, most = high - low, torch.minimum(low, at), torch.maximum(high, at)
    periods = [(periods or {}).get(name) for name in NO_CHANGE]
    goes_round = torch.tensor([*map(bool, periods)])
    beyond = torch.where(goes_round & (width > 0), math.inf, BEYOND * width)
    least, most = least - beyond, most + beyond
    least = torch.maximum(least, least.new_tensor(SMALLEST))

    others = torch.cat([trial_changes(a, b, at, width), repetitions(a, b, at, least, most)])
    others = torch.where(width > 0, others, at).clamp(least, most)
    here = log_error(a, b, at[None])
    worse = log_error(a, b, others) - here
    order = worse.argsort()
    close = order[(worse[order] > AS_GOOD) & (worse[order] < NEARLY)][:REFINED]
    refined = refine(a, b, others[close], width).clamp(least, most)
    others, worse = torch.cat([others, refined]), torch.cat([worse, log_error(a, b, refined) - here])

    distances = wrap(others - read, periods).abs()
    nearest = width * torch.tensor([LEAST.get(name, STEPS[0]) for name in CHANGES])
    counts = (worse <= AS_GOOD) & ((distances >= 0.99 * nearest) & (width > 0)).any(1)
    reach = dict(zip(CHANGES, (distances * counts[:, None]).amax(0).tolist()))
    return torch.tensor([reach.get(name, 0.0) for name in ranges], dtype=torch.float64)


def grey_levels(picture):
    """Returns: (2, H, H) a picture's grey levels, from 0 to 1, and where any of its channels is clipped, 0 or 1."""
    pixels = np.asarray(picture.convert("RGB"))
    grey = np.asarray(picture.convert("L"), np.float32) / 255
    return torch.from_numpy(np.stack([grey, (pixels.max(2) >= CLIPPED[0]).astype(np.float32)]))


def change_picture(picture, change):
    """Change a grey picture as cldm.pairs changes photographs.

    picture: (2, H, H), as grey_levels has it. change: (P, 6), the numbers of CHANGES in their order.
    Returns: grey levels (P, H, H); where the picture shows them and where its light is clipped, (P, H, H) bool each.
    """
    *motion, exposure, blur = change.T
    size, motion = picture.shape[-1], torch.from_numpy(similarity(*(numbers.numpy() for numbers in motion)))
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5  # widths from the middle
    there = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    there = rearrange(there, "h w i -> 1 h w i") - rearrange(motion[:, :2, 2], "p i -> p 1 1 i")
    here = einsum(torch.linalg.inv(motion[:, :2, :2]).float(), there.float(), "p i j, p h w j -> p h w i")
    pictures = repeat(picture, "c h w -> p c h w", p=len(change))
    changed = F.grid_sample(pictures, 2 * here, padding_mode="border", align_corners=False)
    squared = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size).square()  # of cycles a pixel
    gaussian = torch.exp(-2 * (math.pi * rearrange(blur.float(), "p -> p 1 1 1")).square() * squared)
    levels, clipped = torch.fft.irfft2(torch.fft.rfft2(changed) * gaussian, s=(size, size)).unbind(1)
    levels = expose(levels.clamp(0, 1), rearrange(exposure.float(), "p -> p 1 1"))
    return levels, (here.abs() <= 0.5).all(-1), clipped > CLIPPED[1]


def compare(reference, target, change):
    """Returns: residuals, the target less changed references, and where they count, (P, H, H) each.

    Light that is clipped in A may have been brighter than it looks, so that B cannot be too bright there.
    """
    levels, shown, clipped = change_picture(reference, change)
    residuals = target - levels
    return residuals.masked_fill(~shown | clipped & (residuals > 0), 0), shown


def split(changes, size, each=1):
    """Returns: changes (P, 6) in chunks; each change takes `each` pictures of size x size pixels."""
    return changes.split(max(1, CHUNK // (each * size**2)))


def log_error(reference, target, change):
    """Returns: (P,) the log mean squared error of changed references; infinity where they cover too little of B."""
    errors = [torch.zeros(0)]
    for some in split(change, len(target)) if len(change) else ():
        residuals, shown = compare(reference, target, some)
        mean = residuals.square().sum((1, 2)) / shown.sum((1, 2)).clamp_min(1)
        errors.append(mean.masked_fill(shown.float().mean((1, 2)) < LEAST_SHARED, torch.inf))
    return (torch.cat(errors) + GREY_LEVEL**2).log()


def normal_equations(reference, target, change, width):
    """change: (P, 6). width: (6,), the numbers' units. Returns: J^T J (P, 6, 6) and J^T r (P, 6) of the residuals."""
    steps = DIFFERENCE * torch.cat([torch.zeros(1, len(width)), torch.diag(width)])
    matrices, vectors = [], []
    for some in split(change, len(target), each=len(steps)):
        moved = rearrange(some[:, None] + steps, "p k d -> (p k) d")
        residuals, shown = (
            rearrange(part, "(p k) h w -> p k (h w)", p=len(some)) for part in compare(reference, target, moved)
        )
        residuals = (residuals * shown[:, :1]).double()
        residuals, jacobian = residuals[:, 0], (residuals[:, 1:] - residuals[:, :1]) / DIFFERENCE
        matrices.append(einsum(jacobian, jacobian, "p i n, p j n -> p i j"))
        vectors.append(einsum(jacobian, residuals, "p i n, p n -> p i"))
    return torch.cat(matrices), torch.cat(vectors)


def refine(reference, target, change, width):
    """Returns: change (P, 6) after ITERATIONS of damped Gauss-Newton."""
    for _ in range(ITERATIONS if len(change) else 0):
        matrix, vector = normal_equations(reference, target, change, width)
        damping = 1e-3 * torch.diag_embed(matrix.diagonal(dim1=1, dim2=2)) + 1e-6 * torch.eye(len(width))
        change = change - width * torch.linalg.solve(matrix + damping, vector)
    return change


def trial_changes(reference, target, at, width):
    """Returns: (P, 6) changes away from `at` (6,), along every number and along the eigenvectors of J^T J."""
    matrix, _ = normal_equations(reference, target, at[None], width)
    directions = torch.cat([torch.eye(len(at)).double(), torch.linalg.eigh(matrix[0]).eigenvectors.T])
    directions = directions / directions.abs().amax(1, keepdim=True)
    steps = torch.tensor([sign * step for step in STEPS for sign in (-1, 1)]).double()
    return at + width * einsum(steps, directions, "s, k d -> s k d").flatten(0, 1)


def repetitions(reference, target, at, least, most):
    """Returns: (REPETITIONS, 6) changes: `at`, shifted by where the picture repeats itself, to a pixel.

    at, least, most: (6,), a change, and between which others are sought.
    """
    size = len(target)
    (changed,), (shown,), _ = change_picture(reference, at[None])
    first, second = (torch.fft.rfft2((part - part.mean()) * shown) for part in (target, changed))
    similar = torch.fft.irfft2(first * second.conj(), s=target.shape)  # cross-correlation at all circular shifts
    peaks = similar.masked_fill(similar < F.max_pool2d(similar[None], 2 * APART + 1, 1, APART)[0], -torch.inf)
    shifts = torch.fft.fftfreq(size, dtype=torch.float64)
    near, (low, high) = shifts.abs() <= APART / size, (torch.stack([least, most]) - at)[:, 2:4]
    x, y = (shifts >= low[:, None] - APART / size) & (shifts <= high[:, None] + APART / size)
    peaks = peaks.masked_fill(near[:, None] & near | ~(y[:, None] & x), -torch.inf)
    places = peaks.flatten().topk(REPETITIONS).indices
    others = at.repeat(REPETITIONS, 1)
    others[:, 2:4] += shifts[torch.stack([places % size, places // size], 1)]
    return others
