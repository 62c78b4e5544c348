"""The requests of one ``generate`` call: sent, told of as they complete, and aborted when enough of them have."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from dataclasses import dataclass, field

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.partial import ABORTED, continued
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied
from hetero_ppo.rollout.servers.pool import Member, ServerPool, gather_all
from hetero_ppo.types import OnResponse, Response

#: An abort that comes before the server knows the request has no effect, so it is repeated until all have answered.
ABORT_AGAIN_S = 0.1
_calls = itertools.count()


def response_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one response, in [0, 2^63): the same whichever server takes it, and whatever else is in the batch."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass
class Requests:
    """All methods run on the pool's event loop.

    Args:
        pool: takes the requests.
        prompts: token ids.
        sampling: how to sample.
        limits: response tokens of each prompt, with what was begun.
        stop: token ids that end a response.
        n: responses per prompt.
        seed: of the call.
        timeout_s: of one request.
        begun: for each response (prompt * n + sample) what there is of it already, or None; ``[]``: nothing was begun.
        wanted: complete responses after which the others are aborted; None: all.
        tell: called with (prompt, sample, response) for every complete one, the first ``wanted`` alone.
    """

    pool: ServerPool
    prompts: list[list[int]]
    sampling: SamplingConfig
    limits: list[int]
    stop: list[int]
    n: int
    seed: int
    timeout_s: float
    tell: OnResponse
    begun: list[Response | None] = field(default_factory=list)
    wanted: int | None = None
    _num_complete: int = 0
    _open: int = 0  # responses that are still awaited
    _call: int = field(default_factory=lambda: next(_calls))
    _sent: dict[str, Member] = field(default_factory=dict)  # request id -> the server that has it
    _enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> list[list[Response]]:
        """For each prompt its n responses; those that are not complete end with ``abort``."""
        pairs = [(prompt, sample) for prompt in range(len(self.prompts)) for sample in range(self.n)]
        calls = [self._one(prompt, sample) for prompt, sample in pairs]
        self._open = len(calls)
        flat = await gather_all([*calls, self._abort_the_rest()])
        return [flat[i * self.n : (i + 1) * self.n] for i in range(len(self.prompts))]

    async def _one(self, prompt: int, sample: int) -> Response:
        begun = self.begun[prompt * self.n + sample] if self.begun else None
        if begun is not None and begun.finish_reason != ABORTED:
            response = begun  # it was complete too late for the last call
        else:
            made = begun.token_ids if begun is not None else []
            response = await self._generate(prompt, sample, made)
            if begun is not None:
                response = continued(begun, response)
        if response.finish_reason != ABORTED and not self._enough.is_set():
            self._num_complete += 1
            self.tell(prompt, sample, response)
            if self._num_complete == (self.wanted or len(self.prompts) * self.n):
                self._enough.set()
        self._open -= 1
        return response

    async def _generate(self, prompt: int, sample: int, made: list[int]) -> Response:
        request_id = f"{self._call}-{prompt}-{sample}"
        seed = response_seed(self.seed, prompt, sample)
        limit = self.limits[prompt] - len(made)

        async def send(client: ServerClient, member: Member) -> Response:
            if self._enough.is_set():
                return Response([], [], ABORTED, "")
            self._sent[request_id] = member
            try:
                return await client.generate(
                    self.prompts[prompt] + made, self.sampling, limit, self.stop, seed, self.timeout_s, request_id
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
