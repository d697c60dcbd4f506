"""Tiny models of every kind, built in the tests: no download, a few thousand parameters each.

Tokenizers are trained once a session: no two trainings agree on the order of equally frequent pieces.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from icl_markup.backbone import Backbone
from icl_markup.loading import BackboneConfig
from icl_markup.models import MODELS
from icl_markup.readers import read_task
from icl_markup.tasks import Example, Task, checked_task

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have it from the process that started them
    os.environ["ICL_MARKUP_CACHE"] = tempfile.mkdtemp(prefix="icl-markup-cache-")
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"
KINDS = ("llama", "t5", "bert", "roberta")

TEXTS = {
    "lost card": ["I lost my card", "where is my bank card", "my card was stolen", "cannot find the card anywhere"],
    "opening hours": ["when do you open", "are you open on Sunday", "what time do you close", "opening times please"],
    "complaint": ["this is awful", "I want to complain", "very poor service", "nobody answers my letters"],
    "weather": ["will it rain", "is it cold outside", "how warm is it today", "sunny or not"],
}
CORPUS = [f"{label}: {text}" for label, texts in TEXTS.items() for text in texts] + [
    f" {letter} {letter}: {letter.lower()}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for _ in range(8)
]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's cache, which may hold the weights of a real model."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["ICL_MARKUP_CACHE"], ignore_errors=True)


@cache
def byte_level_tokenizer(mask: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as of GPT-2, Llama 3, Qwen (or, with a mask token, RoBERTa)."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ends = ("<s> $A </s>", [("<s>", 0), ("</s>", 2)]) if mask else ("<s> $A", [("<s>", 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single=ends[0], special_tokens=ends[1])
    extra = {"mask_token": "<mask>"} if mask else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", **extra
    )


@cache
def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like unigram tokenizer with sentinels, as of T5."""
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<extra_id_0>", "<extra_id_1>"],
    )


@cache
def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """An uncased WordPiece tokenizer, as of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    alphabet = list("abcdefghijklmnopqrstuvwxyz<>[]_0")
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def tiny_backbone(name: str, **options: object) -> Backbone:
    """Build a backbone with random weights; the same name always gives the same weights."""
    torch.manual_seed(0)
    if name == "llama":
        tokenizer = byte_level_tokenizer(mask=False)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        )  # fmt: skip
        return Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", name="tiny-llama", **options)
    if name == "t5":
        tokenizer = unigram_tokenizer()
        config = transformers.T5Config(
            vocab_size=len(tokenizer) + 12, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, dropout_rate=0.0,
            tie_word_embeddings=False, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
        return Backbone(
            transformers.T5ForConditionalGeneration(config),
            tokenizer,
            "seq2seq",
            name="tiny-t5",
            max_length=256,
            **options,
        )
    tokenizer = wordpiece_tokenizer() if name == "bert" else byte_level_tokenizer(mask=True)
    classes = {
        "bert": (transformers.BertConfig, transformers.BertForMaskedLM),
        "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM),
    }
    config = classes[name][0](
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=258, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return Backbone(classes[name][1](config), tokenizer, "masked", name=f"tiny-{name}", **options)


@cache
def stand_in() -> Backbone:
    """A Llama of one layer, as wide as SmolLM2 and under its name, with a tokenizer of the same kind."""
    torch.manual_seed(0)
    tokenizer = copy.deepcopy(byte_level_tokenizer(mask=False))
    # SmolLM2's puts no token before a text.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    return Backbone(transformers.LlamaForCausalLM(config), tokenizer, "causal", name=BackboneConfig.name)


@pytest.fixture
def tiny_default(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A tiny stand-in for the default backbone, which is loaded wherever that is asked for by its name."""
    load = Backbone.load

    def loaded(config: BackboneConfig | str = BackboneConfig.name) -> Backbone:
        is_default = (config if isinstance(config, str) else config.name) == BackboneConfig.name
        return stand_in() if is_default else load(config)

    monkeypatch.setattr(Backbone, "load", staticmethod(loaded))
    monkeypatch.setattr("icl_markup.quickstart.zoo_folder", lambda _name: None)  # those tags fit the true model alone
    return stand_in()


def needs_smollm2() -> None:
    """Skip a test if the package that carries SmolLM2 is missing."""
    if MODELS["smollm2"].missing:
        pytest.skip(f"SmolLM2 is not installed: {MODELS['smollm2'].installs}")


@pytest.fixture(scope="session")
def smollm2() -> Backbone:
    """SmolLM2-135M-Instruct, loaded once a session; it belongs to all tests, which must leave it as it is."""
    needs_smollm2()
    return Backbone.load(BackboneConfig("smollm2", device="cpu", precision="none"))


def tiny_task(name: str = "tiny") -> Task:
    """A task of four labels with out-of-scope texts and two splits."""
    splits = {
        split: [Example(text, label) for label, texts in TEXTS.items() for text in texts[part]]
        + [Example(f"{split} sing me a song", "out of scope"), Example(f"{split} tell a joke", "out of scope")]
        for split, part in (("train", slice(0, 3)), ("test", slice(3, None)))
    }
    return checked_task(name, splits, oos_label="out of scope", descriptions={"weather": "asks about the weather"})


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """A backbone of every kind in turn."""
    return tiny_backbone(request.param)


@pytest.fixture
def bert() -> Backbone:
    """A masked backbone."""
    return tiny_backbone("bert")


@pytest.fixture
def task() -> Task:
    """A small task."""
    return tiny_task()


def shared_path(*parts: str) -> Path:
    """A path below the shared data; the test skips where it is missing."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the shared {parts[0]} are not here: {'/'.join(parts)}")
    return path


def shared_task(name: str) -> Task:
    """A real data set of the shared data; the test skips where it is missing."""
    from icl_markup.readers import TaskSource
    from icl_markup.tasks import TaskChecks

    return read_task(TaskSource(str(shared_path("data", name)), checks=TaskChecks(1, "drop", "drop")))
