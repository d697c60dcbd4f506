"""Reports: rows are checked, sorted and turned into tables; what stands in data stays text."""

from __future__ import annotations

import html
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from icl_markup.errors import ConfigError
from icl_markup.markdown import code, escape
from icl_markup.report import print_rows, write_report
from icl_markup.report_grid import by_setting, summarise
from icl_markup.report_rows import parse_row, read_rows
from icl_markup.results_page import sources
from icl_markup.tables import Block, number, tables, training_loss

WEIRD = ("bank|ing", "<b>news</b> & co", "$x^2$ or `$y`", "_under_ *star* [link](x) #1 ~~no~~ \\pipe")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def row(kind: str = "measure", **more: Any) -> dict[str, Any]:
    """A row with every common key; what it measures is in `more`."""
    common = {
        "kind": kind,
        "experiment": "intent",
        "task": "banking77",
        "backbone": "smollm2",
        "method": "tags",
        "template": "none",
        "n_way": 5,
        "k_shot": 1,
        "retrieval": None,
        "open_world": False,
        "seed": 0,
        "episodes": 200,
        "queries": 2000,
        "trainable_parameters": 0,
        "command": "icl-markup evaluate a.yaml",
        "commit": "0123456789ab",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": "a processor, 1 threads",
    }
    return common | more


def measure(value: float, metric: str = "accuracy", **more: Any) -> dict[str, Any]:
    same = {"accuracy": value} if metric == "accuracy" else {}
    return row(metric=metric, value=value, low=round(value - 0.03, 5), high=round(value + 0.03, 5), **same, **more)


