"""Training: falls, touches nothing but the control, leaves whole folders, goes on where it was killed."""

from pathlib import Path

import pytest
import torch

import tutorial_train
from cldm.dataset import ControlDataset, split_rows
from cldm.model import fit_statistics, load_model, save_model
from cldm.training import ControlTraining
from ldm.settings import InputError, override, read_yaml

SOURCES = [[1, 0.5], [2, "0.5"], ["3", 1.0], [4, 2.0]]
VALIDATION = [[1.5, 0.5], [2.5, 1.0]]


@pytest.fixture
def train(base_yaml, write_dataset, tmp_path):
    """train(*arguments) -> out_dir, after 4 steps of two pictures on a tiny dataset of two numbers."""
    write_dataset(SOURCES)
    data_root = write_dataset(VALIDATION, file="validation.json")
    (data_root / "controls.yaml").write_text("names: [angle, zoom]\nunits: [degrees, '']\n")

    def run(*arguments):
        defaults = [
            f"data_root={data_root}",
            f"base={base_yaml}",
            f"out_dir={tmp_path / 'out'}",
            "batch_size=2",
            "max_steps=4",
            "logger_freq=2",
            "precision=32-true",
            "accelerator=cpu",
            "devices=1",
        ]
        s = override(tutorial_train.settings, [*defaults, *arguments])
        tutorial_train.main(s)
        return Path(s.out_dir)

    return run


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before, module):
    """Returns: names of the weights of a module that are not those of another, or of its copy `before`."""
    before = before if isinstance(before, dict) else before.state_dict()
    assert before.keys() == module.state_dict().keys()
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_done(out_dir):
    return torch.load(out_dir / "resume.ckpt", weights_only=True)["global_step"]


def test_training_leaves_a_control_that_can_be_loaded(train, base_yaml, base, capsys):
    on_disk = files(base_yaml.parent)
    out_dir = train("only_mid_control=true")
    assert files(base_yaml.parent) == on_disk
    assert "pictures of 40 x 40 resized to 32 x 32" in capsys.readouterr().out
    for folder in (out_dir, out_dir / "last"):
        model = load_model(folder)
        config, controls = model.control_net.config, torch.tensor([[1, 0.5], [2, 0.5], [3, 1.0], [4, 2.0]])
        torch.testing.assert_close(torch.tensor(config.control_mean), controls.mean(0))
        torch.testing.assert_close(torch.tensor(config.control_std), controls.std(0, correction=0))
        assert (list(config.control_low), list(config.control_high)) == ([1.0, 0.5], [4.0, 2.0])
        assert list(config.control_names) == ["angle", "zoom"] and list(config.control_units) == ["degrees", ""]
        assert not changed(base, model.base)
        assert model.control_net.controlnet_mid_block.weight.any()  # it learned
        assert not any(parameter.any() for parameter in model.control_net.controlnet_down_blocks.parameters())
        assert not (folder / "unet").exists()
        assert read_yaml(folder / "model.yaml").only_mid_control is True
    assert {path.name for path in (out_dir / "pictures").iterdir()} == {"000002.png", "000004.png"}
    assert list((out_dir / "tensorboard").glob("events*"))
    assert not list(out_dir.rglob(".partial*"))


def test_killed_training_goes_on_from_its_checkpoint(train, monkeypatch):
    trained = []
    step = ControlTraining.training_step
    monkeypatch.setattr(
        ControlTraining, "training_step", lambda self, *args: (trained.append(self.global_step), step(self, *args))[1]
    )
    out_dir = train()
    before = load_model(out_dir / "last").control_net
    assert trained == [0, 1, 2, 3] and steps_done(out_dir) == 4
    train("max_steps=8")
    assert trained == list(range(8)) and steps_done(out_dir) == 8
    assert changed(before, load_model(out_dir / "last").control_net)


def test_finished_training_started_again_keeps_its_control(train):
    out_dir = train()
    before = load_model(out_dir).control_net
    train()
    assert not changed(before, load_model(out_dir).control_net) and steps_done(out_dir) == 4


