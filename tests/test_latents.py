"""Latents on disk: encoded once, shared by processes, whole after a kill, never those of another picture or VAE."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

import cldm.pairs
from cldm.dataset import Ahead, ControlDataset, TrainingData, iterate_rows, read_rows
from cldm.latents import CachedLatents
from cldm.pairs import validation_set
from ldm.settings import InputError

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def rows(write_dataset, monkeypatch):
    """Five rows, which are too many for memory."""
    monkeypatch.setattr("cldm.dataset.FEW", 0)
    return read_rows(write_dataset([1, 2, 3, 4, 5]) / "prompt.json")


@pytest.fixture
def cached(rows, base, tmp_path):
    """cached(base=base) -> a ControlDataset of the rows, whose latents are in tmp_path/latents."""
    return lambda base=base: ControlDataset(rows, base, 32, tmp_path / "latents")


def refuse(*_):
    raise AssertionError("encoded again")


def test_latents_are_encoded_once_and_are_those_of_the_picture(rows, cached, base, monkeypatch):
    precise, first = ControlDataset(rows, base, 32), cached()
    items = [first[i] for i in (4, 0, 2)]
    monkeypatch.setattr(base, "encode", refuse)
    for i, item in zip((4, 0, 2), items):
        assert item.keys() == precise[i].keys() and item["latents"].dtype == torch.float32
        error = (item["latents"] - precise[i]["latents"]).square().mean().sqrt() / precise[i]["latents"].std()
        assert 0 < error < 0.02
        assert torch.equal(item["embeddings"], precise[i]["embeddings"]) and item["control"] == precise[i]["control"]
    again = cached().__getitems__([0, 2, 4])
    assert all(torch.equal(again[k]["latents"], items[j]["latents"]) for k, j in enumerate((1, 2, 0)))
    with pytest.raises(AssertionError, match="encoded again"):
        cached()[1]


def test_latents_of_a_picture_do_not_depend_on_the_others(cached, tmp_path):
    together = cached().__getitems__(range(5))
    (tmp_path / "latents").rename(tmp_path / "other")
    alone = cached()
    assert all(torch.equal(alone[i]["latents"], item["latents"]) for i, item in enumerate(together))


def test_a_changed_picture_is_noticed(rows, cached):
    before, dataset = cached()[0]["latents"], cached()
    rows[0].target.write_bytes(rows[1].target.read_bytes())
    assert not torch.equal(dataset[0]["latents"], before)
    assert torch.equal(dataset[0]["latents"], dataset[1]["latents"])


def test_another_vae_has_its_own(cached, base, tmp_path):
    before = cached()[0]["latents"]
    with torch.no_grad():
        next(base.vae.parameters()).mul_(2)
    assert not torch.equal(cached()[0]["latents"], before)
    assert len(list((tmp_path / "latents").iterdir())) == 2


def test_references_are_cached_too(rows, base, tmp_path):
    file = rows.file
    file.write_text(file.read_text().replace("}", ', "reference": "prompt.json_0.png"}'))
    item = ControlDataset(read_rows(file), base, 32, tmp_path / "latents")[3]
    alone = ControlDataset(rows, base, 32, tmp_path / "latents")
    assert torch.equal(item["reference"], alone[0]["latents"]) and torch.equal(item["latents"], alone[3]["latents"])


def test_a_bad_picture_is_named_when_it_is_come_to(rows, cached):
    dataset = cached()
    rows[1].target.write_bytes(b"no picture")
    rows[2].target.unlink()
    for i, message in ((1, "not a picture"), (2, "no such file")):
        with pytest.raises(InputError, match=f'prompt.json line {i + 1}: "target" .*{message}'):
            next(iter(Ahead(dataset, 2, sampler=[0, i])))
    assert dataset[0]["latents"].isfinite().all()


def test_a_damaged_file_is_named(cached, tmp_path):
    cached()
    (file,) = (tmp_path / "latents").iterdir()
    file.write_bytes(b"no table" * 1000)
    with pytest.raises(InputError, match="sqlite: cannot be used .*; delete it, or choose another latents_cache"):
        cached()


def test_a_full_disk_is_no_damage(rows, base, small_disk, tmp_path):
    latents = CachedLatents(rows, base, 32, tmp_path / "latents")
    with small_disk(), pytest.raises(InputError, match="sqlite: cannot be used .*; make room, or choose another"):
        latents.keep({k.to_bytes(16): torch.zeros(latents.shape, dtype=torch.float16) for k in range(9)})


def fill(rows, base, folder, start):
    """Write latents that tell their key, one after the other."""
    latents = CachedLatents(rows, base, 32, folder)
    for k in range(start, start + 60):
        latents.keep({k.to_bytes(16): torch.full(latents.shape, float(k), dtype=torch.float16)})


def whole(rows, base, folder):
    """Returns: how many latents there are, after a look at each of them."""
    latents = CachedLatents(rows, base, 32, folder)
    assert latents.table.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = latents.fetch([k.to_bytes(16) for k in range(100)])
    assert all((own == int.from_bytes(key)).all() for key, own in found.items())
    return len(found)


def test_two_processes_fill_one_file(rows, base, tmp_path):
    fillers = [FORK.Process(target=fill, args=(rows, base, tmp_path, start)) for start in (0, 30)]  # 30 of both
    for filler in fillers:
        filler.start()
    for filler in fillers:
        filler.join()
    assert [filler.exitcode for filler in fillers] == [0, 0] and whole(rows, base, tmp_path) == 90


def test_a_kill_leaves_nothing_torn(rows, base, tmp_path):
    before = whole(rows, base, tmp_path)
    filler = FORK.Process(target=fill, args=(rows, base, tmp_path, 0))
    filler.start()
    while whole(rows, base, tmp_path) < 20:
        time.sleep(0.01)
    os.kill(filler.pid, signal.SIGKILL)
    filler.join()
    assert before == 0 and whole(rows, base, tmp_path) >= 20
    fill(rows, base, tmp_path, 0)
    assert whole(rows, base, tmp_path) == 60


def test_packed_rows_are_the_rows_of_the_file(write_dataset):
    file = write_dataset([[1, 2], [3, 4], [5, 6]]) / "prompt.json"
    extra = ', "reference": "prompt.json_0.png", "time": "2019-06-21"}'
    file.write_text("\n" + file.read_text().replace("}", extra).replace("a square", "ein Stück", 1))
    rows, plain = read_rows(file), list(iterate_rows(file))
    assert list(rows) == plain and rows[-1] == plain[-1] and list(rows[1:]) == plain[1:]
    assert list(rows[rows.controls[:, 0] != 3]) == plain[::2] and rows[1:].prompts == [row.prompt for row in plain[1:]]


@pytest.mark.parametrize("hashed", [0, 100])
def test_digest_of_pictures_changes_with_them(rows, monkeypatch, hashed):
    """Whether they are read, or, where there are many, only looked up."""
    monkeypatch.setattr("cldm.dataset.HASHED", hashed)
    before, kept = rows.digest_pictures(), rows[:4].digest_pictures()
    assert read_rows(rows.file).digest_pictures() == before
    rows[4].target.write_bytes(rows[1].target.read_bytes())
    assert rows.digest_pictures() != before and rows[:4].digest_pictures() == kept
    rows[4].target.unlink()
    with pytest.raises(InputError, match='prompt.json line 5: "target" .*no such file'):
        rows.digest_pictures()


def test_many_rows_are_validated_on_some(rows, base, monkeypatch):
    monkeypatch.setattr(cldm.pairs, "VALIDATION_ROWS", 3)
    dataset = validation_set(TrainingData(rows, rows, rows.controls, None, None), base, 32, 0)
    assert dataset.controls.flatten().tolist() == [1, 3, 5]


def test_batches_made_ahead_are_those_of_a_dataloader(cached):
    dataset, order = cached(), [3, 1, 4, 1, 0]
    for own, other in zip(Ahead(dataset, 2, sampler=order), DataLoader(dataset, 2, sampler=order), strict=True):
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
