"""Check that an aligned role gives the same bits for a sequence alone and among others, on this device, before it is trusted."""

from __future__ import annotations

import dataclasses
import gc
import logging
import random
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_ppo.config.schema import RoleConfig
from hetero_ppo.data.collate import pad_right
from hetero_ppo.distributed.groups import all_ranks
from hetero_ppo.distributed.text import broadcast_json
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.train_engine import TrainEngine, model_of
from hetero_ppo.engines.outputs import OutputFn, log_probs_output, scores_output, values_output
from hetero_ppo.errors import RunError
from hetero_ppo.observability.logs import ONCE
from hetero_ppo.reward.layer_digests import layer_digests
from megatron_bridge import platform

log = logging.getLogger(__name__)

C = TypeVar("C", bound=RoleConfig)
E = TypeVar("E", ModelEngine, TrainEngine)

#: Lengths of the sequences in tokens: around a tile of attention, below and above.
LENGTHS = (2, 5, 33, 64, 65, 127, 200)


def check_alignment(engine: ModelEngine) -> str:
    """Compare every layer's output for sequences alone with that among others, padded and not. Collective over the world.

    This does not show whether another layout gives the same bits: golden scores do that.

    Args:
        engine: Role to check.

    Returns:
        A line about what was compared.

    Raises:
        RunError: A layer's output differs; the message names the first such layer. All ranks raise, or none.
    """
    difference, num_compared = find_difference(engine)
    if difference is not None:
        raise RunError(
            f"{engine.role}.aligned: {difference}. This device or these library versions break what aligned promises: set "
            f"{engine.role}.aligned to false"
        )
    return f"{engine.role}: aligned: {num_compared} outputs of layers have the same bits alone and among others on this device"


def find_difference(engine: ModelEngine) -> tuple[str | None, int]:
    """Return (the first difference that any rank finds, in words, or None; number of outputs compared). Collective over the world.

    Every rank makes all comparisons even after a difference, because the forwards are collective.

    Args:
        engine: Role to check.
    """
    draw = random.Random(0)
    longest = engine.bridge.max_position_embeddings
    rows = [[draw.randrange(engine.vocab_size) for _ in range(min(length, longest))] for length in LENGTHS]
    found: list[str] = []
    num_compared = 0
    with engine.on_device(phase="alignment_check"):
        for number, row in enumerate(rows):
            others = rows[:number] + rows[number + 1 :]
            alone = layer_digests(engine, row)
            settings = {
                "next to one other": (others[-1:], 0),
                "next to six others": (others, 0),
                "padded": (others[:2], LENGTHS[-1] + 13),
            }
            for setting, (neighbours, num_columns) in settings.items():
                among = layer_digests(engine, row, neighbours, min(num_columns, longest))
                for (name, expected), (_, value) in zip(alone, among, strict=True):
                    if value != expected:
                        found.append(_difference(f"of a sequence of {len(row)} tokens {setting}", name))
                    num_compared += 1
        together = _outputs(engine, rows)
        for row, output in zip(rows, together, strict=True):
            if not torch.equal(_outputs(engine, [row])[0], output):
                where = f"of a sequence of {len(row)} tokens in the run's micro-batches"
                found.append(_difference(where, f"{engine.head} head"))
            num_compared += 1
    return _agreed(found[0] if found else None, all_ranks(engine.groups)), num_compared


def _difference(where: str, layer: str) -> str:
    return f"the bits {where} are not those of the sequence alone; the first layer whose output differs is the {layer}"


def _agreed(difference: str | None, group: dist.ProcessGroup) -> str | None:
    """Return the difference of the first rank that has one, on every rank. Collective over the group of the role's ranks."""
    first = torch.tensor([group.size() if difference is None else group.rank()])
    dist.all_reduce(first, dist.ReduceOp.MIN, group=group)
    if int(first) == group.size():
        return None
    return str(broadcast_json(difference, dist.get_global_rank(group, int(first)), group))


def build_proved(config: C, build: Callable[[C], E], consequence: str = "no golden scores") -> E:
    """Build a role; on CUDA also make it prove its bits before it is used. Collective over the world.

    If ``aligned`` is null and the role cannot be aligned or fails the proof, it is built without aligned layers and a line says why.

    Args:
        config: Model and layout.
        build: Function that builds the engine of a configuration.
        consequence: Effect of a role that is not aligned, for that line.

    Raises:
        RunError: ``aligned`` is true, and the role's bits depend on the batch.
    """
    engine = build(config)
    model = model_of(engine)
    if config.aligned is None and model.bridge.plain_because is not None:
        model.plain_because = f"aligned is null, and it {model.bridge.plain_because}"
        log.info(f"{model.role}: not aligned ({model.role}.{model.plain_because}): {consequence}")
    if not (model.bridge.aligned and platform.HAS_CUDA):
        return engine
    if config.aligned is not None:
        log.info(check_alignment(model))
        return engine
    difference, num_compared = find_difference(model)
    if difference is None:
        log.info(
            f"{model.role}: aligned: {num_compared} outputs of layers have the same bits alone and among others on this device"
        )
        return engine
    role = model.role
    log.warning(
        f"{role}: NOT ALIGNED. {role}.aligned is null (aligned where possible), and the self-check found: {difference}. "
        f"The run continues with the plain layers: {consequence}, and bits that depend on batch and layout. Set {role}.aligned to false "
        "to hide this line, or to true to make it an error",
        extra=ONCE,
    )
    model.device.remove(role)
    del engine, model
    gc.collect()  # models and hooks refer to each other
    engine = build(dataclasses.replace(config, aligned=False))
    model_of(engine).plain_because = "aligned is null, and it failed the self-check on this device"
    return engine


def _outputs(engine: ModelEngine, rows: list[list[int]]) -> list[Tensor]:
    """Return the role's output for every row: its score, or the values or log-probs of its tokens."""
    output: OutputFn = values_output if engine.head == "value" else scores_output
    if engine.head == "lm":
        output = log_probs_output(
            temperature=1.0, vocab_size=engine.vocab_size, groups=engine.groups, num_parts=engine.vocab_parts
        )
    values = engine.forward(*pad_right(rows), output)
    return [value if value.dim() == 0 else value[: len(row) - 1] for row, value in zip(rows, values, strict=True)]
