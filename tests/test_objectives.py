"""Residuals of a control: the UNet's halves, exact derivatives, the solver."""

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

from cldm import solvers
from cldm.denoising import DenoisingObjective
from cldm.model import Target
from cldm.solvers import GradientDescent, levenberg_marquardt
from ldm.unet import decode_unet, encode_unet

CONTROL = torch.tensor([[0.5, -1.0], [2.0, 0.3]]).double()


@pytest.fixture
def make_objective(make_model, normal):
    """make_objective(hint, free) -> an objective of two targets and two numbers, in double precision."""

    def make(hint="coordinate", free=(True, True)):
        model = make_model(2, hint).double()
        latents = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE).double()
        embeddings = model.base.embed(["a photo of a cup"] * 2)
        target = Target(embeddings, latents, latents.flip(3) if hint == "reference" else None)
        return DenoisingObjective(model, target, torch.tensor(free), draws=4)

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


@pytest.mark.parametrize("by_differences", [True, False])
@pytest.mark.parametrize("hint", ["coordinate", "reference"])
def test_derivatives_equal_finite_differences(make_objective, hint, by_differences):
    objective, index = make_objective(hint), torch.arange(2)
    objective.by_differences = by_differences
    residuals, jacobian = objective.linearize(CONTROL, index)
    torch.testing.assert_close(residuals, objective.evaluate(CONTROL, index))
    columns = []
    for axis in torch.eye(2).double():
        ahead, behind = (objective.evaluate(CONTROL + h * axis, index) for h in (1e-5, -1e-5))
        columns.append((ahead - behind) / 2e-5)
    torch.testing.assert_close(jacobian, torch.stack(columns, 4), rtol=1e-5, atol=1e-7 if by_differences else 1e-9)


@pytest.mark.parametrize("way", [dict(), dict(fusion="both", modulated=True)], ids=["affine", "both"])
def test_derivatives_in_half_precision_are_about_the_same(make_model, normal, way):
    """Forward mode through every kind of layer, of which none may leave another precision to the next."""
    latents, jacobians = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE), []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(2, "reference", **way)
        model.base.unet.to(dtype)
        model.control_net.to_precision(dtype)
        target = Target(model.base.embed(["a photo of a cup"] * 2), latents, latents.flip(3))
        objective = DenoisingObjective(model, target, draws=4)
        objective.by_differences = False
        jacobians.append(objective.linearize(CONTROL, torch.arange(2))[1].flatten().double())
    assert torch.cosine_similarity(*jacobians, dim=0) > 0.99
    assert (jacobians[1] - jacobians[0]).norm() < 0.2 * jacobians[0].norm()


@pytest.mark.parametrize("hint", ["coordinate", "reference"])
def test_some_draws_and_small_calls_give_the_same_numbers(make_objective, hint):
    control, index, some = torch.cat([CONTROL, CONTROL[:1] + 1]), torch.tensor([1, 0, 1]), torch.tensor([2, 0])
    objective = make_objective(hint)
    whole, before = objective.linearize(control, index), objective.calls
    torch.testing.assert_close(objective.evaluate(control, index, some), whole[0][:, some])
    assert objective.calls == before + 6
    for chunk in (1, 6):
        objective.chunk = chunk
        torch.testing.assert_close(objective.linearize(control, index), whole)


def test_a_known_number_is_left_out_of_the_derivative(make_objective):
    index = torch.arange(2)
    whole, free = make_objective().linearize(CONTROL, index), make_objective(free=(True, False))
    residuals, jacobian = free.linearize(CONTROL, index)
    assert jacobian.shape[4] == 1 and residuals.shape == whole[0].shape


class Valley:
    """Residuals of Rosenbrock's valley, whose minimum is at (1, 1), for one target and one draw."""

    free, periods, alike = torch.tensor([True, True]), (None, None), (3,)

    def evaluate(self, control, targets, draws=None):
        x, y = control.unbind(1)
        return torch.stack([10 * (y - x**2), 1 - x], 1)[:, None, None]

    def linearize(self, control, targets, draws=None, residuals=None):
        x, one = control[:, 0], torch.ones_like(control[:, 0])
        jacobian = torch.stack([torch.stack([-20 * x, 10 * one], 1), torch.stack([-one, 0 * one], 1)], 1)
        return self.evaluate(control, targets), jacobian[:, None, None]


def test_levenberg_marquardt_finds_the_bottom_and_respects_bounds():
    start = torch.tensor([[-1.2, 1.0], [0.0, 0.0]])
    bounds = torch.tensor([[-2.0, -2.0], [2.0, 2.0]])
    found = levenberg_marquardt(Valley(), start, torch.arange(2), bounds, iterations=60, tolerance=1e-6)
    torch.testing.assert_close(found.control, torch.ones(2, 2), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.residuals, Valley().evaluate(found.control, None))
    found = levenberg_marquardt(Valley(), start, torch.arange(2), bounds / 4, iterations=60)
    torch.testing.assert_close(found.control, torch.tensor([[0.5, 0.25]] * 2), atol=1e-3, rtol=0)


