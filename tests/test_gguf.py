"""GGUF files as backbones: what is loaded is what was written, and what cannot be loaded is one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import icl_markup.gguf as reading
from icl_markup.backbone import Backbone, BackboneConfig
from icl_markup.cache import MARKER, VARIABLE, cache_folder, checksum_of
from icl_markup.cli import main
from icl_markup.errors import BackboneError
from icl_markup.gguf import transformers_folder
from icl_markup.model import MarkupModel
from tests.gguf_models import TEMPLATE, Written, contents, original_model, original_tokenizer, rounded, write_gguf
from tests.hub_stand_in import Repo, hub_for


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def content() -> Written:
    return contents(original_model())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_1", "F16", "F32"])
def test_what_is_loaded_is_what_was_written(kind: str, cache: Path, content: Written, tmp_path: Path) -> None:
    content.kind = content.embedding = kind
    backbone = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    assert backbone.kind == "causal"
    state = backbone.model.state_dict()
    for name, weight in content.model.state_dict().items():
        assert torch.equal(state[name], rounded(weight, kind)), name


def test_an_untied_head_is_read(cache: Path, content: Written, tmp_path: Path) -> None:
    head = torch.randn_like(content.tensors["token_embd"])
    content.tensors["output"] = head
    folder = transformers_folder(str(write_gguf(tmp_path / "m.gguf", content)))
    assert torch.equal(weights(folder)["lm_head.weight"], rounded(head, content.kind))


def test_the_folder_names_its_origin_and_no_place(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    folder = transformers_folder(str(path))
    assert folder.is_relative_to(cache)
    settings = transformers.AutoConfig.from_pretrained(folder)
    assert settings.architectures == ["LlamaForCausalLM"]
    assert settings.gguf["sha256"] == checksum_of(path)
    assert (settings.gguf["linear"], settings.gguf["embedding"]) == ("q4_1", "q8_0")
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_second_load_reads_nothing_but_the_folder(
    cache: Path, content: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    first = transformers_folder(str(path))

    def refuse(*_: object) -> None:
        raise AssertionError("it is converted again")

    monkeypatch.setattr(reading, "_convert", refuse)
    assert transformers_folder(str(path)) == first
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert transformers_folder(str(copy)) == first


def test_a_file_that_changed_makes_another_folder(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    first = transformers_folder(str(path))
    content.kind = "Q8_0"
    assert transformers_folder(str(write_gguf(path, content))) != first


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "deepseek-coder"])
def test_ids_are_those_of_the_original_tokenizer(pre: str, cache: Path, tmp_path: Path) -> None:
    content = contents(original_model(), pre)
    backbone = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    original = original_tokenizer(pre)
    for text in ("I lost my card", "  two  spaces\n\nit's 1234 CAN'T", "cafe\u0301 ½ 日本 <s>x</s>", "a\tb\r\nc "):
        assert backbone.tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert backbone.tokenizer.decode(original(text)["input_ids"]) == original.decode(original(text)["input_ids"])
    assert backbone.tokenizer.get_vocab() == original.get_vocab()
    assert backbone.tokenizer.special_tokens_map == original.special_tokens_map


@pytest.mark.parametrize(("said", "pre", "prefix"), [
    (True, "smollm", (0,)), (False, "smollm", ()), (None, "smollm", ()), (None, "llama-bpe", (0,)),
])  # fmt: skip
def test_bos_is_put_where_the_file_says(
    said: bool | None, pre: str, prefix: tuple[int, ...], cache: Path, tmp_path: Path
) -> None:
    content = contents(original_model(), pre)
    del content.fields["tokenizer.ggml.add_bos_token"]
    if said is not None:
        content.fields["tokenizer.ggml.add_bos_token"] = said
    backbone = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    assert backbone.layout.prefix == prefix


def test_rows_that_only_fill_the_table_up_are_no_tokens(cache: Path, content: Written, tmp_path: Path) -> None:
    rows, width = content.tensors["token_embd"].shape
    content.tensors["token_embd"] = torch.cat([content.tensors["token_embd"], torch.randn(2, width)])
    content.fields["tokenizer.ggml.tokens"] += [f"[PAD{rows}]", f"[PAD{rows + 1}]"]
    content.fields["tokenizer.ggml.token_type"] += [5, 5]
    content.fields["llama.vocab_size"] = rows + 2
    backbone = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    assert len(backbone.tokenizer) == rows
    assert backbone.first_tag_id == rows + 2


def test_tokens_that_users_added_are_found_whole(cache: Path, content: Written, tmp_path: Path) -> None:
    index = content.fields["tokenizer.ggml.tokens"].index("card") if "card" in content.fields[
        "tokenizer.ggml.tokens"] else 400  # fmt: skip
    content.fields["tokenizer.ggml.tokens"][index] = "<|a tool ｜call|>"
    content.fields["tokenizer.ggml.token_type"][index] = 4
    content.fields["tokenizer.ggml.merges"] = [
        merge for merge in content.fields["tokenizer.ggml.merges"]
        if {*merge.split(" "), merge.replace(" ", "")} <= set(content.fields["tokenizer.ggml.tokens"])
    ]  # fmt: skip
    backbone = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    assert index in backbone.tokenizer("see <|a tool ｜call|> here")["input_ids"]
    assert index not in backbone.encoder.encode("see <|a tool ｜call|> here")


def test_the_chat_template_of_the_file_is_used(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    tokenizer = Backbone.load(BackboneConfig(str(path), device="cpu")).tokenizer
    assert tokenizer.chat_template == TEMPLATE
    del content.fields["tokenizer.chat_template"]
    without = Backbone.load(BackboneConfig(str(write_gguf(tmp_path / "n.gguf", content)), device="cpu"))
    assert without.tokenizer.chat_template is None


def test_what_lies_beside_a_file_is_not_read(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    (tmp_path / "evil.py").write_text("raise AssertionError('code was run')\n")
    beside = {"auto_map": {"AutoConfig": "evil.X", "AutoTokenizer": ["evil.X", "evil.X"]}, "vocab_size": 3}
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json"):
        (tmp_path / name).write_text(json.dumps(beside))
    assert weights(transformers_folder(str(path))).keys() == content.model.state_dict().keys() - {"lm_head.weight"}


def test_a_revision_does_not_disturb_a_file(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    assert Backbone.load(BackboneConfig(str(path), "0123abc", device="cpu")).kind == "causal"


def test_commands_take_a_file(
    cache: Path, content: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    assert main(["predict", "--backbone", str(path), "--labels", "weather", "complaint", "--chat", "--", "rain?"]) == 0
    assert '"label"' in capsys.readouterr().out


def _without(key: str) -> Callable[[Written], object]:
    return lambda content: content.fields.pop(key)


def _with(key: str, value: object) -> Callable[[Written], object]:
    return lambda content: content.fields.update({key: value})


def _architecture(content: Written) -> None:
    content.architecture = "mpt"


ERRORS = {
    "no tokenizer model": (_without("tokenizer.ggml.model"), "has no tokenizer"),
    "no vocabulary": (_without("tokenizer.ggml.tokens"), "has no tokenizer"),
    "another tokenizer": (_with("tokenizer.ggml.model", "rwkv"), "'rwkv'"),
    "no rule": (_without("tokenizer.ggml.pre"), "does not say how text is cut"),
    "an unknown rule": (_with("tokenizer.ggml.pre", "smolm"), "did you mean 'smollm'"),
    "no merges": (_without("tokenizer.ggml.merges"), "has no merges"),
    "too few types": (_with("tokenizer.ggml.token_type", [1, 1]), "not as many types"),
    "a merge of unknown tokens": (_with("tokenizer.ggml.merges", ["xxqq yyqq"]), "makes no tokenizer"),
    "one part of several": (_with("split.count", 3), "one of 3 parts"),
    "scaled positions": (_with("llama.rope.scaling.type", "linear"), "scales its rotary positions"),
    "scaled frequencies": (
        lambda content: content.tensors.update({"rope_freqs": torch.ones(8)}), "scales its rotary positions"
    ),
    "an architecture that nobody reads": (_architecture, "architecture 'mpt'"),
    "no weights": (lambda content: content.tensors.clear(), "holds no weights"),
    "parts that are no number": (_with("split.count", "three"), r"its split\.count is 'three', not a number"),
    "a BOS beyond the tokens": (
        lambda content: content.fields.update({
            "tokenizer.ggml.bos_token_id": 99_999, "tokenizer.ggml.add_bos_token": True
        }), r"its tokenizer\.ggml\.bos_token_id is 99999, but it has \d+ tokens"
    ),
    "a BOS that is a text": (
        lambda content: content.fields.update({
            "tokenizer.ggml.bos_token_id": "<s>", "tokenizer.ggml.add_bos_token": True
        }), r"its tokenizer\.ggml\.bos_token_id is '<s>', but it has"
    ),
    "an EOS beyond the tokens": (_with("tokenizer.ggml.eos_token_id", 99_999), "eos_token_id is 99999, but it has"),
    "merges that are numbers": (
        _with("tokenizer.ggml.merges", [1, 2]), r"value 0 of its tokenizer\.ggml\.merges is 1, not a text"
    ),
    "merges that are a text": (_with("tokenizer.ggml.merges", "a b"), "ggml.merges is 'a b', not a list"),
    "tokens that are numbers": (_with("tokenizer.ggml.tokens", [1, 2]), "tokens is 1, not a text"),
    "types that are texts": (
        lambda content: content.fields.update({
            "tokenizer.ggml.token_type": ["1"] * len(content.fields["tokenizer.ggml.tokens"])
        }), "token_type is '1', not a number"
    ),
    "fewer layers than it holds": (
        _with("llama.block_count", 1), r"says that it has 1 layers \(llama\.block_count\), but holds 2"
    ),
    "no number of layers": (_without("llama.block_count"), "does not say how many layers"),
    "layers that are no number": (_with("llama.block_count", "two"), r"llama\.block_count is 'two', not a number"),
    "a missing layer": (lambda content: content.tensors.pop("blk.1.ffn_up"), "finds no weights for"),
    "fewer rows than tokens": (
        lambda content: content.tensors.update(token_embd=content.tensors["token_embd"][:400]), "m.gguf: "
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_a_file_lacks_is_one_clear_error(case: str, cache: Path, content: Written, tmp_path: Path) -> None:
    change, told = ERRORS[case]
    change(content)
    path = write_gguf(tmp_path / "m.gguf", content)
    with pytest.raises(BackboneError, match=told) as caught:
        transformers_folder(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not list((cache / "gguf").glob("*/"))


@pytest.mark.parametrize("keep", [0, 3, 20, 4000, 60_000])
def test_a_file_that_is_not_whole_is_one_clear_error(keep: int, cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BackboneError, match=r"m\.gguf: (damaged, or not whole|is not a GGUF file)"):
        transformers_folder(str(path))


def test_a_file_of_something_else_is_one_clear_error(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(BackboneError, match="is not a GGUF file"):
        transformers_folder(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("name", "told"), [
    ("nowhere.gguf", "no such file; name a GGUF file"),
    ("user/repo/sub/nowhere.gguf", "sub/nowhere.gguf of the hub's user/repo: .*HF_HUB_OFFLINE"),
])  # fmt: skip
def test_a_missing_file_is_one_clear_error(name: str, told: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=told):
        Backbone.load(name)


def test_a_file_of_the_hub_is_downloaded_with_its_repository_and_path(
    cache: Path, content: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_gguf(tmp_path / "m.gguf", content).read_bytes()
    content.kind = "Q8_0"
    later = write_gguf(tmp_path / "n.gguf", content).read_bytes()
    with hub_for(monkeypatch, tmp_path / "hub") as hub:
        repository = hub.repos["user/tiny"] = Repo()
        first = repository.commit({"sub folder/m.gguf": raw, "README.md": b""})
        repository.commit({"sub folder/m.gguf": later})
        old = transformers_folder("user/tiny/sub folder/m.gguf", first)
        assert old == transformers_folder(str(tmp_path / "m.gguf"))
        assert (
            transformers_folder("user/tiny/sub folder/m.gguf") == transformers_folder(str(tmp_path / "n.gguf")) != old
        )
        with pytest.raises(BackboneError, match=r"as other\.gguf of the hub's user/tiny: "):
            transformers_folder("user/tiny/other.gguf")
        with pytest.raises(BackboneError, match="has no revision 'v9'"):
            transformers_folder("user/tiny/m.gguf", "v9")


def test_the_missing_package_is_named(
    cache: Path, content: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    monkeypatch.setattr(reading, "find_spec", lambda _: None)
    with pytest.raises(BackboneError, match=r"package gguf, which is not installed: pip install \"gguf>="):
        transformers_folder(str(path))


_LIMITED = """
import resource, sys, transformers
from icl_markup.errors import BackboneError
from icl_markup.gguf import transformers_folder
if sys.argv[3] == "tokenizer":
    transformers.PreTrainedModel.save_pretrained = lambda *_, **__: None
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    transformers_folder(sys.argv[1])
except BackboneError as error:
    print(error)
