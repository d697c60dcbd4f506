"""The quickstart on the sample tasks inside the package, and which side of the data tags are warmed up on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from icl_markup.backbone import Backbone
from icl_markup.cli import main
from icl_markup.config import load_config
from icl_markup.embedded import quickstart_config, sample_folders
from icl_markup.episodes import EpisodeConfig
from icl_markup.evaluation import answer_queries, draw_episodes
from icl_markup.model import MarkupModel
from icl_markup.readers import read_task
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import WarmupConfig
from tests.conftest import stand_in

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
UNSEEN = (
    "banking77", "banking77_oos", "clinc_banking_oos", "hint3_curekart", "hint3_powerplay11", "askubuntu",
    "webapplications", "nlupp_banking_single", "tos_unfair_category", "tos_unfair_with_none",
    "indian_sc_rhetorical_roles",
)  # fmt: skip
"""Sets that experiments measure on."""


@pytest.mark.parametrize("name", ["warmup.yaml", "warmup_news.yaml"])
def test_tags_are_warmed_up_on_the_warm_up_side_alone(name: str) -> None:
    config = yaml.safe_load((CONFIGS / name).read_text())
    sources = [*config["tasks"], *config["validation_tasks"]]
    assert not {Path(source["path"]).name for source in sources} & {
        *UNSEEN,
        *(path.name for path in sample_folders("unseen")),
    }
    clinc = [source for source in sources if source["path"].endswith("clinc150")]
    assert all(not source["with_oos"] for source in clinc), "other sets share its out-of-scope texts"
    banking = {"card declined", "balance", "transfer", "credit limit"}
    assert all(
        banking <= set(one.get("without_labels", ())) or not banking & set(one.get("labels", banking)) for one in clinc
    )
    headlines = [set(source["labels"]) for source in sources if source["path"].endswith("huffpost41")]
    assert all(not labels & {"arts", "education", "science", "tech", "world news"} for labels in headlines)


def test_a_pretrained_model_is_above_chance_on_unseen_tasks_in_words(smollm2: Backbone) -> None:
    model = MarkupModel(smollm2, "plain_words_input_output")
    tasks = [
        read_task(folder) for folder in sample_folders("unseen") if folder.name in ("bank_support", "vet_practice")
    ]
    episodes = [e for task in tasks for e in draw_episodes(task, n_way=4, k_shot=1, episodes=20, seed=1)]
    assert answer_queries(model, episodes).correct.mean() > 0.25 + 0.12


def test_the_quickstart_prints_a_table_a_file_and_a_command_that_works(
    tiny_default: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icl_markup.quickstart.WORDINGS", 2)
    assert main(["quickstart", "--steps", "3", "--episodes", "2", "--rows", "rows.jsonl"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "chance",
        "plain words",
        "untrained tags",
        "warmed-up tags",
        "tags.safetensors has",
        "predict --tags",
    ):
        assert words in shown
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * len(sample_folders("unseen"))
    templates = {row["method"]: row["template"] for row in rows}
    assert templates == {"chance": "none", "plain": "mean", "tags_untrained": "markup_words", "tags": "markup_words"}
    assert (tmp_path / "runs" / "quickstart" / "tags" / "tags.safetensors").stat().st_size < 30_000
    arguments = ["predict", "--tags", "runs/quickstart/tags", "--labels", "lost card", "opening hours", "--"]
    assert main([*arguments, "When do you close on Sundays?"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("lost card", "opening hours")
    folders = {"warmup": sample_folders("warmup"), "unseen": sample_folders("unseen")[:1]}
    monkeypatch.setattr("icl_markup.quickstart.sample_folders", folders.__getitem__)
    assert main(["quickstart", "--steps", "3", "--episodes", "2"]) == 0  # a second run replaces the first


def test_equal_runs_on_several_threads_give_equal_bytes(tmp_path: Path) -> None:
    tags = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("one", "two"):
            config = load_config(WarmupConfig, quickstart_config(), ["--output", str(tmp_path / name)])
            config = replace(
                config, optimiser=replace(config.optimiser, steps=4), episodes=EpisodeConfig(queries=(4, 4))
            )
            result = run_warmup(
                config, tasks=[read_task(sample_folders("warmup")[0])], backbone=stand_in(), progress=False
            )
            tags.append((result.folder / "tags.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert tags[0] == tags[1]
