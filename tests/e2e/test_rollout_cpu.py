"""Where vLLM on the CPU differs from vLLM on a GPU: packed weights of a tied matrix, and random generators of a request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hetero_ppo.config.schema import Dtype, RolloutConfig, SamplingConfig
from hetero_ppo.rollout.engine import VllmEngine

pytestmark = pytest.mark.slow

VOCAB = 128
EOS = 1
PROMPT = [2 + (3 * j * j) % (VOCAB - 2) for j in range(12)]


def make_model(seed: int) -> LlamaForCausalLM:
    """A tied model with logits far enough from uniform that a wrong matrix shows."""
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
    """log p(token t + 1 | tokens 0..t) of the prompt."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).squeeze(1).tolist()


def weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """As the trainer streams a tied model: the one matrix comes once."""
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            yield name, tensor.clone()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tied")
    make_model(0).save_pretrained(path / "model")
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": EOS}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        path / "model"
    )
    with VllmEngine(
        RolloutConfig(kv_cache_mib=64, max_num_seqs=96, max_restarts=0),
        model_path=str(path / "model"),
        dtype=Dtype.fp32,
        run_dir=path / "run",
        max_model_len=64,
        eos_token_ids=[EOS],
    ) as running:
        yield running


def test_more_prompt_tokens_than_one_forward_takes(engine: VllmEngine) -> None:
    """vLLM must not split a prompt: it would wind a request's generator back, which a generator of the CPU cannot do."""
    prompts = [[2 + (i * j) % 120 for j in range(60)] for i in range(1, 97)]  # 5,760 tokens
    answers = engine.generate(prompts, SamplingConfig(max_tokens=2, ignore_eos=True), n=1, seed=5)
    assert [len(group[0].token_ids) for group in answers] == [2] * 96


def test_a_sync_reaches_both_uses_of_a_tied_matrix(engine: VllmEngine) -> None:
    old, new = make_model(0), make_model(0)
    with torch.no_grad():  # the tied matrix alone is another one
        new.model.embed_tokens.weight.copy_(make_model(1).model.embed_tokens.weight)
    assert engine.prompt_log_probs(PROMPT) == pytest.approx(log_probs(old), abs=1e-4)
    engine.sync_weights(weights(new), "step_1")
    assert engine.prompt_log_probs(PROMPT) == pytest.approx(log_probs(new), abs=1e-4)
