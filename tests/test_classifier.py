"""The classifier: scikit-learn's contract, any number of labels, "none of the above", and what it is saved as."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from functools import cache
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from icl_markup import NONE_OF_THE_ABOVE, Backbone, MarkupClassifier, MarkupError, MarkupModel
from icl_markup.priors import CONTENT_FREE
from tests.conftest import KINDS, TEXTS, tiny_backbone

X = [text for texts in TEXTS.values() for text in texts[:2]]
Y = [label for label, texts in TEXTS.items() for _ in texts[:2]]
NEW = [text for texts in TEXTS.values() for text in texts[2:]]


def tiny(name: str = "bert", **parameters: Any) -> MarkupClassifier:
    return MarkupClassifier(MarkupModel(tiny_backbone(name)), **parameters)


@pytest.fixture(scope="module")
def pretrained(smollm2: Backbone) -> MarkupClassifier:
    """A classifier on a pretrained model, in words that it knows without a warm-up."""
    return MarkupClassifier(MarkupModel(smollm2, "plain_words_input_output"), calibration="domain").fit(X, Y)


def test_it_answers_and_its_probabilities_are_some(pretrained: MarkupClassifier) -> None:
    assert pretrained.classes_.tolist() == sorted(TEXTS)
    found = pretrained.predict_proba(NEW)
    assert found.shape == (len(NEW), len(TEXTS))
    assert found.sum(axis=1) == pytest.approx(1)
    assert (pretrained.predict(NEW) == pretrained.classes_[found.argmax(axis=1)]).all()
    right = [label for label, texts in TEXTS.items() for _ in texts[2:]]
    assert pretrained.score(NEW, right) >= 0.75


def test_scikit_learn_accepts_it(tiny_default: Backbone) -> None:
    check_estimator(MarkupClassifier(), on_skip=None)  # texts as input rule out all but a few of its checks


@cache
def _tiny_model() -> MarkupModel:
    return MarkupModel(tiny_backbone("bert"))


def written(rows: Any) -> list[str]:
    return [" ".join(f"{value:.3g}" for value in row) for row in rows]


class OnNumbers(MarkupClassifier):
    """What scikit-learn feeds its checks with, as texts: then they reach all the rest."""

    def __init__(self, *, most_tokens: int = 64):
        super().__init__(most_tokens=most_tokens)

    def _load(self) -> MarkupModel:
        return _tiny_model()

    def fit(self, X: Any, y: Any) -> OnNumbers:  # type: ignore[override]
        X, y = validate_data(self, X, y)
        check_classification_targets(y)
        super().fit(written(X), y)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> OnNumbers:  # type: ignore[override]
        X, y = validate_data(self, X, y, reset=not hasattr(self, "classes_"))
        super().partial_fit(written(X), y, () if classes is None else classes)
        return self

    def _log_probs(self, X: Any) -> Any:
        check_is_fitted(self)
        return super()._log_probs(written(validate_data(self, X, reset=False)))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.one_d_array = False
        tags.input_tags.two_d_array = True
        tags.classifier_tags.poor_score = True  # the tiny model has random weights
        return tags


def test_scikit_learn_accepts_it_on_numbers_written_as_texts() -> None:
    rounding = "a batch's composition moves float32 logits by rounding, and the check allows 1e-7"
    wrong = dict.fromkeys(("check_methods_sample_order_invariance", "check_methods_subset_invariance"), rounding)
    found = check_estimator(OnNumbers(), expected_failed_checks=wrong, on_skip=None)
    assert sum(one["status"] == "passed" for one in found) > 40


def test_it_works_in_scikit_learns_tools() -> None:
    classifier = tiny()
    scores = cross_val_score(classifier, X, Y, cv=2, error_score="raise")
    assert ((scores >= 0) & (scores <= 1)).all()
    steps = Pipeline(
        [("lower", FunctionTransformer(lambda texts: [t.lower() for t in texts])), ("classify", classifier)]
    )
    search = GridSearchCV(steps, {"classify__calibration": ["none", "contextual"]}, cv=2, error_score="raise").fit(X, Y)
    assert search.best_estimator_.predict(NEW).shape == (len(NEW),)


def test_a_clone_has_the_parameters_and_no_demonstrations() -> None:
    classifier = tiny(n_permutations=2, none_of_the_above="option").fit(X, Y)
    copy = clone(classifier)
    assert copy.get_params(deep=False) == classifier.get_params(deep=False)
    with pytest.raises(NotFittedError):
        copy.predict(NEW)
    assert (copy.fit(X, Y).predict_proba(NEW) == classifier.predict_proba(NEW)).all()


def test_parameters_that_change_after_fit_ask_for_another(tmp_path: Path) -> None:
    classifier = tiny().fit(X, Y)
    for name, value in (("none_of_the_above", "option"), ("calibration", "contextual"), ("n_permutations", 2)):
        changed = pickle.loads(pickle.dumps(classifier)).set_params(**{name: value})
        for act in (lambda c: c.predict(NEW), lambda c: c.save(tmp_path / "c"), lambda c: c.partial_fit(X[:1], Y[:1])):
            with pytest.raises(MarkupError, match=f"{name} was changed after fit"):
                act(changed)
        assert changed.fit(X, Y).predict(NEW).shape == (len(NEW),)


def test_it_can_be_pickled_with_its_model() -> None:
    classifier = tiny("llama").fit(X, Y)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_allclose(again.predict_proba(NEW), classifier.predict_proba(NEW), atol=1e-6)


def test_it_can_be_pickled(tiny_default: Backbone) -> None:
    classifier = MarkupClassifier().fit(X, Y)
    raw = pickle.dumps(classifier)
    assert len(raw) < 20_000, "no model is in it"
    assert (pickle.loads(raw).predict_proba(NEW[:2]) == classifier.predict_proba(NEW[:2])).all()


@pytest.mark.parametrize("labels", [[3, 3, 1, 1, 2, 2, 7, 7], np.array([True, False] * 4), np.array(Y)])
def test_labels_keep_their_type(labels: Any) -> None:
    classifier = tiny().fit(X, labels)
    assert set(classifier.predict(NEW).tolist()) <= set(np.asarray(labels).tolist())
    assert classifier.classes_.dtype.kind == np.asarray(labels).dtype.kind


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_matter(kind: str) -> None:
    classifier = tiny(kind, n_permutations=2).fit(X, Y)
    together = classifier.predict_proba(NEW)
    alone = np.concatenate([classifier.predict_proba([text]) for text in NEW])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert classifier.predict_proba([]).shape == (0, 4)


def test_partial_fit_adds_and_removes_as_if_fitted_so() -> None:
    whole = tiny().fit(X, Y)
    grown = tiny().fit(X[:4], Y[:4]).partial_fit(X[4:], Y[4:])
    assert (grown.predict_proba(NEW) == whole.predict_proba(NEW)).all()
    grown.partial_fit(remove=["weather"])
    assert (grown.predict_proba(NEW) == tiny().fit(X[:6], Y[:6]).predict_proba(NEW)).all()
    grown.partial_fit(classes=["by name alone"])
    assert "by name alone" in grown.classes_.tolist()
    before = grown.predict_proba(NEW)
    with pytest.raises(MarkupError, match="not one of the labels"):
        grown.partial_fit(remove=["weather"])
    with pytest.raises(MarkupError, match="1 class"):
        grown.partial_fit(remove=grown.classes_.tolist()[1:])
    assert (grown.predict_proba(NEW) == before).all(), "as it was"


def test_label_names_alone_are_enough(pretrained: MarkupClassifier) -> None:
    classifier = clone(pretrained).fit([], [], classes=list(TEXTS))
    assert classifier.predict(["my card was stolen"]).tolist() == ["lost card"]


def test_descriptions_are_shown() -> None:
    classifier = tiny(descriptions={"weather": "rain or sunshine"}).fit(X, Y)
    assert [o.description for o in classifier._asker.labels] == ["", "", "", "rain or sunshine"]


def test_a_description_of_a_misspelt_label_is_an_error() -> None:
    with pytest.raises(MarkupError, match="'wether' is no label; did you mean 'weather'"):
        tiny(descriptions={"wether": "rain"}).fit(X, Y)
    assert tiny(descriptions={"invoice": "what is to be paid"}).fit(X, Y).predict(NEW[:1]).shape == (1,)


def test_an_intent_that_is_added_costs_the_reading_of_its_own_texts() -> None:
    classifier = tiny(options=2, demos=2, most_tokens=16)
    classifier.fit(
        [f"text {i} of many words that fill the prompt" for i in range(60)], [f"label {i}" for i in range(60)]
    )
    assert classifier._asker.retrieves
    classifier.predict(["text 1"])
    retriever = classifier._asker.retriever
    read: list[str] = []
    states = retriever._states

    def counted(texts: Any) -> Any:
        read.extend(texts)
        return states(texts)

    retriever._states = retriever._vectors._compute = counted
    classifier.partial_fit(["a new text"], ["a new label"])
    classifier.predict(["text 2"])
    assert sorted(read) == ["a new label", "a new text", "text 2"]
    fresh = clone(classifier).fit(classifier.texts_, [classifier.classes_[i] for i in classifier.labels_])
    texts = ["text 3", "new"]
    np.testing.assert_allclose(fresh.predict_proba(texts), classifier.predict_proba(texts), atol=1e-5)


@pytest.mark.parametrize("mode", ["option", "threshold"])
def test_what_fits_no_label_is_rejected_as_the_threshold_says(mode: Any) -> None:
    texts = [*NEW, "the moon is made of cheese", "seven times eight"]
    plain = tiny(none_of_the_above=mode).fit(X, Y)
    assert plain.classes_.tolist() == sorted([*TEXTS, NONE_OF_THE_ABOVE])
    found = plain.predict_proba(texts)
    assert found.sum(axis=1) == pytest.approx(1)
    for threshold, rejected in ((-100.0, True), (100.0, False)):
        answers = tiny(none_of_the_above=mode, threshold=threshold).fit(X, Y).predict(texts)
        assert ((answers == NONE_OF_THE_ABOVE) == rejected).all()
    asker = tiny(none_of_the_above=mode).fit(X, Y)._asker
    scores = asker.log_probs(texts)
    best = scores[:, :4].max(axis=1)
    odd = scores[:, 4] - best if mode == "option" else -best
    middle = float(np.sort(odd)[5:7].mean())
    answers = tiny(none_of_the_above=mode, threshold=middle).fit(X, Y).predict(texts)
    assert ((answers == NONE_OF_THE_ABOVE) == (odd > middle)).all()


@pytest.mark.parametrize("mode", ["option", "threshold"])
def test_calibration_chooses_temperature_and_threshold(mode: Any, pretrained: MarkupClassifier) -> None:
    classifier = clone(pretrained).set_params(none_of_the_above=mode).fit(X, Y)
    right = [label for label, texts in TEXTS.items() for _ in texts[2:]]
    strange = ["the moon is made of cheese", "seven times eight is fifty six", "lorem ipsum dolor", "a poem on trees"]
    texts, labels = [*NEW, *strange], [*right, *[NONE_OF_THE_ABOVE] * len(strange)]
    before = np.mean(classifier.predict(texts) == np.array(labels))
    classifier.calibrate(texts, labels)
    assert classifier.calibration_.threshold is not None
    assert classifier.calibration_.temperature != 1.0
    after = np.mean(classifier.predict(texts) == np.array(labels))
    assert after >= 0.75 and after > before
    for call in (classifier.calibrate, classifier.retriever_recall):
        with pytest.raises(MarkupError, match="'unheard of', is not one of the labels"):
            call(["x"], ["unheard of"])
    for none in ([], ["x"]):
        with pytest.raises(MarkupError, match="to learn from"):
            classifier.calibrate(none, [NONE_OF_THE_ABOVE] * len(none))
    with pytest.raises(MarkupError, match="give labels as strings"):
        tiny(none_of_the_above=mode).fit(["a", "b"], [1, 2])
    once = classifier.calibration_
    assert classifier.calibrate(texts, labels).calibration_ == once, "what was learnt before has no influence"


def test_contextual_calibration_takes_nothing_from_none_of_the_above() -> None:
    plain = tiny(none_of_the_above="option").fit(X, Y)._asker
    asked = replace(plain, prior="contextual")
    before, after = plain.log_probs(NEW), asked.log_probs(NEW)
    probes = np.exp(plain.log_probs(list(CONTENT_FREE))[:, :4]).sum(axis=0)
    prior = np.log(probes / probes.sum()) + np.log(4)
    moved = before - np.append(prior, 0)
    np.testing.assert_allclose(after, moved - np.logaddexp.reduce(moved, axis=1, keepdims=True), atol=1e-5)


def test_batch_calibration_learns_without_labels_and_serves_every_text_alike() -> None:
    classifier = tiny(calibration="batch").fit(X, Y).calibrate(NEW)
    assert set(classifier.calibration_.prior or {}) == set(TEXTS)
    together = classifier.predict_proba(NEW)
    np.testing.assert_allclose(together[:1], classifier.predict_proba(NEW[:1]), atol=1e-6)
    raw = tiny().fit(X, Y).predict_proba(NEW)
    assert np.ptp(together.mean(axis=0)) < np.ptp(raw.mean(axis=0))
    with pytest.raises(MarkupError, match="batch"):
        tiny().fit(X, Y).calibrate(NEW)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("labels", [2, 3, 4])
def test_permutations_put_every_option_in_every_place_once(seed: int, labels: int) -> None:
    names = sorted(TEXTS)[:labels]
    classifier = tiny(n_permutations=2 * labels, none_of_the_above="option", random_state=seed).fit(
        [], [], classes=names
    )
    orders = [[o.name for o in one.episode.options] for _, one in classifier._asker.asked(NEW[:1])]
    assert orders[0] == [*names, NONE_OF_THE_ABOVE]
    assert all(order[-1] == NONE_OF_THE_ABOVE for order in orders)
    assert len(orders) == min(2 * labels, factorial(labels))
    for block in (orders[i : i + labels] for i in range(0, len(orders), labels)):
        for place in range(labels):
            assert sorted(order[place] for order in block) == names


def test_what_is_averaged_over_all_orders_does_not_depend_on_the_first() -> None:
    def strong(**parameters: Any) -> MarkupClassifier:
        model = MarkupModel(tiny_backbone("llama"))
        with torch.no_grad():  # random weights are so small that attention hardly tells tokens apart
            for parameter in model.backbone.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
        return MarkupClassifier(model, **parameters).fit([], [], classes=["weather", "complaint"])

    found, once = strong(n_permutations=2).predict_proba(NEW), strong()._asker
    swapped = replace(once, labels=once.labels[::-1])
    expected = (np.exp(once.log_probs(NEW)) + np.exp(swapped.log_probs(NEW))[:, ::-1]) / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(np.exp(once.log_probs(NEW)) - expected).max() > 1e-4, "the order mattered"


def many(labels: int, shots: int, seed: int = 0) -> tuple[list[str], list[str]]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(labels)]
    texts = [f"{word} number {i} {rng.choice(words)}" for word in words for i in range(shots)]
    return texts, [f"about {word}" for word in words for _ in range(shots)]


@pytest.mark.parametrize(("labels", "shots"), [(77, 10), (1000, 2)])
@pytest.mark.parametrize("retriever", ["backbone", "bm25"])
def test_any_number_of_labels_and_demonstrations(labels: int, shots: int, retriever: str) -> None:
    texts, names = many(labels, shots)
    classifier = tiny(retriever=retriever, options=5, demos=5, none_of_the_above="option").fit(texts, names)
    asked = [f"{name.removeprefix('about ')} please" for name in names[:: shots * (labels // 8)]]
    found = classifier.predict_proba(asked)
    assert found.shape == (len(asked), labels + 1)
    assert found.sum(axis=1) == pytest.approx(1)
    assert ((found > 0).sum(axis=1) == 6).all(), "five labels and none of the above were offered"
    prompt, options = classifier.compose(asked[0])
    assert len(options) == 6
    assert options[-1] == NONE_OF_THE_ABOVE
    assert prompt.dropped == 0
    if retriever == "bm25":
        assert classifier.retriever_recall(asked, names[:: shots * (labels // 8)]) == 1.0


def test_a_function_may_retrieve() -> None:
    texts, names = many(40, 1)

    def last(queries: list[str], stored: list[str]) -> np.ndarray:
        return np.tile(np.arange(len(stored), dtype=float), (len(queries), 1))

    order = sorted(range(40), key=names.__getitem__)
    texts, names = [texts[i] for i in order], [names[i] for i in order]
    classifier = tiny(retriever=last, options=3, demos=2).fit(texts, names)
    _, options = classifier.compose("anything")
    assert options == names[:-4:-1]
    for wrong, message in (
        (lambda q, t: np.zeros((1, 1)), "shape"),
        (lambda q, t: np.full((len(q), len(t)), np.nan), "NaN"),
        (lambda q, t: np.full((len(q), len(t)), -np.inf), "infinity"),
    ):
        with pytest.raises(MarkupError, match=message):
            tiny(retriever=wrong).fit(texts, names).predict(["a text"])
    with pytest.raises(MarkupError, match="cannot be written"):
        classifier.save("nowhere")
    with pytest.raises(MarkupError, match="did you mean 'bm25'"):
        tiny(retriever="bm52").fit(texts, names)


@pytest.mark.parametrize(
    "parameters", [{}, {"none_of_the_above": "option", "calibration": "batch", "n_permutations": 2}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_answers_as_what_was_saved(kind: str, parameters: Any, tmp_path: Path) -> None:
    backbone = tiny_backbone(kind)
    backbone.model.save_pretrained(tmp_path / "backbone")
    backbone.tokenizer.save_pretrained(tmp_path / "backbone")
    made = MarkupClassifier(backbone=str(tmp_path / "backbone"), descriptions={"weather": "rain"}, **parameters)
    made.fit(X, Y, classes=["by name alone"])
    if parameters:
        made.calibrate(NEW, [label for label, texts in TEXTS.items() for _ in texts[2:]])
    folder = made.save(tmp_path / "kept" / "classifier")
    loaded = MarkupClassifier.load(folder)
    assert loaded.classes_.tolist() == made.classes_.tolist()
    assert loaded.calibration_ == made.calibration_
    # A causal backbone that has the prompt's head in its cache differs by rounding from one that computes it.
    np.testing.assert_allclose(loaded.predict_proba(NEW), made.predict_proba(NEW), atol=1e-6)
    loaded.partial_fit(remove=["weather"]).save(folder)
    again = MarkupClassifier.load(folder)
    assert "weather" not in again.classes_
    np.testing.assert_allclose(again.predict_proba(NEW), loaded.predict_proba(NEW), atol=1e-6)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["classifier"]


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    folder = tiny().fit(X, Y).save(tmp_path / "c")
    file = folder / "classifier.json"
    good = json.loads(file.read_text())
    changes: list[dict[str, Any]] = [
        {"format": 2},
        {"classes": [*good["classes"], None]},
        {"demonstrations": [{"text": "a", "class": 99}]},
        {"calibration": {"prior": None, "temperature": -1, "threshold": None}},
        {"parameters": {"exec": "rm"}},
        {"backbone": 3},
    ]
    for change in changes:
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(MarkupError, match=r"classifier\.json"):
            MarkupClassifier.load(folder)
    file.write_text(json.dumps(good)[:-20])
    with pytest.raises(MarkupError, match="not valid JSON"):
        MarkupClassifier.load(folder)
    with pytest.raises(MarkupError, match="classifier folder"):
        MarkupClassifier.load(tmp_path)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", ""], ["x", "y"], "text 1 is empty"),
        (["a", None], ["x", "y"], "item 1 is missing"),
        (["a", float("nan")], ["x", "y"], "item 1 is missing"),
        (["a", 3], ["x", "y"], "not a text"),
        ("one string", ["x"], "one string"),
        (np.zeros((2, 3)), ["x", "y"], "2 dimensions"),
        (["a", "b"], ["x"], "1 labels for 2 texts"),
        (["a", "b"], ["x", None], "label 1 is missing"),
        (["a", "b"], ["x", float("nan")], "label 1 is missing"),
        (["a", "b"], ["x", "  "], "label 1 is empty"),
        (["a", "b"], ["x", " x"], "written alike"),
        (["a", "b"], [1, "1"], "types int, str"),
        (["a", "b"], [True, 1], "types bool, int"),
        (["a", "b"], ["x", "y\0"], "NUL"),
        (["a"], 3, "give a list of labels"),
        (["a", "b"], ["x", "x"], "1 class"),
        ([], [], "no class"),
        (["a", "b"], ["x", NONE_OF_THE_ABOVE], "meaning of its own"),
        (["a", "b"], ["x", "long " * 1900], "tokens"),
        (["a", "\ud800"], ["x", "y"], "surrogate"),
    ],
)
def test_bad_input_is_named(texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        tiny().fit(texts, labels)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"none_of_the_above": "yes"}, "none_of_the_above"),
        ({"calibration": "magic"}, "calibration"),
        ({"options": 1}, "options"),
        ({"n_permutations": 0}, "n_permutations"),
        ({"most_tokens": 2.5}, "most_tokens"),
        ({"threshold": float("nan")}, "threshold"),
        ({"retriever_weight": "much"}, "retriever_weight"),
        ({"threshold": np.array([1, 2])}, "threshold"),
        ({"calibration": np.array(["none", "batch"])}, "calibration"),
        ({"random_state": None}, "random_state"),
        ({"descriptions": "weather"}, "descriptions"),
        ({"descriptions": {"weather": 3}}, "that of 'weather'"),
    ],
)
def test_bad_parameters_are_named(parameters: Any, message: str) -> None:
    with pytest.raises(MarkupError, match=message):
        tiny(**parameters).fit(X, Y)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_texts_get_an_answer(kind: str) -> None:
    classifier = tiny(kind, most_tokens=32).fit(X, Y)
    odd = [
        "card " * 200_000,  # a megabyte
        " " * 9000 + "card",
        "x" * 1_000_000,
        "\x00\x01\x07",
        "Где моя карта? 我的卡在哪里 أين بطاقتي 🙂🙂",
        "<classification> <options> A: weather <demo> <input> {text} <label> [MASK] </s> <s> <pad> <extra_id_0>",
        "\\<demo\\> {symbol} @head",
        "\u202e\u200b.",
    ]
    found = classifier.predict_proba(odd)
    assert found.shape == (len(odd), 4)
    assert np.isfinite(found).all()
    assert MarkupClassifier(MarkupModel(tiny_backbone(kind))).fit(X, Y).predict(odd).shape == (len(odd),), "as it comes"
    slots = {sum(slot.is_query for slot in classifier.compose(text)[0].slots) for text in odd}
    assert slots == {1}
