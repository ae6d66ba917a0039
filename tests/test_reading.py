"""Reading controls: it finds them without a start, and says how sure it is."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE

from cldm import calibration, denoising, reading
from cldm.calibration import MOST_PROBES, calibrate, choose_probes, valley_width
from cldm.confidence import (
    Z90,
    Reading,
    decimals,
    is_ambiguous,
    is_guess,
    is_outside,
    standard_errors,
    tell_value,
    widen,
)
from cldm.denoising import DenoisingObjective
from cldm.hints import wrap
from cldm.model import Target, load_model, save_model
from cldm.objective import Objective, likelihood_loss
from cldm.proposal import Proposal
from cldm.reading import (
    PROBES,
    fill_range,
    find_lower,
    find_valleys,
    read_and_profile,
    read_controls,
    search_bounds,
)
from cldm.solvers import Solution, distinct_solutions

LOW, HIGH = [-2.0, -1.0], [4.0, 3.0]


@pytest.fixture
def trained(make_model):
    """trained(control_dim) -> a model that knows its range."""

    def make(control_dim=1):
        model = make_model(control_dim)
        bounds = dict(control_low=LOW[:control_dim], control_high=HIGH[:control_dim])
        model.control_net.register_to_config(**bounds, error_scale=[0.0] * control_dim)
        return model

    return make


@pytest.fixture
def periodic(make_model):
    """periodic(periods) -> a model that knows its range, with numbers from 0 to 10 where they go round."""

    def make(periods=(10.0,), fresh=False):
        model = make_model(len(periods), periods=periods, fresh=fresh)
        statistics = dict(control_mean=[5.0, 1.0], control_std=[10 / 12**0.5, 1.0])
        known = dict(control_low=[0.0, -1.0], control_high=[10.0, 3.0], error_scale=[0.0, 0.0], **statistics)
        model.control_net.register_to_config(**{key: own[: len(periods)] for key, own in known.items()})
        return model

    return make


@pytest.fixture
def explained(monkeypatch):
    """explained(truth, noise) -> targets that the model explains without residuals at truth (B, d), up to noise."""

    def explain(truth, noise=0.0):
        class Explained(DenoisingObjective):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                self.wanted.zero_()
                perfect = self.evaluate(truth, torch.arange(len(truth))).flatten(0, 1).view_as(self.wanted)
                errors = noise * torch.randn(self.wanted.shape, generator=torch.Generator().manual_seed(0))
                self.wanted = perfect + errors

        monkeypatch.setattr(reading, "DenoisingObjective", Explained)

    return explain


@pytest.fixture
def make_target(base, normal):
    """make_target(count) -> a Target of so many pictures."""
    prompts = ["a cup", "a cat", ""]
    return lambda count: Target(base.embed(prompts[:count]), normal(count, CHANNELS, LATENT_SIZE, LATENT_SIZE))


@pytest.mark.parametrize("control_dim", [1, 2])
def test_finds_controls_without_a_start(trained, explained, make_target, control_dim):
    model, truth = trained(control_dim), torch.tensor([[1.7, 0.3], [-1.2, 2.2]]).double()[:, :control_dim]
    explained(truth, noise=1e-3)
    found = read_controls(model, make_target(2))
    torch.testing.assert_close(found.control, truth, atol=0.02, rtol=0)
    assert found.flags == [[], []] and found.std.shape == found.control.shape
    assert ((found.interval90[:, :, 0] < found.control) & (found.control < found.interval90[:, :, 1])).all()
    assert found.model_calls > 0 and found.seconds > 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_number_may_be_of_any_size(trained, explained, make_target, size):
    """As of coulombs: what is read is as large, and as sure."""
    model, truth, target = trained(), torch.tensor([[1.7]]).double(), make_target(1)
    explained(truth, noise=1e-3)
    found, config = read_controls(model, target), model.control_net.config
    keys = "control_low", "control_high", "control_mean", "control_std"
    model.control_net.register_to_config(**{key: [size * n for n in config[key]] for key in keys})
    explained(size * truth, noise=1e-3)
    scaled = read_controls(model, target)
    torch.testing.assert_close(scaled.control / size, found.control, atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled.std / size, found.std, atol=0, rtol=0.02)


def test_a_known_number_stays_as_it_is_given(trained, explained, make_target):
    model, truth = trained(2), torch.tensor([[1.7, 0.3]]).double()
    explained(truth, noise=1e-3)
    found = read_controls(model, make_target(1), known={model.control_net.config.control_names[1]: 0.3})
    assert found.control[0].tolist() == [pytest.approx(1.7, abs=0.02), 0.3]
    assert found.std[0, 0] > 0 and found.std[0, 1] == 0


def test_alone_in_a_batch_and_again_are_the_same(trained, explained, make_target):
    model, truth, target = trained(), torch.tensor([[1.7], [-1.2], [0.4]]).double(), make_target(3)
    explained(truth)
    together, again = (read_controls(model, target) for _ in range(2))
    assert torch.equal(together.control, again.control) and torch.equal(together.std, again.std)
    for i in range(3):
        explained(truth[i : i + 1])
        alone = read_controls(model, target.select(slice(i, i + 1)))
        torch.testing.assert_close(alone.control[0], together.control[i], atol=1e-4, rtol=0)


def test_a_target_beyond_the_range_is_flagged(trained, explained, make_target):
    model = trained()
    explained(torch.tensor([[1.0], [5.5], [-3.5]]).double())
    assert read_controls(model, make_target(3)).flags == [[], ["outside_range"], ["outside_range"]]


def test_large_residuals_are_flagged(trained, explained, make_target):
    model, target = trained(), make_target(1)
    model.control_net.register_to_config(explained_loss=0.5, error_scale=[0.1])
    for noise, flags in (0.5, []), (1.0, ["unexplained"]):
        explained(torch.tensor([[1.0]]).double(), noise)
        found = read_controls(model, target)
        assert found.loss.item() == pytest.approx(noise**2, rel=0.2) and found.unexplained_share.item() < 1
        assert [flag for flag in found.flags[0] if flag == "unexplained"] == flags


def test_a_control_that_explains_less_than_nothing_is_flagged(trained, make_target, monkeypatch):
    """What the base expects without it; before calibration, too."""

    class Expected(DenoisingObjective):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            every = [torch.arange(count) for count in (len(self.target), self.draws)]
            self.wanted = self.wanted + self.residuals(None, *every).flatten(0, 1).view_as(self.wanted)
            noise = torch.randn(self.wanted.shape, generator=torch.Generator().manual_seed(0))
            self.wanted = self.wanted + 0.01 * noise

    monkeypatch.setattr(reading, "DenoisingObjective", Expected)
    monkeypatch.setattr(denoising, "NEAR", 0.0)
    found = read_controls(trained(), make_target(3))
    assert (found.unexplained_share > 1).all() and all("unexplained" in flags for flags in found.flags)


def test_near_1_the_share_left_is_that_of_all_draws(trained, make_target, monkeypatch):
    objective, control = DenoisingObjective(trained(), make_target(3)), torch.tensor([[0.3], [1.0], [-0.4]]).double()
    residuals = objective.evaluate(control, torch.arange(3))
    alone = objective.residuals(None, torch.arange(3), torch.arange(objective.draws))
    expected = likelihood_loss(residuals, objective.alike)[0] / likelihood_loss(alone, objective.alike)[0]
    monkeypatch.setattr(denoising, "NEAR", 0.0)
    half = objective.unexplained(residuals)
    monkeypatch.setattr(denoising, "NEAR", torch.inf)
    torch.testing.assert_close(objective.unexplained(residuals), expected)
    assert (half != expected).any()
    monkeypatch.setattr(denoising, "NEAR", (half - 1).abs().median().item())  # which one target is nearer to
    assert (objective.unexplained(residuals) == half).sum() == 2


def test_valleys_are_low_and_below_their_neighbours():
    points = torch.linspace(0, 1, 8)[:, None]
    losses = torch.tensor([[5.0, 1.0, 4.0, 5.0, 2.0, 5.0, 4.9, 5.0], [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]])
    valleys = find_valleys(points[:, None] - points, losses)
    assert valleys.nonzero().tolist() == [[0, 1], [0, 4], [1, 7]]  # 4.9 is low on neither side's scale


def solution(control, residuals, jacobian):
    return Solution(control, residuals, jacobian, torch.zeros(len(control)), torch.ones_like(residuals[..., :1]))


def test_solutions_close_together_are_one_valley():
    control = torch.tensor([[1.0], [3.0], [1.01], [5.0]])
    losses = torch.tensor([2.0, 1.0, 1.9, 3.0])
    found = solution(control, losses.sqrt()[:, None, None, None], torch.ones(4, 1, 1, 1, 1))
    objective, bounds = SimpleNamespace(free=torch.tensor([True]), periods=[None]), torch.tensor([[0.0], [10.0]])
    ranked = distinct_solutions(found, torch.tensor([0, 0, 0, 1]), objective, bounds)
    assert [own.tolist() for own in ranked] == [[1, 2], [3]]


def test_standard_errors_equal_the_spread_of_repeated_readings():
    """Draws that each see the control with an error of 0.3: their mean is off by 0.3 / sqrt(K)."""
    generator = torch.Generator().manual_seed(0)
    draws, numbers, jacobian = 10, 5, 2.0
    seen = 0.3 * torch.randn(4000, draws, generator=generator)
    control = seen.mean(1, keepdim=True)  # the least-squares solution
    residuals = jacobian * (control - seen)[:, :, None, None].expand(-1, -1, 1, numbers)
    found = solution(control, residuals, torch.full((4000, draws, 1, numbers, 1), jacobian))
    noise, residual = standard_errors(found, False, torch.tensor([5.0]))
    assert noise.mean().sqrt().item() == pytest.approx(control.std().item(), rel=0.05)
    expected = found.loss.sqrt() / jacobian
    torch.testing.assert_close(residual[:, 0, 0].sqrt(), expected)


def test_draws_of_opposite_noise_count_as_one():
    """An error that opposite draws share, with opposite sign, is none of their mean."""
    seen = torch.tensor([[0.5, -0.5, 0.2, -0.2]])
    found = solution(seen.mean(1, keepdim=True), -seen[:, :, None, None], torch.ones(1, 4, 1, 1, 1))
    assert standard_errors(found, True, torch.tensor([5.0]))[0].item() == pytest.approx(0, abs=1e-6)
    assert standard_errors(found, False, torch.tensor([5.0]))[0].item() > 0.01


def test_a_number_without_effect_may_be_anywhere():
    """Two numbers of very unlike sizes, the second without effect, and then with a faint one."""
    generator = torch.Generator().manual_seed(0)
    residuals, jacobian = (torch.randn(1, 8, 1, 50, *more, generator=generator) for more in ((), (2,)))
    width = torch.tensor([10.0, 1e-3])
    for effect, expected in (0.0, width[1]), (1.0, None):
        found = solution(torch.zeros(1, 2), residuals, jacobian * torch.tensor([1.0, effect]))
        noise, residual = (part[0].diagonal().sqrt() for part in standard_errors(found, False, width))
        if expected is not None:
            assert noise[1] == expected
        assert 0 < noise[0] < 1 and (effect == 0 or residual[1] > 0.01)


def test_outside_is_beyond_doubt_and_never_far_beyond(trained):
    config = trained().control_net.config  # from -2 to 4
    control = torch.tensor([[4.2], [4.2], [4.4], [-2.2], [3.0]])
    std = torch.tensor([[0.05], [0.2], [9.0], [0.05], [9.0]])
    assert is_outside(config, control, std).tolist() == [True, False, True, True, False]
    assert not is_outside(config, control, 0 * std).any()  # numbers that were given


def test_ambiguous_is_a_second_valley_about_as_good():
    best = torch.tensor([1.0, 1.2, 0.9, 1.1])
    assert not is_ambiguous(best[None], False)
    assert is_ambiguous(torch.stack([best, best + 0.05]), False)
    assert not is_ambiguous(torch.stack([best, best + 0.5]), False)
    assert is_ambiguous(torch.stack([best, best + torch.tensor([2.0, -1.0, 1.5, -0.5])]), False)


@pytest.mark.parametrize("count", [36, 60])
def test_calibration_makes_intervals_hold_what_they_say(trained, monkeypatch, tmp_path, count):
    """Of each of two numbers, the second of which is read ten times as well, whose errors residuals do not tell."""
    save_model(trained(2), tmp_path / "control")
    generator = torch.Generator().manual_seed(0)
    controls = torch.randn(count, 2, generator=generator)
    error = torch.tensor([0.3, 0.03]) * torch.randn(count, 2, generator=generator)
    spread = torch.randn(count, 2, generator=generator).exp()
    covariances = torch.diag_embed(torch.full((count, 2), 0.01**2)), torch.diag_embed(spread)

    class Known(torch.utils.data.Dataset):
        def __init__(self):
            self.controls = controls

        def __len__(self):
            return count

        def __getitem__(self, i):
            return {"latents": torch.full((1, 1, 1), float(i)), "embeddings": torch.tensor(0), "control": controls[i]}

    def read(model, target):
        config, which = model.control_net.config, target.latents.flatten().long()
        assert config.error_scale is config.error_floor is config.explained_loss is None
        loss, nothing = torch.full((len(which),), 2.0), torch.zeros(2)
        found = controls[which] + error[which], *(part[which] for part in covariances)
        return Reading(*found, loss, None, [], [], nothing, nothing)

    monkeypatch.setattr(calibration, "read_controls", read)
    monkeypatch.setattr(calibration, "choose_probes", lambda *_: 11)
    monkeypatch.setattr(calibration, "draw_latents", lambda model, target, control: target.latents + 0.5**0.5)
    truth, *both = calibrate(load_model(tmp_path / "control"), tmp_path / "control", Known(), pictures=count)
    order = [controls.tolist().index(row) for row in truth.tolist()]
    assert sorted(order) == list(range(count)) and max(order[:12]) - min(order[:12]) > count / 2
    config = load_model(tmp_path / "control").control_net.config
    assert (config.explained_loss, config.sampling_loss) == (pytest.approx(2.6), pytest.approx(1.5, rel=1e-4))
    assert config.probes == 11
    calibrated = torch.tensor(config.error_scale), torch.tensor(config.error_floor)
    final = Reading(truth + error[order], *(part[order] for part in covariances), *[None] * 4, *calibrated)
    inside = (final.interval90[:, :, 0] <= truth) & (truth <= final.interval90[:, :, 1])
    assert ((inside.float().mean(0) >= 0.85) & (inside.float().mean(0) <= 0.95)).all()
    for own, size in zip(both, (count, 36)):  # of the pictures, and of drawings, which are read alike here
        assert len(own.control) == size and torch.equal(own.interval90, final.interval90[:size])
    assert final.std.min() > calibrated[1].min() > 0
    known = torch.tensor([[[0.0, 0.0], [0.0, 1.0]]])  # nothing is unsure about the first
    assert Reading(controls[:1], 0 * known, known, *[None] * 4, *calibrated).std[0, 0] == 0


def test_drawings_are_read_as_they_would_be_afterwards(make_model, normal, tmp_path, monkeypatch):
    """What is told of drawings has the bars of what is read, here of both the denoising and a proposal."""
    model, controls = make_model(1, "coordinate", proposals=2), torch.linspace(-1, 3, 12)[:, None].double()
    model.control_net.register_to_config(control_low=[-2.0], control_high=[4.0])
    save_model(model, tmp_path)
    latents, embeddings = normal(12, CHANNELS, LATENT_SIZE, LATENT_SIZE), model.base.embed([""])[0]

    class Noise(torch.utils.data.Dataset):
        def __init__(self):
            self.controls = controls

        def __len__(self):
            return len(controls)

        def __getitem__(self, i):
            return {"latents": latents[i], "embeddings": embeddings, "control": controls[i]}

    monkeypatch.setattr(calibration, "draw_latents", lambda model, target, control: target.latents.flip(0))
    model = load_model(tmp_path)
    *_, drawn = calibrate(model, tmp_path, Noise())
    again = reading.read_controls(model, Target(embeddings.expand(12, -1, -1), latents.flip(0)))
    assert torch.allclose(drawn.control, again.control) and torch.allclose(drawn.std, again.std)
    assert not torch.allclose(drawn.control, drawn.lowest)


@pytest.fixture
def opinions():
    """Truths (N, 2), of which the second goes round; a Reading that errs by 0.2; other estimates, which err by 0.1."""
    generator, count, periods, middle = torch.Generator().manual_seed(0), 4000, (None, 10.0), (0.0, 5.0)
    truth = torch.tensor([2.0, 9.9]).double().expand(count, 2)
    first, second = (truth + err * torch.randn(count, 2, generator=generator) for err in (0.2, 0.1))
    covariance = 0.2**2 * torch.eye(2).double().expand(count, 2, 2)
    learned = dict(error_scale=torch.ones(2).double(), error_floor=torch.zeros(2).double())
    first = wrap(first, periods, torch.tensor(middle))
    circles = dict(periods=periods, middle=middle)
    return truth, Reading(first, 0 * covariance, covariance, *[None] * 4, **learned, **circles), second


def test_a_second_opinion_counts_by_its_variance(opinions):
    truth, reading, second = opinions
    both = reading.with_opinion(second, torch.full_like(second, 0.1))
    assert both.std.flatten().tolist() == pytest.approx([0.2 * 0.2**0.5] * second.numel())
    errors = wrap(both.control - truth, reading.periods)
    assert errors.std(0).tolist() == pytest.approx([0.2 * 0.2**0.5] * 2, rel=0.05)
    assert both.control[:, 1].min() >= 0 and both.control[:, 1].max() <= 10
    assert torch.equal(both.lowest, reading.control)
    for correlation in (0.0, 0.5):
        ignored = reading.with_opinion(second, torch.full_like(second, torch.inf), correlation)
        assert torch.equal(ignored.control, reading.control) and torch.equal(ignored.std, reading.std)


@pytest.fixture
def alike(opinions):
    """Estimates whose errors are those of the Reading and others as large, and their correlation with it."""
    truth, reading, second = opinions
    return truth + wrap(reading.control - truth, reading.periods) + 2 * (second - truth), 0.5**0.5


def test_of_two_that_err_alike_the_worse_adds_nothing(opinions, alike):
    truth, better, _ = opinions
    values, correlation = alike
    unit, circles = torch.ones_like(values), torch.tensor(better.middle)
    worse = replace(better, control=wrap(values, better.periods, circles), error_scale=2**0.5 * better.error_scale)
    for first, second in ((better, worse), (worse, better)):
        for more in (0, 0.2):  # with which the better one would count for more than all
            both = first.with_opinion(second.control, second.std[0, 0] * unit, correlation + more)
            torch.testing.assert_close(both.control, better.control)
            torch.testing.assert_close(both.std, better.std)


def test_calibration_learns_how_far_errors_are_alike(opinions, alike):
    truth, reading, second = opinions
    for other, correlation in ((second, 0), alike):
        learned = calibration.judge_opinion(reading, other, torch.ones_like(second), truth)
        assert learned["correlation"].item() == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 9, 29])
def test_few_errors_tell_what_nine_in_ten_others_stay_below(count):
    """Of normal errors; the largest of four alone is above 80% of others."""
    errors = torch.randn(1 + count, 200000, generator=torch.Generator().manual_seed(count), dtype=torch.float64).abs()
    inside = errors[0] <= calibration.nine_in_ten(errors[1:])
    assert 0.895 < inside.double().mean() < 0.93


def test_calibration_knows_how_far_to_trust_an_opinion(opinions):
    """One that claims a third of its errors."""
    truth, reading, second = opinions
    claimed = torch.full_like(second, 0.1 / 3)
    learned = calibration.judge_opinion(reading, second, claimed, truth)
    trusted = widen(claimed, learned["scale"], learned["floor"])
    assert trusted.flatten().tolist() == pytest.approx([0.1] * trusted.numel(), rel=0.1)
    reading.error_scale = learned["error_scale"]
    both = reading.with_opinion(second, trusted)
    inside = wrap(both.control - truth, reading.periods).abs() <= both.margin
    assert inside.double().mean(0).tolist() == pytest.approx([0.9, 0.9], abs=0.02)


def test_bars_hold_nine_in_ten_though_noise_is_a_part_of_them(opinions):
    """Where only one of two numbers is read alike, which a correlation of both does not tell."""
    truth, reading, second = opinions
    reading.noise_covariance, reading.residual_covariance = (
        reading.residual_covariance,
        0.1 * reading.residual_covariance,
    )
    second[:, 0], std = reading.control[:, 0], torch.full_like(second, 0.1)
    judged = calibration.judge_opinion(reading, second, std, truth, moderated=False)
    both = calibration.hear(reading, second, std, judged)
    inside = wrap(both.control - truth, reading.periods).abs() <= both.margin
    assert inside.double().mean(0).tolist() == pytest.approx([0.9, 0.9], abs=0.005)


def test_bars_settle_where_an_opinion_would_be_trusted_too_much():
    """It errs alike and more; if bars shrink as they grow, 42% of errors lie within them at last, or all, by turns."""
    drawn = torch.randn(36, 2, 1, generator=torch.Generator().manual_seed(113), dtype=torch.float64)
    errors, second = drawn[:, 0], 4.56 * (0.95 * drawn[:, 0] + math.sqrt(1 - 0.95**2) * drawn[:, 1])
    noise, residual = (torch.full((36, 1, 1), std**2, dtype=torch.float64) for std in (2.75, 1.08))
    reading = Reading(errors, noise, residual, *[None] * 4, *torch.tensor([[1.0], [0.0]]).double(), periods=(None,))
    scale, floor = calibration.moderate((errors / Z90).square() - noise[:, 0], residual[:, 0])
    reading = replace(reading, error_scale=scale, error_floor=floor)
    std, truth = torch.full_like(second, 2.49), torch.zeros_like(second)
    judged = calibration.judge_opinion(reading, second, std, truth, moderated=False)
    both = calibration.hear(reading, second, std, judged)
    assert (both.control.abs() <= both.margin).double().mean() >= 0.88
    assert both.control.square().mean() < 2 * errors.square().mean()


def test_an_interval_as_wide_as_the_range_is_a_guess():
    """Neither of a number that was given, nor where it is pixels that leave it open, which is told otherwise."""
    config = SimpleNamespace(control_low=[0.0, 0.0, 0.0], control_high=[10.0, 10.0, 10.0], guessed=[False, True, False])
    known = torch.diag_embed(torch.tensor([[2.7, 0.1, 0.0], [2.8, 0.1, 0.1]]).double().square())
    reading = Reading(torch.full((2, 3), 5.0).double(), known, 0 * known, *[None] * 4, *torch.zeros(2, 3).double())
    expected = [[False, True, False], [True, True, False]]
    assert is_guess(config, reading).tolist() == expected
    assert is_guess(config, replace(reading, reach=torch.full((2, 3), 9.0))).tolist() == expected


@pytest.mark.parametrize(
    "value, std, told", [(2, None, "+2.000"), (3.2e-6, None, "+3.2e-06"), (0, 0.02, "+0.000 ± 0.020")]
)
def test_small_numbers_are_told_with_an_exponent(value, std, told):
    assert tell_value(value, std) == told
    assert tell_value(1.25e-15, 2e-17) == "+1.25e-15 ± 2e-17"


@pytest.mark.parametrize("std, digits", [(0.2, 3), (0.05, 3), (0.0071, 4), (0.00006, 6), (0.0, 3), (math.inf, 3)])
def test_as_many_digits_are_told_as_mean_something(std, digits):
    assert decimals(std) == digits


def test_moments_of_a_mixture(make_model):
    """Of an ordinary number, and of one that goes round, about which the second picture says nothing."""
    model = make_model(2, "reference", periods=[None, 360.0], proposals=2, flows=True)
    model.control_net.register_to_config(control_mean=[5.0, 180.0], control_std=[2.0, 360 / 12**0.5])
    weights = torch.tensor([[0.5, 0.5], [1.0, 1e-9]]).log()
    phase = math.radians(350)
    there = [2**0.5 * math.sin(phase), 2**0.5 * math.cos(phase)]
    mean = torch.tensor([[[1.0, *there], [-1.0, *there]], [[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    std = torch.tensor([[[0.0, 0.1, 0.1]] * 2, [[1.0, 1.0, 1.0]] * 2])
    control, spread = Proposal.moments(weights, mean, std, model.control_net.config)
    assert control[0].tolist() == pytest.approx([5.0, 350.0], abs=1e-3) and control[1, 0].item() == pytest.approx(5)
    assert spread[0].tolist() == pytest.approx([2.0, math.degrees(0.1 / 2**0.5)], rel=1e-3)
    assert spread[1].tolist() == pytest.approx([2.0, 360 / 12**0.5], rel=1e-3)


@pytest.fixture
def spiral(trained, monkeypatch):
    """A model of a number from 0 to 9 that comes round every 3, nearly; a target's first latent is its truth."""

    class Spiral(Objective):
        paired = True
        middle_draws = DenoisingObjective.middle_draws

        def __init__(self, model, target, free=None, draws=8, seed=0):
            super().__init__(model, torch.tensor([True]), draws)
            self.target, self.truth = target, target.latents[:, 0, 0, 0].double()
            self.noise = 0.1 * torch.randn(draws, 3, generator=torch.Generator().manual_seed(0))

        def residuals(self, control, index, draws):
            def shown(number):
                angle = number * 2 * math.pi / 3
                return torch.cat([angle.cos(), angle.sin(), number / 10], -1)

            return (shown(control) - shown(self.truth[index, None, None]) + self.noise[draws]).float()[:, :, None]

        def unexplained(self, residuals):
            return residuals[:, 0, 0, 0]

    for room in (reading, calibration):
        monkeypatch.setattr(room, "DenoisingObjective", Spiral)
    model = trained()
    model.control_net.register_to_config(control_low=[0.0], control_high=[9.0])
    return model


