"""Call a user's reward or evaluation function in a separate process, in its main thread.

``function_pool.py`` runs this as a script, ``python function_worker.py SOCKET DUMP LIFE PARENT``, with the standard library alone: it starts in
tens of milliseconds and loads neither torch nor Megatron-Core. Orders and answers are JSON with a length in front, over the socket with the
file descriptor SOCKET; stdin, stdout and stderr belong to the function. The first order names the function, and its answer tells whether
it could be loaded. Every later order is one call.

The process, and everything that the function has started, ends with its parent: LIFE is a pipe whose other end the parent holds. The process
ignores the signals that ask a run to stop, because the current step still needs its scores. When it crashes, or gets ``DUMP_SIGNAL``, it
writes its Python stack to the file DUMP, even while a thread holds the GIL.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import faulthandler
import fcntl
import hashlib
import importlib
import importlib.util
import inspect
import json
import numbers
import os
import re
import signal
import struct
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

#: Signal that asks for a dump of the Python stack. No library is known to use it.
DUMP_SIGNAL = signal.SIGRTMAX - 2
#: Signals that ask a run to stop. A terminal or a batch system may send them to every process of a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
#: Arguments of a function: for one response, or lists of them for a batch.
PARAMETERS = ("prompt", "response", "label", "metadata")
#: Number of characters of a value that an answer shows.
SHOWN_LENGTH = 200
_HEADER = struct.Struct("!I")
_TAG = "\0type"

# --- orders and answers ---


def frame(message: Any) -> bytes:
    """Return the message as JSON, with its length in front.

    Raises:
        TypeError: A value has a type with no JSON form that parquet does not give either.
    """
    text = json.dumps(message, default=_tagged).encode("ascii")
    return _HEADER.pack(len(text)) + text


def frame_length(header: bytes | bytearray) -> int:
    """Return the length of the JSON text that follows a header of four bytes."""
    return _HEADER.unpack(header)[0]


def parse(text: bytes) -> Any:
    """Return the message of a JSON text."""
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    """Return a JSON form for a value that parquet gives and JSON lacks."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return {_TAG: type(value).__name__, "value": value.isoformat()}
    if isinstance(value, datetime.timedelta):
        return {_TAG: "timedelta", "value": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, decimal.Decimal):
        return {_TAG: "Decimal", "value": str(value)}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "value": base64.b64encode(value).decode()}
    raise TypeError(f"a {type(value).__name__} cannot be handed to a reward function: {repr(value)[:SHOWN_LENGTH]}")


def _untagged(value: dict[str, Any]) -> Any:
    kind = value.get(_TAG)
    if kind is None:
        return value
    content = value["value"]
    if kind == "timedelta":
        return datetime.timedelta(*content)
    if kind == "Decimal":
        return decimal.Decimal(content)
    if kind == "bytes":
        return base64.b64decode(content)
    kinds: dict[str, type[datetime.date | datetime.time]]
    kinds = {"datetime": datetime.datetime, "date": datetime.date, "time": datetime.time}
    return kinds[kind].fromisoformat(content)


class Channel:
    """The worker's end of the socket."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._received = bytearray()

    def send(self, message: Any) -> None:
        """Write a message. It blocks while the parent's buffer is full."""
        left = memoryview(frame(message))
        while left:
            left = left[os.write(self.descriptor, left) :]

    def read(self) -> bool:
        """Read what has arrived, or wait for it. False: the parent has closed its end."""
        part = os.read(self.descriptor, 1 << 16)
        self._received += part
        return bool(part)

    def messages(self) -> Iterator[Any]:
        """Yield the messages that are complete."""
        while len(self._received) >= _HEADER.size:
            end = _HEADER.size + frame_length(self._received[: _HEADER.size])
            if len(self._received) < end:
                return
            text = bytes(self._received[_HEADER.size : end])
            del self._received[:end]
            yield parse(text)


# --- the function ---


