"""Commands on a trained reward model: score, evaluate, verify. They run in one process, or in those of torchrun."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from hetero_ppo.config.schema import (
    AnsweredDataConfig,
    Dtype,
    ModelConfig,
    ParallelConfig,
    PreferenceDataConfig,
    RoleConfig,
    SftDataConfig,
)
from hetero_ppo.data.chat_template import load_text_encoder
from hetero_ppo.data.collate import collate_preferences, pad_right
from hetero_ppo.data.preference import load_preferences
from hetero_ppo.data.reading import read_rows
from hetero_ppo.data.sft import load_sft
from hetero_ppo.disk import writing
from hetero_ppo.distributed.groups import initialise
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.outputs import scores_output
from hetero_ppo.errors import RunError
from hetero_ppo.reward.golden import GOLDEN_FILE, check_golden, first_difference, read_golden
from hetero_ppo.reward.self_check import build_proved
from hetero_ppo.trainers.export import single_process
from hetero_ppo.trainers.run import end_run

TIMEOUT_MINUTES = 30.0
Answered = TypeVar("Answered", bound=AnsweredDataConfig)


@contextmanager
def reward_engine(args: argparse.Namespace, *, has_to_be_aligned: bool = False) -> Iterator[ModelEngine]:
    """Load the checkpoint in the layout that the arguments name. It is aligned where it can be, unless ``--plain`` is given.

    Args:
        args: Arguments of the command.
        has_to_be_aligned: Whether a reward model that cannot be aligned is an error.

    Raises:
        RunError: It has to be aligned, and its bits depend on the batch.
        ValueError: There is no such folder, or its model has no score head.
    """
    checkpoint: Path = args.checkpoint
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {checkpoint}: no config.json there; give a Hugging Face folder (`hetero-ppo export` makes one of a run)"
        )
    config = RoleConfig(
        model=ModelConfig(path=str(checkpoint), dtype=_dtype(args.dtype, checkpoint)),
        parallel=ParallelConfig(tensor=args.tensor, pipeline=args.pipeline, sequence=args.sequence),
        micro_batch_size=args.micro_batch_size,
        aligned=False if args.plain else True if has_to_be_aligned else None,
    )
    with nullcontext() if "RANK" in os.environ else single_process():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
        initialise(TIMEOUT_MINUTES)
        try:
            yield _build(config, checkpoint)
        finally:
            end_run()


def _build(config: RoleConfig, checkpoint: Path) -> ModelEngine:
    engine = build_proved(
        config, lambda role: ModelEngine("reward_model", role, "score"), "scores whose bits are no record"
    )
    if engine.load_report.initialised:
        raise ValueError(
            f"--checkpoint {checkpoint}: the model has no score head; give the export of a reward-model run"
        )
    return engine


def _dtype(given: str | None, checkpoint: Path) -> Dtype | None:
    """Return the dtype that was given, else that of the golden scores; None without either, for the device's default."""
    file = checkpoint / GOLDEN_FILE
    if given is None and file.is_file():
        given = read_golden(file).record["dtype"]
    return None if given is None else Dtype(given)


def _data_config(args: argparse.Namespace, section: type[Answered]) -> Answered:
    return section(train=args.data, apply_chat_template=not args.no_chat_template, max_sequence_tokens=args.max_tokens)


def score(args: argparse.Namespace) -> None:
    """Write a line for every row: its number, its length in tokens, its score, and the score's bits."""
    with reward_engine(args) as engine:
        ids, lengths = pad_right(_sequences(args, engine))
        scores = engine.forward(ids, lengths, scores_output).tolist()
        _check_finite(args, {f"row {row}": value for row, value in enumerate(scores)})
        if dist.get_rank() == 0:
            lines = [
                {"row": row, "num_tokens": int(length), "score": value, "score_hex": value.hex()}
                for row, (length, value) in enumerate(zip(lengths, scores, strict=True))
            ]
            with writing(args.out, "scores", remedy="choose another --out"):
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(
                    "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8"
                )
            print(f"{len(lines)} scores in {args.out}, mean {sum(scores) / len(scores):.6f}")


