"""Client of one vLLM server over HTTP: token ids in, token ids and log-probs of the sampled tokens out.

Each request to ``/inference/v1/generate`` has one prompt, so that each has its own seed. The answer names the weights that made the
tokens. 64 such requests cost no more than one ``/v1/completions`` request with a list of 64 prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
from collections.abc import Callable
from typing import Any

import aiohttp

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.partial import ABORTED
from hetero_ppo.rollout.servers.nodes import AnyServer
from hetero_ppo.rollout.servers.pulse import Pulse
from hetero_ppo.rollout.servers.server import SERVED_MODEL_NAME
from hetero_ppo.rollout.servers.server_token import CHALLENGE, HEALTH, PROOF, proof_of
from hetero_ppo.types import Response

HEALTH_TIMEOUT_S = 5.0
POLL_S = 0.2
#: Time between two checks that the server still serves.
WATCH_S = 2.0
#: A server whose engine core died may still answer requests. Its answers help more than closed connections.
ANSWER_GRACE_S = 2.0
#: Prefix that the server puts before the ids of requests.
REQUEST_PREFIX = "generate-tokens-"
#: Longest time between two questions to a server's workers, where the first has been answered.
LONGEST_GAP_S = 2 * WATCH_S + HEALTH_TIMEOUT_S
#: Phases whose deadline is rollout.request_timeout_s. The others have rollout.sync_timeout_s.
REQUEST_PHASES = ("generate", "beam search", "abort")
#: Routes of prompts. While it works on them the server answers other questions too; during other work it may be silent.
PROMPT_ROUTES = "/inference/"
#: Value that the server sends for log-probs that are -inf or NaN.
NOT_FINITE = -9999.0


class ServerDied(Exception):
    """The server's process ended, or its engine core did. The pool decides what to do."""


class ServerHangs(ServerDied):
    """The server's processes run and do not answer. The pool ends the server and treats it as one that died."""


class ServerIsDown(RunError):
    """The server died, and its restart waits for the generator's next turn on the devices."""


class NotTheServerError(Exception):
    """The process that answers at the server's address does not know its token, so nothing may be sent there."""


