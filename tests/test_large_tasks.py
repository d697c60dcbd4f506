"""Large tasks: what lies in a file gives the examples, errors and episodes of what is held in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import icl_markup.store as store
from icl_markup.backbone import Backbone
from icl_markup.classifier import MarkupClassifier
from icl_markup.drawing import draw, vary
from icl_markup.episodes import Demo, Episode, EpisodeConfig, EpisodeSampler, Option, Query, Remaining
from icl_markup.errors import TaskError
from icl_markup.experiment_config import Setting
from icl_markup.markup import SHORTEST_DEMO, _common_cap, _drop_order
from icl_markup.model import MarkupModel
from icl_markup.readers import TaskSource, read_task
from icl_markup.tasks import Example, HeldExamples, Task, TaskChecks
from tests.conftest import byte_level_tokenizer, tiny_backbone

CONFIGS: list[dict[str, Any]] = [
    {},
    {
        "n_way": (2, 6),
        "k_shot": (0, 3),
        "queries": (1, 4),
        "none_option": 0.5,
        "out_of_scope": 0.6,
        "hard_options": 0.5,
    },
    {"n_way": None, "k_shot": (1, 1), "queries": (3, 6), "none_option": 0.5, "out_of_scope": 0.5},
    {"query_split": "test", "k_shot": (1, 2), "queries": (2, 9), "none_option": 0.7, "out_of_scope": 0.5},
]
DROP = TaskChecks(min_examples=3, rare_labels="drop", duplicates="drop")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stores go into a folder of the test, and take several blocks for few rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(store, "BLOCK", 16)


def rows(seed: int = 0, labels: int = 12) -> dict[str, list[dict[str, str]]]:
    """Rows with texts that stand twice: at a label, at two labels, in two splits."""
    rng = random.Random(seed)
    names = [f"kind_{'xyz'[i % 3]}_{i}" for i in range(labels)]
    found = {
        "train": [{"text": f" text {rng.randrange(60)}é\n", "label": rng.choice(names)} for _ in range(150)],
        "test": [{"text": f"text {rng.randrange(50, 110)}é", "label": rng.choice(names)} for _ in range(70)],
    }
    found["train"] += [{"text": f"sing {i % 3}", "label": "oos"} for i in range(5)]
    found["train"] += [{"text": f"of {label} {i}", "label": label} for label in names[:-1] for i in range(3)]
    found["train"] += [{"text": f"rare {i}", "label": "rare"} for i in range(2)]
    found["test"].append({"text": "fly", "label": "oos"})
    found["test"] += [{"text": f"a question of {label}", "label": label} for label in names[:-1]]
    for part in found.values():
        rng.shuffle(part)
    return found


def write(kind: str, folder: Path, data: dict[str, list[dict[str, str]]]) -> str:
    """Write rows as a file of their training split, or as a folder of all; return where."""
    import datasets

    folder.mkdir(exist_ok=True)
    train = datasets.Dataset.from_list(data["train"])
    if kind == "parquet":
        train.to_parquet(folder / "a.parquet")
    elif kind == "csv":
        train.to_csv(folder / "a.csv")
    elif kind == "saved":
        parts = {split: datasets.Dataset.from_list(part) for split, part in data.items()}
        datasets.DatasetDict(parts).class_encode_column("label").save_to_disk(folder / "a")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in data["train"]))
    else:
        (folder / "a").mkdir()
        for split, part in data.items():
            (folder / "a" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return str(folder / ("a" if kind in ("saved", "folder") else f"a.{kind}"))


def both(source: TaskSource) -> tuple[Task, Task]:
    return read_task(replace(source, in_memory=True)), read_task(replace(source, in_memory=False))


def check_same(held: Task, lazy: Task) -> None:
    assert all(isinstance(part, HeldExamples) for part in held.splits.values())
    assert not any(isinstance(part, HeldExamples) for part in lazy.splits.values())
    for name in ("name", "labels", "descriptions", "description", "oos_label", "notes"):
        assert getattr(held, name) == getattr(lazy, name)
    assert list(held.splits) == list(lazy.splits)
    for split in held.splits:
        one, other = held.split(split), lazy.split(split)
        assert list(one) == list(other) == [other[i] for i in range(len(one))]
        assert len(one) == len(other)
        assert other[-1] == one[-1]
        for read in (Task.by_label, Task.distinct):
            found = {label: list(texts) for label, texts in read(held, split).items()}
            assert {label: list(texts) for label, texts in read(lazy, split).items()} == found
            assert list(read(lazy, split)) == list(found)
        assert list(held.out_of_scope(split)) == list(lazy.out_of_scope(split))


def drawn(task: Task, count: int = 40) -> Iterator[Any]:
    for config in CONFIGS:
        if config.get("query_split", "train") in task.splits:
            sampler = EpisodeSampler([task], EpisodeConfig(**config), seed=5)
            yield [sampler.episode(i, 3) for i in range(count)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "saved"])
def test_texts_in_a_file_give_the_examples_and_the_episodes_of_texts_in_memory(tmp_path: Path, kind: str) -> None:
    source = TaskSource(write(kind, tmp_path / "data", rows()), oos_label="oos", checks=DROP, description="D.")
    held, lazy = both(source)
    assert len(held.notes) == (2 if kind in ("folder", "saved") else 1)
    check_same(held, lazy)
    assert list(drawn(held)) == list(drawn(lazy))
    for more in ({"with_oos": False, "oos_label": "oos"}, {"without_labels": list(held.labels[:3])}):
        check_same(*both(replace(source, **more)))


def test_experiments_draw_the_same_episodes_of_both(tmp_path: Path) -> None:
    held, lazy = both(TaskSource(write("folder", tmp_path / "data", rows()), oos_label="oos", checks=DROP))
    for setting in (Setting(n_way=None, k_shot=2, open_world=True), Setting(n_way=3, k_shot=1, vary="drawn demos")):
        one, other = (draw(t, setting, episodes=5, queries=9, seed=1, query_split="test") for t in (held, lazy))
        assert one == other
        assert [vary(e, setting, 1, held, 2) for e in one] == [vary(e, setting, 1, lazy, 2) for e in one]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), checks=st.sampled_from([TaskChecks(), TaskChecks(duplicates="drop"), DROP]))
def test_both_say_the_same_of_defects(tmp_path_factory: pytest.TempPathFactory, seed: int, checks: TaskChecks) -> None:
    data = rows(seed, labels=4)
    if seed % 3 == 0:
        data = {**data, "test": [row for row in data["test"] if row["text"].startswith("a q")]}
    path = write("folder", tmp_path_factory.mktemp("data"), data)
    said = []
    for in_memory in (True, False):
        try:
            said.append(read_task(TaskSource(path, oos_label="oos", checks=checks, in_memory=in_memory)).notes)
        except TaskError as error:
            said.append(str(error))
    assert said[0] == said[1]


BROKEN = [
    ("a.csv", "text,label\na,x\nb,y\n,x\n", r"a\.csv:4: the text is empty"),
    ("a.csv", "text,label\na,x\nb,_\n", r"a\.csv:3: the label is empty"),
    ("a.csv", 'text,label\na,x\n"b,y\n', r"a\.csv:.*malformed CSV"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"}\n', r"a\.jsonl:2: no column 'label', only 'text'"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n', "1 label.s. left"),
    ("a.jsonl", "", "task 'a' holds no example"),
    ("a.parquet", "text", r"a\.parquet:0: not readable as Parquet"),
]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_errors_name_the_row_and_nothing_stays_behind(
    tmp_path: Path, name: str, content: str, message: str, in_memory: bool
) -> None:
    (tmp_path / name).write_text(content)
    for _ in range(2):
        with pytest.raises(TaskError, match=message):
            read_task(TaskSource(str(tmp_path / name), in_memory=in_memory))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_row_without_a_class_or_a_column_is_named(tmp_path: Path) -> None:
    import datasets

    classes = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, -1]}, features=classes).save_to_disk(tmp_path / "d")
    for in_memory in (True, False):
        with pytest.raises(TaskError, match=r"d\[train\]:1: the row has no label"):
            read_task(TaskSource(str(tmp_path / "d"), in_memory=in_memory))
        with pytest.raises(TaskError, match=r"d\[train\]:0: no column 'q', only 'text', 'label'"):
            read_task(TaskSource(str(tmp_path / "d"), text_column="q", in_memory=in_memory))


def test_a_store_is_written_once_and_anew_when_the_file_or_what_is_read_of_it_changes(tmp_path: Path) -> None:
    path = Path(write("jsonl", tmp_path / "data", rows()))
    source = TaskSource(str(path), checks=DROP, in_memory=False)
    stores = tmp_path / "cache" / "icl_markup"
    first = read_task(source)
    before = {file: file.stat().st_mtime_ns for file in stores.rglob("*")}
    check_same(read_task(replace(source, in_memory=True)), read_task(source))
    assert {file: file.stat().st_mtime_ns for file in stores.rglob("*")} == before
    path.write_text(path.read_text() + json.dumps({"text": "new", "label": "kind_x_0"}) + "\n")
    assert len(read_task(source).split("train")) == len(first.split("train")) + 1
    assert "renamed" in read_task(replace(source, label_names={"kind_x_0": "renamed"})).labels
    assert len(list(stores.iterdir())) == 3
    assert first.split("train")[0].text, "a store in use is not touched"


def test_only_data_above_a_size_stays_on_disk_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TaskSource(write("csv", tmp_path / "data", rows()), checks=DROP)
    assert isinstance(read_task(source).split("train"), HeldExamples)
    monkeypatch.setattr("icl_markup.readers.MOST_HELD", 100)
    assert not isinstance(read_task(source).split("train"), HeldExamples)


def test_texts_whose_hashes_agree_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_hash", len)
    held, lazy = both(TaskSource(write("folder", tmp_path / "data", rows()), oos_label="oos", checks=DROP))
    check_same(held, lazy)
    assert list(drawn(held)) == list(drawn(lazy))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(count=st.integers(0, 30), gone=st.sets(st.integers(0, 29)))
def test_what_remains_of_a_range_is_what_is_not_gone(count: int, gone: set[int]) -> None:
    gone = {place for place in gone if place < count}
    left = Remaining(count, gone)
    assert [left[i] for i in range(len(left))] == [i for i in range(count) if i not in gone]


def many_labels(count: int) -> Task:
    words = ["card", "order", "window", "river", "paper", "engine", "garden", "ticket", "salary", "winter"]
    labels = [f"{words[i % 10]} {words[i // 10 % 10]} {i}" for i in range(count)]
    examples = HeldExamples(Example(f"text {j} of {label}", label) for label in labels for j in range(3))
    return Task("many", tuple(labels), {"train": examples})


def test_neighbours_of_a_label_are_those_of_the_whole_matrix() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    task = many_labels(300)
    pool = EpisodeSampler([task], EpisodeConfig())._pools[0]
    matrix = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform(f"{one} " for one in task.labels)
    order = np.argsort(-(matrix @ matrix.T).toarray(), axis=1, kind="stable")
    for i in range(300):
        assert list(pool.neighbours.of(i)) == [task.labels[j] for j in order[i] if j != i]


def test_a_task_of_ten_thousand_labels_is_drawn_from_and_a_classifier_knows_them_all() -> None:
    task = many_labels(10_000)
    config = EpisodeConfig(n_way=(2, 8), k_shot=(0, 1), none_option=0.5, out_of_scope=0.5, hard_options=0.5)
    sampler = EpisodeSampler([task], config)
    for i in range(100):
        episode = sampler.episode(i, 0)
        names = [option.name for option in episode.options]
        assert all(demo.text.endswith(f"of {names[demo.answer]}") for demo in episode.demos)
    [whole] = [EpisodeSampler([task], replace(config, n_way=None, none_option=0.0)).episode(0, 0)]
    assert {option.name for option in whole.options} == set(task.labels)
    examples = task.split("train")
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("llama")), retriever=_same_number)
    classifier.fit([examples[i].text for i in range(0, 3000, 3)], [examples[i].label for i in range(0, 3000, 3)],
                   classes=task.labels)  # fmt: skip
    asked = [examples[i].text for i in (1, 3001, 29_998)]
    assert classifier.predict_proba(asked).shape == (3, 10_000)
    assert classifier.retriever_recall(asked, [examples[i].label for i in (1, 3001, 29_998)]) == 1


def _same_number(queries: Any, texts: Any) -> Any:
    """A retriever by the number at the end of a label's name."""
    number = np.array([int(text.rsplit(" ", 1)[1]) for text in texts])
    return np.stack([(number == int(query.rsplit(" ", 1)[1])).astype(float) for query in queries])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(answers=st.lists(st.integers(0, 4), max_size=14))
