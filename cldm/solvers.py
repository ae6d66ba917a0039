"""Least squares for a few controls and many residuals; and steps of gradient descent. Targets are solved as a batch."""

from dataclasses import dataclass, fields

import torch
from einops import einsum

from cldm.hints import wrap
from cldm.objective import likelihood_loss

DAMPING = 1e-3  # at first, as a share of the curvature's own diagonal
LONG_STEP = 0.1  # share of the range; a longer step asks for a new Jacobian
GAIN = 1.6  # a step that lowers the loss by this many times what was predicted is doubled
SAME = 0.02  # solutions closer than this share of the searched range are one
RIVAL = 1.5  # a valley whose loss is this many times the best is left alone


@dataclass
class Solution:
    """P solutions, each with K draws of n residuals in C channels and their derivatives by the f free numbers."""

    control: torch.Tensor  # (P, d)
    residuals: torch.Tensor  # (P, K, C, n)
    jacobian: torch.Tensor  # (P, K, C, n, f)
    iterations: torch.Tensor  # (P,)
    weights: torch.Tensor  # of the residuals, as likelihood_loss or cauchy_loss have them

    @staticmethod
    def at(objective, control, index, draw_index=None):
        """Returns: the Solution that consists of controls (P, d) as they are, for the targets `index` (P,)."""
        residuals, jacobian = objective.linearize(control, index, draw_index)
        weights = likelihood_loss(residuals, objective.alike)[1]
        return Solution(control.clone(), residuals, jacobian, torch.zeros_like(index), weights)

    def select(self, index):
        """index: (P',) integers. Returns: the Solution of those, a copy."""
        return Solution(*(getattr(self, field.name)[index] for field in fields(self)))

    def compare(self, index):
        """Returns: (P', K) mean squares of some solutions for one target, by the weights of the first."""
        return (self.weights[index[:1]] * self.residuals[index].square()).mean((2, 3))

    @property
    def loss(self):
        """(P,), weighted mean squares."""
        return (self.weights * self.residuals.square()).mean((1, 2, 3))

    @property
    def gradients(self):
        """(P, K, f), of half the weighted mean squares, in the control's precision."""
        jacobian = self.jacobian.to(self.control)  # its squares may be beyond float32, as of coulombs
        summed = einsum((self.weights * self.residuals).to(jacobian), jacobian, "p k c n, p k c n f -> p k f")
        return summed / self.residuals[0, 0].numel()

    @property
    def curvature(self):
        """(P, f, f), Gauss-Newton's approximation of the Hessian of half the loss."""
        jacobian = self.jacobian.to(self.control)
        summed = einsum(self.weights[..., None] * jacobian, jacobian, "p k c n e, p k c n f -> p e f")
        return summed / self.residuals[0].numel()


