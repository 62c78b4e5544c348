"""A server's command line and environment, seeds, and checks that come before any request."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.generator_requests import ask

from hetero_ppo.config.checks_rollout import check_weight_transfer
from hetero_ppo.config.derived import num_servers, servers_of_nodes
from hetero_ppo.config.schema import Dtype, PpoConfig, RolloutConfig, SamplingConfig, WeightTransfer
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers import server as server_module
from hetero_ppo.rollout.vllm import VllmGenerator, check_devices
from hetero_ppo.rollout.checks import check_prompts
from hetero_ppo.rollout.requests import response_seed
from hetero_ppo.rollout.servers.server import (
    Endpoint,
    ServerSpec,
    VllmServer,
    command_line,
    environment,
    first_error,
    server_threads,
)


SOCKET = Endpoint(socket_path=Path("/run/0.sock"))


def make_spec(cuda: bool = False, load_weights: bool = True, **config: float) -> ServerSpec:
    return ServerSpec("/models/tiny", Dtype.bf16, 96, load_weights, cuda, RolloutConfig(**config), threads=3)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_cpu_command_line() -> None:
    command = command_line(make_spec(kv_cache_mib=8, max_num_seqs=24), SOCKET)
    assert option(command, "--max-num-seqs") == "24"
    assert option(command, "--uds") == "/run/0.sock" and "--port" not in command
    assert option(command, "--dtype") == "bfloat16"
    assert option(command, "--kv-cache-memory-bytes") == str(8 * 1024 * 1024)
    assert option(command, "--generation-config") == "vllm"
    assert option(command, "--logprobs-mode") == "processed_logprobs"
    assert "--enforce-eager" in command and "--gpu-memory-utilization" not in command
    assert option(command, "--load-format") == "safetensors"  # never pickled weights


def test_servers_have_a_tokenizer_only_when_stop_strings_need_one() -> None:
    assert "--skip-tokenizer-init" in command_line(make_spec(), SOCKET)
    command = command_line(dataclasses.replace(make_spec(), tokenizer_path="/tokenizer"), SOCKET)
    assert option(command, "--tokenizer") == "/tokenizer" and "--skip-tokenizer-init" not in command
    engine = VllmGenerator(
        RolloutConfig(), model_path="m", dtype=Dtype.fp32, run_dir=Path("r"), max_model_len=64, eos_token_ids=[1]
    )
    with pytest.raises(ValueError, match="sampling.stop=.*needs a tokenizer"):
        ask(engine, [[1]], SamplingConfig(max_tokens=4, stop=["\n"]), n=1, seed=0)


def test_cuda_command_line_compiles_and_takes_a_share_of_the_device() -> None:
    command = command_line(
        make_spec(cuda=True, load_weights=False, tensor_parallel=2, gpu_memory_utilization=0.3), SOCKET
    )
    assert option(command, "--gpu-memory-utilization") == "0.3" and option(command, "--tensor-parallel-size") == "2"
    assert "--enforce-eager" not in command and "--kv-cache-memory-bytes" not in command
    assert option(command, "--load-format") == "dummy"
    assert "--enable-sleep-mode" in command
    assert "--enable-sleep-mode" not in command_line(make_spec(cuda=True, sleep=False), SOCKET)


def test_torchrun_variables_do_not_reach_the_server() -> None:
    inherited = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    inherited |= {"OMP_NUM_THREADS": "7", "HOME": "/home/me", "PYTHONPATH": "/mine"}
    env = environment(make_spec(), 1, Path("/private"), "key", inherited)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & env.keys()
    assert env["HOME"] == "/home/me" and env["OMP_NUM_THREADS"] == "3" and env["TMPDIR"] == "/private/tmp_1"
    assert env["OMP_WAIT_POLICY"] == "passive"
    assert env["VLLM_API_KEY"] == "key" and env["PYTHONPATH"].endswith(":/mine")


def test_each_server_gets_its_own_devices() -> None:
    inherited = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    env = environment(make_spec(cuda=True, tensor_parallel=2), 1, Path("/private"), "key", inherited)
    assert env["CUDA_VISIBLE_DEVICES"] == "6,7" and "OMP_NUM_THREADS" not in env
    env = environment(make_spec(cuda=True, tensor_parallel=2), 1, Path("/private"), "key", {})
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_gpus_run_the_model_runner_that_a_cpu_has() -> None:
    for inherited, value in (({}, "0"), ({"VLLM_USE_V2_MODEL_RUNNER": "1"}, "1")):
        env = environment(make_spec(cuda=True), 0, Path("/private"), "key", inherited)
        assert env["VLLM_USE_V2_MODEL_RUNNER"] == value
    assert "VLLM_USE_V2_MODEL_RUNNER" not in environment(make_spec(), 0, Path("/private"), "key", {})


def test_batch_invariance_is_asked_for_by_a_variable() -> None:
    for is_invariant, value in ((True, "1"), (False, "0")):  # whatever the user's shell has
        spec = make_spec(cuda=True, batch_invariant=is_invariant)
        assert (
            environment(spec, 0, Path("/private"), "key", {"VLLM_BATCH_INVARIANT": "x"})["VLLM_BATCH_INVARIANT"]
            == value
        )


@pytest.mark.parametrize(
    ("cores", "servers", "asked", "threads"), [(2, 1, None, 2), (16, 3, None, 5), (1, 2, None, 1), (2, 1, 1, 1)]
)
def test_server_threads(cores: int, servers: int, asked: int | None, threads: int) -> None:
    assert server_threads(RolloutConfig(server_threads=asked), cores, servers) == threads


def test_a_server_for_every_rank_or_as_many_as_asked_for() -> None:
    assert [num_servers(RolloutConfig(tensor_parallel=tp), 4) for tp in (1, 2, 4, 8)] == [4, 2, 1, 1]
    assert num_servers(RolloutConfig(num_servers=3), 4) == 3
    config = RolloutConfig(num_servers=5, tensor_parallel=2)
    check_devices(config, 3, 6)
    check_devices(config, 3, None)
    with pytest.raises(
        ValueError, match="num_servers=5 with rollout.tensor_parallel=2 needs 6 GPUs on .* for 3 servers; it has 4"
    ):
        check_devices(config, 3, 4)
    with pytest.raises(ValueError, match="rollout.batch_invariant=True: it is for GPUs, and there is none"):
        check_devices(RolloutConfig(batch_invariant=True), 1, None)
    check_devices(RolloutConfig(batch_invariant=True), 1, 1)
    with pytest.raises(ValueError, match="rollout.weight_transfer=cuda_ipc: there is no GPU here"):
        check_devices(RolloutConfig(weight_transfer=WeightTransfer.cuda_ipc), 1, None)


def test_servers_are_dealt_over_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert servers_of_nodes(RolloutConfig(num_servers=3), 8) == [3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert servers_of_nodes(RolloutConfig(num_servers=1), 8) == [1, 0, 0, 0]
    assert servers_of_nodes(RolloutConfig(tensor_parallel=2), 8) == [1, 1, 1, 1]
    assert servers_of_nodes(RolloutConfig(num_servers=6), 8) == [2, 2, 1, 1]
    config = PpoConfig(rollout=RolloutConfig(num_servers=6, weight_transfer=WeightTransfer.shared_memory))
    with pytest.raises(
        ValueError, match="rollout.weight_transfer=shared_memory: .* and 4 of 6 are on other nodes; use auto"
    ):
        check_weight_transfer(config, 8)


def steal(port: int) -> list[str]:
    """Try to listen on a port of 127.0.0.1 from another process. Return the ways that worked."""
    stolen = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::")):
        for options in ((), (socket.SO_REUSEADDR,), (socket.SO_REUSEPORT,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)):
            with socket.socket(family) as thief, contextlib.suppress(OSError):
                for option_ in options:
                    thief.setsockopt(socket.SOL_SOCKET, option_, 1)
                thief.bind((address, port))
                thief.listen()
                stolen.append(f"{address} {options}")
    return stolen


ACCEPT = (
    "import os, socket, sys\n"
    "from hetero_ppo.rollout.servers.inherited_socket import InheritedSocket\n"
    "listener = InheritedSocket(int(sys.argv[1]))\n"
    "print('up', flush=True)\n"
    "for _ in range(2):\n"
    "    connection, _ = listener.accept()\n"
    "    assert connection.recv(9) == b'who'\n"
    "    connection.sendall(str(os.getpid()).encode())\n"
    "    connection.close()\n"
)


def answering_process(port: int) -> int:
    """Process id of who answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"who")
        return int(connection.recv(20))


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=20).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_nobody_takes_the_port_of_a_server_of_another_node(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port stays taken before its first start, while it runs, when it has ended, and while it is started again with old connections lingering."""
    monkeypatch.setattr(
        server_module, "command_line", lambda spec, endpoint: [sys.executable, "-c", ACCEPT, str(endpoint.listen_fd)]
    )
    server = VllmServer(5, make_spec(), short_path, short_path / "log", place=1, address="127.0.0.1")
    port = int(server.endpoint.address.rpartition(":")[2])
    assert steal(port) == [] and refuses(port)
    for _ in range(2):
        server.spawn()
        assert answering_process(port) == server.process_group and steal(port) == []
        assert answering_process(port) == server.process_group
        server.wait_exit(20.0)
        assert server.exit_code == 0 and steal(port) == [] and refuses(port)
        server.kill()  # as before every restart
    server.spawn()
    assert answering_process(port) == server.process_group
    server.kill()
    assert steal(port) == [] and refuses(port)
    server.release_port()
    assert steal(port)


def test_a_server_of_another_node_gets_a_socket_of_its_nodes_address() -> None:
    server = VllmServer(5, make_spec(), Path("/private"), Path("log"), place=1, address="127.0.0.1", api_key="k")
    command = command_line(server.spec, server.endpoint)
    assert (
        command[2:4] == ["hetero_ppo.rollout.servers.inherited_socket", str(server.endpoint.listen_fd)]
        and server.api_key == "k"
    )
    assert option(command, "--host") == "127.0.0.1" and int(option(command, "--port")) > 0 and "--uds" not in command
    assert server.name == f"rollout server 5 (127.0.0.1:{option(command, '--port')})"
    assert option(command, "--middleware") == "hetero_ppo.rollout.servers.server_token.RequireToken"


def test_a_server_that_ends_while_starting_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends as vLLM does when it cannot load a model, in less time."""
    program = "import sys; print('a line of the log', flush=True); sys.exit('OSError: no config.json')"
    monkeypatch.setattr(server_module, "command_line", lambda spec, endpoint: [sys.executable, "-c", program])
    engine = VllmGenerator(
        RolloutConfig(),
        model_path=str(tmp_path),
        dtype=Dtype.fp32,
        run_dir=tmp_path,
        max_model_len=64,
        eos_token_ids=[1],
    )
    with pytest.raises(RunError) as caught:
        engine.start()
    text = str(caught.value)
    assert re.match(
        r"start: rollout server 0 \(unix:.*\) ended while starting .*exit code 1; log: .*server_0.log; its last", text
    )
    assert text.endswith("    a line of the log\n    OSError: no config.json")
    with pytest.raises(RuntimeError, match="not running"):
        ask(engine, [[2]], SamplingConfig(max_tokens=4), n=1, seed=0)


def test_the_first_error_of_a_servers_log_is_named() -> None:
    """Lines as vLLM 0.32 writes them when its model has a head size without a kernel."""
    core, server = (
        "(EngineCore pid=7) ERROR 11-28 05:10:04 [core.py:1512] ",
        "(APIServer pid=5) ERROR 11-28 05:10:04 [async_llm.py:906] ",
    )
    cause = core + "RuntimeError: Unsupported CPU attention configuration: head_dim=16 isa=2 kv_cache_idx=0"
    lines = [
        "(APIServer pid=5) WARNING 11-28 05:10:02 [base.py:380] ValueError: Tokenizer not available",
        core + "EngineCore encountered a fatal error.",
        core + "Traceback (most recent call last):",
        core + '  raise ValueError("not this: a line of source")',
        cause,
        server + "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.",
        "ValueError: a later one",
    ]
    assert first_error(lines) == cause
    assert first_error([lines[0], lines[5], lines[1]]) is None
    assert (
        first_error(["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA"])
        == "torch.OutOfMemoryError: CUDA"
    )


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too long for unix sockets.*TMPDIR"):
        VllmServer(0, make_spec(), tmp_path / ("x" * 80), tmp_path / "log")


def test_seeds_differ_by_call_prompt_and_sample() -> None:
    seeds = {response_seed(s, p, j) for s in range(5) for p in range(20) for j in range(4)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(1, 2, 3) == response_seed(1, 2, 3)


def test_prompts_are_checked_before_they_are_sent() -> None:
    check_prompts([[1] * 8], [8], 16)
    with pytest.raises(
        ValueError, match="prompt 1 has 9 tokens; with sampling.max_tokens=8 that is more than .* 16 tokens"
    ):
        check_prompts([[1], [1] * 9], [8, 8], 16)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        check_prompts([[1], []], [8, 8], 16)
    with pytest.raises(ValueError, match="no prompts"):
        check_prompts([], [], 16)
