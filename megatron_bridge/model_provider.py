"""Build the Megatron-Core model chunks of one role on this rank, from explicit process groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_bridge import platform
from megatron_bridge.aligned.layers import aligned_decoder_spec, aligned_output_layer
from megatron_bridge.aligned.rows import row_dot
from megatron_bridge.model.config_mapping import BridgeConfig
from megatron_bridge.model.layers import decoder_spec, uses_transformer_engine
from megatron_bridge.model.rope import install_rope

#: "lm" predicts tokens; "value" (critic) and "score" (reward model) give one number per token.
Head = Literal["lm", "value", "score"]
#: How a scalar head starts when the checkpoint has none: with zeros, or drawn from N(0, 1 / (hidden + 1)).
HeadInit = Literal["zero", "normal"]


class HeadRowsGPTModel(GPTModel):
    """A GPTModel whose head can compute chosen rows only, and whose sharded state dict uses explicit process groups."""

    _head_rows: Tensor | None = None
    _chosen_early = False  # True: the last layer chooses the rows, right after its attention

    def forward(self, *args: Any, head_rows: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run ``GPTModel.forward``; on the last stage, compute the head for ``head_rows`` only.

        Args:
            head_rows: [n] int64 row numbers, without repetition, of the hidden states [s * b, hidden] (the tokens of all
                tensor-parallel ranks). The last stage then returns the head's output for these rows, [1, n, ...]. None: it returns
                the output for all tokens, [b, s, ...].
        """
        if head_rows is None or not self.post_process:
            return super().forward(*args, **kwargs)
        head, config = self.output_layer, self.config
        self._head_rows = head_rows
        if config.sequence_parallel:
            # The rows are chosen from whole hidden states, so these are gathered before the head instead of inside it.
            head.sequence_parallel, head.allreduce_dgrad = False, True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._head_rows = None
            if config.sequence_parallel:
                head.sequence_parallel, head.allreduce_dgrad = True, False

    def choose_rows_early(self) -> None:
        """Make the last layer compute only the head's rows from its attention on.

        Attention is the last operation in which tokens depend on other tokens, so everything after it can skip the other rows.
        """
        layer = self.decoder.layers[-1]
        layer.self_attention.linear_proj.register_forward_pre_hook(self._choose_from_attention)
        add = layer.self_attn_bda

        def add_chosen(training: bool, fused: bool) -> Callable[[Any, Tensor, float], Tensor]:
            return lambda output, residual, dropout: add(training, fused)(output, self._chosen(residual), dropout)

        layer.self_attn_bda = add_chosen
        self._chosen_early = True

    def _choose_from_attention(self, projection: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._chosen(args[0]), *args[1:])

    def _chosen(self, hidden: Tensor) -> Tensor:
        """Return the chosen rows, [s, b, hidden] -> [n, 1, hidden], or all of ``hidden`` when no rows are asked for."""
        if self._head_rows is None:
            return hidden
        return _Rows.apply(hidden.flatten(0, 1), self._head_rows).unsqueeze(1)

    def choose_head_rows(self, head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Choose the rows before the head runs (a forward pre-hook of the head).

        Maps [s, b, hidden] to [n, 1, hidden]; under sequence parallelism the input is a slice of s.
        """
        if self._head_rows is None or self._chosen_early:
            return None
        (hidden,) = args
        if self.config.sequence_parallel:
            # All ranks have the same gradient of the whole hidden states; each keeps its own slice of it.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return (self._chosen(hidden),)

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """Declare the last pipeline stage's copy of tied embeddings as a replica of the first stage's."""
        if not self.post_process or self.pre_process:
            return
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=first_stage_word_emb_key,
            replica_id=(1, 0, metadata["dp_cp_group"].rank()),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _Rows(torch.autograd.Function):
    """Choose rows, [t, hidden] -> [n, hidden], none twice. So the backward is a copy; the backward of plain indexing would be a sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


class ScalarHead(MegatronModule):
    """Head with one output per token, in place of the output layer: [..., hidden] -> [..., 1].

    It is replicated over the tensor-parallel ranks and computed in fp32. Its weights start with zeros, or are drawn from
    N(0, 1 / (hidden + 1)), the reward head of Stiennon et al. 2020. They are drawn from ``seed``, so every layout starts with the same
    numbers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        seed: int,
        *,
        init: HeadInit,
        aligned: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = groups.tp
        self.aligned = aligned
        self.sequence_parallel = config.sequence_parallel  # True: the input is a slice of the sequence
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, config.hidden_size, generator=generator) / (config.hidden_size + 1) ** 0.5
        if init == "zero":
            weight.zero_()
        self.weight = torch.nn.Parameter(weight.to(dtype=config.params_dtype, device=platform.device()))

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Compute one number per token, [s, b, hidden] -> ([s, b, 1] float32, no bias). Under sequence parallelism the input is a slice of s."""
        if self.sequence_parallel:
            input_ = tensor_parallel.gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        if self.aligned:
            return row_dot(input_, self.weight[0]).unsqueeze(-1), None
        return F.linear(input_.float(), self.weight.float()), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict for dist_checkpointing: one replicated tensor."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def build_model(
    bridge: BridgeConfig,
    groups: ProcessGroupCollection,
    *,
    head: Head = "lm",
    init_seed: int = 1234,
    head_init: HeadInit = "normal",
) -> list[GPTModel]:
    """Build the model chunks of this rank: one, or one for each virtual pipeline stage.

    Args:
        bridge: Mapped Hugging Face config and layout.
        groups: Process groups of the role; their sizes are the layout's.
        head: Kind of head that the last stage has.
        init_seed: Seed of a scalar head that the checkpoint does not have.
        head_init: Initialisation of that head.

    Returns:
        GPTModels in virtual-stage order, on this rank's device. Their weights are not loaded yet.
    """
    config = bridge.transformer
    stages = config.virtual_pipeline_model_parallel_size
    seeds = {"tp_rank": groups.tp.rank(), "ep_rank": groups.ep.rank(), "etp_rank": groups.expt_tp.rank()}
    tensor_parallel.model_parallel_cuda_manual_seed(init_seed, force_reset_rng=True, **seeds)
    return [
        _build_chunk(bridge, groups, head, init_seed, head_init, stage)
        for stage in ([None] if stages is None else range(stages))
    ]