def levenberg_marquardt(objective, start, index, bounds, draw_index=None, scale=None, iterations=20, tolerance=5e-3):
    """Minimise an objective's likelihood_loss over its free numbers by damped Gauss-Newton steps within bounds.

    start: controls (P, d), or a Solution to go on from. index: (P,), the target that each is for. bounds: (2, d).
    draw_index: (k,), of noise; None: all.
    scale: (P,), of the Cauchy loss, minimised instead by the weights of a start that is a Solution. tolerance: a
    control whose step is shorter than this share of the range has settled.
    A periodic number has no bounds: a step takes it half a period either way at most, its range is the period.
    A step that does not lower the loss is taken back and the damping raised tenfold; otherwise it falls tenfold. The
    Jacobian is computed at controls to start from and after long steps; Broyden's update serves after short ones.
    Returns: Solution.
    Source: More 1978, the Levenberg-Marquardt algorithm; Madsen et al. 2004, its secant version.
    """
    free = objective.free
    least, most = bounds[:, free]
    width, goes_round = most - least, torch.tensor([*map(bool, objective.periods)], device=free.device)[free]
    active = torch.arange(len(index), device=index.device)  # those that have not settled
    at = start.select(active) if isinstance(start, Solution) else Solution.at(objective, start, index, draw_index)
    damping = torch.full_like(at.control[:, 0], DAMPING)
    known = at.weights

    def judge(residuals, rows):
        """Returns: losses (P',), weights of residuals (P', K, C, n) of some rows."""
        if scale is None:
            return likelihood_loss(residuals, objective.alike)
        return cauchy_loss(residuals, known[rows], scale[rows])

    loss, at.weights = judge(at.residuals, active)
    for _ in range(iterations):
        now = at.select(active)
        place = now.control[:, free]
        low = torch.where(goes_round, place - width / 2, least)
        high = torch.where(goes_round, place + width / 2, most)

        def attempt(step, rows, now=now, active=active, low=low, high=high):
            """Returns: controls, residuals, losses, weights after steps (P', f), in units of the range."""
            control = now.control[rows]
            control[:, free] = (control[:, free] + step * width).clamp(low[rows], high[rows])
            residuals = objective.evaluate(control, index[active[rows]], draw_index)
            return control, residuals, *judge(residuals, active[rows])

        gradient = now.gradients.mean(1)
        held = ((place <= low) & (gradient > 0)) | ((place >= high) & (gradient < 0))  # downhill is beyond a bound
        step = gauss_newton_step(gradient, now.curvature, damping[active], width, held)
        trial = attempt(step, torch.arange(len(active), device=index.device))
        step = (trial[0] - now.control)[:, free] / width  # what the bounds left of it
        double_steps(trial, now, loss[active], step, width, tolerance, attempt)
        control, residuals, after, weights = trial
        step = (control - now.control)[:, free] / width
        length, better = step.abs().amax(1), after < loss[active]
        jacobian = broyden_update(now, residuals, step, width)
        if (long := better & (length > LONG_STEP)).any():
            there = control[long], index[active[long]], draw_index
            jacobian[long] = objective.linearize(*there, residuals=residuals[long])[1]
        at.jacobian[active] = jacobian
        kept = active[better]
        at.control[kept], at.residuals[kept], at.weights[kept] = control[better], residuals[better], weights[better]
        loss[kept] = after[better]
        at.iterations[active] += 1
        damping[active] = torch.where(better, damping[active] / 10, damping[active] * 10).clamp(1e-7, 1e7)
        active = active[length > tolerance]
        if not len(active):
            break
    return at


def gauss_newton_step(gradient, curvature, damping, width, held):
    """Solve (H + damping diag(H)) step = -gradient in units of the range, for the numbers that are not held.

    gradient: (P, f). curvature: (P, f, f). damping: (P,). width: (f,), of the range. held: (P, f) bool, numbers that
    bounds keep where they are (the active set). Returns: (P, f).
    """
    gradient, curvature = gradient * width, curvature * width[:, None] * width
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    coupled = ~(held[:, :, None] | held[:, None]) | torch.eye(len(width), dtype=torch.bool, device=held.device)
    gradient, curvature = gradient.masked_fill(held, 0), curvature * coupled
    floor = 1e-6 * diagonal.amax(1, keepdim=True).clamp_min(1e-12)  # a number without effect stays where it is
    return -torch.linalg.solve(curvature + torch.diag_embed(damping[:, None] * diagonal + floor), gradient)


def double_steps(trial, now, before, step, width, tolerance, attempt):
    """Far from a minimum, where the curvature promises too little, double steps as long as that lowers the loss.

    trial: controls, residuals, losses and weights after steps from the Solution `now`; replaced where doubling helps.
    before: (P,), losses at `now`. step: (P, f), in units of the range, width (f,). tolerance: of steps too short to
    double. attempt: function(steps, rows) -> a trial.
    """
    slope = now.gradients.mean(1) + einsum(now.curvature, step * width, "p e f, p f -> p e") / 2
    predicted = -2 * (slope * step * width).sum(1)  # how far the quadratic says that the loss falls
    rows, factor = ((before - trial[2] > GAIN * predicted) & (step.abs().amax(1) > tolerance)).nonzero()[:, 0], 2
    while len(rows):
        longer = attempt(factor * step[rows], rows)
        lower = longer[2] < trial[2][rows]
        rows, factor = rows[lower], 2 * factor
        for part, own in zip(trial, longer):
            part[rows] = own[lower]


