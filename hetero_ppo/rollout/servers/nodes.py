"""Servers on the other nodes of a run: started and watched by a rank of their own node, on orders of rank 0.

Rank 0's node has a TCPStore that listens on the node's own address in the cluster alone. The first rank of every other node
(:class:`NodeServers`) writes there where its servers listen and how they are, and reads what it is to do; rank 0 (:class:`RemoteServer`)
does the reverse. Prompts and weights go straight to the servers. Whoever reaches the store can read all that is in it, so nothing in it is
secret, and orders and states are signed (``signed_store.py``): the run's secret went to the ranks over their process group, and every
server's key is computed from it.
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
#: A node's rank that runs at all has answered an order by then.
ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """The nodes of a run, as one of its ranks sees them."""

    node: int  # of this rank
    address: str  # of this node, that the others reach
    counts: list[int]  # servers of each node
    store: SignedStore  # between rank 0 and the other nodes' first ranks
    secret: bytes = field(repr=False)  # of the run

    def server_key(self, index: int) -> str:
        """Token of one server; it tells nothing about the others'."""
        return derived_key(self.secret, f"server {index}").hex()

    @property
    def first_index(self) -> int:
        """Number of this node's first server among all."""
        return sum(self.counts[: self.node])


def meet_nodes(
    counts: list[int], interface: str | None, master: str, timeout_s: float, world: dist.ProcessGroup
) -> Cluster:
    """Make the store and tell all ranks. Collective over the world.

    Args:
        counts: servers of each node; each node has as many ranks.
        interface: see ``network.own_address``.
        master: MASTER_ADDR of the run.
        timeout_s: deadline of the store.
        world: Group of all ranks.

    Raises:
        ValueError: this node has no such address, or some node has one that others cannot reach.
    """
    rank, ranks_per_node = world.rank(), world.size() // len(counts)
    node, address = rank // ranks_per_node, own_address(master, interface)
    store = open_store(address, timeout_s) if rank == 0 else None
    # Over the process group: what is in the store is everybody's to read.
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
    """The servers of a node that rank 0 is not on, in its first rank. They end with :meth:`close`, and with this process.

    Args:
        cluster: of this rank.
        spec: what the servers of the run have in common.
        log_dir: of the servers.
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
        self._starts = [0] * len(self._servers)  # the last one that was ordered
        self._told: list[dict[str, Any] | None] = [None] * len(self._servers)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="node-servers", daemon=True)

    def begin(self) -> None:
        """Tell rank 0 where the servers will listen, and follow its orders from now on."""
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
                    self._obey(place, server)
                    server.end_frozen_guardian()
                    self._tell(place, server)
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
                    self._tell(place, server)

    def _obey(self, place: int, server: VllmServer) -> None:
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

    def _tell(self, place: int, server: VllmServer) -> None:
        ended = server.exit_code is not None  # by itself; None: it runs, or was stopped
        if ended:
            server.refuse_clients()
        state = {"start": self._starts[place], "running": server.running, "report": server.report() if ended else ""}
        if state != self._told[place]:
            self._cluster.store.set(f"state/{server.index}", json.dumps(state))
            self._told[place] = state


class RemoteServer:
    """Rank 0's hand on a server of another node; the methods of ``VllmServer`` that a pool needs."""

    def __init__(self, cluster: Cluster, node: int, index: int, api_key: str, address: str, log_path: str):
        self.index = index
        self.api_key = api_key
        self.endpoint = Endpoint(address=address)
        self._store, self._node, self._log_path = cluster.store, node, log_path
        self._start = 0

    @property
    def name(self) -> str:
        return f"rollout server {self.index} on node {self._node} ({self.endpoint.address})"

    def spawn(self) -> None:
        """Orders a start of the process and returns when it was made.

        Raises:
            RuntimeError: the node's rank does not answer.
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
        """Nothing to do here: the node's rank looks after it."""

    def report(self) -> str:
        """State, log path and last lines, for an error message."""
        return self._state()["report"] or f"still running; log on node {self._node}: {self._log_path}"

    def terminate(self) -> None:
        """Asks for the end; :meth:`wait` sees to it."""
        self._order(stop=True)

    def wait_exit(self, timeout_s: float) -> None:
        """Waits for a process that is ending by itself; returns after the timeout if it is not."""
        deadline = time.monotonic() + timeout_s
        while self.running and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def wait(self) -> None:
        """Waits for the end that was asked for. What does not end, ends with the node's rank."""
        self.wait_exit(STOP_GRACE_S + 6.0)

    def kill(self) -> None:
        """Ends the server."""
        self.terminate()
        self.wait()


AnyServer = VllmServer | RemoteServer


def remote_servers(cluster: Cluster, timeout_s: float) -> list[RemoteServer]:
    """All servers of other nodes, once their ranks have said where they will listen.

    Raises:
        RuntimeError: a node's first rank did not say so in time.
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
    """What the first rank of a node says of its servers; see ``NodeServers.begin``."""
    deadline = time.monotonic() + timeout_s
    while (found := cluster.store.newest(f"node/{node}")) is None:
        if time.monotonic() > deadline:
            raise RunError(
                f"start: the first rank of node {node} did not announce its servers within {timeout_s:.0f} s"
            )
        time.sleep(POLL_S)
    return json.loads(found)
