"""The rendezvous of launchers and ranks: nothing that others reach is unpickled or trusted, and nothing listens beyond loopback."""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousParameters
from torch.distributed.run import parse_args

from hetero_ppo import network
from hetero_ppo.cli import launcher
from hetero_ppo.network import interface_of, interface_towards, keep_collectives_inside, listening_socket
from hetero_ppo.runtime.rendezvous import BACKEND, RUN_KEY, STORE_FILE, StaticRendezvous, use_static_rendezvous

#: What another user of the machine can do: a pickle in every value of the launcher's stores, and under the name that torchrun reads.
ATTACK = """
import base64, os, pickle, sys, time
from datetime import timedelta
import torch.distributed as dist

class Payload:
    def __reduce__(self):
        return (os.system, (f"touch {sys.argv[1]}",))

planted = base64.b64encode(pickle.dumps(Payload()))
rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
ours = {os.readlink(f"/proc/{os.getppid()}/fd/{fd}") for fd in os.listdir(f"/proc/{os.getppid()}/fd")}
places = [row[1].split(":") for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in ours]
for _, port in places:
    store = dist.TCPStore("127.0.0.1", int(port, 16), is_master=False, timeout=timedelta(seconds=10))
    for key in [*store.list_keys(), "torch.rendezvous." + os.environ["TORCHELASTIC_RUN_ID"]]:
        store.set(key, planted)
until = time.monotonic() + 3  # torchrun reads it every second
while time.monotonic() < until and not os.path.exists(sys.argv[1]):
    time.sleep(0.1)
print("listens:", sorted({address for address, _ in places}))
"""


def options(*arguments: str) -> argparse.Namespace:
    args = parse_args([*arguments, "program.py"])
    use_static_rendezvous(args)
    return args


@pytest.mark.parametrize(
    ("arguments", "endpoint", "node"),
    [
        ((), "127.0.0.1:0", 0),
        (("--standalone",), "127.0.0.1:0", 0),
        (("--nnodes", "1", "--master-addr", "head", "--master-port", "12345"), "127.0.0.1:12345", 0),
        (("--nnodes", "2", "--node-rank", "1", "--master-addr", "head"), "head:29500", 1),
        (("--nnodes", "2", "--rdzv-endpoint", "head:77"), "head:77", 0),
        (("--nnodes", "2", "--master-addr", "fd00::1", "--master-port", "5"), "[fd00::1]:5", 0),
    ],
)
def test_every_way_to_start_gets_our_rendezvous(arguments: tuple[str, ...], endpoint: str, node: int) -> None:
    args = options(*arguments)
    assert (args.rdzv_backend, args.standalone, args.rdzv_endpoint) == (BACKEND, False, endpoint)
    assert args.rdzv_conf == f"rank={node}" and (args.rdzv_id != "none" or "--nnodes" in arguments and "2" in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rdzv-backend", "c10d", "--rdzv-endpoint", "head:1"],
            "error: --rdzv-backend=c10d: .* runs code of whoever",
        ),
        (["--standalone", "--nnodes", "2"], "error: --standalone is for one node, --nnodes=2 for several"),
        (["--nnodes", "2", "--node-rank", "2"], r"error: --node-rank=2 of --nnodes=2: must be in 0\.\.1"),
    ],
)
def test_what_cannot_be_kept_inside_is_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launcher.main([*arguments, "program.py"]) == 2
    assert re.match(message, capfd.readouterr().err)


def rendezvous(endpoint: str, node: int = 0, num_nodes: int = 1, timeout_s: int = 20) -> StaticRendezvous:
    return StaticRendezvous(
        RendezvousParameters(BACKEND, endpoint, "id", num_nodes, num_nodes, rank=str(node), timeout=timeout_s)
    )


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[StaticRendezvous]:
    for name in (STORE_FILE, RUN_KEY):  # it sets them
        monkeypatch.setenv(name, "")
    handler = rendezvous("127.0.0.1:0")
    yield handler
    handler.shutdown()


def listening(port: int) -> set[str]:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")}


