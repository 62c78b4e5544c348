"""Runs servers on the other nodes of a run. A rank of their own node starts and watches them, on orders of rank 0.

Rank 0's node has a TCPStore, which listens only on the node's own address in the cluster. The first rank of every other node
(:class:`NodeServers`) writes its servers' addresses and states there, and reads orders. Rank 0 (:class:`RemoteServer`) writes orders
and reads states. Prompts and weights go straight to the servers.

Everybody who reaches the store can read it. So it has no secret in it, and orders and states are signed (``signed_store.py``). The ranks got
the run's secret over their process group, and every server's key is computed from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.errors import RunError
from hetero_ppo.network import own_address
from hetero_ppo.private_dir import PrivateDir
from hetero_ppo.rollout.servers.server import STOP_GRACE_S, Endpoint, ServerSpec, VllmServer
from hetero_ppo.rollout.weights.signed_store import SignedStore, derived_key, new_secret
from hetero_ppo.rollout.weights.weight_group import connect_store, open_store

log = logging.getLogger(__name__)

POLL_S = 0.2
#: Deadline of a node's rank to handle an order. A rank that still runs is faster.
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """The nodes of a run, as one of its ranks sees them."""

    node: int  # node of this rank
    address: str  # address of this node that the others reach
    counts: list[int]  # number of servers of each node
    store: SignedStore  # for orders and states, between rank 0 and the other nodes' first ranks
    secret: bytes = field(repr=False)  # key of the run

    def server_key(self, index: int) -> str:
        """Return the token of one server. It reveals nothing about the other tokens."""
        return derived_key(self.secret, f"server {index}").hex()

    @property
    def first_index(self) -> int:
        """Number of this node's first server among all servers."""
        return sum(self.counts[: self.node])


def rendezvous(
    counts: list[int], interface: str | None, master: str, timeout_s: float, world: dist.ProcessGroup
) -> Cluster:
    """Open the store on rank 0 and connect all ranks to it. Collective over the world.

    Args:
        counts: Number of servers of each node. All nodes have equally many ranks.
        interface: Network interface, see ``network.own_address``.
        master: MASTER_ADDR of the run.
        timeout_s: Deadline of the store in seconds.
        world: Group of all ranks.

    Raises:
        ValueError: This node has no such address, or some node has one that others cannot reach.
    """
    rank, ranks_per_node = world.rank(), world.size() // len(counts)
    node, address = rank // ranks_per_node, own_address(master, interface)
    store = open_store(address, timeout_s) if rank == 0 else None
    # Sent over the process group, because everybody can read the store.
    place = None if store is None else {"host": address, "port": store.port, "secret": new_secret().hex()}
    place = broadcast_json(place, 0, world)
    num_loopback = torch.tensor([int(address.startswith("127."))])
    dist.all_reduce(num_loopback, group=world)
    if 0 < int(num_loopback) < world.size():  # all of them: the "nodes" are one machine
        raise ValueError(
            f"rollout.interface: node {node} has the address {address} and rank 0's node {place['host']}; some nodes have a loopback "
            "address, which others do not reach: set MASTER_ADDR to an address of the cluster, or rollout.interface to its interface"
        )
    if store is None:
        store = connect_store(place["host"], place["port"], timeout_s)
    secret = bytes.fromhex(place["secret"])
    return Cluster(
        node, address, counts, SignedStore(store, derived_key(secret, "orders and states"), "servers"), secret
    )