def test_same_seed_trains_the_same_control(train, tmp_path):
    first = load_model(train("max_steps=2")).control_net
    again = load_model(train("max_steps=2", f"out_dir={tmp_path / 'again'}")).control_net
    other = load_model(train("max_steps=2", f"out_dir={tmp_path / 'other'}", "seed=1")).control_net
    assert not changed(first, again) and changed(first, other)


def test_unlocked_unet_is_saved_and_used(train, base):
    out_dir = train("sd_locked=false", "max_steps=2", "learning_rate=1e-2")
    model = load_model(out_dir)
    assert (out_dir / "unet" / "config.json").is_file()
    learned = changed(base.unet.half().float(), model.base.unet)  # a control's folder is in half precision
    assert learned and all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in learned)
    assert not changed(base.vae, model.base.vae) and not changed(base.text_encoder, model.base.text_encoder)


def test_resume_path_keeps_a_trained_unet(train, make_model, tmp_path):
    """What was trained on this UNet is worth nothing without it, whether or not it goes on learning."""
    earlier = make_model(2)
    earlier.own_unet = True
    earlier.base.unet.conv_out.bias.add_(1.0)
    save_model(earlier, tmp_path / "earlier")
    out_dir = train(f"resume_path={tmp_path / 'earlier'}", "max_steps=1")
    assert not changed(load_model(tmp_path / "earlier").base.unet, load_model(out_dir).base.unet)


def test_resume_path_keeps_weights_and_statistics(train, make_model, tmp_path):
    model = make_model(2)
    fit_statistics(model.control_net, [(0.0, 0.0), (10.0, 20.0)], ["a", "b"], ["", ""])
    save_model(model, tmp_path / "earlier")
    earlier = load_model(tmp_path / "earlier").control_net
    out_dir = train(f"resume_path={tmp_path / 'earlier'}", "max_steps=1", "learning_rate=1e-12")
    trained = load_model(out_dir).control_net
    assert list(trained.config.control_mean) == [5.0, 10.0]
    assert len(changed(earlier, trained)) < 0.1 * len(earlier.state_dict())  # half precision hides such a step


def test_resume_path_of_another_dimension_is_named(train, make_model, tmp_path):
    save_model(make_model(1), tmp_path / "one")
    with pytest.raises(InputError, match=r"made for 1 number\(s\), .* has 2.*control_dim=2"):
        train(f"resume_path={tmp_path / 'one'}")


def test_checkpoint_of_another_control_is_named(train):
    train("max_steps=2")
    with pytest.raises(InputError, match="out_dir"):
        train("hint=coordinate")


def test_broken_checkpoint_is_named(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "resume.ckpt").write_bytes(b"half")
    with pytest.raises(InputError, match="resume.ckpt"):
        train()


def test_few_controls_train_without_validation(train, write_dataset, tmp_path):
    folder = write_dataset(SOURCES)
    (folder / "validation.json").unlink()
    out_dir = train("max_steps=2")
    assert load_model(out_dir).control_net.control_dim == 2 and (out_dir / "last").is_dir()


@pytest.fixture
def module_and_batch(make_model, write_dataset):
    """A fresh control, unfrozen, and one batch of all pictures of a tiny dataset."""

    def make(**options):
        model, (rows, _) = make_model(fresh=True), split_rows(write_dataset([-2, -1, 1, 2], size=32))
        fit_statistics(model.control_net, [row.control for row in rows], ["a", "b"], ["", ""])
        module = ControlTraining(model, **{**dict(learning_rate=1e-2, steps=30), **options})
        return module, torch.utils.data.default_collate(list(ControlDataset(rows, model.base, 32)))

    return make


