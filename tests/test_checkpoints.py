"""Single files in the original layouts: read as what they were written from, and refused where they are not it."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from cldm.model import load_base, read_model_yaml
from ldm.base import LatentDiffusion, check_parts, load_part
from ldm.checkpoints import find_control, identify, read_weights, to_half
from ldm.settings import InputError, Settings
from tests.conftest import build_text_encoder, build_unet, build_vae
from tests.original_layout import build, original_weights


def read(path, architecture, **options):
    return LatentDiffusion.from_pretrained(path, architecture=architecture, prediction_type="epsilon", **options)


@pytest.fixture
def weights(folder):
    return original_weights(LatentDiffusion.from_pretrained(folder))


def write(weights, form, path):
    """Write weights as people have them. Returns: the file."""
    if form == "safetensors":
        save_file(weights, path / "base.safetensors")
        return path / "base.safetensors"
    weights = {
        "bare": weights,
        # v1-5-pruned.ckpt: a whole checkpoint, with a class for a key
        "lightning": {"state_dict": weights, "callbacks": {ModelCheckpoint: {"best_model_score": None}}},
        "trainer": {"model": {f"module.{key}": tensor for key, tensor in weights.items()}, "epoch": 3},
        "deepspeed": {"module": weights, "dp_world_size": 2},
    }[form]
    torch.save(weights, path / "base.ckpt")
    return path / "base.ckpt"


@pytest.mark.parametrize("form", ["safetensors", "bare", "lightning", "trainer", "deepspeed"])
def test_a_single_file_is_what_its_folder_is(folder, weights, version, form, tmp_path):
    """Noise prediction, text embedding and decoded picture; the file's name says nothing."""
    original, found = read(folder, None), read(write(weights, form, tmp_path), folder)
    normal = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=normal)
    prompts = ["a photo of a cup", ""]
    expected = original.embed(prompts)
    torch.testing.assert_close(found.embed(prompts), expected, rtol=0, atol=1e-5)
    timesteps = torch.tensor([10, 900])
    pairs = [
        (base.unet(latents, timesteps, expected).sample, base.decode(latents), base.encode(base.decode(latents)))
        for base in (original, found)
    ]
    for one, other in zip(*pairs):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)


def test_the_average_is_taken_where_it_is_asked_for(folder, weights, tmp_path):
    averaged = {
        f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in weights.items() if "diffusion" in k
    }
    file = write({**weights, **averaged}, "safetensors", tmp_path)
    plain, average = (read(file, folder, use_ema=ema) for ema in (False, True))
    torch.testing.assert_close(average.unet.conv_in.bias, plain.unet.conv_in.bias + 1)
    with pytest.raises(InputError, match="no model_ema.… in it"):
        read(write(weights, "safetensors", tmp_path), folder, use_ema=True)
    rest = {key: tensor for key, tensor in weights.items() if "diffusion" not in key}
    with pytest.raises(InputError, match="no model.… in it"):
        read(write({**rest, **averaged}, "safetensors", tmp_path), folder, use_ema=True)


class Malicious:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.fixture
def refused(folder, capsys):
    """refused(file) -> the one line that a file gets."""

    def check(file):
        with pytest.raises(InputError) as error:
            read(file, folder)
        assert str(file) in str(error.value) and "\n" not in str(error.value)
        assert "this ran" not in capsys.readouterr().out
        return str(error.value)

    return check


def test_files_that_are_not_it_are_refused(refused, weights, version, tmp_path):
    file = tmp_path / "base.ckpt"
    torch.save({"state_dict": weights, "extra": Malicious()}, file)
    assert "would run" in refused(file) and "print" in refused(file)
    for form in "safetensors", "bare":
        whole = write(weights, form, tmp_path)
        file.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert "truncated" in refused(file)
    for kind, key in {
        "Stable Diffusion XL": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "a LoRA": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "a ControlNet in the original layout": "control_model.zero_convs.0.0.weight",
        "weights of an unknown kind": "weight",
    }.items():
        assert f"holds {kind}," in refused(write({key: torch.ones(1)}, "bare", tmp_path))
    other = original_weights(LatentDiffusion(*build(3 - version), DDIMScheduler()))
    assert f"holds Stable Diffusion {3 - version}.x" in refused(write(other, "safetensors", tmp_path))
    start = "model.diffusion_model."
    inpainting = {**weights, f"{start}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}
    assert "does not fit UNet2DConditionModel" in refused(write(inpainting, "safetensors", tmp_path))
    unclip = {**weights, f"{start}label_emb.0.0.weight": torch.zeros(8, 8)}
    assert "holds unCLIP" in refused(write(unclip, "safetensors", tmp_path))
    weights[f"{start}out.2.bias"][0] = torch.nan
    assert "UNet2DConditionModel has weights that are not finite, conv_out.bias" in refused(
        write(weights, "safetensors", tmp_path)
    )
    for key, missing in (f"{start}out.2.bias", "conv_out.bias"), ("first_stage_model.quant_conv.weight", "quant_conv"):
        del weights[key]
        assert f"no weights for {missing}" in refused(write(weights, "safetensors", tmp_path))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty" / "missing.ckpt")


@pytest.mark.parametrize(
    "start, told",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a web page or a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404", "a web page or a Git LFS pointer"),
        (b"nothing", "truncated, or no file of weights"),
    ],
)
def test_what_was_not_downloaded_is_named(start, told, tmp_path):
    file = tmp_path / "base.ckpt"
    file.write_bytes(start)
    with pytest.raises(InputError, match=told):
        read_weights(file)
    (tmp_path / "unet").mkdir()
    file.rename(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="unet.*not a whole" if start == b"nothing" else told):
        load_part(UNet2DConditionModel, tmp_path / "unet")


