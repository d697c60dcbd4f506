"""Does an export answer as the model does? Prompts that show every tag, and a comparison of all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from icl_markup.backbone import Backbone
from icl_markup.episodes import Query
from icl_markup.errors import ExportError
from icl_markup.markup import Markup
from icl_markup.model import MarkupModel
from icl_markup.placement import Placement
from icl_markup.prompt import Prompt
from icl_markup.tags import substituted

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.03}
"""By how much a logit may differ, as a share of the largest (at least of 1): a table of another height is multiplied
by other kernels, which add in another order."""

_LABELS = {"lost card": "", "opening hours": "asks when we are open", "complaint": ""}
_DEMOS = (("I can't find my card", "lost card"), ("Are you open on Sundays?", "opening hours"), ("Awful!", "complaint"))
_TEXTS = ("When do you close?", "My card was stolen yesterday evening, what shall I do now")


@dataclass(frozen=True)
class Agreement:
    """How far an export's logits over the ordinary vocabulary are from the model's.

    Attributes:
        prompts: how many prompts were compared, at every position.
        largest_difference: the largest difference of two logits, as a share of the largest logit (at least of 1).
        tolerance: what was allowed.
        equal_to_the_bit: whether there was none at all.
    """

    prompts: int
    largest_difference: float
    tolerance: float
    equal_to_the_bit: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


def check_prompts(markup: Markup) -> list[Prompt]:
    """Return prompts with and without demonstrations and "none of the above", which show all tags of the template."""
    prompts = []
    for demos, none in (((), False), (_DEMOS[:1], False), (_DEMOS, True)):
        episode = MarkupModel.episode(_LABELS, demos, none_of_the_above=none, task_description="messages to a bank")
        prompts += [markup.compose(replace(episode, queries=(Query(text),))) for text in _TEXTS]
    return prompts


def scattered(model: MarkupModel, count: int = 2) -> list[list[int]]:
    """Return lists of ids in which soft tokens, all if they fit, stand between ordinary ones; the same every time."""
    backbone, table = model.backbone, model.table
    assert table is not None
    generator = torch.Generator().manual_seed(0)
    words = backbone.vocabulary.cpu()
    tags = range(table.first_id, table.first_id + table.count)
    most = max(1, (backbone.max_length - len(backbone.layout.prefix) - len(backbone.layout.suffix)) // 2)
    lines = []
    for _ in range(count):
        order = torch.randperm(len(tags), generator=generator)[:most].tolist()
        drawn = words[torch.randint(len(words), (len(order),), generator=generator)].tolist()
        body = [i for place, word in zip(order, drawn, strict=True) for i in (tags[place], word)]
        lines.append([*backbone.layout.prefix, *body, *backbone.layout.suffix])
    return lines


@torch.inference_mode()
def compare_logits(
    model: MarkupModel,
    other: PreTrainedModel,
    lines: Sequence[Sequence[int]],
    placement: Placement,
    *,
    never: bool,
    where: str,
) -> Agreement:
    """Compare all logits over the ordinary vocabulary, at every position; autocast is off on both sides.

    Args:
        model: the model whose tags were exported.
        other: what was loaded from the export, on the same device.
        lines: prompts in this package's ids.
        placement: where the tags lie in the export.
        never: also check that no tag's logit is the largest anywhere.
        where: the export's name, for errors.

    Raises:
        ExportError: a logit differs by more than `TOLERANCE`, or a tag could be generated.
    """
    backbone = model.backbone
    tags = torch.tensor(placement.all_ids, device=backbone.device)
    ordinary = torch.ones(backbone.first_tag_id, dtype=torch.bool, device=backbone.device)
    ordinary[tags[tags < backbone.first_tag_id]] = False
    tolerance = TOLERANCE[next(backbone.embedding.parameters()).dtype]
    largest, equal = 0.0, True
    for line in lines:
        ours = _logits(backbone, backbone.model, list(line), lambda: _with_tags(model))
        theirs = _logits(backbone, other, placement.moved(line))
        mine, found = ours[:, : len(ordinary)][:, ordinary], theirs[:, : len(ordinary)][:, ordinary]
        equal = equal and torch.equal(mine, found)
        share = float((mine - found).abs().max() / mine.abs().max().clamp(min=1.0))
        if not share <= tolerance:
            raise ExportError(
                f"{where}: what was written answers otherwise than the model: logits differ by {share:.2g} of the "
                f"largest, {tolerance:.2g} is allowed; nothing was left there. {type(other).__name__} keeps or scales "
                "its embedding in a way that an export cannot express"
            )
        largest = max(largest, share)
        if never and bool((theirs[:, tags].amax(1) >= theirs[:, : len(ordinary)][:, ordinary].amax(1)).any()):
            raise ExportError(
                f"{where}: the head of {type(other).__name__} can answer with a tag; nothing was left there"
            )
    return Agreement(len(lines), largest, tolerance, equal)


def _with_tags(model: MarkupModel) -> Any:
    assert model.table is not None
    return substituted(model.backbone.embedding, model.table)


def _logits(backbone: Backbone, model: Any, ids: list[int], context: Callable[[], Any] = nullcontext) -> Tensor:
    """Return logits at every position (of the decoder, where there is one), fp32, (positions, rows)."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=backbone.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if backbone.kind == "seq2seq":
        start = backbone.model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start, *backbone.vocabulary[:3].tolist()]], device=backbone.device)
    if backbone.kind != "masked":
        inputs["use_cache"] = False
    with context():
        found: Tensor = model(**inputs).logits[0].float()
    return found
