"""The client against an HTTP server that behaves as vLLM's does when its engine dies."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

import pytest
from aiohttp import web

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.rollout.servers import client as client_module
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.server import ServerSpec, VllmServer
from hetero_ppo.rollout.servers.server_token import CHALLENGE, PROOF, proof_of


class RunningServer(VllmServer):
    """Its process is this test's."""

    @property
    def running(self) -> bool:
        return True


async def ask_a_server_that_stops_answering(socket_dir: Path, status_of_the_dead: int | None) -> float:
    """Return the seconds from the death of a server's engine process to ServerDied."""
    health = 200

    async def on_health(request: web.Request) -> web.Response:
        challenge = request.headers[CHALLENGE]
        assert "Authorization" not in request.headers, "the token goes to nobody who has not proved to know it"
        return web.Response(status=health, headers={PROOF: proof_of(server.api_key, challenge)})

    async def on_rpc(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.json_response({})

    app = web.Application()
    app.add_routes([web.get("/health", on_health), web.post("/collective_rpc", on_rpc)])
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    spec = ServerSpec("model", Dtype.fp32, 8, True, False, RolloutConfig(), 1)
    server = RunningServer(0, spec, socket_dir, socket_dir / "log")
    site = web.UnixSite(runner, str(server.endpoint.socket_path))
    await site.start()
    client = ServerClient(server)
    await client.open()
    try:
        await client.wait_ready(5.0)
        request = asyncio.create_task(client.post("weight sync", "/collective_rpc", 60.0, {}))
        await asyncio.sleep(0.3)
        assert not request.done()  # a healthy server that takes its time is left alone
        start = time.monotonic()
        if status_of_the_dead is None:
            await site.stop()
        else:
            health = status_of_the_dead
        with pytest.raises(ServerDied, match="/collective_rpc"):
            await asyncio.wait_for(request, 20.0)
        with pytest.raises(ServerDied, match="takes no connections"):
            await client.post("weight sync", "/pause", 60.0)
        return time.monotonic() - start
    finally:
        await client.close()
        await runner.cleanup()


@pytest.mark.parametrize("status_of_the_dead", [503, None])
def test_a_request_does_not_outlive_its_server(status_of_the_dead: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_S", 0.1)
    monkeypatch.setattr(client_module, "ANSWER_GRACE_S", 0.1)
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for a socket
        assert asyncio.run(ask_a_server_that_stops_answering(Path(folder), status_of_the_dead)) < 10
