"""Finding again what moved: the Matcher, and the drawn pairs that it learns from."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from cldm.conversion import add_control
from cldm.dataset import TrainingData
from cldm.matcher import HEADS, MATCHER_FILE, REACHES, Matcher, spread_over
from cldm.proposal import JOINED, POOLED, WIDTH, Proposal
from dataForTrain import flying
from ldm.settings import Settings
from tutorial_train import make_model, settings

SIZE, PLACES = 64, 32  # pixels of a side, and places


@pytest.fixture
def layers():
    """Returns: a background, and a round cut-out, each of its own smooth colours; PIL."""
    pixels = np.random.default_rng(0)

    def draw(mode):
        own = pixels.integers(0, 255, (12, 12, len(mode)), dtype=np.uint8)
        return Image.fromarray(own).resize((128, 128), Image.Resampling.BICUBIC)

    return draw("RGB"), flying.cut_blob(random.Random(0), draw("RGB"))


def move(pictures, moves):
    """pictures: (2, 3, H, W), target and reference. Returns: (3, places, places) of each, the reference where it is."""
    places = moves.shape[-1]
    middle = (torch.arange(places) + 0.5) / places * 2 - 1
    here = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1)
    target, reference = pictures.float().split(1)
    how = dict(align_corners=False, padding_mode="border")
    there = here + torch.from_numpy(moves).permute(1, 2, 0) * 2 / places
    return (F.grid_sample(picture, grid[None], **how)[0] for picture, grid in ((target, here), (reference, there)))


def test_moves_lead_to_what_is_shown(layers, monkeypatch):
    monkeypatch.setattr(flying, "RELIT", 0)
    monkeypatch.setattr(flying, "draw_light", lambda rng: (1, np.ones(3), np.zeros(2)))
    background, cutout = layers
    errors, unmoved, hidden = [], [], []
    for seed in range(8):
        pictures, moves, seen = flying.draw_pair(random.Random(seed), SIZE, PLACES, background, [cutout])
        assert pictures.shape == (2, 3, SIZE, SIZE) and moves.shape == (2, PLACES, PLACES)
        pictures = torch.from_numpy(pictures)
        for wrong, found in ((errors, moves), (unmoved, 0 * moves)):
            target, moved = move(pictures, found)
            wrong.append((target - moved).abs()[:, seen])
        hidden.append(1 - seen.mean())
    errors, unmoved = (torch.cat(own, 1).mean() for own in (errors, unmoved))
    assert errors < 0.2 * unmoved and 0.01 < np.mean(hidden) < 0.5


def test_light_changes_every_place_of_a_picture_alike():
    picture = Image.new("RGB", (4, 4), (100, 50, 20))
    assert (flying.light(picture, 1, np.ones(3), np.zeros(2)) == np.array([100, 50, 20])[:, None, None]).all()
    darker = flying.light(picture, 2, np.ones(3), np.zeros(2))
    assert darker[:, 0, 0].tolist() == [255 * 100**2 // 255**2, 255 * 50**2 // 255**2, 255 * 20**2 // 255**2]
    brighter_right = flying.light(picture, 1, np.ones(3), np.array([0.4, 0]))
    assert (np.diff(brighter_right.astype(int), axis=2) > 0).all() and not np.diff(brighter_right, axis=1).any()


def test_shares_of_whole_moves_have_the_moves_as_their_mean(normal):
    moves, reach = normal(2, 2, 3, 5).clamp(-2, 2), 2
    shares = spread_over(moves, reach)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 3, 5))
    mean = Matcher.flow(shares.log()[:, None], reach) * reach
    torch.testing.assert_close(mean, moves, atol=2e-3, rtol=0)


@pytest.fixture
def matcher(monkeypatch):
    monkeypatch.setattr("cldm.matcher.SHARPNESS", 40)  # sure of itself, untrained
    torch.manual_seed(0)
    return Matcher(4).eval()


def test_what_moved_is_found(matcher, normal):
    """By random features, too: a picture that moved by whole places, of both sides."""
    reference = normal(2, 4, 32, 32)
    target = reference.roll((2, -2), (2, 3))  # down and to the left: it lies above and to the right
    with torch.no_grad():
        logits = matcher.compare(*(matcher.encode(own) for own in (target, reference)))
    for own, heads, reach, step in zip(logits, HEADS, REACHES, (1, 2)):
        flow = Matcher.flow(own, reach).unflatten(1, (heads, 2))[..., 6:-6, 6:-6].mean((0, 1, 3, 4))
        torch.testing.assert_close(flow * reach * step, torch.tensor([2.0, -2.0]), atol=0.2, rtol=0)


def test_the_loss_is_least_for_what_is_true(matcher, normal):
    reference, seen = normal(2, 4, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    latents = torch.stack([reference.roll((2, -2), (2, 3)), reference], 1)
    seen[:, :4], seen[..., -4:] = False, False  # what came in from the other side
    true = torch.tensor([2.0, -2.0])[:, None, None].expand(2, 2, 32, 32)
    with torch.no_grad():
        losses = [matcher.loss(latents, moves, seen) for moves in (true, true + 0.5, -true, 0 * true)]
    assert losses[0] == min(losses) and losses[0] < 0.5 * losses[2]
    beyond = true.clone()
    beyond[:, :, :16] = 30  # places that are out of reach do not count
    with torch.no_grad():
        assert matcher.loss(latents, beyond, seen) < 2 * losses[0]
        assert matcher.loss(latents, beyond, seen & False) == 0


def test_a_fresh_proposal_begins_with_the_matcher_of_its_base(loaded_base, tmp_path):
    base, config = loaded_base
    torch.manual_seed(3)
    weights = Matcher(base.unet.config.in_channels).state_dict()
    save_file(weights, tmp_path / MATCHER_FILE)
    config = Settings(config | {"base": str(tmp_path)})
    own = add_control(base, config, hint="reference", proposals=2, flows=True).control_net.proposal.state_dict()
    assert all(torch.equal(own[key], weights[key]) for key in weights)
    assert add_control(base, config, hint="coordinate", proposals=2).control_net.proposal is not None


@pytest.mark.parametrize("absolute, expected", [(None, True), ([True, False], True), ([True, True], False)])
def test_what_moved_is_told_of_changes_alone(base_yaml, absolute, expected):
    numbers = dict(controls=np.eye(2), names=["turn", "light"], units=["", ""], absolute=absolute)
    data = TrainingData([], [], **numbers, ranges=dict.fromkeys(["turn", "light"], (0, 1)))
    net = make_model(Settings(settings | {"base": str(base_yaml)}), data).control_net
    assert net.config.proposals and net.config.flows == net.proposal.flows == expected


def test_moves_go_straight_to_the_last_layers_of_a_proposal(matcher, normal):
    """Without anything else that they see, pictures that moved unlike one another suggest unlike numbers."""
    proposal = Proposal(1, 4, 2, uses_reference=True, flows=True).eval()
    proposal.load_state_dict(matcher.state_dict(), strict=False)
    reference = normal(1, 4, 32, 32).expand(3, -1, -1, -1)
    target = torch.cat([own.roll(move, 3) for own, move in zip(reference.split(1), (-2, 2, 2))])
    with torch.no_grad():
        proposal.head[JOINED].weight[:, : WIDTH * POOLED**2] = 0
        left, right, again = proposal(target, reference)[1]
    assert torch.allclose(right, again, atol=1e-5) and (left - right).abs().max() > 1e-3


def test_moves_are_as_exact_in_mixed_precision_as_their_logits():
    """As what a proposal reads with is not what it was trained with, otherwise."""
    matcher, latents = Matcher(12), torch.randn(2, 1, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for logits, reach in zip(matcher.compare(*map(matcher.encode, latents)), REACHES):
            flow = matcher.flow(logits, reach)
            assert logits.dtype == flow.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(flow, matcher.flow(logits, reach))
