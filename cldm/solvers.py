"""Solvers for a few controls and many residuals. Targets are independent, solved as a batch."""

from dataclasses import dataclass

import torch

FAR = 0.1  # a step longer than this share of the range asks for a new Jacobian
EAGER = 1.6  # a step that lowers the loss by this many times what was expected of it is doubled, while that helps


@dataclass
class Solution:
    control: torch.Tensor  # (P, d)
    residuals: torch.Tensor  # (P, K, N)
    jacobian: torch.Tensor  # (P, K, N, d)
    iterations: torch.Tensor  # (P,)
    weights: torch.Tensor | None = None  # (P, 1, N), of the residuals; None: all 1

    def __post_init__(self):
        if self.weights is None:
            self.weights = torch.ones_like(self.residuals[:, :1])

    @property
    def losses(self):
        """(P, K), weighted mean squares."""
        return (self.weights * self.residuals.square()).mean(2)

    @property
    def gradients(self):
        """(P, K, d), of half the weighted mean squares, in the control's precision."""
        summed = torch.einsum("pkn,pknd->pkd", self.weights * self.residuals, self.jacobian)
        return summed.to(self.control) / self.residuals.shape[2]

    @property
    def curvature(self):
        """(P, d, d), Gauss-Newton's, of half the loss."""
        weighted = self.weights[..., None] * self.jacobian
        summed = torch.einsum("pknd,pkne->pde", weighted, self.jacobian)
        return summed.to(self.control) / self.residuals[0].numel()


def levenberg_marquardt(
    objective, control, targets, low, high, *, draws=None, scale=None, iterations=20, tolerance=5e-3, damping=1e-3
):
    """Minimise objective's loss by damped Gauss-Newton steps within bounds.

    The Jacobian is exact at the start and after a long step; after a short one, Broyden's rank-one update corrects it.
    control: (P, d), where to start, or a Solution to go on from. targets: (P,) which target each is for. low, high:
    (d,), bounds.
    draws: (k,), of noise, by default all.
    scale: (P,), of the Cauchy loss: places in the picture whose mean square is larger count for less. None: the loss is
    the mean square.
    tolerance: a control whose step is shorter than this share of the range has settled. damping: the first, as a share
    of the curvature's own diagonal; a step that does not lower the loss is taken back and the damping raised tenfold.
    Far from a minimum, where the curvature promises too little, steps are doubled.
    Returns: Solution.
    Source: More 1978, the Levenberg-Marquardt algorithm; Madsen et al. 2004, its secant version; Holland & Welsch 1977,
    iteratively reweighted least squares.
    """
    width, at = high - low, control
    if not isinstance(at, Solution):
        at = Solution(control.clone(), *objective.linearize(control, targets, draws), torch.zeros_like(targets))
    damping = torch.full_like(at.control[:, 0], damping)
    scale = at.residuals.new_full(targets.shape, torch.inf) if scale is None else scale

    def weigh(residuals, scale):
        """Returns: loss (P,), weights (P, 1, N)."""
        squares = residuals.unflatten(2, (objective.channels, -1)).square().mean((1, 2))  # (P, places)
        excess = squares / scale[:, None]
        loss = torch.where(excess > 0, excess.log1p() / excess, 1) * squares
        weights = (1 / (1 + excess))[:, None].repeat(1, 1, objective.channels)
        return loss.mean(1), weights

    loss, at.weights = weigh(at.residuals, scale)
    active = torch.arange(len(targets), device=targets.device)
    for _ in range(iterations):
        now = Solution(*(part[active] for part in vars(at).values()))
        step = gauss_newton_step(now.gradients.mean(1), now.curvature, damping[active], width)
        proposal = (now.control + step).clamp(low, high)
        step = (proposal - now.control) / width
        residuals = objective.evaluate(proposal, targets[active], draws)
        before, (after, weights) = loss[active], weigh(residuals, scale[active])
        slope = now.gradients.mean(1) + 0.5 * torch.einsum("pde,pe->pd", now.curvature, step * width)
        expected = -2 * (slope * step * width).sum(1)
        eager = ((before - after > EAGER * expected) & (step.abs().amax(1) > tolerance)).nonzero()[:, 0]
        while len(eager):
            longer = (now.control[eager] + 2 * step[eager] * width).clamp(low, high)
            tried = objective.evaluate(longer, targets[active][eager], draws)
            reached = weigh(tried, scale[active][eager])
            lower = reached[0] < after[eager]
            eager = eager[lower]
            proposal[eager], residuals[eager], after[eager] = longer[lower], tried[lower], reached[0][lower]
            weights[eager] = reached[1][lower]
            step[eager] = (longer[lower] - now.control[eager]) / width
        length = step.abs().amax(1)
        surprise = residuals - now.residuals - torch.einsum("pknd,pd->pkn", now.jacobian, (step * width).to(residuals))
        direction = step / step.square().sum(1, keepdim=True).clamp_min(1e-12) / width
        jacobian = now.jacobian + torch.einsum("pkn,pd->pknd", surprise, direction.to(residuals))
        better = after < before
        far = better & (length > FAR)
        if far.any():
            jacobian[far] = objective.linearize(proposal[far], targets[active][far], draws)[1]
        at.jacobian[active] = jacobian
        kept = active[better]
        at.control[kept], at.residuals[kept], at.weights[kept] = proposal[better], residuals[better], weights[better]
        loss[kept] = after[better]
        at.iterations[active] += 1
        damping[active] = torch.where(better, damping[active] / 10, damping[active] * 10).clamp(1e-7, 1e7)
        active = active[length > tolerance]
        if not len(active):
            break
    return at


