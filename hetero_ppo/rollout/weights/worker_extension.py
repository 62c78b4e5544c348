"""Receives weights inside vLLM's worker process (``--worker-extension-cls``).

The trainer writes safetensors files, or sends buckets (``transports.py``), and calls these methods over ``/collective_rpc`` with plain
JSON arguments; nothing is ever unpickled. Every message names its target, the model that the weights are for, and a handler per target
does the work. Two calls are needed because an update that fails half-way leaves vLLM's model unusable:

- ``hetero_ppo_stage_weights`` takes the files or the buckets that arrived, compares names and shapes with the model's Hugging Face
  layout and returns a checksum per tensor. The old weights stay as they are.
- ``hetero_ppo_load_staged`` puts the tensors in place and compares what the model's parameters then hold with these checksums.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from hetero_ppo.rollout.weights.bucket import Bucket, num_bytes
from hetero_ppo.rollout.weights.cuda_ipc import IpcHandle, device_id
from hetero_ppo.rollout.weights.loaded_weights import NUM_HASH_THREADS, LoadedWeights
from hetero_ppo.rollout.weights.targets import POLICY, check_target
from hetero_ppo.rollout.weights.tensor_bytes import checksum_on
from hetero_ppo.rollout.weights.weight_group import Rendezvous, WeightGroup, join_store

CPU = torch.device("cpu")


def expected_shapes(hf_config: Any) -> tuple[dict[str, list[int]], set[str]]:
    """Return the name and shape of a checkpoint's tensors, and the names that may be left out because they are tied to others."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    shapes: dict[str, list[int]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= checkpoint_shapes(name, list(tensor.shape))
    tied = {"lm_head.weight"} if hf_config.tie_word_embeddings else set()
    return shapes, tied


def checkpoint_shapes(name: str, shape: list[int]) -> dict[str, list[int]]:
    """Return name and shape of a model's tensor in a checkpoint: transformers holds all experts of a layer in one tensor."""
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
    """Return one sentence for each tensor that does not fit the model."""
    problems = [f"missing tensor {name!r}" for name in sorted(shapes.keys() - received.keys() - optional)]
    problems += [f"unknown tensor {name!r}" for name in sorted(received.keys() - shapes.keys())]
    for name in sorted(received.keys() & shapes.keys()):
        if list(received[name].shape) != shapes[name]:
            problems.append(f"tensor {name!r} has shape {list(received[name].shape)}, expected {shapes[name]}")
    return problems