def test_no_valley_is_missed_where_the_response_is_not_monotone(spiral):
    truth = torch.linspace(0.1, 8.9, 40).double()[:, None]
    target = Target(torch.zeros(40, 77, 16), truth.float()[:, :, None, None])

    def missed():
        return ((read_controls(spiral, target).control - truth).abs() > 0.2).sum().item()

    assert missed() > 0  # with the fewest probes
    probes = choose_probes(spiral, target.select(slice(None, None, 7)), truth[::7])
    assert PROBES < probes <= MOST_PROBES
    spiral.control_net.register_to_config(probes=probes)
    assert missed() == 0


def test_one_valley_takes_the_fewest_probes(trained, explained, make_target):
    model, truth = trained(), torch.tensor([[1.7], [-1.2]]).double()
    explained(truth)
    assert choose_probes(model, make_target(2), truth) == PROBES


@pytest.mark.parametrize("at, width", [(2, 5), (0, 5), (6, 4), (5, 4), (7, 4)])
def test_a_valley_reaches_as_far_as_the_loss_rises(at, width):
    assert valley_width([5, 3, 1, 2, 6, 4, 3, 7], at) == width


def test_a_lower_place_in_the_profile_is_found(trained):
    config = trained().control_net.config  # searched from -4.1 to 6.1
    control = torch.tensor([[1.0], [1.0], [1.0]]).double()
    points = torch.tensor([0.0, 1.1, 3.0]).double().expand(3, 1, 3)[..., None]
    losses = torch.tensor([[[5.0, 1.0, 2.0]], [[5.0, 1.0, 3.5]], [[5.0, 1.0, 2.0]]])
    profiles = control, points, losses, torch.tensor([3.0, 3.0, 1.5])
    assert find_lower(search_bounds(config), [None], *profiles).tolist() == [
        [3.0],
        [1.0],
        [1.0],
    ]  # 1.1 is the valley found
    known = search_bounds(config, {config.control_names[0]: 1.0})
    assert find_lower(known, [None], *profiles).tolist() == control.tolist()


