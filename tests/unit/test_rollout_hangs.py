"""Servers that are there and do nothing: noticed by their clients, and their guardians by who supervises them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig
from hetero_ppo.observability.silence import process_state
from hetero_ppo.rollout.servers import client as client_module
from hetero_ppo.rollout.servers import server as server_module
from hetero_ppo.rollout.servers.client import ServerClient, ServerHangs
from hetero_ppo.rollout.servers.server import ServerSpec, VllmServer
from hetero_ppo.rollout.servers.server_token import CHALLENGE, PROOF, WORKER_METHODS, proof_of


class RunningServer(VllmServer):
    """Its process is this test's."""

    @property
    def running(self) -> bool:
        return True


class FakeVllm:
    """Health is always fine; workers answer until ``is_stopped``, prompts and syncs never."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.num_pulses = 0
        self.api_key = ""

    async def on_health(self, request: web.Request) -> web.Response:
        return web.Response(headers={PROOF: proof_of(self.api_key, request.headers[CHALLENGE])})

    async def on_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "hetero_ppo_pulse" and not self.is_stopped:
            self.num_pulses += 1
            return web.json_response({"results": [{}]})
        await asyncio.sleep(60)
        return web.json_response({})

    async def on_prompt(self, request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.json_response({})

    @asynccontextmanager
    async def serving(self, hang_timeout_s: float | None) -> AsyncIterator[ServerClient]:
        app = web.Application()
        app.add_routes(
            [
                web.get("/health", self.on_health),
                web.post("/collective_rpc", self.on_rpc),
                web.post("/inference/v1/generate", self.on_prompt),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for a socket
            spec = ServerSpec("model", Dtype.fp32, 8, True, False, RolloutConfig(), 1)
            server = RunningServer(0, spec, Path(folder), Path(folder) / "log")
            server.log_path.write_text("")
            self.api_key = server.api_key
            await web.UnixSite(runner, str(server.endpoint.socket_path)).start()
            client = ServerClient(server, hang_timeout_s)
            await client.open()
            try:
                await client.wait_ready(5.0)
                yield client
            finally:
                await client.close()
                await runner.cleanup()


async def generate(client: ServerClient, timeout_s: float = 60.0) -> None:
    await client.generate([1], SamplingConfig(), 4, [], 0, timeout_s, "0-0-0")


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_S", 0.05)


def test_a_server_whose_workers_do_not_answer_hangs() -> None:
    async def run() -> None:
        vllm = FakeVllm()
        async with vllm.serving(2.0) as client:
            request = asyncio.create_task(generate(client))
            while vllm.num_pulses < 4:
                await asyncio.sleep(0.01)
            assert not request.done()  # it takes its time, and lives
            vllm.is_stopped = True
            with pytest.raises(ServerHangs, match=r"no answer for \d s; rollout.hang_timeout_s=2"):
                await asyncio.wait_for(request, 20.0)
            with pytest.raises(ServerHangs):
                await generate(client)

    asyncio.run(run())


def test_a_server_may_be_silent_during_a_sync_and_where_there_is_no_deadline() -> None:
    async def run() -> None:
        for hang_timeout_s, work in ((0.3, "stage"), (None, "generate")):
            vllm = FakeVllm()
            vllm.is_stopped = True
            async with vllm.serving(hang_timeout_s) as client:
                call = client.call_worker("weight sync", "stage", 60.0) if work == "stage" else generate(client)
                request = asyncio.create_task(call)
                await asyncio.sleep(0.7)
                assert not request.done()
                request.cancel()

    asyncio.run(run())


def test_the_question_is_let_in_by_the_servers_guard() -> None:
    assert "hetero_ppo_pulse" in WORKER_METHODS


def test_a_deadline_that_is_missed_names_its_option() -> None:
    async def run() -> None:
        async with FakeVllm().serving(None) as client:
            with pytest.raises(
                ServerHangs, match="/inference/v1/generate was not answered within 0 s; rollout.request_timeout_s"
            ):
                await generate(client, 0.1)
            with pytest.raises(
                ServerHangs, match="/collective_rpc was not answered within 0 s; rollout.sync_timeout_s"
            ):
                await client.post("weight sync", "/collective_rpc", 0.1, {"method": "stage"})

    asyncio.run(run())


def test_a_stopped_guardian_is_ended_and_its_server_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(server_module, "command_line", lambda spec, endpoint: program)
    config = RolloutConfig(hang_timeout_s=5.0)
    with tempfile.TemporaryDirectory() as folder:
        server = VllmServer(0, ServerSpec("m", Dtype.fp32, 8, True, False, config, 1), Path(folder), tmp_path / "log")
        server.spawn()
        guardian = server._process.pid
        for _ in range(3):
            time.sleep(0.15)
            server.end_frozen_guardian()
            assert server._guardian_clock.silent_s < 1.0 and server.running
        os.kill(guardian, signal.SIGSTOP)
        os.waitpid(guardian, os.WUNTRACED)
        assert f"process {guardian} is T (stopped)" in server.report()
        for look in range(2):
            server._guardian_clock.silent_s = 5.0 * look  # as if that time had passed
            server.end_frozen_guardian()
        server.wait_exit(10.0)
        assert server.exit_code == -signal.SIGKILL
        server.kill()
        until = time.monotonic() + 10
        while (process_state(server.process_group) or "Z")[0] != "Z":
            assert time.monotonic() < until
            time.sleep(0.01)


def test_a_server_with_a_stopped_guardian_can_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(server_module, "command_line", lambda spec, endpoint: program)
    monkeypatch.setattr(server_module, "KILL_WAIT_S", 0.2)
    with tempfile.TemporaryDirectory() as folder:
        server = VllmServer(
            0, ServerSpec("m", Dtype.fp32, 8, True, False, RolloutConfig(), 1), Path(folder), tmp_path / "log"
        )
        server.spawn()
        os.kill(server._process.pid, signal.SIGSTOP)
        start = time.monotonic()
        server.kill()
        assert time.monotonic() - start < server_module.STOP_GRACE_S and not server.running
