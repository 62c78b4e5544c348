"""A process group of the trainer and the servers' workers, for weights only. Both sides use this module.

It is independent of the default group of either side. It has its own TCPStore, which listens on one address of the trainer's node, and one
gloo or NCCL communicator. Others may reach the store, so members sign what they write there (``signed_store.py``), with a key that the
workers get over HTTP. Nothing is pickled: buckets are raw bytes, and their names, dtypes, shapes and places come as JSON.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.network import listening_socket, own_address
from hetero_ppo.peer_proof import prove_peers
from hetero_ppo.rollout.weights.signed_store import SignedStore

POLL_S = 0.001


@dataclass(frozen=True)
class Rendezvous:
    """Data with which the members of one group find each other. It is sent as JSON."""

    host: str
    port: int
    name: str  # prefix of the group's names in the store; it is no secret
    key: str = field(repr=False)  # secret key that signs what members write, hexadecimal
    size: int  # number of members; the trainer is rank 0
    join_timeout_s: float
    broadcast_timeout_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """Open a store on a free port of one address. torch itself would listen on all addresses."""
    listener = listening_socket(address, 0)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),  # the store closes it
    )


def connect_store(host: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to another process' store."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(rendezvous: Rendezvous) -> dist.TCPStore:
    """Connect to the trainer's store."""
    return connect_store(rendezvous.host, rendezvous.port, rendezvous.join_timeout_s)


class WeightGroup:
    """One member's end of the group. Its constructor waits for all members, at most ``join_timeout_s``.

    Args:
        store: Store of ``open_store`` or ``join_store``.
        rendezvous: Rendezvous of the group, the same for all members.
        rank: Rank of this member. The trainer is rank 0.
        device: Device of the tensors: a CPU for gloo, the member's own GPU for NCCL, which accepts each GPU once.

    Raises:
        RuntimeError: Not all members came in time, or another process came.
    """

    def __init__(self, store: dist.Store, rendezvous: Rendezvous, rank: int, device: torch.device):
        self.rendezvous = rendezvous
        self.device = device
        timeout = timedelta(seconds=rendezvous.join_timeout_s)
        signed = SignedStore(store, bytes.fromhex(rendezvous.key), rendezvous.name)
        signed.set_timeout(timeout)
        self._store = signed  # it lives as long as the group
        self._group: Any  # torch's stubs have no collectives of a backend
        if device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
            # The address that leads to the others. gloo itself would take the one that the host name resolves to.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(rendezvous.host))]
            options._threads = 1
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(signed, rank, rendezvous.size, options)
            prove_peers(self._group, bytes.fromhex(rendezvous.key), rendezvous.name)
        else:
            # A build of torch without NCCL does not have it.
            from torch.distributed import ProcessGroupNCCL

            nccl = ProcessGroupNCCL.Options()
            # torch ends the whole process at this deadline, so it must come after that of ``broadcast``.
            nccl._timeout = timedelta(seconds=2 * rendezvous.broadcast_timeout_s)
            self._group = ProcessGroupNCCL(signed, rank, rendezvous.size, nccl)

    def broadcast(self, data: Tensor) -> None:
        """Copy the trainer's bytes into every member's ``data``, and return when they are there.

        Args:
            data: [bytes] uint8 on the group's device, of equal size on all members.

        Raises:
            RuntimeError: A member is gone, or the broadcast took longer than ``broadcast_timeout_s``.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.rendezvous.broadcast_timeout_s)
        if self.device.type == "cpu":
            self._group.broadcast([data], options).wait()
            return
        with torch.cuda.device(self.device):
            work = self._group.broadcast([data], options)
            deadline = time.monotonic() + self.rendezvous.broadcast_timeout_s
            while not work.is_completed():  # wait() only orders streams, and has no deadline
                if time.monotonic() > deadline:
                    self._group.abort()
                    raise RuntimeError(
                        f"NCCL broadcast of weights: not done within {self.rendezvous.broadcast_timeout_s:.0f} s"
                    )
                time.sleep(POLL_S)
            work.wait()
            torch.cuda.synchronize()
