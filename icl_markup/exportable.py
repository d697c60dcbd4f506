"""What can be exported in which form, and why something cannot: the one place where exports are refused beforehand.

What passes here is still compared with the live model once it is written (`icl_markup.export_check`).
"""

from __future__ import annotations

from icl_markup.backbone import Backbone
from icl_markup.errors import ExportError
from icl_markup.loading import DTYPES
from icl_markup.model import MarkupModel


def check_exportable(model: MarkupModel) -> None:
    """Check that a model's tags can be written as a merged checkpoint or a PEFT adapter.

    Raises:
        ExportError: it has no tags, or its weights are quantised or of a type that is not written.
    """
    backbone = model.backbone
    if model.table is None:
        raise ExportError(
            f"template {model.template.name!r} has no tags to export: its prompts are plain text for any engine"
        )
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
