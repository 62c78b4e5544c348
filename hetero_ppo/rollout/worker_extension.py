"""Receives weights inside vLLM's worker process (``--worker-extension-cls``).

The trainer writes safetensors files and calls these methods over ``/collective_rpc`` with plain JSON arguments; nothing is ever
unpickled. Two calls, because an update that fails half-way leaves vLLM's model unusable: ``hetero_ppo_stage_weights`` opens the
files, checks names and shapes against the model's Hugging Face layout and returns a checksum per tensor, with the old weights
untouched; ``hetero_ppo_load_staged`` puts them in place and compares what the engine's parameters then hold with these checksums.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hetero_ppo.rollout.loaded_weights import NUM_HASH_THREADS, LoadedWeights
from hetero_ppo.rollout.tensor_bytes import tensor_checksum


def expected_shapes(hf_config: Any) -> tuple[dict[str, list[int]], set[str]]:
    """Name -> shape of a checkpoint's tensors, and the names that may be left out because they are tied to others."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    shapes: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= checkpoint_shapes(name, list(tensor.shape))
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    return shapes, tied


def checkpoint_shapes(name: str, shape: list[int]) -> dict[str, list[int]]:
    """Name -> shape of what a model's tensor is in a checkpoint: transformers holds all experts of a layer in one tensor."""
    layer, found, kind = name.partition(".mlp.experts.")
    if not found:
        return {name: shape}
    num_experts, rows, columns = shape
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return {
        f"{layer}.mlp.experts.{expert}.{part}.weight": [rows // len(parts), columns]
        for expert in range(num_experts)
        for part in parts
    }


def find_problems(received: dict[str, Tensor], shapes: dict[str, list[int]], optional: set[str]) -> list[str]:
    """What is wrong with a set of tensors, one sentence per tensor."""
    problems = [f"missing tensor {name!r}" for name in sorted(shapes.keys() - received.keys() - optional)]
    problems += [f"unknown tensor {name!r}" for name in sorted(received.keys() - shapes.keys())]
    for name in sorted(received.keys() & shapes.keys()):
        if list(received[name].shape) != shapes[name]:
            problems.append(f"tensor {name!r} has shape {list(received[name].shape)}, expected {shapes[name]}")
    return problems


def repack_experts(model: torch.nn.Module) -> None:
    """Make the next load pack the experts' weights for the CPU kernel, as the first one did.

    vLLM packs them where it builds that kernel, and it builds one kernel alone: weights that come later would be copied, unpacked,
    to where the kernel looks for packed ones.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


class WeightReceiver:
    """Mixed into vLLM's Worker; ``self`` is the worker. The names must not clash with the Worker's."""

    hetero_ppo_staged: dict[str, Tensor] | None = None
    hetero_ppo_checksums: dict[str, str] | None = None  # of the staged tensors
    #: What the first sync found: building the model's skeleton takes longer than checking the tensors.
    hetero_ppo_expected: tuple[dict[str, list[int]], set[str]] | None = None

    def hetero_ppo_stage_weights(self, paths: list[str]) -> dict[str, Any]:
        """Reads and checks the tensors of safetensors files.

        Returns:
            ``{"problems": [...], "checksums": {name: checksum}, "verify_s": seconds}``, the last of them for the checksums;
            tensors are kept for ``hetero_ppo_load_staged`` when there is no problem.
        """
        tensors: dict[str, Tensor] = {}
        for path in paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.offset_keys():
                    tensors[name] = file.get_tensor(name)
        if self.hetero_ppo_expected is None:
            self.hetero_ppo_expected = expected_shapes(self.model_config.hf_config)
        problems = find_problems(tensors, *self.hetero_ppo_expected)
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=NUM_HASH_THREADS) as pool:
            checksums = dict(zip(tensors, pool.map(tensor_checksum, tensors.values()), strict=True))
        seconds = time.perf_counter() - start
        self.hetero_ppo_staged = None if problems else tensors
        self.hetero_ppo_checksums = None if problems else checksums
        return {"problems": problems, "checksums": checksums, "verify_s": seconds}

    def hetero_ppo_load_staged(self, verify: bool) -> dict[str, Any]:
        """Replaces the model's weights with the staged ones.

        Args:
            verify: compare what lies in the model's parameters with the staged tensors' checksums.

        Returns:
            ``{"wrong": names, "unread": names, "verify_s": seconds}``: tensors that the parameters hold otherwise, and not at all.

        Raises:
            RuntimeError: nothing is staged.
        """
        tensors, self.hetero_ppo_staged = self.hetero_ppo_staged, None
        if tensors is None:
            raise RuntimeError("no weights are staged: call hetero_ppo_stage_weights first")
        if not verify:
            self._hetero_ppo_load(tensors)
            return {"wrong": [], "unread": [], "verify_s": 0.0}
        from vllm.distributed import get_tensor_model_parallel_rank

        loaded = LoadedWeights(
            self.get_model(),
            tensors,
            self.hetero_ppo_checksums,
            rank=get_tensor_model_parallel_rank(),
            size=self.parallel_config.tensor_parallel_size,
            cpu=self.device.type == "cpu",
        )
        with loaded.watching():
            self._hetero_ppo_load(tensors)
        return {"wrong": loaded.wrong, "unread": loaded.unread, "verify_s": loaded.seconds}

    def _hetero_ppo_load(self, tensors: dict[str, Tensor]) -> None:
        if self.device.type == "cpu":
            repack_experts(self.get_model())
        self.reload_weights(weights_iterator=iter(tensors.items()))
        if self.model_config.hf_config.tie_word_embeddings:
            # On the CPU a layer computes from a packed copy of its weight. vLLM packs those that it loaded, and of a tied
            # matrix it loads the input side alone: without this, logits are those of the first weights for ever.
            head = self.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)
