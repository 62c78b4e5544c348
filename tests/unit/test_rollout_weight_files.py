"""Weight files: what is written is what arrives, and what does not fit the model is named."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hetero_ppo.config.schema import Dtype
from hetero_ppo.rollout.weights import weight_version
from hetero_ppo.rollout.weights.tensor_bytes import tensor_checksum
from hetero_ppo.rollout.weights.weight_version import remove_files, take_weights
from hetero_ppo.rollout.weights.worker_extension import WeightReceiver, expected_shapes, find_problems

TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def stream(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tensors.items()


def test_views_of_one_buffer_arrive_in_the_engine_dtype(tmp_path: Path) -> None:
    buffer = torch.randn(40, generator=torch.Generator().manual_seed(0))
    tensors = {"a": buffer[:12].view(3, 4), "b": buffer[12:40].view(7, 4).t(), "scalar": torch.tensor(2.5)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        files = take_weights(tmp_path / name, stream(tensors), "v1", Dtype(name))
        loaded = load_file(files.paths[0])
        assert list(loaded) == list(files.checksums) or set(loaded) == set(files.checksums)
        for key, tensor in tensors.items():
            assert torch.equal(loaded[key], tensor.to(dtype))
            assert tensor_checksum(loaded[key]) == files.checksums[key]


def test_shards_are_private_and_appear_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_version, "SHARD_BYTES", 100)
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}
    seen: list[bool] = []

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors.items():
            seen.append((tmp_path / "w").exists())
            yield item

    files = take_weights(tmp_path / "w", watched(), "v1", Dtype.fp32)
    assert not any(seen) and len(files.paths) == 3
    loaded = {name: tensor for path in files.paths for name, tensor in load_file(path).items()}
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.paths} == {0o600}
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == 0o700
    remove_files(files)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_without_tensors_or_with_one_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'v1': the stream has no tensors"):
        take_weights(tmp_path / "a", iter([]), "v1", Dtype.fp32)
    with pytest.raises(ValueError, match="tensor 'x' comes twice"):
        take_weights(tmp_path / "b", iter([("x", torch.zeros(1))] * 2), "v1", Dtype.fp32)
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_sees_one_changed_bit() -> None:
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(1))
    changed = tensor.clone()
    changed.view(torch.int32)[17] ^= 1
    assert tensor_checksum(tensor) != tensor_checksum(changed)


@pytest.mark.parametrize("tied", [False, True])
def test_expected_names_are_those_of_the_checkpoint(tied: bool) -> None:
    for config in (
        LlamaConfig(**TINY, tie_word_embeddings=tied),
        Qwen3Config(**TINY, head_dim=4, tie_word_embeddings=tied),
    ):
        shapes, optional = expected_shapes(config)
        assert shapes["model.embed_tokens.weight"] == [16, 8]
        assert shapes["model.layers.1.self_attn.k_proj.weight"] == [4, 8]
        assert optional == ({"lm_head.weight"} if tied else set())
        whole = {name: torch.zeros(shape) for name, shape in shapes.items()}
        assert find_problems(whole, shapes, optional) == []
        del whole["lm_head.weight"]
        assert find_problems(whole, shapes, optional) == ([] if tied else ["missing tensor 'lm_head.weight'"])


def test_experts_have_their_names_in_the_checkpoint(tmp_path: Path) -> None:
    """transformers holds a layer's experts in one tensor, and saves them apart."""
    config = Qwen3MoeConfig(**TINY, head_dim=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=6)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
    assert expected_shapes(config)[0] == saved


def test_every_wrong_tensor_is_named() -> None:
    received = {"a": torch.zeros(2, 3), "c": torch.zeros(1)}
    problems = find_problems(received, {"a": [3, 2], "b": [1]}, set())
    assert problems == ["missing tensor 'b'", "unknown tensor 'c'", "tensor 'a' has shape [2, 3], expected [3, 2]"]


def test_nothing_is_loaded_that_was_not_staged() -> None:
    with pytest.raises(RuntimeError, match="no weights are staged"):
        WeightReceiver().hetero_ppo_load_staged("policy", verify=True)