@pytest.mark.parametrize("saved, told", [({"epoch": 3, "loss": 1.0}, "epoch, loss"), ([torch.ones(1)], "list")])
def test_a_file_without_weights_says_what_it_has(saved, told, tmp_path):
    torch.save(saved, tmp_path / "base.ckpt")
    with pytest.raises(InputError, match=f"expected a dict of weights, found {told}"):
        read_weights(tmp_path / "base.ckpt")


def test_a_second_versions_file_must_be_told_what_it_predicts(folder, weights, version, tmp_path):
    """It comes in both kinds, and nothing in it tells them apart; the first version's predicts noise."""
    file = write(weights, "safetensors", tmp_path)
    if version == 1:
        assert LatentDiffusion.from_pretrained(file, architecture=folder).scheduler.config.prediction_type == "epsilon"
        return
    with pytest.raises(InputError, match="set prediction_type.*v_prediction if .*768.*epsilon if for 512"):
        LatentDiffusion.from_pretrained(file, architecture=folder)
    for kind in "v_prediction", "epsilon":
        base = LatentDiffusion.from_pretrained(file, architecture=folder, prediction_type=kind)
        assert base.scheduler.config.prediction_type == kind


@pytest.mark.parametrize("architecture", [None, "nowhere", "empty", "broken"])
def test_an_architecture_that_is_none_is_named(weights, architecture, tmp_path):
    for name in "vae", "unet", "text_encoder":
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "config.json").write_text('{"block_out_channels": "many"}')
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="rchitecture|config.json: no such file|holds Stable Diffusion"):
        read(write(weights, "safetensors", tmp_path), architecture and tmp_path / architecture)


