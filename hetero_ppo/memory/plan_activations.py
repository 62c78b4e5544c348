"""Estimated bytes of activations on one rank.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", count what a layer keeps for its
backward pass, how tensor and sequence parallelism divide it (equations 1 to 4), and how many micro-batches a pipeline stage
has in flight (section 4.2.3). The terms here are those of this project's layers: attention that keeps no scores, grouped
query heads, SwiGLU, RMSNorm computed in fp32, no dropout. Transformer Engine's layers keep less.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bridge.model.config_mapping import BridgeConfig

FP32_BYTES = 4
INDEX_BYTES = 8
#: ``distributed.vocab_parallel`` works in fp32 on slices of so many logits, and holds so many of these at a time.
SLICE_ELEMENTS_GPU = 1 << 26
SLICE_ELEMENTS_CPU = 1 << 18
SLICES_HELD = 3


@dataclass(frozen=True)
class Work:
    """Sizes of the micro-batches that one rank computes."""

    rows: int  # sequences in a micro-batch
    length: int  # tokens of the longest sequence, padded
    num_microbatches: int  # of a forward-backward pass on this rank
    slice_elements: int = SLICE_ELEMENTS_GPU
    on_cuda: bool = False


@dataclass(frozen=True)
class LayerWidths:
    """Channels of a decoder layer on one rank: divided by tensor parallelism, except for ``hidden`` and those of an expert."""

    hidden: int
    query: int  # heads x head_dim
    key: int  # query groups x head_dim
    ffn: int
    heads: int
    groups: int
    head_dim: int
    hidden_parts: int  # tensor-parallel ranks under sequence parallelism, else 1: what ``hidden`` is divided by
    context: int  # context-parallel ranks
    element: int  # bytes
    qk_norm: bool
    aligned: bool = False  # attention in tiles, fp32 inside
    whole_heads: bool = (
        False  # attention keeps a key and a value of every query head (megatron_bridge.model.context_parallel)
    )
    num_experts: int = 0  # 0: a dense MLP
    experts_per_token: int = 0

    @classmethod
    def of(cls, bridge: BridgeConfig, *, on_cuda: bool = False) -> LayerWidths:
        """Return the widths of a model in its layout."""
        config, dims = bridge.transformer, bridge.dims
        tensor = config.tensor_model_parallel_size
        moe = config.num_moe_experts is not None
        return cls(
            hidden=dims.hidden,
            query=dims.query // tensor,
            key=dims.key // tensor,
            ffn=dims.ffn if moe else dims.ffn // tensor,
            heads=config.num_attention_heads // tensor,
            groups=config.num_query_groups // tensor,
            head_dim=dims.head_dim,
            hidden_parts=tensor if config.sequence_parallel else 1,
            context=config.context_parallel_size,
            element=config.params_dtype.itemsize,
            qk_norm=config.qk_layernorm,
            aligned=bridge.aligned,
            whole_heads=on_cuda and config.params_dtype.itemsize == FP32_BYTES and dims.query != dims.key,
            num_experts=config.num_moe_experts or 0,
            experts_per_token=config.moe_router_topk if moe else 0,
        )

    def norm(self) -> float:
        """Return the bytes per token of one RMSNorm: its input, its output, one fp32 scale.

        In fp32 the normalised input is kept as well, except in an aligned role.
        """
        return (self.element * (2 * self.hidden) + self._normalised(self.hidden) + FP32_BYTES) / self.hidden_parts

    def _normalised(self, width: int) -> int:
        return FP32_BYTES * width if self.element == FP32_BYTES and not self.aligned else 0

    def attention(self) -> float:
        """Return the bytes per token of attention.

        These are the qkv product (values are a view of it), rotated queries and keys, output, and softmax scale. In float32 on CUDA keys
        and values are copied for every query head. An aligned role keeps fp32 copies of the qkv product and of what is rotated, and the
        output.
        """
        if self.aligned:
            tiles = FP32_BYTES * (2 * self.query + 3 * self.key) + self.element * self.query
            return tiles + (self._qk_norm() if self.qk_norm else 0)
        product = self.query + 2 * self.key
        if self.context == 1 and not self.whole_heads:
            kept = product + self.query + self.key + self.query
        else:
            # Keys and values are copies: for every query head, or of all ranks, or both. Then copies are made for each of two chunks,
            # of those up to its end, which together are all and half a rank's share of them. Only the norm keeps the product.
            copies = 2 * (self.query if self.whole_heads else self.key) * self.context
            copies += self.query if self.whole_heads and self.context > 1 else 0
            output = self.query if self.context == 1 else 2 * self.query  # put together from two chunks
            kept = self.query + copies + output + (product if self.qk_norm else 0)
        scale = FP32_BYTES * self.heads
        return self.element * kept + scale + (self._qk_norm() if self.qk_norm else 0)

    def _qk_norm(self) -> int:
        # The keys' input is a view of the qkv product, which an aligned role does not keep; the queries' is a copy; what comes
        # out is rotated and goes.
        return (
            self.element * (self.query + (self.key if self.aligned else 0))
            + self._normalised(self.query + self.key)
            + FP32_BYTES * (self.heads + self.groups)
        )

    def mlp(self) -> float:
        """Return the bytes per token of the MLP, which "selective" recomputes: gate and up, the product, and silu(gate) if not aligned.

        With experts it is, for every expert of a token: gate and up, the product, the token's copy, its weight and two indices; and
        the map of the router. Tokens are assumed to spread evenly over the experts of the ranks.
        """
        if not self.num_experts:
            return (3 if self.aligned else 4) * self.ffn * self.element
        routed = self.experts_per_token * (
            3 * self.ffn * self.element + self.element * (self.hidden + 1) + FP32_BYTES + 2 * INDEX_BYTES
        )
        return (routed + self.num_experts * (self.element + 1)) / self.hidden_parts

    def mlp_gradients(self) -> float:
        """Return the bytes per token of the gradients of gate, up and product."""
        copies = self.experts_per_token / self.hidden_parts if self.num_experts else 1
        return 3 * self.ffn * self.element * copies

    def rope(self, length: int) -> int:
        """Return the bytes per micro-batch of cosine and sine, for queries and for keys; in an aligned role all layers share them."""
        return 0 if self.aligned else 4 * self.head_dim * length * self.element

    def layer(self, rows: int, length: int, recompute: str | None) -> float:
        """Return the bytes that a layer keeps from its forward to its backward for [rows, length] tokens on this rank."""
        tokens = rows * length
        if recompute == "full":
            return tokens * self.element * self.hidden / self.hidden_parts
        per_token = 2 * self.norm() + self.attention() + (0 if recompute == "selective" else self.mlp())
        return tokens * per_token + self.rope(length)


def training_bytes(bridge: BridgeConfig, head: str, recompute: str | None, pp_rank: int, work: Work) -> int:
    """Return the most bytes that a forward-backward pass holds on a rank of a pipeline stage: what is kept, and the work of one layer.

    Args:
        bridge: Model and layout.
        head: "lm", "value" or "score".
        recompute: None, "selective" or "full".
        pp_rank: Number of the pipeline stage.
        work: Whole sequences; context parallelism divides them here.
    """
    widths = LayerWidths.of(bridge, on_cuda=work.on_cuda)
    rows, length = work.rows, _own_length(widths, work)
    # One layer's backward: what it recomputes, gradients of its widest activations, one weight's gradient.
    recomputed = widths.layer(rows, length, None) - widths.layer(rows, length, recompute)
    gradients = rows * length * widths.mlp_gradients() + 2 * _hidden(widths, rows * length)
    at_work = [recomputed + gradients + widths.element * 2 * widths.ffn * widths.hidden]
    if pp_rank == 0:
        at_work.append(_vocabulary_weight(bridge))
    if pp_rank == bridge.pipeline_layout.last[0] and head == "lm":
        tokens = rows * length
        at_work += [_logits(bridge, tokens) + _slices(bridge, tokens, work.slice_elements), _vocabulary_weight(bridge)]
    return round(kept_bytes(bridge, head, recompute, pp_rank, work) + max(at_work))


def kept_bytes(bridge: BridgeConfig, head: str, recompute: str | None, pp_rank: int, work: Work) -> float:
    """Return the most bytes that a rank of a pipeline stage keeps for later backward passes. Arguments as in ``training_bytes``."""
    widths, pipeline = LayerWidths.of(bridge, on_cuda=work.on_cuda), bridge.pipeline_layout
    rows, length = work.rows, _own_length(widths, work)
    chunks = microbatches_in_flight(bridge, pp_rank, work.num_microbatches)
    kept = chunks * pipeline.layers_per_chunk * widths.layer(rows, length, recompute)
    if pipeline.pp_size > 1:  # what the stage handed on stays until its backward
        kept += chunks * _hidden(widths, rows * length)
    if pp_rank == pipeline.last[0]:
        kept += rows * length * widths.norm()
        kept += _logits(bridge, rows * length) if head == "lm" else rows * length * FP32_BYTES * widths.hidden
    return kept


def _hidden(widths: LayerWidths, tokens: int) -> float:
    """Return the bytes of the hidden states between two layers."""
    return tokens * widths.element * widths.hidden / widths.hidden_parts


def forward_bytes(bridge: BridgeConfig, head: str, pp_rank: int, work: Work) -> int:
    """Return the most bytes that a forward without gradients holds on a rank of a stage: one layer, or what follows the last."""
    widths = LayerWidths.of(bridge, on_cuda=work.on_cuda)
    rows, length = work.rows, _own_length(widths, work)
    most = widths.layer(rows, length, None)
    if pp_rank == bridge.pipeline_layout.last[0]:
        tokens = rows * length
        output = (
            _logits(bridge, tokens) + _slices(bridge, tokens, work.slice_elements)
            if head == "lm"
            else 2 * tokens * 4 * widths.hidden
        )
        most = max(most, tokens * widths.norm() + output)
    return round(most)


def microbatches_in_flight(bridge: BridgeConfig, pp_rank: int, num_microbatches: int) -> int:
    """Return how many (model chunk, micro-batch) pairs wait for their backward at most.

    In the schedule of one forward, one backward a stage runs as many forwards ahead as there are stages behind it, and one more. The
    interleaved schedule has a longer warm-up (Narayanan et al. 2021, figure 4).
    """
    pipeline = bridge.pipeline_layout
    behind = pipeline.pp_size - pp_rank - 1
    if pipeline.vp_size == 1:
        return min(behind + 1, num_microbatches)
    return min(2 * behind + (pipeline.vp_size - 1) * pipeline.pp_size + 1, num_microbatches * pipeline.vp_size)


def _own_length(widths: LayerWidths, work: Work) -> int:
    """Return the tokens of a sequence on one context-parallel rank, with the padding that the layout needs."""
    parts = widths.hidden_parts * (2 * widths.context if widths.context > 1 else 1)
    return -(-work.length // parts) * parts // widths.context


def _logits(bridge: BridgeConfig, tokens: int) -> int:
    columns = bridge.padded_vocab_size // bridge.transformer.tensor_model_parallel_size
    return tokens * columns * bridge.transformer.params_dtype.itemsize


def _slices(bridge: BridgeConfig, tokens: int, slice_elements: int) -> int:
    columns = bridge.padded_vocab_size // bridge.transformer.tensor_model_parallel_size
    return SLICES_HELD * FP32_BYTES * min(slice_elements, tokens * columns)


def _vocabulary_weight(bridge: BridgeConfig) -> int:
    """Return the bytes of the gradient of an embedding matrix, before it is added to the fp32 buffer."""
    columns = bridge.padded_vocab_size // bridge.transformer.tensor_model_parallel_size
    return columns * bridge.transformer.hidden_size * bridge.transformer.params_dtype.itemsize
