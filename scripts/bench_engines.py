"""Queries a second of the same prompts through other engines, from merged checkpoints, against `MarkupModel`.

    python scripts/bench_engines.py results/bench/engines.jsonl

Models have random weights, on which time does not depend, and the shapes of real ones. Everything runs in fp32 on the
CPU, every run in a process of its own; ways take turns, and a ratio is that of two runs in the same turn. Loading and
converting are not timed. All ways must choose the same options: `same_answers` says whether they do.
The packages: pip install "icl-markup[bench]"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from engines import ask_ctranslate2, ask_lm_eval, ask_onnxruntime, ask_pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from icl_markup import Backbone, Demo, Episode, MarkupModel, Option, Query
from icl_markup.export_merged import export_merged
from icl_markup.exported import Exported
from icl_markup.results import provenance, write_rows

OPTIONS = ["lost card", "opening hours", "complaint", "refund", "change address", "delivery", "password", "invoice",
           "cancel", "weather"]  # fmt: skip
PREPARE = "prepare"
OURS = ("ours, first call", "ours, later call")
CAUSAL = (*OURS, "transformers pipeline", "lm-eval", "ctranslate2", "ctranslate2, shared head")
WAYS: dict[str, tuple[str, ...]] = {
    "llama-260k-shape": CAUSAL,
    "llama-135m-shape": CAUSAL,
    "t5-small-shape": (*OURS[:1], "transformers generate", "lm-eval", "ctranslate2"),
    "minilm-shape": (*OURS[:1], "transformers pipeline", "onnxruntime"),
}


def backbone_of(shape: str) -> Backbone:
    """Build a backbone; the same in every process."""
    torch.manual_seed(0)
    kind: Any = {"t5": "seq2seq", "minilm": "masked"}.get(shape.partition("-")[0], "causal")
    tokenizer = _tokenizer(kind)
    ends = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    model: Any
    if shape == "llama-260k-shape":
        llama = transformers.LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.2,
            **ends,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(llama)
    elif shape == "llama-135m-shape":
        llama = transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.04,
            rope_theta=100000.0, **ends,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(llama)
    elif shape == "t5-small-shape":
        t5 = transformers.T5Config(
            vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=1, initializer_factor=1.0,
            eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(t5)
    else:
        bert = transformers.BertConfig(
            vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
            max_position_embeddings=512, initializer_range=0.1, pad_token_id=1,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(bert)
    # Random weights of the usual size answer all prompts alike; with larger ones the ways have something to agree on.
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 2 and "embed" not in name and "shared" not in name:
                value.mul_(4 if kind == "seq2seq" else 2)
    tokenizer.model_max_length = 512 if kind == "masked" else 2048
    return Backbone(model, tokenizer, kind, name=shape)


def _tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Train a small byte-level tokenizer, as of GPT-2: prompts may then be given as text too."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    letters = [f" {chr(65 + i)}" * (200 - i) for i in range(26)]
    tokenizer.train_from_iterator([*(_text(i) for i in range(200)), *OPTIONS, *letters], trainer)
    form = {"causal": "<s> $A", "seq2seq": "$A </s>", "masked": "<s> $A </s>"}[kind]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 0), ("</s>", 2)])  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>",
    )  # fmt: skip


def _text(number: int) -> str:
    return f"message number {number}: please help me with {OPTIONS[number % len(OPTIONS)]} today"


def episode_of(compose: Callable[[Episode], Any], tokens: int, queries: int, first: int = 0) -> Episode:
    """Return an episode whose prompts have about so many tokens."""
    options = tuple(Option(name) for name in OPTIONS)
    asked = tuple(Query(_text(1999 - i)) for i in range(first, first + queries))
    for count in range(2000):
        episode = Episode(options, tuple(Demo(_text(i), i % len(OPTIONS)) for i in range(count)), asked)
        if len(compose(replace(episode, queries=asked[:1])).ids) >= tokens:
            return episode
    raise SystemExit(f"{tokens} tokens are more than the demonstrations give")


def prepare(shape: str, work: Path, tokens: int) -> None:
    """Write the merged checkpoint, and convert it for the engines that need that."""
    exported = Exported.load(export_merged(MarkupModel(backbone_of(shape)), work / "merged").folder)
    prompts = exported.prompts(episode_of(exported.markup.compose, tokens, 2))
    if "ctranslate2" in WAYS[shape]:
        ask_ctranslate2(exported, prompts, work / "ct2")
    if "onnxruntime" in WAYS[shape]:
        ask_onnxruntime(exported, prompts, work / "onnx")


def run(shape: str, way: str, work: Path, tokens: int, queries: int) -> dict[str, Any]:
    """Ask once, in this process; return seconds, the answers, and the first prompt's length in tokens."""
    exported = Exported.load(work / "merged")
    episode = episode_of(exported.markup.compose, tokens, queries)
    prompts = exported.prompts(episode)
    if way in OURS:
        ask = ask_ours(shape, episode, warm=way == "ours, later call", tokens=tokens)
    elif way.startswith("transformers"):
        ask = ask_pipeline(exported, prompts)
    elif way == "lm-eval":
        ask = ask_lm_eval(exported, prompts)
    elif way == "onnxruntime":
        ask = ask_onnxruntime(exported, prompts, work / "onnx")
    else:
        ask = ask_ctranslate2(exported, prompts, work / "ct2", shared_head="shared" in way)
    began = time.perf_counter()
    answers = ask()
    return {"seconds": time.perf_counter() - began, "answers": answers, "tokens": len(prompts[0].ids)}


