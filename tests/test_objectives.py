"""The inversion engine: the UNet's halves, exact derivatives, the solver."""

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

from cldm.objectives import DenoisingObjective, SamplingObjective
from cldm.solvers import levenberg_marquardt
from ldm.unet import decode_unet, encode_unet


@pytest.fixture
def make_objective(make_model, normal):
    """make_objective(kind, control_dim, batch) -> an objective in double precision."""

    def make(kind, control_dim=1, batch=1):
        model = make_model(control_dim).double()
        target = normal(batch, CHANNELS, LATENT_SIZE, LATENT_SIZE).double()
        embeddings = model.base.embed(["a photo of a cup"] * batch)
        if kind == "denoising":
            return DenoisingObjective(model, target, embeddings, draws=3)
        return SamplingObjective(model, torch.zeros_like(target), target, embeddings, ddim_steps=4, eta=1.0)

    return make


def test_halves_equal_the_unet(make_model, normal):
    unet = make_model().base.unet
    latents, embeddings = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE), normal(2, 77, 16)
    timesteps = torch.tensor([10, 900])
    encoded = encode_unet(unet, latents, timesteps, embeddings)
    down, mid = [normal(*skip.shape) for skip in encoded.skips], normal(*encoded.middle.shape)
    expected = unet(
        latents, timesteps, embeddings, down_block_additional_residuals=down, mid_block_additional_residual=mid
    ).sample
    torch.testing.assert_close(decode_unet(unet, encoded, down, mid), expected)


@pytest.mark.parametrize("kind", ["denoising", "sampling"])
def test_derivatives_equal_finite_differences_and_reverse_mode(make_objective, kind):
    objective = make_objective(kind, control_dim=2, batch=2)
    control, targets = torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double(), torch.arange(2)
    losses, gradients, curvature = objective.linearize(control, targets)
    torch.testing.assert_close(losses, objective.losses(control, targets))

    moving = control.clone().requires_grad_(True)
    everything = slice(0, objective.draws)
    half = objective.residuals(moving, targets, everything).square().mean((1, 2)).sum() / 2
    torch.testing.assert_close(gradients.mean(1), torch.autograd.grad(half, moving)[0], rtol=1e-6, atol=1e-9)
    columns = []
    for axis in torch.eye(2).double():
        ahead, behind = (objective.residuals(control + h * axis, targets, everything) for h in (1e-5, -1e-5))
        columns.append((ahead - behind).flatten(1) / 2e-5)
    jacobian = torch.stack(columns, 2)
    expected = jacobian.mT @ jacobian / jacobian.shape[1]
    torch.testing.assert_close(curvature, expected, rtol=1e-5, atol=1e-9)


class Valley:
    """Residuals of Rosenbrock's valley, whose minimum is at `bottom`, for one target."""

    draws = 1

    def linearize(self, control, targets):
        x, y = control.unbind(1)
        residuals = torch.stack([10 * (y - x**2), 1 - x], 1)
        zero = torch.zeros_like(x)
        jacobian = torch.stack([torch.stack([-20 * x, zero + 10], 1), torch.stack([zero - 1, zero], 1)], 1)
        gradients = torch.einsum("pn,pnd->pd", residuals, jacobian)[:, None] / 2
        return residuals.square().mean(1, keepdim=True), gradients, jacobian.mT @ jacobian / 2


def test_levenberg_marquardt_finds_the_bottom_and_respects_bounds():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0]])
    low, high = torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 2.0])
    control, *_ = levenberg_marquardt(Valley(), start, torch.arange(2), low, high, iterations=60, tolerance=1e-6)
    torch.testing.assert_close(control, torch.ones(2, 2), atol=1e-3, rtol=0)
    control, *_ = levenberg_marquardt(Valley(), start, torch.arange(2), low, high / 4, iterations=60)
    assert (control <= high / 4).all()
