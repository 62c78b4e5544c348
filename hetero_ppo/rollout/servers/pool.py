"""All servers of a run: they start together, are restarted when they die, and get requests by load.

A server that shares its GPU with the trainer cannot start while the trainer holds the card: vLLM needs its share of the memory free, and
no other process may give memory back while it profiles. ``may_restart`` is therefore False outside of the generator's turns. A server that
dies then is *down*: it is ended and logged, gets no calls, and starts again in ``restart_down``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hetero_ppo.config.schema import RolloutConfig
from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied, ServerHangs, ServerIsDown
from hetero_ppo.rollout.servers.nodes import AnyServer
from hetero_ppo.rollout.weights.transports import WeightTransport
from hetero_ppo.rollout.weights.weight_sync import stage, swap
from hetero_ppo.rollout.weights.weight_version import WeightVersion

T = TypeVar("T")
log = logging.getLogger(__name__)

#: Number of running batches that a server holds: one in work and one waiting. When a whole batch ends at once, the next one starts
#: without the client, whose thread may be waiting for the trainer's.
QUEUE_FACTOR = 2
#: A server whose engine core died answers 500 for a while before its process ends.
EXIT_WAIT_S = 10.0
PAUSE_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Member:
    """A server, its client, and its state in the pool."""

    server: AnyServer
    client: ServerClient
    num_answered: int = 0  # requests since the last weight sync's metrics
    in_flight: int = 0  # requests
    restarts: int = 0
    is_down: bool = False  # it died, and starts again in the generator's next turn
    starts: int = 0  # number of starts; a caller sees by it that another one has restarted the server
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


async def gather_all(calls: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all calls concurrently. At the first error the others are cancelled and that error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class ServerPool:
    """The servers of a run. All methods run on one event loop.

    Args:
        servers: Servers that are not started yet.
        config: The ``rollout`` section.
        initial_version: Label of the weights in the model's folder. None: the servers start with random weights.
        transport: Transport of new weights to the servers.
    """

    def __init__(
        self,
        servers: Sequence[AnyServer],
        config: RolloutConfig,
        initial_version: str | None,
        transport: WeightTransport,
    ):
        self.members = [Member(server, self._client(server, config.hang_timeout_s)) for server in servers]
        self.may_restart = True  # False: the trainer has the devices, a server that dies is down
        self.on_stalled: Callable[[], None] | None = None  # called when requests wait, and all servers are down
        self._revived = asyncio.Condition()
        self._notes: set[asyncio.Task[None]] = set()  # tasks that handle deaths
        self.initial_version = initial_version
        self.transport = transport
        self.weights: WeightVersion | None = None  # newest ones that were synchronised
        self.max_restarts = config.max_restarts
        self.start_timeout_s = config.start_timeout_s
        self.sync_timeout_s = config.sync_timeout_s
        self.verify_sync = config.verify_sync
        self._slots = asyncio.Semaphore(QUEUE_FACTOR * config.max_num_seqs * len(servers))

    @property
    def version(self) -> str | None:
        """Label of the weights that all servers hold. None: they are random."""
        return self.weights.version if self.weights is not None else self.initial_version

    @property
    def up(self) -> list[Member]:
        """The servers that are not down."""
        return [member for member in self.members if not member.is_down]

    def _client(self, server: AnyServer, hang_timeout_s: float | None) -> ServerClient:
        def note_death(cause: ServerDied) -> None:
            if not self.may_restart:  # end what is left of it, because the trainer needs its memory
                member = next(one for one in self.members if one.server is server)
                note = asyncio.ensure_future(self._restart(member, member.starts, "between calls", cause))
                self._notes.add(note)
                note.add_done_callback(self._notes.discard)

        return ServerClient(server, hang_timeout_s, note_death)

    async def start(self) -> None:
        """Start all servers concurrently.

        Raises:
            RuntimeError: A server ended while starting, or did not answer within the deadline.
        """
        await gather_all([self._boot(member, "start") for member in self.members])

    async def stop(self) -> None:
        """End all servers, whatever state they are in."""
        await asyncio.gather(*(self._stop(member) for member in self.members))

    async def _stop(self, member: Member) -> None:
        try:
            if member.server.running and await member.client.healthy():
                # Without it vLLM may hang when it gets SIGTERM with requests in flight.
                await member.client.post("stop", "/pause?mode=abort", PAUSE_TIMEOUT_S)
        except (ServerDied, RuntimeError) as error:
            log.info("stop: %s", error)  # it is ended below in any case
        finally:
            await member.client.close()
            member.server.terminate()
            await asyncio.to_thread(member.server.wait)

    async def _boot(self, member: Member, phase: str) -> None:
        """Start a server and give it the newest weights."""
        await asyncio.to_thread(member.server.spawn)
        await member.client.open()
        try:
            await member.client.wait_ready(self.start_timeout_s)
            weights = self.weights
            if weights is not None:
                died = await self.transport.deliver([member.client], weights)
                if died:
                    raise died[0]
                await self._stage(member.client, weights)
                await swap(member.client, weights, self.sync_timeout_s, verify=self.verify_sync)
                self.transport.release(weights)
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
        """Restart a server that died or hangs. Outside of the generator's turns only end it; it is down then.

        Args:
            member: Server to restart.
            starts: Value of ``member.starts`` when the caller found it alive. Nothing is done if it was restarted since.
            phase: Name of the caller's work, for messages.
            cause: Error that the caller got.

        Raises:
            RuntimeError: The server died more often than ``max_restarts`` allows.
        """
        async with member.lock:
            if member.starts != starts or member.is_down:
                return
            await member.client.close()  # an API server whose engine core died waits for its connections to close
            hangs = isinstance(cause, ServerHangs)
            if not hangs:
                await asyncio.to_thread(member.server.wait_exit, EXIT_WAIT_S)
            report = member.server.report()
            await asyncio.to_thread(member.server.kill)
            member.restarts += 1
            message = f"{phase}: {member.server.name} {'hangs' if hangs else 'died'} ({cause}); {report}"
            if member.restarts > self.max_restarts:
                raise RunError(f"{message}\nrollout.max_restarts allows {self.max_restarts} restarts of a server")
            when = "" if self.may_restart else ", in the generator's next turn: the trainer has the device"
            log.warning("%s\nrestart %d of %d%s", message, member.restarts, self.max_restarts, when)
            if self.may_restart:
                await self._boot(member, phase)
            else:
                member.is_down = True

    async def restart_down(self) -> None:
        """Start the servers that are down, with the newest weights. Their memory must be free, and no process may give memory back meanwhile.

        Raises:
            RuntimeError: A server ended while starting, or did not answer within the deadline.
        """

        async def restart(member: Member) -> None:
            async with member.lock:
                await self._boot(member, "restart")
                member.is_down = False

        await gather_all([restart(member) for member in self.members if member.is_down])
        async with self._revived:
            self._revived.notify_all()

    async def call_up(self, phase: str, send: Callable[[ServerClient], Awaitable[T]]) -> list[T]:
        """Call all servers that are not down, as :meth:`call` does. Return the answers of those that stay up."""

        async def ask(member: Member) -> list[T]:
            try:
                return [await self.call(member, phase, send)]
            except ServerIsDown:
                return []

        return [answer for answers in await gather_all([ask(member) for member in self.up]) for answer in answers]

    async def call(self, member: Member, phase: str, send: Callable[[ServerClient], Awaitable[T]]) -> T:
        """Send a request, and send it again when the server died or hung meanwhile and was restarted.

        Raises:
            ServerIsDown: The server died, and may not be restarted now.
        """
        while True:
            async with member.lock:  # held while the server is restarted
                starts = member.starts
            if member.is_down:
                raise ServerIsDown(
                    f"{phase}: {member.server.name} is down until the generator's next turn on the devices"
                )
            try:
                return await send(member.client)
            except ServerDied as error:
                await self._restart(member, starts, phase, error)

    async def call_least_loaded(self, phase: str, send: Callable[[ServerClient, Member], Awaitable[T]]) -> T:
        """Call the server with the fewest requests, as :meth:`call` does. Call another one when that server goes down."""
        async with self._slots:
            while True:
                await self._wait_for_server(phase)
                member = min(self.up, key=lambda m: m.in_flight)
                member.in_flight += 1

                async def send_to(client: ServerClient, to: Member = member) -> T:
                    return await send(client, to)

                try:
                    answer = await self.call(member, phase, send_to)
                except ServerIsDown:
                    continue
                finally:
                    member.in_flight -= 1
                member.num_answered += 1
                return answer

    async def _wait_for_server(self, phase: str) -> None:
        """Return when a server is up. Where none is, ask the trainer for the devices.

        Raises:
            ServerIsDown: No server is up, and there is no trainer to ask.
        """
        async with self._revived:
            while not self.up:
                if self.on_stalled is None:
                    raise ServerIsDown(
                        f"{phase}: all rollout servers are down until the generator's next turn on the devices"
                    )
                self.on_stalled()
                await self._revived.wait()

    async def load(self, weights: WeightVersion) -> float:
        """Give all servers new weights. Every server checks them before the first one changes. Servers that are down start with them.

        Args:
            weights: New version.

        Returns:
            Seconds that the slowest server spent on checksums. 0 if all servers are down.

        Raises:
            ValueError: The tensors do not fit the model. The servers keep their old weights.
            RuntimeError: A server answered with an error, not in time, or died too often.
        """
        staged_s = None
        while staged_s is None:
            staged_s = await self._deliver(weights)
        self.weights = weights  # a server that is restarted from here on starts with them
        loaded_s = await gather_all([self._swap(member, weights) for member in staged_s])
        self.transport.release(weights)
        return max(map(sum, zip(staged_s.values(), loaded_s, strict=True)), default=0.0)

    async def _deliver(self, weights: WeightVersion) -> dict[Member, float] | None:
        """Deliver new weights to all servers that are not down, and let the servers check them.

        Returns:
            Seconds that each server spent on checksums. None: servers died and were restarted, or are down, so everything must be
            done again.
        """
        members = self.up
        starts = [member.starts for member in members]
        died = await self.transport.deliver([member.client for member in members], weights) if members else {}
        if not died:
            calls = [self._stage(member.client, weights) for member in members]
            results = await asyncio.gather(*calls, return_exceptions=True)
            died = {index: result for index, result in enumerate(results) if isinstance(result, ServerDied)}
            for error in results:
                if isinstance(error, BaseException) and not isinstance(error, ServerDied):
                    raise error
            if not died:
                seconds = [result for result in results if not isinstance(result, BaseException)]
                return dict(zip(members, seconds, strict=True))
        for index, cause in died.items():
            await self._restart(members[index], starts[index], "weight sync", cause)
        return None

    async def _stage(self, client: ServerClient, weights: WeightVersion) -> float:
        return await stage(client, weights, self.sync_timeout_s, reads_files=self.transport.reads_files)

    async def _swap(self, member: Member, weights: WeightVersion) -> float:
        starts = member.starts
        try:
            return await swap(member.client, weights, self.sync_timeout_s, verify=self.verify_sync)
        except ServerDied as error:
            await self._restart(member, starts, "weight sync", error)
            return 0.0
