"""Section of the memory that a CUDA device holds besides tensors."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.option import option


@dataclass
class MemoryConfig:
    """Memory of a CUDA device besides tensors, for the memory plan; a CPU has none of it.

    The sizes are estimates, which measured ones should replace.
    """

    context_mib: float = option(
        600.0, "CUDA context and loaded kernels of one process", unit="MiB", minimum=0, finite=True
    )
    nccl_channels: int = option(24, "Channels of one NCCL communicator", unit="channels", minimum=0)
    nccl_channel_mib: float = option(
        9.2,
        "Buffers of one channel: Simple 4 (NCCL_BUFFSIZE), LL128 4.7, LL 0.5",
        unit="MiB",
        minimum=0,
        finite=True,
    )
    cublas_mib: float = option(
        64.0,
        "cuBLAS workspaces of the trainer: one of 8 x 4 for the forward's thread and one for the backward's",
        unit="MiB",
        minimum=0,
        finite=True,
    )
    te_workspace_mib: float = option(
        32.0,
        "One workspace of Transformer Engine; roles with experts have five",
        unit="MiB",
        minimum=0,
        finite=True,
    )
    allocator_slack: float = option(
        0.05,
        "Memory that torch's allocator holds beyond the tensors in it",
        unit="share of the tensors' bytes",
        minimum=0,
        below=1,
    )


@dataclass
class PpoMemoryConfig(MemoryConfig):
    """The same with a vLLM worker on the device."""

    engine_graphs_mib: float = option(
        768.0,
        "CUDA graphs of one vLLM worker: part of its share while it is awake, and kept while it sleeps",
        unit="MiB",
        minimum=0,
        finite=True,
    )
    engine_runtime_mib: float = option(
        256.0,
        "Memory besides its weights that a vLLM worker takes when it wakes for a weight sync",
        unit="MiB",
        minimum=0,
        finite=True,
    )
