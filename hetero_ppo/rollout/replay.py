"""Rollouts on disk, one JSON line per response, and a generator that answers from them.

Step n has the file ``<dir>/step_<n>.jsonl``. A replay fixes the token ids of a run. Two runs with different parallel layouts can then be
compared number by number, and a step can be repeated without a model that answers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hetero_ppo.disk import writing
from hetero_ppo.observability.json_text import json_text
from hetero_ppo.rollout.checks import check_resumption
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator
from hetero_ppo.rollout.weights.targets import POLICY, check_target
from hetero_ppo.types import OnResponse, Response, Rollout

FILE_NAME = re.compile(r"step_(\d+)\.jsonl")
FINISH_REASONS = ("stop", "length")


@dataclass(frozen=True)
class RolloutRecord:
    """One line of a rollout file. Its other keys (scores, texts) are in ``extra``."""

    step: int
    prompt_index: int  # row of the dataset
    prompt_ids: list[int]
    response_ids: list[int]
    rollout_log_probs: list[float]  # one per response token
    finish_reason: str  # "stop" or "length"
    weight_version: str
    label: Any = None
    chunk: int = 0  # chunk of the pipeline in which the response was complete
    extra: dict[str, Any] = field(default_factory=dict)


#: Key -> type of its value, and for a list the type of its items.
_FIELDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "prompt_index": (int,),
    "prompt_ids": (list, int),
    "response_ids": (list, int),
    "rollout_log_probs": (list, float),
    "finish_reason": (str,),
    "weight_version": (str,),
}


def step_path(directory: Path, step: int) -> Path:
    """Return the path of a PPO step's file."""
    return directory / f"step_{step:06d}.jsonl"


def rollout_records(rollout: Rollout, step: int, extra: Mapping[str, Sequence[Any]]) -> list[RolloutRecord]:
    """Return the rows of a rollout batch as records.

    Args:
        rollout: All rows of the step.
        step: PPO step.
        extra: Further columns, name -> one JSON value per row.
    """
    records = []
    for row in range(rollout.batch_size):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.sequence_lengths[row])
        records.append(
            RolloutRecord(
                step=step,
                prompt_index=rollout.prompt_index[row],
                prompt_ids=rollout.token_ids[row, :start].tolist(),
                response_ids=rollout.token_ids[row, start:end].tolist(),
                rollout_log_probs=rollout.rollout_log_probs[row, start - 1 : end - 1].tolist(),
                finish_reason="length" if rollout.truncated[row] else "stop",
                weight_version=rollout.weight_version[row],
                label=rollout.labels[row],
                chunk=rollout.chunk_index[row] if rollout.chunk_index else 0,
                extra={name: values[row] for name, values in extra.items()} | _older(rollout, row),
            )
        )
    return records


def _older(rollout: Rollout, row: int) -> dict[str, Any]:
    """Return (label, tokens) of the weights before ``weight_version`` for a resumed response, oldest first; {} for any other."""
    earlier = rollout.earlier_versions[row] if rollout.earlier_versions else []
    return {"earlier_versions": earlier} if earlier else {}


