"""Several ``hetero-ppo`` command lines one after the other, in the processes of one launch (``ranks.run_ranks``).

    commands_worker.py '[["train", "--config", ...], ["!", "train", ...], ...]'

Ends with the largest exit status; a command whose first word is ``!`` has to end with status 2.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore

from hetero_ppo.cli.main import main

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
#: Where ranks agree on the address of each command's world.
STORE = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), WORLD_SIZE, RANK == 0, timedelta(minutes=2))


def free_port(number: int) -> int:
    """Return a port that is free now, the same on all ranks. It is chosen right before each command, since connections of the commands
    before it take ports, too.
    """
    if RANK == 0:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            STORE.set(f"port {number}", str(listener.getsockname()[1]))
    return int(STORE.get(f"port {number}"))


def run(number: int, command: list[str]) -> int:
    os.environ["MASTER_PORT"] = str(free_port(number))
    expected_to_fail = command[0] == "!"
    status = main(command[1:] if expected_to_fail else command)
    if expected_to_fail:
        return 0 if status == 2 else 1
    return status


if __name__ == "__main__":
    statuses = [run(number, command) for number, command in enumerate(json.loads(sys.argv[1]))]
    if RANK == 0:
        print(f"exit statuses: {statuses}", flush=True)
    STORE.set(f"done {RANK}", "")
    if RANK == 0:  # the store is its
        STORE.wait([f"done {rank}" for rank in range(WORLD_SIZE)])
    sys.exit(max(statuses))