def _build_chunk(
    bridge: BridgeConfig,
    groups: ProcessGroupCollection,
    head: Head,
    init_seed: int,
    head_init: HeadInit,
    vp_stage: int | None,
) -> GPTModel:
    config = bridge.transformer
    vp_size = config.virtual_pipeline_model_parallel_size
    pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(groups.pp)
    post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(groups.pp)
    num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
    layer_spec = aligned_decoder_spec if bridge.aligned else decoder_spec
    chunk = HeadRowsGPTModel(
        config=config,
        transformer_layer_spec=layer_spec(config, num_layers),
        vocab_size=bridge.padded_vocab_size,
        max_sequence_length=bridge.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=bridge.tie_word_embeddings and head == "lm",
        pg_collection=groups,
        vp_stage=vp_stage,
        **bridge.rope,
    )
    install_rope(chunk, bridge.inv_freq)
    if post_process and head != "lm":
        chunk.output_layer = ScalarHead(config, groups, init_seed, init=head_init, aligned=bridge.aligned)
    elif post_process and bridge.aligned:
        chunk.output_layer = aligned_output_layer(config, chunk)
        chunk.setup_embeddings_and_output_layer()
    if post_process:
        chunk.output_layer.register_forward_pre_hook(chunk.choose_head_rows)
        # Not under sequence parallelism: the rows are chosen when the slices are gathered for the head. Not where a whole layer is
        # recomputed: the recomputation would not know the rows.
        whole_layer = config.recompute_granularity == "full" or uses_transformer_engine(config.params_dtype)
        if not (config.sequence_parallel or whole_layer):
            chunk.choose_rows_early()
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            # With this flag gradients are summed over groups.expt_dp. Megatron-Core sets it only for experts that are spread over ranks. We set
            # it for all: every tensor-parallel rank sends its tokens to them too, and their optimizer state must load in any layout.
            parameter.allreduce = False
    return chunk.to(platform.device())
