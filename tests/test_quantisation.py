"""Quantised backbones: what is quantised and what is not, gradients, and one clear error where there is no path."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from icl_markup import quantisation
from icl_markup.backbone import Backbone
from icl_markup.batching import Batch
from icl_markup.config import load_config
from icl_markup.episodes import Episode, Query
from icl_markup.errors import BackboneError, ConfigError, WarmupError
from icl_markup.loading import BackboneConfig
from icl_markup.model import MarkupModel
from icl_markup.quantisation import check_gradients, is_plain, linear_layers, projection, signs, stored_tensors
from icl_markup.warmup_config import WarmupConfig
from tests.conftest import KINDS, byte_level_tokenizer, tiny_backbone
from tests.test_warmup import warm_up

FORMS = ("bitsandbytes-int8", "bitsandbytes-nf4", "bitsandbytes-fp4", "torchao-int8", "torchao-int4")
TRAINABLE = FORMS[:-1]
GRID = [(kind, form) for kind in KINDS for form in FORMS if kind == "bert" or form not in FORMS[2::2]]
"""Every kind of backbone with every form, but for two that add little on each kind."""

LABELS = ["lost card", "weather", "opening hours"]
TEXTS = ["where is it", "will it rain tomorrow", "when do you open"]


def _wide(tiny: Backbone) -> Backbone:
    """A tiny backbone whose layers are as wide as the blocks that bitsandbytes scales together, or twice as wide."""
    config = copy.deepcopy(tiny.model.config)
    wide = {"hidden_size": 64, "d_model": 64, "intermediate_size": 128, "d_ff": 128, "d_kv": 16, "head_dim": 16}
    for name, width in wide.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, width)
    torch.manual_seed(0)
    model = type(tiny.model)(config)
    return Backbone(model, tiny.tokenizer, tiny.kind, name=tiny.name, max_length=tiny.max_length)


@cache
def _built(kind: str) -> Backbone:
    backbone = _wide(tiny_backbone(kind))
    with torch.no_grad():  # layers that matter: as they are initialised, little but the residual stream is seen
        for _, module, _ in linear_layers(backbone.model):
            module.weight.mul_(1 if kind == "t5" else 6)
    return backbone


def checkpoint(folder: Path, kind: str) -> Path:
    """Write a tiny checkpoint, unless it is there."""
    place = folder / kind
    if not place.exists():
        built = _built(kind)
        built.model.save_pretrained(place)
        built.tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tiny checkpoints."""
    return tmp_path_factory.mktemp("checkpoints")


def needs(form: str) -> None:
    """Skip where the library of a form is not installed."""
    if "-" in form:
        pytest.importorskip(form.partition("-")[0], reason=f"{form} is not installed")


def load(place: Path, form: str = "none", dtype: str = "fp32") -> Backbone:
    needs(form)
    config = BackboneConfig(str(place), device="cpu", dtype=dtype, precision="none", quantisation=form, max_length=256)  # type: ignore[arg-type]
    return Backbone.load(config)


def dequantised(backbone: Backbone, place: Path) -> Backbone:
    """The unquantised backbone with the weights that the quantised layers compute with."""
    twin = load(place)
    theirs = {name: (module, width) for name, module, width in linear_layers(backbone.model)}
    with torch.no_grad():
        for name, module, width in linear_layers(twin.model):
            layer, _ = theirs[name]
            if not is_plain(getattr(layer, "weight", None)):
                there = torch.eye(width)
                module.weight.copy_(((layer(there) - layer(-there)) / 2).T)
    return twin


def answers(backbone: Backbone) -> list[dict[str, float]]:
    return [answer.probabilities for answer in MarkupModel(backbone, "markup_letters", seed=3).classify(TEXTS, LABELS)]


def gradient(backbone: Backbone) -> Tensor:
    """The gradient of a loss at the slots with respect to the tags' soft tokens."""
    model = MarkupModel(backbone, "markup_letters", seed=3)
    episode = MarkupModel.episode(LABELS, [("I lost my card", "lost card")])
    asked = Episode(episode.options, episode.demos, (Query(TEXTS[0]),), "", "")
    prompt = model.markup.compose(asked)
    scores = backbone.candidate_logits(Batch.of_prompts([prompt], model.pad_id), model.table)
    scores.log_softmax(-1)[:, 1].sum().backward()
    assert model.table is not None
    assert model.table.rows.grad is not None
    return model.table.rows.grad.flatten()


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_counted_however_they_are_packed(form: str, checkpoints: Path) -> None:
    place = checkpoint(checkpoints, "llama")
    assert load(place, form).parameters == load(place).parameters


