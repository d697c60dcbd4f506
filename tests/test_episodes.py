"""Episodes: pure functions of (seed, step, position) that never show a query among its demonstrations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icl_markup.episodes import Episode, EpisodeConfig, EpisodeSampler
from icl_markup.errors import TaskError
from icl_markup.tasks import NONE_OF_THE_ABOVE, Example, Task, checked_task
from tests.conftest import tiny_task

FAST = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(-(2**31), 2**31)
PLACES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 500)), min_size=1, max_size=6, unique=True)


def wide_task(name: str = "wide", labels: int = 12, texts: int = 5, oos: bool = True) -> Task:
    """A task of many labels whose texts say their label and split."""
    splits = {
        split: [Example(f"{name} {split} l{i:02} {j}", f"l{i:02}") for i in range(labels) for j in range(texts)]
        + [Example(f"{name} {split} oos {j}", "oos") for j in range(3 * oos)]
        for split in ("train", "test")
    }
    described = {"l00": "the first of them"}
    return checked_task(name, splits, oos_label="oos" if oos else None, descriptions=described, description="Numbers.")


def label_of(text: str) -> str:
    return text.split()[2]


def sampler(*tasks: Task, seed: int = 0, **config: Any) -> EpisodeSampler:
    return EpisodeSampler(tasks or (wide_task(),), EpisodeConfig(**config), seed)


def episodes(count: int = 200, *tasks: Task, seed: int = 0, **config: Any) -> Iterator[Episode]:
    drawn = sampler(*tasks, seed=seed, **config)
    yield from (drawn.episode(i // 16, i % 16) for i in range(count))


MIXED: dict[str, Any] = {
    "n_way": (2, 6), "k_shot": (0, 3), "queries": (1, 3), "none_option": 0.5, "out_of_scope": 0.5, "hard_options": 0.5,
}  # fmt: skip


@FAST
@given(seed=SEEDS, places=PLACES)
def test_an_episode_depends_on_seed_step_and_position_alone(seed: int, places: list[tuple[int, int]]) -> None:
    tasks = (wide_task("a"), wide_task("b"))
    one = sampler(*tasks, seed=seed, **MIXED)
    first = [one.episode(*place) for place in places]
    assert [one.episode(*place) for place in reversed(places)] == first[::-1]
    assert [sampler(*tasks, seed=seed, **MIXED).episode(*place) for place in places] == first


def test_seeds_steps_and_positions_all_change_the_episode() -> None:
    drawn = [
        sampler(seed=seed, **MIXED).episode(step, position)
        for seed in (0, 1, 2)
        for step in (0, 1, 12)
        for position in (0, 1, 2)
    ]
    assert len({repr(episode) for episode in drawn}) == len(drawn)
    assert sampler(seed=1, **MIXED).episode(12, 3) != sampler(seed=11, **MIXED).episode(2, 3)


@settings(FAST, max_examples=150)
@given(
    seed=SEEDS, n_way=st.tuples(st.integers(2, 6), st.integers(6, 12)), k_shot=st.tuples(st.just(0), st.integers(0, 4))
)
def test_options_and_demonstrations_are_as_many_as_asked_for(
    seed: int, n_way: tuple[int, int], k_shot: tuple[int, int]
) -> None:
    for episode in episodes(4, seed=seed, n_way=n_way, k_shot=k_shot, queries=(1, 3)):
        names = [option.name for option in episode.options]
        assert n_way[0] <= len(set(names)) == len(names) <= n_way[1]
        shown = Counter(demo.answer for demo in episode.demos)
        assert {shown[i] for i in range(len(names))} == {len(episode.demos) // len(names)}
        assert k_shot[0] <= len(episode.demos) // len(names) <= k_shot[1]
        assert len({demo.text for demo in episode.demos}) == len(episode.demos)
        assert 1 <= len(episode.queries) <= 3
        assert all(names[demo.answer] == label_of(demo.text) for demo in episode.demos)
        assert all(
            query.answer is not None and names[query.answer] == label_of(query.text) for query in episode.queries
        )


def test_every_count_in_the_ranges_comes_up_and_an_episode_carries_its_tasks_words() -> None:
    drawn = list(episodes(300, n_way=(2, 4), k_shot=(1, 3), queries=(1, 2)))
    assert {len(episode.options) for episode in drawn} == {2, 3, 4}
    assert {len(episode.demos) // len(episode.options) for episode in drawn} == {1, 2, 3}
    assert {len(episode.queries) for episode in drawn} == {1, 2}
    assert {query.answer for episode in drawn for query in episode.queries} == {0, 1, 2, 3}
    assert {(episode.task, episode.task_description) for episode in drawn} == {("wide", "Numbers.")}
    options = {option for episode in drawn for option in episode.options}
    assert {o.description for o in options if o.name == "l00"} == {"the first of them"}
    assert {o.description for o in options if o.name != "l00"} == {""}


@pytest.mark.parametrize("queries", [(1, 1), (4, 4)])
@pytest.mark.parametrize("k_shot", [(1, 1), (2, 2)])
def test_no_query_is_among_the_demonstrations_of_the_same_split(
    queries: tuple[int, int], k_shot: tuple[int, int]
) -> None:
    for episode in episodes(200, tiny_task(), n_way=(2, 3), k_shot=k_shot, queries=queries, none_option=0.5):
        assert not {demo.text for demo in episode.demos} & {query.text for query in episode.queries}


def test_a_text_that_stands_twice_in_a_split_is_not_both_shown_and_asked() -> None:
    examples = [Example(f"{label} {j // 2}", label) for label in ("a", "b", "c") for j in range(4)]
    examples += [Example("d", "d"), Example("d", "d")]
    for episode in episodes(100, checked_task("twice", {"train": examples}), n_way=(2, 3), k_shot=(1, 1)):
        assert episode.queries[0].text not in {demo.text for demo in episode.demos}


def test_queries_of_one_episode_differ_while_there_are_enough_texts() -> None:
    for episode in episodes(100, n_way=(2, 4), k_shot=(1, 1), queries=(4, 4)):
        assert len({query.text for query in episode.queries}) == 4


def test_demonstrations_and_queries_come_from_their_splits() -> None:
    for episode in episodes(
        50, demo_split="train", query_split="test", k_shot=(1, 2), none_option=0.5, out_of_scope=0.5
    ):
        assert {demo.text.split()[1] for demo in episode.demos} == {"train"}
        assert {query.text.split()[1] for query in episode.queries} == {"test"}


def test_none_of_the_above_is_the_last_option_of_open_world_episodes_and_of_no_other() -> None:
    drawn = list(episodes(400, none_option=0.5, out_of_scope=0.5, k_shot=(0, 2)))
    offers = [NONE_OF_THE_ABOVE in {option.name for option in episode.options} for episode in drawn]
    assert 150 < sum(offers) < 250
    assert [episode.options[-1].name == NONE_OF_THE_ABOVE for episode in drawn] == offers
    for episode in drawn:
        names = [option.name for option in episode.options]
        assert names.count(NONE_OF_THE_ABOVE) <= 1
        (query,) = episode.queries
        assert query.answer is not None
        answer = names[query.answer]
        assert (answer == NONE_OF_THE_ABOVE) == (label_of(query.text) not in names)
        assert answer in (NONE_OF_THE_ABOVE, label_of(query.text))
        assert NONE_OF_THE_ABOVE not in {names[demo.answer] for demo in episode.demos}
    assert NONE_OF_THE_ABOVE not in {o.name for e in episodes(50, out_of_scope=1.0) for o in e.options}


def test_out_of_scope_queries_are_of_both_kinds_and_as_frequent_as_asked() -> None:
    open_world = {"none_option": 1.0, "n_way": (3, 5), "k_shot": (0, 0)}
    answers = [e.queries[0].answer == len(e.options) - 1 for e in episodes(400, out_of_scope=0.3, **open_world)]
    assert 80 < sum(answers) < 160
    labels = Counter(label_of(e.queries[0].text) == "oos" for e in episodes(200, out_of_scope=1.0, **open_world))
    assert min(labels[True], labels[False]) > 50
    every = {"none_option": 1.0, "n_way": None, "k_shot": (0, 0), "out_of_scope": 1.0}
    assert {label_of(e.queries[0].text) for e in episodes(50, **every)} == {"oos"}, "no label is left to ask about"
    closed = wide_task(oos=False)
    assert all(e.queries[0].answer != len(e.options) - 1 for e in episodes(50, closed, **every))


def test_hard_options_are_a_label_and_those_of_the_nearest_names() -> None:
    families = {"card": ["lost", "stolen", "broken", "late"], "weather": ["rainy", "sunny", "windy", "foggy"]}
    names = [f"{kind} {family} {family} {family}" for family, kinds in families.items() for kind in kinds]
    task = checked_task("t", {"train": [Example(f"{name} {j}", name) for name in names for j in range(3)]})
    hard = [{o.name.split()[1] for o in e.options} for e in episodes(60, task, n_way=(3, 4), hard_options=1.0)]
    assert {len(found) for found in hard} == {1}
    assert {family for found in hard for family in found} == set(families)
    easy = [{o.name.split()[1] for o in e.options} for e in episodes(60, task, n_way=(3, 4), hard_options=0.0)]
    assert {len(found) for found in easy} == {1, 2}


@pytest.mark.parametrize("hard_options", [0.0, 1.0])
def test_the_order_of_options_and_of_demonstrations_varies(hard_options: float) -> None:
    task = wide_task(labels=4)
    drawn = list(episodes(100, task, n_way=(3, 3), k_shot=(1, 1), hard_options=hard_options))
    assert len({tuple(option.name for option in episode.options) for episode in drawn}) > 10
    assert {tuple(demo.answer for demo in episode.demos) for episode in drawn} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0),
    }  # fmt: skip


def test_tasks_are_drawn_by_weight_and_never_with_weight_zero() -> None:
    tasks = [wide_task(name) for name in ("a", "b", "c")]
    equal = Counter(e.task for e in episodes(600, *tasks))
    assert min(equal.values()) > 150
    drawn = Counter(e.task for e in episodes(600, *tasks, task_weights={"a": 3.0, "b": 0.0}))
    assert set(drawn) == {"a", "c"}
    assert 400 < drawn["a"] < 500


def test_at_most_so_many_demonstrations_are_drawn_as_are_allowed() -> None:
    drawn = list(episodes(200, n_way=(2, 8), k_shot=(1, 4), max_demos=9))
    for episode in drawn:
        assert len(episode.demos) <= 9
        assert len(episode.demos) % len(episode.options) == 0
    assert {len(e.demos) for e in drawn} >= {2, 4, 6, 8, 9}


@pytest.mark.parametrize("k_shot", [(0, 0), (1, 1), (4, 4)])
def test_without_a_number_of_options_every_label_is_one(k_shot: tuple[int, int]) -> None:
    orders = set()
    for episode in episodes(20, n_way=None, k_shot=k_shot):
        assert sorted(option.name for option in episode.options) == [f"l{i:02}" for i in range(12)]
        assert len(episode.demos) == 12 * k_shot[0]
        orders.add(episode.options)
    assert len(orders) > 10


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_way": (1, 3)}, r"n_way: \[1, 3\] is no range of at least 2"),
        ({"n_way": (5, 3)}, r"n_way: \[5, 3\]"),
        ({"k_shot": (-1, 1)}, r"k_shot: \[-1, 1\]"),
        ({"queries": (0, 1)}, r"queries: \[0, 1\]"),
        ({"none_option": 1.5}, "none_option: 1.5 is no probability"),
        ({"out_of_scope": -0.1}, "out_of_scope: -0.1"),
        ({"hard_options": float("nan")}, "hard_options: nan"),
        ({"max_demos": -1}, "max_demos: -1"),
        ({"demo_split": "dev"}, r"task 'wide' has no split 'dev'; it has test, train"),
        ({"k_shot": (5, 5)}, r"'wide' has fewer than two labels with 5 demonstrations.*lower k_shot"),
        ({"task_weights": {"wied": 1.0}}, r"'wied'.*did you mean 'wide'"),
        ({"task_weights": {"wide": -1.0}}, r"weight of 'wide' is -1\.0"),
        ({"task_weights": {"wide": 0.0}}, "every task has weight 0"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        sampler(**config)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(TaskError, match="no task"):
        EpisodeSampler([], EpisodeConfig())
