"""Settings under which CUDA gives the same bits twice: what exact resume and a serial twin rest on there."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import torch

#: Variable -> value. cuBLAS keeps one workspace per stream, Transformer Engine leaves nondeterministic attention out, and NCCL does not
#: let NVLink switches add numbers up.
VARIABLES: Mapping[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "^NVLS",
}


def set_deterministic(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Set the variables that are not set, and choose torch's deterministic kernels where it has some.

    To be called before the first kernel and the first collective.

    Args:
        environment: Of this process; changed in place.

    Returns:
        Variable -> value for those that were set to something else before, and stay so.
    """
    kept = {name: environment[name] for name, value in VARIABLES.items() if environment.get(name, value) != value}
    for name, value in VARIABLES.items():
        environment.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return kept