def repack_experts(model: torch.nn.Module) -> None:
    """Make the next load pack the experts' weights for the CPU kernel, as the first one did.

    vLLM packs them when it builds that kernel, and it builds the kernel once. Later weights would be copied unpacked to where the
    kernel expects packed ones.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.quant_method.moe_kernel = None


@dataclass(frozen=True)
class BucketFile:
    """A received bucket in a file of the server's own temporary directory: in shared memory, one copy for all of its workers."""

    header: dict[str, Any]
    path: Path

    def map(self) -> Tensor:
        """Return [bytes] uint8. The file is created where it does not exist."""
        return torch.from_file(str(self.path), shared=True, size=num_bytes(self.header), dtype=torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """Return views of the file's bytes, by tensor name."""
        return Bucket(self.header, self.map()).tensors()


def _read_files(paths: list[str]) -> dict[str, Tensor]:
    """Return views of the files' bytes, by tensor name."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.offset_keys():
                tensors[name] = file.get_tensor(name)
    return tensors


class VllmWorker(Protocol):
    """The parts of vLLM's Worker that are used here."""

    device: torch.device
    model_config: Any
    parallel_config: Any
    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    @property
    def hetero_ppo_rank(self) -> int:
        """Tensor-parallel rank. Rank 0 joins the trainer's group."""


class PolicyHandler:
    """Stages and loads the weights of the model that answers prompts.

    Args:
        worker: vLLM's worker.
    """

    def __init__(self, worker: VllmWorker) -> None:
        self.worker = worker
        self.arrived: tuple[BucketFile | Bucket, ...] = ()
        self.staged: dict[str, Tensor] | None = None
        self.checksums: dict[str, str] = {}  # of the staged tensors
        self._expected: tuple[dict[str, list[int]], set[str]] | None = None

    @property
    def expected(self) -> tuple[dict[str, list[int]], set[str]]:
        """Shapes of the model's tensors, see ``expected_shapes``. They are kept: finding them takes longer than checking tensors."""
        if self._expected is None:
            self._expected = expected_shapes(self.worker.model_config.hf_config)
        return self._expected

    def receive(self, header: dict[str, Any], handle: IpcHandle | None, index: int, group: WeightGroup | None) -> None:
        """Take one bucket, see ``WeightReceiver.hetero_ppo_receive``."""
        worker = self.worker
        before = self.arrived if index else ()
        if worker.parallel_config.tensor_parallel_size == 1:
            self.arrived = (*before, Bucket(header, self._taken(header, handle, group)))
            return
        shared = BucketFile(header, Path(tempfile.gettempdir()) / f"hetero_ppo_{POLICY}_{index}")
        self.arrived = (*before, shared)
        if worker.hetero_ppo_rank == 0:
            shared.path.unlink(missing_ok=True)  # not overwritten, because the last version may still be mapped
            # The copy is complete when it returns. From then on the trainer may use its memory for something else.
            shared.map().copy_(self._taken(header, handle, group))

    def _taken(self, header: dict[str, Any], handle: IpcHandle | None, group: WeightGroup | None) -> Tensor:
        """Return the bytes of a bucket on the worker's device: the trainer's own memory, or memory that was broadcast to."""
        if group is None:
            assert handle is not None  # the trainer sends one to workers that are not in the group
            return handle.open(self.worker.device)
        data = torch.empty(num_bytes(header), dtype=torch.uint8, device=self.worker.device)
        group.broadcast(data)
        return data

    def stage(self, paths: list[str] | None) -> dict[str, Any]:
        """Check tensors, see ``WeightReceiver.hetero_ppo_stage_weights``."""
        if paths is not None:
            self.arrived = ()
            tensors = _read_files(paths)
        else:
            tensors = {name: tensor for bucket in self.arrived for name, tensor in bucket.tensors().items()}
        problems = find_problems(tensors, *self.expected)
        start = time.perf_counter()
        checksum = self.checksum
        with ThreadPoolExecutor(max_workers=NUM_HASH_THREADS) as pool:
            checksums = dict(zip(tensors, pool.map(checksum, tensors.values()), strict=True))
        seconds = time.perf_counter() - start
        self.staged, self.checksums = (None, {}) if problems else (tensors, checksums)
        return {"problems": problems, "checksums": checksums, "verify_s": seconds}

    @property
    def checksum(self) -> Callable[[Tensor], str]:
        """Checksum of the tensors that arrived, computed where they are."""
        on_device = any(isinstance(bucket, Bucket) for bucket in self.arrived)
        return checksum_on(self.worker.device if on_device else CPU)

    def load(self, verify: bool) -> dict[str, Any]:
        """Load staged tensors, see ``WeightReceiver.hetero_ppo_load_staged``."""
        tensors, self.staged = self.staged, None
        if tensors is None:
            raise RuntimeError("no weights are staged: call hetero_ppo_stage_weights first")
        checksum = self.checksum
        for bucket in self.arrived:
            if isinstance(bucket, BucketFile):  # all workers have mapped it; the last one to close it frees the memory
                bucket.path.unlink(missing_ok=True)
        self.arrived = ()
        if not verify:
            self._load(tensors)
            return {"wrong": [], "unread": [], "verify_s": 0.0}
        worker = self.worker
        loaded = LoadedWeights(
            worker.get_model(),
            tensors,
            self.checksums,
            rank=worker.hetero_ppo_rank,
            size=worker.parallel_config.tensor_parallel_size,
            cpu=worker.device.type == "cpu",
            checksum=checksum,
        )
        with loaded.watching():
            self._load(tensors)
        return {"wrong": loaded.wrong, "unread": loaded.unread, "verify_s": loaded.seconds}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        worker = self.worker
        if worker.device.type == "cpu":
            repack_experts(worker.get_model())
        worker.reload_weights(weights_iterator=iter(tensors.items()))
        if worker.model_config.hf_config.tie_word_embeddings:
            # On the CPU a layer computes from a packed copy of its weight. vLLM packs those that it loaded, and of a tied
            # matrix it loads only the input side. Without this, logits stay those of the first weights.
            head = worker.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)


