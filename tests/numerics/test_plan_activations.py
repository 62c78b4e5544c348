"""The activation formula against what autograd really keeps for the backward pass of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.helpers.bridge_models import VOCAB, hf_model

from hetero_ppo.config.schema import ParallelConfig
from hetero_ppo.distributed import vocab_parallel
from hetero_ppo.distributed.groups import role_groups
from hetero_ppo.memory.plan_activations import (
    SLICE_ELEMENTS_CPU,
    SLICE_ELEMENTS_GPU,
    LayerWidths,
    Work,
    microbatches_in_flight,
    training_bytes,
)
from megatron_bridge.aligned import attention
from megatron_bridge.model import context_parallel
from megatron_bridge.model.config_mapping import BridgeConfig, bridge_config
from megatron_bridge.model.layers import ShortSequenceSelfAttention
from megatron_bridge.model_provider import build_model

ROWS, LENGTH = 3, 64


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Groups of one process."""
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield role_groups("actor", ParallelConfig())
    dist.destroy_process_group()


def bridge_of(case: str, dtype: torch.dtype, recompute: str | None, num_layers: int, **layout: int) -> BridgeConfig:
    config = hf_model(case, num_hidden_layers=num_layers).config.to_dict()
    bridge = bridge_config(config, dtype=dtype, recompute=recompute, **layout)
    # As on a GPU.
    bridge.transformer.bias_activation_fusion = bridge.transformer.bias_dropout_fusion = True
    return bridge


def kept_bytes(bridge: BridgeConfig, groups: Any) -> int:
    """Return the bytes of all storages, without parameters, that a forward keeps for its backward."""
    chunk = build_model(bridge, groups)[0].train()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = torch.randint(1, VOCAB, (ROWS, LENGTH))
        chunk(tokens, torch.arange(LENGTH).expand(ROWS, LENGTH), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("case", ["llama_untied", "qwen3_tied", "qwen3_moe_untied"])
def test_a_layer_keeps_what_the_formula_says(case: str, recompute: str | None, groups: Any) -> None:
    """The formula holds to the byte: two more layers keep twice a layer's bytes more. 131 tokens and sizes of 20 and 48 leave no room for luck."""
    two, four = (bridge_of(case, torch.float32, recompute, num_layers) for num_layers in (2, 4))
    grown = kept_bytes(four, groups) - kept_bytes(two, groups)
    assert grown == 2 * LayerWidths.of(four).layer(ROWS, LENGTH, recompute)


@pytest.mark.parametrize("case", ["llama_untied", "qwen3_tied"])
def test_a_float32_layer_on_cuda(case: str, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention keeps keys and values of every query head: copies of them, and no scores."""
    monkeypatch.setattr(context_parallel, "needs_whole_heads", lambda query: True)
    two, four = (bridge_of(case, torch.float32, None, num_layers) for num_layers in (2, 4))
    widths = LayerWidths.of(four, on_cuda=True)
    assert widths.whole_heads and not LayerWidths.of(four).whole_heads
    assert kept_bytes(four, groups) - kept_bytes(two, groups) == 2 * widths.layer(ROWS, LENGTH, None)


def test_work_on_cuda_is_planned_with_whole_heads_in_float32_alone() -> None:
    """2 rows of 64 tokens in a layer of 48 hidden channels, 4 query heads of 12 and 2 groups: 2 x 48 more for keys and values, and
    without the product of 48 + 2 x 24 and the rotated keys of 24."""
    for dtype, grown in ((torch.float32, 4 * 2 * 64 * (96 - 96 - 24)), (torch.bfloat16, 0)):
        bridge = bridge_of("llama_untied", dtype, None, 1)
        planned = [
            training_bytes(bridge, "value", None, 0, Work(2, 64, 1, on_cuda=on_cuda)) for on_cuda in (False, True)
        ]
        assert planned[1] - planned[0] == grown


@pytest.mark.parametrize("case", ["llama_untied", "qwen3_tied", "qwen3_moe_untied"])
def test_a_bf16_layer(case: str, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU attention keeps fp32 copies of its inputs and its output, and not the bf16 ones that a GPU keeps."""
    monkeypatch.setattr(ShortSequenceSelfAttention, "MAX_SEQUENCE", 0)  # a CPU's own
    two, four = (bridge_of(case, torch.bfloat16, None, num_layers) for num_layers in (2, 4))
    widths = LayerWidths.of(four)
    query, key = widths.query, widths.key
    on_a_cpu = 4 * (query + 2 * key) + 4 * query + 2 * query
    on_a_cpu += 2 * (query + 2 * key) if widths.qk_norm else 0  # the qkv product, of which the keys are a view
    on_a_gpu = 2 * (query + 2 * key) + 2 * (query + key) + 2 * query
    grown = kept_bytes(four, groups) - kept_bytes(two, groups)
    assert grown == 2 * (widths.layer(ROWS, LENGTH, None) + ROWS * LENGTH * (on_a_cpu - on_a_gpu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama_untied", "qwen3_tied"])
def test_an_aligned_layer(case: str, dtype: torch.dtype, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT", 0)  # as in longer sequences
    two, four = (bridge_of(case, dtype, None, num_layers, aligned=True) for num_layers in (2, 4))
    grown = kept_bytes(four, groups) - kept_bytes(two, groups)
    assert grown == 2 * LayerWidths.of(four).layer(ROWS, LENGTH, None)


def test_pipeline_stages_hold_fewer_microbatches_towards_the_end() -> None:
    """PP 4 of 8 layers: 4, 3, 2, 1 micro-batches in flight; never more than there are."""
    bridge = bridge_of("llama_untied", torch.float32, None, 8, pipeline=4)
    assert [microbatches_in_flight(bridge, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [microbatches_in_flight(bridge, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    first, last = (training_bytes(bridge, "value", None, stage, Work(2, 64, 16)) for stage in (0, 3))
    assert 3 < first / last < 4  # four times the layers' bytes, and the last stage's norm and head

    # Interleaved, two chunks a stage: 2 x (stages behind) + 1 chunk x 4 stages + the one that computes.
    interleaved = bridge_of("llama_untied", torch.float32, None, 8, pipeline=4, virtual_pipeline=2)
    assert [microbatches_in_flight(interleaved, stage, 16) for stage in range(4)] == [11, 9, 7, 5]
    assert microbatches_in_flight(interleaved, 0, 4) == 8


def test_slices_are_those_of_the_log_probs() -> None:
    assert SLICE_ELEMENTS_GPU == vocab_parallel._CHUNK_ELEMENTS_GPU
    assert SLICE_ELEMENTS_CPU == vocab_parallel._CHUNK_ELEMENTS_CPU