def test_answers_of_a_model_in_4_bits_are_those_of_its_size(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint(checkpoints, "llama")
    monkeypatch.setattr("icl_markup.answers.BINDS_LETTERS", load(place).parameters)
    assert MarkupModel(load(place, "bitsandbytes-nf4")).answers == "symbols"


@pytest.mark.parametrize(("kind", "form"), GRID)
def test_linear_layers_are_quantised_and_nothing_that_tags_depend_on_is(
    kind: str, form: str, checkpoints: Path
) -> None:
    place = checkpoint(checkpoints, kind)
    whole, backbone = load(place), load(place, form)
    assert backbone.quantisation == form
    assert any(not is_plain(module.weight) for _, module, _ in linear_layers(backbone.model))
    kept = dict(whole.model.named_parameters())
    assert torch.equal(backbone.embedding.weight, whole.embedding.weight)
    assert torch.equal(backbone.model.get_output_embeddings().weight, whole.model.get_output_embeddings().weight)
    for name, value in backbone.model.named_parameters():
        assert value.ndim > 1 or torch.equal(value, kept[name]), f"{name} is kept as it is"
    assert quantisation.stored_bytes(backbone.model) < quantisation.stored_bytes(whole.model)
    before = backbone.checksum()
    first = answers(backbone)
    assert first == answers(load(place, form)), "the same bits from a second loading"
    assert backbone.checksum() == before, "answering changes no stored bit"
    assert first != answers(whole)
    others = answers(dequantised(backbone, place))
    far = max(abs(a[name] - b[name]) for a, b in zip(first, others, strict=True) for name in LABELS)
    rounds_inputs = form in ("bitsandbytes-int8", "torchao-int4")
    assert far < (0.1 if rounds_inputs else 1e-3)


@pytest.mark.parametrize(("kind", "form"), [pair for pair in GRID if pair[1] in TRAINABLE])
def test_the_gradient_is_that_of_a_dequantised_copy(kind: str, form: str, checkpoints: Path) -> None:
    place = checkpoint(checkpoints, kind)
    backbone = load(place, form)
    check_gradients(backbone.model, torch.float32)
    ours, theirs, unquantised = gradient(backbone), gradient(dequantised(backbone, place)), gradient(load(place))
    assert theirs.norm() > 0
    rounds_inputs = form == "bitsandbytes-int8"
    assert (ours - theirs).norm() <= (0.05 if rounds_inputs else 2e-3) * theirs.norm()
    if "4" in form:
        assert (unquantised - theirs).norm() > 0.02 * theirs.norm(), "the layers matter to the gradient"


def test_a_form_without_gradients_answers_but_refuses_to_warm_up(checkpoints: Path, tmp_path: Path) -> None:
    backbone = load(checkpoint(checkpoints, "bert"), "torchao-int4")
    assert len(MarkupModel(backbone, "markup_letters").classify(TEXTS, LABELS)) == len(TEXTS)
    with pytest.raises(BackboneError, match=r"no gradient passes through .* as torchao-int4 .*bitsandbytes-nf4"):
        warm_up(tmp_path / "run", backbone=backbone)
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_zero_but_wrong_is_refused(checkpoints: Path) -> None:
    needs("torchao-int8")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    place = checkpoint(checkpoints, "llama")
    config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, quantization_config=config)
    backbone = Backbone(model, tiny_backbone("llama").tokenizer, "causal", max_length=256)
    assert gradient(backbone).norm() > 0, "the residual stream lets a gradient through"
    with pytest.raises(BackboneError, match="no gradient passes through"):
        check_gradients(model, torch.float32)
    assert backbone.quantisation.startswith("torchao-")


@pytest.mark.parametrize("form", ["bitsandbytes-int8", "bitsandbytes-nf4", "torchao-int8"])
def test_a_checkpoint_that_was_saved_quantised_says_so_itself(form: str, checkpoints: Path, tmp_path: Path) -> None:
    first = load(checkpoint(checkpoints, "llama"), form)
    first.model.save_pretrained(tmp_path / "saved")
    first.tokenizer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", "auto")
    assert again.quantisation == form
    assert again.precision == "none"
    assert again.checksum() == first.checksum()
    assert load(tmp_path / "saved", form).checksum() == first.checksum()
    for other in ("none", next(one for one in TRAINABLE if one != form)):
        with pytest.raises(BackboneError, match=f"was saved quantised \\({form}\\) and cannot be loaded with"):
            load(tmp_path / "saved", other)