class ServerClient:
    """Client of one server. All methods run on the generator's event loop.

    Every method raises ``ServerDied`` when the server has ended, ``ServerHangs`` when it does not answer within the deadline, and
    ``RuntimeError``, which names the phase, the server and its log, when it answers with an error.

    Args:
        server: Server, which may not be started yet.
        hang_timeout_s: Seconds without any answer from its workers after which it hangs. None: it may be silent for any time.
        on_death: Function that is called with the reason when the watcher finds that the server has died or hangs. None: the next
            call finds out.
    """

    def __init__(
        self,
        server: AnyServer,
        hang_timeout_s: float | None = None,
        on_death: Callable[[ServerDied], None] | None = None,
    ):
        self.server = server
        self.hang_timeout_s = hang_timeout_s
        self._on_death = on_death
        self._hang = ""  # why it hangs; empty: it does not hang
        self._num_long_calls = 0  # calls in flight during which it may be silent
        self._session: aiohttp.ClientSession | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._dead = False
        self.num_opened = 0  # a different number for each start of the server

    async def open(self) -> None:
        """Open a session with a server that was started."""
        self.num_opened += 1
        # No limit on connections: a request that waits for one would not be in the server's batch.
        self._session = self._new_session(limit=0, keepalive_timeout=15.0)
        self._dead, self._hang = False, ""

    def _new_session(self, **options: Any) -> aiohttp.ClientSession:
        """Return a session whose requests carry the token. The options are those of its connector."""
        token = {"Authorization": f"Bearer {self.server.api_key}"}
        return aiohttp.ClientSession(connector=self._connector(**options), headers=token)

    def _connector(self, **options: Any) -> aiohttp.BaseConnector:
        path = self.server.endpoint.socket_path
        return aiohttp.TCPConnector(**options) if path is None else aiohttp.UnixConnector(str(path), **options)

    async def close(self) -> None:
        """Stop watching the server and close all connections. May be called more than once."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait({self._watcher})
            self._watcher = None
        if self._session is not None:
            await self._session.close()
            self._session = None
        self._dead = True  # until it is opened again

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when the server answers. From then on it is watched.

        Raises:
            ServerDied: It ended while starting.
            RuntimeError: It does not answer within the deadline, or another process does.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        while asyncio.get_running_loop().time() < deadline:
            if not self.server.running:
                raise ServerDied(self.server.name)
            if await self._proven_healthy():
                self._watcher = asyncio.create_task(self._watch())
                return
            await asyncio.sleep(POLL_S)
        raise RunError(f"start: {self.server.name} did not answer within {timeout_s:.0f} s; {self.server.report()}")

    async def healthy(self) -> bool:
        """Return whether the server answers that its engine core is alive."""
        try:
            return await self._health() == 200
        except (aiohttp.ClientError, OSError, NotTheServerError):  # TimeoutError is an OSError
            return False

    async def _proven_healthy(self) -> bool:
        """Return ``healthy`` for a server that was just started. Another process in its place is an error."""
        try:
            return await self._health() == 200
        except (aiohttp.ClientError, OSError):
            return False
        except NotTheServerError as error:
            raise RunError(f"start: {self.server.name}: {error}; {self.server.report()}") from None

    async def _health(self) -> int:
        """Return the HTTP status of the server's health. The token is not sent; the answer proves that the server knows it.

        Raises:
            NotTheServerError: The server does not know it.
        """
        challenge, url = secrets.token_hex(16), f"{self.server.endpoint.url}{HEALTH}"
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_S)
        # A new connection for each check, because a server that shuts down takes no new ones.
        async with (
            aiohttp.ClientSession(connector=self._connector(force_close=True), timeout=timeout) as session,
            session.get(url, headers={CHALLENGE: challenge}, allow_redirects=False) as reply,
        ):
            found, expected = reply.headers.get(PROOF, ""), proof_of(self.server.api_key, challenge)
            if not hmac.compare_digest(found.encode(), expected.encode()):
                raise NotTheServerError(
                    "who answers there does not know the server's key; its token and prompts were not sent"
                )
            return reply.status

    async def _watch(self) -> None:
        """End the requests in flight when the server has died or hangs.

        An API server whose engine core died may never answer some of them, those of a weight sync for instance. It waits for their
        connections to close before it exits, so client and server would wait for each other until the deadline.
        """
        # A new connection for each question, because a server that shuts down takes no new ones.
        async with self._new_session(force_close=True) as session:
            pulse = Pulse(lambda: self._ask_workers(session), LONGEST_GAP_S)
            try:
                while not self._hang:
                    await asyncio.sleep(WATCH_S)
                    self.server.end_frozen_guardian()
                    if not await self._serves():
                        await asyncio.sleep(ANSWER_GRACE_S)
                        if not await self._serves():
                            break
                    silent_s = pulse.look(is_busy=self._num_long_calls > 0)
                    if self.hang_timeout_s is not None and silent_s >= self.hang_timeout_s:
                        self._hang = f"no answer for {silent_s:.0f} s; rollout.hang_timeout_s={self.hang_timeout_s:g}"
            finally:
                pulse.close()
        self._dead = True
        assert self._session is not None  # ``close`` ends this task first
        await self._session.close()
        if self._on_death is not None:
            self._on_death(ServerHangs(self._hang) if self._hang else ServerDied("it takes no connections"))

    async def _ask_workers(self, session: aiohttp.ClientSession) -> None:
        """Return when the server's workers have answered, or the server has refused to ask them."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            url, never = f"{self.server.endpoint.url}/collective_rpc", aiohttp.ClientTimeout(total=None)
            body = {"method": "hetero_ppo_pulse"}
            async with session.post(url, json=body, timeout=never, allow_redirects=False) as reply:
                await reply.read()

    async def _serves(self) -> bool:
        """Return False when the server reports a dead engine core, takes no connections, or is another process. A slow server serves."""
        try:
            return await self._health() < 500
        except TimeoutError:
            return True
        except (aiohttp.ClientError, OSError, NotTheServerError):
            return False

    async def generate(
        self,
        prompt: list[int],
        sampling: SamplingConfig,
        max_tokens: int,
        stop: list[int],
        seed: int,
        timeout_s: float,
        request_id: str,
    ) -> Response:
        """Return one response.

        Args:
            prompt: Token ids.
            sampling: How to sample, but for ``max_tokens`` and the token ids that end a response.
            max_tokens: Largest number of response tokens.
            stop: Token ids that end the response, end-of-sequence included.
            seed: Seed of the response.
            timeout_s: Deadline in seconds.
            request_id: Name of the request for :meth:`abort`. An aborted response has the tokens that were sampled, maybe none.
        """
        params = {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "max_tokens": max_tokens,
            "min_tokens": 0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop_token_ids": stop,
            # stop_token_ids has our end-of-sequence tokens. The server's own are not used.
            "ignore_eos": True,
            "logprobs": 0,  # log-probs of the sampled token only
            # Text is made only to find stop strings in it, and has no special tokens.
            "detokenize": bool(sampling.stop),
            "stop": sampling.stop,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
        }
        body = {"model": SERVED_MODEL_NAME, "token_ids": prompt, "sampling_params": params, "request_id": request_id}
        answer = await self.post("generate", "/inference/v1/generate", timeout_s, body)
        return self._response(answer["choices"][0])

    async def abort(self, request_ids: list[str], timeout_s: float) -> None:
        """End requests, which then answer with the tokens that they have. Ids that the server does not know are no error."""
        body = {"request_ids": [REQUEST_PREFIX + request_id for request_id in request_ids]}
        await self.post("abort", "/inference/v1/abort_requests", timeout_s, body)

    def _response(self, choice: dict[str, Any]) -> Response:
        if choice["finish_reason"] == ABORTED and not choice["token_ids"]:
            return Response([], [], ABORTED, "")
        log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        versions = sorted({span["version"] for span in choice["weight_versions"]})
        if choice["finish_reason"] not in ("stop", "length", ABORTED):
            raise RunError(f"generate: {self.server.name} ended a response with {choice['finish_reason']!r}")
        if len(versions) != 1 or len(log_probs) != len(choice["token_ids"]):
            raise RunError(
                f"generate: {self.server.name} answered {len(choice['token_ids'])} tokens with {len(log_probs)} log-probs, "
                f"made by the weight versions {versions}; expected one log-prob per token and one version"
            )
        if log_probs and min(log_probs) <= NOT_FINITE:
            raise RunError(
                f"generate: {self.server.name} sampled from logits that are not finite (weights {versions[0]})"
            )
        return Response(choice["token_ids"], log_probs, choice["finish_reason"], versions[0])

    async def prompt_log_probs(self, token_ids: list[int], timeout_s: float) -> list[float]:
        """Return [L - 1] log p(token t + 1 | tokens 0..t) at temperature 1, for a prompt of L tokens."""
        params = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "seed": 0, "ignore_eos": True}
        params |= {"prompt_logprobs": 0, "detokenize": False}
        body = {"model": SERVED_MODEL_NAME, "token_ids": token_ids, "sampling_params": params}
        answer = await self.post("prompt_log_probs", "/inference/v1/generate", timeout_s, body)
        entries = answer["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]

    async def top_log_probs(self, token_ids: list[int], count: int, timeout_s: float) -> list[tuple[int, float]]:
        """Return the ``count`` most probable next tokens, best first, as (token id, log-prob at temperature 1)."""
        # The answer always has the sampled token. With greedy sampling that is the first one.
        params = {"max_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "seed": 0, "ignore_eos": True}
        params |= {"logprobs": count, "detokenize": False}
        body = {"model": SERVED_MODEL_NAME, "token_ids": token_ids, "sampling_params": params}
        answer = await self.post("beam search", "/inference/v1/generate", timeout_s, body)
        (content,) = answer["choices"][0]["logprobs"]["content"]
        found = [(entry["token_id"], entry["logprob"]) for entry in content["top_logprobs"]]
        return [(token, log_prob) for token, log_prob in found if log_prob > NOT_FINITE]

    async def call_worker(self, phase: str, method: str, timeout_s: float, **arguments: Any) -> list[dict[str, Any]]:
        """Call a method of the worker extension. Return one result per worker (tensor-parallel rank)."""
        # The server's own deadline is later: an answer of its front end would hide that a worker hangs.
        body = {"method": method, "kwargs": arguments, "timeout": timeout_s + 60.0}
        return (await self.post(phase, "/collective_rpc", timeout_s + 5.0, body))["results"]

    async def post(self, phase: str, route: str, timeout_s: float, body: dict[str, Any] | None = None) -> Any:
        """Post JSON and return the answer's JSON."""
        if self._hang:
            raise ServerHangs(self._hang)
        if self._dead:
            raise ServerDied(f"{route}: the server takes no connections")
        timeout, url = aiohttp.ClientTimeout(total=timeout_s), f"{self.server.endpoint.url}{route}"
        assert self._session is not None  # it was opened, and is not dead
        is_long = not route.startswith(PROMPT_ROUTES)
        self._num_long_calls += is_long
        try:
            async with self._session.post(url, json=body, timeout=timeout, allow_redirects=False) as reply:
                status, text = reply.status, await reply.read()
        except TimeoutError:
            option = "request_timeout_s" if phase in REQUEST_PHASES else "sync_timeout_s"
            raise ServerHangs(f"{route} was not answered within {timeout_s:.0f} s; rollout.{option}") from None
        except (aiohttp.ClientError, OSError) as error:
            if self._hang:
                raise ServerHangs(self._hang) from error
            raise ServerDied(f"{route}: {type(error).__name__}: {error}") from error
        finally:
            self._num_long_calls -= is_long
        if status == 200:
            return json.loads(text) if text else None
        if status >= 500 and not await self.healthy():
            raise ServerDied(f"{route}: HTTP {status}")
        raise RunError(
            f"{phase}: {self.server.name} answered {route} with HTTP {status}: {text.decode(errors='replace')[:2000]}\n"
            f"{self.server.report()}"
        )
