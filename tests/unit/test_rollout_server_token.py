"""A rollout server lets through the trainer's own routes and calls, for who has the token, after a proof that it has the token too."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hetero_ppo.config.schema import Dtype, RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient
from hetero_ppo.rollout.servers.server import ServerSpec, VllmServer
from hetero_ppo.rollout.servers.server_token import (
    CHALLENGE,
    MAX_CHALLENGE_BYTES,
    PROOF,
    ROUTES,
    WORKER_METHODS,
    Message,
    Receive,
    RequireToken,
    Send,
    proof_of,
)
from hetero_ppo.rollout.weights.worker_extension import WeightReceiver

TOKEN = "the token"
OWNER = [(b"authorization", b"Bearer the token")]


async def app(scope: Message, receive: Receive, send: Send) -> None:
    """Answer with the body of the request, in place of vLLM's routes."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RequireToken:
    (tmp_path / "private" / "tmp_0").mkdir(parents=True)
    monkeypatch.setenv("VLLM_API_KEY", TOKEN)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "private" / "tmp_0"))
    return RequireToken(app)


def ask(
    guard: RequireToken, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes = b"", parts: int = 1
) -> tuple[int, bytes, dict[bytes, bytes]]:
    """Send a request. Return the (status, body, headers) of the answer."""
    size = max(1, len(body) // parts)
    chunks = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    coming = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    coming[-1]["more_body"] = False
    sent: list[Message] = []

    async def receive() -> Message:
        return coming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard({"type": "http", "method": method, "path": path, "headers": headers}, receive, send))
    return sent[0]["status"], sent[1]["body"], dict(sent[0]["headers"])


def call(guard: RequireToken, **body: Any) -> int:
    status, answer, _ = ask(guard, "POST", "/collective_rpc", OWNER, json.dumps(body).encode(), parts=3)
    assert status == 403 or json.loads(answer) == body, "the server sees what the guard has looked at"
    return status


def test_nothing_without_the_token_and_of_vllm_only_what_the_trainer_uses(guard: RequireToken) -> None:
    wrong = [[], [(b"authorization", b"Bearer another")], OWNER * 2, [(b"authorization", b"the token")]]
    for headers in wrong:
        assert [ask(guard, "POST", route, headers)[0] for route in sorted(ROUTES)] == [401] * len(ROUTES)
    for route in ROUTES - {"/collective_rpc"}:
        assert ask(guard, "POST", route, OWNER, b"{}")[:2] == (200, b"{}")
        assert ask(guard, "GET", route, OWNER)[0] == 404
    for route in (
        "/v1/completions",
        "/server_info",
        "/update_weights",
        "/collective_rpc/",
        "//collective_rpc",
        "/metrics",
        "/health",
    ):
        assert ask(guard, "POST", route, OWNER)[0] == 404
    closed: list[Message] = []

    async def websocket() -> None:
        async def send(message: Message) -> None:
            closed.append(message)

        await guard({"type": "websocket", "path": "/v1/realtime", "headers": OWNER}, None, send)

    asyncio.run(websocket())
    assert closed == [{"type": "websocket.close", "code": 1008}]


def test_workers_are_called_by_our_own_methods_alone(guard: RequireToken, tmp_path: Path) -> None:
    own = {
        name for name in vars(WeightReceiver) if name.startswith("hetero_ppo_") and callable(vars(WeightReceiver)[name])
    }
    assert own == WORKER_METHODS
    for method in WORKER_METHODS:
        assert call(guard, method=method, kwargs={}, timeout=1.0) == 200
    for method in (
        "load_model",
        "execute_method",
        "save_sharded_state",
        "hetero_ppo",
        "_hetero_ppo_load",
        "",
        None,
        ["hetero_ppo_device"],
    ):
        assert call(guard, method=method, kwargs={}) == 403
    assert call(guard, method="hetero_ppo_device", args=[1], kwargs={}) == 403
    assert call(guard, method="hetero_ppo_device", kwargs=[1]) == 403
    for text in (b"", b"[]", b"{", b'"hetero_ppo_device"', b"\xff\xfe"):
        assert ask(guard, "POST", "/collective_rpc", OWNER, text)[0] == 403


def test_workers_read_files_of_this_run_alone(guard: RequireToken, tmp_path: Path) -> None:
    private = tmp_path / "private"
    (private / "link").symlink_to("/etc")
    stage = {"method": "hetero_ppo_stage_weights"}
    assert call(guard, **stage, kwargs={"paths": [str(private / "weights_1" / "shard_00000.safetensors")]}) == 200
    assert call(guard, **stage, kwargs={"paths": None}) == 200
    for path in ("/etc/passwd", str(private / ".." / "other"), str(private / "link" / "passwd"), "relative", "a\0b", 3):
        assert call(guard, **stage, kwargs={"paths": [path]}) == 403
    assert call(guard, **stage, kwargs={"paths": str(private)}) == 403


def test_health_proves_that_the_server_knows_the_token(guard: RequireToken) -> None:
    status, _, headers = ask(guard, "GET", "/health", [(CHALLENGE.encode(), b"5")])
    assert status == 200 and headers[PROOF.encode()] == proof_of(TOKEN, "5").encode() and headers[b"x-a"] == b"b"
    assert proof_of(TOKEN, "5") not in (proof_of(TOKEN, "6"), proof_of("another", "5")) and TOKEN not in proof_of(
        TOKEN, "5"
    )
    assert ask(guard, "GET", "/health", [])[0] == 401
    assert ask(guard, "GET", "/health", [(CHALLENGE.encode(), b"5" * (MAX_CHALLENGE_BYTES + 1))])[0] == 401
    assert ask(guard, "POST", "/pause", [(CHALLENGE.encode(), b"5")])[0] == 401


class RunningServer(VllmServer):
    """Its process is somebody else's."""

    @property
    def running(self) -> bool:
        return True

    def report(self) -> str:
        return "its log"


@pytest.mark.parametrize("answers", [{}, {PROOF: "made up"}, {PROOF: proof_of("another token", "1")}])
def test_a_thief_at_the_servers_address_gets_nothing(answers: dict[str, str]) -> None:
    """Somebody who took the server's place and says that all is well: no token, no prompt, and an error that says so."""
    with tempfile.TemporaryDirectory() as folder:  # a short path, for a socket
        asyncio.run(meet_a_thief(Path(folder), answers))


async def meet_a_thief(folder: Path, answers: dict[str, str]) -> None:
    seen: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(f"{request.method} {request.path} {dict(request.headers)} {await request.text()}")
        return web.Response(status=200, headers=answers)

    application = web.Application()
    application.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    server = RunningServer(
        0, ServerSpec("model", Dtype.fp32, 8, True, False, RolloutConfig(), 1), folder, folder / "log"
    )
    await web.UnixSite(runner, str(server.endpoint.socket_path)).start()
    client = ServerClient(server)
    await client.open()
    try:
        with pytest.raises(
            RunError, match="start: rollout server 0 .* does not know the server's key; its token and prompts"
        ):
            await client.wait_ready(5.0)
        assert not await client.healthy()
    finally:
        await client.close()
        await runner.cleanup()
    assert seen and all(text.startswith("GET /health") for text in seen)
    assert server.api_key not in "".join(seen) and "Authorization" not in "".join(seen)
