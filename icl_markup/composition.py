"""From the names of tag files, and what is wanted of each, to one `TagFile`: what users and commands ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icl_markup.answers import Answers
from icl_markup.compose import Operation, average, interpolate, merge, select
from icl_markup.compose import rename as renaming
from icl_markup.errors import TagFileError, nearest
from icl_markup.tagfile import TagFile, read_tags
from icl_markup.template import Template

Named = str | Path | TagFile
"""A folder, a hub name, or tags that were read or composed."""


def composed(
    tags: Named | Sequence[Named],
    *,
    revision: str | None = None,
    template: Template | str | Path | None = None,
    rename: Mapping[Any, Any] | None = None,
    only: Sequence[str] | Mapping[Any, Sequence[str]] | None = None,
    operation: Operation = "merge",
    weights: Sequence[float] | None = None,
    t: float = 0.5,
    answers: Answers | None = None,
    token: str | None = None,
) -> TagFile:
    """Read tags and make one of them; a single folder or hub name without options is read as it is.

    Args:
        tags: a folder, a hub name, a `TagFile`, or a list of them.
        revision: of a single hub name; in a list write ``user/tags@revision``.
        template: as in `merge`.
        rename: new names by old ones, in every file that has the old one; or such mappings by file, as it is named
            in `tags`.
        only: names of the tags to take (their old ones), from every file that has them; or such lists by file. Files
            that the mapping does not name are taken whole.
        operation: ``merge``; ``average`` with `weights`; ``interpolate`` between two with `t`.
        weights: of ``average``.
        t: of ``interpolate``.
        answers: as in these operations.
        token: a token of the hub.

    Raises:
        TagFileError: as in these operations and in `read_tags`, or `rename` or `only` name what is not there.
    """
    several = list(tags) if isinstance(tags, Sequence) and not isinstance(tags, str) else [tags]
    if revision is not None and len(several) != 1:
        raise TagFileError(f"revision {revision!r} is given for {len(several)} tag files; write name@revision for each")
    if not several:
        raise TagFileError("no tag files; give a folder or a hub name")
    read = [one if isinstance(one, TagFile) else read_tags(one, revision, token) for one in several]
    plain = all(option is None for option in (template, answers, rename, only))
    if len(read) == 1 and operation == "merge" and plain:
        return read[0]
    keys = [one.label if isinstance(one, TagFile) else str(one) for one in several]
    kept, named = _by_file(only, keys, read, "only"), _by_file(rename, keys, read, "rename")
    used, templates = [], []
    for file, names, new_names in zip(read, kept, named, strict=True):
        new = dict(new_names or {})
        part = file if names is None else select(file, names)
        used.append(_renamed(part, {old: name for old, name in new.items() if old in part.vectors}))
        # What was selected from may still have the template for all of it.
        with_all = {old: name for old, name in new.items() if old in file.vectors}
        if len({with_all.get(name, name) for name in file.vectors}) == len(file.vectors):
            templates.append(_renamed(file, with_all).template)
    if operation == "average":
        return average(used, weights, template, answers)
    if operation == "interpolate":
        if len(used) != 2:
            raise TagFileError(f"interpolate goes between two tag files; {len(used)} are given")
        return interpolate(used[0], used[1], t, template, answers)
    return merge(used, template, answers, templates)


def _renamed(tags: TagFile, names: Mapping[str, str]) -> TagFile:
    return renaming(tags, names) if names else tags


def _by_file(given: Any, keys: Sequence[str], read: Sequence[TagFile], option: str) -> list[Any]:
    """Return what an option says about each file; None about files that it does not concern."""
    if given is None:
        return [None for _ in keys]
    is_mapping = isinstance(given, Mapping)
    if isinstance(given, str):
        raise TagFileError(f"{option} is one string; give a list of tag names")
    if not is_mapping or (option == "rename" and all(isinstance(value, str) for value in given.values())):
        known = {name for file in read for name in file.vectors}
        for name in given:
            if name not in known:
                raise TagFileError(f"{option}: none of the tag files has {name}{nearest(str(name), known)}")
        if not is_mapping:
            return [[name for name in given if name in file.vectors] for file in read]
        return [{old: new for old, new in given.items() if old in file.vectors} for file in read]
    by_key = {str(key): value for key, value in given.items()}
    wanted: type = dict if option == "rename" else list
    for key, value in by_key.items():
        if isinstance(value, str) or isinstance(value, Mapping) != (wanted is dict):
            raise TagFileError(f"{option}: {key}: give a {wanted.__name__} of tag names, not {value!r}")
        if key not in keys:
            raise TagFileError(f"{option}: {key!r} is not one of the tag files {', '.join(keys)}{nearest(key, keys)}")
    for key, file in zip(keys, read, strict=True):
        for name in by_key.get(key, ()):
            if name not in file.vectors:
                raise TagFileError(f"{option}: {file.label} has no tag {name}{nearest(name, file.vectors)}")
    return [by_key.get(key) for key in keys]
