"""A role that is trained: its model, and Megatron-Core's gradient buffers and optimizer around it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor
from torch.nn.functional import pad

from hetero_ppo.algorithms.losses import Loss, add_metric_sums
from hetero_ppo.algorithms.schedules import lr_at
from hetero_ppo.config.schema import Dtype, OptimizerConfig, TrainedRoleConfig
from hetero_ppo.distributed.text import broadcast_text
from hetero_ppo.distributed.groups import is_last_stage, last_stage_rank, all_ranks
from hetero_ppo.engines.gradients import Ddp, FirstGradients, clip_divisor, divide_gradients
from hetero_ppo.engines.loss_terms import LossTerm, TermResult, TrainStepResult, gradient_scales
from hetero_ppo.engines.microbatches import MicrobatchSize, pair_tokens, split, split_pairs
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.optimizer_slices import OptimizerSlices, is_distributed, is_gathered
from hetero_ppo.engines.parameter_gather import ParameterGather
from hetero_ppo.engines.role_reading import load_role, tensor_names
from hetero_ppo.engines.role_snapshot import RoleSnapshot
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.step.kinds import OPTIMIZER, TRAINING, Kind
from hetero_ppo.types import Microbatch, PreferenceBatch
from megatron_bridge.model_provider import Head

#: Rows of the buffer that metric sums are reduced in.
MAX_METRICS = 64
#: Values in a checkpoint of a role that are not tensors.
COUNTS = ("steps_done", "skipped_in_a_row")
#: Options that torch stores with the optimizer's state. Learning rate and weight decay are absent: they are set before every step.
OPTIONS = ("betas", "eps")


class TrainEngine:
    """Training steps of one role, and its state in a checkpoint.

    ``model`` is the role's model. It runs the forwards, exports and streams the weights. Everything that only training needs is here:
    the wrappers with the gradient buffers, the optimizer, and the counts of steps.
    """

    def __init__(
        self,
        role: str,
        config: TrainedRoleConfig,
        head: Head,
        total_steps: int,
        device: SharedDevice | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Args:
        role: Name of the role in messages.
        config: Model, layout and optimizer.
        head: Head that the last stage computes.
        total_steps: Optimizer steps of the run, for the learning-rate schedule.
        device: Device that the role shares with others; None gives it one of its own, where it stays.
        ranks: Ranks that the role lives on (``step.placement``), this rank among them; None means all ranks.
        """
        self.role = role
        self.config = config
        self.total_steps = total_steps
        self.steps_done = 0
        self.skipped_in_a_row = 0
        self.model = ModelEngine(
            role,
            config,
            head,
            config.recompute,
            device,
            ranks,
            forward_tokens=config.forward_micro_batch_tokens,
            is_trained=True,
        )
        self.device = self.model.device
        self.groups = self.model.groups
        self.chunks = [self._wrap(chunk, index) for index, chunk in enumerate(self.model.models)]
        self.gather = ParameterGather(self.chunks, is_overlapped=config.ddp.overlap_param_gather)
        self.optimizer = self._build_optimizer()
        self.gradients = FirstGradients(self.chunks)
        transformer = self.model.bridge.transformer
        transformer.finalize_model_grads_func = self._finalize_gradients
        transformer.grad_scale_func = None
        if config.ddp.overlap_grad_reduce:
            no_syncs = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        self.model.add_training(self.tensors(), self.gather, self._end_turn)
        self.residency = self.model.residency

    def on_device(
        self, *, grads: bool = False, optimizer: bool = False, phase: str, then: Sequence[str] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Return a turn of this role, as ``ModelEngine.on_device`` does."""
        return self.model.on_device(grads=grads, optimizer=optimizer, phase=phase, then=then)

    def _finalize_gradients(self, model: list[DistributedDataParallel], num_tokens: Tensor, **groups: Any) -> None:
        """Sum gradients over ranks. Megatron-Core does not get the number of tokens, because the optimizer step divides by it."""
        self.gradients.end()
        finalize_model_grads(model, None, **groups)

    @property
    def _optimizers(self) -> list[MegatronOptimizer]:
        """Optimizers of the role, one for each class of parameters (dense, expert)."""
        chained = isinstance(self.optimizer, ChainedOptimizer)
        return self.optimizer.chained_optimizers if chained else [self.optimizer]

    def tensors(self) -> dict[Kind, list[Tensor]]:
        """Return every tensor of each kind, aliases and views too."""
        tensors = {kind: list[Tensor]() for kind in Kind}
        tensors[Kind.params] += self.model.parameters()
        for chunk in self.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                parts = [buffer, *buffer.buckets]
                tensors[Kind.grads] += [part.grad_data for part in parts]
                tensors[Kind.params] += [part.param_data for part in parts if part.param_data is not None]
        for optimizer in self._optimizers:
            if optimizer.optimizer is None:  # a stage without parameters of this class
                continue
            # Main parameters of an fp32 role are its parameters, or views of their shards. They share a storage, which counts as
            # parameters.
            tensors[Kind.main_params] += [p for group in optimizer.optimizer.param_groups for p in group["params"]]
            if isinstance(optimizer, DistributedOptimizer):
                groups = (*optimizer.shard_float16_groups, *optimizer.shard_fp32_groups)
                tensors[Kind.params] += [p for group in groups for p in group if p is not None]
            tensors[Kind.moments] += [value for state in optimizer.optimizer.state.values() for value in state.values()]
        return tensors

    def _end_turn(self) -> None:
        """Make the parameters whole and drop all references to the gradient buffers, before the bytes leave."""
        self.gather.finish()
        self.optimizer.zero_grad()

    def _wrap(self, chunk: torch.nn.Module, index: int) -> DistributedDataParallel:
        config = self.config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=config.ddp.overlap_grad_reduce,
            overlap_param_gather=config.ddp.overlap_param_gather,
            use_distributed_optimizer=config.optimizer.distributed,
            bucket_size=config.ddp.bucket_size,
        )
        # Gradients of later chunks are reduced while earlier chunks still compute, so only the first chunk needs small buckets.
        return Ddp(self.model.bridge.transformer, ddp, chunk, disable_bucketing=index > 0, pg_collection=self.groups)

    def _build_optimizer(self) -> MegatronOptimizer:
        config: OptimizerConfig = self.config.optimizer
        megatron_config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.grad_clip,
            bf16=self.model.config.model.dtype is Dtype.bf16,
            params_dtype=self.model.bridge.transformer.params_dtype,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=self.config.ddp.overlap_param_gather,
        )
        optimizer = get_megatron_optimizer(
            megatron_config,
            self.chunks,
            config_overrides=get_standard_config_overrides(megatron_config),
            use_gloo_process_groups=False,
            pg_collection=self.groups,
        )
        # Adam would create its moments in the first step. Created here, the role has the same number of bytes at all times.
        for one in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
            if one.optimizer is not None:
                one.init_state_fn(one.optimizer)
        return optimizer

    @property
    def training_size(self) -> MicrobatchSize:
        """Size of the micro-batches of a training step."""
        return self.model.microbatch_size(self.config.micro_batch_tokens)

    def microbatches(
        self, token_ids: Tensor, sequence_lengths: Tensor, inputs: Any, rows: Sequence[int]
    ) -> list[Microbatch]:
        """Return this data-parallel rank's micro-batches of a minibatch. All ranks get about the same number of tokens.

        Args:
            token_ids: [B, S] int64, the same on every rank.
            sequence_lengths: [B] int64.
            inputs: Record of [B, S - 1] and [B] tensors for the loss. Its mask marks the tokens whose outputs the loss reads.
            rows: Rows of the minibatch, over all ranks.
        """
        lengths = sequence_lengths.tolist()
        dealt = self.model.deal(lengths, rows, self.training_size)
        output_mask = None if inputs is None else pad(inputs.mask, (0, 1))
        parts = split(
            token_ids, sequence_lengths, inputs, dealt[self.groups.dp.rank()], self.training_size, output_mask
        )
        return self.model.as_many_as_peers([m for _, m in parts], lengths, dealt, self.training_size)

    def pair_microbatches(self, batch: PreferenceBatch) -> list[Microbatch]:
        """Return this data-parallel rank's micro-batches of a batch of pairs. The two sequences of a pair share a micro-batch.

        Raises:
            ValueError: The interleaved schedule cannot run micro-batches of these sizes.
        """
        size = self.training_size
        mine = self.model.deal(pair_tokens(batch, size), range(len(batch.chosen_ids)), size)[self.groups.dp.rank()]
        parts = split_pairs(batch, mine, size)
        interleaved, stages = self.config.parallel.virtual_pipeline is not None, self.config.parallel.pipeline
        if interleaved and (len(parts) % stages or len({len(m.token_ids) for m in parts}) > 1):
            raise ValueError(
                f"{self.role}.micro_batch_size is {self.config.micro_batch_size}: the interleaved schedule needs a multiple of "
                f"{stages} micro-batches with the same number of pairs, and {len(mine)} pairs on this rank "
                f"make {len(parts)}; choose a micro_batch_size that divides them, or set {self.role}.parallel.virtual_pipeline to null"
            )
        return parts

    def train_step(self, terms: Sequence[LossTerm]) -> TrainStepResult:
        """Run one optimizer step on the sum of some terms. Collective over the role's ranks.

        The gradient of a term is that of ``weight x (sum of the losses of all its tokens) / denominator``, no matter how its rows are
        cut into micro-batches and over ranks.

        Args:
            terms: Terms of the loss, at least one; weights, denominators and their order are the same on every rank.

        Raises:
            FloatingPointError: A gradient is NaN or infinite, for more than ``optimizer.max_skipped_steps`` steps in a row. The
                weights are as before the step.
        """
        self.device.require(self.role, frozenset({Kind.params, Kind.grads}), "training")
        self.gather.use_hooks()
        for chunk in self.chunks:
            chunk.train()
        self.gradients.begin()
        self.optimizer.zero_grad()
        learning_rate = self._set_rates()
        divisor, scales = gradient_scales(terms)
        results = []
        for number, (term, scale) in enumerate(zip(terms, scales, strict=True), start=1):
            with self._schedule_of_term(scale, is_last=number == len(terms)):
                results.append(self._backward(term))
        self.device.require(self.role, TRAINING & self.residency.kinds, "an optimizer step")
        self.residency.mark_changed(TRAINING)
        with self.device.trace.span(self.role, "optimizer step"):
            grad_norm = self._optimizer_step(divisor) if divisor > 0 else 0.0
        self.steps_done += 1
        if grad_norm is None:
            nothing = [
                TermResult(0.0, 0, {name: torch.zeros_like(total) for name, total in r.metric_sums.items()})
                for r in results
            ]
            return TrainStepResult(0.0, 0.0, learning_rate, nothing, is_skipped=True)
        loss = sum(term.weight * result.loss for term, result in zip(terms, results, strict=True))
        return TrainStepResult(loss, grad_norm, learning_rate, results)

    @contextlib.contextmanager
    def _schedule_of_term(self, scale: float, *, is_last: bool) -> Iterator[None]:
        """Scale the losses of the schedules inside. Ranks add up their gradients in the last term's schedule only.

        Args:
            scale: Factor of the term's losses.
            is_last: Whether it is the step's last term.
        """
        transformer = self.model.bridge.transformer
        finalize, no_sync = transformer.finalize_model_grads_func, transformer.no_sync_func
        transformer.grad_scale_func = None if scale == 1.0 else partial(operator.mul, scale)
        with contextlib.ExitStack() as stack:
            if not is_last:
                transformer.finalize_model_grads_func = transformer.no_sync_func = None
                for chunk in self.chunks:
                    stack.enter_context(chunk.no_sync())
            try:
                yield
            finally:
                transformer.finalize_model_grads_func, transformer.no_sync_func = finalize, no_sync
                transformer.grad_scale_func = None

    def _backward(self, term: LossTerm) -> TermResult:
        """Run forward and backward of one term. Gradients are added to those of earlier terms; losses and metrics are summed over ranks."""

        def last_stage(output: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor, Loss]:
            result = term.loss_fn(output, microbatch)
            # Every context-parallel rank has the whole loss and differentiates its own columns. Only one of them counts tokens.
            count = result.count if self.groups.cp.rank() == 0 else torch.zeros_like(result.count)
            return result.loss, count.to(torch.int), result

        outputs = self.model.run_schedule(self.chunks, term.microbatches, last_stage, forward_only=False)
        loss_sum, count, metric_sums = self._reduce(outputs)
        return TermResult(loss_sum / term.denominator if term.denominator > 0 else 0.0, count, metric_sums)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of this rank's share of a checkpoint of the role. Ranks that hold the same bytes write equal parts of them."""
        own = OPTIMIZER if self.config.optimizer.distributed else frozenset()
        alike = self.residency.kinds - own - {Kind.grads}
        return self.residency.num_bytes(alike) // self.groups.dp_cp.size() + self.residency.num_bytes(own)

    def save(self, folder: Path) -> RoleSnapshot:
        """Copy weights and optimizer for a checkpoint, from the device or from host memory. Collective over the world.

        Args:
            folder: Existing empty folder.

        Returns:
            The copy, which the caller must write and finish. Later work of the role does not change it.
        """
        with self.device.for_saving(self.role):
            buffers = [buffer for chunk in self.model.models for buffer in chunk.buffers()]
            tensors = [*buffers, *(tensor for tensors in self.tensors().values() for tensor in tensors)]
            live = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            state, _ = self._sharded_state_dict(is_loading=False)
            return RoleSnapshot(state, folder, live)

    def load(self, folder: Path) -> None:
        """Load a checkpoint that ``save`` wrote in this or another layout. Collective over the world.

        The caller holds a turn that includes the optimizer.

        Raises:
            ValueError: The checkpoint was written with the other kind of optimizer, or by another version of this code.
        """
        self.device.require(self.role, TRAINING & self.residency.kinds, "loading a checkpoint")
        names = tensor_names(folder)
        self._check_kind_of_optimizer(folder, names)
        self.residency.mark_changed(TRAINING)
        asked, slices = self._sharded_state_dict(is_loading=True, gathered=is_gathered(names))
        state = load_role(asked, folder)
        self.model.take_weights(state)
        loaded = state["optimizer"] if slices is None else slices.take(state["optimizer"], folder)
        moments = [
            (o, {p: dict(values) for p, values in o.optimizer.state.items()}) for o in self._optimizers if o.optimizer
        ]
        options = [[_options(group) for group in o.optimizer.param_groups] for o in self._optimizers if o.optimizer]
        self.optimizer.load_state_dict(loaded)
        for (optimizer, before), own in zip(moments, options, strict=True):
            _keep_storages(optimizer.optimizer, before)
            for group, values in zip(optimizer.optimizer.param_groups, own, strict=True):
                group.update(values)
        counts = [name for name in COUNTS if name not in state]
        if counts:
            raise ValueError(
                f"checkpoint {folder} has no {', '.join(counts)}: it was written by another version of this code"
            )
        self.steps_done, self.skipped_in_a_row = (int(state[name]) for name in COUNTS)

    def _check_kind_of_optimizer(self, folder: Path, names: set[str]) -> None:
        """Raise an error when the checkpoint was written with the other kind of optimizer: the two forms are not translated."""
        saved = is_distributed(names)
        if saved != self.config.optimizer.distributed:
            field = f"{self.role}.optimizer.distributed"
            raise ValueError(
                f"checkpoint {folder} was written with {field}={str(saved).lower()}, and its optimizer state can be read with "
                f"that alone; set {field}={str(saved).lower()}"
            )

    def _sharded_state_dict(
        self, *, is_loading: bool, gathered: bool = False
    ) -> tuple[dict[str, Any], OptimizerSlices | None]:
        """Return the role's state in sharded form, and its slices of distributed optimizers; see OptimizerSlices for ``gathered``."""
        weights = self.model.sharded_weights()
        slices = None
        if self.config.optimizer.distributed:
            slices = OptimizerSlices(self._optimizers, weights, all_ranks(self.groups), gathered=gathered)
            optimizer = slices.state
        else:
            optimizer = self.optimizer.sharded_state_dict(
                weights, is_loading=is_loading, metadata=self.model.sharding_metadata
            )
        counts = dict(zip(COUNTS, (self.steps_done, self.skipped_in_a_row), strict=True))
        return {**weights, "optimizer": optimizer, **counts}, slices

    def _optimizer_step(self, denominator: float) -> float | None:
        """Divide the gradients, clip them and run MegatronOptimizer.step; their norm is checked before anything is written.

        Args:
            denominator: Number that the sums of gradients are divided by.

        Returns:
            The norm after the division and before clipping; None where it is not finite and the step may be skipped.
        """
        found_bad = self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm()) / denominator
        if found_bad or not grad_norm < float("inf"):
            self.skipped_in_a_row += 1
            allowed = self.config.optimizer.max_skipped_steps
            if self.skipped_in_a_row <= allowed:
                return None
            raise FloatingPointError(
                f"{self.role}: gradient norm is {grad_norm} at optimizer step {self.steps_done + 1}, number {self.skipped_in_a_row} "
                f"in a row ({self.role}.optimizer.max_skipped_steps={allowed}); "
                "weights are unchanged. Lower the learning rate, or look at this step's data in the rollout dump"
            )
        self.skipped_in_a_row = 0
        divisor = denominator * clip_divisor(grad_norm, self.config.optimizer.grad_clip)
        divide_gradients(self._optimizers, divisor)
        self.optimizer.step_with_ready_grads()
        return grad_norm

    def _set_rates(self) -> float:
        """Set learning rate and weight decay of every group of parameters, as Megatron-Core's scheduler would. Returns the former.

        Norm weights and biases are in a group of their own, whose ``wd_mult`` is 0.
        """
        config = self.config.optimizer
        learning_rate = lr_at(self.steps_done, config, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = config.weight_decay * (1.0 if config.decay_norms_and_biases else group["wd_mult"])
        return learning_rate

    def _reduce(self, outputs: list[Loss]) -> tuple[float, int, dict[str, Tensor]]:
        """Sum losses, counts and metrics over micro-batches and data-parallel ranks; all stages get (loss, count, metrics)."""
        names: list[str] = []
        totals = torch.zeros(MAX_METRICS, dtype=torch.float64)
        if is_last_stage(self.groups):
            metric_sums = add_metric_sums(output.metric_sums for output in outputs)
            names = sorted(metric_sums)
            for output in outputs:
                totals[:2] += torch.stack([output.loss.detach().double(), output.count.double()]).cpu()
            totals[2 : 2 + len(names)] = torch.stack([metric_sums[name] for name in names]).cpu()
            dist.all_reduce(totals, group=self.groups.dp)
        if self.groups.pp.size() > 1:
            source = last_stage_rank(self.groups)
            dist.broadcast(totals, source, group=self.groups.pp)
            names = broadcast_text("\n".join(names), source, self.groups.pp).split("\n")
        return float(totals[0]), int(totals[1]), {name: totals[2 + i] for i, name in enumerate(names)}


def model_of(engine: ModelEngine | TrainEngine) -> ModelEngine:
    """Return the model of a role, trained or not."""
    return engine.model if isinstance(engine, TrainEngine) else engine


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group of parameters that come from the configuration. A checkpoint's values do not replace them."""
    return {name: group[name] for name in OPTIONS}


def _keep_storages(optimizer: torch.optim.Optimizer, before: dict[Tensor, dict[str, Tensor]]) -> None:
    """Copy loaded moments into the tensors that the optimizer had before.

    torch's load_state_dict creates new tensors, but residency moves the storages of the old ones.
    """
    for parameter, values in before.items():
        for name, tensor in values.items():
            loaded = optimizer.state[parameter][name]
            if loaded is not tensor:
                tensor.copy_(loaded)
                optimizer.state[parameter][name] = tensor
