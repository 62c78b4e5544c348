"""What a role keeps in memory, by kind. Plan, ledger and residency count in these."""

from __future__ import annotations

from enum import Enum


class Kind(str, Enum):
    """A role's storage that enters and leaves the device as one."""

    params = "params"  # in the dtype of the forward
    grads = "grads"  # Megatron-Core's DDP gradient buffers, fp32
    main_params = "main_params"  # fp32 copies that the optimizer updates; fp32 models and inference roles have none
    moments = "moments"  # Adam's exp_avg and exp_avg_sq, fp32


#: What a forward needs, and what an optimizer step needs.
FORWARD = frozenset({Kind.params})
TRAINING = frozenset(Kind)
#: What the optimizer alone holds.
OPTIMIZER = frozenset({Kind.main_params, Kind.moments})

#: Weights go to the rollout servers in buckets and files of about this size.
SHARD_BYTES = 512 * 2**20