SHARDED = {"max_shard_size": "20KB"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variant": "fp16"},
        {"variant": "non_ema"},
        SHARDED,
        {"safe_serialization": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("which", [1, 2])
def test_every_variant_of_a_folder_is_read(options, which, tmp_path):
    """Of the UNet, by diffusers, and of the text encoder, by transformers, which writes no pickles any more."""
    part = build(1)[which]
    if which == 1 and "safe_serialization" in options:
        torch.save(part.state_dict(), tmp_path / f"pytorch_model{'.fp16' if 'variant' in options else ''}.bin")
        part.config.save_pretrained(tmp_path)
    else:
        part.save_pretrained(tmp_path, **options)
    read = load_part(type(part), tmp_path).state_dict()
    assert all(torch.equal(read[key], tensor) for key, tensor in part.state_dict().items())


def test_of_several_variants_the_trained_one_in_full_is_read(tmp_path):
    part = build(1)[2]
    for variant, shift in (("non_ema", 2), ("fp16", 1), (None, 0)):
        with torch.no_grad():
            part.conv_in.bias.fill_(shift)
        part.save_pretrained(tmp_path, variant=variant)
        assert load_part(type(part), tmp_path).conv_in.bias.unique().item() == shift


def test_without_a_default_the_variant_in_full_is_read(tmp_path):
    part = build(1)[2]
    for variant, shift in (("bf16", 2), ("fp16", 1), ("fp32", 0)):
        with torch.no_grad():
            part.conv_in.bias.fill_(shift)
        part.save_pretrained(tmp_path, variant=variant)
    assert load_part(type(part), tmp_path).conv_in.bias.unique().item() == 0


@pytest.mark.parametrize("version", [2], indirect=True)
def test_2_with_its_text_encoder_as_the_first_of_several(folder, weights, tmp_path):
    renamed = {k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t for k, t in weights.items()}
    assert renamed.keys() != weights.keys()
    found = read(write(renamed, "safetensors", tmp_path), folder)
    torch.testing.assert_close(found.embed(["a cup"]), read(folder, None).embed(["a cup"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", [2], indirect=True)
def test_2_that_predicts_noise_is_of_512_pixels(folder, weights, tmp_path, monkeypatch):
    file, base = write(weights, "safetensors", tmp_path), LatentDiffusion.from_pretrained(folder)
    monkeypatch.setattr(LatentDiffusion, "from_pretrained", lambda *_, **__: base)
    sizes = [load_base(file, predicts)[1].image_size for predicts in ("epsilon", "v_prediction")]
    assert sizes == [512, 768]


def test_differences_from_a_base_are_no_controlnet(tmp_path):
    weights = {"control_model.input_blocks.0.0.weight": torch.ones(1), "difference": torch.ones(0)}
    assert not find_control(weights) and identify(weights) == "a ControlNet's differences from Stable Diffusion"


def test_a_file_that_holds_itself_comes_to_an_end(tmp_path):
    weights = {"weight": torch.ones(1)}
    weights["model"] = weights
    torch.save(weights, tmp_path / "base.ckpt")
    assert list(read_weights(tmp_path / "base.ckpt")) == ["weight"]


def test_what_a_folder_does_not_say_is_named(folder, tmp_path):
    with pytest.raises(InputError, match='"use_ema" is of a single file'):
        read(folder, None, use_ema=True)
    shutil.copytree(folder, tmp_path / "base")
    file = tmp_path / "base" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": None}))
    with pytest.raises(InputError, match="sample_size is None; name it in a YAML that says image_size"):
        load_base(tmp_path / "base")


def test_what_a_yaml_says_of_a_single_file_is_not_said_of_folders(folder, monkeypatch):
    monkeypatch.setattr("cldm.model.read_model_yaml", lambda path: Settings(read_model_yaml(path) | {"use_ema": True}))
    load_base(folder)


def base_of(**other):
    """Returns: vae, text encoder and UNet of the miniature base, of other configurations."""
    parts = {}
    with torch.device("meta"):
        for name, make in dict(vae=build_vae, text_encoder=build_text_encoder, unet=build_unet).items():
            part = make()
            config = part.config.to_dict() if name == "text_encoder" else dict(part.config)
            config = {key: value for key, value in config.items() if key[0] != "_"} | other.get(name, {})
            parts[name] = CLIPTextModel(CLIPTextConfig(**config)) if name == "text_encoder" else type(part)(**config)
    return parts


@pytest.mark.parametrize(
    "other, told",
    [
        ({"unet": {"in_channels": 9}}, "takes and returns: 9 and 4"),
        ({"unet": {"in_channels": 8}}, "takes and returns: 8 and 4"),
        ({"unet": {"in_channels": 16, "out_channels": 16}}, "its VAE's latents: 16 and 4"),
        ({"unet": {"cross_attention_dim": 32}}, "encoder's texts: 32 and 16"),
        ({"text_encoder": {"hidden_size": 32}}, "encoder's texts: 16 and 32"),
        ({"text_encoder": {"vocab_size": 1000}}, "tokens that its text encoder knows, and CLIP: 1000 and 49408"),
        ({"text_encoder": {"max_position_embeddings": 64}}, "tokens of a prompt, its and CLIP's: 64 and 77"),
        ({"unet": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8}}, "class_embed_type"),
        ({"unet": {"num_class_embeds": 1000}}, "num_class_embeds"),
        ({"unet": {"time_cond_proj_dim": 8}}, "time_cond_proj_dim"),
        (
            {
                "unet": {
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8,
                    "projection_class_embeddings_input_dim": 8,
                }
            },
            "addition_embed_type",
        ),
        ({"vae": {"shift_factor": 0.1}}, "shift of its VAE's latents: 0.1"),
    ],
    ids=str,
)
def test_a_base_whose_parts_do_not_fit_is_named(other, told):
    check_parts("base", **base_of())
    with pytest.raises(InputError, match=f"base base: .*{told}.*expected a text-to-image model"):
        check_parts("base", **base_of(**other))


def test_a_folder_of_another_pipeline_says_which(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(InputError, match="gone: no such file or folder"):
        load_base(tmp_path / "gone")
    with pytest.raises(InputError, match="no vae/ in it .*StableDiffusion3Pipeline"):
        LatentDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [65504.0, 70000.0, 1e-9, 3e38])
def test_what_half_precision_cannot_hold_stays_in_single(value):
    weights = {"weight": torch.tensor([value, value / 2]), "other": torch.tensor([1.0, 0.0])}
    read = to_half(weights)
    assert read["other"].dtype == torch.float16
    torch.testing.assert_close(read["weight"].float(), weights["weight"], rtol=1e-3, atol=0)