def write_records(directory: Path, step: int, records: Sequence[RolloutRecord]) -> Path:
    """Write one step's file. It appears when it is complete, and replaces an older one of the same step."""
    path = step_path(directory, step)
    partial = path.with_suffix(".partial")
    with writing(path, f"rollouts of step {step}", remedy="choose another run.dir, or set train.dump_rollouts=false"):
        directory.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            for record in records:
                line = {name: value for name, value in vars(record).items() if name != "extra"} | record.extra
                file.write(json_text(line, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    return path


def write_rollouts(
    directory: Path, step: int, rollout: Rollout, extra: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write ``<directory>/step_<step>.jsonl`` and return its path.

    Args:
        directory: Folder, which is made where it does not exist.
        step: PPO step.
        rollout: All rows of the step.
        extra: Further columns, name -> one JSON value per row.
    """
    return write_records(directory, step, rollout_records(rollout, step, extra or {}))


def _parse(line: str, where: str) -> RolloutRecord:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if type(values) is not dict:
        raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
    for name, (kind, *item_kind) in _FIELDS.items():
        if name not in values:
            raise ValueError(f"{where}: field {name!r} is missing")
        value = values[name]
        items_fit = (
            all(isinstance(item, item_kind[0]) for item in value) if isinstance(value, list) and item_kind else True
        )
        if not isinstance(value, kind) or not items_fit:
            expected = kind.__name__ + (f" of {item_kind[0].__name__}" if item_kind else "")
            raise ValueError(f"{where}: field {name!r} is {json.dumps(value)[:80]}, expected {expected}")
    if len(values["rollout_log_probs"]) != len(values["response_ids"]):
        raise ValueError(
            f"{where}: field 'rollout_log_probs' has {len(values['rollout_log_probs'])} values for "
            f"{len(values['response_ids'])} response tokens"
        )
    if values["finish_reason"] not in FINISH_REASONS:
        raise ValueError(
            f"{where}: field 'finish_reason' is {values['finish_reason']!r}, expected one of {FINISH_REASONS}"
        )
    chunk = values.pop("chunk", 0)
    if type(chunk) is not int:
        raise ValueError(f"{where}: field 'chunk' is {json.dumps(chunk)[:80]}, expected int")
    known = {name: values.pop(name) for name in _FIELDS} | {"label": values.pop("label", None), "chunk": chunk}
    return RolloutRecord(**known, extra=values)


def read_rollouts(path: Path) -> list[RolloutRecord]:
    """Read one step's file.

    Raises:
        ValueError: A line is malformed (the error names file, line and field), or the file is empty.
    """
    with open(path, encoding="utf-8") as file:
        records = [_parse(line, f"{path}:{number}") for number, line in enumerate(file, 1)]
    if not records:
        raise ValueError(f"{path}: no rollouts in this file")
    return records


def recorded_steps(directory: Path) -> list[int]:
    """Return the steps that have a file in ``directory``, in order.

    Raises:
        ValueError: There is none.
    """
    steps = sorted(
        int(match[1]) for path in directory.glob("step_*.jsonl") if (match := FILE_NAME.fullmatch(path.name))
    )
    if not steps:
        raise ValueError(f"{directory}: no step_*.jsonl files to replay (train.replay_rollouts)")
    return steps


class ReplayGenerator(Generator):
    """Answers as a recorded run did. It holds no weights. Each ``generate`` call answers from the next recorded step.

    Args:
        directory: Folder of the ``step_*.jsonl`` files.
        first_step: Recorded step that the first call answers from. None: the first one in the folder.

    Raises:
        ValueError: There is no such file.
    """

    capabilities = Capabilities(is_recorded=True)

    def __init__(self, directory: Path, first_step: int | None = None):
        self.directory = directory
        steps = recorded_steps(directory)
        if first_step is not None and first_step not in steps:
            raise ValueError(
                f"{directory}: step {first_step} was not recorded; there are steps {steps[0]} to {steps[-1]}"
            )
        self._steps = [step for step in steps if first_step is None or step >= first_step]

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        """Return the recorded responses of these prompts, in their order. The request's seed plays no part.

        ``on_response`` is called in the order of the recorded chunks, so that the rollout has the same chunks.

        Raises:
            ValueError: No recorded step is left, a prompt has fewer than n recorded responses, or a response is longer than the request
                allows.
        """
        check_resumption(request, self.capabilities)
        prompts, n = request.prompts.prompt_ids, request.n
        if not self._steps:
            raise ValueError(
                f"{self.directory}: every recorded step has been replayed; the run has more steps than the record"
            )
        path = step_path(self.directory, self._steps[0])
        by_prompt: dict[tuple[int, ...], list[tuple[Response, int]]] = {}
        for record in read_rollouts(path):
            response = Response(
                record.response_ids, record.rollout_log_probs, record.finish_reason, record.weight_version
            )
            by_prompt.setdefault(tuple(record.prompt_ids), []).append((response, record.chunk))
        answers = []
        in_chunks: list[tuple[int, int, int, Response]] = []  # (chunk, prompt, sample, response)
        for row, prompt in enumerate(prompts):
            recorded = by_prompt.get(tuple(prompt), [])
            if len(recorded) < n:
                raise ValueError(
                    f"{path}: prompt {row} of this step ({len(prompt)} tokens, {prompt[:8]}...) needs {n} recorded responses, "
                    f"{len(recorded)} are left; replay the run with the data, seed and batch sizes it was recorded with"
                )
            taken = [recorded.pop(0) for _ in range(n)]
            answers.append([response for response, _ in taken])
            in_chunks += [(chunk, row, sample, response) for sample, (response, chunk) in enumerate(taken)]
            longest = max(len(response.token_ids) for response in answers[-1])
            limit = request.limit_of(row)
            if longest > limit:
                raise ValueError(f"{path}: a recorded response has {longest} tokens, sampling.max_tokens is {limit}")
        self._steps.pop(0)
        if on_response is not None:
            for _, row, sample, response in sorted(in_chunks, key=lambda one: one[:3]):
                on_response(row, sample, response)
        return answers

    def sync_weights(self, tensors: Iterator[tuple[str, Tensor]], version: str, *, target: str = POLICY) -> None:
        """Ignore the weights: recorded responses keep the versions of their recording. The tensors are not read, on any rank."""
        check_target(target)