def gauss_newton_step(gradient, curvature, damping, width):
    """gradient: (P, d). curvature: (P, d, d). damping: (P,). width: (d,), the unit of each control. Returns: (P, d)."""
    gradient, curvature = gradient * width, curvature * width[:, None] * width
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    floor = 1e-6 * diagonal.amax(1, keepdim=True).clamp_min(1e-12)  # a control without effect stays where it is
    damped = curvature + torch.diag_embed(damping[:, None] * diagonal + floor)
    return -torch.linalg.solve(damped, gradient) * width


def sgd(
    objective,
    control,
    targets,
    unit,
    *,
    learning_rate=None,
    max_step=0.5,
    iterations=100,
    tolerance=0.002,
    patience=2,
    on_iteration=None,
):
    """Descend objective's loss by its gradient.

    control: (P, d), where to start. targets: (P,) which target each is for. unit: (d,), of each control.
    learning_rate: of plain SGD, in those units. None: such that the first step has length max_step, then SGD-BB, whose
    rate follows the curvature that the last step met; one setting suits targets of any contrast.
    max_step, tolerance: lengths in those units. No step is longer than max_step; a control whose steps were shorter
    than tolerance `patience` times in a row has settled, and stays.
    on_iteration: called with control (P, d) and its residuals (P, K, N) before every step. The last ones it sees are
    the result.
    Returns: (P,) iterations until each settled, or all; (P,) bool, whether it has.
    Source: Tan et al. 2016, Barzilai-Borwein step size for stochastic gradient descent.
    """
    rate = None if learning_rate is None else torch.full_like(control[:, :1], learning_rate)
    taken, still = torch.full_like(targets, iterations), torch.zeros_like(targets)  # still: short steps in a row
    kept, moved = None, torch.zeros_like(control)
    previous = moved  # gradient
    for iteration in range(iterations):
        residuals, gradients = objective.gradient(control, targets)
        gradient = gradients.mean(1) * unit
        settled = still >= patience
        kept = residuals if kept is None else torch.where(settled[:, None, None], kept, residuals)
        if on_iteration:
            on_iteration(control, kept)
        if rate is None:
            rate = max_step / gradient.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if learning_rate is None and iteration:
            bend = (moved * (gradient - previous)).sum(1, keepdim=True)
            rate = torch.where(bend > 0, moved.square().sum(1, keepdim=True) / bend, rate)
        step = rate * gradient
        length = step.norm(dim=1, keepdim=True)
        step = step * (max_step / length.clamp_min(max_step))
        still = torch.where(settled | (length[:, 0] < tolerance), still + 1, 0)
        taken[still == patience] = iteration + 1
        if (still >= patience).all():
            break
        moved, previous = torch.where((still >= patience)[:, None], 0, -step), gradient
        control = control + moved * unit
    return taken, still >= patience


def adam(objective, control, targets, unit, *, learning_rate=0.1, iterations=100, on_iteration=None):
    """As sgd, by Adam (Kingma & Ba 2015): no control settles, each takes all iterations."""
    position = (control / unit).requires_grad_(True)
    optimizer = torch.optim.Adam([position], learning_rate)
    for _ in range(iterations):
        control = position.detach() * unit
        residuals, gradients = objective.gradient(control, targets)
        if on_iteration:
            on_iteration(control, residuals)
        position.grad = gradients.mean(1) * unit
        optimizer.step()
    return torch.full_like(targets, iterations), torch.zeros_like(targets, dtype=torch.bool)
