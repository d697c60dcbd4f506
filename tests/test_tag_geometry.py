"""Where tags lie among the vocabulary: a copied row is found again, and what is drawn is what was computed."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from icl_markup.cli import main
from icl_markup.errors import TagFileError
from icl_markup.model import MarkupModel
from icl_markup.plot_style import to_png
from icl_markup.tag_geometry import agreement, agreements, main_plane, nearest, norm_percentiles, sample, similarities
from icl_markup.tag_plots import caption, picture
from icl_markup.tag_report import drawable, load_folders, print_tags, report
from icl_markup.template import Template
from tests.conftest import tiny_backbone

TABLE = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) + 0.5


def folders(tmp_path: Path, seeds: int = 3) -> list[str]:
    backbone = tiny_backbone("bert")
    backbone.name = str(tmp_path / "model")
    backbone.model.save_pretrained(backbone.name)
    backbone.tokenizer.save_pretrained(backbone.name)
    paths = [str(tmp_path / f"tags{seed}") for seed in range(seeds)]
    for seed, path in enumerate(paths):
        MarkupModel(backbone, initialisation="vocabulary", seed=seed).save(path, {"seed": seed})
    return paths


@pytest.mark.parametrize("measure", ["cosine", "dot"])
def test_the_nearest_of_a_row_of_the_table_is_that_row(measure: Any) -> None:
    table = torch.nn.functional.normalize(TABLE, dim=1) if measure == "dot" else TABLE
    values, indices = nearest(3 * table[[7, 250]], table, 4, measure)
    assert indices[:, 0].tolist() == [7, 250]
    assert values[:, 0].tolist() == pytest.approx([1, 1] if measure == "cosine" else [3, 3], abs=1e-5)
    assert (values[:, 1:] <= values[:, :-1]).all() and values.shape == indices.shape == (2, 4)
    assert nearest(table[:1], table, 10**6, measure)[1].shape == (1, 300), "no more than there are"
    twice = torch.cat([table, table])
    assert nearest(table[[7]], twice, 2, measure)[1].tolist() == [[7, 307]], "the first in the table first"


def test_the_dot_product_is_that_of_whole_rows() -> None:
    values, indices = nearest(TABLE[:5], TABLE, 300, "dot")
    assert torch.allclose(values, (TABLE[:5] @ TABLE.T).gather(1, indices), atol=1e-5)


def test_percentiles_of_norms_are_shares_of_shorter_rows() -> None:
    norms = TABLE.norm(dim=1)
    found = norm_percentiles(TABLE, TABLE)
    assert found.tolist() == pytest.approx([100 * (norms < norm).double().mean().item() for norm in norms])
    assert norm_percentiles(torch.zeros(1, 16), TABLE).item() == 0
    assert norm_percentiles(1e6 * TABLE[:1], TABLE).item() == 100


def test_similarities_leave_the_common_part_out() -> None:
    mean = TABLE.mean(0)
    found = similarities(TABLE, TABLE, mean)
    assert torch.allclose(found.diagonal(), torch.ones(300), atol=1e-5) and torch.equal(found, found.T)
    apart = similarities(TABLE[:150] + 100, TABLE[150:] + 100, mean + 100)
    assert torch.allclose(apart, found[:150, 150:], atol=1e-3)


def test_warm_ups_are_compared_tag_by_tag() -> None:
    first = {"<a>": TABLE[:2], "<b>": TABLE[2:4], "<only here>": TABLE[4:5]}
    same = agreement(first, {"<b>": TABLE[2:4], "<a>": TABLE[:1]}, TABLE.mean(0))
    assert same.tags == pytest.approx({"<a>": 1, "<b>": 1}, abs=1e-5) and same.same == pytest.approx(1, abs=1e-5)
    crossed = similarities(TABLE[:2], TABLE[2:4], TABLE.mean(0)).mean().item()
    assert agreement(first, first | {"<only here>": TABLE[4:5]}, TABLE.mean(0)).others != same.others
    both = {name: first[name] for name in ("<a>", "<b>")}
    assert agreement(both, both, TABLE.mean(0)).others == pytest.approx(crossed, abs=1e-5)
    nothing = agreement(first, {"<c>": TABLE[:1]}, TABLE.mean(0))
    assert nothing.tags == {} and np.isnan(nothing.same) and np.isnan(nothing.others)
    assert list(agreements([first] * 3, TABLE.mean(0))) == [(0, 1), (0, 2), (1, 2)]


def test_the_plane_is_that_of_the_largest_variance_and_the_same_each_time() -> None:
    flat = torch.zeros(100, 8)
    flat[:, 2], flat[:, 5] = 5 * TABLE[:100, 0], TABLE[:100, 1]
    plane = main_plane(flat + 3)
    assert plane.explained.sum() == pytest.approx(1) and plane.explained[0] > 0.9
    assert np.abs(plane.axes).argmax(1).tolist() == [2, 5] and (plane.axes.max(1) > 0.9).all(), "signs are settled"
    assert plane(flat + 3).mean(0) == pytest.approx([0, 0], abs=1e-6)
    back = plane.origin + plane(flat + 3) @ plane.axes
    assert back == pytest.approx((flat + 3).numpy(), abs=1e-4)
    again, wide = main_plane(TABLE), main_plane(TABLE.clone())
    assert np.array_equal(again.axes, wide.axes)
    variance = again(TABLE).var(0, ddof=1) / TABLE.double().numpy().var(0, ddof=1).sum()
    assert variance == pytest.approx(again.explained, rel=1e-6)


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    chosen = sample(TABLE, 50)
    assert torch.equal(chosen, sample(TABLE, 50)) and len(chosen) == 50 and sample(TABLE, 300) is TABLE
    places = [int((row == TABLE).all(1).nonzero()) for row in chosen]
    assert places == sorted(set(places))


def test_a_report_finds_the_tokens_that_tags_were_copied_from(tmp_path: Path) -> None:
    paths = folders(tmp_path)
    found = load_folders(paths)
    data = json.loads(json.dumps(report(found, 3), allow_nan=False))
    tags = [tag.name for tag in Template.load("markup_letters").tags for _ in range(tag.width)]
    for folder in data["folders"]:
        assert [one["tag"] for one in folder["soft_tokens"]] == tags, "in the template's order"
        for one in folder["soft_tokens"]:
            best = one["nearest_by_cosine"][0]
            assert best["value"] == pytest.approx(1, abs=1e-5) and found.tokens[found.ids.tolist().index(best["id"])]
            assert one["norm"] == pytest.approx(found.table[found.ids == best["id"]].norm().item(), rel=1e-5)
            assert len(one["nearest_by_dot"]) == 3
    assert data["seeds"][0]["folders"] == ["seed 0", "seed 1"] and len(data["seeds"]) == 3
    assert set(data["seeds"][0]["tags"]) == set(tags)


def test_the_picture_shows_every_tag_and_seed_and_is_the_same_bytes_twice(tmp_path: Path) -> None:
    found = load_folders(folders(tmp_path))
    for shown in (found, replace(found, files=found.files[:1], names=found.names[:1])):
        figure = picture(shown)
        content = to_png(figure, few_colours=False)
        if shown is not found:
            assert content == to_png(picture(shown), few_colours=False)
        assert min(Image.open(BytesIO(content)).size) > 800
        texts = [text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)]
        for tag in Template.load("markup_letters").tags:
            assert texts.count(tag.name) >= 4, "in two planes, beside its norm, and in the legend"
            assert tag.name in caption(shown)
        assert ("seed 2" in texts) == (len(shown.files) == 3)
        _assert_no_overlap(figure)


def _assert_no_overlap(figure: Any) -> None:
    """Names of tags beside a plane must not lie on each other."""
    renderer = figure.canvas.get_renderer()
    for axis in figure.axes[:2]:
        boxes = sorted((t.get_window_extent(renderer) for t in axis.texts), key=lambda box: box.y0)
        assert len(boxes) == 5
        for below, above in pairwise(boxes):
            assert above.y0 >= below.y1 - 2


def test_the_command_prints_draws_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = folders(tmp_path, 2)
    place = tmp_path / "tags.png"
    assert main(["tags", *paths, "--picture", str(place)]) == 0
    shown = capsys.readouterr().out
    assert "nearest tokens by cosine" in shown and "similarity of warm-ups" in shown and "different tags" in shown
    assert "Euclidean" not in shown and "picture: " in shown
    assert place.read_bytes().startswith(b"\x89PNG")
    assert main(["tags", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"]["tokens"] > 100
    for arguments, message in [
        ([*paths, "--nearest", "0"], "--nearest 0"),
        ([*paths, "--picture", str(tmp_path / "tags.jpg")], "end in .png"),
        ([*paths, "--picture", str(tmp_path / "nowhere" / "tags.png")], "there is no folder"),
        ([*paths, str(tmp_path)], "is this a tag folder"),
    ]:
        assert main(["tags", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_without_its_backbone_a_folder_is_printed_but_not_drawn(tmp_path: Path, capsys: Any) -> None:
    backbone = tiny_backbone("bert")
    backbone.name = "nowhere/at-all"
    MarkupModel(backbone).save(tmp_path / "tags")
    assert print_tags([tmp_path / "tags"]) is None
    shown = capsys.readouterr().out
    assert "<classification>" in shown and "nearest tokens cannot be shown" in shown
    with pytest.raises(TagFileError, match="cannot be loaded"):
        drawable(None)


def test_folders_of_different_backbones_are_refused(tmp_path: Path) -> None:
    [path] = folders(tmp_path, 1)
    other = tiny_backbone("roberta")
    MarkupModel(other).save(tmp_path / "other")
    with pytest.raises(TagFileError, match="made for"):
        load_folders([path, tmp_path / "other"])