class LoadError(ValueError):
    """The function cannot be loaded. The message names the config field, the problem, and its place."""


def search_path(spec: str, parents: Sequence[str]) -> list[str]:
    """Return ``sys.path`` for a function: standard library, folder of the function's file, current folder, the parent's path.

    Neighbours of the function's file come before other modules with their names. But a neighbour ``types.py`` does not hide the standard
    library's.
    """
    library = sysconfig.get_path("stdlib")
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    parents = [os.path.abspath(entry) for entry in parents]
    standard = [entry for entry in parents if entry in (library, f"{library}/lib-dynload") or entry.endswith(archive)]
    target = spec.rpartition(":")[0]
    own = [os.path.dirname(os.path.abspath(target))] if target.endswith(".py") else []
    return list(dict.fromkeys([*standard, *own, os.getcwd(), *parents]))


def load_function(spec: str, field: str) -> Callable[..., Any]:
    """Import ``package.module:function`` or ``path/to/file.py:function``.

    Args:
        spec: Value of the config field.
        field: Config field that holds it, for messages.

    Raises:
        LoadError: There is no such file, module or function, or its import fails; the message names file and line.
    """
    target, _, name = spec.rpartition(":")
    if not target:
        raise LoadError(f"{field} is {spec!r}: write it as package.module:function or path/to/file.py:function")
    if target.endswith(".py") and not Path(target).is_file():
        raise LoadError(f"{field} is {spec!r}: no file {target}")
    try:
        module = _import_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    except BaseException as error:  # also sys.exit and the like: the parent reports it
        raise LoadError(f"{field} is {spec!r}: {_import_problem(error, target)}") from error
    found = vars(module).get(name)
    if not callable(found):
        functions = [
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        ]
        raise LoadError(
            f"{field} is {spec!r}: {target} has no function {name!r}; it has {', '.join(functions) or 'none'}"
        )
    return found


def _import_file(path: Path) -> Any:
    # The module is named by its stem, so that other processes can import what it defines; by its path if the stem is already taken.
    name = path.stem
    if not name.isidentifier() or name in sys.stdlib_module_names or name in sys.modules:
        name = str(path.resolve())
    module_spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses look up the module that defines them
    module_spec.loader.exec_module(module)
    return module