def _check_finite(args: argparse.Namespace, scores: Mapping[str, float]) -> None:
    """Raise FloatingPointError when a score is NaN or infinite; names the first and the number of them. The same on every rank."""
    bad = {where: score for where, score in scores.items() if not math.isfinite(score)}
    if bad:
        where, score = next(iter(bad.items()))
        raise FloatingPointError(
            f"{args.data}, {where}, counted from 0: the score is {score} ({len(bad)} of {len(scores)} scores are not finite). Either "
            f"{args.checkpoint} has weights that are not finite, or the forward overflows: try --dtype fp32"
        )


def _sequences(args: argparse.Namespace, engine: ModelEngine) -> list[list[int]]:
    rows = list(read_rows(args.data))
    if not rows:
        raise ValueError(f"--data {args.data}: there are no rows")
    if not rows[0].has("token_ids"):
        data = _data_config(args, SftDataConfig)
        return [
            e.token_ids
            for e in load_sft(args.data, data, load_text_encoder(engine.config.model, data, "reward_model")).examples
        ]
    sequences = []
    for row in rows:
        ids = row.value("token_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < engine.vocab_size for i in ids):
            raise row.error("token_ids", f"has to be a list of token ids below {engine.vocab_size}, one at least")
        if len(ids) > args.max_tokens:
            raise row.error("token_ids", f"has {len(ids)} tokens, more than --max-tokens {args.max_tokens}")
        sequences.append(ids)
    return sequences


def evaluate(args: argparse.Namespace) -> None:
    """Print accuracy, loss and calibration of the pairs, and write the page with the plots."""
    # matplotlib takes a second to import.
    from hetero_ppo.observability.pairs import pair_statistics, write_pair_page

    with reward_engine(args) as engine:
        data = _data_config(args, PreferenceDataConfig)
        pairs = load_preferences(args.data, data, load_text_encoder(engine.config.model, data, "reward_model"))
        batch = collate_preferences(pairs.examples)
        chosen = engine.forward(batch.chosen_ids, batch.chosen_lengths, scores_output)
        rejected = engine.forward(batch.rejected_ids, batch.rejected_lengths, scores_output)
        for side, scores in (("chosen", chosen), ("rejected", rejected)):
            _check_finite(args, {f"pair {pair}, {side} answer": score for pair, score in enumerate(scores.tolist())})
        if dist.get_rank() == 0:
            found = pair_statistics(chosen.tolist(), rejected.tolist())
            print(pairs.report.describe())
            print(found.describe())
            if args.out is not None:
                print(f"plots: {write_pair_page(found, args.out, f'{args.checkpoint} on {args.data}')}")


def verify(args: argparse.Namespace) -> None:
    """Compute all golden scores again, and the layers of the pairs that have them.

    Raises:
        RunError: A score or a layer differs.
        ValueError: There are no golden scores, or the plain forward was asked for.
    """
    file: Path = args.checkpoint / GOLDEN_FILE
    if args.plain:
        raise ValueError("--plain: the plain forward promises no bits to verify; leave it out")
    if not file.is_file():
        raise ValueError(
            f"--checkpoint {args.checkpoint}: has no {GOLDEN_FILE}; a run whose reward model is aligned writes it"
        )
    golden = read_golden(file)
    with reward_engine(args, has_to_be_aligned=True) as engine:
        elsewhere = "; ".join(golden.made_elsewhere(engine))
        if elsewhere and dist.get_rank() == 0:
            print(f"made elsewhere, so bits may differ: {elsewhere}")
        try:
            check_golden(engine, golden, file, range(len(golden.pairs)))
        except RunError as error:
            if not elsewhere:
                raise
            raise RunError(
                f"{error}. That says nothing against the model: the scores were made elsewhere ({elsewhere}), and equal bits are "
                "promised on like machines alone"
            ) from error
        traced = [(number, pair) for number, pair in enumerate(golden.pairs) if pair.layers]
        for number, pair in traced:
            layer = first_difference(engine, pair)
            if layer is not None:
                raise RunError(f"{file}, pair {number}: the scores are equal, but the output of the {layer} differs")
        if dist.get_rank() == 0:
            print(
                f"{file}: {2 * len(golden.pairs)} scores of {len(golden.pairs)} pairs have the same bits, and so have all "
                f"{len(golden.pairs[0].layers)} layers of {len(traced)} of them"
            )
