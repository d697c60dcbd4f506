"""A classifier among others: threads, scikit-learn's scorers, what prompts share, and what changes after fit."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import get_scorer, log_loss

from icl_markup import NONE_OF_THE_ABOVE, MarkupClassifier, MarkupError, MarkupModel, Template
from icl_markup.markup import Markup
from icl_markup.prefixes import PrefixCache
from tests.conftest import KINDS, TEXTS, tiny_backbone

X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]
NEW = [text for texts in TEXTS.values() for text in texts[2:]]
RIGHT = [label for label, texts in TEXTS.items() for _ in texts[2:]]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_the_answers_of_one_thread(kind: str) -> None:
    model = MarkupModel(tiny_backbone(kind))
    classifiers = [MarkupClassifier(model).fit(X[i:], Y[i:]) for i in range(2)]
    expected = [classifier.predict_proba(NEW) for classifier in classifiers]
    forward = type(model.backbone._head).forward

    def ask(turn: int) -> float:
        texts = NEW[turn % 3 : turn % 3 + 4]
        found = classifiers[turn % 2].predict_proba(texts)
        return float(np.abs(found - expected[turn % 2][turn % 3 : turn % 3 + 4]).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(ask, range(24))) < 1e-4
    assert model.backbone._head.forward.__func__ is forward, "the head is the model's own again"


@pytest.mark.parametrize("mode", ["option", "threshold"])
def test_scorers_of_probabilities_see_the_columns_they_take_for_granted(mode: Any) -> None:
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("bert")), none_of_the_above=mode).fit(X, Y)
    assert classifier.classes_.tolist() == sorted([*TEXTS, NONE_OF_THE_ABOVE])
    texts, labels = [*NEW, "the moon is made of cheese"], [*RIGHT, NONE_OF_THE_ABOVE]
    found = classifier.predict_proba(texts)
    column = {label: i for i, label in enumerate(classifier.classes_)}
    right = found[np.arange(len(texts)), [column[label] for label in labels]]
    assert get_scorer("neg_log_loss")(classifier, texts, labels) == pytest.approx(np.log(right).mean())
    assert log_loss(labels, found, labels=classifier.classes_) == pytest.approx(-np.log(right).mean())


def test_recall_counts_a_text_that_has_a_chosen_prompt() -> None:
    labels = [f"label {i}" for i in range(14)]
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("bert", max_length=250)), options=3, most_tokens=200)
    classifier.fit([f"text {i}" for i in range(4)], labels[:4], classes=labels)
    long = "card " * 200
    offered = np.count_nonzero(classifier.predict_proba([long]))
    assert (offered, np.count_nonzero(classifier.predict_proba(["card"]))) == (3, 14)
    recalls = [classifier.retriever_recall([long], [label]) for label in labels]
    assert sum(recalls) == 3
    assert classifier.retriever_recall(["card", long], [labels[0], labels[recalls.index(0.0)]]) == 0.5


def test_chosen_prompts_share_the_head_of_their_template() -> None:
    template = Template.parse(
        "@tag <say>\n@head\nRead the message of a customer and choose the label that says what it is about:\n"
        "@option\n {symbol}: {name}\n@demo\n<say> {text} {label}\n@query\n<say> {text} {label}\n"
    )
    model = MarkupModel(tiny_backbone("llama"), template)
    classifier = MarkupClassifier(model, options=2, demos=2, most_tokens=16)
    classifier.fit([f"text {i} that fills the prompt" for i in range(60)], [f"label {i}" for i in range(60)])
    texts = [f"text {i}" for i in range(0, 60, 4)]
    first = classifier.predict_proba(texts)
    assert model.prefixes.counts.reused > 16 * (len(texts) - 2)
    model.prefixes.clear()
    np.testing.assert_allclose(first, classifier.predict_proba(texts), atol=1e-5)


def test_what_stands_before_queries_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    markup = MarkupModel(tiny_backbone("llama")).markup
    opened = Markup._opened
    written: list[int] = []
    monkeypatch.setattr(Markup, "_opened", lambda self, *rest: written.append(1) or opened(self, *rest))
    markup._cache()
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("llama"))).fit(X, Y)
    classifier._asker.model.markup = markup
    written.clear()
    classifier.predict([f"text {i}" for i in range(20)])
    assert len(written) <= 1


def test_a_prefix_too_large_to_be_kept_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = MarkupModel(tiny_backbone("llama"))
    classifier = MarkupClassifier(model, cache_bytes=1000).fit(X, Y)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            classifier.predict(NEW)
    assert [record.getMessage().count("cache_bytes") for record in caplog.records] == [1]
    assert isinstance(model.prefixes, PrefixCache)
    assert len(model.prefixes) == 0
    classifier.set_params(cache_bytes=2**20)
    classifier.predict(NEW)
    assert len(model.prefixes) == 1


def test_orders_of_options_are_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("bert")), n_permutations=1000).fit(X[:4], Y[:4])
    assert classifier._asker.orders == 2
    assert classifier.predict_proba(NEW).sum(axis=1) == pytest.approx(1)
    with pytest.raises(MarkupError, match="n_permutations: 1001 is more than 1000"):
        MarkupClassifier(n_permutations=1001).fit(X, Y)


def test_what_may_change_after_fit_has_its_effect_and_what_may_not_is_noticed() -> None:
    descriptions = {"weather": "rain"}
    classifier = MarkupClassifier(MarkupModel(tiny_backbone("bert")), descriptions=descriptions).fit(X, Y)
    asked: list[int] = []
    scores = classifier._asker.model.scores
    classifier._asker.model.scores = lambda episodes, tokens: asked.append(tokens) or scores(episodes, tokens)
    classifier.set_params(batch_tokens=77).predict(NEW)
    assert asked == [77]
    descriptions["weather"] = "snow"
    with pytest.raises(MarkupError, match="descriptions was changed after fit"):
        classifier.predict(NEW)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"template": 3}, "template"), ({"task_description": 3}, "task_description"),
     ({"task_description": "\ud800"}, "task_description"), ({"cache_bytes": -1}, "cache_bytes")],
)  # fmt: skip
def test_more_bad_parameters_are_named(parameters: Any, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        MarkupClassifier(MarkupModel(tiny_backbone("bert")), **parameters).fit(X, Y)


def test_a_label_of_a_megabyte_is_refused_before_it_costs_anything() -> None:
    with pytest.raises(MarkupError, match="1,000,000 characters"):
        MarkupClassifier(MarkupModel(tiny_backbone("bert"))).fit(X, Y, classes=["x" * 1_000_000])
