"""Compare the tokens per second of two generators: vLLM, and the actor as its own generator, each on one core.

Both answer prompts of 16 tokens with a random Llama model (2.4m, 30m: see ``ppo_step.py``); every response has its full length. The two
take turns in every round, so that other work on the machine slows both. Medians over rounds are reported, and the ratio within a round.

    python benchmarks/generators.py --model 2.4m --json result.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import harness
from ppo_step_inputs import SHAPES, Work, write_inputs

from hetero_ppo.config.schema import Dtype, ModelConfig, RoleConfig, RolloutConfig, SamplingConfig
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.types import PromptBatch
from hetero_ppo.table import render_table


NUM_WARM_UP = 1


def seconds(generator: Generator, request: GenerationRequest) -> float:
    """Return the seconds of one rollout."""
    start = time.perf_counter()
    answers = generator.generate(request)
    elapsed = time.perf_counter() - start
    assert all(len(response.token_ids) == request.sampling.max_tokens for group in answers for response in group)
    return elapsed


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure both generators in this process; the server is a process of its own."""
    shape = SHAPES[args.model]
    work = Work(prompts_per_step=args.prompts, response_tokens=args.tokens)
    model = str(write_inputs(shape, work, 1, folder).models["actor"])
    count = args.prompts
    prompts = PromptBatch(
        [[1 + (7 * i + 3 * j * j) % (shape.vocab_size - 1) for j in range(16)] for i in range(count)],
        [""] * count,
        [None] * count,
        list(range(count)),
        [None] * count,
        [{}] * count,
    )
    request = GenerationRequest(prompts, SamplingConfig(max_tokens=args.tokens, ignore_eos=True), n=1, seed=1)
    config = RolloutConfig(max_num_seqs=args.running_batch, server_threads=1)
    common: dict[str, Any] = {"max_model_len": 16 + args.tokens, "eos_token_ids": [0]}
    dtype = Dtype[args.dtype]
    torch.set_num_threads(1)
    initialise(10.0)
    actor = ModelEngine("actor", RoleConfig(model=ModelConfig(path=model, dtype=dtype)), "lm")
    with (
        VllmGenerator(config, model_path=model, dtype=dtype, run_dir=folder / "run", **common) as vllm,
        MegatronGenerator(config, actor, **common) as megatron,
    ):
        contenders = {
            "vllm": lambda number: seconds(vllm, request),
            "megatron": lambda number: seconds(megatron, request),
        }
        rounds = harness.alternate(contenders, args.rounds, num_warm_up=NUM_WARM_UP)
    finish()
    return summary(rounds, args.prompts * args.tokens)


def summary(rounds: dict[str, list[float]], num_tokens: int) -> dict[str, float]:
    """Return the medians over rounds of each generator's rate, and of the ratio within a round.

    Args:
        rounds: Seconds of every round, by generator.
        num_tokens: Number of tokens that a round generates.
    """
    return {
        "vllm_tokens_s": num_tokens / statistics.median(rounds["vllm"]),
        "megatron_tokens_s": num_tokens / statistics.median(rounds["megatron"]),
        "megatron_over_vllm": harness.median_ratio(rounds["vllm"], rounds["megatron"]),
    }


def table(result: dict[str, float]) -> str:
    """Return both rates and their ratio for people."""
    return render_table(
        [
            ["vLLM, tokens/s", f"{result['vllm_tokens_s']:.0f}"],
            ["the actor, tokens/s", f"{result['megatron_tokens_s']:.0f}"],
            ["the actor over vLLM", f"{result['megatron_over_vllm']:.3f}"],
        ],
        "lr",
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the given arguments, or those of the command line."""
    parser = harness.parser(__doc__, rounds=7, num_warm_up=NUM_WARM_UP)
    parser.add_argument("--model", choices=SHAPES, default="2.4m")
    parser.add_argument("--dtype", choices=[dtype.value for dtype in Dtype], default="fp32")
    parser.add_argument("--prompts", type=int, default=128, help="number of prompts of a round")
    parser.add_argument("--tokens", type=int, default=64, help="number of tokens of a response")
    parser.add_argument(
        "--running-batch", type=int, default=64, help="number of sequences that a generator decodes at once"
    )
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="generators-") as folder, harness.one_rank():
        result = run(args, Path(folder))
    harness.report("generators", harness.settings(args) | result, args.json, text=table(result))


if __name__ == "__main__":
    main()
