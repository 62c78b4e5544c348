"""A trainer with a generator on a tied model: prints what the generator answers as one JSON line, and waits to be killed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig
from hetero_ppo.rollout.generator import GenerationRequest
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.types import PromptBatch

VOCAB = 128
EOS = 1
PROMPT = [2 + (3 * j * j) % (VOCAB - 2) for j in range(12)]


def make_model(seed: int) -> LlamaForCausalLM:
    """Make a tied model with logits far enough from uniform that a wrong matrix shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5.0)
    return model


def log_probs(model: LlamaForCausalLM) -> list[float]:
    """Return log p(token t + 1 | tokens 0..t) of the prompt."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1).tolist()


def weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as the trainer streams a tied model: the shared matrix comes once."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            yield name, tensor.clone()


def start_generator(path: Path) -> VllmGenerator:
    make_model(0).save_pretrained(path / "model")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": EOS}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(path / "model")
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
    old, new = make_model(0), make_model(0)
    with torch.no_grad():  # the tied matrix alone is another one
        new.model.embed_tokens.weight.copy_(make_model(1).model.embed_tokens.weight)
    found = {
        "lengths": [len(group[0].token_ids) for group in answers],
        "before": [generator.prompt_log_probs(PROMPT), log_probs(old)],
    }
    generator.sync_weights(weights(new), "step_1")
    found["after"] = [generator.prompt_log_probs(PROMPT), log_probs(new)]
    print(json.dumps(found), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
