"""Retrievers find what is alike, in any script, and keep nothing of the queries; a prompt shows the nearest."""

from __future__ import annotations

import importlib.util
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl_markup import Backbone
from icl_markup.embedded import sample_folders
from icl_markup.errors import ConfigError
from icl_markup.readers import read_task
from icl_markup.retrievers import BackboneRetriever, Bm25Retriever, EmbeddingRetriever, Retriever, similarities, words
from icl_markup.selection import label_similarity, nearest_demos
from tests.conftest import KINDS, tiny_backbone

STORED = ["where is my card", "when do you open", "я потерял карту", "我的银行卡丢了", "...", "card"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_finds_a_text_itself(kind: str) -> None:
    retriever = BackboneRetriever(tiny_backbone(kind))
    found = similarities(retriever, STORED[:2], STORED)
    assert found.argmax(axis=1).tolist() == [0, 1]
    assert found[[0, 1], [0, 1]] == pytest.approx(1, abs=1e-5)
    assert (np.abs(found) <= 1 + 1e-5).all()
    alone = similarities(retriever, STORED[1:2], STORED)
    np.testing.assert_allclose(alone[0], found[1], atol=1e-5)


def test_a_pretrained_causal_backbone_finds_more_than_chance_and_no_less_than_words(smollm2: Backbone) -> None:
    task = read_task(next(folder for folder in sample_folders("unseen") if folder.name == "bank_support"))
    by_label = task.by_label("train")
    stored = [(text, label) for label in task.labels for text in by_label[label][:3]]
    asked = [(example.text, example.label) for example in task.split("test") if example.label in task.labels]
    owners, right = (np.array([label for _, label in pairs]) for pairs in (stored, asked))

    def found_first(retriever: Retriever) -> float:
        found = similarities(retriever, [text for text, _ in asked], [text for text, _ in stored])
        return float((owners[found.argmax(axis=1)] == right).mean())

    by_states = found_first(BackboneRetriever(smollm2))
    assert by_states > 1.5 / len(task.labels) and by_states >= found_first(Bm25Retriever())


def test_bm25_counts_words_of_any_script() -> None:
    retriever = Bm25Retriever()
    found = similarities(retriever, ["CARD?", "карту верните", "银行", "nothing alike", "!!"], STORED)
    assert found[0].argmax() == 5, "the shorter of the texts with the word"
    assert found[1].argmax() == 2
    assert found[2].argmax() == 3
    assert not found[3:].any()
    assert similarities(retriever, ["a"], ["...", "!"]).tolist() == [[0.0, 0.0]]


@given(st.text())
def test_words_hold_letters_and_digits_alone(text: str) -> None:
    found = words(text)
    assert all(c.isalnum() or unicodedata.category(c).startswith("M") for word in found for c in word)
    assert all(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't PANIC, 42!", ["don", "t", "panic", "42"]),
        ("मेरा कार्ड", ["मेरा", "कार्ड"]),
        ("cafe\u0301 Straße", ["café", "strasse"]),
        ("银行卡", ["银行", "行卡"]),
        ("卡 card卡", ["卡", "card", "卡"]),
        ("... \u0301", []),
    ],
)
def test_words_of_several_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_embeddings_of_stored_texts_are_computed_once() -> None:
    class Counting:
        def __init__(self) -> None:
            self.computed: list[str] = []

        def compute(self, texts: list[str]) -> np.ndarray:
            self.computed += texts
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    encoder = Counting()
    retriever = EmbeddingRetriever(encoder)  # type: ignore[arg-type]
    for _ in range(3):
        assert retriever(["a"], ["bb", "ccc"]).shape == (1, 2)
    assert encoder.computed.count("bb") == 1
    retriever(["a"], ["bb", "dddd"])
    assert [encoder.computed.count(text) for text in ("bb", "ccc", "dddd")] == [1, 1, 1], "the new one alone"
    retriever(["a"], ["ccc"])
    assert encoder.computed.count("ccc") == 2, "what is no longer stored is forgotten"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("bm25s") is not None
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ConfigError, match=r"icl-markup\[retrieval\]"):
        Bm25Retriever()


@given(st.integers(0, 10_000))
def test_labels_and_demonstrations_are_chosen_as_defined(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, count = int(rng.integers(1, 6)), int(rng.integers(0, 12))
    owners = np.concatenate([np.arange(labels), rng.integers(0, labels, count)]).astype(np.intp)
    similarity = rng.normal(size=(3, len(owners)))
    near = label_similarity(similarity, owners, labels)
    for label in range(labels):
        best = np.sort(similarity[:, owners == label])[:, ::-1][:, :2]
        np.testing.assert_allclose(near[:, label], best.mean(axis=1))
    options = rng.permutation(labels)[: int(rng.integers(1, labels + 1))].tolist()
    most = int(rng.integers(1, 8))
    scores, answers = similarity[0, labels:], owners[labels:]
    shown = nearest_demos(scores, answers, options, most)
    allowed = [j for j in range(count) if answers[j] in options]
    assert len(shown) == len(set(shown)) == min(most, len(allowed))
    assert [scores[j] for j in shown] == sorted(scores[j] for j in shown), "most similar last"
    covered = {int(answers[j]) for j in allowed}
    assert len({int(answers[j]) for j in shown}) == min(len(covered), most), "one of each option first"
