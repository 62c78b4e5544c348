"""Asks a server again and again whether it still works. The question passes through its front end, its engine core and all workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hetero_ppo.observability.silence import SilenceClock


class Pulse:
    """Keeps one question open at a time, and measures how long it has no answer. Used on one event loop.

    vLLM's ``/health`` checks a flag of its front end only, and answers 200 while the engine core is stopped.
    """

    def __init__(self, ask: Callable[[], Awaitable[None]], longest_gap_s: float) -> None:
        """Prepare the pulse; the first question comes with :meth:`look`.

        Args:
            ask: Function that sends the question and returns when it is answered or refused.
            longest_gap_s: Longest time between two looks that counts as silence, in seconds; see ``SilenceClock``.
        """
        self._ask = ask
        self._clock = SilenceClock(longest_gap_s)
        self._question: asyncio.Future[None] | None = None
        self._num_answers = 0

    def look(self, *, is_busy: bool) -> float:
        """Return for how many seconds the open question has had no answer. Ask again if it has one.

        Args:
            is_busy: Whether the server has work with its own deadline, during which it may be silent. Then no silence counts.
        """
        if self._question is None or self._question.done():
            if self._question is not None:
                self._question.exception()  # /health explains a refused question
            self._num_answers += 1
            self._question = asyncio.ensure_future(self._ask())
        if is_busy:
            self._clock.reset()
        return self._clock.look(self._num_answers)

    def close(self) -> None:
        """Cancel the open question."""
        if self._question is not None:
            self._question.cancel()
