"""What tag folders hold, seen from their backbone's vocabulary: as data, and as tables on a console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from icl_markup.backbone import Backbone
from icl_markup.errors import BackboneError, TagFileError
from icl_markup.tag_geometry import Agreement, Measure, agreements, nearest, norm_percentiles, similarities
from icl_markup.tagfile import TagFile, load_model, read_tags, serialised


@dataclass(frozen=True)
class Folders:
    """Tag folders of one backbone, beside its vocabulary.

    Attributes:
        files: the folders' contents.
        names: what to call them: the seeds of their warm-ups where those differ, else their paths.
        tokens: the vocabulary's ordinary tokens.
        ids: their ids, (vocabulary,).
        table: their embeddings, fp32, on the CPU, (vocabulary, embedding width).
    """

    files: list[TagFile]
    names: list[str]
    tokens: list[str]
    ids: Tensor
    table: Tensor

    @property
    def vectors(self) -> list[dict[str, Tensor]]:
        """Each folder's rows by tag name, in the order of its template."""
        return [{tag.name: file.vectors[tag.name] for tag in file.template.tags} for file in self.files]

    @property
    def mean(self) -> Tensor:
        """The vocabulary's mean embedding, (embedding width,)."""
        return self.table.mean(0)


def load_folders(paths: Sequence[str | Path], backbone: Backbone | None = None) -> Folders:
    """Read tag folders and load their backbone once.

    Raises:
        TagFileError: a folder is missing or damaged, or they are of different backbones.
        BackboneError: the backbone cannot be loaded.
    """
    files = [read_tags(path) for path in paths]
    for file in files:
        backbone = load_model(file, backbone).backbone
    assert backbone is not None
    with torch.no_grad():
        table = backbone.embedding(backbone.vocabulary).float().cpu()
    tokens = [str(token) for token in backbone.tokenizer.convert_ids_to_tokens(backbone.vocabulary.tolist())]
    return Folders(files, names_of(files), tokens, backbone.vocabulary.cpu(), table)


def names_of(files: Sequence[TagFile]) -> list[str]:
    """Return what to call tag folders: the seeds of their warm-ups where they differ, else their paths."""
    seeds = [file.training.get("seed") for file in files]
    if len(set(seeds)) == len(files) and None not in seeds:
        return [f"seed {seed}" for seed in seeds]
    return [file.label for file in files]


def row_names(vectors: Mapping[str, Tensor]) -> list[str]:
    """Return a name for each soft token, in order: the tag's, numbered where it has several."""
    return [
        name if len(rows) == 1 else f"{name} {number}"
        for name, rows in vectors.items()
        for number in range(1, len(rows) + 1)
    ]


def report(found: Folders, count: int = 5) -> dict[str, Any]:
    """Return everything that is known of tags, as JSON-able data.

    Args:
        found: the folders.
        count: how many nearest tokens of the vocabulary to name.

    Returns:
        ``vocabulary``: its size and the mean and standard deviation of its norms; ``folders``: of each its path,
        backbone, template and training, ``soft_tokens`` (tag, number, norm, the percentage of the vocabulary that is
        shorter, the nearest tokens by cosine and by dot product) and ``similarity`` (names and a matrix); ``seeds``:
        of every two folders how alike each tag is, and how alike different tags are.
    """
    norms = found.table.norm(dim=1)
    return {
        "vocabulary": {"tokens": len(norms), "norm_mean": norms.mean().item(), "norm_std": norms.std().item()},
        "folders": [_folder(found, place, count) for place in range(len(found.files))],
        "seeds": [
            {"folders": [found.names[i], found.names[j]], **_agreement(one)}
            for (i, j), one in agreements(found.vectors, found.mean).items()
        ],
    }


def _folder(found: Folders, place: int, count: int) -> dict[str, Any]:
    file, vectors = found.files[place], found.vectors[place]
    rows = torch.cat(list(vectors.values()))
    shorter = norm_percentiles(rows, found.table).tolist()
    near = {measure: _nearest(found, rows, count, measure) for measure in ("cosine", "dot")}
    places = [(name, number) for name, of in vectors.items() for number in range(1, len(of) + 1)]
    return {
        "name": found.names[place],
        "folder": file.label,
        "backbone": file.backbone["name"],
        "template": file.template.name,
        "training": file.training,
        "soft_tokens": [
            {
                "tag": name,
                "number": number,
                "norm": rows[i].norm().item(),
                "percent_of_vocabulary_shorter": shorter[i],
                **{f"nearest_by_{measure}": of[i] for measure, of in near.items()},
            }
            for i, (name, number) in enumerate(places)
        ],
        "similarity": {"names": row_names(vectors), "matrix": similarities(rows, rows, found.mean).tolist()},
    }