"""


@pytest.mark.parametrize(("what", "limit"), [("weights", 60_000), ("settings", 400), ("tokenizer", 5_000)])
def test_a_limit_of_the_system_is_one_clear_error(
    what: str, limit: int, cache: Path, content: Written, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    checksum = checksum_of(path)
    command = [sys.executable, "-B", "-c", _LIMITED, str(path), str(limit), what]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    told = f"{cache}/gguf/{checksum}-1: the cache cannot be written: File too large; make room, or set {VARIABLE} to "
    assert done.stdout.startswith(told) and done.stdout.count("\n") == 1, (done.stdout, done.stderr)
    assert [entry.name for entry in (cache / "gguf").iterdir() if entry.is_dir()] == []
    assert (transformers_folder(str(path)) / "tokenizer.json").is_file()


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache on a file system of its own, of 200 kB, less than the weights take in fp32."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    monkeypatch.setenv(VARIABLE, str(place))
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_clear_error(small_disk: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    told = f"{small_disk}/gguf/.*: the cache cannot be written: No space left on device; make room, or set {VARIABLE} "
    with pytest.raises(BackboneError, match=told):
        transformers_folder(str(path))
    assert [entry.name for entry in (small_disk / "gguf").iterdir() if entry.is_dir()] == []


def test_an_error_in_the_middle_leaves_nothing(
    cache: Path, content: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", _full_disk)
        with pytest.raises(BackboneError, match=f"cache cannot be written: No space left.*{VARIABLE}"):
            transformers_folder(str(path))
    assert [entry.name for entry in (cache / "gguf").iterdir() if entry.is_dir()] == []
    assert (transformers_folder(str(path)) / "tokenizer.json").is_file()


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


_KILLED = """
import os, signal, sys, transformers
from icl_markup.gguf import transformers_folder
def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
transformers.PreTrainedTokenizerFast.save_pretrained = killed
transformers_folder(sys.argv[1])
"""


def test_a_killed_process_leaves_nothing_that_is_taken_for_a_model(
    cache: Path, content: Written, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [left] = [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()]
    assert left.name.endswith(".part")
    folder = transformers_folder(str(path))
    assert (folder / "tokenizer.json").is_file()
    assert [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()] == [folder]


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _unmarked(folder: Path) -> None:
    (folder / MARKER).unlink()


def _odd(folder: Path) -> None:
    (folder / MARKER).write_text('{"sizes": [1]}')


@pytest.mark.parametrize("damage", [_without_weights, _cut, _unmarked, _odd])
def test_a_folder_that_is_not_whole_is_made_again(
    damage: Callable[[Path], None], cache: Path, content: Written, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    folder = transformers_folder(str(path))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    damage(folder)
    assert transformers_folder(str(path)) == folder
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()] == [folder]


def test_damage_that_leaves_sizes_is_named_with_the_folder(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    weights = transformers_folder(str(path)) / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    told = f"{weights}: damaged, or not whole: .*; delete {weights.parent}, which is made again when it is needed$"
    with pytest.raises(BackboneError, match=told):
        Backbone.load(BackboneConfig(str(path), device="cpu"))


def test_two_processes_at_once_make_one_folder(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    code = "import sys; from icl_markup.gguf import transformers_folder; print(transformers_folder(sys.argv[1]))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert sum(error.count(b"dequantizing") for _, error in told) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_is_named(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    cache.mkdir(mode=0o500)
    with pytest.raises(BackboneError, match=VARIABLE):
        transformers_folder(str(path))


def test_a_cache_that_is_a_file_is_named(cache: Path, content: Written, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", content)
    cache.write_text("")
    with pytest.raises(BackboneError, match=f"cache cannot be written.*{VARIABLE}"):
        transformers_folder(str(path))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "icl-markup"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "icl-markup"


def test_a_checksum_is_computed_again_where_its_note_is_damaged(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    right = checksum_of(file)
    for note in (cache / "checksums").iterdir():
        note.write_text("{")
    assert checksum_of(file) == right == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tags_are_used_on_a_file(cache: Path, content: Written, tmp_path: Path) -> None:
    model = MarkupModel.untrained(BackboneConfig(str(write_gguf(tmp_path / "m.gguf", content)), device="cpu"))
    [found] = model.classify(["will it rain"], ["weather", "complaint"])
    assert sum(found.probabilities.values()) == pytest.approx(1)