class Far(Valley):
    """A detail of a picture, a narrow bump, seen from where it and the target's hardly overlap."""

    free, periods = torch.tensor([True]), (None,)

    def evaluate(self, control, targets, draws=None):
        x = torch.linspace(-5, 5, 201)
        return (torch.exp(-((x - control) ** 2)) - torch.exp(-(x**2)))[:, None, None]

    def linearize(self, control, targets, draws=None, residuals=None):
        return self.evaluate(control, targets), torch.func.jacfwd(lambda c: self.evaluate(c, targets).sum(0))(
            control
        ).movedim(3, 0)


def test_levenberg_marquardt_is_quick_from_far_away(monkeypatch):
    """Where Gauss-Newton's steps are too short; doubled, they need half as many."""

    def iterations():
        start, bound = torch.tensor([[-2.0], [2.5]]), torch.tensor([5.0])
        found = levenberg_marquardt(Far(), start, torch.arange(2), torch.stack([-bound, bound]))
        torch.testing.assert_close(found.control, torch.zeros(2, 1), atol=0.02, rtol=0)
        return found.iterations.amax()

    quick = iterations()
    monkeypatch.setattr(solvers, "GAIN", torch.inf)
    assert quick <= 5 and 2 * quick <= iterations()


class Strangers(Valley):
    """Numbers that should all be the control, a tenth of which something else has put far away; two channels."""

    free, periods = torch.tensor([True]), (None,)

    def __init__(self):
        self.seen = torch.randn(1, 4, 2, 500, generator=torch.Generator().manual_seed(0))
        self.seen[..., :50] += 30

    def evaluate(self, control, targets, draws=None):
        return control[:, :, None, None] - self.seen

    def linearize(self, control, targets, draws=None, residuals=None):
        residuals = self.evaluate(control, targets)
        return residuals, torch.ones_like(residuals)[..., None]


def test_the_cauchy_loss_leaves_alone_what_fits_nowhere():
    start, bounds, objective = torch.tensor([[5.0]]), torch.tensor([[-50.0], [50.0]]), Strangers()

    def solve(**how):
        return levenberg_marquardt(objective, start, torch.arange(1), bounds, tolerance=1e-6, **how)

    squares, robust = solve(), solve(scale=torch.ones(1))
    assert squares.control > 2.9 and robust.control.abs() < 0.1
    weights = robust.weights
    assert (weights[..., :50] < 0.01).all() and weights[..., 50:].mean() > 0.4
    assert robust.gradients.mean().abs() < 1e-3


class Unequal(Strangers):
    """Two channels that each see the control with an error, the second's a hundred times as large."""

    def __init__(self):
        self.seen = torch.tensor([0.1, 10.0])[:, None] * torch.randn(
            1, 4, 2, 50, generator=torch.Generator().manual_seed(0)
        )


@pytest.mark.parametrize("alike", [(3,), (1, 2, 3)])
def test_a_channel_that_is_predicted_well_counts_for_more(alike):
    objective, start, bounds = Unequal(), torch.tensor([[5.0]]), torch.tensor([[-50.0], [50.0]])
    objective.alike = alike
    found = levenberg_marquardt(objective, start, torch.arange(1), bounds, tolerance=1e-6)
    assert (found.control.abs() < 0.02) == (alike == (3,)) and found.control.abs() < 1
    squares = found.residuals.square()
    torch.testing.assert_close(found.loss, (found.weights * squares).mean((1, 2, 3)))
    expected = squares.mean(alike).log().mean().exp()  # the geometric mean of mean squares
    torch.testing.assert_close(found.loss, expected[None])


def test_gradient_descent_settles_at_the_bottom():
    """Of a valley a hundred times as steep in one number as in the other, each in units of its spread."""
    for rate in (None, 0.02):
        unit, control = torch.tensor([1.0, 60.0]).double(), torch.tensor([2.0, -90.0]).double()
        descent, steps = GradientDescent(unit, rate), 0
        while not descent.settled and steps < 2000:
            step = descent.step(torch.tensor([100.0, 1.0]) ** 0.5 * control / unit**2)
            assert (step / unit).norm() <= descent.MAX_STEP * 1.001
            control, steps = control + step, steps + 1
        assert descent.settled and (control / unit).norm() < 0.15


@pytest.mark.parametrize("rate, slope", [(0.01, 0.1), (0.01, 0.0), (None, 0.0)])
def test_steps_that_are_short_from_the_start_settle_nothing(rate, slope):
    descent = GradientDescent(torch.ones(1).double(), rate)
    for _ in range(20):
        descent.step(torch.tensor([slope]).double())
    assert not descent.settled
