"""What accelerate's configuration says of split models is read and checked."""

from __future__ import annotations

import pytest

from icl_markup.errors import BackboneError
from icl_markup.processes import Processes
from icl_markup.sharded import is_sharded, offloads_layers, shards_layers, whole
from tests.conftest import tiny_backbone


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


def test_the_shares_of_one_process_may_lie_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert not offloads_layers()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert offloads_layers()


def test_deepspeed_is_refused_with_what_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(BackboneError, match=r"asks for DeepSpeed; .*fsdp2\.yaml, .*fsdp_offload_params true"):
        Processes.joined(on_cpu=True)