def test_loss_falls_and_only_the_control_learns(module_and_batch, normal):
    module, batch = module_and_batch(steps=40)
    before, control_before = weights(module.model.base), weights(module.model.control_net)
    optimizer = module.configure_optimizers()["optimizer"]
    noise, timesteps = normal(*batch["latents"].shape), torch.tensor([100, 300, 600, 900])
    losses = []
    for _ in range(40):
        loss = module.denoising_loss(batch, noise, timesteps, torch.ones(4, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not changed(before, module.model.base)
    assert all(p.grad is None for p in module.model.base.parameters())
    learned = changed(control_before, module.model.control_net)
    for part in ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block", "down_blocks"):
        assert any(name.startswith(part) for name in learned)


@pytest.mark.parametrize("sd_locked", [True, False])
def test_what_is_trained_and_kept_in_checkpoints(module_and_batch, sd_locked):
    module, _ = module_and_batch(sd_locked=sd_locked)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    control = {name for name in module.state_dict() if name.startswith("model.control_net.")}
    decoder = {name for name in module.state_dict() if name.startswith("model.base.unet.up_blocks.")}
    assert control <= trained and (not decoder & trained if sd_locked else decoder <= trained)
    assert not any("vae" in name or "text_encoder" in name or "down_blocks" in name for name in trained - control)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == trained


def test_loss_is_of_velocity_or_of_noise_as_the_base_says(module_and_batch, normal):
    module, batch = module_and_batch()
    scheduler, noise, timesteps = module.model.base.scheduler, normal(*batch["latents"].shape), torch.tensor([500] * 4)
    kept = torch.ones(4, dtype=torch.bool)
    noisy = scheduler.add_noise(batch["latents"], noise, timesteps)
    with torch.no_grad():
        predicted = module.model.predict(noisy, timesteps, batch["embeddings"], batch["control"])
        velocity = module.denoising_loss(batch, noise, timesteps, kept)
        scheduler.register_to_config(prediction_type="epsilon")
        epsilon = module.denoising_loss(batch, noise, timesteps, kept)
    torch.testing.assert_close(epsilon, (predicted - noise).square().mean((1, 2, 3)))
    # Salimans & Ho 2022: v = alpha eps - sigma x
    alpha, sigma = scheduler.alphas_cumprod[500].sqrt(), (1 - scheduler.alphas_cumprod[500]).sqrt()
    target = alpha * noise - sigma * batch["latents"]
    torch.testing.assert_close(velocity, (predicted - target).square().mean((1, 2, 3)))


def test_dropped_prompts_are_the_empty_prompt(module_and_batch, normal):
    module, batch = module_and_batch()
    noise, timesteps = normal(*batch["latents"].shape), torch.tensor([500] * 4)

    @torch.no_grad()
    def loss(kept, **changes):
        return module.denoising_loss({**batch, **changes}, noise, timesteps, torch.tensor(kept))

    mixed = loss([True, False, True, False])
    torch.testing.assert_close(mixed[::2], loss([True] * 4)[::2])
    torch.testing.assert_close(mixed[1::2], loss([True] * 4, embeddings=batch["empty"])[1::2])
    assert not torch.equal(mixed, loss([True] * 4))


@pytest.mark.parametrize("steps", [1, 2, 50, 2000])
def test_learning_rate_warms_up_and_falls_to_zero(module_and_batch, steps):
    module, _ = module_and_batch(steps=steps, learning_rate=1.0)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(steps + 1):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert 0 < rates[0] <= 1 and max(rates) > 0.9 and abs(rates[-1]) < 1e-6


@pytest.fixture
def given_losses(monkeypatch):
    """Validations find these losses, one after the other: the second is the best."""
    levels = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(
        ControlTraining,
        "validation_step",
        lambda self, batch, _: self.log("val_loss", next(levels), batch_size=2),
    )


def test_best_is_the_lowest_validation_loss(train, given_losses, tmp_path):
    """out_dir holds the step of the lowest val_loss, out_dir/last the last, over a restart too."""
    best = load_model(train()).control_net
    assert not changed(best, load_model(tmp_path / "out" / "last").control_net)
    train("max_steps=8")
    assert not changed(best, load_model(tmp_path / "out").control_net)
    assert changed(best, load_model(tmp_path / "out" / "last").control_net)


def test_the_last_step_is_validated(train, given_losses, tmp_path):
    """Though max_steps is no multiple of logger_freq; and the run can go on from its checkpoint."""
    best = load_model(train("max_steps=3")).control_net
    assert not changed(best, load_model(tmp_path / "out" / "last").control_net)
    assert steps_done(tmp_path / "out") == 3
    train("max_steps=5")
    assert not changed(best, load_model(tmp_path / "out").control_net)
