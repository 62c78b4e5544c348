"""Models, token ids and batchings that aligned forwards are compared over, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetero_ppo.config.schema import Dtype, ModelConfig, ParallelConfig, RewardModelLossConfig, TrainedRoleConfig
from hetero_ppo.distributed.groups import is_last_stage
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import reward_loss_fn
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import OutputFn, log_probs_output, scores_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import Microbatch, PreferenceBatch

VOCAB = 131
#: Sizes are no multiples of a vector or a tile; four tensor-parallel ranks have fractions of 13, 25, 33 and 69.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"hidden_size": 52, "intermediate_size": 100, "num_attention_heads": 4, "head_dim": 20}),
    "qwen2": (
        "qwen2",
        {"hidden_size": 80, "intermediate_size": 276, "num_attention_heads": 8},
    ),  # biases, grouped heads
}
LENGTHS = (2, 3, 17, 40, 63, 64, 65, 130)
Row = tuple[int, ...]
#: How rows share micro-batches, and what they are padded to: None is the longest of each.
BATCHINGS: dict[str, tuple[list[Row], int | None]] = {
    "alone": ([(row,) for row in range(len(LENGTHS))], None),
    "all": ([tuple(range(len(LENGTHS)))], None),
    "reversed": ([tuple(reversed(range(len(LENGTHS))))], 133),
    "other pairs": ([(row + 4, 3 - row) for row in range(4)], 191),
    "threes": ([(0, 3, 6), (1, 4, 7), (2, 5, 5)], 150),
}


def save_models(folder: Path) -> None:
    """Save random models as <folder>/<name>-<head>, each with a score head and with a language-model head."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    for name, (model_type, sizes) in MODELS.items():
        config = AutoConfig.for_model(
            model_type,
            vocab_size=VOCAB,
            num_hidden_layers=2,
            num_key_value_heads=4,
            pad_token_id=0,
            num_labels=1,
            **sizes,
        )
        for head, kind in (("lm", AutoModelForCausalLM), ("score", AutoModelForSequenceClassification)):
            torch.manual_seed(7)
            model = kind.from_config(config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
            model.save_pretrained(folder / f"{name}-{head}")


def sequences() -> list[Tensor]:
    """Return the token ids of every row."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in LENGTHS]


def microbatches(batching: str, multiple: int) -> Iterator[tuple[Row, Microbatch]]:
    """Yield the rows and the micro-batch of every part of a batching. Padding tokens differ from part to part."""
    rows = sequences()
    groups, padded = BATCHINGS[batching]
    for number, group in enumerate(groups):
        length = padded or max(LENGTHS[row] for row in group)
        ids = torch.full((len(group), length + -length % multiple), number)
        for place, row in enumerate(group):
            ids[place, : LENGTHS[row]] = rows[row]
        # Padding is computed where its outputs are asked for.
        output_mask = None if padded is None else torch.ones_like(ids, dtype=torch.bool)
        yield group, Microbatch(ids, torch.tensor([LENGTHS[row] for row in group]), output_mask=output_mask)


def role_config(model: Path, dtype: str, layout: dict[str, Any], aligned: bool | None) -> TrainedRoleConfig:
    """Return the configuration of a role in a layout: fields of ParallelConfig, and ``packing``."""
    return TrainedRoleConfig(
        model=ModelConfig(path=str(model), dtype=Dtype(dtype)),
        parallel=ParallelConfig(**{name: value for name, value in layout.items() if name != "packing"}),
        packing=layout.get("packing", False),
        micro_batch_size=2,
        aligned=aligned,
    )


def output_of(engine: ModelEngine) -> OutputFn:
    if engine.head == "score":
        return scores_output
    return log_probs_output(
        temperature=0.7, vocab_size=engine.vocab_size, groups=engine.groups, num_parts=engine.vocab_parts
    )


def results(engine: ModelEngine) -> dict[str, list[Tensor]]:
    """Return for every batching the scores or log-probs of each row, in the order of the rows; {} before the last stage.

    Every data-parallel rank computes all rows.
    """
    found: dict[str, list[Tensor]] = {}
    for batching in BATCHINGS:
        parts = list(microbatches(batching, engine.forward_size.length_multiple))
        with torch.no_grad():
            outputs = engine.run_schedule(engine.models, [m for _, m in parts], output_of(engine), forward_only=True)
        if is_last_stage(engine.groups):
            by_row = [(row, value) for (group, _), output in zip(parts, outputs) for row, value in zip(group, output)]
            by_row.sort(key=lambda item: item[0])
            cut = engine.head == "lm"
            found[batching] = [value[: LENGTHS[row] - 1].clone() if cut else value.clone() for row, value in by_row]
            if batching == "threes":
                del found[batching][5]  # row 5 came twice
    return found


def training_scores(engine: TrainEngine) -> tuple[list[Tensor], float]:
    """Train one reward-model step. Return the scores of this rank's rows as the loss sees them, and the gradient's norm."""
    rows = sequences()
    ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    lengths = torch.tensor(LENGTHS)
    pairs = PreferenceBatch(ids[0::2], lengths[0::2], ids[1::2], lengths[1::2])
    seen: list[Tensor] = []
    loss_fn = reward_loss_fn(RewardModelLossConfig())

    def keep(output: Tensor, microbatch: Microbatch) -> Any:
        seen.extend(scores_output(output, microbatch).detach().clone())
        return loss_fn(output, microbatch)

    return seen, engine.train_step([LossTerm(engine.pair_microbatches(pairs), keep, len(rows) // 2)]).grad_norm


def bits(values: list[Tensor]) -> str:
    """Return the SHA-256 of the values' bytes."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