def _nearest(found: Folders, rows: Tensor, count: int, measure: Measure) -> list[list[dict[str, Any]]]:
    values, indices = nearest(rows, found.table, count, measure)
    return [
        [{"token": found.tokens[i], "id": int(found.ids[i]), "value": v} for v, i in zip(of, at, strict=True)]
        for of, at in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _agreement(one: Agreement) -> dict[str, Any]:
    others = None if one.others != one.others else one.others  # JSON has no nan
    return {"tags": one.tags, "same_tag": one.same if one.tags else None, "other_tags": others}


def print_tags(paths: Sequence[str | Path], count: int = 5) -> Folders | None:
    """Print what tag folders hold; without their backbone, all but what its vocabulary is needed for.

    Returns:
        The folders beside their backbone's vocabulary, or None where that is not here.

    Raises:
        TagFileError: a folder is missing or damaged, or they are of different backbones.
    """
    console = Console(width=None if Console().is_terminal else 110)
    files = [read_tags(path) for path in paths]
    try:
        found = load_folders(paths)
    except BackboneError as error:
        for file in files:
            _print_head(console, file)
            _print_norms(console, file)
        console.print(f"without its backbone, nearest tokens cannot be shown: {escape(str(error))}")
        return None
    data = report(found, count)
    for file, vectors, one in zip(files, found.vectors, data["folders"], strict=True):
        _print_head(console, file)
        _print_soft_tokens(console, one, row_names(vectors))
        _print_similarity(console, vectors, found.mean)
    vocabulary = data["vocabulary"]
    console.print(f"norm of the vocabulary's embeddings: {vocabulary['norm_mean']:.3f} ± {vocabulary['norm_std']:.3f}")
    if data["seeds"]:
        _print_seeds(console, data["seeds"])
    return found


def _print_head(console: Console, file: TagFile) -> None:
    size = len(serialised(file.vectors))
    parameters = sum(v.numel() for v in file.vectors.values())
    console.print(escape(f"{file.label}: {len(file.vectors)} tags, {parameters:,} parameters, {size:,} bytes"))
    form = str(file.backbone.get("quantisation", "none"))
    described = file.backbone["kind"] if form == "none" else f"{file.backbone['kind']}, {form}"
    console.print(escape(f"backbone: {file.backbone['name']} ({described}), template {file.template.name}"))
    if file.chat is not None:
        console.print(escape(f"in the model's chat template; system message: {file.chat.system or 'none'}"))
    for key, value in file.training.items():
        console.print(escape(f"{key}: {value}"))
    if file.ancestry is not None:
        for parent in file.ancestry.parents:
            console.print(escape(f"{file.ancestry.operation} of {parent.name}: {', '.join(parent.tags)}"))


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading)
    return table


def _print_norms(console: Console, file: TagFile) -> None:
    table = _table("tag", "soft token", "norm")
    for name, rows in file.vectors.items():
        for number, row in enumerate(rows, start=1):
            table.add_row(escape(name), str(number), f"{row.norm():.3f}")
    console.print(table)


def _print_soft_tokens(console: Console, folder: dict[str, Any], names: Sequence[str]) -> None:
    table = _table("soft token", "norm", "longer than", "nearest tokens by cosine", "by dot product")
    for column in table.columns[:3]:
        column.no_wrap = True
    for name, one in zip(names, folder["soft_tokens"], strict=True):
        by_cosine = ", ".join(f"{near['token']} {near['value']:.2f}" for near in one["nearest_by_cosine"])
        by_dot = ", ".join(near["token"] for near in one["nearest_by_dot"])
        shorter = f"{one['percent_of_vocabulary_shorter']:.0f} %"
        table.add_row(escape(name), f"{one['norm']:.3f}", shorter, escape(by_cosine), escape(by_dot))
    console.print(table)


def _print_similarity(console: Console, vectors: Mapping[str, Tensor], mean: Tensor) -> None:
    names = list(vectors)
    if len(names) < 2:
        return
    centres = torch.stack([rows.mean(0) for rows in vectors.values()])
    table = _table("similarity of tags", *map(escape, names))
    for name, row in zip(names, similarities(centres, centres, mean).tolist(), strict=True):
        table.add_row(escape(name), *(f"{value:.2f}" for value in row))
    console.print(table)


def _print_seeds(console: Console, seeds: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for one in seeds for name in one["tags"]))
    pairs = [" – ".join(one["folders"]) for one in seeds]
    table = _table("similarity of warm-ups", *map(escape, pairs))
    for name in names:
        values = [one["tags"].get(name) for one in seeds]
        table.add_row(escape(name), *("" if v is None else f"{v:.2f}" for v in values))
    table.add_section()
    for name, key in (("the same tag, mean", "same_tag"), ("different tags, mean", "other_tags")):
        table.add_row(name, *("" if one[key] is None else f"{one[key]:.2f}" for one in seeds))
    console.print(table)


def drawable(found: Folders | None) -> Folders:
    """Return folders that can be drawn.

    Raises:
        TagFileError: their backbone is not here, or one holds fewer than three soft tokens in all.
    """
    if found is None:
        raise TagFileError("a picture shows tags among the vocabulary of their backbone, which cannot be loaded")
    for file in found.files:
        if sum(map(len, file.vectors.values())) < 3:
            raise TagFileError(f"{file.label}: a picture needs three soft tokens or more")
    return found
