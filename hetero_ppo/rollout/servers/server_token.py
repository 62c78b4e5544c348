"""Guards all routes of a rollout server, inside vLLM's HTTP process (``--middleware``).

A request needs the server's token. With it only those routes are open that the trainer uses, and only those methods of vLLM's workers that
weight updates need, on files of this run. Everything else is closed, because vLLM's development routes can call any method of a worker.

Before the trainer sends the token or a prompt, the server proves that it knows the token. It answers ``/health`` with an HMAC of a number
that the trainer chose.
"""

from __future__ import annotations

import hmac
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HEALTH = "/health"
RPC = "/collective_rpc"
#: Header of a health request, with the trainer's number, and header of the answer, with the proof.
CHALLENGE, PROOF = "x-hetero-ppo-challenge", "x-hetero-ppo-proof"
MAX_CHALLENGE_BYTES = 128
#: Routes that the trainer posts to (client.py, pool.py, vllm.py, weight_sync.py).
ROUTES = frozenset(
    {
        "/inference/v1/generate",
        "/inference/v1/abort_requests",
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/update_weight_version",
        RPC,
    }
)
#: Methods of ``worker_extension.WeightReceiver``.
WORKER_METHODS = frozenset(
    {
        "hetero_ppo_pulse",
        "hetero_ppo_device",
        "hetero_ppo_join",
        "hetero_ppo_receive",
        "hetero_ppo_stage_weights",
        "hetero_ppo_load_staged",
    }
)
RPC_FIELDS = frozenset({"method", "kwargs", "timeout"})
#: Names and shapes of all tensors of a bucket take some megabytes at most.
MAX_RPC_BYTES = 256 * 2**20


def proof_of(token: str, challenge: str) -> str:
    """Return the answer to a challenge that only a server with the token can give. It does not reveal the token."""
    return hmac.digest(token.encode(), b"rollout server: " + challenge.encode(), "sha256").hex()


class RequireToken:
    """Answers 401 to requests without the server's token, 404 to routes that the trainer does not use, 403 to other calls of workers."""

    def __init__(self, app: App):
        self.app = app
        self.token = os.environ["VLLM_API_KEY"]
        self.expected = f"Bearer {self.token}".encode()
        #: The run's directory on this node, the parent of a server's temporary directory (``server.environment``).
        self.private_dir = Path(tempfile.gettempdir()).resolve().parent

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        challenges = [value for name, value in scope["headers"] if name == CHALLENGE.encode()]
        if (method, path) == ("GET", HEALTH) and len(challenges) == 1 and len(challenges[0]) <= MAX_CHALLENGE_BYTES:
            await self.app(scope, receive, self._with_proof(send, challenges[0].decode("latin-1")))
        elif not self._allows(scope["headers"]):
            await _refuse(send, 401)
        elif method != "POST" or path not in ROUTES:
            await _refuse(send, 404)
        elif path != RPC:
            await self.app(scope, receive, send)
        else:
            body = await _read(receive)
            if body is None or not self._allows_call(body):
                await _refuse(send, 403)
            else:
                await self.app(scope, _replayed(body, receive), send)

    def _allows(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.expected)

    def _with_proof(self, send: Send, challenge: str) -> Send:
        async def send_with_proof(message: Message) -> None:
            if message["type"] == "http.response.start":
                proof = (PROOF.encode(), proof_of(self.token, challenge).encode())
                message = {**message, "headers": [*message.get("headers", []), proof]}
            await send(message)

        return send_with_proof

    def _allows_call(self, body: bytes) -> bool:
        """Return whether a call names one of our own methods, with files of this run only."""
        try:
            call = json.loads(body)
        except ValueError:
            return False
        if not isinstance(call, dict) or not call.keys() <= RPC_FIELDS:
            return False
        method, arguments = call.get("method"), call.get("kwargs", {})
        if not isinstance(method, str) or method not in WORKER_METHODS or not isinstance(arguments, dict):
            return False
        paths = arguments.get("paths") or []
        return isinstance(paths, list) and all(isinstance(path, str) and self._is_private(path) for path in paths)

    def _is_private(self, path: str) -> bool:
        return "\0" not in path and Path(path).resolve().is_relative_to(self.private_dir)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def _read(receive: Receive) -> bytes | None:
    """Return the request's whole body; None if it is too long or the client has gone."""
    parts, num_bytes, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > MAX_RPC_BYTES:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body that was read once, and then the server's messages."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        message = next(messages, None)
        return await receive() if message is None else message

    return receive_again
