"""Solvers for a few controls and many residuals: Levenberg-Marquardt. Targets are independent, batched."""

from dataclasses import dataclass

import torch

FAR = 0.1  # a step longer than this share of the range asks for a new Jacobian


@dataclass
class Solution:
    control: torch.Tensor  # (P, d)
    residuals: torch.Tensor  # (P, K, N)
    jacobian: torch.Tensor  # (P, K, N, d)
    iterations: torch.Tensor  # (P,)

    @property
    def losses(self):
        """(P, K), mean squares."""
        return self.residuals.square().mean(2)

    @property
    def gradients(self):
        """(P, K, d), of half the mean squares."""
        return torch.einsum("pkn,pknd->pkd", self.residuals, self.jacobian) / self.residuals.shape[2]

    @property
    def curvature(self):
        """(P, d, d), Gauss-Newton's, of half the loss."""
        return torch.einsum("pknd,pkne->pde", self.jacobian, self.jacobian) / self.residuals[0].numel()


def levenberg_marquardt(objective, control, targets, low, high, *, iterations=8, tolerance=3e-3, damping=1e-3):
    """Minimise objective's loss by damped Gauss-Newton steps within bounds.

    The Jacobian is exact at the start and after a long step; after a short one, Broyden's rank-one update corrects it.
    control: (P, d), where to start. targets: (P,) which target each is for. low, high: (d,), bounds.
    tolerance: a control whose step is shorter than this share of the range has settled. damping: the first, as a share
    of the curvature's own diagonal; a step that does not lower the loss is taken back and the damping raised tenfold.
    Returns: Solution.
    Source: More 1978, the Levenberg-Marquardt algorithm; Madsen et al. 2004, its secant version.
    """
    width = high - low
    damping = torch.full_like(control[:, 0], damping)
    at = Solution(control.clone(), *objective.linearize(control, targets), torch.zeros_like(targets))
    active = torch.arange(len(control), device=control.device)
    for _ in range(iterations):
        now = Solution(*(part[active] for part in (at.control, at.residuals, at.jacobian, at.iterations)))
        step = gauss_newton_step(now.gradients.mean(1), now.curvature, damping[active], width)
        proposal = (now.control + step).clamp(low, high)
        step = (proposal - now.control) / width
        length = step.norm(dim=1)
        residuals = objective.evaluate(proposal, targets[active])
        surprise = residuals - now.residuals - torch.einsum("pknd,pd->pkn", now.jacobian * width, step)
        update = torch.einsum("pkn,pd->pknd", surprise, step / length.square().clamp_min(1e-12)[:, None]) / width
        jacobian = now.jacobian + update
        better = residuals.square().mean((1, 2)) < now.residuals.square().mean((1, 2))
        far = better & (length > FAR)
        if far.any():
            jacobian[far] = objective.linearize(proposal[far], targets[active][far])[1]
        at.jacobian[active] = jacobian
        kept = active[better]
        at.control[kept], at.residuals[kept] = proposal[better], residuals[better]
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
