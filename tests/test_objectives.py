"""The inversion engine: the UNet's halves, exact derivatives, the solver."""

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

from cldm import objectives, solvers
from cldm.objectives import DenoisingObjective, SamplingObjective
from cldm.solvers import levenberg_marquardt
from ldm.unet import decode_unet, encode_unet


@pytest.fixture
def make_objective(make_model, normal):
    """make_objective(kind, control_dim, batch) -> an objective in double precision."""

    def make(kind, control_dim=1, batch=1):
        model = make_model(control_dim, "reference" if kind == "pairs" else "coordinate").double()
        target = normal(batch, CHANNELS, LATENT_SIZE, LATENT_SIZE).double()
        embeddings = model.base.embed(["a photo of a cup"] * batch)
        if kind != "sampling":
            reference = target.flip(3) if kind == "pairs" else None
            return DenoisingObjective(model, target, embeddings, reference, draws=4)
        start = torch.zeros_like(target)
        return SamplingObjective(model, start, target, embeddings, draws=4, ddim_steps=4, eta=1.0)

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


@pytest.mark.parametrize("kind", ["denoising", "sampling", "pairs"])
def test_derivatives_equal_finite_differences_and_reverse_mode(make_objective, kind):
    objective = make_objective(kind, control_dim=2, batch=2)
    control, targets = torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double(), torch.arange(2)
    residuals, jacobian = objective.linearize(control, targets)
    torch.testing.assert_close(residuals, objective.evaluate(control, targets))
    columns = []
    for axis in torch.eye(2).double():
        ahead, behind = (objective.evaluate(control + h * axis, targets) for h in (1e-5, -1e-5))
        columns.append((ahead - behind) / 2e-5)
    torch.testing.assert_close(jacobian, torch.stack(columns, 3), rtol=1e-5, atol=1e-9)

    again, gradient = objective.gradient(control, targets)
    torch.testing.assert_close(again, residuals)
    expected = 2 * torch.einsum("pkn,pknd->pkd", residuals, jacobian) / residuals.shape[2]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["denoising", "sampling", "pairs"])
def test_some_draws_and_small_calls_give_the_same_numbers(make_objective, monkeypatch, kind):
    objective = make_objective(kind, control_dim=2, batch=2)
    control, targets = torch.tensor([[0.5, -1.0], [2.0, 0.3], [1.0, 1.0]]).double(), torch.tensor([1, 0, 1])
    whole, before = objective.linearize(control, targets), objective.calls
    some = torch.tensor([2, 0])
    torch.testing.assert_close(objective.evaluate(control, targets, some), whole[0][:, some])
    assert objective.calls == before + 6 * (4 if kind == "sampling" else 1)  # steps
    for chunk in (1, 6):
        monkeypatch.setattr(objectives, "CHUNK", chunk)
        torch.testing.assert_close(objective.linearize(control, targets), whole)


def test_a_known_number_is_left_out_of_the_derivative(make_objective):
    objective = make_objective("denoising", control_dim=2, batch=2)
    control, targets = torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double(), torch.arange(2)
    residuals, jacobian = objective.linearize(control, targets)
    gradient = objective.gradient(control, targets)[1]
    objective.known = torch.stack([torch.full((2,), torch.nan), control[:, 1]], 1)
    torch.testing.assert_close(objective.evaluate(control[:, :1], targets), residuals)
    torch.testing.assert_close(objective.linearize(control[:, :1], targets), (residuals, jacobian[..., :1]))
    torch.testing.assert_close(objective.gradient(control[:, :1], targets)[1], gradient[..., :1])


def test_recomputing_gives_the_same_gradient(make_objective):
    control, targets = torch.tensor([[0.5]]).double(), torch.arange(1)
    objective = make_objective("sampling")
    kept = objective.gradient(control, targets)
    objective.how["recompute"] = True
    torch.testing.assert_close(objective.gradient(control, targets), kept)


class Valley:
    """Residuals of Rosenbrock's valley, whose minimum is at (1, 1), for one target and one draw."""

    channels = 1

    def evaluate(self, control, targets, draws=None):
        x, y = control.unbind(1)
        return torch.stack([10 * (y - x**2), 1 - x], 1)[:, None]

    def linearize(self, control, targets, draws=None):
        x, one = control[:, 0], torch.ones_like(control[:, 0])
        jacobian = torch.stack([torch.stack([-20 * x, 10 * one], 1), torch.stack([-one, 0 * one], 1)], 1)
        return self.evaluate(control, targets), jacobian[:, None]


def test_levenberg_marquardt_finds_the_bottom_and_respects_bounds():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0]])
    low, high = torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 2.0])
    found = levenberg_marquardt(Valley(), start, torch.arange(2), low, high, iterations=60, tolerance=1e-6)
    torch.testing.assert_close(found.control, torch.ones(2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.residuals, Valley().evaluate(found.control, None))
    found = levenberg_marquardt(Valley(), start, torch.arange(2), low, high / 4, iterations=60)
    assert (found.control <= high / 4).all()


class Far(Valley):
    """A detail of a picture, a narrow bump, seen from where it and the target's hardly overlap."""

    def evaluate(self, control, targets, draws=None):
        x = torch.linspace(-5, 5, 201)
        return (torch.exp(-((x - control) ** 2)) - torch.exp(-(x**2)))[:, None]

    def linearize(self, control, targets, draws=None):
        return self.evaluate(control, targets), torch.func.jacfwd(lambda c: self.evaluate(c, targets).sum(0))(
            control
        ).movedim(2, 0)


def test_levenberg_marquardt_is_quick_from_far_away(monkeypatch):
    """Where Gauss-Newton's steps are too short; doubled, they need half as many."""

    def iterations():
        start, bound = torch.tensor([[-2.0], [2.5]]), torch.tensor([5.0])
        found = levenberg_marquardt(Far(), start, torch.arange(2), -bound, bound)
        torch.testing.assert_close(found.control, torch.zeros(2, 1), atol=0.02, rtol=0)
        return found.iterations.amax()

    quick = iterations()
    monkeypatch.setattr(solvers, "EAGER", torch.inf)
    assert quick <= 5 and 2 * quick <= iterations()


class Strangers(Valley):
    """Numbers that should all be the control, a tenth of which something else has put far away; two channels."""

    channels = 2

    def __init__(self):
        self.seen = torch.randn(1, 4, 2, 500, generator=torch.Generator().manual_seed(0))
        self.seen[..., :50] += 30

    def evaluate(self, control, targets, draws=None):
        return (control[:, :, None, None] - self.seen).flatten(2)

    def linearize(self, control, targets, draws=None):
        residuals = self.evaluate(control, targets)
        return residuals, torch.ones_like(residuals)[..., None]


def test_the_cauchy_loss_leaves_alone_what_fits_nowhere():
    start, bound, objective = torch.tensor([[5.0]]), torch.tensor([50.0]), Strangers()

    def solve(**how):
        return levenberg_marquardt(objective, start, torch.arange(1), -bound, bound, tolerance=1e-6, **how)

    squares, robust = solve(), solve(scale=torch.ones(1))
    assert squares.control > 2.9 and robust.control.abs() < 0.1
    weights = robust.weights.unflatten(2, (2, -1))
    assert (weights[..., :50] < 0.01).all() and weights[..., 50:].mean() > 0.4
    assert robust.gradients.mean().abs() < 1e-3