def _import_problem(error: BaseException, target: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if f"{target}.".startswith(f"{error.name}."):
            return f"no module {error.name!r} in the current folder ({os.getcwd()}) or on PYTHONPATH"
        return f"it needs the module {error.name!r}, which is not installed here and not next to it{place_of(error)}"
    hint = ""
    if isinstance(error, ImportError) and "relative import" in str(error):
        hint = "; a file that is named by its path belongs to no package: import neighbours by name, or write package.module:function"
    return f"cannot be imported: {describe(error)}{hint}"


def check_signature(function: Callable[..., Any], spec: str, field: str, *, is_batch: bool) -> None:
    """Raise LoadError when the function does not accept the four arguments, or yields instead of returning."""
    calls = (function, type(function).__call__)
    if any(inspect.isasyncgenfunction(call) or inspect.isgeneratorfunction(call) for call in calls):
        raise LoadError(f"{field} is {spec!r}: it is a generator (it has `yield`); return the score instead")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(*PARAMETERS)
    except TypeError as error:
        names = ", ".join(f"{name}s" if is_batch and name != "metadata" else name for name in PARAMETERS)
        raise LoadError(
            f"{field} is {spec!r}: it takes {signature}, but is called with 4 arguments, ({names}): {error}"
        ) from error


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a call gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def is_user_file(file: str) -> bool:
    """Return whether a source file is the user's, and not part of a library, the interpreter or this worker."""
    libraries = (sysconfig.get_path("stdlib"), "<frozen")
    return not (file.startswith(libraries) or "site-packages" in file or "dist-packages" in file or file == __file__)


def holds_gpu() -> bool:
    """Return whether the function's module has put something on a GPU, for example a model."""
    return "torch.cuda" in sys.modules and sys.modules["torch.cuda"].is_initialized()


def user_sources() -> dict[str, str]:
    """Return file -> digest of the user's modules that are loaded."""
    found = {}
    for module in list(sys.modules.values()):
        file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
        if isinstance(file, str) and file.endswith(".py") and is_user_file(file) and os.path.isfile(file):
            found[os.path.realpath(file)] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


# --- errors ---


def describe(error: BaseException) -> str:
    """Return type, text, and the user's line that raised."""
    try:
        text = str(error)
    except Exception as inner:  # noqa: BLE001  the user's __str__
        text = f"(its text cannot be shown: {type(inner).__name__})"
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {text}{place_of(error)}"


def place_of(error: BaseException) -> str:
    """Return `` (file:line in function)`` of the user's last frame; "" if there is none."""
    frames = [(entry.filename, entry.lineno, entry.name) for entry in traceback.extract_tb(error.__traceback__)]
    own = [entry for entry in frames if is_user_file(entry[0])]
    last = own[-1] if own else frames[-1] if frames and frames[-1][0] != __file__ else None
    return f" ({last[0]}:{last[1]} in {last[2]})" if last is not None else ""


def place_in_dump(dump: str) -> str:
    """Return ``file:line in function`` of the user's innermost frame in a faulthandler dump; "" if there is none."""
    for file, line, function in re.findall(r'^  File "(.*)", line (\d+) in (.*)$', dump, re.MULTILINE):
        if is_user_file(file):
            return f"{file}:{line} in {function}"
    return ""


# --- scores ---


def as_score(value: Any) -> float | list[str]:
    """Return the number that a function returned, or [the value's text, what is wrong with it].

    A number is whatever Python turns into a float: bool, int, Decimal, Fraction, scalars of numpy, tensors and arrays without a dimension.
    """
    if inspect.iscoroutine(value):
        value.close()
        return ["a coroutine", "write `async def`, or run it to its end"]
    shape = tuple(getattr(value, "shape", ()))  # arrays and tensors have one
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    is_number = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    if isinstance(value, str | bytes) or is_complex or shape or not is_number:
        of = f" of shape {list(shape)}" if shape else ""
        return [_shown(value), "" if value is None else f"it is a {type(value).__name__}{of}"]
    try:
        score = float(value)
        struct.pack("<f", score)
    except OverflowError:
        return [_shown(value), "it is beyond float32"]
    except (TypeError, ValueError, RuntimeError) as error:
        return [_shown(value), f"it is a {type(value).__name__} ({error})"]
    return score if abs(score) < float("inf") else [str(score), ""]  # a NaN is not below infinity


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001  the user's __repr__; an int of many digits
        text = f"a {type(value).__name__} without a text ({type(error).__name__})"
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 3] + "..."


def answer(value: Any, num_rows: int | None) -> dict[str, Any]:
    """Return the answer to a call that returned.

    Args:
        value: Return value of the function.
        num_rows: Number of responses of a batch; None: the call was about one response.
    """
    if num_rows is None:
        return {"scores": [as_score(value)]}
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        return {"bad": [_shown(value), f"it is no list of {num_rows} numbers"]}
    values = list(value)
    if len(values) != num_rows:
        return {"bad": [_shown(value), f"it has {len(values)} values for {num_rows} responses"]}
    return {"scores": [as_score(one) for one in values]}


def failure(error: BaseException) -> dict[str, Any]:
    """Return the answer to a call that raised. The exception itself is not sent: its class may exist only in this process."""
    return {"error": describe(error), "traceback": "".join(traceback.format_exception(error))}


# --- the process ---