def test_a_missing_library_is_one_error_with_the_command(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = checkpoint(checkpoints, "bert")
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    for form in ("bitsandbytes-nf4", "torchao-int8"):
        config = BackboneConfig(str(place), device="cpu", quantisation=form)  # type: ignore[arg-type]
        with pytest.raises(BackboneError, match=r'pip install "icl-markup\[quantisation\]"'):
            Backbone.load(config)


def test_what_does_not_go_with_quantisation_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    needs("bitsandbytes-nf4")
    place = str(checkpoint(checkpoints, "bert"))
    with pytest.raises(BackboneError, match="precision bf16 does not go with a quantised backbone; set dtype"):
        Backbone.load(BackboneConfig(place, device="cpu", precision="bf16", quantisation="bitsandbytes-nf4"))
    with pytest.raises(WarmupError, match=r"loss scaling.*backbone\.dtype to bf16 or fp32"):
        warm_up(tmp_path / "run", backbone=load(Path(place), "bitsandbytes-nf4", "fp16"))
    (tmp_path / "warmup.yaml").write_text("tasks: []\nbackbone: {quantisation: bitsandbytes-nf5}\n")
    with pytest.raises(ConfigError, match="quantisation"):
        load_config(WarmupConfig, str(tmp_path / "warmup.yaml"), [])


def test_torchao_int4_takes_bf16_on_an_accelerator(checkpoints: Path) -> None:
    needs("torchao-int4")
    settings = transformers.AutoConfig.from_pretrained(checkpoint(checkpoints, "bert"))
    with pytest.raises(BackboneError, match="not cuda with float32"):
        quantisation.loading_options("torchao-int4", settings, torch.device("cuda"), torch.float32, "x")


def gpt2(folder: Path) -> Path:
    """A tiny checkpoint whose layers are Conv1D: their weights are transposed."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer(mask=False)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_form_that_quantises_no_layer_of_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="torchao-int8 quantises none of its layers \\(Conv1D"):
        load(gpt2(tmp_path / "gpt2"), "torchao-int8")


def test_projections_are_of_the_weights_however_they_are_stored() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(24, 40)
    expected = (signs(1, 40, 8) @ layer.weight @ signs(1, 24, 7).T).item()
    value, norm = projection(layer, 24, torch.float32, 7)
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert norm == pytest.approx((layer.weight @ signs(1, 24, 7).T).norm().item(), rel=1e-5)
    conv = Conv1D(40, 24)
    with torch.no_grad():
        conv.weight.copy_(layer.weight.T)
    assert projection(conv, 24, torch.float32, 7) == pytest.approx((value, norm), rel=1e-5)
    hidden = nn.Module()
    hidden.register_parameter("packed", nn.Parameter(layer.weight.detach()))
    hidden.forward = lambda x: nn.functional.linear(x, hidden.packed, layer.bias)  # type: ignore[assignment]
    assert projection(hidden, 24, torch.float32, 7) == pytest.approx((value, norm), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_checksum_sees_codes_and_scales(form: str, checkpoints: Path) -> None:
    backbone = load(checkpoint(checkpoints, "t5"), form)
    kinds = {value.dtype for _, value in stored_tensors(backbone.model)}
    assert len(kinds) > 1
    before = backbone.checksum()
    changed = []
    for name, value in stored_tensors(backbone.model):
        if "SelfAttention.q" in name and value.is_floating_point() and value.ndim:
            value.view(-1)[0] += 1.0
            changed.append(name)
            break
    assert changed, "scales are stored beside the codes"
    assert backbone.checksum() != before


@pytest.mark.parametrize("form", ["bitsandbytes-nf4", "bitsandbytes-fp4"])
def test_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused(form: str, tmp_path: Path) -> None:
    narrow = tiny_backbone("bert")
    narrow.model.save_pretrained(tmp_path)
    narrow.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"input width \(32, 48\) is no multiple of 64; take bitsandbytes-int8"):
        load(tmp_path, form)
    assert load(tmp_path, "bitsandbytes-int8").quantisation == "bitsandbytes-int8"
