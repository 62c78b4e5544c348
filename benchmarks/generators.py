"""Tokens per second of two generators: vLLM, and the actor as its own generator, each on one core.

A random Llama model (2.4m, 30m: see ``ppo_step.py``), prompts of 16 tokens, responses that are not cut short. The two take turns in
every round, so that what else the machine does meets both; medians over rounds are reported, and the ratio within a round.

    python benchmarks/generators.py --model 2.4m --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ppo_step_inputs import SHAPES, Work, write_inputs

from hetero_ppo.config.schema import Dtype, ModelConfig, RoleConfig, RolloutConfig, SamplingConfig
from hetero_ppo.distributed.groups import finish, initialise
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.rollout.generator import GenerationRequest, Generator
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.types import PromptBatch


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
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    initialise(10.0)
    actor = ModelEngine("actor", RoleConfig(model=ModelConfig(path=model, dtype=dtype)), "lm")
    rounds: list[tuple[float, float]] = []
    with (
        VllmGenerator(config, model_path=model, dtype=dtype, run_dir=folder / "run", **common) as vllm,
        MegatronGenerator(config, actor, **common) as megatron,
    ):
        for index in range(args.rounds + 1):
            pair = seconds(vllm, request), seconds(megatron, request)
            rounds += [pair] if index else []  # the first is a warm-up
    finish()
    return summary(rounds, args.prompts * args.tokens)


def summary(rounds: Sequence[tuple[float, float]], num_tokens: int) -> dict[str, float]:
    """Medians over rounds of (seconds of vLLM, seconds of the actor), and of the ratio within a round."""
    return {
        "vllm_tokens_s": num_tokens / statistics.median(pair[0] for pair in rounds),
        "megatron_tokens_s": num_tokens / statistics.median(pair[1] for pair in rounds),
        "megatron_over_vllm": statistics.median(pair[0] / pair[1] for pair in rounds),
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Those of the command line where none are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="2.4m")
    parser.add_argument("--dtype", choices=[dtype.value for dtype in Dtype], default="fp32")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64, help="of every response")
    parser.add_argument("--running-batch", type=int, default=64, help="sequences that a generator decodes at once")
    parser.add_argument("--rounds", type=int, default=7, help="that count, after one for warm-up")
    parser.add_argument("--json", type=Path, help="file for the JSON object as well")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="generators-") as folder:
        result = run(args, Path(folder))
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    line = json.dumps({"benchmark": "generators", **settings, **result})
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
