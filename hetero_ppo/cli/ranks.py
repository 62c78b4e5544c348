"""Print an error once, whether every rank of a run has it or only one."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

#: Time that the other ranks leave the first one to print, when all find the same mistake at about the same time.
FIRST_RANK_HEAD_START_S = 1.0


def say_error(text: str) -> None:
    """Print ``error: <text>`` on stderr. Under torchrun the ranks of a node print equal texts once.

    torchrun makes a folder for each launch. The first rank that marks the text there prints it; the others print nothing. A text that no
    other rank has is always printed, with its rank.
    """
    rank, local_rank = os.environ.get("RANK"), os.environ.get("LOCAL_RANK", "0")
    where = "" if local_rank == "0" else f" (rank {rank})"
    if local_rank != "0":
        # torchrun ends all ranks when one has ended, so SIGTERM has to wait until this one has printed.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(FIRST_RANK_HEAD_START_S)
    if _is_first_to_say(text):
        print(f"error{where}: {text}", file=sys.stderr, flush=True)


def _is_first_to_say(text: str) -> bool:
    # torchrun: <folder of this launch>/attempt_<n>/<local rank>/error.json
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not error_file:
        return True
    folder = Path(error_file).parent.parent
    if not folder.is_dir():
        return True
    digest = hashlib.sha256(text.encode()).hexdigest()
    try:
        (folder / f"said_{digest[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