class NodeServers:
    """Runs the servers of a node other than rank 0's, in its first rank. They end with :meth:`close`, and with this process.

    Args:
        cluster: Nodes of the run, as this rank sees them.
        spec: Settings that all servers share.
        log_dir: Folder of the servers' logs.
    """

    def __init__(self, cluster: Cluster, spec: ServerSpec, log_dir: Path):
        self._cluster = cluster
        self._private_dir = PrivateDir()
        indices = range(cluster.first_index, cluster.first_index + cluster.counts[cluster.node])
        self._servers = [
            VllmServer(
                index,
                spec,
                self._private_dir.path,
                log_dir / f"server_{index}.log",
                place=place,
                address=cluster.address,
                api_key=cluster.server_key(index),
            )
            for place, index in enumerate(indices)
        ]
        self._starts = [0] * len(self._servers)  # number of each server's last start
        # State of each server that rank 0 has.
        self._reported: list[dict[str, Any] | None] = [None] * len(self._servers)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="node-servers", daemon=True)

    def begin(self) -> None:
        """Send the servers' addresses to rank 0, and handle its orders from now on."""
        listening = [
            {"index": server.index, "address": server.endpoint.address, "log": str(server.log_path)}
            for server in self._servers
        ]
        self._cluster.store.set(f"node/{self._cluster.node}", json.dumps(listening))
        self._thread.start()

    def close(self) -> None:
        """End the servers. May be called more than once."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join()
        for server in self._servers:
            server.release_port()
        self._private_dir.remove()

    def _follow(self) -> None:
        try:
            while not self._closed.wait(POLL_S):
                for place, server in enumerate(self._servers):
                    self._handle_order(place, server)
                    server.end_frozen_guardian()
                    self._notify(place, server)
        except dist.DistError as error:
            if not self._closed.is_set():
                log.warning("node %d: rank 0 does not answer any more (%s); its servers end", self._cluster.node, error)
        finally:
            for server in self._servers:
                server.terminate()
            for server in self._servers:
                server.wait()
            with contextlib.suppress(dist.DistError):  # rank 0 may have ended before
                for place, server in enumerate(self._servers):
                    self._notify(place, server)

    def _handle_order(self, place: int, server: VllmServer) -> None:
        found = self._cluster.store.newest(f"order/{server.index}")
        if found is None:
            return
        order = json.loads(found)
        if order["start"] > self._starts[place]:
            server.kill()
            server.spawn()
            self._starts[place] = order["start"]
        elif order["stop"] and server.running:
            server.terminate()
            server.wait()

    def _notify(self, place: int, server: VllmServer) -> None:
        ended = server.exit_code is not None  # by itself; None: it runs, or was stopped
        if ended:
            server.refuse_clients()
        state = {"start": self._starts[place], "running": server.running, "report": server.report() if ended else ""}
        if state != self._reported[place]:
            self._cluster.store.set(f"state/{server.index}", json.dumps(state))
            self._reported[place] = state


class RemoteServer:
    """A server of another node, as rank 0 controls it. It has the methods of ``VllmServer`` that a pool needs."""

    def __init__(self, cluster: Cluster, node: int, index: int, api_key: str, address: str, log_path: str):
        self.index = index
        self.api_key = api_key
        self.endpoint = Endpoint(address=address)
        self._store, self._node, self._log_path = cluster.store, node, log_path
        self._start = 0

    @property
    def name(self) -> str:
        """Name of the server in messages."""
        return f"rollout server {self.index} on node {self._node} ({self.endpoint.address})"

    def spawn(self) -> None:
        """Order a start of the process, and return when it was started.

        Raises:
            RuntimeError: The node's rank does not answer.
        """
        self._start += 1
        self._order(stop=False)
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while self._state()["start"] != self._start:
            if time.monotonic() > deadline:
                raise RunError(
                    f"start: {self.name}: the node's first rank did not start it within {ANSWER_TIMEOUT_S:.0f} s"
                )
            time.sleep(POLL_S)

    def _order(self, *, stop: bool) -> None:
        self._store.set(f"order/{self.index}", json.dumps({"start": self._start, "stop": stop}))

    def _state(self) -> dict[str, Any]:
        found = self._store.newest(f"state/{self.index}")
        return {"start": 0, "running": False, "report": ""} if found is None else json.loads(found)

    @property
    def running(self) -> bool:
        state = self._state()
        return state["start"] == self._start and state["running"]

    def end_frozen_guardian(self) -> None:
        """Leave the guardian to the node's rank, which watches it."""

    def report(self) -> str:
        """Return state, log path and last lines of the server, for an error message."""
        return self._state()["report"] or f"still running; log on node {self._node}: {self._log_path}"

    def terminate(self) -> None:
        """Order the end of the server. :meth:`wait` waits for it."""
        self._order(stop=True)

    def wait_exit(self, timeout_s: float) -> None:
        """Wait for a process that is ending by itself, at most ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Wait for the end that was ordered. A process that does not end by then ends with the node's rank."""
        self.wait_exit(STOP_GRACE_S + 6.0)

    def kill(self) -> None:
        """End the server."""
        self.terminate()
        self.wait()


AnyServer = VllmServer | RemoteServer


def remote_servers(cluster: Cluster, timeout_s: float) -> list[RemoteServer]:
    """Return all servers of other nodes, once their ranks have announced the addresses.

    Raises:
        RuntimeError: A node's first rank did not announce its servers in time.
    """
    servers: list[RemoteServer] = []
    for node, count in enumerate(cluster.counts):
        if node == cluster.node or count == 0:
            continue
        for one in _announced(cluster, node, timeout_s):
            key = cluster.server_key(one["index"])
            servers.append(RemoteServer(cluster, node, one["index"], key, one["address"], one["log"]))
    return servers


def _announced(cluster: Cluster, node: int, timeout_s: float) -> list[dict[str, Any]]:
    """Return what the first rank of a node announces about its servers; see ``NodeServers.begin``."""
    deadline = time.monotonic() + timeout_s
    while (found := cluster.store.newest(f"node/{node}")) is None:
        if time.monotonic() > deadline:
            raise RunError(
                f"start: the first rank of node {node} did not announce its servers within {timeout_s:.0f} s"
            )
        time.sleep(POLL_S)
    return json.loads(found)
