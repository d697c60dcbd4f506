"""Sentence encoders: what a vector is, that it is computed once, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from icl_markup.errors import BackboneError, ConfigError
from icl_markup.sentences import MINILM, MINILM_ON_HUB, MINILM_PACKAGE, SentenceEncoder
from tests.conftest import tiny_backbone

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed: icl-markup[baselines]")

TEXTS = ["I lost my card", "when do you open on Sunday please", "", "rain", "it is cold outside " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder with a tiny BERT."""
    backbone = tiny_backbone("bert")
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    transformers.BertModel(backbone.model.config).save_pretrained(path)
    backbone.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(str(folder), device="cpu")


@torch.no_grad()
def mean_pooled(folder: Path, texts: Sequence[str], limit: int) -> np.ndarray:
    """Mean pooling and normalisation written out with transformers alone, a text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=limit)["input_ids"]
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


def test_vectors_are_normalised_means_over_tokens(folder: Path, encoder: SentenceEncoder) -> None:
    found = encoder.encode(TEXTS)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), encoder.width) == (5, 32)
    np.testing.assert_allclose(found, mean_pooled(folder, TEXTS, 256), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_all_minilm_equals_mean_pooling_of_its_files() -> None:
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None or package.origin is None:
        pytest.skip(f"the package {MINILM_PACKAGE} is not installed: icl-markup[baselines]")
    encoder = SentenceEncoder()
    texts = ["My card was stolen.", "Someone took my bank card", "Will it rain tomorrow?", "rain " * 300]
    found = encoder.encode(texts)
    assert found.shape == (4, 384)
    np.testing.assert_allclose(found, mean_pooled(Path(package.origin).parent / "model", texts, 256), atol=2e-6)
    assert found[0] @ found[1] > 0.6 > 0.3 > found[0] @ found[2]
    assert encoder.too_long(texts) == 1


def test_a_text_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder(str(folder), device="cpu")
    seen: list[str] = []
    inner = encoder.model.encode

    def counted(texts: list[str], **options: object) -> np.ndarray:
        seen.extend(texts)
        return np.asarray(inner(texts, **options))

    monkeypatch.setattr(encoder.model, "encode", counted)
    first = encoder.encode(["a", "b", "a"])
    first[0] = 7  # the caller's copy
    again = encoder.encode(["b", "c", "a"])
    encoder.remember(["a", "b", "c"])
    assert seen == ["a", "b", "c"]
    np.testing.assert_array_equal(first[1], again[0])
    np.testing.assert_array_equal(first[2], again[2])


def test_batches_do_not_matter_and_nothing_changes(folder: Path, encoder: SentenceEncoder) -> None:
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    alone = np.concatenate([SentenceEncoder(str(folder), device="cpu", batch_size=1).encode([t]) for t in TEXTS[:2]])
    np.testing.assert_allclose(encoder.encode(TEXTS)[:2], alone, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.encode([]).shape == (0, 32)


def test_text_yields_no_special_tokens(encoder: SentenceEncoder) -> None:
    ids = encoder.model.preprocess(["stop [SEP] [MASK] [PAD]"])["input_ids"][0].tolist()
    special = set(encoder.model.tokenizer.all_special_ids) - {encoder.model.tokenizer.unk_token_id}
    assert special.isdisjoint(ids[1:-1])


def test_texts_over_the_limit_are_counted(encoder: SentenceEncoder) -> None:
    assert encoder.too_long(["short", "rain " * 300, "rain " * 300]) == 2


def test_a_model_is_pooled_as_it_says(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    reader = Transformer(str(folder))
    SentenceTransformer(modules=[reader, Pooling(32, "cls")], device="cpu").save_pretrained(str(tmp_path))
    found = SentenceEncoder(str(tmp_path), device="cpu").encode(["rain"])[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(folder).eval()
        first = model(**tokenizer("rain", return_tensors="pt")).last_hidden_state[0, 0]
    np.testing.assert_allclose(found, (first / first.norm()).numpy(), atol=2e-6)


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickled"):
        SentenceEncoder(str(plain))
    module = tmp_path / "module"
    shutil.copytree(folder, module)
    (module / "2_Dense").mkdir()
    (module / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    (module / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]), encoding="utf-8")
    with pytest.raises(BackboneError, match="2_Dense"):
        SentenceEncoder(str(module))


def test_errors_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match="no-such-encoder"):
        SentenceEncoder("nobody/no-such-encoder")
    with pytest.raises(BackboneError, match="cannot load it"):
        SentenceEncoder(str(tmp_path))
    with pytest.raises(ConfigError, match="batch_size"):
        SentenceEncoder(str(tmp_path), batch_size=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError) as caught:
        SentenceEncoder(MINILM)
    assert 'pip install "icl-markup[baselines]"' in str(caught.value)
    assert MINILM_ON_HUB in str(caught.value)
