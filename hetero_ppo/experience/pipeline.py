"""Turns the chunks of a rollout into an experience, while the generator still works.

The forwards of a complete chunk run while the generator answers the prompts of the next chunks. All chunks that are complete when the
trainer looks form a wave. In a wave every role takes one turn, in which it runs its forward over each of the wave's chunks. The next wave
goes through the roles backwards, so that it begins with the role that is already on the device. A reward function's workers get a chunk
as soon as it is complete. The trainer waits for their scores after the last wave.

The serial twin (``overlap=False``) waits for the last response, and then runs all chunks as one wave. Both run the same forwards over
the same chunks, so their tensors have the same bits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetero_ppo.experience.pending_rollout import PendingRollout
from hetero_ppo.experience.scorers import Stage
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.reward.function import PendingScores
from hetero_ppo.types import Chunk, Experience


@dataclass
class WaveRecord:
    """One pass through the stages."""

    chunks: list[int]  # indices
    stages: list[str]  # in the order in which they ran
    during_generation: bool  # whether the generator was still at work when the wave began


@dataclass
class Pipeline:
    """Runs the stages over the chunks of a rollout."""

    maker: ExperienceMaker
    overlap: bool  # whether to begin with the first complete chunk; False: when the last response is complete
    waves: list[WaveRecord] = field(default_factory=list)  # of the last ``make``

    def make(
        self, pending: PendingRollout, timer: PhaseTimer, *, when_generated: Callable[[], None] = lambda: None
    ) -> Experience:
        """Return the experience of a rollout that was started. Collective over the world.

        Args:
            pending: Rollout of which no chunk was taken yet.
            timer: Timer that gets ``rollout``, in which the trainer waits for the generator, and ``experience``, with a phase for each
                stage.
            when_generated: Function called once, on every rank, when the generator has answered everything and before the last wave.
        """
        stages = self.maker.stages()
        collected = _Collected(pending, stages)
        elsewhere = [(stage, stage.begin) for stage in stages if stage.begin is not None and self.overlap]
        stages = [stage for stage in stages if stage.begin is None or not self.overlap]
        scores_to_come: list[tuple[Stage, Chunk, PendingScores]] = []
        self.waves = []
        forward_s = 0.0
        while not pending.finished:
            with timer.phase("rollout"):
                chunks = pending.next_chunks(wait_for_all=not self.overlap)
                if pending.finished:
                    when_generated()
            start = time.perf_counter()
            with timer.phase("experience"):
                scores_to_come += [
                    (stage, chunk, begin(chunk.rollout)) for chunk in chunks for stage, begin in elsewhere
                ]
                self._run_wave(stages, chunks, collected, timer, is_last=pending.finished)
            forward_s += time.perf_counter() - start
        for stage, chunk, scores in scores_to_come:
            with timer.phase("experience"), timer.phase(stage.name):
                collected.take(stage, chunk, scores.result())
        with timer.phase("experience"), timer.phase("advantages"):
            experience = self.maker.assemble(pending.rollout(), collected.tensors)
        experience.metrics.update(self._metrics(pending, forward_s))
        return experience

    def _run_wave(
        self,
        stages: Sequence[Stage],
        chunks: Sequence[Chunk],
        collected: _Collected,
        timer: PhaseTimer,
        *,
        is_last: bool,
    ) -> None:
        """Run every stage over the chunks. The last wave ends with the last stage, since the role of that stage is trained next."""
        backwards = bool(self.waves) and self.waves[-1].stages[0] == stages[0].name and not is_last
        order = list(reversed(stages)) if backwards else list(stages)
        self.waves.append(WaveRecord([chunk.index for chunk in chunks], [stage.name for stage in order], not is_last))
        for index, stage in enumerate(order):
            following = next((later.role.role for later in order[index + 1 :] if later.role is not None), None)
            with timer.phase(stage.name), self._turn(stage, following, is_last):
                for chunk in chunks:
                    collected.take(stage, chunk, stage.compute(chunk.rollout))

    @staticmethod
    def _turn(stage: Stage, following: str | None, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if stage.role is None:
            return contextlib.nullcontext()
        then: list[str] | None
        if following is not None:
            then = [following]
        else:  # the next wave begins with this role; after the last wave the step's schedule goes on
            then = None if is_last else []
        return stage.role.on_device(phase=stage.name, then=then)

    def _metrics(self, pending: PendingRollout, forward_s: float) -> dict[str, float]:
        early = [wave for wave in self.waves if wave.during_generation]
        return {
            "rollout/generate_s": pending.seconds,
            "pipeline/forwards_s": forward_s,
            "pipeline/num_chunks": float(sum(len(wave.chunks) for wave in self.waves)),
            "pipeline/num_waves": float(len(self.waves)),
            "pipeline/chunks_during_generation": float(sum(len(wave.chunks) for wave in early)),
            **pending.metrics(),
        }


class _Collected:
    """The results of the stages, which come chunk by chunk, in tensors of the whole rollout: [B, T] or [B] float32."""

    def __init__(self, pending: PendingRollout, stages: Sequence[Stage]) -> None:
        self._num_rows = pending.num_rows
        self._width = pending.max_columns
        self._num_columns = 1
        self._tensors: dict[str, Tensor] = {
            stage.name: torch.zeros((self._num_rows, self._width) if stage.per_token else (self._num_rows,))
            for stage in stages
        }

    def take(self, stage: Stage, chunk: Chunk, values: Tensor) -> None:
        """Put a chunk's values into its rows. Columns that the chunk lacks stay 0."""
        if stage.per_token:
            self._num_columns = max(self._num_columns, values.shape[1])
            self._tensors[stage.name][chunk.rows, : values.shape[1]] = values
        else:
            self._tensors[stage.name][chunk.rows] = values

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name of a stage -> its results, with as many columns as the longest sequence needs."""
        return {
            name: tensor[:, : self._num_columns].contiguous() if tensor.dim() == 2 else tensor
            for name, tensor in self._tensors.items()
        }