def test_demonstrations_are_dropped_from_the_end_of_the_label_that_has_most(answers: list[int]) -> None:
    kept, order = list(range(len(answers))), []
    while kept:
        most = max([answers[i] for i in kept].count(answer) for answer in answers)
        order.append(next(i for i in reversed(kept) if [answers[k] for k in kept].count(answers[i]) == most))
        kept.remove(order[-1])
    assert _drop_order([Demo("a", answer) for answer in answers]) == order


@pytest.mark.parametrize("answers", ["symbols", "names"])
@pytest.mark.parametrize("limit", [60, 75, 90, 120, 160, 400])
def test_no_more_demonstrations_are_dropped_than_must_be(limit: int, answers: Any) -> None:
    markup = MarkupModel(tiny_backbone("llama"), answers=answers).markup
    rng = random.Random(limit)
    for _ in range(20):
        demos = tuple(Demo("card " * rng.randint(1, 12), rng.randrange(3)) for _ in range(rng.randint(0, 12)))
        episode = Episode((Option("a"), Option("b"), Option("c")), demos, (Query("where?"),))
        markup.max_length = 10_000
        whole = markup.compose(episode)
        bare = len(markup.compose(replace(episode, demos=())).ids)
        alone = [len(markup.compose(replace(episode, demos=(demo,))).ids) - bare for demo in demos]
        lengths = [len(markup._text_ids(demo.text)) for demo in demos]
        markup.max_length = limit
        found = markup.compose(episode)
        name = max(len(markup.name_ids(option.name, True)) for option in episode.options)
        most = limit - (name if answers == "names" else 0)
        assert len(found.ids) <= most
        if len(whole.ids) <= most:
            assert found == whole
            continue
        for dropped in range(len(demos) + 1):
            kept = sorted(_drop_order(demos)[dropped:])
            room = most - bare - sum(alone[i] - lengths[i] for i in kept)
            cap = _common_cap([lengths[i] for i in kept], room)
            if cap is not None and cap >= min(SHORTEST_DEMO, max((lengths[i] for i in kept), default=0)):
                break
        assert (found.dropped, found.shortened) == (dropped, sum(lengths[i] > cap for i in kept))


