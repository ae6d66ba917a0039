"""Benchmarks at their smallest: the methods that take seconds, one target each."""

import json

import pytest

from benchmarks import inversion, pairs
from ldm.settings import run_script


def test_methods_and_flags_are_tabled(tmp_path, capsys):
    run_script(
        inversion.main,
        inversion.settings,
        ["methods=lm_denoising,regressor", "targets=1", "regressor_minutes=0.02", f"out_dir={tmp_path}"],
    )
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [result["method"] for result in results] == ["lm_denoising", "regressor"]
    assert results[0]["found"] == pytest.approx(results[0]["angles"], abs=0.3) and results[0]["calls"] < 100
    assert (tmp_path / "plot.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "| lm_denoising | 1 |" in printed and "| at -8 or 8 degrees | 1 | 100% |" in printed


def test_an_unknown_method_is_named(fails_in_one_line, tmp_path):
    assert "lm_denoising" in fails_in_one_line(
        inversion.main, inversion.settings, ["methods=lm_denoisin", f"out_dir={tmp_path}"]
    )


def test_peers_read_pairs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "POOL", 32)
    arguments = ["methods=ecc,log_polar,siamese", "pairs=3", "regressor_minutes=0.02", f"out_dir={tmp_path}"]
    run_script(pairs.main, pairs.settings, arguments)
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert all(abs(error) < 0.5 for error in errors["rotation alone, log_polar"]["rotation"])
    assert all(abs(error) < 0.5 for error in errors["from outside, ecc"]["rotation"])
    assert list(errors["all six, log_polar"]) == ["rotation", "zoom", "shift x", "shift y"]
    assert len(errors["all six, siamese"]["blur"]) == 3 and "| siamese |" in capsys.readouterr().out


def test_changes_and_checks_are_tabled(tmp_path, capsys):
    run_script(pairs.main, pairs.settings, ["methods=ours", "pairs=2", f"out_dir={tmp_path}"])
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert all(abs(error) < 0.5 for error in errors["rotation alone, ours"]["rotation"])
    assert all(abs(error) < 0.02 for error in errors["all six, ours"]["shift x"])
    printed = capsys.readouterr().out
    assert "| there and back |" in printed and "| by way of another |" in printed
