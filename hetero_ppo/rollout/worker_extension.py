"""Receives weights inside vLLM's worker process (``--worker-extension-cls``).

The trainer writes safetensors files and calls these methods over ``/collective_rpc`` with plain JSON arguments; nothing is ever
unpickled. Two calls, because an update that fails half-way leaves vLLM's model unusable: ``hetero_ppo_stage_weights`` opens the
files, checks names and shapes against the model's Hugging Face layout and returns a checksum per tensor, with the old weights
untouched; ``hetero_ppo_load_staged`` puts them in place.
"""

from __future__ import annotations

import ctypes
import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, which must outlive the view.

    Not by way of numpy: ``Tensor.numpy`` marks the storage as never to be resized, and these are views of live parameters,
    whose storage is released when their role leaves the device.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    num_bytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


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
    #: What the first sync found: building the model's skeleton takes longer than checking the tensors.
    hetero_ppo_expected: tuple[dict[str, list[int]], set[str]] | None = None

    def hetero_ppo_stage_weights(self, paths: list[str]) -> dict[str, Any]:
        """Reads and checks the tensors of safetensors files.

        Returns:
            ``{"problems": [...], "checksums": {name: sha256}}``; tensors are kept for ``hetero_ppo_load_staged`` when there is
            no problem.
        """
        tensors: dict[str, Tensor] = {}
        for path in paths:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.offset_keys():
                    tensors[name] = file.get_tensor(name)
        if self.hetero_ppo_expected is None:
            self.hetero_ppo_expected = expected_shapes(self.model_config.hf_config)
        problems = find_problems(tensors, *self.hetero_ppo_expected)
        with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
            checksums = dict(zip(tensors, pool.map(tensor_checksum, tensors.values())))
        self.hetero_ppo_staged = None if problems else tensors
        return {"problems": problems, "checksums": checksums}

    def hetero_ppo_load_staged(self) -> dict[str, Any]:
        """Replaces the model's weights with the staged ones.

        Raises:
            RuntimeError: nothing is staged.
        """
        tensors, self.hetero_ppo_staged = self.hetero_ppo_staged, None
        if tensors is None:
            raise RuntimeError("no weights are staged: call hetero_ppo_stage_weights first")
        if self.device.type == "cpu":
            repack_experts(self.get_model())
        self.reload_weights(weights_iterator=iter(tensors.items()))
        if self.model_config.hf_config.tie_word_embeddings:
            # On the CPU a layer computes from a packed copy of its weight. vLLM packs those that it loaded, and of a tied
            # matrix it loads the input side alone: without this, logits are those of the first weights for ever.
            head = self.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)
        return {"loaded": len(tensors)}
