"""Reads a ``TRAINABLE_TOKENS`` adapter of PEFT, ours or another's, as named tags.

An adapter holds ids and vectors. Names come, in this order, from the caller, from ``icl_markup.json`` beside it, or
from the added tokens of a tokenizer beside it, where ``<demo>`` and ``<demo:1>`` are one tag of two soft tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from icl_markup.backbone import Backbone
from icl_markup.errors import ExportError, PromptError
from icl_markup.export_peft import DELTA
from icl_markup.exportable import embedding_scale
from icl_markup.exported import SIDECAR, read_chat, read_sidecar
from icl_markup.fingerprint import Fingerprint
from icl_markup.model import MarkupModel
from icl_markup.template import Template

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_TOKEN = re.compile(r"(?P<name><[^<>:\s]+)(?::tag\d+)?(?::(?P<place>\d+))?>")


def import_peft(
    folder: str | Path,
    backbone: Backbone,
    template: Template | str | Path | None = None,
    names: Mapping[str, Sequence[int]] | None = None,
) -> MarkupModel:
    """Make a model of an adapter's rows; `MarkupModel.save` writes them as a tag folder.

    Args:
        folder: the adapter.
        backbone: the model that it was trained for.
        template: the template that uses the tags, or its name or path; by default the one beside the adapter.
        names: for each tag of the template the ids of its soft tokens, in order; by default read off the folder.

    Raises:
        ExportError: the folder is no such adapter, it was made for another backbone, no names are to be had, or the
            template has a tag that the adapter lacks.
        TemplateError: the template cannot be loaded.
    """
    folder = Path(folder)
    ids, rows = read_adapter(folder)
    details = read_sidecar(folder) if (folder / SIDECAR).exists() else None
    options: dict[str, Any] = {}
    try:
        if details is not None:
            difference = Fingerprint.from_json(details["fingerprint"]).difference(Fingerprint.of(backbone))
            if difference:
                raise ExportError(
                    f"{folder}: these tags were made for another backbone than {backbone.name!r}: {difference}"
                )
            options["chat"] = read_chat(details)
            names = names or {str(tag["name"]): [int(i) for i in tag["ids"]] for tag in details["tags"]}
            if template is None:
                template = Template.parse(str(details["template"]["source"]), str(details["template"]["name"]))
                options |= {"answers": details["answers"], "length_normalised": bool(details["length_normalised"])}
    except (KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / SIDECAR}: damaged: {type(error).__name__} {error}") from error
    if template is None:
        raise ExportError(f"{folder}: an adapter says nothing of prompts; give the template that uses its tags")
    if not isinstance(template, Template):
        template = Template.load(template)
    if rows.shape[1] != backbone.width:
        raise ExportError(
            f"{folder}: vectors of width {rows.shape[1]}, but {backbone.name!r} has embeddings of {backbone.width}"
        )
    found = _vectors(folder, ids, rows * embedding_scale(backbone), names or _named_by_tokens(folder, ids))
    lacking = [tag.name for tag in template.tags if tag.name not in found]
    if lacking:
        raise ExportError(
            f"{folder}: template {template.name!r} has the tag {lacking[0]}, but the adapter has "
            f"{', '.join(found)}; name its ids with --tag, as in --tag '{lacking[0]}={ids[0]}'"
        )
    used = {tag.name: found[tag.name] for tag in template.tags}
    try:
        return MarkupModel(backbone, template, used, **options)
    except PromptError as error:
        raise ExportError(f"{folder}: does not fit template {template.name!r}: {error}") from error


def read_adapter(folder: Path) -> tuple[list[int], Tensor]:
    """Read an adapter's ids and its rows, (ids, embedding width), fp32; only JSON and safetensors are read.

    Raises:
        ExportError: a file is missing or damaged, or the adapter is of another kind.
    """
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, ids = config["peft_type"], config.get("token_indices")
    except OSError as error:
        raise ExportError(f"{path}: cannot be read: {error.strerror}; is this the folder of a PEFT adapter?") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{path}: damaged: {type(error).__name__} {error}") from error
    if kind != "TRAINABLE_TOKENS":
        raise ExportError(f"{path}: an adapter of type {kind}; only TRAINABLE_TOKENS are nothing but input embeddings")
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ExportError(f"{path}: damaged: token_indices is no list of ids")
    if len(set(ids)) < len(ids):
        raise ExportError(f"{path}: damaged: an id stands twice in token_indices")
    path = folder / _TENSORS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ExportError(
            f"{folder}: holds a pickle (adapter_model.bin), which is not read; save the adapter as safetensors"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            keys = [key for key in names if key.endswith(f".{DELTA}")]
            if len(keys) != 1:
                raise ExportError(
                    f"{path}: {len(keys)} tables of tokens ({', '.join(keys) or 'none'}); tags are one, of the input "
                    "embedding"
                )
            rows: Tensor = tensors.get_tensor(keys[0]).float()
    except FileNotFoundError as error:
        raise ExportError(f"{path}: cannot be read: no such file") from error
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: damaged: {error}") from error
    if rows.ndim != 2 or len(rows) != len(ids):
        raise ExportError(f"{path}: damaged: a table of shape {tuple(rows.shape)} for {len(ids)} ids")
    if not bool(rows.isfinite().all()):
        raise ExportError(f"{path}: holds numbers that are not finite; the training that wrote it diverged")
    return ids, rows


def parse_names(words: Sequence[str]) -> dict[str, list[int]]:
    """Read ``<demo>=32100,32101`` and the like: a tag and the ids of its soft tokens.

    Raises:
        ExportError: a word is not of that form.
    """
    names: dict[str, list[int]] = {}
    for word in words:
        match = re.fullmatch(r"(<[^<>\s]+>)=(\d+(?:,\d+)*)", word)
        if match is None:
            raise ExportError(f"--tag {word}: write a tag and the ids of its soft tokens, as in '<demo>=32100,32101'")
        if match[1] in names:
            raise ExportError(f"--tag {word}: {match[1]} is given twice")
        names[match[1]] = [int(i) for i in match[2].split(",")]
    return names


def _vectors(folder: Path, ids: list[int], rows: Tensor, names: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    place = {i: row for row, i in enumerate(ids)}
    for name, wanted in names.items():
        for i in wanted:
            if i not in place:
                raise ExportError(f"{folder}: has no vector for id {i} of tag {name}; its ids are {ids}")
    return {name: rows[[place[i] for i in wanted]] for name, wanted in names.items()}


def _named_by_tokens(folder: Path, ids: list[int]) -> dict[str, list[int]]:
    """Read names off the added tokens of the tokenizer beside the adapter."""
    path = folder / "tokenizer.json"
    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        tokens = {int(token["id"]): str(token["content"]) for token in added}
    except OSError as error:
        raise ExportError(
            f"{folder}: neither {SIDECAR} nor a tokenizer names ids {ids}; name them with --tag, as in "
            f"--tag '<demo>={ids[0]}'"
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExportError(f"{path}: damaged: {type(error).__name__} {error}") from error
    grouped: dict[str, dict[int, int]] = {}
    for i in ids:
        match = _TOKEN.fullmatch(tokens.get(i, ""))
        if match is None:
            continue
        at = grouped.setdefault(f"{match['name']}>", {})
        if int(match["place"] or 0) in at:
            raise ExportError(f"{path}: two tokens would be soft token {match['place'] or 0} of {match['name']}>")
        at[int(match["place"] or 0)] = i
    return {name: [at[k] for k in sorted(at)] for name, at in grouped.items()}