def broyden_update(now, residuals, step, width):
    """Correct the Jacobian J of a Solution by what a step s showed: J + (r' - r - J s) s^T / (s^T s).

    residuals: (P, K, C, n), r', after the step. step: (P, f), in units of the range, width (f,), which
    makes numbers of different sizes comparable in s^T s.
    Returns: (P, K, C, n, f). Source: Broyden 1965.
    """
    expected = einsum(now.jacobian, (step * width).to(residuals), "p k c n f, p f -> p k c n")
    direction = step / step.square().sum(1, keepdim=True).clamp_min(1e-12) / width
    surprise = residuals - now.residuals - expected
    return now.jacobian + einsum(surprise, direction.to(residuals), "p k c n, p f -> p k c n f")


def cauchy_loss(residuals, weights, scale):
    """Robust loss: a place in the picture counts for less, the larger its mean square is against the scale.

    residuals: (P, K, C, places). weights: of likelihood_loss. scale: (P,).
    Returns: loss (P,); weights (P, 1 or K, 1 or C, places) of iteratively reweighted least squares.
    Source: Holland & Welsch 1977.
    """
    excess = (weights * residuals.square()).mean((1, 2)) / scale[:, None]  # (P, places)
    return scale * excess.log1p().mean(1), weights / (1 + excess)[:, None, None]


def distinct_solutions(found, index, objective, bounds):
    """index: (P,), the target of each. objective: whose solutions they are. bounds: (2, d), of the search.

    Returns: for every target, the indices of its solutions further apart than SAME, the best first.
    """
    order, free = found.loss.argsort(stable=True), objective.free
    width = (bounds[1] - bounds[0])[free]
    distinct = []
    for own in (order[index[order] == i].tolist() for i in index.unique()):
        kept = []
        for i in own:
            gaps = wrap(found.control[kept] - found.control[i], objective.periods)[:, free]
            if ((gaps / width).abs().amax(1) > SAME).all():
                kept.append(i)
        distinct.append(torch.tensor(kept))
    return distinct


def keep_rivals(found, index, objective, bounds, most=None):
    """As distinct_solutions. Returns: indices of every target's best solutions, `most` or fewer, close to the best."""
    losses, kept = found.loss, []
    for own in distinct_solutions(found, index, objective, bounds):
        kept += [i for i in own[:most].tolist() if losses[i] <= RIVAL * losses[own[0]]]
    return kept


class GradientDescent:
    """Steps of gradient descent on one control, in units of its spread, until it settles.

    unit: (d,), of each number. learning_rate: of plain SGD, in those units. None: the first step has length MAX_STEP,
    then the rate follows the curvature that the last step met (SGD-BB), so that one setting suits targets of any
    contrast. No step is longer than MAX_STEP. It has settled after PATIENCE steps in a row shorter than TOLERANCE, as a
    share of the first one's length over MAX_STEP: a small rate makes steps short from the start.
    Source: Tan et al. 2016, Barzilai-Borwein step size for stochastic gradient descent.
    """

    MAX_STEP, TOLERANCE, PATIENCE = 0.5, 0.002, 2

    def __init__(self, unit, learning_rate=None):
        self.unit, self.adaptive, self.rate = unit, learning_rate is None, learning_rate
        self.moved = self.previous = None  # the last step, and the gradient before it
        self.short, self.first = 0, None  # short steps in a row; the first one's length

    @property
    def settled(self):
        return self.short >= self.PATIENCE

    def step(self, gradient):
        """gradient: (d,), of the loss. Returns: (d,), what is to be added to the control."""
        gradient = gradient * self.unit
        if self.rate is None:
            self.rate = self.MAX_STEP / gradient.norm().clamp_min(1e-12)
        elif self.adaptive:
            bend = self.moved @ (gradient - self.previous)
            self.rate = self.moved @ self.moved / bend if bend > 0 else self.rate
        step = -self.rate * gradient
        step = step * (self.MAX_STEP / step.norm().clamp_min(self.MAX_STEP))
        length = step.norm()
        self.first = length if self.first is None else self.first
        self.short = self.short + 1 if length < self.TOLERANCE * self.first / self.MAX_STEP else 0
        self.moved, self.previous = step, gradient
        return step * self.unit
