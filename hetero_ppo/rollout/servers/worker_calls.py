"""Calls the workers of all servers concurrently, together with the trainer's own part."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hetero_ppo.errors import RunError
from hetero_ppo.rollout.servers.client import ServerClient, ServerDied

PHASE = "weight sync"


async def call_workers(
    clients: list[ServerClient],
    method: str,
    arguments: list[dict[str, Any]],
    timeout_s: float,
    own_part: Callable[[], None] | None = None,
) -> tuple[list[list[dict[str, Any]]], dict[int, ServerDied]]:
    """Call a method of all servers' workers and do the trainer's part concurrently. Every part has ended when this returns.

    Args:
        clients: Clients of the servers.
        method: Name of a method of ``worker_extension.WeightReceiver``.
        arguments: Arguments of the method for each server.
        timeout_s: Deadline of the calls.
        own_part: Function that does the trainer's part, in a thread. None: it has no part.

    Returns:
        The answers of each server, one per worker, and the errors of the servers that died, by position in ``clients``.

    Raises:
        RunError: A call, or the trainer's part, failed.
    """
    calls = [
        client.call_worker(PHASE, method, timeout_s, **own) for client, own in zip(clients, arguments, strict=True)
    ]
    parts = calls if own_part is None else [*calls, asyncio.to_thread(own_part)]
    results = await asyncio.gather(*parts, return_exceptions=True)
    died = {index: result for index, result in enumerate(results) if isinstance(result, ServerDied)}
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors and not died:  # a peer's death makes errors of the others too
        if isinstance(errors[0], RunError):  # names the server
            raise errors[0]
        raise RunError(f"{PHASE}: {method}: the trainer's end: {errors[0]}") from errors[0]
    answers = [[] if isinstance(result, BaseException) else result for result in results]
    return answers[: len(clients)], died
