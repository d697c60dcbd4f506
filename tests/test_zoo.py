"""The tags that ship with the package: where they come from, and that they answer better than what they began as."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from icl_markup.backbone import Backbone
from icl_markup.config import load_config
from icl_markup.embedded import sample_folders
from icl_markup.errors import TagFileError
from icl_markup.evaluation import answer_queries, draw_episodes
from icl_markup.experiment_config import ExperimentConfig
from icl_markup.hub import CARD, locate
from icl_markup.model import MarkupModel
from icl_markup.models import MODELS
from icl_markup.readers import read_task
from icl_markup.tagfile import read_tags
from icl_markup.warmup_config import WarmupConfig
from icl_markup.zoo import zoo_folder, zoo_names
from tests.conftest import tiny_backbone

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
UNSEEN = ("banking77", "curekart", "powerplay", "askubuntu", "webapplications", "tos_unfair", "rhetorical", "cuad")


@pytest.fixture
def make_zoo() -> ModuleType:
    """The script that makes the zoo."""
    spec = importlib.util.spec_from_file_location("make_zoo", SCRIPTS / "make_zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_zoo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", zoo_names())
def test_tags_of_the_zoo_say_where_they_come_from(name: str) -> None:
    tags = read_tags(name)
    assert tags.backbone["name"] in MODELS
    assert sum(path.stat().st_size for path in tags.folder.iterdir()) < 256_000  # type: ignore[union-attr]
    training = tags.training
    assert training["steps"] > 0 and training["tokens"] > 0
    assert set(training["validation accuracy by seed"]) == {str(seed) for seed in training["seeds tried"]}
    sources = [*training["tasks"], *training["validation tasks"]]
    assert set(training["licenses of the data"]) == set(sources)
    assert not [source for source in sources if any(word in source for word in UNSEEN)]
    card = (tags.folder / CARD).read_text(encoding="utf-8")  # type: ignore[operator]
    assert f"licence: {tags.license}" in card
    assert tags.license == ("gemma" if "gemma" in name else "apache-2.0")


def test_a_name_of_the_zoo_means_the_zoo_and_a_path_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icl_markup.zoo._FOLDER", tmp_path / "zoo")
    MarkupModel(tiny_backbone("llama"), seed=1).save("zoo/some")
    MarkupModel(tiny_backbone("llama"), seed=2).save("some")
    assert zoo_names() == ["some"]
    assert zoo_folder("other") is None
    assert locate("some").folder == tmp_path / "zoo" / "some"
    assert locate("./some").folder == Path("some")
    assert locate(Path("some")).folder == Path("some")
    model = MarkupModel.from_tags("some", tiny_backbone("llama"))
    assert model.table is not None
    assert (model.table.rows == MarkupModel(tiny_backbone("llama"), seed=1).table.rows).all()  # type: ignore[union-attr]
    with pytest.raises(TagFileError, match="no revisions"):
        read_tags("some", revision="main")


def test_the_seed_with_the_best_validation_is_published(tmp_path: Path, make_zoo: ModuleType) -> None:
    backbone = tiny_backbone("llama")
    accuracies = {0: 0.5, 1: 0.7, 2: 0.6}
    for seed, accuracy in accuracies.items():
        model = MarkupModel(backbone, seed=seed)
        model.save(tmp_path / str(seed), {"validation accuracy": accuracy, "tasks": ["x"]})
    done = {seed: read_tags(tmp_path / str(seed)) for seed in accuracies}
    entry = make_zoo.Entry("smollm2", "apache-2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_zoo, "load_model", lambda tags: MarkupModel(backbone, seed=int(tags.folder.name)))
        patch.chdir(SCRIPTS.parent)
        best = make_zoo.best_of(entry, done, ())
    assert best.tensors_sha256 == done[1].tensors_sha256
    assert best.training["seeds tried"] == [0, 1, 2]
    assert best.training["validation accuracy by seed"] == {str(seed): value for seed, value in accuracies.items()}
    assert best.license == "apache-2.0"


def test_the_zoo_is_measured_on_sets_that_neither_trained_nor_validated_it() -> None:
    configs = SCRIPTS.parent / "configs"
    measured = load_config(ExperimentConfig, configs / "measure_zoo.yaml")
    recipe = load_config(WarmupConfig, configs / "warmup.yaml")
    made_of = {(source.path, label) for source in recipe.tasks for label in source.labels or ["all"]}
    chosen = {(source.path, label) for source in recipe.validation_tasks for label in source.labels or ["all"]}
    asked = {(source.path, label) for source in measured.tasks for label in source.labels or ["all"]}
    assert asked and not asked & (made_of | chosen)
    selected = {(source.path, label) for source in measured.selection_tasks for label in source.labels or ["all"]}
    assert selected <= chosen
    assert measured.episodes * measured.queries == 300


@pytest.mark.skipif(zoo_folder("smollm2") is None, reason="the zoo has no tags for SmolLM2")
def test_tags_of_the_zoo_answer_better_than_those_they_began_as(smollm2: Backbone) -> None:
    tasks = [read_task(path) for path in sample_folders("unseen") if path.name in ("bank_support", "vet_practice")]
    episodes = [one for task in tasks for one in draw_episodes(task, n_way=5, k_shot=1, episodes=5, seed=3, queries=5)]
    trained, untrained = (
        answer_queries(model, episodes).correct.mean()
        for model in (MarkupModel.from_tags("smollm2", smollm2), MarkupModel(smollm2))
    )
    assert trained > untrained + 0.1


def test_a_folder_of_the_same_name_is_not_passed_over_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = zoo_names()[0]
    assert locate(name).folder == zoo_folder(name)
    assert capsys.readouterr().err == ""
    (tmp_path / name).mkdir()
    (tmp_path / name / "tags.json").write_text("{}")
    assert locate(name).folder == zoo_folder(name)
    assert f"write ./{name} for the folder here" in capsys.readouterr().err
