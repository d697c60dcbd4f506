"""A merged checkpoint: a plain transformers folder in which tags are ordinary tokens, for every engine that loads one.

    icl-markup export --tags runs/mine/tags --to merged --out runs/merged

The tags lie in spare rows of the embedding where there are enough, otherwise it is resized (`icl_markup.merging`, which
also says how the head is kept from ever answering with a tag). What was written is loaded again from the disk, its
tokenizer and its logits are compared with the live model's, and where they differ nothing is left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_markup.backbone import Backbone
from icl_markup.errors import BackboneError, ExportError, PromptError
from icl_markup.export_check import Agreement, check_prompts, compare_logits, scattered
from icl_markup.exportable import check_exportable
from icl_markup.exported import SIDECAR, check_target, markup_for, prompt_text, sidecar
from icl_markup.files import new_folder
from icl_markup.loading import DTYPES, BackboneConfig, load_pretrained
from icl_markup.merging import with_rows
from icl_markup.model import MarkupModel
from icl_markup.placement import Placement, check_tokenizer, place_tags


@dataclass(frozen=True)
class Merged:
    """What was written.

    Attributes:
        folder: where.
        placement: the tags' tokens and ids.
        resized: rows of the embedding, where it had to be resized; else None.
        text_prompts: whether the checked prompts can also be given as text, to the same ids.
        agreement: how far logits are from the live model's.
    """

    folder: Path
    placement: Placement
    resized: int | None
    text_prompts: bool
    agreement: Agreement


def export_merged(model: MarkupModel, folder: str | Path) -> Merged:
    """Write a merged checkpoint of a model and its tags, in the type of its weights.

    Memory: a second embedding and head while writing, then the whole model once more while it is compared.

    Args:
        model: the model.
        folder: where to; an earlier export is replaced. It is written whole or not at all.

    Raises:
        ExportError: the backbone cannot be written as a plain transformers model, `folder` holds something else, or
            what was written does not encode, or does not answer, as the live model does.
    """
    folder = Path(folder)
    check_exportable(model)
    check_target(folder)
    assert model.table is not None
    backbone = model.backbone
    placement, tokenizer = place_tags(backbone.tokenizer, model.table)
    merged = with_rows(backbone, placement.all_ids, model.table.all_rows().detach())
    _suppress(merged.generation_config, placement.all_ids)
    rows = merged.get_input_embeddings().weight.shape[0]
    resized = rows if rows > backbone.first_tag_id else None
    with new_folder(folder) as part:
        try:
            merged.save_pretrained(part)
            tokenizer.save_pretrained(part)
        except (OSError, ValueError, RuntimeError) as error:
            raise ExportError(f"{folder}: cannot write the model: {str(error).splitlines()[0]}") from error
        del merged
        agreement, text_prompts = _check(model, placement, part, str(folder))
        more = {"rows": rows, "resized": resized is not None, "text_prompts": text_prompts}
        (part / SIDECAR).write_bytes(sidecar(model, placement, "merged", **more, check=agreement.to_json()))
        (part / "README.md").write_text(_card(model, placement, text_prompts), encoding="utf-8")
    return Merged(folder, placement, resized, text_prompts, agreement)


def _suppress(config: Any, ids: list[int]) -> None:
    """Tell transformers' generate never to draw a tag: with this its probability is zero in there."""
    if config is not None:
        config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *ids})


def _check(model: MarkupModel, placement: Placement, part: Path, where: str) -> tuple[Agreement, bool]:
    """Load what was written and compare; return the agreement and whether prompts can be given as text."""
    backbone = model.backbone
    try:
        loaded = load_pretrained(_config_of(backbone, part))
    except BackboneError as error:
        raise ExportError(
            f"{where}: what was written of {type(backbone.model).__name__} cannot be loaded again, and was not left "
            f"there ({error}); give the tags away as a PEFT adapter instead"
        ) from error
    check_tokenizer(loaded.tokenizer, placement)
    markup = markup_for(
        model.template, loaded.tokenizer, backbone.kind, placement, model.answers, backbone.max_length, model.chat
    )
    live, theirs = check_prompts(model.markup), check_prompts(markup)
    for mine, other in zip(live, theirs, strict=True):
        if tuple(placement.moved(mine.ids)) != other.ids:
            raise ExportError(f"{where}: the written tokenizer encodes ordinary text otherwise; nothing was left there")
    lines = [*(prompt.ids for prompt in live), *scattered(model)]
    agreement = compare_logits(model, loaded.model, lines, placement, never=True, where=where)
    try:
        for prompt in theirs:
            prompt_text(prompt, placement, markup, model.chat)
    except PromptError:
        return agreement, False
    return agreement, True


def _config_of(backbone: Backbone, folder: Path) -> BackboneConfig:
    dtype = next(backbone.embedding.parameters()).dtype
    named: Any = next(name for name, value in DTYPES.items() if value == dtype)
    attention: Any = getattr(backbone.model.config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa", "flash_attention_2"):
        attention = "auto"
    return BackboneConfig(
        str(folder),
        kind=backbone.kind,
        dtype=named,
        precision="none",
        device=str(backbone.device),
        attention=attention,
    )


def _card(model: MarkupModel, placement: Placement, text_prompts: bool) -> str:
    listed = "\n".join(
        f"| `{name}` | `{placement.text(name)}` | {', '.join(map(str, ids))} |"
        for name, ids in placement.token_ids.items()
    )
    as_text = (
        "Prompts may be given as text: `exported.text(prompt)` is encoded to exactly the prompt's ids."
        if text_prompts
        else "Give prompts as token ids: with this tokenizer, pieces of a prompt that are joined as text are encoded "
        "otherwise than one by one."
    )
    return f"""# {model.backbone.name} with tags

A plain transformers checkpoint ({model.backbone.kind}) whose vocabulary has the soft-token tags of ICL Markup.

| tag | written | ids |
|---|---|---|
{listed}

```python
from icl_markup import MarkupModel
from icl_markup.exported import Exported

exported = Exported.load("path of this folder")
asked = MarkupModel.episode(["lost card", "opening hours"], [("Are you open today?", "opening hours")])
for prompt in exported.prompts(asked, ["When do you close?"]):
    prompt.ids, prompt.slots[-1].position, prompt.slots[-1].candidates  # where and among which ids the answer is read
```

{as_text} Text that a user writes can spell a tag in text prompts; in token ids it cannot.
"""