class Worker:
    """Server of calls, until the parent closes the socket."""

    def __init__(self, channel: Channel, function: Callable[..., Any], order: dict[str, Any]) -> None:
        self.channel = channel
        self.function = function
        self.is_batch: bool = order["is_batch"]
        self.timeout_s: float = order["timeout_s"]
        self._process = os.getpid()

    def serve(self) -> None:
        """Make calls one after the other."""
        while self.channel.read():
            for call in self.channel.messages():
                self.channel.send({"id": call["id"], **self._call(call)})

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            found = answer(self.function(*call["arguments"]), self._num_rows(call))
        except BaseException as error:  # noqa: BLE001  sys.exit in a function ends a call, not the worker
            found = failure(error)
        if os.getpid() != self._process:
            os._exit(0)  # a process that the function forked has returned here
        return found

    async def serve_async(self) -> None:
        """Make many calls concurrently. A call that misses its deadline is cancelled."""
        import asyncio  # importing it takes as long as everything else here

        loop, tasks, closed = asyncio.get_running_loop(), set(), asyncio.Event()

        async def call_one(call: dict[str, Any]) -> None:
            try:
                async with asyncio.timeout(self.timeout_s) as limit:
                    value = await self.function(*call["arguments"])
                found = answer(value, self._num_rows(call))
            except BaseException as error:  # noqa: BLE001  the loop would end with sys.exit
                found = failure(error)
                if limit.expired():
                    found = {"timeout": place_of(error.__cause__ or error).strip(" ()")}
            self.channel.send({"id": call["id"], **found})

        def take() -> None:
            if not self.channel.read():
                closed.set()
            for call in self.channel.messages():
                task = loop.create_task(call_one(call))
                tasks.add(task)  # the loop itself only keeps weak references
                task.add_done_callback(tasks.discard)

        loop.add_reader(self.channel.descriptor, take)
        await closed.wait()

    def _num_rows(self, call: dict[str, Any]) -> int | None:
        return len(call["arguments"][0]) if self.is_batch else None


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a request to stop. SIG_IGN would be inherited by the programs that the function starts."""


def _prepare(channel: int, dump: int, life: int, parent: int) -> None:
    """Set up how the process reacts to its parent, signals, forks and crashes."""
    # When the pipe's other end closes, the kernel kills this process's group, even while a thread holds the GIL. (PR_SET_PDEATHSIG would
    # kill only this process, and then the pipe could notify nobody.)
    fcntl.fcntl(life, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(life, fcntl.F_SETSIG, int(signal.SIGKILL))
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if os.getppid() != parent:
        os._exit(1)
    for descriptor in (channel, dump, life):
        os.set_inheritable(descriptor, False)
    faulthandler.enable(dump, all_threads=False)
    faulthandler.register(DUMP_SIGNAL, dump, all_threads=False)
    for number in STOP_SIGNALS:
        signal.signal(number, _ignore)

    masks: list[set[int]] = []

    def in_child() -> None:
        os.close(channel)  # the parent sees from it that this process has ended
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())

    os.register_at_fork(
        # A signal to the child stays pending until the child has its own handler.
        before=lambda: masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop()),
        after_in_child=in_child,
    )
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # the kernel should kill this process before the trainer
    except OSError:
        pass  # this kernel has no such file


def main(arguments: Sequence[str]) -> int:
    descriptor, dump, life, parent = (int(argument) for argument in arguments)
    _prepare(descriptor, dump, life, parent)
    channel = Channel(descriptor)
    order: dict[str, Any] | None = None
    while order is None:
        if not channel.read():
            return 0
        order = next(channel.messages(), None)
    spec, field = order["spec"], order["field"]
    sys.path[:] = search_path(spec, order["sys_path"])
    sys.argv = [spec]
    try:
        function = load_function(spec, field)
        check_signature(function, spec, field, is_batch=order["is_batch"])
    except LoadError as error:
        channel.send({"load_error": str(error), "traceback": "".join(traceback.format_exception(error))})
        return 0
    channel.send({"is_async": is_async(function), "holds_gpu": holds_gpu(), "sources": user_sources()})
    worker = Worker(channel, function, order)
    if is_async(function):
        import asyncio

        asyncio.run(worker.serve_async())
    else:
        worker.serve()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # threads that the function left behind may never end
