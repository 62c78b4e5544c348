"""All servers of a run: started together, restarted when they die, given requests by load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hetero_ppo.config.schema import RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.client import ServerClient, ServerDied, ServerHangs
from hetero_ppo.rollout.nodes import AnyServer
from hetero_ppo.rollout.transports import WeightTransport
from hetero_ppo.rollout.weight_sync import WeightFiles, stage, swap

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Running batches of requests that a server holds: one in work and one waiting. When a whole batch ends at once, the next begins
#: without the client, whose thread may be waiting for the trainer's.
QUEUE_FACTOR = 2
#: A server whose engine died answers 500 for a while before its process ends.
EXIT_WAIT_S = 10.0
PAUSE_TIMEOUT_S = 5.0


@dataclass
class Member:
    """A server, its client, and what the pool knows of it."""

    server: AnyServer
    client: ServerClient
    num_answered: int = 0  # requests, since somebody asked
    in_flight: int = 0
    restarts: int = 0
    starts: int = 0  # how often it has been started: tells whether somebody else has restarted it meanwhile
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


async def gather_all(calls: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Runs all; at the first error the others are cancelled and that error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class ServerPool:
    """All methods run on one event loop.

    Args:
        servers: not started yet.
        config: the ``rollout`` section.
        initial_version: label of the weights in the model's folder; None when the servers start with random weights.
        transport: way of the weights into the servers.
    """

    def __init__(
        self,
        servers: Sequence[AnyServer],
        config: RolloutConfig,
        initial_version: str | None,
        transport: WeightTransport,
    ):
        self.members = [Member(server, ServerClient(server, config.hang_timeout_s)) for server in servers]
        self.initial_version = initial_version
        self.transport = transport
        self.files: WeightFiles | None = None
        self.max_restarts = config.max_restarts
        self.start_timeout_s = config.start_timeout_s
        self.sync_timeout_s = config.sync_timeout_s
        self.verify_sync = config.verify_sync
        self._slots = asyncio.Semaphore(QUEUE_FACTOR * config.max_num_seqs * len(servers))

    @property
    def version(self) -> str | None:
        """Label of the weights that all servers hold; None: random ones."""
        return self.files.version if self.files is not None else self.initial_version

    async def start(self) -> None:
        """Starts all servers at the same time.

        Raises:
            RuntimeError: a server ended while starting, or did not answer within the deadline.
        """
        await gather_all([self._boot(member, "start") for member in self.members])

    async def stop(self) -> None:
        """Ends all servers, whatever state they are in."""
        await asyncio.gather(*(self._stop(member) for member in self.members))

    async def _stop(self, member: Member) -> None:
        try:
            if member.server.running and await member.client.healthy():
                # Without it a SIGTERM with requests in flight can hang vLLM's shutdown.
                await member.client.post("stop", "/pause?mode=abort", PAUSE_TIMEOUT_S)
        except (ServerDied, RuntimeError) as error:
            log.info("stop: %s", error)  # it is ended below all the same
        finally:
            await member.client.close()
            member.server.terminate()
            await asyncio.to_thread(member.server.wait)

    async def _boot(self, member: Member, phase: str) -> None:
        """Starts a server and gives it the newest weights."""
        await asyncio.to_thread(member.server.spawn)
        await member.client.open()
        try:
            await member.client.wait_ready(self.start_timeout_s)
            if self.files is not None:
                died = await self.transport.deliver([member.client], self.files)
                if died:
                    raise died[0]
                await self._stage(member.client, self.files)
                await swap(member.client, self.files, self.sync_timeout_s, verify=self.verify_sync)
            elif self.initial_version is not None:
                body = {"new_version": self.initial_version}
                await member.client.post(phase, "/update_weight_version", self.sync_timeout_s, body)
        except ServerDied as error:
            hangs = isinstance(error, ServerHangs)
            if not hangs:
                await asyncio.to_thread(member.server.wait_exit, EXIT_WAIT_S)
            raise RunError(
                f"{phase}: {member.server.name} {'hangs' if hangs else 'ended'} while starting ({error}); {member.server.report()}"
            ) from None
        member.starts += 1

    async def _restart(self, member: Member, starts: int, phase: str, cause: ServerDied) -> None:
        """Restarts a dead server, or one that hangs, unless that has happened since it was seen alive with ``starts`` starts.

        Raises:
            RuntimeError: it died more often than ``max_restarts`` allows.
        """
        async with member.lock:
            if member.starts != starts:
                return
            await member.client.close()  # an API server whose engine died waits for its connections to close
            hangs = isinstance(cause, ServerHangs)
            if not hangs:
                await asyncio.to_thread(member.server.wait_exit, EXIT_WAIT_S)
            report = member.server.report()
            await asyncio.to_thread(member.server.kill)
            member.restarts += 1
            message = f"{phase}: {member.server.name} {'hangs' if hangs else 'died'} ({cause}); {report}"
            if member.restarts > self.max_restarts:
                raise RunError(f"{message}\nrollout.max_restarts allows {self.max_restarts} restarts of a server")
            log.warning("%s\nrestart %d of %d", message, member.restarts, self.max_restarts)
            await self._boot(member, phase)

    async def call(self, member: Member, phase: str, send: Callable[[ServerClient], Awaitable[T]]) -> T:
        """Sends a request, and sends it again when the server died or hung under it and was restarted."""
        while True:
            async with member.lock:  # held while the server is restarted
                starts = member.starts
            try:
                return await send(member.client)
            except ServerDied as error:
                await self._restart(member, starts, phase, error)

    async def call_least_loaded(self, phase: str, send: Callable[[ServerClient, Member], Awaitable[T]]) -> T:
        """As :meth:`call`, on the server with the fewest requests."""
        async with self._slots:
            member = min(self.members, key=lambda m: m.in_flight)
            member.in_flight += 1
            try:
                answer = await self.call(member, phase, lambda client: send(client, member))
            finally:
                member.in_flight -= 1
            member.num_answered += 1
            return answer

    async def load(self, files: WeightFiles) -> float:
        """Gives all servers new weights. They are checked by every server before the first one changes.

        Returns:
            Seconds the slowest server spent on checksums.

        Raises:
            ValueError: the tensors do not fit the model; the servers keep their old weights.
            RuntimeError: a server answered with an error, not in time, or died too often.
        """
        staged_s = None
        while staged_s is None:
            staged_s = await self._deliver(files)
        self.files = files  # a server that is restarted from here on starts with them
        loaded_s = await gather_all([self._swap(member, files) for member in self.members])
        return max(map(sum, zip(staged_s, loaded_s, strict=True)))

    async def _deliver(self, files: WeightFiles) -> list[float] | None:
        """Brings new weights to all servers and lets them be checked.

        Returns:
            Seconds that each server spent on checksums; None: servers died and were restarted, so all begins again.
        """
        starts = [member.starts for member in self.members]
        died = await self.transport.deliver([member.client for member in self.members], files)
        if not died:
            calls = [self._stage(member.client, files) for member in self.members]
            results = await asyncio.gather(*calls, return_exceptions=True)
            died = {index: result for index, result in enumerate(results) if isinstance(result, ServerDied)}
            for error in results:
                if isinstance(error, BaseException) and not isinstance(error, ServerDied):
                    raise error
            if not died:
                return results
        for index, cause in died.items():
            await self._restart(self.members[index], starts[index], "weight sync", cause)
        return None

    async def _stage(self, client: ServerClient, files: WeightFiles) -> float:
        return await stage(client, files, self.sync_timeout_s, reads_files=self.transport.reads_files)

    async def _swap(self, member: Member, files: WeightFiles) -> float:
        starts = member.starts
        try:
            return await swap(member.client, files, self.sync_timeout_s, verify=self.verify_sync)
        except ServerDied as error:
            await self._restart(member, starts, "weight sync", error)
            return 0.0
