"""One role's model on this rank: building, loading, forward passes and export in the role's own layout.

Every rank holds all rows of a batch on the host, computes those of its data-parallel rank, and gets the results of all rows.
Therefore no data has to be converted from one role's layout to another's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hetero_ppo.config.devices import with_dtype
from hetero_ppo.config.schema import Dtype, HeadedModelConfig, HeadInit, ModelConfig, ResidencyConfig, RoleConfig
from hetero_ppo.disk import writing
from hetero_ppo.distributed.groups import is_last_stage, last_stage_rank, role_groups
from hetero_ppo.engines.layouts import role_bridge
from hetero_ppo.engines.microbatches import (
    MicrobatchSize,
    cut,
    deal,
    same_shape,
    split,
    to_columns,
    with_fillers,
)
from hetero_ppo.engines.model_input import ModelInput, in_place, model_inputs
from hetero_ppo.engines.outputs import OutputFn
from hetero_ppo.engines.parameter_gather import ParameterGather
from hetero_ppo.engines.residency import RoleResidency
from hetero_ppo.engines.role_reading import load_role
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.step.kinds import FORWARD, OPTIMIZER, Kind
from hetero_ppo.types import Microbatch
from megatron_bridge import platform
from megatron_bridge.model.config_mapping import VOCAB_PARTS, BridgeConfig
from megatron_bridge.model.layers import uses_transformer_engine
from megatron_bridge.model_provider import Head, build_model
from megatron_bridge.weights.export_hf import export_bytes, save_hf
from megatron_bridge.weights.import_hf import LoadReport, load_hf
from megatron_bridge.weights.stream import stream_hf

#: On a CPU, padded lengths of bf16 micro-batches are a multiple of this.
BF16_CPU_LENGTHS = 16
#: On a CPU, the tokens of packed bf16 micro-batches, and the tokens that the head computes, are a multiple of this.
PACKED_BF16_CPU_TOKENS = 64


@dataclass(frozen=True)
class RoleModel:
    """Result of building a role."""

    chunks: list[GPTModel]
    bridge: BridgeConfig
    groups: ProcessGroupCollection
    report: LoadReport


def build_role(
    role: str, config: RoleConfig, head: Head, recompute: str | None = None, ranks: Sequence[int] | None = None
) -> RoleModel:
    """Create the groups, the model and its weights. Collective over the world; arguments as those of ``ModelEngine``."""
    bridge = role_bridge(config, recompute)
    groups = role_groups(role, config.parallel, ranks)
    assert groups is not None, f"{role} does not live on this rank"
    start, seed = head_start(config.model, head)
    chunks = build_model(bridge, groups, head=head, init_seed=seed, head_init=start.value)
    report = load_hf(chunks, bridge, config.model.path, groups, head=head)
    return RoleModel(chunks, bridge, groups, report)


def head_start(model: ModelConfig, head: Head) -> tuple[HeadInit, int]:
    """Return the initial value of a scalar head that the checkpoint lacks, and its seed.

    The head of a critic starts at zero. Values of 0 explain none of the variance of the returns; random values would add to it.
    """
    default = HeadInit.zero if head == "value" else HeadInit.normal
    if isinstance(model, HeadedModelConfig):
        return model.head_init or default, model.init_seed
    return default, HeadedModelConfig.init_seed


class ModelEngine:
    """Forward passes of one role."""

    def __init__(
        self,
        role: str,
        config: RoleConfig,
        head: Head,
        recompute: str | None = None,
        device: SharedDevice | None = None,
        ranks: Sequence[int] | None = None,
        *,
        forward_tokens: int | None = None,
        is_trained: bool = False,
    ) -> None:
        """Args:
        role: Name of the role in messages.
        config: Model and layout.
        head: Head that the last stage computes.
        recompute: Recomputation of activations in a backward, as in ``TrainedRoleConfig``.
        device: Device that the role shares with others; None gives it one of its own, where it stays.
        ranks: Ranks that the role lives on (``step.placement``), this rank among them; None means all ranks.
        forward_tokens: Tokens of a micro-batch without a backward; None takes ``config.micro_batch_tokens``.
        is_trained: Whether a TrainEngine completes the role with ``add_training``. Until then the device does not know the role.
        """
        config = with_dtype(config, on_cuda=platform.HAS_CUDA)
        self.role = role
        self.config = config
        self.head: Head = head
        model = build_role(role, config, head, recompute, ranks)
        self.bridge = model.bridge
        self.groups = model.groups
        self.load_report = model.report
        self.plain_because: str | None = (
            None  # why the role is not aligned ("aligned is ..."), if its config leaves the choice open
        )
        self.models: list[GPTModel] = model.chunks
        for chunk in self.models:
            chunk.eval()
        self.device = device or SharedDevice(ResidencyConfig(offload=False))
        self._forward_tokens = forward_tokens or config.micro_batch_tokens
        self._parameter_gather: ParameterGather | None = None  # a trained role's
        self.residency: RoleResidency
        if not is_trained:
            self._register({Kind.params: [*self.parameters()]}, leave=lambda: None)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of every chunk of this rank."""
        return [p for chunk in self.models for p in chunk.parameters()]

    def add_training(
        self, tensors: Mapping[Kind, list[Tensor]], gather: ParameterGather, leave: Callable[[], None]
    ) -> None:
        """Complete a role that is trained, and register all its bytes with the device. Called once, by its TrainEngine.

        Args:
            tensors: Every tensor of each kind, aliases and views too; the parameters are among them.
            gather: Gather of new parameters, which is finished before this engine reads any.
            leave: Function that is called at the end of a turn, before anything moves.
        """
        self._parameter_gather = gather
        self._register(tensors, leave)

    def _register(self, tensors: Mapping[Kind, list[Tensor]], leave: Callable[[], None]) -> None:
        """Count the role's bytes, and add it to the device."""
        self.residency = RoleResidency(self.role, tensors, self.parameters(), leave)
        self.device.add(self.residency)

    def _finish_gather(self) -> None:
        """Finish the gather of parameters that the last optimizer step updated on other ranks."""
        if self._parameter_gather is not None:
            self._parameter_gather.finish()

    def on_device(
        self, *, grads: bool = False, optimizer: bool = False, phase: str, then: Sequence[str] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context with a turn of this role: its parameters are on the device. Those of other roles may not be.

        Args:
            grads: Whether the turn needs gradient buffers, which begin as zeros.
            optimizer: Whether the turn needs fp32 main parameters and moments. They may be copied while the first micro-batch computes.
            phase: Name of the phase, for messages and the ledger.
            then: Roles whose parameters the next turn needs, and which may be copied during this turn. None takes them from the
                device's schedule.

        Raises:
            ResidencyError: Another turn is open, or the role is not trained.
        """
        kinds = (
            FORWARD | (frozenset({Kind.grads}) if grads else frozenset()) | (OPTIMIZER if optimizer else frozenset())
        )
        if (grads or optimizer) and Kind.grads not in self.residency.kinds:
            raise self.residency.error(
                f"phase {phase!r} asks for gradients or optimizer, which a role without training has not"
            )
        following = None if then is None else dict.fromkeys(then, FORWARD)
        return self.device.turn(self.role, kinds, phase, following)

    @property
    def vocab_size(self) -> int:
        """True vocabulary size, without padding."""
        return self.bridge.vocab_size

    @property
    def vocab_parts(self) -> int | None:
        """Parts of the vocabulary that an aligned role's log-probs sum over, None otherwise."""
        return VOCAB_PARTS if self.bridge.aligned else None

    def forward(
        self, token_ids: Tensor, sequence_lengths: Tensor, output: OutputFn, output_mask: Tensor | None = None
    ) -> Tensor:
        """Run all rows and return what ``output`` makes of them, the same on every rank.

        Args:
            token_ids: [B, S] int64, right-padded, on the host, the same on every rank.
            sequence_lengths: [B] int64.
            output: Function of the last stage, which returns [b, s - 1] or [b] float32.
            output_mask: Tokens whose outputs are read, [B, S] bool. The head computes only these. None means every token.

        Returns:
            [B, S - 1] or [B] float32 on the host. Values outside ``output_mask`` are undefined.
        """
        self.evaluating("a forward")
        given, num_columns = token_ids.shape[0], token_ids.shape[1] - 1
        # Every data-parallel rank takes part in the role's collectives and needs at least one row. Copies of the last row
        # fill up; they are cut off below.
        copies = [*range(given), *[given - 1] * (self.groups.dp.size() - given)]
        token_ids, sequence_lengths = token_ids[copies], sequence_lengths[copies]
        output_mask = None if output_mask is None else output_mask[copies]
        num_rows = len(copies)
        size = self.forward_size
        dealt = self.deal(sequence_lengths.tolist(), range(num_rows), size)
        parts = split(token_ids, sequence_lengths, None, dealt[self.groups.dp.rank()], size, output_mask)
        microbatches = self.as_many_as_peers([m for _, m in parts], sequence_lengths.tolist(), dealt, size)
        with torch.no_grad():
            outputs = self.run_schedule(
                self.models, microbatches, lambda tensor, m: output(tensor, m), forward_only=True
            )
        local: Tensor | None = None
        if is_last_stage(self.groups):
            per_token = bool(outputs) and outputs[0].dim() == 2
            local = torch.zeros((num_rows, num_columns) if per_token else (num_rows,), dtype=torch.float32)
            for (taken, _), value in zip(parts, outputs):
                host = value[: len(taken)].detach().to("cpu", torch.float32)
                local[taken] = to_columns(host, num_columns) if per_token else host
        return self._gather(local)[:given]

    def evaluating(self, what: str) -> list[GPTModel]:
        """Return the model's chunks in evaluation mode, with the newest weights, for as long as the role's turn lasts.

        Args:
            what: Name of the caller's work, for the error.

        Raises:
            ResidencyError: The role has no turn.
        """
        self.device.require(self.role, FORWARD, what)
        self._finish_gather()
        for chunk in self.models:
            chunk.eval()
        return self.models

    @property
    def forward_size(self) -> MicrobatchSize:
        """Size of the micro-batches of a forward without a backward."""
        return self.microbatch_size(self._forward_tokens)

    def microbatch_size(self, tokens: int | None) -> MicrobatchSize:
        """Return the size of micro-batches of this layout.

        Args:
            tokens: Most tokens of a micro-batch; None counts rows only.
        """
        layout = self.config.parallel
        parts = layout.tensor if layout.sequence else 1
        equal = parts if layout.context == 1 else layout.context * math.lcm(2, parts)
        # On a CPU, oneDNN compiles bf16 products for every new shape and keeps them. With lengths from 40 to 300 the process
        # grew by 0.8 GiB. Fewer different lengths avoid that.
        on_grid = self.config.model.dtype is Dtype.bf16 and not platform.HAS_CUDA
        return MicrobatchSize(
            self.config.micro_batch_size,
            tokens,
            self.packed,
            length_multiple=math.lcm(equal, BF16_CPU_LENGTHS if on_grid else 1),
            packed_multiple=math.lcm(parts, PACKED_BF16_CPU_TOKENS if on_grid else 1),
            head_multiple=PACKED_BF16_CPU_TOKENS if on_grid else 1,
            attention_multiple=BF16_CPU_LENGTHS if on_grid else 1,
        )

    @property
    def packed(self) -> bool:
        """True when micro-batches are packed. Without a setting in the role's config they are packed where that was measured to be faster."""
        if self.config.packing is not None:
            return self.config.packing
        fast = uses_transformer_engine(self.bridge.transformer.params_dtype) or not platform.HAS_CUDA
        return self.config.parallel.context == 1 and fast

    def deal(self, lengths: Sequence[int], rows: Sequence[int], size: MicrobatchSize) -> list[list[int]]:
        """Distribute rows over the data-parallel ranks; the result is the same on all of them.

        With a budget of tokens, ranks may get different numbers of rows.

        Args:
            lengths: Number of tokens of every row.
            rows: Rows to distribute.
            size: Size of the micro-batches.
        """
        return deal(lengths, rows, self.groups.dp.size(), even=size.tokens is None)

    def as_many_as_peers(
        self,
        microbatches: list[Microbatch],
        lengths: Sequence[int],
        dealt: Sequence[Sequence[int]],
        size: MicrobatchSize,
    ) -> list[Microbatch]:
        """Return this rank's micro-batches. With expert parallelism, add some until all data-parallel ranks have the same number.

        Args:
            microbatches: Micro-batches of this rank.
            lengths: Number of tokens of every row.
            dealt: Rows of every data-parallel rank.
            size: Size of the micro-batches.
        """
        if self.groups.ep.size() == 1:
            return microbatches
        most = max(len(cut(lengths, rows, size)) for rows in dealt)
        return with_fillers(microbatches, most, size.padded(2))

    def _gather(self, local: Tensor | None) -> Tensor:
        """Sum the disjoint rows of the data-parallel ranks, and broadcast them from the last stage to the whole pipeline."""
        if local is not None and self.groups.dp.size() > 1:
            dist.all_reduce(local, group=self.groups.dp)
        if self.groups.pp.size() > 1:
            local = broadcast_tensor(local, last_stage_rank(self.groups), self.groups.pp)
        assert local is not None
        return local

    def run_schedule(
        self,
        chunks: Sequence[torch.nn.Module],
        microbatches: Sequence[Microbatch],
        last_stage: Callable[[Tensor, Microbatch], Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Run Megatron-Core's schedule for this layout over the micro-batches of this data-parallel rank.

        Args:
            chunks: Chunks of the model that the schedule runs: ``models``, or their wrappers in training.
            microbatches: Micro-batches on the host.
            last_stage: Function of model output and micro-batch. It returns a result in a forward, and (loss, tokens, metrics) in
                training.

        Returns:
            The results of the last stage, one for every micro-batch; an empty list on other stages.
        """
        device, cp_group = platform.device(), self.groups.cp

        def forward_step(iterator: Iterator[ModelInput], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            given = next(iterator)
            # Rotary embeddings count positions themselves; the model takes an argument for learned ones.
            positions = torch.zeros_like(given.token_ids)
            output = model(given.token_ids, positions, None, packed_seq_params=given.packing, head_rows=given.head_rows)

            def collect(tensor: Tensor, non_loss_data: bool = False) -> Any:
                if self.head != "lm":
                    tensor = in_place(tensor[0, :, 0], given.microbatch, cp_group)
                return last_stage(tensor, given.microbatch)

            return output, collect

        parallel = self.config.parallel
        interleaved = parallel.virtual_pipeline is not None
        if interleaved:
            microbatches = same_shape(microbatches, parallel.pipeline)
        size = self.microbatch_size(None)
        inputs = model_inputs(microbatches, size, cp_group=cp_group, device=device, one_shape=interleaved)
        arguments: dict[str, Any] = {
            "forward_step_func": forward_step,
            "num_microbatches": len(inputs),
            "seq_length": cp_group.size() * max(given.token_ids.shape[1] for given in inputs),
            "micro_batch_size": max(given.token_ids.shape[0] for given in inputs),
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
            "pg_collection": self.groups,
        }
        if parallel.pipeline == 1:
            return forward_backward_no_pipelining(data_iterator=iter(inputs), model=chunks[0], **arguments)
        communicator = P2PCommunicator(self.groups.pp, self.bridge.transformer)
        if parallel.virtual_pipeline is None:
            return forward_backward_pipelining_without_interleaving(
                data_iterator=iter(inputs), model=chunks[0], p2p_communicator=communicator, **arguments
            )
        return forward_backward_pipelining_with_interleaving(
            data_iterator=[iter(inputs) for _ in chunks],
            model=list(chunks),
            p2p_communicator=communicator,
            **arguments,
        )

    def stream_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, whole tensor) of the newest weights, one at a time, on every rank. Collective."""
        self.device.require(self.role, FORWARD, "reading its weights")
        self._finish_gather()
        return stream_hf(self.models, self.bridge, self.groups, head=self.head)

    @property
    def sharding_metadata(self) -> dict[str, Any]:
        """Arguments of Megatron-Core's sharded_state_dict functions: the role's groups, and optimizers without numbers."""
        return {"chained_optim_avoid_prefix": True, "dp_cp_group": self.groups.dp_cp}

    def sharded_weights(self) -> dict[str, dict[str, Any]]:
        """Return the newest weights of every chunk in sharded form; layers carry their global number, so any layout can load them."""
        self._finish_gather()
        return {
            f"chunk{index}": chunk.sharded_state_dict(metadata=self.sharding_metadata)
            for index, chunk in enumerate(self.models)
        }

    def take_weights(self, state: dict[str, Any]) -> None:
        """Copy loaded weights into the model.

        Args:
            state: State of every chunk, under the names that ``sharded_weights`` gives.
        """
        for index, chunk in enumerate(self.models):
            chunk.load_state_dict(state[f"chunk{index}"], strict=True)

    def load_weights(self, folder: Path) -> None:
        """Load the weights alone from a checkpoint that ``TrainEngine.save`` wrote, in any layout. Collective over the world."""
        self.device.require(self.role, FORWARD, "loading its weights")
        self.residency.mark_changed(FORWARD)
        self.take_weights(load_role(self.sharded_weights(), folder))

    def export(
        self,
        out_dir: str,
        *,
        tokenizer_dir: str | None = None,
        files: Mapping[str, str] | None = None,
        config_changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a Hugging Face checkpoint, ``files`` (name -> text) into its folder, and ``config_changes`` into config.json. Collective.

        Raises:
            RunError: The disk is full. An earlier export in the folder is kept.
        """
        self.device.require(self.role, FORWARD, "an export")
        self._finish_gather()
        num_bytes = export_bytes(self.bridge, self.head, self.bridge.transformer.params_dtype)
        remedy = "export elsewhere: hetero-ppo export --run <run.dir> --out <folder>"
        with writing(Path(out_dir), f"export of {self.role} to", num_bytes, remedy):
            save_hf(
                self.models,
                self.bridge,
                self.groups,
                out_dir,
                source_dir=self.config.model.path,
                tokenizer_dir=tokenizer_dir or self.config.model.tokenizer,
                head=self.head,
                files=files,
                config_changes=config_changes,
            )


def broadcast_tensor(tensor: Tensor | None, source: int, group: dist.ProcessGroup) -> Tensor:
    """Broadcast a float32 host tensor of at most two dimensions whose shape the other ranks do not know."""
    shape = torch.tensor([-1, -1] if tensor is None else [*tensor.shape, *[-1] * (2 - tensor.dim())])
    dist.broadcast(shape, source, group=group)
    size = [int(n) for n in shape if n >= 0]
    tensor = torch.empty(size, dtype=torch.float32) if tensor is None else tensor.contiguous()
    dist.broadcast(tensor, source, group=group)
    return tensor