def test_large_numbers_keep_their_digits(trained, explained, make_target):
    """Unix times: a second is lost in single precision."""
    model, start = trained(), 1.7e9
    statistics = dict(control_mean=[start + 30.0], control_std=[20.0])
    model.control_net.register_to_config(control_low=[start], control_high=[start + 60.0], **statistics)
    truth = torch.tensor([[start + 17.25]], dtype=torch.float64)
    explained(truth)
    found = read_controls(model, make_target(1))
    assert found.control.item() == pytest.approx(truth.item(), abs=0.05, rel=0)


def test_a_control_that_was_never_calibrated_says_so(trained, explained, make_target):
    model = trained()
    model.control_net.register_to_config(error_scale=None)
    explained(torch.tensor([[1.7]]).double())
    found = read_controls(model, make_target(1))
    assert found.flags == [["uncalibrated"]] and not found.calibrated


def test_a_periodic_number_is_read_across_its_seam(periodic, explained, make_target):
    """Within one circle, with intervals that run through its seam, and never outside."""
    model, truth = periodic(), torch.tensor([[0.01], [9.99], [5.0]]).double()
    model.control_net.register_to_config(error_floor=[0.03])
    explained(truth, noise=1e-3)
    found = read_controls(model, make_target(3))
    assert wrap(found.control - truth, (10.0,)).abs().max() < 0.02
    assert ((found.control >= 0) & (found.control < 10)).all() and found.flags == [[], [], []]
    low, high = found.interval90[:, 0].T
    assert (low > high).tolist() == [True, True, False] and (low >= 0).all() and (high < 10).all()


