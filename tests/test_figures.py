"""Figures and the page that shows them: as many as there are rows for, the same bytes for the same rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from icl_markup.figures import Drawing, drawings, drawings_over_settings, slug
from icl_markup.plot_style import clean, looks, panels, percent_limits, spread_out, to_png
from icl_markup.report import write_report
from icl_markup.report_grid import by_setting
from icl_markup.report_rows import parse_row
from tests.test_report import WEIRD, measure, row, rows_of_everything, written


def figures_of(rows: Sequence[dict[str, Any]]) -> list[Drawing]:
    settings = by_setting([parse_row(one, f"rows:{i}") for i, one in enumerate(rows)])
    found = [one for setting, of in settings.items() for one in drawings("intent", setting, of)]
    return [*found, *drawings_over_settings("intent", settings)]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]


def image_of(content: bytes) -> Image.Image:
    return Image.open(BytesIO(content)).convert("RGB")


def kinds(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [drawing.name.rsplit("label-")[-1].removeprefix("intent-") for drawing in figures_of(rows)]


def test_a_figure_is_made_where_its_rows_are() -> None:
    here: dict[str, Any] = {"template": "mean"}
    wordings = [measure(0.5 + i / 10, method="plain", template=f"wording {i}") for i in (1, 2)]
    mean = measure(0.65, method="plain", minimum=0.6, maximum=0.7, variants=2, **here)
    trained = [measure(0.7, method=m, trainable_parameters=size) for m, size in (("tags", 10), ("lora", 1000))]
    chance = measure(0.2, method="chance")
    assert kinds([chance]) == []
    assert kinds([chance, trained[0]]) == ["accuracy"]
    assert kinds([*wordings, mean]) == ["accuracy", "wordings"]
    assert kinds(trained) == ["accuracy", "parameters"]
    assert kinds([row("spread", over="wording", value=0.1, low=0.0, high=0.2)]) == ["spread"]
    assert kinds([row("curve", curve="roc", x=[0, 1], y=[0, 1])]) == ["roc"]
    assert kinds([row("confusion", labels=["a"], counts=[[1]])]) == ["confusion-banking77-tags"]
    assert kinds([measure(0.1, k_shot=0), measure(0.2)])[2:] == ["5-options-shots"]
    assert kinds([measure(0.9, "auroc")]) == []


def test_every_figure_draws_and_shows_its_title_and_text_as_it_is() -> None:
    found = figures_of(rows_of_everything(WEIRD[1:3]))
    assert len({drawing.name for drawing in found}) == len(found) == 12
    for drawing in found:
        figure = drawing.draw()
        content = to_png(figure)
        assert image_of(content).size[0] > 300 and len(content) > 2000
        shown = texts(figure)
        assert re.sub(r"\s+", " ", shown[0] if "intent:" in shown[0] else figure.get_suptitle()) == drawing.title
        assert not any(text.get_parse_math() for text in figure.findobj(Text) if isinstance(text, Text))
        assert drawing.rows
        if drawing.name.endswith("wordings"):
            assert set(WEIRD[1:3]) <= set(shown)
        if drawing.name.endswith("label-accuracy"):
            assert {"chance", "embedding_knn", WEIRD[2]} <= set(shown)


def test_an_accuracy_is_drawn_at_its_value() -> None:
    figure = figures_of([measure(0.731), measure(0.25, method="chance")])[0].draw()
    [axis] = figure.axes
    dots = [line.get_xydata() for line in axis.lines if line.get_marker() == "o" and line.get_xydata().size]
    assert np.allclose(dots[0], [[73.1, 0]])
    interval = next(line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_linestyle() == "-")
    assert np.allclose(interval.get_xdata(), [70.1, 76.1])
    assert any(np.allclose(line.get_xdata(), 25) for line in axis.lines if line.get_linestyle() == "--")
    low, high = axis.get_xlim()
    assert low < 25 and high > 76.1


def test_the_report_is_the_same_bytes_in_any_order_and_touches_no_global_state(tmp_path: Path) -> None:
    settings = dict(mpl.rcParams)
    rows = rows_of_everything(WEIRD[:1], shots=(1,))
    pages = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        random.Random(name).shuffle(rows)
        half = len(rows) // 2
        paths = [written(folder / "a.jsonl", rows[:half]), written(folder / "b.jsonl", rows[half:])]
        command = "icl-markup report results/*.jsonl"
        assert write_report(paths, folder / "README.md", command=command) == folder / "README.md"
        pages.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.[mp]*")})
    assert pages[0] == pages[1]
    assert dict(mpl.rcParams) == settings
    page = pages[0].pop(Path("README.md")).decode()
    assert page.startswith("# Results\n\nGenerated by `icl-markup report results/*.jsonl`")
    links = [Path(unquote(link)) for link in re.findall(r"!\[[^\n]*\]\(([^()\s]+)\)", page)]
    assert sorted(links) == sorted(pages[0]) and len(links) == 8
    assert page.count("<sub>Command: `icl-markup evaluate a.yaml`") == len(links) + page.count("\n| :---")
    assert not list((tmp_path / "first").rglob("*.part"))


def test_figures_go_where_they_are_asked_to(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [measure(0.5)])
    write_report([path], tmp_path / "pages" / "page.md", figures=tmp_path / "fig ures", command="x")
    [image] = (tmp_path / "fig ures").iterdir()
    assert f"](../fig%20ures/{image.name})" in (tmp_path / "pages" / "page.md").read_text()


def test_unknown_experiments_and_equal_names_of_files(tmp_path: Path) -> None:
    rows = [measure(0.5, experiment=name) for name in ("my | own", "my < own", "news")]
    path = written(tmp_path / "rows.jsonl", rows)
    page = write_report([path], tmp_path / "README.md", command="x").read_text()
    assert page.index("## news") < page.index("## my &lt; own") < page.index("## my \\| own")
    assert len(list((tmp_path / "figures").iterdir())) == 3
    for image in (tmp_path / "figures").iterdir():
        assert f"](figures/{image.name})" in page


def test_the_largest_confusions_are_kept_when_there_are_too_many_labels() -> None:
    size = 70
    counts = np.eye(size, dtype=int) * 9
    counts[3, 64] = 5
    [drawing] = figures_of([row("confusion", labels=[f"label {i}" for i in range(size)], counts=counts.tolist())])
    assert "10 labels" in drawing.caption and drawing.folded
    shown = texts(drawing.draw())
    assert "label 3" in shown and "label 64" in shown and "label 69" not in shown and "5" in shown


def test_colours_survive_the_small_file_and_methods_differ() -> None:
    labels = ["plain", "plain + batch calibration", "tags", "tags_untrained", "lora", "prompt_tuning", "setfit"]
    rows = [measure(0.3 + 0.05 * i, method=label) for i, label in enumerate(labels)]
    image = np.asarray(image_of(to_png(figures_of(rows)[0].draw()))).reshape(-1, 3)
    style = looks(labels)
    assert len({(of.colour, of.marker) for of in style.values()}) == len(labels)
    for label in labels:
        colour = [int(style[label].colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (image == colour).all(axis=1).any(), label


def test_text_the_font_lacks_is_a_box_and_long_text_is_shortened() -> None:
    assert clean("換 a\n b") == "□ a b"
    assert len(clean("x" * 100, 20)) == 20 and clean("start" + "x" * 100 + "end", 20).startswith("start")


@pytest.mark.parametrize("wanted", [[1.0, 1.0, 1.0], [9.9, 0.0, 5.0, 5.1], [10.0, 10.0], [3.0]])
def test_names_are_spread_out_in_order(wanted: list[float]) -> None:
    places = spread_out(wanted, 1.0, 0.0, 10.0)
    ranked = sorted(places)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(ranked))
    assert min(places) >= 0 and max(places) <= 10
    order: Callable[[list[float]], list[int]] = lambda of: sorted(range(len(of)), key=of.__getitem__)  # noqa: E731
    assert order(places) == order(wanted)


def test_limits_hold_all_values() -> None:
    assert percent_limits([50.0, 60.0])[0] < 50 and percent_limits([0.0, 100.0]) == (-1.5, 101.5)


def test_panels_are_as_many_as_names() -> None:
    figure, axes = panels("a title", [f"task {i}" for i in range(5)], (1, 1), 3)
    assert len(axes) == len(figure.axes) == 5


def test_slugs_are_safe_names() -> None:
    for text in (*WEIRD, "../../etc", "Ünï cødé", "", "换"):
        assert re.fullmatch(r"[a-z0-9-]{1,50}", slug(text))


def test_the_page_of_the_rows_in_the_repository(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "results" / "mechanics.jsonl"
    page = write_report([source], tmp_path / "README.md", command="icl-markup report").read_text()
    for line in source.read_text().splitlines():
        assert f"{json.loads(line)['last']:.2f}" in page
    assert not (tmp_path / "figures").exists()
