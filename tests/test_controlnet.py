"""The numeric ControlNet: adds nothing when fresh, keeps its settings on disk, checks what it is given."""

import pytest
import torch
from conftest import CHANNELS, LATENT_SIZE, randomize_zero_convolutions

import tool_add_control
from cldm.controlnet import HINTS, NumericControlNet
from cldm.conversion import fit_statistics
from cldm.hints import decode, wrap
from cldm.model import load_base, load_model, save_model
from cldm.reference import FEATURES, FUSIONS
from ldm.schema import read_config, write_yaml
from ldm.settings import InputError, override
from ldm.unet import decode_unet, encode_unet


@pytest.fixture
def inputs(base, normal):
    """Noisy latents of two pictures, their timesteps and their text embeddings."""
    latents = normal(2, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return latents, torch.tensor([20, 700]), base.embed(["a cup", "a cat"])


@torch.no_grad()
def predict(model, inputs, control, **options):
    reference = inputs[0].flip(3) if model.control_net.uses_reference else None
    return model.predict(*inputs, torch.tensor(control), reference, **options)


@torch.no_grad()
def residuals(control_net, inputs, control):
    control = control_net.condition(control, inputs[0].flip(3)) if control.ndim == 2 else control
    down, mid = control_net(*inputs, control, return_dict=False)
    return [*down, mid]


@pytest.mark.parametrize("control_dim", [1, 2])
@pytest.mark.parametrize("hint", HINTS)
class TestFreshControl:
    def test_adds_exactly_nothing(self, make_model, base, inputs, hint, control_dim):
        model, control = make_model(control_dim, hint, fresh=True), [[3.0] * control_dim, [-3.0] * control_dim]
        assert torch.equal(predict(model, inputs, control), base.unet(*inputs, return_dict=False)[0])

    def test_saved_and_loaded_adds_exactly_nothing(self, base_yaml, base, inputs, hint, control_dim, tmp_path):
        s = override(tool_add_control.settings, [f"control_dim={control_dim}", f"hint={hint}"])
        tool_add_control.main(s, [str(base_yaml), str(tmp_path / "control")])
        model, control = load_model(tmp_path / "control"), [[3.0] * control_dim, [-3.0] * control_dim]
        assert model.control_net.config.hint == hint and model.control_net.control_dim == control_dim
        assert torch.equal(predict(model, inputs, control), base.unet(*inputs, return_dict=False)[0])

    def test_begins_with_the_encoder_of_the_unet(self, make_model, base, hint, control_dim):
        copied = make_model(control_dim, hint, fresh=True).control_net.down_blocks.state_dict()
        assert copied.keys() == base.unet.down_blocks.state_dict().keys()
        assert all(torch.equal(copied[k], v) for k, v in base.unet.down_blocks.state_dict().items())


WAYS = dict(proposals=2, flows=True), dict(modulated=True), *(dict(fusion=own) for own in FUSIONS[1:])


@pytest.mark.parametrize("way", WAYS, ids=str)
class TestWaysOfAControl:
    def test_a_fresh_one_adds_exactly_nothing(self, make_model, base, inputs, way):
        model = make_model(2, "reference", fresh=True, **way)
        control = [[3.0, 1.0], [-3.0, 1.0]]
        assert torch.equal(predict(model, inputs, control), base.unet(*inputs, return_dict=False)[0])

    def test_it_is_kept_on_disk(self, make_model, inputs, way, tmp_path):
        model = make_model(2, "reference", periods=[None, 360.0], **way)
        model.control_net.half().float()  # as weights are kept
        save_model(model, tmp_path / "control")
        loaded = load_model(tmp_path / "control", base=model.base)
        control = [[3.0, 1.0], [-3.0, 1.0]]
        assert torch.equal(predict(loaded, inputs, control), predict(model, inputs, control))
        assert (loaded.control_net.proposal is None) == ("proposals" not in way)

    def test_one_control_serves_several_latents(self, make_model, inputs, way):
        model, twice = make_model(2, "reference", **way), [part.repeat_interleave(3, 0) for part in inputs]
        control = torch.tensor([[3.0, 1.0], [-3.0, 1.0]])
        with torch.no_grad():
            shared = model.predict(*twice, control, inputs[0])
            own = model.predict(*twice, control.repeat_interleave(3, 0), twice[0])
        torch.testing.assert_close(shared, own)


def test_numbers_act_in_every_block(make_model, inputs):
    """With the hint silent, they still move what the ControlNet adds."""
    model = make_model(hint="reference", modulated=True)
    torch.nn.init.zeros_(model.control_net.controlnet_cond_embedding.out.weight)
    torch.nn.init.zeros_(model.control_net.controlnet_cond_embedding.out.bias)
    assert (predict(model, inputs, [[3.0], [3.0]]) - predict(model, inputs, [[-3.0], [-3.0]])).abs().max() > 1e-3


def test_a_view_is_of_any_size(make_model):
    view = make_model(hint="reference", fusion="attention").control_net.controlnet_cond_embedding.view
    for size in ((5, 8), (7, 7)):
        seen = view(torch.ones(2, 1), torch.randn(2, CHANNELS, *size))
        assert seen.shape == (2, FEATURES, *size) and seen.isfinite().all()


def test_a_number_is_decoded_as_it_was_encoded(make_model):
    model = make_model(3, periods=[None, 24.0, None])
    model.control_net.register_to_config(control_mean=[5.0, 12.0, -1.0], control_std=[2.0, 7.0, 0.1])
    control = torch.tensor([[4.0, 23.5, -1.2], [6.5, 0.25, -0.9], [5.0, 12.0, -1.0]], dtype=torch.float64)
    decoded = decode(model.control_net.normalize(control).double(), model.control_net.config)
    torch.testing.assert_close(decoded, control, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hint", HINTS)
def test_control_moves_the_prediction(make_model, inputs, hint):
    model = make_model(hint=hint)
    assert (predict(model, inputs, [[3.0], [3.0]]) - predict(model, inputs, [[-3.0], [-3.0]])).abs().max() > 1e-3


@pytest.mark.parametrize("hint", HINTS)
def test_number_is_not_rounded_on_its_way_in(make_model, inputs, hint):
    """Neither to half precision, in training, nor to float32 before it is normalised."""
    model = make_model(hint=hint)

    def at(control, mean, autocast=False):
        model.control_net.register_to_config(control_mean=[mean])
        reference = inputs[0].flip(3) if hint == "reference" else None
        control = torch.tensor([[control], [control]], dtype=torch.float64)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.predict(*inputs, control, reference)

    small = 1e-4 * model.control_net.config.control_std[0]
    assert torch.equal(at(1.7e9 + 2, 1.7e9), at(2.0, 0.0)) and not torch.equal(at(1.7e9 + 2, 1.7e9), at(1.7e9, 1.7e9))
    assert not torch.equal(at(2.0 + small, 0.0, autocast=True), at(2.0, 0.0, autocast=True))
    module = model.control_net.controlnet_cond_embedding
    condition = torch.cat([torch.full((1, 1, LATENT_SIZE, LATENT_SIZE), 1.001), inputs[0][:1]], 1)
    motion = torch.tensor([[1.001]]), LATENT_SIZE, LATENT_SIZE
    features = (lambda: module.motion(*motion)[0]) if hint == "reference" else lambda: module(condition[:, :1])
    with torch.no_grad():
        exact = features()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(features(), exact)


def test_a_modulating_number_is_not_rounded_with_its_base(make_model, inputs):
    model, seen, control = make_model(modulated=True), [], torch.tensor([[1.001], [2.0]], dtype=torch.float64)
    net = model.control_net.to_precision(torch.bfloat16)
    net.class_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.predict(*inputs, control)
    assert net.class_embedding.linear_1.weight.dtype == torch.float32 and net.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(seen[0], net.normalize(control))
    with torch.no_grad():
        exact = net.class_embedding(seen[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(net.class_embedding(seen[0]), exact)


def test_coordinate_hint_is_its_convolutions(make_model):
    """As which its weights are kept."""
    hint = make_model(hint="coordinate").control_net.controlnet_cond_embedding
    control = torch.full((2, 1, 3, 5), 0.7)
    hint.mlp[0].weight.data[:, 1:] = 0  # the positions
    with torch.no_grad():
        expected = hint.mlp(torch.cat([control, torch.zeros(2, hint.mlp[0].in_channels - 1, 3, 5)], 1))
        torch.testing.assert_close(hint(control), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_computes_in_it_under_autocast(make_model, inputs, dtype):
    """As without: what is trained under it is read without it. A CPU knows no mixture of float16 and bfloat16."""
    model = make_model()
    model.base.unet.to(dtype)
    encoded = encode_unet(model.base.unet, *inputs)
    alone = decode_unet(model.base.unet, encoded, [0] * len(encoded.skips), 0)
    with torch.autocast("cpu", torch.bfloat16):
        encoded = encode_unet(model.base.unet, *inputs)
        assert torch.equal(decode_unet(model.base.unet, encoded, [0] * len(encoded.skips), 0), alone)
        assert predict(model, inputs, [[3.0], [3.0]]).isfinite().all()


def test_strength_scales_what_is_added(make_model, base, inputs):
    model = make_model()
    none = base.unet(*inputs, return_dict=False)[0]
    assert torch.equal(predict(model, inputs, [[3.0], [3.0]], strength=0.0), none)
    weak, full = (
        (predict(model, inputs, [[3.0], [3.0]], strength=strength) - none).abs().mean() for strength in (0.1, 1.0)
    )
    assert 0 < weak < full


def test_only_mid_control_leaves_the_skip_connections_alone(make_model, inputs):
    model = make_model()
    everywhere = predict(model, inputs, [[3.0], [3.0]])
    model.control_net.register_to_config(only_mid_control=True)
    only_mid = predict(model, inputs, [[3.0], [3.0]])
    model.control_net.register_to_config(only_mid_control=False)
    for parameter in model.control_net.controlnet_down_blocks.parameters():
        parameter.zero_()
    assert torch.equal(only_mid, predict(model, inputs, [[3.0], [3.0]]))
    assert (only_mid - everywhere).abs().max() > 1e-3


@pytest.mark.parametrize("hint", HINTS)
def test_round_trip_through_a_folder(make_model, inputs, hint, tmp_path):
    model = make_model(2, hint)
    model.control_net.register_to_config(
        control_names=["angle", "zoom"],
        control_units=["degrees", ""],
        control_mean=[0.25, 1.0],
        control_std=[3.0, 0.5],
        control_low=[-5.0, 0.1],
        control_high=[5.0, 2.0],
    )
    model.control_net.save_pretrained(tmp_path)
    read = NumericControlNet.from_pretrained(tmp_path, local_files_only=True, low_cpu_mem_usage=False)
    for key in ("hint", "latent_size", "names", "units", "mean", "std", "low", "high"):
        key = key if key in ("hint", "latent_size") else f"control_{key}"
        before, after = model.control_net.config[key], read.config[key]
        assert (list(after) if isinstance(after, (list, tuple)) else after) == before
    control = torch.tensor([[2.0, 0.5], [-1.0, 1.5]])
    for before, after in zip(residuals(model.control_net, inputs, control), residuals(read, inputs, control)):
        assert torch.equal(before, after)


def test_saved_control_is_read_in_half_precision(make_model, inputs, tmp_path):
    model = make_model()
    save_model(model, tmp_path)
    before, after = predict(model, inputs, [[3.0], [1.0]]), predict(load_model(tmp_path), inputs, [[3.0], [1.0]])
    torch.testing.assert_close(before, after, atol=5e-3, rtol=5e-3)
    assert not any(p.requires_grad for p in load_model(tmp_path).parameters())


def test_save_without_unet_leaves_no_earlier_unet(make_model, tmp_path):
    """Else the next load would use weights that this control was not trained with."""
    trained = make_model()
    trained.own_unet = True
    save_model(trained, tmp_path)
    assert (tmp_path / "unet").is_dir()
    save_model(make_model(), tmp_path)
    assert not (tmp_path / "unet").exists()


def test_coordinate_hint_works_at_another_resolution(make_model, base, normal):
    control_net, embeddings = make_model().control_net, base.embed(["a cup"])
    down, _ = control_net(normal(1, CHANNELS, 12, 20), 5, embeddings, torch.tensor([[1.0]]), return_dict=False)
    assert down[0].shape[2:] == (12, 20)


def test_dense_hint_names_the_resolution_it_was_made_for(make_model, base, normal):
    control_net, embeddings = make_model(hint="dense").control_net, base.embed(["a cup"])
    with pytest.raises(InputError, match="8 x 8, got 16 x 16.*hint=coordinate"):
        control_net(normal(1, CHANNELS, 16, 16), 5, embeddings, torch.tensor([[1.0]]))


def test_coordinate_hint_sees_the_position(make_model):
    hint = make_model().control_net.controlnet_cond_embedding
    features = hint(torch.zeros(1, 1, 4, 6))[0]  # (channels, 4, 6)
    assert features.flatten(1).unique(dim=1).shape[1] == 4 * 6


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (2,), (2, 3, 8, 8), (2, 2, 8)])
def test_control_of_another_length_is_refused(make_model, inputs, shape):
    with pytest.raises(InputError, match="expected 2 numbers"):
        make_model(2).control_net(*inputs, torch.zeros(shape))


@pytest.mark.parametrize("hint", HINTS)
def test_constant_map_equals_vector(make_model, inputs, hint):
    control_net, control = make_model(2, hint).control_net, torch.tensor([[2.0, 0.5], [-1.0, 1.5]])
    condition = control_net.condition(control, inputs[0].flip(3))
    as_map = condition if condition.ndim == 4 else condition[:, :, None, None].expand(-1, -1, LATENT_SIZE, LATENT_SIZE)
    as_map = as_map.repeat_interleave(4, 2).repeat_interleave(4, 3)  # as diffusers' pipeline enlarges it
    for vector, constant in zip(residuals(control_net, inputs, control), residuals(control_net, inputs, as_map)):
        assert torch.equal(vector, constant)


def test_a_reference_is_seen_at_any_resolution_and_asked_for(make_model, base, normal):
    model, embeddings, control = make_model(2, "reference"), base.embed(["a cup"]), torch.tensor([[1.0, 0.5]])
    latents, reference = normal(1, CHANNELS, 12, 20), normal(1, CHANNELS, 12, 20)
    first, other = (model.predict(latents, 900, embeddings, control, r) for r in (reference, reference.flip(2)))
    assert first.shape == latents.shape and (first - other).abs().max() > 1e-3
    with pytest.raises(InputError, match="input_image_path"):
        model.predict(latents, 900, embeddings, control)
    with pytest.raises(InputError, match="expected 2 numbers .* and the latents of a reference"):
        model.control_net(latents, 900, embeddings, control)


@pytest.mark.parametrize("hint", HINTS)
def test_control_is_normalised_by_the_statistics(make_model, inputs, hint):
    control_net = make_model(2, hint).control_net
    control_net.register_to_config(control_mean=[10.0, -1.0], control_std=[5.0, 0.5])
    raw = residuals(control_net, inputs, torch.tensor([[15.0, -1.0], [0.0, -2.0]]))
    control_net.register_to_config(control_mean=[0.0, 0.0], control_std=[1.0, 1.0])
    normalised = residuals(control_net, inputs, torch.tensor([[1.0, 0.0], [-2.0, -2.0]]))
    assert all(torch.equal(a, b) for a, b in zip(raw, normalised))


def test_statistics_are_those_of_the_data(make_model):
    control_net = make_model(2, fresh=True).control_net
    fit_statistics(control_net, [(1.0, 7.0), (3.0, 8.0)], ["a", "b"], ["", "m"], ["x", "y", "y"])
    config = control_net.config
    assert (config.control_mean, config.control_low, config.control_high) == ([2.0, 7.5], [1.0, 7.0], [3.0, 8.0])
    assert (config.control_std, config.control_names, config.control_units) == ([1.0, 0.5], ["a", "b"], ["", "m"])
    assert config.prompts == ["y", "x"]


def test_wrap_takes_the_shortest_way_round():
    values = torch.tensor([[6.0, 6.0], [-5.0, -5.0], [5.0, 5.0], [22.0, 22.0], [-0.25, -0.25]]).double()
    expected = [[-4.0, 6.0], [-5.0, -5.0], [-5.0, 5.0], [2.0, 22.0], [-0.25, -0.25]]
    assert wrap(values, [10.0, None]).tolist() == expected and wrap(values, ()) is values
    assert wrap(values[:, :1], [10.0], 5.0).flatten().tolist() == [6.0, 5.0, 5.0, 2.0, 9.75]


@pytest.mark.parametrize("hint", HINTS)
def test_a_periodic_number_comes_back_to_the_same(make_model, inputs, hint, tmp_path):
    """Its hint is wider by one input; what does not go round is unlike after a turn."""
    model, plain = make_model(2, hint, periods=[10.0, None]), make_model(2, hint)
    widths = [own.control_net.controlnet_cond_embedding.mlp[0].weight.shape[1] for own in (model, plain)]
    assert widths[0] == widths[1] + 1
    save_model(model, tmp_path / "control")
    first, turned, half, other = (
        predict(load_model(tmp_path / "control"), inputs, [control, control])
        for control in ([0.25, 1.0], [20.25, 1.0], [5.25, 1.0], [0.25, 11.0])
    )
    torch.testing.assert_close(first, turned)
    assert min((first - half).abs().max(), (first - other).abs().max()) > 1e-3


def test_statistics_of_a_periodic_number_are_a_circle_s(make_model):
    for low, data in (0.0, [0.0, 2.0]), (-5.0, [-4.0, 4.0]), (0.0, [-4.0, 9.0]):
        control_net = make_model(2, fresh=True, periods=[10.0, None]).control_net
        fit_statistics(control_net, [(data[0], 7.0), (data[1], 8.0)], ["a", "b"], ["", "m"])
        config = control_net.config
        assert (config.control_low, config.control_high) == ([low, 7.0], [low + 10, 8.0])
        assert config.control_mean == [low + 5, 7.5] and config.control_std == [pytest.approx(10 / 12**0.5), 0.5]
        randomize_zero_convolutions(control_net)
        fit_statistics(control_net, [(30.0, 7.0), (-12.0, 9.0)], ["a", "b"], ["", "m"])
        assert (control_net.config.control_low, control_net.config.control_high) == ([low, 7.0], [low + 10, 9.0])


def test_unknown_hint_is_refused(base_yaml, tmp_path):
    s = override(tool_add_control.settings, ["hint=cnn"])
    with pytest.raises(InputError, match='coordinate, dense, original, reference, got "cnn"'):
        tool_add_control.main(s, [base_yaml, tmp_path / "control"])


def test_a_picture_size_that_does_not_fit_is_named(base_yaml, tmp_path):
    write_yaml(read_config(base_yaml) | {"image_size": 30}, tmp_path / "odd.yaml")
    with pytest.raises(InputError, match="image_size must be a multiple of 4 .* got 30"):
        load_base(tmp_path / "odd.yaml")


def test_base_folder_without_yaml_gets_its_own_picture_size(base_yaml):
    _, config = load_base(base_yaml.parent / "mini_sd")
    assert config.image_size == 32 and config.base == str(base_yaml.parent / "mini_sd")


def test_pictures_survive_the_latents_scale(base, normal):
    """encode multiplies by the scaling factor that decode divides by."""
    pictures = normal(1, 3, 32, 32).clamp(-1, 1)
    latents = base.encode(pictures)
    assert latents.shape == (1, CHANNELS, LATENT_SIZE, LATENT_SIZE)
    assert torch.equal(latents, base.vae.encode(pictures).latent_dist.mean * 0.5)
    torch.testing.assert_close(base.decode(latents), base.vae.decode(latents / 0.5).sample)
