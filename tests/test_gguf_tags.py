"""Tags made on dequantized weights fit the model that was quantized, and the reverse; they fit no other model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.cache import VARIABLE
from icl_markup.errors import TagFileError
from icl_markup.fingerprint import Fingerprint
from icl_markup.model import MarkupModel
from icl_markup.sketches import difference, embedding_sketch, tolerance
from tests.conftest import tiny_backbone
from tests.gguf_models import contents, original_model, original_tokenizer, save_original, write_gguf


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


def load(name: Path, **options: object) -> Backbone:
    return Backbone.load(BackboneConfig(str(name), device="cpu", **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load(save_original(tmp_path_factory.mktemp("original"), original_model()))


def quantized(folder: Path, kind: str, embedding: str = "", model: transformers.LlamaForCausalLM | None = None) -> Path:
    content = contents(model or original_model())
    content.kind, content.embedding = kind, embedding or kind
    return write_gguf(folder / f"{kind}-{embedding}.gguf", content)


@pytest.mark.parametrize(("kind", "embedding"), [
    ("Q8_0", "Q8_0"), ("Q5_0", "Q5_0"), ("Q5_1", "Q8_0"), ("Q4_0", "Q4_0"), ("Q4_1", "Q8_0"), ("Q4_1", "Q4_1"),
    ("F16", "F16"),
])  # fmt: skip
def test_tags_fit_the_original_and_the_file_both_ways(
    kind: str, embedding: str, original: Backbone, tmp_path: Path
) -> None:
    backbone = load(quantized(tmp_path, kind, embedding))
    MarkupModel(backbone, "markup_letters").save(tmp_path / "of file")
    MarkupModel(original, "markup_letters").save(tmp_path / "of original")
    assert MarkupModel.from_tags(tmp_path / "of file", original).table is not None
    assert MarkupModel.from_tags(tmp_path / "of original", backbone).table is not None
    assert Fingerprint.of(backbone).difference(Fingerprint.of(original)) is None


def test_tags_fit_two_files_of_one_model(tmp_path: Path) -> None:
    fine, coarse = load(quantized(tmp_path, "Q8_0")), load(quantized(tmp_path, "Q4_0"))
    assert Fingerprint.of(fine).difference(Fingerprint.of(coarse)) is None
    assert Fingerprint.of(coarse).difference(Fingerprint.of(fine)) is None


def test_tags_fit_a_file_whose_weights_are_held_in_bf16(original: Backbone, tmp_path: Path) -> None:
    path = quantized(tmp_path, "Q4_1", "Q8_0")
    half, full = Fingerprint.of(load(path, dtype="bf16")), Fingerprint.of(load(path))
    assert half.difference(full) is None and full.difference(half) is None
    assert Fingerprint.of(original).difference(half) is None


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_tags_do_not_fit_another_model_of_that_shape(kind: str, original: Backbone, tmp_path: Path) -> None:
    other = load(quantized(tmp_path, kind, model=original_model(seed=1)))
    MarkupModel(other, "markup_letters").save(tmp_path / "tags")
    with pytest.raises(TagFileError, match="other values in the embedding table, by 1"):
        MarkupModel.from_tags(tmp_path / "tags", original)
    assert Fingerprint.of(original).difference(Fingerprint.of(other)) is not None


@pytest.mark.parametrize(("part", "told"), [("embed", "embedding table"), ("proj", "weights of linear layers")])
def test_tags_do_not_fit_a_model_that_was_trained_further(
    part: str, told: str, original: Backbone, tmp_path: Path
) -> None:
    tuned = original_model()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if part in name:
                weight.add_(torch.randn_like(weight) * weight.std(), alpha=0.4)
    found = Fingerprint.of(load(quantized(tmp_path, "Q4_1", "Q8_0", tuned)))
    assert told in str(Fingerprint.of(original).difference(found))
    assert told in str(found.difference(Fingerprint.of(original)))


def test_a_fingerprint_of_an_earlier_version_is_named(original: Backbone, tmp_path: Path) -> None:
    later = Fingerprint.of(original)
    data = later.to_json()
    for key in (
        "tokenizer_ids_sha256", "dequantized", "dequantized_embedding", "projected_embedding", "projected_norms"
    ):  # fmt: skip
        del data[key]
    earlier = Fingerprint.from_json(data)
    assert earlier.difference(later) is None and later.difference(earlier) is None
    file = Fingerprint.of(load(quantized(tmp_path, "Q8_0")))
    assert "an earlier version" in str(earlier.difference(file))
    assert "an earlier version" in str(file.difference(earlier))


def test_a_damaged_sketch_is_another_model(original: Backbone, tmp_path: Path) -> None:
    whole = Fingerprint.of(original)
    file = Fingerprint.of(load(quantized(tmp_path, "Q8_0")))
    cut = replace(file, projected_embedding=file.projected_embedding[:5])
    assert "embedding table" in str(whole.difference(cut))


def test_a_tokenizer_that_cuts_otherwise_is_another_one(original: Backbone) -> None:
    def with_tokenizer(pre: str) -> Fingerprint:
        return Fingerprint.of(Backbone(original.model, original_tokenizer(pre), "causal"))

    same, other = with_tokenizer("smollm"), with_tokenizer("qwen2")
    assert Fingerprint.of(original).difference(same) is None
    assert Fingerprint.of(original).difference(other) == "another tokenizer"


def test_spelling_and_tokens_without_a_row_make_no_other_tokenizer(original: Backbone) -> None:
    found = Fingerprint.of(Backbone(original.model, _respelled(), "causal"))
    mine = Fingerprint.of(original)
    assert found.tokenizer_sha256 != mine.tokenizer_sha256
    assert found.tokenizer_ids_sha256 == mine.tokenizer_ids_sha256
    assert mine.difference(found) is None


def _respelled() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer with a token beyond the model's rows, as Gemma's has one for images."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=original_tokenizer("smollm").backend_tokenizer, bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    tokenizer.add_tokens(["<image>"])
    return tokenizer


def test_sketches_tell_rounding_from_other_weights() -> None:
    torch.manual_seed(0)
    table = torch.randn(3000, 64)
    sketch = embedding_sketch(table)
    for share in (0.01, 0.1, 0.5):
        found = difference(sketch, embedding_sketch(table + share * torch.randn_like(table)))
        assert 0.6 * share < found < 1.5 * share
    assert difference(sketch, embedding_sketch(torch.randn(3000, 64))) > 1
    assert difference(sketch, embedding_sketch(table.bfloat16())) < tolerance(["none"])


def test_tolerances_grow_as_bits_fall() -> None:
    kinds = ["gguf-f16", "gguf-q8_0", "gguf-q6_k", "gguf-q5_1", "gguf-q4_k", "gguf-iq3_xxs", "gguf-iq2_s"]
    found = [tolerance([kind]) for kind in kinds]
    assert found == sorted(found) and found[0] == tolerance(["none"])
    assert tolerance(["none", "gguf-q4_1"]) == tolerance(["gguf-q4_1"])
    assert max(found) < 0.7 < 1.4  # of unrelated models


def test_models_that_were_never_quantized_are_compared_exactly() -> None:
    bert = tiny_backbone("bert")
    mine = Fingerprint.of(bert)
    with torch.no_grad():
        bert.model.get_input_embeddings().weight[7] *= 1.001
    assert mine.difference(Fingerprint.of(bert)) == "other values in the embedding table"
