"""Sends the requests of one ``generate`` call to the servers, reports responses as they complete, and aborts the rest when enough have."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from dataclasses import dataclass, field

from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.partial import ABORTED, continued
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.pool import Member, ServerPool, gather_all
from hetero_ppo.types import OnResponse, Response

#: An abort that comes before the server knows the request has no effect, so it is repeated until all have answered.
ABORT_AGAIN_S = 0.1
_calls = itertools.count()


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """Return the seed of one response, in [0, 2^63): the same whichever server takes it, and whatever else is in the batch."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Requests:
    """One request to the generator, as one request per response to its servers. All methods run on the pool's event loop.

    Args:
        pool: Servers that take the requests.
        request: Prompts, and how to answer them.
        stop: Token ids that end a response.
        timeout_s: Deadline of one request in seconds.
        on_response: Function that is called for the first ``num_rows`` complete responses.
    """

    pool: ServerPool
    request: GenerationRequest
    stop: list[int]
    timeout_s: float
    on_response: OnResponse | None = None
    _num_complete: int = 0
    _open: int = 0  # number of responses that have not come yet
    _call: int = field(default_factory=lambda: next(_calls))
    _sent: dict[str, Member] = field(default_factory=dict)  # request id -> the server that has it
    _enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> list[list[Response]]:
        """Return for each prompt its n responses; those that are not complete end with ``abort``."""
        n = self.request.n
        calls = [self._one(place) for place in range(self.request.num_places)]
        self._open = len(calls)
        answers = await gather_all([*calls, self._abort_the_rest()])
        flat = [response for response in answers if response is not None]  # without that of the last call
        return [flat[i * n : (i + 1) * n] for i in range(len(self.request.prompts))]

    async def _one(self, place: int) -> Response:
        partial = self.request.partial[place] if self.request.partial is not None else None
        prompt, sample = divmod(place, self.request.n)
        if partial is not None and partial.finish_reason != ABORTED:
            response = partial  # it was complete too late for the last request
        else:
            made = partial.token_ids if partial is not None else []
            response = await self._generate(prompt, sample, made)
            if partial is not None:
                response = continued(partial, response)
        if response.finish_reason != ABORTED and not self._enough.is_set():
            self._num_complete += 1
            if self.on_response is not None:
                self.on_response(prompt, sample, response)
            if self._num_complete == self.request.num_rows:
                self._enough.set()
        self._open -= 1
        return response

    async def _generate(self, prompt: int, sample: int, made: list[int]) -> Response:
        request_id = f"{self._call}-{prompt}-{sample}"
        token_ids = self.request.prompts.prompt_ids[prompt] + made
        seed = response_seed(self.request.seed, prompt, sample)
        limit = self.request.limit_of(prompt) - len(made)

        async def send(client: ServerClient, member: Member) -> Response:
            if self._enough.is_set():
                return Response([], [], ABORTED, "")
            self._sent[request_id] = member
            try:
                return await client.generate(
                    token_ids, self.request.sampling, limit, self.stop, seed, self.timeout_s, request_id
                )
            finally:
                del self._sent[request_id]

        return await self.pool.call_least_loaded("generate", send)

    async def _abort_the_rest(self) -> None:
        await self._enough.wait()
        while self._open > 0:
            by_server: dict[int, tuple[Member, list[str]]] = {}
            for request_id, member in self._sent.items():
                by_server.setdefault(member.server.index, (member, []))[1].append(request_id)
            for member, request_ids in by_server.values():
                with contextlib.suppress(ServerDied):  # the requests on it find out too, and are not sent again
                    await member.client.abort(request_ids, self.timeout_s)
            await asyncio.sleep(ABORT_AGAIN_S)