def rows_of_everything(tasks: tuple[str, ...] = WEIRD, shots: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """Rows of every kind; every value is another one."""
    values = iter(random.Random(0).sample(range(40, 960), 920))
    rows = []

    def value() -> float:
        return next(values) / 1000

    for task in tasks:
        for k_shot in shots:
            here: dict[str, Any] = {"task": task, "k_shot": k_shot}
            rows.append(measure(0.2, method="chance", **here))
            for method, names, size in (
                ("plain", ["plain_01", "plain | 02", "$plain$"], 0),
                ("tags", ["seed 0", "seed 1"], 3840),
                ("lora", ["seed 0"], 100_000),
                ("embedding_knn", ["none"], 0),
            ):
                prompted = {"backbone": None} if method == "embedding_knn" else {}
                place = here | {"method": method, "trainable_parameters": size} | prompted
                rows += [measure(value(), template=name, **place) for name in names]
                if len(names) > 1:
                    spread = {"minimum": value(), "maximum": value(), "variants": len(names)}
                    rows.append(measure(value(), template="mean", **place, **spread))
                if method == "plain":
                    rows.append(measure(value(), template="best on validation", wording="plain_01", **place))
        place = {"task": task, "method": "tags", "template": "mean"}
        found = {"difference": -value() / 10, "low": -0.11, "high": 0.07, "test": "McNemar"}
        rows.append(row("comparison", against="plain (mean)", p_value=0.00001, p_adjusted=0.0321, **place, **found))
        rows += [row("spread", over=o, value=value() / 10, low=0.01, high=0.2, **place) for o in ("wording", "a|b")]
        rows.append(row("curve", **place, curve="risk_coverage", x=[0.1, 0.5, 1], y=[0, 0.2, value()]))
        for metric in ("in_scope_accuracy", "oos_recall", "auroc", "aupr", "fpr_at_95_tpr", "accuracy"):
            rows.append(measure(value(), metric, task=task, open_world=True, template="seed 0"))
        rows.append(row("curve", task=task, open_world=True, curve="roc", x=[0, 0.4, 1], y=[0, 0.8, 1]))
        rows.append(measure(1.25, "log_loss", task=task, open_world=True))
        rows.append(measure(value(), "expected_calibration_error", task=task, open_world=True))
        rows.append(measure(value(), "seconds | query", task=task, open_world=True))
    rows.append(row("confusion", n_way=None, labels=list(WEIRD[:3]), counts=[[5, 1, 0], [0, 7, 0], [2, 0, 9]]))
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def blocks(rows: list[dict[str, Any]]) -> dict[str, Block]:
    """The tables of rows of one setting, by title."""
    return {block.title: block for block in tables([parse_row(one, f"rows:{i}") for i, one in enumerate(rows)])}


def cells(block: Block) -> list[list[str]]:
    """A table's cells, heading first, rule left out; an escaped pipe is no border."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.body.splitlines()]
    return [[cell.strip() for cell in line] for line in [lines[0], *lines[2:]]]


def seen(markdown: str) -> str:
    """What a reader sees of escaped text."""
    return html.unescape(re.sub(r"\\(.)", r"\1", markdown.replace("<span>$</span>", "$")))


@pytest.mark.parametrize("text", [*WEIRD, "hint3_curekart", "a\nb", "*", "__init__"])
def test_text_is_shown_as_it_is(text: str) -> None:
    escaped = escape(text)
    assert seen(escaped) == text.replace("\n", " ")
    assert not re.search(r"(?<!\\)[|`*\[\]#~]", escaped)
    assert not re.search(r"<(?!/?span>)", escaped)
    assert not re.search(r"\$(?!</span>)", escaped)


def test_names_stay_readable_in_the_source() -> None:
    assert escape("hint3_curekart") == "hint3_curekart"


def test_code_keeps_backticks() -> None:
    assert code("a `b` ``c``") == "```" + " a `b` ``c`` " + "```"
    assert code("icl-markup evaluate x.yaml") == "`icl-markup evaluate x.yaml`"


def test_every_cell_is_the_row_of_its_task_and_method() -> None:
    rows = [measure(0.1 + i / 100 + m / 10, task=task, method=method) for i, task in enumerate(WEIRD)
            for m, method in enumerate(("plain", "tags", "setfit"))]  # fmt: skip
    del rows[4]  # the second task's tags
    table = cells(blocks(rows)["Accuracy"])
    assert table[0] == ["task", "plain", "tags", "setfit"]
    assert [seen(line[0]) for line in table[1:]] == [*sorted(WEIRD, key=str.casefold), "mean over tasks"]
    for one in rows:
        [line] = [line for line in table if seen(line[0]) == one["task"]]
        bounds = f"({100 * one['low']:.1f}–{100 * one['high']:.1f})"
        assert line[table[0].index(one["method"])].replace("*", "") == f"{100 * one['value']:.1f} {bounds}"
    [missing] = [line for line in table if seen(line[0]) == WEIRD[1]]
    assert missing[2] == ""
    # A mean over three tasks does not stand beside means over four.
    plain = sum(one["value"] for one in rows if one["method"] == "plain") / 4
    assert table[-1][1:3] == [f"{100 * plain:.1f}", ""]


def test_the_best_of_each_task_is_bold() -> None:
    values = ((0.5, "plain", "a"), (0.7, "tags", "a"), (0.9, "plain", "b"), (0.89999, "tags", "b"))
    table = cells(blocks([measure(value, method=m, task=task) for value, m, task in values])["Accuracy"])
    bold = [[cell.startswith("**") for cell in line[1:]] for line in table[1:]]
    assert bold == [[False, True], [True, True], [False, True]]


def test_a_wide_table_is_turned_on_its_side() -> None:
    rows = [measure(0.01 * m + 0.1 * t, task=f"task {t}", method=f"method {m}") for m in range(12) for t in range(2)]
    table = cells(blocks(rows)["Accuracy"])
    assert table[0] == ["method", "task 0", "task 1", "mean over tasks"]
    assert [line[0] for line in table[1:]] == [f"method {m}" for m in range(12)]
    assert table[4][1].startswith("3.0 ") and table[4][3] == "8.0"


def test_means_stand_before_their_variants_which_are_folded_away() -> None:
    here: dict[str, Any] = {"method": "plain"}
    rows = [measure(v, template=t, **here) for v, t in ((0.5, "w 10"), (0.6, "w 2"))]
    rows.append(measure(0.55, template="mean", minimum=0.5, maximum=0.6, variants=2, **here))
    rows.append(measure(0.59, template="best on validation", wording="w 2", **here))
    found = blocks(rows)
    assert cells(found["Accuracy"])[0] == ["task", "plain", "plain, best on validation"]
    assert "[50.0–60.0]" in cells(found["Accuracy"])[1][1]
    assert "plain over 2" in found["Accuracy"].note and "w 2" in found["Accuracy"].note
    variants = found["Every variant behind the means"]
    assert variants.folded and [line[0] for line in cells(variants)] == ["variant", "plain: w 2", "plain: w 10"]


def test_variants_that_are_no_arbitrary_choice_stand_apart() -> None:
    widths = [measure(0.5 + i / 10, template=f"width {i}", trainable_parameters=768 * i) for i in (1, 2)]
    mean = measure(0.65, template="mean", minimum=0.6, maximum=0.7)
    assert cells(blocks([*widths, mean])["Accuracy"])[0][1:] == ["tags, mean", "tags: width 1", "tags: width 2"]
    ablation = [one | {"experiment": "ablation", "trainable_parameters": 7} for one in (*widths, mean)]
    assert cells(blocks(ablation)["Accuracy"])[0][1:] == ["tags, mean", "tags: width 1", "tags: width 2"]


def test_episode_seeds_tell_repeated_rows_apart() -> None:
    shown, behind = summarise(parse_row(measure(0.5 + s / 10, seed=s), f"rows:{s}") for s in (0, 1))
    assert list(shown) == ["tags: episode seed 0", "tags: episode seed 1"] and not behind


def test_two_results_of_the_same_thing_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [measure(0.5), measure(0.6)])
    with pytest.raises(ConfigError, match=r"rows\.jsonl:\d: has the same .* as .*rows\.jsonl:\d, and another result"):
        write_report([path], tmp_path / "README.md", command="x")
    assert not (tmp_path / "README.md").exists()


def test_the_same_row_twice_is_one_row(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [measure(0.5), measure(0.5)])
    assert len(read_rows([path, path])) == 1


def test_methods_without_a_backbone_stand_beside_retrieved_prompts() -> None:
    retrieved = measure(0.7, n_way=None, retrieval="10 options")
    free = measure(0.8, n_way=None, method="embedding_knn", backbone=None)
    other = measure(0.6, n_way=5, method="embedding_knn", backbone=None)
    settings = by_setting([parse_row(one, "rows:1") for one in (retrieved, free, other)])
    assert [setting.label for setting in settings] == [
        "5 options, 1 demonstration a label",
        "all labels, 1 demonstration a label, retrieval: 10 options",
    ]
    assert [{one.value for one in rows} for rows in settings.values()] == [{0.6}, {0.7, 0.8}]


def test_backbones_are_told_apart_where_the_same_was_measured_on_both() -> None:
    rows = [parse_row(measure(v, backbone=b), f"rows:{b}") for v, b in ((0.5, "one"), (0.6, "two"))]
    assert [s.label.split(", ")[-1] for s in by_setting(rows)] == ["one", "two"]


def test_comparisons_and_spreads_are_in_points() -> None:
    found = {"difference": -0.0421, "low": -0.1, "high": 0.02, "p_value": 0.000001, "test": "paired permutation"}
    rows = [row("comparison", against="plain (mean)", p_adjusted=0.04, **found)]
    rows += [row("comparison", against="chance", p_adjusted=0.06, **found)]
    rows += [row("spread", over="wording", value=0.0312, low=0.02, high=0.04, method=m) for m in ("plain", "tags")]
    rows += [row("spread", over="demo order", value=0.01, low=0.005, high=0.02, vary="demo order")]
    tables_of = blocks(rows)
    first, second = cells(tables_of["Comparisons"])[1:]
    assert first == [
        "banking77",
        "tags − chance",
        "−4.2 (−10.0 to +2.0)",
        "&lt; 0.0001",
        "0.0600",
        "paired permutation",
    ]
    assert second[1] == "tags − plain (mean)" and second[4] == "**0.0400**"
    assert cells(tables_of["Spread"]) == [
        ["task", "spread over", "plain", "tags"],
        ["banking77", "wording", "3.1 (2.0–4.0)", "3.1 (2.0–4.0)"],
        ["banking77", "demo order", "", "1.0 (0.5–2.0)"],
    ]
    assert len(by_setting([parse_row(one, f"rows:{i}") for i, one in enumerate(rows)])) == 1


def test_out_of_scope_measures_have_a_column_each() -> None:
    rows = [measure(0.9, "auroc"), measure(0.3, "fpr_at_95_tpr"), measure(0.8, "auroc", method="embedding_knn")]
    assert cells(blocks(rows)["None of the above"]) == [
        ["task", "method", "AUROC", "FPR at 95 % TPR"],
        ["banking77", "tags", "90.0 (87.0–93.0)", "30.0 (27.0–33.0)"],
        ["banking77", "embedding_knn", "80.0 (77.0–83.0)", ""],
    ]


def test_an_infinite_log_loss_is_a_result() -> None:
    one = row(metric="log_loss", value=float("inf"), low=None, high=None)
    assert cells(blocks([one])["Probabilities"])[1][2] == "∞"


def test_sources_name_everything_once() -> None:
    rows = [measure(0.5), measure(0.6, seed=10, command="b `c`", seeds=[10, 2], commit=None, hardware="<gpu>")]
    assert sources([parse_row(one, "rows:1") for one in rows]) == (
        "<sub>Commands: `` b `c` ``, `icl-markup evaluate a.yaml`; seeds: 0, 2, 10; episodes: 200; queries: 2000; "
        "backbone: smollm2; commit: `0123456789ab`; hardware: &lt;gpu&gt;, a processor, 1 threads; "
        "versions: python 3.11.7, torch 2.13.0.</sub>"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "a row must be a JSON object, not list"),
        (json.dumps(row("mesure")), "unknown kind 'mesure'; did you mean 'measure'?"),
        (json.dumps(row(["measure"])), "unknown kind"),  # type: ignore[arg-type]
        (json.dumps(row()), "metric must be text"),
        (json.dumps(measure(0.5, command=None)), "command must be text, not None"),
        (json.dumps(measure(0.5) | {"value": "high"}), "value must be a finite number, not 'high'"),
        (json.dumps(measure(float("nan"))), "value must be a finite number, not nan"),
        (json.dumps(measure(0.5) | {"low": True}), "low must be a finite number, not True"),
        (json.dumps(measure(0.5, n_way="all")), "n_way must be int or null, not 'all'"),
        (json.dumps(row("comparison", against="plain", difference=0.1, p_value=0.1)), "p_adjusted must be a finite"),
        (json.dumps(row("curve", curve="roc", x=[0, 1], y=[0])), "x and y must be lists"),
        (json.dumps(row("confusion", labels=["a", "b"], counts=[[1, 2], [3]])), "counts must be square"),
        (json.dumps(row("confusion", labels=["a", "b"], counts=[[1, 2]])), "labels must be a list of texts"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(measure(0.5)) + "\n\n" + line + "\n")
    with pytest.raises(ConfigError) as caught:
        write_report([path], tmp_path / "README.md", command="x")
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)


def test_missing_files_and_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl: cannot be read"):
        write_report([tmp_path / "none.jsonl"], tmp_path / "README.md", command="x")
    with pytest.raises(ConfigError, match=r"empty\.jsonl: no rows to report"):
        write_report([written(tmp_path / "empty.jsonl", [])], tmp_path / "README.md", command="x")
    path = written(tmp_path / "rows.jsonl", [row(metric="training loss", first=3.0, last=1.0)])
    with pytest.raises(ConfigError, match=r"rows\.jsonl.* cannot be written"):
        write_report([path], path / "README.md", command="x")


def test_rows_without_the_newer_keys_are_read() -> None:
    old = {key: value for key, value in measure(0.5, experiment="unseen").items()
           if key not in ("kind", "metric", "value", "retrieval", "open_world", "queries")}  # fmt: skip
    parsed = parse_row(old, "rows:1")
    assert (parsed.kind, parsed.metric, parsed.value) == ("measure", "accuracy", 0.5)
    mechanics = read_rows([RESULTS / "mechanics.jsonl"])
    block = training_loss(mechanics)
    assert block is not None and len(cells(block)) == 1 + len(mechanics)
    assert {line[-1] for line in cells(block)[1:]} == {f"{one.data['last']:.2f}" for one in mechanics}


def test_values_of_every_measure_stand_in_some_table() -> None:
    rows = [parse_row(one, f"rows:{i}") for i, one in enumerate(rows_of_everything())]
    for setting, of_setting in by_setting(rows).items():
        page = "\n".join(block.body for block in tables(of_setting))
        for one in of_setting:
            if one.kind == "measure":
                assert number(one.value, one.metric) in page, (setting, one.data)


def test_rows_are_printed_for_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of_everything(("[b]task", "other")), measure(0.111, experiment="another", method="lost")]
    print_rows(rows, "intent")
    out = capsys.readouterr().out
    assert "[b]task" in out and "embedding_knn" in out and "lost" not in out
    assert out.count("5 options") == 3
    print_rows([{key: value for key, value in one.items() if key != "kind"} for one in rows[:3]], "intent")
    assert "plain_01" in capsys.readouterr().out


def test_printing_rows_does_not_load_matplotlib() -> None:
    for name in ("report", "report_grid", "report_rows", "tables", "markdown"):
        source = (RESULTS.parent / "icl_markup" / f"{name}.py").read_text()
        found = re.findall(r"^(?:from|import) (\S+)", source, re.MULTILINE)
        ours = {
            f"icl_markup.{module}" for module in ("errors", "files", "report_grid", "report_rows", "tables", "markdown")
        }
        assert {one for one in found if one.startswith(("icl_markup", "matplotlib", "PIL"))} <= ours
