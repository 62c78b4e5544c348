"""Worker processes that call a user's function. Several work in parallel, every call has a deadline, and dead workers are replaced.

    caller's thread                      thread "function-workers"                     processes
    submit(calls) -> Ticket  ------->    queue -> a worker with a free slot  ------>   function_worker.py
    Ticket.wait()            <-------    outcome of every row                <------   answer, deadline or death

Workers are started when calls wait for one, up to the pool's number. A worker that misses a deadline is killed with everything that it
started; so is everything that a dead worker has left. If a worker dies during several calls of an ``async def`` function, each of these
calls is made again, alone, so that the one at fault is found.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hetero_ppo.errors import RunError
from hetero_ppo.reward import function_worker

log = logging.getLogger(__name__)

#: Most seconds that the import of the function's module may take.
START_LIMIT_S = 300.0
#: Seconds that calls wait before more workers are started: all of them if no call has ended meanwhile, otherwise as many again.
GROW_S = 0.1
#: Seconds after its deadline within which a worker can cancel an ``async def`` call before the worker is killed.
CANCEL_S = 1.0
#: Seconds to wait for a dump of the stack, and for the exit status of a process whose socket has closed.
DUMP_S, EXIT_S = 0.5, 2.0
#: Variables of torchrun. A library in a worker that finds them would join the trainer's world.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


class FailureKind(str, Enum):
    """Reason why a response has no score."""

    error = "error"  # the function raised
    timeout = "timeout"
    crash = "crash"  # the function ended its process
    bad_score = "bad_score"  # the function returned something that is not a finite number


@dataclass(frozen=True)
class Failure:
    """One call that gave no score."""

    kind: FailureKind
    text: str  # the error, or the value of a bad score
    detail: str = ""  # problem of a bad score
    traceback: str = ""


@dataclass(frozen=True)
class FunctionSpec:
    """One function, and how to call it."""

    spec: str  # "package.module:function", or "path/to/file.py:function"
    field: str  # field of the config, for messages
    timeout_s: float  # most seconds of one call
    num_workers: int | None = None  # most workers; None: derived
    batch: int | None = None  # responses per call; None: one, and the function gets no lists
    concurrency: int | None = None  # concurrent calls in a worker, for an async def function; None: derived


@dataclass(frozen=True)
class LoadedFunction:
    """Facts about the function that the first worker reports."""

    is_async: bool
    sources: dict[str, str]  # user's file -> its digest
    num_workers: int
    concurrency: int


#: Concurrent calls in a worker of an ``async def`` function. They wait for something else, so they do not each need a core.
DEFAULT_CONCURRENCY = 64


def default_workers(*, is_async: bool, holds_gpu: bool) -> int:
    """Return the number of workers: one for every core, between 4 and 16.

    It is 1 if a worker makes many calls at once, or if each worker would hold its own model on the trainer's GPU.
    """
    return 1 if is_async or holds_gpu else max(4, min(16, len(os.sched_getaffinity(0))))


class Ticket:
    """Outcomes of the rows of one ``submit``, in the order of the rows."""

    def __init__(self, num_rows: int, pool: FunctionPool) -> None:
        self.outcomes: list[float | Failure | None] = [None] * num_rows
        self._pool = pool
        self._left = num_rows
        self._problem: RunError | None = None
        self._changed = threading.Condition()

    def wait(self, timeout_s: float, *, until_failure: bool) -> bool:
        """Wait until every row has an outcome, or, with ``until_failure``, until one has failed. False: neither happened within ``timeout_s``.

        Raises:
            RunError: The pool cannot make calls any more.
        """

        def is_over() -> bool:
            failed = until_failure and any(isinstance(outcome, Failure) for outcome in self.outcomes)
            return self._left == 0 or failed or self._problem is not None

        with self._changed:
            over = self._changed.wait_for(is_over, timeout_s)
            if self._problem is not None:
                raise self._problem
        return over

    def cancel(self) -> None:
        """Cancel the calls that have not started."""
        self._pool.cancel(self)

    def set_outcome(self, row: int, outcome: float | Failure) -> None:
        """Set a row's outcome."""
        with self._changed:
            self.outcomes[row] = outcome
            self._left -= 1
            self._changed.notify_all()

    def give_up(self, problem: RunError) -> None:
        """Make ``wait`` raise the problem."""
        with self._changed:
            self._problem = problem
            self._changed.notify_all()


