"""The rendezvous of a run's ranks, and the proof that they belong to the same run.

The launcher puts both into the environment. Ranks of one node meet in a file of a private directory (runtime/rendezvous.py). Ranks of
several nodes meet at a TCPStore at MASTER_ADDR and MASTER_PORT, which the launcher of node 0 opens. Where ranks were started by hand,
rank 0 opens it.
"""

from __future__ import annotations

import hmac
import logging
import os
from datetime import timedelta

import torch.distributed as dist

from hetero_ppo.network import listening_socket

log = logging.getLogger(__name__)

#: Secret of the run, the same on all ranks. The launcher makes it for one node, the batch script or the user for several.
RUN_KEY = "HETERO_PPO_RUN_KEY"
STORE_FILE = "HETERO_PPO_STORE_FILE"  # path of the file at which the ranks of one node meet
#: MASTER_PORT -> store that this process has opened there. A later world meets at the same store.
_opened: dict[str, dist.Store] = {}


def run_key() -> bytes | None:
    """Return the run's secret; None where nobody made one. Rank 0 of several then logs a warning."""
    key = os.environ.get(RUN_KEY, "")
    if key:
        return hmac.digest(key.encode(), b"process groups", "sha256")
    if os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] != "1":
        log.warning(
            "%s is not set: ranks cannot tell each other from strangers who reach their ports (SECURITY.md). Start one node with "
            "scripts/train_*.sh or hetero_ppo.cli.launcher; give several nodes the same secret in %s",
            RUN_KEY,
            RUN_KEY,
        )
    return None


def open_store(timeout: timedelta) -> dist.Store:
    """Return the store at which the ranks of this process' world meet.

    Raises:
        OSError: The port is taken, or MASTER_ADDR is not an address of rank 0's machine.
        DistNetworkError: No store answers within the timeout.
    """
    world_size, port = int(os.environ["WORLD_SIZE"]), os.environ["MASTER_PORT"]
    if world_size == 1:
        return dist.HashStore()  # in this process alone: nothing listens
    if port not in _opened:
        _opened[port] = _open(world_size, port, timeout)
    _opened[port].set_timeout(timeout)
    return _opened[port]


def _open(world_size: int, port: str, timeout: timedelta) -> dist.Store:
    # A world that was started inside a launcher's world inherits the variable, but has another port.
    file = os.environ.get(STORE_FILE, "")
    if file.endswith(f"/store_{port}"):
        return dist.FileStore(file, world_size)
    host = os.environ["MASTER_ADDR"]
    if os.environ["RANK"] != "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    listener = listening_socket(host, int(port))  # torch would listen on all addresses
    return dist.TCPStore(
        host, int(port), is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )


def require_one_key(store: dist.Store, key: bytes | None) -> None:
    """Compare the ranks' keys, before ranks with and without one would wait for each other. Collective over the world.

    Raises:
        ValueError: Some ranks have another key than rank 0, or none.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    own = "none" if key is None else hmac.digest(key, b"which key", "sha256").hex()
    store.set(f"key of rank {rank}", own)
    if any(store.get(f"key of rank {peer}").decode() != own for peer in range(world_size)):
        raise ValueError(f"{RUN_KEY} is not the same on all nodes: set it to one secret on every node, or on none")
