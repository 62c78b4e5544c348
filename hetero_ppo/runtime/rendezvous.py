"""Rendezvous of a run's launchers and ranks, without pickle and without a store that anybody can reach.

torchrun's rendezvous of one node (``--standalone``) is a store on all addresses of the machine, without a password, whose state torchrun
unpickles. Whoever can connect to it runs code as the user of the run. Here the command line gives the places of all nodes, so nothing has to
be negotiated:

- One node: the launcher's own store is in its memory. The ranks meet in a file of a directory (mode 0700) that only this user
  enters. A TCPStore on loopback serves programs that look for MASTER_ADDR and MASTER_PORT.
- Several nodes: a TCPStore of node 0, on the one address that MASTER_ADDR stands for. It has no password: see SECURITY.md.
"""

from __future__ import annotations

import argparse
import os
import secrets
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import parse_min_max_nnodes

from hetero_ppo.network import LOOPBACK, is_loopback, listening_socket
from hetero_ppo.private_dir import PrivateDir

BACKEND = "hetero_ppo"
DEFAULT_PORT = 29500
#: Environment variables of the ranks of one node: the file that they meet in, and the secret that identifies them to each other. See
#: ``distributed/world.py``, which is not imported here because it imports Megatron-Core.
STORE_FILE, RUN_KEY = "HETERO_PPO_STORE_FILE", "HETERO_PPO_RUN_KEY"


def use_static_rendezvous(args: argparse.Namespace) -> None:
    """Replace the rendezvous that torchrun's options ask for by this module's.

    Args:
        args: Parsed arguments of torchrun; changed in place.

    Raises:
        ValueError: The options name a negotiated rendezvous, or a node outside the run.
    """
    _, num_nodes = parse_min_max_nnodes(args.nnodes)
    if not args.standalone and args.rdzv_backend != "static":
        raise ValueError(
            f"--rdzv-backend={args.rdzv_backend}: torchrun's negotiated rendezvous runs code of whoever reaches its store; "
            "give --nnodes, --node-rank, --master-addr and --master-port instead"
        )
    if args.standalone and num_nodes != 1:
        raise ValueError(f"--standalone is for one node, --nnodes={args.nnodes} for several: give one of them")
    if not 0 <= args.node_rank < num_nodes:
        raise ValueError(f"--node-rank={args.node_rank} of --nnodes={args.nnodes}: must be in 0..{num_nodes - 1}")
    host, port = args.master_addr, args.master_port
    if args.rdzv_endpoint and not args.standalone:
        host, port = parse_rendezvous_endpoint(args.rdzv_endpoint, default_port=DEFAULT_PORT)
    if num_nodes == 1:
        host, port = LOOPBACK, 0 if args.standalone or port is None else port
        args.rdzv_id = str(uuid.uuid4()) if args.rdzv_id == "none" else args.rdzv_id
    elif port is None:
        port = DEFAULT_PORT
    args.standalone = False
    args.rdzv_backend = BACKEND
    args.rdzv_endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"rank={args.node_rank}"]))
    args.node_rank = 0  # torchrun warns about a node rank with any rendezvous but its own static one
    rendezvous_handler_registry.register(BACKEND, StaticRendezvous)


class StaticRendezvous(RendezvousHandler):
    """Rendezvous of one launcher.

    Args:
        parameters: Torchrun's parameters; ``endpoint`` is where node 0 listens, ``config`` has this node's ``rank`` and the ``timeout``
            in seconds.
    """

    def __init__(self, parameters: RendezvousParameters):
        self._num_nodes = parameters.max_nodes
        self._node = int(parameters.config["rank"])
        self._run_id = parameters.run_id
        self._timeout = timedelta(seconds=int(parameters.config["timeout"]))
        self._host, self._port = parse_rendezvous_endpoint(parameters.endpoint, default_port=DEFAULT_PORT)
        self._store: dist.TCPStore | None = None
        self._private_dir: PrivateDir | None = None

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """True: ranks connect to the launcher's store, and none of them listens."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the stores, or connect to node 0's. A launcher that starts its ranks again calls this again.

        Raises:
            RendezvousConnectionError: The store's port is taken, or the nodes do not meet within the timeout.
        """
        if self._num_nodes == 1:
            self._store = None  # closes the store of the ranks that ended, so that its port is free for the next ones
            self._store = self._open_store()
            if self._private_dir is None:
                self._private_dir = PrivateDir()
            os.environ[STORE_FILE] = str(self._private_dir.path / f"store_{self._store.port}")
            (self._private_dir.path / f"store_{self._store.port}").unlink(missing_ok=True)
            os.environ[RUN_KEY] = secrets.token_hex(32)
            return self._info(dist.HashStore())
        if self._store is None:
            self._store = self._open_store() if self._node == 0 else self._connect()
        return self._info(dist.PrefixStore(self._run_id, self._store))

    def _info(self, own: dist.Store) -> RendezvousInfo:
        port = self._port if self._store is None else self._store.port
        return RendezvousInfo(own, self._node, self._num_nodes, RendezvousStoreInfo(self._host, port))

    def _open_store(self) -> dist.TCPStore:
        where = f"{self._host}:{self._port}"
        try:
            listener = listening_socket(self._host, self._port)
        except OSError as error:
            raise RendezvousConnectionError(
                f"node {self._node} cannot listen on {where} ({error}): MASTER_ADDR must be an address of this node, and MASTER_PORT free"
            ) from error
        address, port = listener.getsockname()[:2]
        if self._num_nodes > 1 and is_loopback(address) and not (self._host == "localhost" or is_loopback(self._host)):
            listener.close()
            raise RendezvousConnectionError(
                f"MASTER_ADDR={self._host} stands for {address} on node 0, which other nodes do not reach: "
                "set MASTER_ADDR to the node's address in the cluster"
            )
        world = None if self._num_nodes == 1 else self._num_nodes
        try:
            return dist.TCPStore(
                self._host,
                port,
                world_size=world,
                is_master=True,
                timeout=self._timeout,
                master_listen_fd=listener.detach(),
            )
        except dist.DistError as error:
            raise self._timeout_error(error) from error

    def _connect(self) -> dist.TCPStore:
        try:
            return dist.TCPStore(
                self._host, self._port, world_size=self._num_nodes, is_master=False, timeout=self._timeout
            )
        except dist.DistError as error:
            raise self._timeout_error(error) from error

    def _timeout_error(self, error: dist.DistError) -> RendezvousConnectionError:
        reason = str(error).splitlines()[0]
        return RendezvousConnectionError(
            f"node {self._node}: the {self._num_nodes} nodes did not meet at {self._host}:{self._port} within "
            f"{self._timeout.total_seconds():.0f} s ({reason}): are all of them started, with the same NNODES and MASTER_ADDR?"
        )

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Ignore the request: no node joins later."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        """Remove the ranks' file."""
        if self._private_dir is not None:
            self._private_dir.remove()
        return True
