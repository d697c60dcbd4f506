"""Episodes of experiments: the same for every method, fair, and varied in one thing at a time."""

from __future__ import annotations

from collections import Counter

import pytest

from icl_markup.drawing import draw, reorder, vary
from icl_markup.episodes import Episode
from icl_markup.experiment_config import Setting
from icl_markup.tasks import NONE_OF_THE_ABOVE, Example, Task


def big_task(labels: int = 6, per_label: int = 8, oos: int = 10) -> Task:
    splits = {
        split: tuple(
            Example(f"{split} text {i} of label {label}", f"label {label}")
            for label in range(labels)
            for i in range(per_label)
        )
        + (tuple(Example(f"odd {split} {i}", "oos") for i in range(oos)) if split == "test" else ())
        for split in ("train", "test")
    }
    return Task("big", tuple(f"label {i}" for i in range(labels)), splits, oos_label="oos")


def answers(episode: Episode) -> list[str]:
    return [episode.options[q.answer].name for q in episode.queries if q.answer is not None]


def test_the_same_seed_draws_the_same_episodes() -> None:
    task = big_task()
    for setting in (Setting(3, 1), Setting(None, 2), Setting(None, 2, open_world=True)):
        again = [draw(task, setting, episodes=4, queries=5, seed=seed, query_split="test") for seed in (1, 1, 2)]
        assert again[0] == again[1] != again[2]


def test_no_query_is_a_demonstration_and_labels_are_right() -> None:
    task = big_task()
    truth = {e.text: e.label for examples in task.splits.values() for e in examples}
    for setting in (Setting(3, 2), Setting(None, 3)):
        for episode in draw(task, setting, episodes=5, queries=6, seed=0, query_split="train"):
            shown = {demo.text for demo in episode.demos}
            for query in episode.queries:
                assert query.text not in shown
                assert truth[query.text] == episode.options[query.answer].name
            counts = Counter(demo.answer for demo in episode.demos)
            assert set(counts.values()) == {setting.k_shot}


def test_the_full_label_set_takes_at_most_k_demonstrations_where_a_label_has_fewer() -> None:
    task = big_task()
    train = tuple(e for e in task.splits["train"] if e.label != "label 0" or "text 0" in e.text)
    small = Task("small", task.labels, {**task.splits, "train": train}, oos_label="oos")
    (episode,) = draw(small, Setting(None, 5), episodes=1, queries=10, seed=0, query_split="test")
    counts = Counter(demo.answer for demo in episode.demos)
    assert len(episode.options) == 6
    assert counts[0] == 1 and all(counts[i] == 5 for i in range(1, 6))


def test_an_open_world_mixes_queries_as_the_split_does() -> None:
    task = big_task()
    (episode,) = draw(task, Setting(None, 1, open_world=True), episodes=1, queries=1000, seed=0, query_split="test")
    assert episode.options[-1].name == NONE_OF_THE_ABOVE
    assert Counter(answers(episode))[NONE_OF_THE_ABOVE] == 10
    assert len(episode.queries) == 6 * 8 + 10
    (closed,) = draw(task, Setting(None, 1), episodes=1, queries=1000, seed=0, query_split="test")
    assert len(closed.queries) == 6 * 8
    assert NONE_OF_THE_ABOVE not in [option.name for option in closed.options]


@pytest.mark.parametrize("what", ["demo order", "option order", "drawn demos"])
def test_variations_ask_the_same_queries_of_the_same_labels(what: str) -> None:
    task = big_task()
    setting = Setting(4, 2, vary=what)  # type: ignore[arg-type]
    (episode,) = draw(task, setting, episodes=1, queries=5, seed=0, query_split="test")
    varied = [vary(episode, setting, v, task, 0) for v in range(4)]
    truth = {e.text: e.label for examples in task.splits.values() for e in examples}
    assert len(set(varied)) > 1
    for one in varied:
        assert [q.text for q in one.queries] == [q.text for q in episode.queries]
        assert answers(one) == answers(episode)
        assert sorted(o.name for o in one.options) == sorted(o.name for o in episode.options)
        for demo in one.demos:
            assert truth[demo.text] == one.options[demo.answer].name
    texts = [sorted(d.text for d in one.demos) for one in varied]
    assert (texts[0] != texts[1]) == (what == "drawn demos")
    assert all(one.options == episode.options for one in varied) == (what != "option order")
    assert varied == [vary(episode, setting, v, task, 0) for v in range(4)]


def test_reordering_options_back_gives_the_episode() -> None:
    (episode,) = draw(big_task(), Setting(4, 1), episodes=1, queries=3, seed=0, query_split="test")
    assert reorder(reorder(episode, [2, 0, 3, 1]), [1, 3, 0, 2]) == episode
