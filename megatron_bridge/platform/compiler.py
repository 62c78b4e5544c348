"""Check for the C compiler that Triton and torch.compile call at run time on CUDA."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

#: Compilers that Triton looks for when CC names none.
COMPILERS = ("gcc", "clang", "cc")


def check_compiler(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError when there is no C compiler.

    Args:
        environment: Environment variables; CC and PATH are read.
    """
    named = environment.get("CC")
    if not any(shutil.which(name, path=environment.get("PATH")) for name in ([named] if named else COMPILERS)):
        looked_for = f"CC={named}" if named else ", ".join(COMPILERS)
        raise ValueError(
            f"no C compiler ({looked_for}): on CUDA Triton and torch compile kernels' launchers while a run starts. Install gcc, "
            "or set CC to a compiler"
        )
