"""Receives weights inside vLLM's worker process (``--worker-extension-cls``).

The trainer writes safetensors files, or sends their shards (``transports.py``), and calls these methods over ``/collective_rpc`` with plain
JSON arguments; nothing is ever unpickled. Two calls, because an update that fails half-way leaves vLLM's model unusable:
``hetero_ppo_stage_weights`` opens the files, or takes the shards that came or were opened in the trainer's memory, checks names and shapes against the model's Hugging Face
layout and returns a checksum per tensor, with the old weights untouched; ``hetero_ppo_load_staged`` puts them in place and compares what
the engine's parameters then hold with these checksums.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle, device_id
from hetero_ppo.rollout.weights.loaded_weights import NUM_HASH_THREADS, LoadedWeights
from hetero_ppo.rollout.weights.tensor_bytes import host_checksum, lane_checksum
from hetero_ppo.rollout.weights.weight_group import Meeting, Shard, WeightGroup, join_store, num_bytes


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


@dataclass(frozen=True)
class ArrivedShard:
    """A received shard in a file of the server's own temporary directory: in shared memory, one copy for all of its workers."""

    header: dict[str, Any]
    path: Path

    def map(self) -> Tensor:
        """[bytes] uint8; the file is made where it is not."""
        return torch.from_file(str(self.path), shared=True, size=num_bytes(self.header), dtype=torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the file's bytes, by name."""
        return Shard(self.header, self.map()).tensors()


def _read_files(paths: list[str]) -> dict[str, Tensor]:
    """Views of the files' bytes, by tensor name."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.offset_keys():
                tensors[name] = file.get_tensor(name)
    return tensors


class WeightReceiver:
    """Mixed into vLLM's Worker; ``self`` is the worker. The names must not clash with the Worker's."""

    # vLLM's Worker has these:
    device: torch.device
    model_config: Any
    parallel_config: Any
    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    hetero_ppo_staged: dict[str, Tensor] | None = None
    hetero_ppo_checksums: dict[str, str] | None = None  # of the staged tensors
    #: What the first sync found: building the model's skeleton takes longer than checking the tensors.
    hetero_ppo_expected: tuple[dict[str, list[int]], set[str]] | None = None

    #: The group that shards are broadcast in; None: there is none, or this worker is no member.
    hetero_ppo_group: WeightGroup | None = None
    hetero_ppo_arrived: tuple[ArrivedShard | Shard, ...] = ()  # in files, or in the trainer's memory

    def hetero_ppo_pulse(self) -> dict[str, Any]:
        """A sign of life: the answer takes the same way as everything that the engine does (``pulse.py``)."""
        return {}

    def hetero_ppo_device(self) -> dict[str, Any]:
        """Where this worker computes, see ``cuda_ipc.device_id``."""
        return {"device": device_id(self.device)}

    @property
    def hetero_ppo_rank(self) -> int:
        """Tensor-parallel rank. Rank 0 receives for all of the server."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank()

    def hetero_ppo_join(self, meeting: dict[str, Any], rank: int | None) -> dict[str, Any]:
        """Joins the group of the trainer and one worker of each server, in place of the one that it was in.

        Args:
            meeting: a ``Meeting`` as JSON.
            rank: of this server's member in the group; None: it has none.
        """
        self.hetero_ppo_group = None
        if rank is not None and self.hetero_ppo_rank == 0:
            where = Meeting(**meeting)
            self.hetero_ppo_group = WeightGroup(join_store(where), where, rank, self.device)
        return {}

    def hetero_ppo_receive(self, header: dict[str, Any], handle: dict[str, Any] | None, index: int) -> dict[str, Any]:
        """Takes one shard into a file that all of the server's workers read: by a broadcast, or from the trainer's device memory.

        Args:
            header: its tensors, as in a safetensors file.
            handle: an ``IpcHandle`` as JSON, for a server that has no member in the group.
            index: of the shard, from 0; with 0 what came before is forgotten.
        """
        shard = ArrivedShard(header, Path(tempfile.gettempdir()) / f"hetero_ppo_shard_{index}")
        self.hetero_ppo_arrived = (*(self.hetero_ppo_arrived if index else ()), shard)
        if self.hetero_ppo_rank == 0:
            shard.path.unlink(missing_ok=True)  # not overwritten: the last version may still be mapped
            data = shard.map()
            if self.hetero_ppo_group is None:
                assert handle is not None  # the trainer sends one to servers without a member
                # Complete when it returns: the trainer's memory may then be used for something else.
                data.copy_(IpcHandle.from_json(handle).open(self.device))
            elif self.device.type == "cpu":
                self.hetero_ppo_group.broadcast(data)
            else:
                on_device = torch.empty_like(data, device=self.device)
                self.hetero_ppo_group.broadcast(on_device)
                data.copy_(on_device)
        return {}

    def hetero_ppo_open(self, header: dict[str, Any], handle: dict[str, Any], index: int) -> dict[str, Any]:
        """Opens one shard in the trainer's device memory, to be loaded from there; the trainer keeps it until that is done.

        Args:
            header: its tensors, as in a safetensors file.
            handle: an ``IpcHandle`` as JSON.
            index: of the shard, from 0; with 0 what came before is forgotten.
        """
        shard = Shard(header, IpcHandle.from_json(handle).open(self.device))
        self.hetero_ppo_arrived = (*(self.hetero_ppo_arrived if index else ()), shard)
        return {}

    @property
    def hetero_ppo_checksum(self) -> Callable[[Tensor], str]:
        """Checksum of the tensors that arrived: computed where they are."""
        in_place = any(isinstance(shard, Shard) for shard in self.hetero_ppo_arrived)
        return lane_checksum if in_place else host_checksum

    def hetero_ppo_stage_weights(self, paths: list[str] | None) -> dict[str, Any]:
        """Checks the tensors of safetensors files, or with None those that were received.

        Returns:
            ``{"problems": [...], "checksums": {name: checksum}, "verify_s": seconds}``, the last of them for the checksums;
            tensors are kept for ``hetero_ppo_load_staged`` when there is no problem.
        """
        if paths is not None:
            tensors, self.hetero_ppo_arrived = _read_files(paths), ()
        else:
            tensors = {name: tensor for shard in self.hetero_ppo_arrived for name, tensor in shard.tensors().items()}
        if self.hetero_ppo_expected is None:
            self.hetero_ppo_expected = expected_shapes(self.model_config.hf_config)
        problems = find_problems(tensors, *self.hetero_ppo_expected)
        start = time.perf_counter()
        with ThreadPoolExecutor(max_workers=NUM_HASH_THREADS) as pool:
            checksums = dict(zip(tensors, pool.map(self.hetero_ppo_checksum, tensors.values()), strict=True))
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
        checksums = self.hetero_ppo_checksums
        if tensors is None or checksums is None:
            raise RuntimeError("no weights are staged: call hetero_ppo_stage_weights first")
        checksum = self.hetero_ppo_checksum
        for shard in self.hetero_ppo_arrived:
            if isinstance(shard, ArrivedShard):  # all workers have mapped them; the last one to let go frees the memory
                shard.path.unlink(missing_ok=True)
        self.hetero_ppo_arrived = ()
        if not verify:
            self._hetero_ppo_load(tensors)
            return {"wrong": [], "unread": [], "verify_s": 0.0}
        loaded = LoadedWeights(
            self.get_model(),
            tensors,
            checksums,
            rank=self.hetero_ppo_rank,
            size=self.parallel_config.tensor_parallel_size,
            cpu=self.device.type == "cpu",
            checksum=checksum,
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