@pytest.mark.parametrize("start", [9.0, 0.5, 25.0])
def test_steps_pass_the_seam(periodic, explained, make_target, start):
    model, truth = periodic(), torch.tensor([[0.2]]).double()
    explained(truth, noise=1e-3)
    found = read_controls(model, make_target(1), start=torch.full((1, 1, 1), start).double())
    assert wrap(found.control - truth, (10.0,)).abs().max() < 0.02


def test_a_periodic_number_beside_another_is_read(periodic, explained, make_target):
    model, truth = periodic((10.0, None)), torch.tensor([[9.95, 0.3], [3.0, 2.2]]).double()
    explained(truth, noise=1e-3)
    found, profiles = read_and_profile(model, make_target(2))
    assert wrap(found.control - truth, (10.0, None)).abs().max() < 0.02
    along, across = profiles[0][0, 0, :, 0], profiles[0][0, 1, :, 1]  # half a turn either way; the searched range
    torch.testing.assert_close(along[[0, -1]] - found.control[0, 0], torch.tensor([-5.0, 5.0]).double())
    torch.testing.assert_close(across[[0, -1]], torch.tensor([-2.4, 4.4]).double())
    known = read_controls(model, make_target(2), known={model.control_net.config.control_names[0]: 13.0})
    assert known.control[:, 0].tolist() == [3.0, 3.0] and not known.std[:, 0].any()