@dataclass(eq=False)
class _Call:
    number: int
    order: bytes  # message to the worker
    rows: Sequence[int]  # rows of the ticket
    ticket: Ticket
    is_alone: bool = False  # its worker may run no other call at the same time

    def fail(self, failure: Failure) -> None:
        for row in self.rows:
            self.ticket.set_outcome(row, failure)


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    dump: io.FileIO  # file in memory for its stacks
    life: io.FileIO  # a pipe's end; when it closes, the kernel ends the worker's group
    writer: asyncio.StreamWriter | None = None
    is_ready: bool = False
    running: dict[int, _Call] = field(default_factory=dict)  # id -> call
    timers: dict[int, asyncio.TimerHandle] = field(default_factory=dict)
    overdue: str | None = None  # place in the user's code at its deadline

    @property
    def is_exclusive(self) -> bool:
        return any(call.is_alone for call in self.running.values())

    def has_ended(self) -> bool:
        """Return whether the process has ended. It is not reaped, so that no other process can get its group's number."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def kill(self) -> None:
        """Kill the worker and every process of its group."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def place_in_dump(self) -> str:
        """Return the user's line in the dump of its stack; "" if there is none."""
        if self.dump.closed:
            return ""
        return function_worker.place_in_dump(os.pread(self.dump.fileno(), 1 << 16, 0).decode(errors="replace"))

    def clear_dump(self) -> None:
        if not self.dump.closed:
            self.dump.truncate(0)


