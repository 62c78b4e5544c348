"""Kinds of storage that a role keeps in memory. Plan, ledger and residency count bytes by kind."""

from __future__ import annotations

from enum import Enum


class Kind(str, Enum):
    """A part of a role's storage, which moves to the device and back as a whole."""

    params = "params"  # in the dtype of the forward
    grads = "grads"  # Megatron-Core's DDP gradient buffers, fp32
    main_params = "main_params"  # fp32 copies that the optimizer updates; fp32 models and inference roles have none
    moments = "moments"  # Adam's exp_avg and exp_avg_sq, fp32


#: Kinds that a forward needs, and kinds that an optimizer step needs.
FORWARD = frozenset({Kind.params})
TRAINING = frozenset(Kind)
#: Kinds that the optimizer alone holds.
OPTIMIZER = frozenset({Kind.main_params, Kind.moments})

#: Weights go to the rollout servers in buckets and files of about this size.
SHARD_BYTES = 512 * 2**20
