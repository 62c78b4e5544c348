"""Input of the model for a micro-batch: its tokens, padded or packed, up to the last one whose output is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.engines.microbatches import MicrobatchSize, map_tensors, to_columns
from hetero_ppo.types import Microbatch
from megatron_bridge.model.context_parallel import own_columns, whole_columns
from megatron_bridge.model.packing import Packing, pack


#: A micro-batch is packed where padding would make it longer than so many times: attention to packed sequences gathers them first,
#: which took 5 % of a training step of 16 equal sequences on a CPU.
PACK_ABOVE = 1.05


@dataclass(frozen=True)
class ModelInput:
    """One micro-batch as the model takes it, on the device."""

    token_ids: Tensor  # [b, s' / cp] int64, this context-parallel rank's columns; packed [1, total]
    head_rows: Tensor  # [n] int64: of the hidden states [s' / cp * b, hidden], those that the head computes
    packing: Packing | None
    microbatch: Microbatch  # with output_mask [b, s' / cp]: n are True, in the order of head_rows


def model_inputs(
    microbatches: Sequence[Microbatch],
    size: MicrobatchSize,
    *,
    cp_group: dist.ProcessGroup,
    device: torch.device,
    one_shape: bool,
) -> list[ModelInput]:
    """Return the model's input for every micro-batch.

    Under causal attention no output depends on a later token, so the tokens behind the last one in the output mask of a row are left out.

    Args:
        microbatches: Micro-batches on the host.
        size: Size of micro-batches, which decides about packing and about multiples of lengths.
        cp_group: Group of the context-parallel ranks. Packing needs a group of one rank.
        device: Device of the model.
        one_shape: Whether all get the length of the longest; they have equal numbers of rows.
    """
    reads = [_output_mask(m) for m in microbatches]
    columns = [torch.arange(1, read.shape[1] + 1) for read in reads]
    used = [(read * column).amax(dim=1).clamp(min=1) for read, column in zip(reads, columns)]  # [b] tokens
    widths = [size.padded(int(u.max())) for u in used]
    totals = [size.packed_length(int(u.sum())) for u in used]
    if one_shape:
        widths, totals = [max(widths)] * len(widths), [max(totals)] * len(totals)
    inputs = []
    for m, read, u, width, total in zip(microbatches, reads, used, widths, totals):
        if size.packed and len(u) * width > PACK_ABOVE * total:
            inputs.append(_packed(m, read, u, total, size, device))
        else:
            inputs.append(_padded(m, read, width, size, cp_group, device))
    return inputs


def _output_mask(microbatch: Microbatch) -> Tensor:
    """Return the output mask, [b, s] bool; every token of a sequence if the micro-batch has none."""
    if microbatch.output_mask is not None:
        return microbatch.output_mask
    return torch.arange(microbatch.token_ids.shape[1]) < microbatch.sequence_lengths[:, None]


def _padded(
    microbatch: Microbatch,
    output_mask: Tensor,
    length: int,
    size: MicrobatchSize,
    cp_group: dist.ProcessGroup,
    device: torch.device,
) -> ModelInput:
    ids = own_columns(to_columns(microbatch.token_ids, length), 1, cp_group)
    output_mask = _rounded(
        own_columns(to_columns(output_mask, length), 1, cp_group), torch.ones(ids.shape, dtype=torch.bool), size
    )
    row, column = output_mask.nonzero().unbind(1)
    head_rows = column * len(ids) + row
    return _on_device(ids, head_rows, None, microbatch, output_mask, device)


def _packed(
    microbatch: Microbatch, output_mask: Tensor, used: Tensor, total: int, size: MicrobatchSize, device: torch.device
) -> ModelInput:
    there = torch.arange(output_mask.shape[1]) < used[:, None]
    output_mask = _rounded(output_mask, there, size)
    tokens = microbatch.token_ids[there]
    starts = used.cumsum(0) - used
    row, column = output_mask.nonzero().unbind(1)
    packing = pack(used.tolist(), total, device, size.attention_multiple)
    return _on_device(to_columns(tokens[None], total), starts[row] + column, packing, microbatch, output_mask, device)


def _rounded(output_mask: Tensor, there: Tensor, size: MicrobatchSize) -> Tensor:
    """Extend the output mask to a multiple of ``size.head_multiple`` tokens, as far as there are tokens.

    It gets at least one token, because the ranks of a tensor-parallel group exchange the head's output.
    """
    count = int(output_mask.sum())
    more = -count % size.head_multiple if count else size.head_multiple
    if not more:
        return output_mask
    output_mask = output_mask.clone(memory_format=torch.contiguous_format)
    output_mask.view(-1)[(there & ~output_mask).flatten().nonzero()[:more, 0]] = True
    return output_mask


def _on_device(
    token_ids: Tensor,
    head_rows: Tensor,
    packing: Packing | None,
    microbatch: Microbatch,
    output_mask: Tensor,
    device: torch.device,
) -> ModelInput:
    inputs = microbatch.inputs
    if inputs is not None:
        inputs = map_tensors(inputs, lambda value: value.to(device, non_blocking=True))
    on_device = Microbatch(
        microbatch.token_ids.to(device), microbatch.sequence_lengths.to(device), inputs, output_mask.to(device)
    )
    return ModelInput(token_ids.to(device), head_rows.to(device), packing, on_device)


def in_place(values: Tensor, microbatch: Microbatch, cp_group: dist.ProcessGroup) -> Tensor:
    """Put [..., n] values of the tokens in the output mask into [..., b, s] with 0 elsewhere, whole on every context-parallel rank.

    The result is differentiable. Collective over ``cp_group``.

    Args:
        microbatch: Micro-batch of a ``ModelInput``.
    """
    assert microbatch.output_mask is not None
    shape = (*values.shape[:-1], *microbatch.output_mask.shape)
    placed = values.new_zeros(shape).masked_scatter(microbatch.output_mask, values)
    whole = whole_columns(placed, len(shape) - 1, cp_group, sum_gradients=False)
    return _last_columns(whole, microbatch.token_ids.shape[1])


def next_tokens(microbatch: Microbatch, cp_group: dist.ProcessGroup) -> Tensor:
    """Return [n] int64: the token after each one in the output mask, which may be in another rank's columns.

    After a row's last token the value is arbitrary.

    Args:
        microbatch: Micro-batch of a ``ModelInput``.
    """
    assert microbatch.output_mask is not None
    following = to_columns(microbatch.token_ids.roll(-1, dims=1), microbatch.output_mask.shape[1] * cp_group.size())
    return own_columns(following, 1, cp_group)[microbatch.output_mask]


def _last_columns(value: Tensor, num_columns: int) -> Tensor:
    """Return [..., num_columns] of [..., t]: cut, or padded with zeros."""
    if value.shape[-1] >= num_columns:
        return value[..., :num_columns]
    return torch.nn.functional.pad(value, (0, num_columns - value.shape[-1]))
