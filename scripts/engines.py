"""Asks other engines with a merged checkpoint: each function here returns one that answers prompts by options' indices.

Engines are given the same prompts as `MarkupModel`, as token ids where they take ids and as text where they take text,
and choose among the options' symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from icl_markup.exported import Exported
from icl_markup.prompt import Prompt

Ask = Callable[[], list[int]]


def ask_pipeline(exported: Exported, prompts: Sequence[Prompt]) -> Ask:
    """transformers' pipelines: text-generation of one token, or fill-mask; T5 has none, so its ``generate``."""
    candidates = list(prompts[0].slots[-1].candidates)
    allowed: dict[str, Any] = {"max_new_tokens": 1, "prefix_allowed_tokens_fn": lambda *_: candidates}
    folder = str(exported.folder)
    if exported.kind == "seq2seq":
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)

        def generate() -> list[int]:
            answers = [model.generate(torch.tensor([p.ids]), do_sample=False, **allowed)[0, -1] for p in prompts]
            return [candidates.index(int(answer)) for answer in answers]

        return generate
    texts = [exported.text(prompt) for prompt in prompts]
    if exported.kind == "masked":
        fill = transformers.pipeline("fill-mask", model=folder, dtype=torch.float32)
        targets = exported.tokenizer.convert_ids_to_tokens(candidates)

        def fill_in() -> list[int]:
            best = [fill(text, targets=targets, top_k=1)[0]["token"] for text in texts]
            return [candidates.index(token) for token in best]

        return fill_in
    write = transformers.pipeline("text-generation", model=folder, dtype=torch.float32)

    def go_on() -> list[int]:
        options: dict[str, Any] = {"do_sample": False, "return_tensors": True, **allowed}
        return [candidates.index(write(text, **options)[0]["generated_token_ids"][-1]) for text in texts]

    return go_on


def ask_lm_eval(exported: Exported, prompts: Sequence[Prompt], batch_tokens: int = 4096) -> Ask:
    """lm-eval-harness' ``HFLM``: each option's symbol is a continuation; a batch holds what so many tokens would."""
    from lm_eval.models.huggingface import HFLM

    longest = max(len(prompt.ids) for prompt in prompts)
    seq2seq = exported.kind == "seq2seq"
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(exported.folder, dtype=torch.float32)
    # HFLM calls tie_weights, which in transformers 5 overwrites a T5's separate head, whatever its file says.
    model.config.tie_word_embeddings = False
    engine = HFLM(
        pretrained=model, tokenizer=exported.tokenizer, backend="seq2seq" if seq2seq else "causal",
        batch_size=max(1, batch_tokens // longest), max_length=exported.markup.max_length,
    )  # fmt: skip

    def ask() -> list[int]:
        pairs = [(prompt, i) for prompt in prompts for i in prompt.slots[-1].candidates]
        requests: Any = [((str(n), ""), list(prompt.ids), [i]) for n, (prompt, i) in enumerate(pairs)]
        found = [value for value, _ in engine._loglikelihood_tokens(requests, disable_tqdm=True)]
        width = len(prompts[0].slots[-1].candidates)
        return [int(np.argmax(found[n : n + width])) for n in range(0, len(found), width)]

    return ask


def ask_ctranslate2(
    exported: Exported, prompts: Sequence[Prompt], work: Path, *, shared_head: bool = False, batch_tokens: int = 4096
) -> Ask:
    """CTranslate2 in fp32: logits of the first token it would generate; for causal and sequence-to-sequence models.

    Args:
        exported: the merged checkpoint.
        prompts: the prompts.
        work: the converted model's folder; it is converted if there is none.
        shared_head: have what all prompts begin with computed once (``static_prompt``).
        batch_tokens: the most tokens of a batch.
    """
    import ctranslate2

    if not (work / "model.bin").exists():
        ctranslate2.converters.TransformersConverter(str(exported.folder)).convert(str(work), force=True)
    lines = [exported.tokenizer.convert_ids_to_tokens(list(prompt.ids)) for prompt in prompts]
    threads = torch.get_num_threads()
    options: dict[str, Any] = {
        "beam_size": 1, "return_logits_vocab": True, "max_batch_size": batch_tokens, "batch_type": "tokens"
    }  # fmt: skip
    ask: Callable[[], list[Any]]
    if exported.kind == "seq2seq":
        translator = ctranslate2.Translator(str(work), device="cpu", compute_type="float32", intra_threads=threads)
        ask = lambda: translator.translate_batch(lines, max_decoding_length=1, **options)  # noqa: E731
    else:
        generator = ctranslate2.Generator(str(work), device="cpu", compute_type="float32", intra_threads=threads)
        shared = _shared(lines) if shared_head else 0
        options |= {"static_prompt": lines[0][:shared], "cache_static_prompt": False} if shared else {}
        rest = [line[shared:] for line in lines]
        ask = lambda: generator.generate_batch(  # noqa: E731
            rest, max_length=1, include_prompt_in_result=False, **options
        )
    candidates = [list(prompt.slots[-1].candidates) for prompt in prompts]

    def read() -> list[int]:
        # Of prompts of several lengths in one batch, the ends of longer ones are steps too: the last is the answer's.
        logits = (np.asarray(one.logits[0][-1]) for one in ask())
        return [int(one[wanted].argmax()) for one, wanted in zip(logits, candidates, strict=True)]

    return read


def ask_onnxruntime(exported: Exported, prompts: Sequence[Prompt], work: Path) -> Ask:
    """ONNX Runtime, for masked models: torch's exporter writes the graph, a prompt is one run."""
    import onnxruntime

    path = work / "model.onnx"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        # Not optimised here, which takes long: the runtime does so when it loads the graph.
        model = transformers.AutoModelForMaskedLM.from_pretrained(
            exported.folder, dtype=torch.float32, attn_implementation="eager"
        )
        shown = torch.tensor([prompts[0].ids] * 2)
        axes = {0: "batch", 1: "length"}
        torch.onnx.export(
            model, (), path, kwargs={"input_ids": shown, "attention_mask": torch.ones_like(shown)},
            input_names=["input_ids", "attention_mask"], output_names=["logits"],
            dynamo=True, optimize=False, verbose=False,
            dynamic_shapes={"input_ids": axes, "attention_mask": axes},
        )  # fmt: skip
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def ask() -> list[int]:
        answers = []
        for prompt in prompts:
            ids = np.array([prompt.ids])
            (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            slot = prompt.slots[-1]
            answers.append(int(logits[0, slot.position, list(slot.candidates)].argmax()))
        return answers

    return ask


def _shared(lines: Sequence[Sequence[str]]) -> int:
    """Return how many tokens all lines begin with, of which each must keep one to go on from."""
    shortest = min(map(len, lines)) - 1
    return next((n for n in range(shortest) if len({line[n] for line in lines}) > 1), shortest)
