"""Several ``hetero-ppo`` command lines one after the other, in the processes of one torchrun: importing is most of a tiny run.

    torchrun ... tests/commands_worker.py '[[29511, ["train", "--config", ...]], [29512, ["!", "train", ...]], ...]'

Each command has a free port. Ends with the largest exit status; a command whose first word is ``!`` has to end with status 2.
"""

from __future__ import annotations

import json
import os
import sys

from hetero_ppo.cli.main import main


def run(port: int, command: list[str]) -> int:
    # A second world can't be made in torchrun's own store, which keeps the keys of the first one.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    expected_to_fail = command[0] == "!"
    status = main(command[1:] if expected_to_fail else command)
    if expected_to_fail:
        return 0 if status == 2 else 1
    return status


if __name__ == "__main__":
    statuses = [run(port, command) for port, command in json.loads(sys.argv[1])]
    print(f"exit statuses: {statuses}", flush=True)
    sys.exit(max(statuses))
