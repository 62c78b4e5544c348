"""A process group of the trainer and the engines' workers, for weights alone. Both sides use this module.

It is no part of the default group of either side: it has a TCPStore of its own, which listens on one address of the trainer's node, and one
gloo or NCCL communicator. Others may reach the store, so members sign what they say there (``signed_store.py``), with a key that the
workers get over HTTP. Nothing is pickled: shards come as raw bytes, after a JSON header with their tensors' names, dtypes, shapes
and places.
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
class Meeting:
    """Where and how the members of one group find each other; travels as JSON."""

    host: str
    port: int
    name: str  # what the store's names begin with; everybody may see it
    key: str = field(repr=False)  # secret, hexadecimal: signs what members write
    size: int  # members; the trainer is rank 0
    meeting_timeout_s: float
    broadcast_timeout_s: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_store(address: str, timeout_s: float) -> dist.TCPStore:
    """The store that groups meet at, on a free port of one address: torch's own choice would be all addresses."""
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
    """Another process' store."""
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(meeting: Meeting) -> dist.TCPStore:
    """The trainer's store, as another process sees it."""
    return connect_store(meeting.host, meeting.port, meeting.meeting_timeout_s)


class WeightGroup:
    """One member's end of the group. Making it waits for all members, at most ``meeting_timeout_s``.

    Args:
        store: from ``open_store`` or ``join_store``.
        meeting: the same for all.
        rank: 0 is the trainer.
        device: of the tensors; a CPU for gloo, the member's own GPU for NCCL, which takes each GPU once.

    Raises:
        RuntimeError: not all members came in time, or somebody else came.
    """

    def __init__(self, store: dist.Store, meeting: Meeting, rank: int, device: torch.device):
        self.meeting = meeting
        self.device = device
        timeout = timedelta(seconds=meeting.meeting_timeout_s)
        signed = SignedStore(store, bytes.fromhex(meeting.key), meeting.name)
        signed.set_timeout(timeout)
        self._store = signed  # it lives as long as the group
        self._group: Any  # torch's stubs have no collectives of a backend
        if device.type == "cpu":
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
            # One that leads to the others, where gloo's own choice is what the host name stands for.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=own_address(meeting.host))]
            options._threads = 1
            options._timeout = timeout
            self._group = dist.ProcessGroupGloo(signed, rank, meeting.size, options)
            prove_peers(self._group, bytes.fromhex(meeting.key), meeting.name)
        else:
            # Not in a build of torch without NCCL.
            from torch.distributed import ProcessGroupNCCL

            nccl = ProcessGroupNCCL.Options()
            # torch ends the whole process at this one: the deadline of ``broadcast`` comes before it.
            nccl._timeout = timedelta(seconds=2 * meeting.broadcast_timeout_s)
            self._group = ProcessGroupNCCL(signed, rank, meeting.size, nccl)

    def broadcast(self, data: Tensor) -> None:
        """The trainer's bytes into every member's ``data``; returns when they are there.

        Raises:
            RuntimeError: a member is gone, or it took longer than ``broadcast_timeout_s``.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=self.meeting.broadcast_timeout_s)
        if self.device.type == "cpu":
            self._group.broadcast([data], options).wait()
            return
        with torch.cuda.device(self.device):
            work = self._group.broadcast([data], options)
            deadline = time.monotonic() + self.meeting.broadcast_timeout_s
            while not work.is_completed():  # wait() orders streams alone, and would wait for ever
                if time.monotonic() > deadline:
                    self._group.abort()
                    raise RuntimeError(
                        f"NCCL broadcast of weights: not done within {self.meeting.broadcast_timeout_s:.0f} s"
                    )
                time.sleep(POLL_S)
            work.wait()
            torch.cuda.synchronize()