def ask_ours(shape: str, episode: Episode, *, warm: bool, tokens: int) -> Callable[[], list[int]]:
    """`MarkupModel.scores`; `warm`: other queries of the same episode were asked before."""
    model = MarkupModel(backbone_of(shape))
    assert model.backbone.exactness  # is found out once a process, as part of loading
    if warm:
        model.scores([episode_of(model.markup.compose, tokens, 2, len(episode.queries))])
    # A masked backbone takes several queries a prompt, the other engines do not: one each, so that all do the same.
    episodes = (
        [episode] if model.backbone.kind == "causal" else [replace(episode, queries=(q,)) for q in episode.queries]
    )
    return lambda: [int(one.scores.argmax()) for found in model.scores(episodes) for one in found]


def bench(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all ways of one shape in turn; return a row for each."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS[shape]}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as work:
        child(shape, PREPARE, work, args)
        for _ in range(args.repeats):
            for way, runs in found.items():
                runs.append(json.loads(child(shape, way, work, args).splitlines()[-1]))
    ours = found[OURS[0]]
    answers = ours[0]["answers"]
    rows = []
    for way, runs in found.items():
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, runs, strict=True)]
        seconds = statistics.median(one["seconds"] for one in runs)
        row = {
            "bench": "engines", "shape": shape, "way": way, "against": OURS[0],
            "ratio": round(statistics.median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3),
            "queries_a_second": round(args.queries / seconds, 3), "tokens": runs[0]["tokens"],
            "queries": args.queries, "same_answers": all(one["answers"] == answers for one in runs),
            "different_answers": len(set(answers)), "repeats": args.repeats, "precision": "fp32",
            "engine": _version(way), "load_before": round(load, 2),
            "command": f"python scripts/bench_engines.py {args.out}", **provenance(),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps({key: row[key] for key in list(row)[1:12]}), flush=True)
    return rows


def child(shape: str, way: str, work: str, args: argparse.Namespace) -> str:
    """Do one thing in a process of its own; return what it printed."""
    command = [sys.executable, __file__, str(args.out), "--way", way, "--shapes", shape, "--work", work]
    command += ["--tokens", str(args.tokens), "--queries", str(args.queries)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shape}, {way} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _version(way: str) -> str:
    from importlib.metadata import version

    packages = {
        "ours": "icl-markup",
        "transformers": "transformers",
        "lm-eval": "lm_eval",
        "ctranslate2": "ctranslate2",
    }
    name = packages.get(way.replace(",", " ").split()[0], "onnxruntime")
    return f"{name} {version(name)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=250)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    for hidden in ("--way", "--work"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.way == PREPARE:
        prepare(args.shapes[0], Path(args.work), args.tokens)
        return
    if args.way:
        print(json.dumps(run(args.shapes[0], args.way, Path(args.work), args.tokens, args.queries)))
        return
    write_rows(args.out, [row for shape in args.shapes for row in bench(shape, args)], replace=True)


if __name__ == "__main__":
    main()
