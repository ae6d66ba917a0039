"""Levenberg-Marquardt for a few controls and many residuals. Targets are independent, batched."""

import torch


def levenberg_marquardt(objective, control, targets, low, high, *, iterations=8, tolerance=1e-3, damping=1e-3):
    """Minimise objective's loss by damped Gauss-Newton steps within bounds.

    control: (P, d), where to start. targets: (P,) which target each is for. low, high: (d,), bounds.
    tolerance: a control whose step is shorter than this share of the range has settled. damping: the first, as a share
    of the curvature's own diagonal; a step that does not lower the loss is taken back and the damping raised tenfold.
    Returns: control (P, d), losses (P, K), gradients (P, K, d), curvature (P, d, d), iterations (P,).
    Source: More 1978, the Levenberg-Marquardt algorithm.
    """
    width = high - low
    damping = torch.full_like(control[:, 0], damping)
    control = control.clone()
    losses, gradients, curvature = objective.linearize(control, targets)
    taken = torch.zeros_like(targets)
    active = torch.arange(len(control), device=control.device)
    for _ in range(iterations):
        step = gauss_newton_step(gradients[active].mean(1), curvature[active], damping[active], width)
        proposal = (control[active] + step).clamp(low, high)
        moved = ((proposal - control[active]).abs() / width).amax(1)
        new_losses, new_gradients, new_curvature = objective.linearize(proposal, targets[active])
        taken[active] += 1
        better = new_losses.mean(1) < losses[active].mean(1)
        kept = active[better]
        control[kept], losses[kept] = proposal[better], new_losses[better]
        gradients[kept], curvature[kept] = new_gradients[better], new_curvature[better]
        damping[active] = torch.where(better, damping[active] / 10, damping[active] * 10).clamp(1e-7, 1e7)
        active = active[moved > tolerance]
        if not len(active):
            break
    return control, losses, gradients, curvature, taken


def gauss_newton_step(gradient, curvature, damping, width):
    """gradient: (P, d). curvature: (P, d, d). damping: (P,). width: (d,), the unit of each control. Returns: (P, d)."""
    gradient, curvature = gradient * width, curvature * width[:, None] * width
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    floor = 1e-6 * diagonal.amax(1, keepdim=True).clamp_min(1e-12)  # a control without effect stays where it is
    damped = curvature + torch.diag_embed(damping[:, None] * diagonal + floor)
    return -torch.linalg.solve(damped, gradient) * width
