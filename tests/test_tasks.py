"""Tasks: every reader gives the same task, every defect is named with its place, and what ships is fit for use."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from icl_markup.embedded import sample_folders
from icl_markup.errors import TaskError
from icl_markup.readers import TaskSource, read_task
from icl_markup.tasks import Example, Task, TaskChecks, checked_task
from tests.conftest import SHARED, shared_path, shared_task

ROWS = [
    ("I lost it", "lost_card"),
    ("when do you open, please?", "opening"),
    ("it is gone", "lost_card"),
    ("late?", "opening"),
]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(dict(zip(("text", "label"), row, strict=True))) + "\n" for row in rows)


def delimited(rows: list[Any], delimiter: str) -> str:
    return (
        "\n".join([delimiter.join(["text", "label"]), *(delimiter.join([f'"{t}"', label]) for t, label in rows)]) + "\n"
    )


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(task: Task, split: str = "train") -> list[tuple[str, str]]:
    return [(example.text, example.label) for example in task.split(split)]


READABLE = [(text, label.replace("_", " ")) for text, label in ROWS]


FILES = [
    ("a.jsonl", jsonl(ROWS)),
    ("a.jsonl", jsonl(ROWS).replace("\n", "\n\n")),
    ("a.csv", delimited(ROWS, ",")),
    ("a.csv", "\ufeff" + delimited(ROWS, ",").replace("\n", "\r\n")),
    ("a.tsv", delimited(ROWS, "\t")),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_every_kind_of_file_gives_the_same_task(tmp_path: Path, name: str, content: str) -> None:
    task = read_task(written(tmp_path / name, content))
    assert pairs(task) == READABLE
    assert (task.name, task.labels, task.oos_label) == ("a", ("lost card", "opening"), None)
    assert all(example.source.startswith(f"{tmp_path / name}:") for example in task.split("train"))


def test_sources_name_the_line_even_where_a_text_spans_several(tmp_path: Path) -> None:
    task = read_task(written(tmp_path / "a.csv", 'text,label\n"two\nlines",a\nshort,b\n'))
    assert [e.text for e in task.split("train")] == ["two\nlines", "short"]
    assert task.split("train")[1].source.endswith("a.csv:4")


def test_a_folder_is_read_with_its_splits_in_order_and_its_meta(tmp_path: Path) -> None:
    written(tmp_path / "t" / "test.jsonl", jsonl([("open today?", "opening"), ("sing", "out_of_scope")]))
    written(tmp_path / "t" / "train.jsonl", jsonl(ROWS))
    meta = {"name": "shop", "oos_label": "out of scope", "description": "What customers ask.",
            "label_descriptions": {"opening": "asks about the hours", "unknown": "not there"}}  # fmt: skip
    written(tmp_path / "t" / "meta.json", json.dumps(meta))
    task = read_task(tmp_path / "t")
    assert (task.name, task.description, task.oos_label) == ("shop", "What customers ask.", "out of scope")
    assert list(task.splits) == ["train", "test"]
    assert task.labels == ("lost card", "opening")
    assert task.descriptions == {"opening": "asks about the hours"}
    assert task.out_of_scope("test") == ["sing"]
    assert task.by_label("test") == {"opening": ["open today?"]}
    assert read_task(TaskSource(str(tmp_path / "t"), name="mine", description="D.")).name == "mine"
    with pytest.raises(TaskError, match=r"'shop' has no split 'dev'; it has test, train"):
        task.split("dev")


def saved_dataset(folder: Path, labels: list[int]) -> Path:
    import datasets

    classes = datasets.ClassLabel(names=["lost_card", "opening"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes})
    datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": labels}, features=features).save_to_disk(folder)
    return folder


def test_a_saved_data_set_gives_the_names_of_its_classes(tmp_path: Path) -> None:
    task = read_task(saved_dataset(tmp_path / "d", [0, 1, 0, 1]))
    assert pairs(task) == READABLE
    assert task.split("train")[2].source.endswith("d[train]:2")


def test_an_unlabelled_row_of_a_saved_data_set_does_not_get_the_last_class(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"d\[train\]:3: .*label"):
        read_task(saved_dataset(tmp_path / "d", [0, 1, 0, -1]))


def test_columns_split_label_names_and_label_choice_follow_the_source(tmp_path: Path) -> None:
    rows = [{"q": t, "y": i % 3} for i, (t, _) in enumerate([*ROWS, ("a", ""), ("b", "")])]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    names = {"0": "zero", "1": "one_x"}
    source = TaskSource(str(path), text_column="q", label_column="y", split="dev", label_names=names)
    assert read_task(source).labels == ("2", "one_x", "zero"), "a name that was given is left as it is"
    assert list(read_task(source).splits) == ["dev"]

    def chosen(**changes: Any) -> tuple[str, ...]:
        return read_task(TaskSource(**{**source.__dict__, **changes})).labels

    assert chosen(labels=["zero", "2"]) == chosen(without_labels=["one_x"]) == ("2", "zero")
    assert read_task(TaskSource(**{**source.__dict__, "oos_label": "zero"})).labels == ("2", "one_x")
    with pytest.raises(TaskError, match=r"a\.jsonl: the task has no label 'zer'; did you mean 'zero'"):
        chosen(labels=["zer", "2"])


def test_a_choice_that_leaves_one_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="two or more"):
        read_task(TaskSource(str(written(tmp_path / "a.jsonl", jsonl(ROWS))), labels=["opening"]))


def test_only_labels_keeps_out_of_scope_texts_and_refuses_unknown_labels() -> None:
    examples = [Example(f"{label} {i}", label) for label in ("a", "b", "c", "oos") for i in range(2)]
    task = checked_task("t", {"train": examples}, oos_label="oos", descriptions={"a": "first", "b": "second"})
    small = task.only_labels(["c", "a"], name="small")
    assert (small.name, small.labels, small.descriptions) == ("small", ("a", "c"), {"a": "first"})
    assert {example.label for example in small.split("train")} == {"a", "c", "oos"}
    assert task.labels == ("a", "b", "c"), "the task itself is left as it was"
    with pytest.raises(TaskError, match="'t' has no label 'x'"):
        task.only_labels(["a", "x"])


GOOD = jsonl(ROWS)
DEFECTS: dict[str, tuple[str, str | bytes, str]] = {
    "empty text": ("a.jsonl", GOOD + jsonl([("  ", "x")]), r"a\.jsonl:5: the text is empty"),
    "empty text in CSV": ("a.csv", "text,label\nx,a\n,b\n", r"a\.csv:3: the text is empty"),
    "empty label": ("a.jsonl", GOOD + jsonl([("x", " ")]), r"a\.jsonl:5: the label is empty"),
    "missing column": ("a.jsonl", GOOD + '{"text": "x", "lab": 1}\n', r":5: no column 'label', only 'text', 'lab'"),
    "missing column in CSV": ("a.csv", "txt,label\nx,a\n", r"a\.csv:2: no column 'text', only 'txt'.*text_column"),
    "text that is a number": ("a.jsonl", GOOD + '{"text": 3, "label": 1}\n', r"a\.jsonl:5: the text is int"),
    "malformed JSON": ("a.jsonl", GOOD + '{"text": \n', r"a\.jsonl:5: not valid JSON"),
    "JSON of another kind": ("a.jsonl", GOOD + '["x", "a"]\n', r"a\.jsonl:5: expected a JSON object.*list"),
    "a half emoji": ("a.jsonl", GOOD + '{"text": "\\ud83d", "label": "x"}\n', r"a\.jsonl:5: "),
    "too many fields": ("a.csv", "text,label\nx,a\nHello, you,b\n", r"a\.csv:3: more fields than.*quote"),
    "too few fields": ("a.csv", "text,label\nx,a\ny\n", r"a\.csv:3: (?!no column 'label', only 'text', 'label')"),
    "a stray quote": ("a.csv", 'text,label\nx,a\n"y"z,b\n', r"a\.csv:3: malformed CSV"),
    "a stray quote at once": ("a.csv", 'text,label\n"y"z,b\n', r"a\.csv:2: malformed CSV"),
    "another encoding": ("a.jsonl", '{"text": "caf\u00e9", "label": "x"}\n'.encode("latin-1"), r"jsonl:1: not UTF-8"),
    "another encoding, CSV": ("a.csv", "text,label\ncaf\u00e9,a\n".encode("latin-1"), r"a\.csv:2: not UTF-8"),
    "unknown kind of file": ("a.txt", GOOD, r"a\.txt: unknown kind of file '\.txt'; use \.jsonl, .* or \.parquet"),
    "an empty file": ("a.jsonl", "", "task 'a' holds no example"),
    "one label": ("a.jsonl", jsonl([ROWS[0], ROWS[2]]), r"task 'a' has 1 label\(s\) left.*two or more"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), DEFECTS.values(), ids=DEFECTS.keys())
def test_a_defect_of_a_file_is_reported_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        read_task(written(tmp_path / name, content))


@pytest.mark.parametrize(
    "content", ["{", "[1]", "\ufeff\u00e9", '{"label_descriptions": ["a"]}', '{"label_descriptions": 3}']
)
def test_a_defect_of_meta_json_is_reported_with_its_name(tmp_path: Path, content: str) -> None:
    written(tmp_path / "train.jsonl", GOOD)
    written(tmp_path / "meta.json", content)
    with pytest.raises(TaskError, match=r"meta\.json: "):
        read_task(tmp_path)


def test_what_is_not_there_is_reported(tmp_path: Path) -> None:
    for path in ("missing.jsonl", "./missing", str(tmp_path / "missing")):
        with pytest.raises(TaskError, match=r"missing.*: no such file or folder"):
            read_task(path)
    with pytest.raises(TaskError, match="neither a file, a task folder, a saved data set nor"):
        read_task(tmp_path)


def test_a_text_in_two_splits_is_an_error_or_dropped_from_the_later_one(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", GOOD)
    written(tmp_path / "test.jsonl", jsonl([("new", "opening"), ("I lost it ", "lost_card")]))
    with pytest.raises(TaskError, match=r"test\.jsonl:2: .*'test'.*'train'.*train\.jsonl:1.*duplicates: drop"):
        read_task(tmp_path)
    task = read_task(TaskSource(str(tmp_path), checks=TaskChecks(duplicates="drop")))
    assert pairs(task) == READABLE
    assert pairs(task, "test") == [("new", "opening")]
    assert task.notes == ("dropped 1 texts of 'test' that an earlier split holds",)


def test_a_rare_label_is_an_error_or_dropped_from_every_split(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", GOOD + jsonl([("x", "rare")]))
    written(tmp_path / "test.jsonl", jsonl([("y", "rare"), ("z", "only_here"), ("w", "opening")]))
    with pytest.raises(
        TaskError, match=r"test\.jsonl:2: label 'only here' has 0 example\(s\).*'train'.*rare_labels: drop"
    ):
        read_task(TaskSource(str(tmp_path), checks=TaskChecks(min_examples=2)))
    task = read_task(TaskSource(str(tmp_path), checks=TaskChecks(2, "drop")))
    assert task.labels == ("lost card", "opening")
    assert pairs(task, "test") == [("w", "opening")]
    assert "dropped 2 labels with fewer than 2 examples: only here, rare" in task.notes[0]


@lru_cache
def sample_tasks(side: str) -> list[Task]:
    return [read_task(folder) for folder in sample_folders(side)]


@pytest.mark.parametrize(("side", "least"), [("warmup", 12), ("unseen", 6)])
def test_sample_tasks_are_many_and_large_enough(side: str, least: int) -> None:
    assert len(sample_tasks(side)) >= least
    for task in sample_tasks(side):
        assert 4 <= len(task.labels) <= 12, task.name
        assert task.description, task.name
        assert all(task.out_of_scope(split) for split in ("train", "test")), task.name
        train, test = task.by_label("train"), task.by_label("test")
        assert min(len(train[label]) + len(test[label]) for label in task.labels) >= 14, task.name


def test_no_text_stands_in_two_sample_tasks_and_no_name_is_given_twice() -> None:
    tasks = [*sample_tasks("warmup"), *sample_tasks("unseen")]
    owner: dict[str, str] = {}
    for task in tasks:
        for example in (e for examples in task.splits.values() for e in examples):
            words = re.sub(r"[^a-z0-9 ]", "", example.text.lower())
            assert owner.setdefault(words, task.name) == task.name, f"{example.source}: {example.text}"
    assert len({task.name for task in tasks}) == len(tasks)


@pytest.mark.parametrize("name", sorted(p.parent.name for p in (SHARED / "data").glob("*/meta.json")) or ["banking77"])
def test_every_shared_data_set_loads(name: str) -> None:
    task = shared_task(name)
    meta = json.loads(shared_path("data", name, "meta.json").read_text(encoding="utf-8"))
    assert len(task.labels) >= 2
    assert task.oos_label == meta.get("oos_label") not in task.labels
    assert all("_" not in label and label == label.strip() for label in task.labels)
