"""What can be exported in which form, and why something cannot: the one place where exports are refused beforehand.

What passes here is still compared with the live model once it is written (`icl_markup.export_check`).
"""

from __future__ import annotations

from typing import Literal

from icl_markup.backbone import Backbone
from icl_markup.errors import ExportError
from icl_markup.loading import DTYPES
from icl_markup.model import MarkupModel

Form = Literal["merged", "peft", "vectors"]
"""A merged checkpoint, a PEFT adapter, or embeddings in the requests to an engine that holds the bare backbone."""


def check_exportable(model: MarkupModel, form: Form) -> None:
    """Check that a model's tags can be given away in a form.

    Raises:
        ExportError: it has no tags; or, as a checkpoint or adapter, its weights are quantised or of a type that is
            not written; or, as vectors, it is not causal, or its embedding multiplies the rows of its table, as
            Gemma's and BART's do.
    """
    backbone = model.backbone
    if model.table is None:
        raise ExportError(
            f"template {model.template.name!r} has no tags to export: its prompts are plain text for any engine"
        )
    if form == "vectors":
        _check_vectors(backbone)
        return
    if getattr(backbone.model, "is_quantized", False):
        raise ExportError(
            f"backbone {backbone.name!r} is quantised; export the tags with the model that it was made from "
            "(--backbone), and quantise what is written"
        )
    dtype = next(backbone.embedding.parameters()).dtype
    if dtype not in DTYPES.values():
        raise ExportError(f"weights of type {dtype} are not exported; load the backbone in one of {', '.join(DTYPES)}")


def embedding_scale(backbone: Backbone) -> float:
    """Return by what the embedding multiplies its table's rows (Gemma's, BART's and XGLM's do; others by 1).

    What a model does to embeddings after that module, such as Granite's multiplier, is no part of it: it is done to
    soft tokens as to any others, here and in every engine.
    """
    return float(getattr(backbone.embedding, "embed_scale", 1.0))


def _check_vectors(backbone: Backbone) -> None:
    if backbone.kind != "causal":
        raise ExportError(
            f"vLLM and SGLang score causal models; {backbone.name!r} is a {backbone.kind} one: ask it through "
            "transformers, from a merged checkpoint"
        )
    if embedding_scale(backbone) != 1.0:
        # vLLM's Gemma 2 multiplies the embeddings that it is given, its Gemma 3 and transformers do not.
        raise ExportError(
            f"{type(backbone.model).__name__} scales its embeddings, and engines differ in whether they scale those "
            "that they are given; export a merged checkpoint"
        )
