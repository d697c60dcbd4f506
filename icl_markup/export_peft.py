"""Tags as a ``TRAINABLE_TOKENS`` adapter of PEFT, written and read.

    icl-markup export --tags runs/mine/tags --to peft --out runs/adapter
    icl-markup import-peft runs/adapter --backbone Qwen/Qwen3-0.6B --out runs/again

The adapter targets the very module that our tags are put into by its full name, so that on T5 it is the encoder's
embedding alone and the head stays as it is. PEFT saves ids and no names: the names lie in ``icl_markup.json`` beside
the adapter, and the tokenizer with the tags as well. The ids lie in spare rows of the base's embedding, or beyond its
end, in which case the base has to be resized first; `prepare_base` does that, and the adapter's README shows how to do
it with transformers alone.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import PeftModel, TrainableTokensConfig
from safetensors.torch import save as save_tensors
from transformers import PreTrainedModel

from icl_markup.errors import ExportError
from icl_markup.export_check import Agreement, check_prompts, compare_logits, scattered
from icl_markup.exportable import check_exportable, embedding_scale
from icl_markup.exported import SIDECAR, check_target, sidecar
from icl_markup.files import new_folder
from icl_markup.model import MarkupModel
from icl_markup.placement import Placement, place_tags

DELTA = "trainable_tokens_delta"
"""The end of the name of an adapter's tensor; it holds values, not differences."""

_TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "masked": None}


def export_peft(model: MarkupModel, folder: str | Path) -> Agreement:
    """Write a model's tags as an adapter that ``PeftModel.from_pretrained`` loads on the prepared backbone.

    What was written is loaded with PEFT on a copy of the backbone, and logits are compared.

    Args:
        model: the model.
        folder: where to; an earlier export is replaced. It is written whole or not at all.

    Returns:
        How far the logits are from the live model's.

    Raises:
        ExportError: the backbone is none that PEFT's adapter can express, `folder` holds something else, or what was
            written does not answer as the live model does.
    """
    folder = Path(folder)
    check_exportable(model)
    check_target(folder)
    assert model.table is not None
    backbone = model.backbone
    placement, tokenizer = place_tags(backbone.tokenizer, model.table)
    rows = max(backbone.first_tag_id, max(placement.all_ids) + 1)
    target = _name_of(model)
    config = TrainableTokensConfig(
        token_indices=placement.all_ids,
        target_modules=[target],
        base_model_name_or_path=backbone.name,
        revision=backbone.revision,
        task_type=_TASKS[backbone.kind],
        inference_mode=True,
    )
    values = model.table.all_rows().detach().cpu() / embedding_scale(backbone)
    with new_folder(folder) as part:
        config.save_pretrained(part)
        tensors = {f"base_model.model.{target}.{DELTA}": values.contiguous()}
        (part / "adapter_model.safetensors").write_bytes(save_tensors(tensors, metadata={"format": "pt"}))
        tokenizer.save_pretrained(part)
        agreement = _check(model, placement, part, rows, str(folder))
        content = sidecar(model, placement, "peft", rows=rows, check=agreement.to_json())
        (part / SIDECAR).write_bytes(content)
        (part / "README.md").write_text(_card(model, placement, rows), encoding="utf-8")
    return agreement


def prepare_base(base: PreTrainedModel, rows: int) -> PreTrainedModel:
    """Make a freshly loaded base ready for an adapter: its embedding is resized if it is too low, its head is left out.

    Where the configuration says tied, resizing ties the head (also a T5's, which is not), and PEFT puts the tags into
    the head as well, and there forgets its bias. So it says what is true while resizing, and not tied to PEFT.
    Resizing also makes one module of the embeddings of an encoder and a decoder, and PEFT knows that by one name only,
    which is not the encoder's: so the encoder gets a module of its own again, with the same table.

    Args:
        base: the model, which is changed and returned.
        rows: how many rows the embedding needs: ``rows`` in the adapter's ``icl_markup.json``.
    """
    base.config.tie_word_embeddings = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if base.get_input_embeddings().weight.shape[0] < rows:
        base.resize_token_embeddings(rows, mean_resizing=False)
        if base.config.is_encoder_decoder:
            base.get_encoder().set_input_embeddings(copy.copy(base.get_input_embeddings()))
    base.config.tie_word_embeddings = False
    return base


def _name_of(model: MarkupModel) -> str:
    modules = model.backbone.model.named_modules(remove_duplicate=False)
    names = [str(name) for name, module in modules if module is model.backbone.embedding]
    if not names:
        raise ExportError(
            f"{type(model.backbone.model).__name__}: its input embedding is no module that PEFT can target"
        )
    # The encoder's name comes first where an encoder and a decoder share one module.
    return str(min(names, key=lambda name: ("encoder" not in name, len(name))))


def _check(model: MarkupModel, placement: Placement, part: Path, rows: int, where: str) -> Agreement:
    base = prepare_base(copy.deepcopy(model.backbone.model), rows)
    try:
        adapted = PeftModel.from_pretrained(base, str(part), torch_device=str(model.backbone.device))
    except ValueError as error:  # what PEFT raises for modules that it does not find or cannot adapt
        first = str(error).splitlines()[0]
        raise ExportError(
            f"{where}: PEFT cannot load the adapter on {type(base).__name__}, and it was not left there ({first}); "
            "export a merged checkpoint instead"
        ) from error
    lines = [*(prompt.ids for prompt in check_prompts(model.markup)), *scattered(model)]
    with torch.inference_mode():
        return compare_logits(model, adapted.eval(), lines, placement, never=False, where=where)


def _card(model: MarkupModel, placement: Placement, rows: int) -> str:
    own, copied = "", ""
    if model.backbone.kind == "seq2seq":
        own, copied = (
            "\n    base.get_encoder().set_input_embeddings(copy(base.get_input_embeddings()))",
            "from copy import copy\n\n",
        )
    auto = {"causal": "CausalLM", "seq2seq": "Seq2SeqLM", "masked": "MaskedLM"}[model.backbone.kind]
    return f"""---
library_name: peft
base_model: {model.backbone.name}
---
# Tags of ICL Markup for {model.backbone.name}

{len(placement.all_ids)} soft tokens: {", ".join(f"`{placement.text(name)}`" for name in placement.tokens)}.

```python
{copied}from peft import PeftModel
from transformers import AutoModelFor{auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path of this folder")
base = AutoModelFor{auto}.from_pretrained({model.backbone.name!r})
base.config.tie_word_embeddings = base.get_output_embeddings().weight is base.get_input_embeddings().weight
if base.get_input_embeddings().weight.shape[0] < {rows}:
    base.resize_token_embeddings({rows}, mean_resizing=False){own}
base.config.tie_word_embeddings = False  # or PEFT puts the tags into the head as well, and there forgets its bias
model = PeftModel.from_pretrained(base, "path of this folder")
```

To go on training and save, `model.save_pretrained(folder, save_embedding_layers=False)` keeps the adapter small.
`icl-markup import-peft` turns it into a tag folder again. The head is not kept from answering with a tag here: read the
logits of the candidates, as ICL Markup does, or export a merged checkpoint.
"""