def test_what_is_read_with_a_figure_depends_on_no_other_target(periodic, make_target, monkeypatch):
    """The second has a lower place than was read, and is read anew; the first is not."""
    model, target = periodic((None,)), make_target(2)
    alone = read_controls(model, target)
    lower = alone.lowest + torch.tensor([[0.0], [0.5]])
    monkeypatch.setattr("cldm.reading.find_lower", lambda *_: lower)
    found, (points, losses, here) = read_and_profile(model, target)
    for key in ("control", "std", "loss", "iterations"):
        own, before = getattr(found, key), getattr(alone, key)
        assert own.shape == before.shape and torch.equal(own[0], before[0])
    assert found.others[0] == alone.others[0] and found.model_calls > alone.model_calls
    assert len(points) == len(losses) == len(here) == 2
    assert points[1, 0, :, 0].min() <= found.lowest[1, 0] <= points[1, 0, :, 0].max()


def test_a_periodic_number_without_effect_may_be_anywhere_and_says_so(periodic, explained, make_target):
    model = periodic(fresh=True)
    explained(torch.tensor([[1.0]]).double(), noise=0.1)
    found = read_controls(model, make_target(1))
    assert found.flags == [["ambiguous"]] and found.interval90[0].tolist() == [[0.0, 10.0]]
    assert found.std.item() == pytest.approx(10 / 12**0.5)


def test_probes_cover_a_circle_once(periodic):
    bounds = search_bounds(periodic().control_net.config)
    points = fill_range(8, bounds, torch.tensor([True]))
    assert points.flatten().tolist() == [0.625 + 1.25 * k for k in range(8)]
    gaps = wrap(points[:, None] - points, (10.0,)) / 10
    losses = torch.tensor([[1.0, 2.0, 3.0, 9.0, 9.0, 9.0, 3.0, 2.0], [2.0, 3.0, 9.0, 9.0, 9.0, 9.0, 3.0, 1.0]])
    assert find_valleys(gaps, losses).nonzero().tolist() == [[0, 0], [1, 7]]  # neighbours through the seam


def test_solutions_either_side_of_a_seam_are_one_valley():
    found = solution(torch.tensor([[0.05], [9.95], [3.0]]), torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1, 1))
    objective, bounds = SimpleNamespace(free=torch.tensor([True]), periods=[10.0]), torch.tensor([[0.0], [10.0]])
    assert [own.tolist() for own in distinct_solutions(found, torch.zeros(3), objective, bounds)] == [[0, 2]]
