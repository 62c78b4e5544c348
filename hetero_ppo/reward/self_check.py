"""Does an aligned role give the same bits alone and among others, on the device that it runs on? Asked before it is trusted."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from hetero_ppo.data.collate import pad_right
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import OutputFn, log_probs_output, scores_output, values_output
from hetero_ppo.errors import RunError
from hetero_ppo.reward.layer_digests import layer_digests

#: Tokens of the sequences: about a tile of attention, below and above.
LENGTHS = (2, 5, 33, 64, 65, 127, 200)


def check_alignment(engine: ModelEngine) -> str:
    """Compare the output of every layer for sequences alone with that among others, padded and not. Collective over the world.

    What one layout cannot show is whether another gives the same: golden scores do that.

    Args:
        engine: any role.

    Returns:
        A line that says what was compared.

    Raises:
        RunError: a layer's output differs; names the first one.
    """
    draw = random.Random(0)
    longest = engine.bridge.max_position_embeddings
    rows = [[draw.randrange(engine.vocab_size) for _ in range(min(length, longest))] for length in LENGTHS]
    num_compared = 0
    with engine.on_device(phase="alignment_check"):
        for number, row in enumerate(rows):
            others = rows[:number] + rows[number + 1 :]
            alone = layer_digests(engine, row)
            settings = {"beside one other": (others[-1:], 0), "beside six others": (others, 0), "padded": (others[:2], LENGTHS[-1] + 13)}
            for setting, (neighbours, num_columns) in settings.items():
                found = layer_digests(engine, row, neighbours, min(num_columns, longest))
                for (name, expected), (_, value) in zip(alone, found, strict=True):
                    if value != expected:
                        raise _broken(engine, f"of a sequence of {len(row)} tokens {setting}", name)
                    num_compared += 1
        together = _outputs(engine, rows)
        for row, expected in zip(rows, together, strict=True):
            if not torch.equal(_outputs(engine, [row])[0], expected):
                raise _broken(engine, f"of a sequence of {len(row)} tokens in the run's micro-batches", f"{engine.head} head")
            num_compared += 1
    return f"{engine.role}: aligned: {num_compared} outputs of layers have the same bits alone and among others on this device"


def _outputs(engine: ModelEngine, rows: list[list[int]]) -> list[Tensor]:
    """What the role gives for every row: its score, or the values or log-probs of its tokens."""
    output: OutputFn = values_output if engine.head == "value" else scores_output
    if engine.head == "lm":
        output = log_probs_output(
            temperature=1.0, vocab_size=engine.vocab_size, groups=engine.groups, num_parts=engine.vocab_parts
        )
    values = engine.forward(*pad_right(rows), output)
    return [value if value.dim() == 0 else value[: len(row) - 1] for row, value in zip(rows, values, strict=True)]


def _broken(engine: ModelEngine, where: str, layer: str) -> RunError:
    return RunError(
        f"{engine.role}.aligned: the bits {where} are not those of the sequence alone; the first layer whose output differs is the "
        f"{layer}. This device or these library versions break what aligned promises: set {engine.role}.aligned to false"
    )
