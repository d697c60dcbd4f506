"""Attention by segments, in rows of segments: what a mask over whole prompts says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from icl_markup import segments as module
from icl_markup.batching import Batch
from icl_markup.blocked_attention import MULTIPLE
from icl_markup.episodes import Query
from icl_markup.model import MarkupModel
from icl_markup.segment_blocks import SegmentBlocks
from icl_markup.segments import HEAD, PADDING, visible
from tests.test_segments import segmented

HEADS, WIDTH = 2, 8


def prompts_of(*lengths: list[int], head: int = 4, tail: int = 1) -> Tensor:
    """Return segments of prompts: a head, parts of these lengths (the last a query), and the head's tail."""
    lines = []
    for parts in lengths:
        line = [HEAD] * head
        for number, length in enumerate(parts, 1):
            line += [number if number < len(parts) else -1] * length
        lines.append(line + [HEAD] * tail)
    longest = max(map(len, lines))
    return torch.tensor([line + [PADDING] * (longest - len(line)) for line in lines])


def both(segments: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients by rows in bf16, and by the mask in fp32; padding's are left out."""
    generator = torch.Generator().manual_seed(1)
    shape = (*segments.shape, HEADS, WIDTH)
    given = [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for _ in range(3)]
    exists = (segments != PADDING)[:, None, :, None]
    towards = torch.randn(shape, generator=generator).transpose(1, 2) * exists
    found = []
    for in_rows in (True, False):
        leaves = [one.clone().requires_grad_() if in_rows else one.float().requires_grad_() for one in given]
        if in_rows:
            output = SegmentBlocks.of(segments, HEAD, PADDING).attend(*leaves, scale=0.3)
        else:
            output = F.scaled_dot_product_attention(*leaves, visible(segments)[0], scale=0.3)
        (output.float() * towards).sum().backward()
        found.append([one.float() * exists for one in (output.detach(), *(leaf.grad for leaf in leaves))])
    return found[0], found[1]


@pytest.mark.parametrize(
    "segments",
    [
        prompts_of([3, 20, 7]),
        prompts_of([3, 4, 31, 18, 9], [2, 50, 1], [1]),
        prompts_of([5, 5, 130, 300, 20], [600, 3]),
        prompts_of([3, 20, 7], [8], head=0, tail=0),
        prompts_of([3, 20, 7], [8], head=0, tail=3),
        prompts_of(*[[2, 3, 4]] * 40),
        torch.tensor([[HEAD, 1, -1, PADDING], [1, 1, HEAD, -1], [PADDING, PADDING, -1, HEAD]]),
        torch.full((2, 5), HEAD),
    ],
)
def test_rows_of_segments_give_what_the_mask_gives(segments: Tensor) -> None:
    ours, wanted = both(segments)
    for mine, right in zip(ours, wanted, strict=True):
        assert float((mine - right).norm()) <= 0.015 * float(right.norm()) + 1e-6


def test_scores_grow_with_the_length_alone_and_shapes_recur() -> None:
    scores = []
    for parts in (40, 80):
        segments = prompts_of([20] * parts, [9])
        blocks = SegmentBlocks.of(segments, HEAD, PADDING)
        assert all(len(one.prompts) % MULTIPLE == 0 and one.mask.shape[-1] % MULTIPLE == 0 for one in blocks.rows)
        is_padding = segments.flatten() == PADDING
        assert is_padding.any() and not blocks.exists[blocks.back[is_padding]].any()
        assert blocks.exists[blocks.back[~is_padding]].all()
        scores.append(sum(one.mask.numel() * one.mask.shape[-1] for one in blocks.rows))
    assert scores[1] < 2.2 * scores[0]


@pytest.mark.parametrize("anchors", [True, False])
def test_a_backbone_that_reads_by_segments_trains_the_same(anchors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = SegmentBlocks.of
    monkeypatch.setattr(SegmentBlocks, "of", lambda *given: made.append(original(*given)) or made[-1])
    found = []
    for precision, in_rows in (("none", False), ("bf16", False), ("bf16", True)):
        model = MarkupModel(segmented("bert", attention="sdpa", anchors=anchors, precision=precision))
        assert model.table is not None
        episode = MarkupModel.episode(
            ["lost card", "weather"], [("will it rain", "weather"), ("my card is gone", "lost card")]
        )
        prompts = [
            model.markup.compose(replace(episode, queries=(Query(text),)))
            for text in ("is it cold", "where is my card now")
        ]
        batch = Batch.of_prompts(prompts, model.pad_id)
        if precision == "bf16" and not in_rows:
            with monkeypatch.context() as patch:
                patch.setattr(module.SegmentBlocks, "of", lambda *_: None)
                scores = model.backbone.candidate_logits(batch, model.table)
        else:
            scores = model.backbone.candidate_logits(batch, model.table)
        scores.logsumexp(-1).sum().backward()
        found.append(model.table.rows.grad)
    assert len(made) == 1
    exact, masked, rows = found
    assert rows is not None and masked is not None and exact is not None
    assert float((rows - exact).norm()) <= max(0.03 * float(exact.norm()), 1.5 * float((masked - exact).norm()))


def test_long_heads_are_not_copied_for_every_segment() -> None:
    assert SegmentBlocks.of(prompts_of([20] * 60, [9]), HEAD, PADDING).pays
    assert not SegmentBlocks.of(prompts_of([20] * 60, [9], head=500), HEAD, PADDING).pays
