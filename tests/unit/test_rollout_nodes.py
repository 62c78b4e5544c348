"""Servers of another node: rank 0's orders and what it hears, with a process that is no vLLM."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers import nodes, server
from hetero_ppo.rollout.servers.nodes import Cluster, NodeServers, RemoteServer, remote_servers
from hetero_ppo.rollout.servers.server import ServerSpec
from hetero_ppo.rollout.weights.signed_store import RefusedValueError, SignedStore, derived_key
from hetero_ppo.rollout.weights.weight_group import connect_store, open_store

SPEC = ServerSpec("model", Dtype.fp32, 8, True, False, RolloutConfig(), 1)
SECRET = b"of the run" * 3
PROGRAM = "import os, time; print('here', os.environ['VLLM_API_KEY'], os.getpid(), flush=True); time.sleep(60)"


def cluster(node: int, counts: list[int], store: dist.Store) -> Cluster:
    """Make a cluster as ``rendezvous`` does."""
    return Cluster(
        node, "127.0.0.1", counts, SignedStore(store, derived_key(SECRET, "orders and states"), "servers"), SECRET
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_orders_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "command_line", lambda spec, endpoint: [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(nodes, "POLL_S", 0.02)
    store = open_store("127.0.0.1", 20.0)
    rank_0 = cluster(0, [2, 1], store)
    other = cluster(1, [2, 1], connect_store("127.0.0.1", store.port, 20.0))
    with pytest.raises(RunError, match="start: the first rank of node 1 did not announce its servers within 0 s"):
        remote_servers(rank_0, 0.1)
    on_node = NodeServers(other, SPEC, tmp_path)
    try:
        on_node.begin()
        (remote,) = remote_servers(rank_0, 20.0)
        log = tmp_path / "server_2.log"
        assert remote.name == f"rollout server 2 on node 1 ({remote.endpoint})" and not remote.running
        remote.spawn()
        wait_until(lambda: log.exists() and f"here {remote.api_key}" in log.read_text())
        assert remote.running and "still running; log on node 1" in remote.report()
        assert_nothing_secret(store, remote.api_key)
        assert_stranger_is_refused(store, remote, on_node)

        os.kill(int(log.read_text().split()[2]), signal.SIGKILL)
        remote.wait_exit(20.0)
        assert not remote.running and "exit code 137 (SIGKILL)" in remote.report() and str(log) in remote.report()
        remote.kill()
        remote.spawn()
        assert remote.running
        remote.kill()
        assert not remote.running
        remote.spawn()
    finally:
        on_node.close()
    assert not remote.running, "a server ends with its node's rank"
    monkeypatch.setattr(nodes, "ANSWER_TIMEOUT_S", 0.1)
    with pytest.raises(RunError, match="rollout server 2 on node 1 .*: the node's first rank did not start it"):
        remote.spawn()


def test_a_rank_0_that_is_gone_ends_the_servers_of_other_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "command_line", lambda spec, endpoint: [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(nodes, "POLL_S", 0.02)
    store = open_store("127.0.0.1", 20.0)
    client = connect_store("127.0.0.1", store.port, 1.0)
    on_node = NodeServers(cluster(1, [1, 1], client), SPEC, tmp_path)
    on_node.begin()
    remote = RemoteServer(cluster(0, [1, 1], store), 1, 1, "", "", "")
    remote.spawn()
    assert on_node._servers[0].running
    del store, remote  # its port closes
    on_node._thread.join(20.0)
    assert not on_node._thread.is_alive() and not on_node._servers[0].running
    on_node.close()
    assert not on_node._private_dir.path.exists() and timedelta(0) < client.timeout


def assert_nothing_secret(store: dist.TCPStore, api_key: str) -> None:
    """Assert that the store has no key in it, neither in names nor in values."""
    names = store.list_keys()
    assert {"servers/node/1", "servers/order/2", "servers/state/2"} <= set(names)
    seen = b" ".join([*(name.encode() for name in names), *(store.get(name) for name in names)])
    for secret in (api_key.encode(), bytes.fromhex(api_key), SECRET, SECRET.hex().encode()):
        assert secret not in seen


def assert_stranger_is_refused(store: dist.TCPStore, remote: RemoteServer, on_node: NodeServers) -> None:
    """Assert that the server ignores orders to stop that are made up, have another key or name, or are repeated."""
    stop = json.dumps({"start": 1, "stop": True})
    genuine, state = store.get("servers/order/2"), store.get("servers/state/2")
    strangers = SignedStore(store, b"another key", "servers")
    for forge in (
        lambda: store.set("servers/order/2", stop),
        lambda: strangers.set("order/2", stop),
        lambda: store.set("servers/order/2", state),
        lambda: store.set("servers/order/2", genuine[:-1] + b" "),
    ):
        forge()
        with pytest.raises(RefusedValueError, match="servers/order/2: a value that was not written by this run"):
            on_node._cluster.store.get("order/2")
    store.set("servers/order/2", genuine)
    remote._order(stop=False)
    assert on_node._cluster.store.newest("order/2") is not None
    store.set("servers/order/2", genuine)
    with pytest.raises(RefusedValueError, match="servers/order/2: an old value, written once more"):
        on_node._cluster.store.get("order/2")
    store.set("servers/state/2", json.dumps({"start": 1, "running": False, "report": "made up"}))
    assert remote.running and "made up" not in remote.report()
    store.set("servers/state/2", state)
