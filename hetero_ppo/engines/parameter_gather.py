"""The all-gather of new parameters that an optimizer step leaves to the next training forward."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel


class ParameterGather:
    """Parameters of a distributed optimizer with ``ddp.overlap_param_gather``, on their way between data-parallel ranks.

    After an optimizer step every rank has the new values of its shard only. Megatron-Core's forward hooks gather the others layer by
    layer, in the next training forward. Everything else that reads parameters calls ``finish`` first. Without the option, parameters
    are whole when a step returns, and both methods do nothing.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, is_overlapped: bool) -> None:
        """Args:
        chunks: Wrapped model chunks of this rank.
        is_overlapped: Value of ``ddp.overlap_param_gather``.
        """
        self._chunks = chunks
        self._is_overlapped = is_overlapped
        self._has_hooks = is_overlapped  # Megatron-Core registers its forward hooks when it wraps a chunk

    def finish(self) -> None:
        """Make the parameters whole, and keep the forward hooks off until the next training forward."""
        if self._has_hooks:
            for chunk in self._chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
            self._has_hooks = False

    def use_hooks(self) -> None:
        """Let the forward hooks gather the parameters in the training forward that follows."""
        if self._is_overlapped and not self._has_hooks:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()
            self._has_hooks = True