def test_a_prompt_of_32_000_tokens_is_composed_trained_on_and_answered() -> None:
    tokenizer = byte_level_tokenizer(mask=False)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=40_000, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = MarkupModel(Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", max_length=33_000))
    demos = tuple(Demo(f"{i} my card was stolen and nobody answers my letters", i % 4) for i in range(2500))
    options = tuple(Option(name) for name in ("card", "hours", "rain", "cold"))
    episode = Episode(options, demos, (Query("where is my card", 0), Query("will it rain", 2)))
    first, second = model.markup.compose_each(episode)
    assert 32_000 < len(first.ids) <= 33_000
    assert first.dropped > 0
    assert model.table is not None
    model.table.rows.requires_grad_(True)
    terms = model.loss_terms([first], [replace(episode, queries=episode.queries[:1])], True)
    torch.nn.functional.cross_entropy(terms.scores, terms.targets).backward()
    assert model.table.rows.grad is not None
    assert model.table.rows.grad.abs().sum() > 0
    found = model.scores([episode])[0]
    for prompt, query, one in zip((first, second), episode.queries, found, strict=True):
        with torch.no_grad():
            alone = model.loss_terms([prompt], [replace(episode, queries=(query,))], False).scores[0]
        torch.testing.assert_close(one.scores, alone, atol=1e-3, rtol=1e-3)
