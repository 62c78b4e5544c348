"""Run a trainer with a generator on a tied model: print the generator's answers as one JSON line, and wait to be killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tests.helpers.generator_contract import EOS, PROMPTS, make_model, model_log_probs, save_model
from torch import Tensor
from transformers import LlamaForCausalLM

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.types import PromptBatch

PROMPT = PROMPTS[-1]


def weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as the trainer streams a tied model: the shared matrix comes once."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            yield name, tensor.clone()


def start_generator(path: Path) -> VllmGenerator:
    save_model(path / "model", tied=True)
    generator = VllmGenerator(
        RolloutConfig(kv_cache_mib=64, max_num_seqs=96, max_restarts=0),
        model_path=str(path / "model"),
        dtype=Dtype.fp32,
        run_dir=path / "run",
        max_model_len=64,
        eos_token_ids=[EOS],
    )
    generator.start()
    return generator


def main(path: Path) -> None:
    torch.set_num_threads(1)
    generator = start_generator(path)
    # More prompt tokens than one forward takes: 5,760.
    prompts = [[2 + (i * j) % 120 for j in range(60)] for i in range(1, 97)]
    about = [""] * 96, [None] * 96, [0] * 96, [None] * 96, [{}] * 96
    sampling = SamplingConfig(max_tokens=2, ignore_eos=True)
    answers = generator.generate(GenerationRequest(PromptBatch(prompts, *about), sampling, n=1, seed=5))
    old, new = make_model(0, tied=True), make_model(0, tied=True)
    with torch.no_grad():  # only the tied matrix differs
        new.model.embed_tokens.weight.copy_(make_model(1).model.embed_tokens.weight)
    found = {
        "lengths": [len(group[0].token_ids) for group in answers],
        "before": [generator.prompt_log_probs(PROMPT), model_log_probs(old, PROMPT).tolist()],
    }
    generator.sync_weights(weights(new), "step_1")
    found["after"] = [generator.prompt_log_probs(PROMPT), model_log_probs(new, PROMPT).tolist()]
    print(json.dumps(found), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
