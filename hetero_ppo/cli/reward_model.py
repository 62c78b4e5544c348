"""``hetero-ppo score``, ``eval rm`` and ``verify rm``: scores of a trained reward model, their quality, and whether their bits are the same."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("fp32", "bf16")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    score = subparsers.add_parser("score", help="score sequences with a reward model: JSON lines in, scores out")
    _add_model_arguments(score)
    _add_data_arguments(score, "rows with token_ids, messages, or prompt and completion")
    score.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    score.set_defaults(run=_score)

    evaluate = subparsers.add_parser("eval", help="evaluate a trained model").add_subparsers(
        required=True, metavar="what"
    )
    evaluate_rm = evaluate.add_parser("rm", help="accuracy of a reward model on pairs, its calibration and its margins")
    _add_model_arguments(evaluate_rm)
    _add_data_arguments(evaluate_rm, "pairs, as a reward model is trained on")
    evaluate_rm.add_argument("--out", type=Path, default=None, metavar="FILE", help="HTML page with the plots")
    evaluate_rm.set_defaults(run=_evaluate)

    verify = subparsers.add_parser("verify", help="compare a model with its record").add_subparsers(
        required=True, metavar="what"
    )
    verify_rm = verify.add_parser("rm", help="golden scores of a reward model, bit for bit, and layer by layer")
    _add_model_arguments(verify_rm)
    verify_rm.set_defaults(run=_verify)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="export of a reward-model run")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="default: that of the golden scores, else bf16 on CUDA and fp32 on a CPU",
    )
    parser.add_argument("--plain", action="store_true", help="use the plain forward in place of the aligned one")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, under torchrun")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages, under torchrun")
    parser.add_argument("--sequence", action="store_true", help="sequence parallelism")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="sequences of one forward")


def _add_data_arguments(parser: argparse.ArgumentParser, rows: str) -> None:
    parser.add_argument("--data", required=True, metavar="FILE", help=f".jsonl or .parquet: {rows}")
    parser.add_argument("--no-chat-template", action="store_true", help="tokenise texts as they are")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest sequence; a longer one is an error")


def _score(args: argparse.Namespace) -> None:
    # Megatron-Core takes seconds to import; `hetero-ppo --help` should not.
    from hetero_ppo.trainers import reward_commands

    reward_commands.score(args)


def _evaluate(args: argparse.Namespace) -> None:
    from hetero_ppo.trainers import reward_commands

    reward_commands.evaluate(args)


def _verify(args: argparse.Namespace) -> None:
    from hetero_ppo.trainers import reward_commands

    reward_commands.verify(args)
