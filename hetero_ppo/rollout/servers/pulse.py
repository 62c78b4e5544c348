"""Whether a server still does anything: a question that passes through its front end, its engine core and all of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hetero_ppo.observability.silence import SilenceClock


class Pulse:
    """Has one question out at a time, and counts how long there is no answer. Used on one event loop.

    vLLM's ``/health`` looks at a flag of its front end: it answers 200 while the engine core is stopped.
    """

    def __init__(self, ask: Callable[[], Awaitable[None]], longest_gap_s: float) -> None:
        """Ask nothing yet.

        Args:
            ask: Sends the question and returns when it is answered, or refused.
            longest_gap_s: See ``SilenceClock``, in seconds.
        """
        self._ask = ask
        self._clock = SilenceClock(longest_gap_s)
        self._question: asyncio.Future[None] | None = None
        self._num_answers = 0

    def look(self, *, is_busy: bool) -> float:
        """Return the seconds for which the question that is out has no answer; ask again when it has one.

        Args:
            is_busy: The server has work that it may take any time for, with a deadline of its own: nothing counts.
        """
        if self._question is None or self._question.done():
            if self._question is not None:
                self._question.exception()  # a refused question is for /health to explain
            self._num_answers += 1
            self._question = asyncio.ensure_future(self._ask())
        if is_busy:
            self._clock.reset()
        return self._clock.look(self._num_answers)

    def close(self) -> None:
        """Take the question back."""
        if self._question is not None:
            self._question.cancel()