def test_on_one_node_the_launchers_store_is_its_own_and_the_ranks_meet_in_a_private_file(
    one_node: StaticRendezvous,
) -> None:
    info = one_node.next_rendezvous()
    info.store.set("of the launcher", "1")
    assert info.store.multi_get(["of the launcher"]) == [b"1"] and one_node.use_agent_store
    place = info.bootstrap_store_info
    assert listening(place.master_port) == {"0100007F"} and place.master_addr == "127.0.0.1"
    client = dist.TCPStore(place.master_addr, place.master_port, is_master=False, timeout=timedelta(seconds=10))
    assert not [key for key in client.list_keys() if "launcher" in key]
    file = Path(os.environ[STORE_FILE])
    assert file.parent.stat().st_mode & 0o777 == 0o700 and not file.exists()
    one_node.next_rendezvous()  # ranks that are started again have a new rendezvous
    assert os.environ[STORE_FILE] != str(file)
    one_node.shutdown()
    assert not file.parent.exists()


def test_a_pickle_in_the_store_is_data(tmp_path: Path) -> None:
    """A rank does what another user of the machine can: it fills the store, as far as it can reach it, with a pickle."""
    program, ran = tmp_path / "program.py", tmp_path / "ran"
    program.write_text(ATTACK)
    command = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone", str(program), str(ran)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not ran.exists(), "the launcher has run what another user planted"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "listens: ['0100007F']"


def test_several_nodes_meet_at_the_masters_address_alone() -> None:
    with listening_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        infos = list(pool.map(lambda node: rendezvous(f"127.0.0.1:{port}", node, 2).next_rendezvous(), range(2)))
    assert [info.rank for info in infos] == [0, 1] and {info.world_size for info in infos} == {2}
    infos[0].store.set("a", "b")
    assert infos[1].store.get("a") == b"b" and listening(port) == {"0100007F"}


def test_nodes_that_cannot_meet_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            RendezvousConnectionError, match=f"node 0 cannot listen on 127.0.0.1:{port} .*MASTER_PORT free"
        ):
            rendezvous(f"127.0.0.1:{port}", 0, 2).next_rendezvous()
    with pytest.raises(
        RendezvousConnectionError, match=r"node 0 cannot listen on 192\.0\.2\.77:1 .*an address of this node"
    ):
        rendezvous("192.0.2.77:1", 0, 2).next_rendezvous()
    with pytest.raises(
        RendezvousConnectionError, match=f"node 0: the 2 nodes did not meet at 127.0.0.1:{port} within 1 s"
    ):
        rendezvous(f"127.0.0.1:{port}", 0, 2, timeout_s=1).next_rendezvous()
    found = socket.getaddrinfo("127.0.1.1", port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(
        RendezvousConnectionError, match=r"MASTER_ADDR=head stands for 127\.0\.1\.1 on node 0, .*do not reach"
    ):
        rendezvous(f"head:{port}", 0, 2).next_rendezvous()


def test_the_launcher_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run(args: argparse.Namespace) -> None:
        raise RendezvousConnectionError("node 1: the 2 nodes did not meet")

    monkeypatch.setattr(launcher, "run", run)
    assert launcher.main(["--nnodes", "2", "--node-rank", "1", "program.py"]) == 1
    assert capfd.readouterr().err == "error: node 1: the 2 nodes did not meet\n"


def test_gloo_and_nccl_listen_on_loopback_or_on_the_clusters_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network.INTERFACE_VARIABLES:
        monkeypatch.setenv(name, "of_the_cluster")
    keep_collectives_inside(one_node=True)
    loopback = interface_of("127.0.0.1")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (loopback, f"={loopback}")
    assert interface_of("127.0.1.1") == loopback and interface_of("192.0.2.77") is None
    assert interface_of("::1") in (loopback, None)  # None: a machine without IPv6
    with monkeypatch.context() as offline, pytest.raises(ValueError, match="no route to head: .*check MASTER_ADDR"):
        offline.setattr(network.socket, "getaddrinfo", Mock(side_effect=socket.gaierror("unknown")))
        interface_towards("head")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "of_the_cluster")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    keep_collectives_inside(one_node=False)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("of_the_cluster", f"={loopback}")
