"""Trains a language-model head and a scalar head for two steps in each of some layouts, on every rank.

usage: layout_worker.py LAYOUTS_JSON OUT_JSON
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import megatron_bridge.platform  # noqa: F401  before megatron.core
from hetero_ppo.config.schema import (
    DdpConfig,
    Dtype,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardModelLossConfig,
    TrainedRoleConfig,
)
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.loss_terms import LossTerm
from hetero_ppo.engines.losses import reward_loss_fn, sft_loss_fn
from hetero_ppo.engines.microbatches import sequence_ends
from hetero_ppo.engines.outputs import log_probs_output, scores_output, values_output
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.types import AnswerInputs, PreferenceBatch


def main(layouts: str, out: str) -> None:
    torch.set_num_threads(1)
    initialise(2.0)
    results = {name: measure(layout) for name, layout in json.loads(layouts).items()}
    if dist.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(results, file)
    finish()


def measure(options: dict[str, Any]) -> dict[str, list[float]]:
    config = TrainedRoleConfig(
        model=ModelConfig(path=options.pop("model"), dtype=Dtype(options.pop("dtype", "fp32"))),
        optimizer=OptimizerConfig(lr=1e-3, distributed=options.pop("distributed", False)),
        ddp=DdpConfig(
            overlap_grad_reduce=options.pop("overlap", False), overlap_param_gather=options.pop("overlap_gather", False)
        ),
        recompute=options.pop("recompute", None),
        micro_batch_size=2,
        micro_batch_tokens=options.pop("tokens", None),
        packing=options.pop("packing", False),
        parallel=ParallelConfig(**options),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 121, (8, 14), generator=generator)
    lengths = torch.randint(6, 15, (8,), generator=generator)
    mask = (torch.arange(13)[None] < (lengths - 1)[:, None]) & (torch.arange(13)[None] >= 3)

    result: dict[str, list[float]] = {}
    lm = TrainEngine("actor", config, "lm", 10)
    output = log_probs_output(temperature=0.7, vocab_size=lm.model.vocab_size, groups=lm.groups)
    result["log_probs"] = lm.model.forward(ids, lengths, output).masked_fill(~mask, 0).flatten().tolist()
    output_mask = torch.nn.functional.pad(mask, (0, 1))
    result["output_mask"] = lm.model.forward(ids, lengths, output, output_mask).masked_fill(~mask, 0).flatten().tolist()
    loss_fn = sft_loss_fn(lm.model.vocab_size, lm.groups)
    parts = lm.microbatches(ids, lengths, AnswerInputs(mask), range(8))
    steps = [lm.train_step([LossTerm(parts, loss_fn, int(mask.sum()))]) for _ in range(2)]
    result["lm_loss"] = [step.loss for step in steps]
    result["lm_grad_norm"] = [step.grad_norm for step in steps]
    # A second term on fewer rows, with a denominator of its own that is not the number of its tokens.
    few = lm.microbatches(ids[:4], lengths[:4], AnswerInputs(mask[:4]), range(4))
    step = lm.train_step([LossTerm(parts, loss_fn, int(mask.sum())), LossTerm(few, loss_fn, 50, 0.3)])
    result["two_terms"] = [step.loss, step.grad_norm, *(term.loss for term in step.terms)]

    rm = TrainEngine("reward", config, "score", 10)
    pairs = PreferenceBatch(ids[:4], lengths[:4], ids[4:], lengths[4:])
    steps = [
        rm.train_step([LossTerm(rm.pair_microbatches(pairs), reward_loss_fn(RewardModelLossConfig()), 4)])
        for _ in range(2)
    ]
    result["rm_loss"] = [step.loss for step in steps]
    result["rm_grad_norm"] = [step.grad_norm for step in steps]
    result["scores"] = rm.model.forward(ids, lengths, scores_output).tolist()
    result["wanted_scores"] = rm.model.forward(ids, lengths, scores_output, sequence_ends(lengths, 14)).tolist()
    # Rows that do not come out even: two micro-batches on one of two ranks, one on the other.
    result["five_rows"] = rm.model.forward(ids[:5], lengths[:5], scores_output).tolist()
    result["one_row"] = rm.model.forward(ids[:1], lengths[:1], scores_output).tolist()  # fewer rows than ranks
    result["values"] = rm.model.forward(ids, lengths, values_output).masked_fill(~mask, 0).flatten().tolist()
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
