"""What accelerate's configuration says of split models is read and checked, whether or not DeepSpeed is installed."""

from __future__ import annotations

import importlib.metadata
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from icl_markup import zero
from icl_markup.errors import BackboneError
from icl_markup.sharded import is_sharded, shards_layers, whole
from tests.conftest import tiny_backbone

PREFIX = "ACCELERATE_DEEPSPEED_"


def test_fsdp_2_is_taken_with_every_process_reading_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shards_layers()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value, message in (
        ("FSDP_VERSION", "1", "fsdp_version to 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading to false"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("FSDP_VERSION", "2")
            patch.setenv(name, value)
            with pytest.raises(BackboneError, match=message):
                shards_layers()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert not shards_layers()  # there is nobody to share with
    backbone = tiny_backbone("bert")
    assert not is_sharded(backbone.model)
    table = next(backbone.embedding.parameters())
    assert whole(table) is table


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process as `accelerate launch` starts it with configs/accelerate/zero3.yaml, where DeepSpeed is installed."""
    for name in (zero._OURS, PREFIX + "CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(PREFIX + "ZERO_STAGE", "3")
    monkeypatch.setenv(PREFIX + "OFFLOAD_PARAM_DEVICE", "none")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.10")
    return monkeypatch


def test_our_configuration_is_taken(told: pytest.MonkeyPatch) -> None:
    zero.check()
    assert not shards_layers()  # nobody has joined


def test_deepspeed_is_not_asked_for_by_itself(told: pytest.MonkeyPatch) -> None:
    told.delenv("ACCELERATE_USE_DEEPSPEED")
    assert not zero.is_told()
    zero.hide_from_accelerate()
    assert zero._OURS not in os.environ


def test_without_deepspeed_the_message_says_how_to_install_it(told: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    told.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BackboneError, match=r'not installed: pip install "icl-markup\[deepspeed\]"'):
        shards_layers()
    told.setattr(importlib.metadata, "version", lambda name: "0.19.0")
    with pytest.raises(BackboneError, match=r"older than 0.19.4: pip install"):
        shards_layers()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZERO_STAGE", "2", "stage 2 .*set deepspeed_config.zero_stage to 3"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "on nvme, .*set deepspeed_config.offload_param_device"),
    ],
)
def test_what_does_not_work_is_refused(told: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    told.setenv(PREFIX + name, value)
    with pytest.raises(BackboneError, match=message):
        shards_layers()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, None),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "ds.json asks for weights on nvme, .*set zero_optimization.offload_param.device",
        ),
        ({"zero_optimization": {"stage": 1}}, "ds.json asks for ZeRO stage 1 .*set zero_optimization.stage to 3"),
        ({"zero_optimization": {"stage": "auto"}}, "stage 0"),
        ({"zero_optimization": 3}, "ds.json: no configuration"),
        ({"stage": 3}, "ds.json: no configuration"),
        ([], "ds.json: no configuration"),
        (None, "--deepspeed_config_file .*ds.json: No such file"),
    ],
)
def test_a_file_of_deepspeed_s_goes_before_accelerate_s_own(
    told: pytest.MonkeyPatch, tmp_path: Path, content: Any, message: str | None
) -> None:
    told.setenv(PREFIX + "ZERO_STAGE", "2")
    told.setenv(PREFIX + "CONFIG_FILE", str(tmp_path / "ds.json"))
    if content is not None:
        (tmp_path / "ds.json").write_text(json.dumps(content))
    if message is None:
        zero.check()
        return
    with pytest.raises(BackboneError, match=message):
        zero.check()


def test_accelerate_does_not_learn_of_deepspeed_and_we_still_know(told: pytest.MonkeyPatch) -> None:
    told.setenv(zero._OURS, "false")  # so that it is as before in the end
    zero.hide_from_accelerate()
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"
    assert zero.is_told()
    told.setenv(PREFIX + "ZERO_STAGE", "2")
    with pytest.raises(BackboneError, match="stage 2"):
        shards_layers()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_reads_the_settings_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    monkeypatch.setenv(PREFIX + "CONFIG_FILE", str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": "auto"}}))
    config = zero._config()
    assert (config.max_reuse_distance, config.param_persistence_threshold, config.offload_param) == (0, 0, None)
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_reuse_distance": 7}}))
    assert zero._config().max_reuse_distance == 7
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "nonsense": 1}}))
    with pytest.raises(BackboneError, match=r"ds\.json: zero_optimization\.nonsense: "):
        zero._config()
