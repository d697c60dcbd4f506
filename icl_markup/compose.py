"""Makes tags of tags: several files in one model, parts of them, other names, averages of warm-ups.

Every function takes and returns `TagFile`s and changes none; `icl_markup.tagfile.write_tags` keeps a result. What a
result was made of stands in its ancestry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from icl_markup.ancestry import Ancestry, Parent
from icl_markup.answers import Answers
from icl_markup.errors import TagFileError, TemplateError, nearest
from icl_markup.tagfile import TagFile, checksum
from icl_markup.template import Template

Operation = Literal["merge", "average", "interpolate"]


def select(tags: TagFile, names: Iterable[str]) -> TagFile:
    """Return some of the tags; the others are taken out of the template.

    Raises:
        TagFileError: there is no such tag, or none is named.
    """
    wanted = list(names)
    _check_known(tags, wanted, "select")
    if not wanted:
        raise TagFileError(f"{tags.label}: select names no tag; it has {', '.join(tags.vectors)}")
    template = tags.template
    for name in tags.vectors:
        if name not in wanted:
            template = template.without_tag(name)
    vectors = {name: rows for name, rows in tags.vectors.items() if name in wanted}
    parent = tags.as_parent({name: name for name in vectors})
    return _made(tags, vectors, template, Ancestry("select", (parent,)))


def rename(tags: TagFile, names: Mapping[str, str]) -> TagFile:
    """Return the tags under other names, in the template too.

    Args:
        tags: the tags.
        names: new names by old ones, all given at the same time: two tags can swap theirs.

    Raises:
        TagFileError: there is no such tag, a new name is none, or it is another tag's.
    """
    _check_known(tags, names, "rename")
    now = [names.get(name, name) for name in tags.vectors]
    twice = next((name for name in now if now.count(name) > 1), None)
    if twice:
        raise TagFileError(f"{tags.label}: rename gives two tags the name {twice}; choose another")
    try:
        template = tags.template.renamed(names)
    except TemplateError as error:
        raise TagFileError(f"{tags.label}: rename: {error}") from error
    vectors = dict(zip(now, tags.vectors.values(), strict=True))
    parent = tags.as_parent(dict(zip(now, tags.vectors, strict=True)))
    return _made(tags, vectors, template, Ancestry("rename", (parent,)))


def merge(
    files: Sequence[TagFile],
    template: Template | str | Path | None = None,
    answers: Answers | None = None,
    templates: Sequence[Template] = (),
) -> TagFile:
    """Return the tags of several files in one.

    A tag that several files hold with the same values, as where one was warmed up on top of another, is one tag.

    Args:
        files: what to merge, at least one.
        template: the template of the result, whose tags are taken from the files, at the widths that they have there;
            others are left out. None: the template of the files that has exactly their tags.
        answers: symbols or names; None: what the files say, if they agree.
        templates: more templates, besides those of the files, to look through for the one that fits.

    Raises:
        TagFileError: files are for different backbones or answers, give a tag different values, lack a tag of the
            template or have none of its tags; or no template fits and none is given.
    """
    given = None if template is None else _loaded(template)
    vectors, parents = gathered(files, None if given is None else [tag.name for tag in given.tags])
    chosen = given or _only_template([*(file.template for file in files), *templates], vectors)
    return _made(files[0], vectors, chosen, Ancestry("merge", tuple(parents)), files, answers)


def average(
    files: Sequence[TagFile],
    weights: Sequence[float] | None = None,
    template: Template | str | Path | None = None,
    answers: Answers | None = None,
) -> TagFile:
    """Return the weighted mean of several warm-ups, tag by tag.

    Args:
        files: warm-ups of the same tags at the same widths, at least one.
        weights: one a file, at least 0, divided by their sum; None: all the same.
        template: as in `merge`; None: theirs, if it is one.
        answers: as in `merge`.

    Raises:
        TagFileError: as in `merge`, tags or widths differ, or the weights are not as above.
    """
    given = [1.0] * len(files) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(files):
        raise TagFileError(f"average: {len(given)} weights for {len(files)} tag files; give one a file")
    if any(not math.isfinite(w) or w < 0 for w in given) or (files and not 0 < sum(given) < math.inf):
        raise TagFileError(f"average: weights {given}: give numbers of at least 0, and one above it")
    return _mixed("average", files, [weight / sum(given) for weight in given], template, answers)


def interpolate(
    a: TagFile,
    b: TagFile,
    t: float,
    template: Template | str | Path | None = None,
    answers: Answers | None = None,
) -> TagFile:
    """Return ``(1 - t) * a + t * b``, tag by tag; beyond 0 and 1 that goes on along the line.

    Raises:
        TagFileError: as in `average`, or `t` is not finite.
    """
    if not math.isfinite(t):
        raise TagFileError(f"interpolate: t is {t}; give a finite number, 0 for the first file and 1 for the second")
    return _mixed("interpolate", [a, b], [1.0 - t, float(t)], template, answers)


def gathered(files: Sequence[TagFile], names: Iterable[str] | None = None) -> tuple[dict[str, Tensor], list[Parent]]:
    """Return the vectors of tags of several files, and the parents that they come from.

    Args:
        files: the files.
        names: the tags that are wanted, as far as a file has them; None: all.

    Raises:
        TagFileError: files are for different backbones, give a tag different values, or hold nothing that is wanted.
    """
    _check_backbones(files)
    wanted = None if names is None else set(names)
    vectors: dict[str, Tensor] = {}
    source: dict[str, TagFile] = {}
    parents = []
    for file in files:
        mine = {name: rows for name, rows in file.vectors.items() if wanted is None or name in wanted}
        if not mine:
            raise TagFileError(
                f"{file.label}: has none of the tags {', '.join(sorted(wanted or ()))} of the template; "
                f"it has {', '.join(file.vectors)}: rename them, or leave it out"
            )
        for name, rows in mine.items():
            if name in vectors and not torch.equal(vectors[name], rows):
                raise TagFileError(
                    f"tag {name} is in {source[name].label} and, with other values, in {file.label}: "
                    "rename one of them, or take it from one only"
                )
        new = {name: rows for name, rows in mine.items() if name not in vectors}
        source |= dict.fromkeys(new, file)
        vectors |= new
        if new:
            parents.append(file.as_parent({name: name for name in new}))
    return vectors, parents


def widened(template: Template, vectors: Mapping[str, Tensor]) -> Template:
    """Return the template with its tags as wide as their vectors are."""
    other = {
        tag.name: len(vectors[tag.name])
        for tag in template.tags
        if tag.name in vectors and len(vectors[tag.name]) != tag.width
    }
    return template.with_width(other) if other else template


def _mixed(
    operation: Operation,
    files: Sequence[TagFile],
    weights: Sequence[float],
    template: Template | str | Path | None,
    answers: Answers | None,
) -> TagFile:
    _check_backbones(files)
    first = files[0]
    for other in files[1:]:
        for has, lacks in ((first, other), (other, first)):
            for name in has.vectors:
                if name not in lacks.vectors:
                    raise TagFileError(
                        f"{operation}: {lacks.label} lacks tag {name}, which {has.label} has; take the tags that both "
                        "have, or rename"
                    )
        for name, rows in first.vectors.items():
            if len(rows) != len(other.vectors[name]):
                raise TagFileError(
                    f"{operation}: tag {name} has {len(rows)} soft tokens in {first.label} and "
                    f"{len(other.vectors[name])} in {other.label}; only tags of one width can be mixed"
                )
    # In double precision, and without files of weight 0: an end of an interpolation is that file to the bit.
    parts = [(file, weight) for file, weight in zip(files, weights, strict=True) if weight]
    vectors = {
        name: torch.stack([weight * file.vectors[name].double() for file, weight in parts]).sum(0).float()
        for name in first.vectors
    }
    for name, rows in vectors.items():
        if not rows.isfinite().all():
            raise TagFileError(f"{operation}: tag {name} gets values that are not finite; take smaller weights")
    given = None if template is None else _loaded(template)
    chosen = _only_template([file.template for file in files], vectors) if given is None else given
    if given is not None:
        vectors = {tag.name: vectors[tag.name] for tag in given.tags if tag.name in vectors}
    parents = [file.as_parent(weight=weight) for file, weight in zip(files, weights, strict=True)]
    return _made(first, vectors, chosen, Ancestry(operation, tuple(parents)), files, answers)


def _made(
    first: TagFile,
    vectors: Mapping[str, Tensor],
    template: Template,
    ancestry: Ancestry,
    files: Sequence[TagFile] = (),
    answers: Answers | None = None,
) -> TagFile:
    """Return new tags for the backbone of the first file; nothing is known of their training and accuracy."""
    missing = [tag.name for tag in template.tags if tag.name not in vectors]
    if missing:
        raise TagFileError(
            f"template {template.name!r} has tag {missing[0]}, which {_labels(files or [first])} lack; warm it up on "
            "top of them (start_from), or rename"
        )
    template = widened(template, vectors)
    ordered = {tag.name: vectors[tag.name] for tag in template.tags}
    files = files or [first]
    for other in files[1:]:
        if other.chat != first.chat:
            raise TagFileError(
                f"{first.label} and {other.label} stand in different chats, or one in none; take tags of one chat"
            )
        if answers is None and (other.answers, other.length_normalised) != (first.answers, first.length_normalised):
            raise TagFileError(
                f"{first.label} and {other.label} are answered in different ways ({first.answers}, {other.answers}); "
                "say which: answers='symbols' or 'names'"
            )
    answered = next((file for file in files if file.answers == answers), first)
    licenses = {file.license for file in files}
    return replace(
        first,
        folder=None,
        vectors=ordered,
        template=template,
        answers=answers or first.answers,
        length_normalised=answered.length_normalised,
        training={},
        tensors_sha256=checksum(ordered),
        license=licenses.pop() if len(licenses) == 1 else "",
        measured=(),
        ancestry=ancestry,
        name="",
        commit=None,
    )


def _only_template(templates: Sequence[Template], vectors: Mapping[str, Tensor]) -> Template:
    """Return the template that has exactly these tags, where there is one."""
    fitting = [t for t in templates if {tag.name for tag in t.tags} == set(vectors)]
    if not fitting:
        raise TagFileError(
            f"no template of these files has exactly the tags {', '.join(vectors)}; give one that uses them (template=)"
        )
    if any(_prompts(other) != _prompts(fitting[0]) for other in fitting):
        raise TagFileError("the templates of these files differ; say which one is meant (template=)")
    return fitting[0]


def _prompts(template: Template) -> tuple[Any, ...]:
    return template.head, template.option, template.demo, template.query, template.tail


def _loaded(template: Template | str | Path) -> Template:
    found = template if isinstance(template, Template) else Template.load(template)
    if found.is_plain:
        raise TagFileError(f"template {found.name!r} has no tags")
    return found


def _check_known(tags: TagFile, names: Iterable[str], operation: str) -> None:
    for name in names:
        if name not in tags.vectors:
            raise TagFileError(
                f"{tags.label}: {operation}: no tag {name}{nearest(name, tags.vectors)}; "
                f"it has {', '.join(tags.vectors)}"
            )


def _check_backbones(files: Sequence[TagFile]) -> None:
    if not files:
        raise TagFileError("no tag files; give a folder or a hub name")
    first = files[0]
    for other in files[1:]:
        difference = first.fingerprint.difference(other.fingerprint)
        if difference:
            raise TagFileError(
                f"{first.label} and {other.label} are for different backbones, {first.backbone['name']!r} and "
                f"{other.backbone['name']!r}: {difference}; tags of one backbone only can be composed"
            )


def _labels(files: Sequence[TagFile]) -> str:
    return ", ".join(file.label for file in files)