#: Target -> its handler.
HANDLERS = {POLICY: PolicyHandler}


class WeightReceiver:
    """Mixed into vLLM's Worker; ``self`` is the worker. The names must not clash with the Worker's."""

    # vLLM's Worker has these:
    device: torch.device
    model_config: Any
    parallel_config: Any
    get_model: Callable[[], Any]
    reload_weights: Callable[..., None]

    #: Group that buckets are broadcast in. None: there is none, or this worker is no member.
    hetero_ppo_group: WeightGroup | None = None
    hetero_ppo_handlers: dict[str, PolicyHandler] | None = None  # by target; None before the first message

    def hetero_ppo_pulse(self) -> dict[str, Any]:
        """Give a sign of life. The answer takes the same way as everything that the server does (``pulse.py``)."""
        return {}

    def hetero_ppo_device(self) -> dict[str, Any]:
        """Return the device that this worker computes on, see ``cuda_ipc.device_id``."""
        return {"device": device_id(self.device)}

    @property
    def hetero_ppo_rank(self) -> int:
        """Tensor-parallel rank. Rank 0 joins the trainer's group."""
        from vllm.distributed import get_tensor_model_parallel_rank

        return get_tensor_model_parallel_rank()

    def _hetero_ppo_handler(self, target: str) -> PolicyHandler:
        """Return the handler of a target.

        Raises:
            ValueError: There is no such target.
        """
        check_target(target)
        if self.hetero_ppo_handlers is None:
            self.hetero_ppo_handlers = {name: handler(self) for name, handler in HANDLERS.items()}
        return self.hetero_ppo_handlers[target]

    def hetero_ppo_join(self, rendezvous: dict[str, Any], rank: int | None) -> dict[str, Any]:
        """Join the group of the trainer and one worker of each server, in place of the group before.

        Args:
            rendezvous: A ``Rendezvous`` as JSON.
            rank: Rank of this server's member in the group. None: it has no member.
        """
        self.hetero_ppo_group = None
        if rank is not None and self.hetero_ppo_rank == 0:
            where = Rendezvous(**rendezvous)
            self.hetero_ppo_group = WeightGroup(join_store(where), where, rank, self.device)
        return {}

    def hetero_ppo_receive(
        self, target: str, header: dict[str, Any], handle: dict[str, Any] | None, index: int
    ) -> dict[str, Any]:
        """Take one bucket. The only worker of a server keeps it on its device; several workers share it in a file of the host.

        Args:
            target: Model that the tensors are for.
            header: Names, dtypes, shapes and places of the tensors, as in a safetensors file.
            handle: An ``IpcHandle`` of the trainer's memory as JSON, for a server without a member in the group. The trainer keeps
                that memory until the tensors are loaded.
            index: Number of the bucket, from 0. Bucket 0 replaces all that came before.
        """
        opened = None if handle is None else IpcHandle.from_json(handle)
        self._hetero_ppo_handler(target).receive(header, opened, index, self.hetero_ppo_group)
        return {}

    def hetero_ppo_stage_weights(self, target: str, paths: list[str] | None) -> dict[str, Any]:
        """Check the tensors of safetensors files, or of the buckets that were received.

        Args:
            target: Model that the tensors are for.
            paths: Files. None: the buckets.

        Returns:
            ``{"problems": [...], "checksums": {name: checksum}, "verify_s": seconds}``, the last of them for the checksums.
            Without a problem the tensors are kept for ``hetero_ppo_load_staged``.
        """
        return self._hetero_ppo_handler(target).stage(paths)

    def hetero_ppo_load_staged(self, target: str, verify: bool) -> dict[str, Any]:
        """Replace a model's weights with the staged ones.

        Args:
            target: Model that they are for.
            verify: Whether to compare what the model's parameters hold afterwards with the staged tensors' checksums.

        Returns:
            ``{"wrong": names, "unread": names, "verify_s": seconds}``: the tensors that the parameters hold otherwise, and those that
            were found in no parameter.

        Raises:
            RuntimeError: Nothing is staged.
        """
        return self._hetero_ppo_handler(target).load(verify)