class FunctionPool:
    """Pool of workers that call one function: ``open``, ``loaded``, any number of ``submit``, and ``close``."""

    def __init__(self, function: FunctionSpec) -> None:
        """Take the function; no process is started.

        Args:
            function: Function to call, and how to call it.
        """
        self.function = function
        self._loaded: LoadedFunction | None = None
        self._load_error: ValueError | None = None
        self._load_ended = threading.Event()
        self._started = threading.Event()
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count()
        # Only the pool's own thread uses these:
        self._workers: list[_Worker] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._queue: deque[_Call] = deque()
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._grows: asyncio.TimerHandle | None = None
        self._num_answered = 0
        self._is_closing = False
        self._problem: RunError | None = None

    # --- any thread ---

    def open(self) -> None:
        """Start the first worker, which imports the function's module. Returns at once."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="function-workers", daemon=True)
        self._thread.start()
        self._started.wait()

    def loaded(self) -> LoadedFunction:
        """Return the facts about the function, once the first worker has imported it.

        Raises:
            ValueError: The function cannot be imported or called; the message names the config field, file and line.
        """
        self._load_ended.wait()
        if self._load_error is not None:
            raise self._load_error
        assert self._loaded is not None
        return self._loaded

    def submit(self, calls: Sequence[tuple[list[Any], Sequence[int]]], num_rows: int) -> Ticket:
        """Queue calls.

        Args:
            calls: Arguments of each call, and the rows that its scores belong to.
            num_rows: Number of rows of all calls.

        Raises:
            TypeError: An argument has a type that cannot be sent to a worker.
        """
        ticket, made = Ticket(num_rows, self), []
        for arguments, rows in calls:
            number = next(self._numbers)
            order = function_worker.frame({"id": number, "arguments": arguments})
            made.append(_Call(number, order, rows, ticket))
        self._loop.call_soon_threadsafe(self._enqueue, ticket, made)
        return ticket

    def processes(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.process.pid for worker in list(self._workers)]

    def cancel(self, ticket: Ticket) -> None:
        """Remove a ticket's calls from the queue."""
        self._loop.call_soon_threadsafe(self._remove_calls, ticket)

    def close(self) -> None:
        """Kill the workers. Safe to call twice."""
        if self._thread is not None and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    # --- the pool's thread ---

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(self._on_bug)
        self._closing = asyncio.Event()
        self._started.set()
        self._loop.call_soon(self._start_worker)  # if it raises, _on_bug gets the error
        await self._closing.wait()
        self._is_closing = True
        for worker in self._workers:
            worker.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enqueue(self, ticket: Ticket, calls: list[_Call]) -> None:
        if self._problem is not None:
            ticket.give_up(self._problem)
            return
        self._queue.extend(calls)
        self._tickets.add(ticket)
        self._dispatch()

    def _remove_calls(self, ticket: Ticket) -> None:
        self._queue = deque(call for call in self._queue if call.ticket is not ticket)
        self._tickets.discard(ticket)

    def _dispatch(self) -> None:
        """Give queued calls to workers with a free slot; start more workers if calls have to wait."""
        while self._queue:
            worker = self._free_worker(self._queue[0])
            if worker is None:
                break
            self._send(worker, self._queue.popleft())
        if not self._queue or self._is_closing or self._loaded is None:
            return
        if not self._workers:
            self._start_worker()
        elif self._grows is None and len(self._workers) < self._loaded.num_workers:
            self._grows = self._loop.call_later(GROW_S, self._grow, self._num_answered)

    def _free_worker(self, call: _Call) -> _Worker | None:
        slots = self._loaded.concurrency if self._loaded is not None and not call.is_alone else 1
        for worker in self._workers:
            if worker.is_ready and worker.overdue is None and len(worker.running) < slots and not worker.is_exclusive:
                return worker
        return None

    def _grow(self, num_answered: int) -> None:
        self._grows = None
        assert self._loaded is not None
        num_free = self._loaded.num_workers - len(self._workers)
        is_slow = self._num_answered == num_answered
        for _ in range(min(num_free, len(self._queue), num_free if is_slow else max(1, len(self._workers)))):
            self._start_worker()
        self._dispatch()

    def _send(self, worker: _Worker, call: _Call) -> None:
        assert worker.writer is not None
        worker.running[call.number] = call
        worker.writer.write(call.order)
        assert self._loaded is not None
        limit_s = self.function.timeout_s + (CANCEL_S if self._loaded.is_async else 0.0)
        worker.timers[call.number] = self._loop.call_later(limit_s, self._on_deadline, worker, call.number)

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        dump = io.FileIO(os.memfd_create("stacks"), "r+")
        reads, writes = os.pipe()
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in TORCHRUN_VARIABLES and not name.startswith(TORCHRUN_PREFIXES)
        }
        script = Path(function_worker.__file__)
        with theirs, open(reads, "rb"):
            descriptors = (theirs.fileno(), dump.fileno(), reads)
            process = subprocess.Popen(
                [sys.executable, "-u", "-P", str(script), *map(str, descriptors), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={"OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,  # a terminal's Ctrl-C goes only to the trainer, which decides
            )
        worker = _Worker(process, ours, dump, io.FileIO(writes, "w"))
        self._workers.append(worker)
        self._spawn(self._serve_worker(worker))

    def _spawn(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._loop.call_exception_handler({"message": "a worker's task", "exception": task.exception()})

    def _on_bug(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Give up after a bug in this module: outcomes may be lost, and nobody may wait for them."""
        loop.default_exception_handler(context)
        self._give_up(f"its workers cannot be served: {context.get('exception') or context['message']}")

    async def _serve_worker(self, worker: _Worker) -> None:
        """Run one worker from its start to its end."""
        reader, worker.writer = await asyncio.open_connection(sock=worker.socket)
        order = {
            "spec": self.function.spec,
            "field": self.function.field,
            "is_batch": self.function.batch is not None,
            "timeout_s": self.function.timeout_s,
            "sys_path": [str(entry) for entry in sys.path],
        }
        try:
            worker.writer.write(function_worker.frame(order))
            async with asyncio.timeout(START_LIMIT_S):
                hello = await self._read(reader)
            if self._accept(hello):
                worker.is_ready = True
                self._dispatch()
                while True:
                    self._handle_answer(worker, await self._read(reader))
            worker.kill()
        except TimeoutError:
            place = await self._where(worker)
            worker.kill()
            self._give_up(f"its module was not imported within {START_LIMIT_S:g} s{f' ({place})' if place else ''}")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        await self._clean_up(worker)

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
        header = await reader.readexactly(4)
        return function_worker.parse(await reader.readexactly(function_worker.frame_length(header)))

    def _accept(self, hello: dict[str, Any]) -> bool:
        """Return whether the worker may get calls: it loaded the function, from the same files as the first worker."""
        if "load_error" in hello:
            self._give_up(hello["load_error"], hello["traceback"])
            return False
        if self._loaded is None:
            spec, is_async = self.function, hello["is_async"]
            self._loaded = LoadedFunction(
                is_async,
                hello["sources"],
                spec.num_workers or default_workers(is_async=is_async, holds_gpu=hello["holds_gpu"]),
                (spec.concurrency or DEFAULT_CONCURRENCY) if is_async else 1,
            )
            self._load_ended.set()
            return True
        sources = self._loaded.sources
        changed = [file for file, digest in hello["sources"].items() if sources.get(file, digest) != digest]
        if changed:
            self._give_up(
                f"{', '.join(changed)} has changed since the run began, and a worker that starts now would score with other code. "
                "Undo the change; the run can continue from its last checkpoint"
            )
        return not changed

    def _handle_answer(self, worker: _Worker, answer: dict[str, Any]) -> None:
        call = worker.running.pop(answer["id"])
        worker.timers.pop(answer["id"]).cancel()
        self._num_answered += 1
        if "error" in answer:
            call.fail(Failure(FailureKind.error, answer["error"], traceback=answer["traceback"]))
        elif "timeout" in answer:
            call.fail(self._timeout_failure(answer["timeout"]))
        elif "bad" in answer:
            call.fail(Failure(FailureKind.bad_score, *answer["bad"]))
        else:
            for row, score in zip(call.rows, answer["scores"], strict=True):
                call.ticket.set_outcome(
                    row, score if isinstance(score, float) else Failure(FailureKind.bad_score, *score)
                )
        self._dispatch()

    def _timeout_failure(self, place: str) -> Failure:
        where = f" (it was at {place})" if place else ""
        text = f"TimeoutError: it did not end within reward.timeout_s={self.function.timeout_s:g}{where}"
        return Failure(FailureKind.timeout, text)

    def _on_deadline(self, worker: _Worker, number: int) -> None:
        self._spawn(self._kill_overdue(worker, number))

    async def _kill_overdue(self, worker: _Worker, number: int) -> None:
        place = await self._where(worker)  # an answer that arrived meanwhile counts
        if number in worker.running and worker.overdue is None:
            worker.overdue = place
            worker.kill()
        else:
            worker.clear_dump()

    async def _where(self, worker: _Worker) -> str:
        """Return the user's line that a worker is at; "" if it is unknown."""
        worker.clear_dump()
        if not worker.dump.closed:  # Popen.send_signal would reap the process
            os.kill(worker.process.pid, function_worker.DUMP_SIGNAL)
        place, tries = "", 0
        while not place and tries < DUMP_S / 0.01 and not worker.dump.closed:
            await asyncio.sleep(0.01)
            place, tries = worker.place_in_dump(), tries + 1
        return place

    async def _clean_up(self, worker: _Worker) -> None:
        """Kill everything that is left of a worker, and decide what happens to its calls."""
        waited_s = 0.0
        while not worker.has_ended() and waited_s < EXIT_S and worker.overdue is None:
            await asyncio.sleep(0.01)
            waited_s += 0.01
        worker.kill()
        status = worker.process.wait()
        how = _describe_end(status, worker.place_in_dump())
        assert worker.writer is not None
        worker.writer.close()
        worker.dump.close()
        worker.life.close()
        self._workers.remove(worker)
        for timer in worker.timers.values():
            timer.cancel()
        if self._is_closing or self._problem is not None or self._load_error is not None:
            return
        if not worker.is_ready:
            self._give_up(f"its worker {how} while it imported the module")
        elif len(worker.running) > 1:
            again = list(worker.running.values())
            for call in again:
                call.is_alone = True
            self._queue.extendleft(reversed(again))
        elif worker.running:
            (call,) = worker.running.values()
            late = worker.overdue is not None
            call.fail(
                self._timeout_failure(worker.overdue or "") if late else Failure(FailureKind.crash, f"its worker {how}")
            )
        else:
            log.warning(f"{self.function.field}: a worker {how} between two calls; another takes its place")
        self._dispatch()

    def _give_up(self, text: str, traceback: str = "") -> None:
        """Stop making calls; everybody who waits gets the error."""
        about = (
            text if text.startswith(self.function.field) else f"{self.function.field} is {self.function.spec!r}: {text}"
        )
        if self._loaded is None:
            self._load_error = ValueError(about)
            if traceback:
                self._load_error.add_note(traceback)
            self._load_ended.set()
        self._problem = RunError(about)
        for ticket in self._tickets:
            ticket.give_up(self._problem)
        self._queue.clear()


def _describe_end(status: int, place: str) -> str:
    """Describe how a worker ended, from its return code: "was ended by SIGSEGV (at file:line in function)"."""
    where = f" (at {place})" if place else ""
    if status >= 0:
        return f"ended with exit status {status}{where}"
    name = next((number.name for number in signal.Signals if number == -status), f"signal {-status}")
    why = "; the kernel does so when memory is exhausted" if -status == signal.SIGKILL else ""
    return f"was ended by {name}{where}{why}"
