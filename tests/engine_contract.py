"""What every rollout engine does, whichever it is: the tests of vLLM's engine and of the actor as its own engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.types import Response

VOCAB = 128
EOS = 1
MAX_MODEL_LEN = 256
FREE = SamplingConfig(max_tokens=24, ignore_eos=True)
PROMPTS = [[2 + (7 * i + 3 * j * j) % (VOCAB - 2) for j in range(4 + i)] for i in range(12)]


def make_model(seed: int) -> LlamaForCausalLM:
    """2.7 M parameters, with logits far enough from uniform that a wrong weight shows."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def model_log_probs(model: LlamaForCausalLM, token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """[L - 1] log-probs of tokens 1.. by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def worst_difference(
    model: LlamaForCausalLM, prompts: list[list[int]], answers: list[list[Response]], temperature: float = 1.0
) -> float:
    worst = 0.0
    for prompt, responses in zip(prompts, answers, strict=True):
        for response in responses:
            ours = model_log_probs(model, prompt + response.token_ids, temperature)[len(prompt) - 1 :]
            worst = max(worst, (ours - torch.tensor(response.log_probs)).abs().max().item())
    return worst


def tokens(answers: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids for response in group] for group in answers]


def weights(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.state_dict().items()


def save_model(path: Path) -> None:
    make_model(0).save_pretrained(path)
    vocabulary = {"<pad>": 0, "<eos>": EOS} | {f"t{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)


def cut_log_probs(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """[L, V] log-probs of what is left of each row, -inf elsewhere: the k likeliest, of these the fewest that make up p."""
    result = torch.full_like(logits, -torch.inf)
    for row, values in zip(result, logits.softmax(-1), strict=True):
        ranked = sorted(range(len(values)), key=lambda token: -float(values[token]))[:top_k]
        total = float(values[ranked].sum())
        kept, mass = [], 0.0
        for token in ranked:
            if mass < top_p * total:
                kept.append(token)
                mass += float(values[token])
        row[kept] = (values[kept] / mass).log()
    return result


class EngineContract:
    """A test module brings an ``engine`` of ``make_model(0)``, whose weights are version "initial", and its ``model_path``."""

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_are_those_of_the_sampled_distribution(self, engine: Any, temperature: float) -> None:
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=temperature)
        answers = engine.generate(PROMPTS, sampling, n=1, seed=3)
        assert all(len(group[0].token_ids) == 24 and group[0].finish_reason == "length" for group in answers)
        assert {group[0].weight_version for group in answers} == {"initial"}
        assert worst_difference(make_model(0), PROMPTS, answers, temperature) < 1e-4
        assert worst_difference(make_model(0), PROMPTS, answers, 1.6 - temperature) > 0.1

    def test_seeds_repeat_and_samples_differ(self, engine: Any) -> None:
        first = engine.generate(PROMPTS, FREE, n=3, seed=5)
        assert [len(group) for group in first] == [3] * len(PROMPTS)
        assert all(len({tuple(ids) for ids in group}) == 3 for group in tokens(first))
        assert tokens(engine.generate(PROMPTS, FREE, n=3, seed=5)) == tokens(first)
        assert tokens(engine.generate(PROMPTS[:2], FREE, n=1, seed=5)) == [group[:1] for group in tokens(first)[:2]]
        other = engine.generate(PROMPTS, FREE, n=3, seed=6)
        assert all(a != b for a, b in zip(tokens(first), tokens(other), strict=True))

    def test_responses_are_told_of_as_they_complete_each_with_its_own_limit(self, engine: Any) -> None:
        told: list[tuple[int, int, Response]] = []
        limits = [40, 2, 9, 1][: len(PROMPTS)]
        sampling = SamplingConfig(max_tokens=64, ignore_eos=True)
        answers = engine.generate(
            PROMPTS[: len(limits)], sampling, n=2, seed=1, max_tokens=limits, on_response=lambda *one: told.append(one)
        )
        assert [[len(r.token_ids) for r in group] for group in answers] == [[limit] * 2 for limit in limits]
        assert {(prompt, sample) for prompt, sample, _ in told} == {(i, j) for i in range(len(limits)) for j in range(2)}
        assert all(answers[prompt][sample] is response for prompt, sample, response in told)
        assert told[0][0] != 0, "shorter responses are told of before the longest"

    def test_responses_end_at_eos_and_stop_tokens(self, engine: Any) -> None:
        stops = list(range(2, 20))
        sampling = SamplingConfig(max_tokens=64, stop_token_ids=stops)
        responses = [r for group in engine.generate(PROMPTS, sampling, n=4, seed=1) for r in group]
        stopped = [r for r in responses if r.finish_reason == "stop"]
        assert len(stopped) > len(responses) // 2
        assert {r.token_ids[-1] for r in stopped} <= {EOS, *stops}
        assert all(not {EOS, *stops} & set(r.token_ids[:-1]) for r in responses)
        assert all(len(r.token_ids) == 64 for r in responses if r.finish_reason == "length")

        prompt = PROMPTS[0]
        free = engine.generate([prompt], SamplingConfig(max_tokens=200, ignore_eos=True), n=12, seed=1)[0]
        at_eos = engine.generate([prompt], SamplingConfig(max_tokens=200), n=12, seed=1)[0]
        assert any(EOS in r.token_ids for r in free)
        for long, short in zip(free, at_eos, strict=True):
            end = long.token_ids.index(EOS) + 1 if EOS in long.token_ids else 200
            assert short.token_ids == long.token_ids[:end] and short.finish_reason == ("stop" if end < 200 else "length")

    def test_golden_prompt_is_scored_as_the_trainer_scores_it(self, engine: Any) -> None:
        ours = model_log_probs(make_model(0), PROMPTS[-1]).tolist()
        assert engine.prompt_log_probs(PROMPTS[-1]) == pytest.approx(ours, abs=1e-4)
        assert engine.verify_sync(PROMPTS[-1], ours) < 1e-4

    def test_log_probs_after_top_k_and_top_p(self, engine: Any) -> None:
        """The tokens that are left share the probability, and no other comes."""
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=0.8, top_p=0.7, top_k=5)
        answers = engine.generate(PROMPTS, sampling, n=1, seed=9)
        differences = []
        for prompt, (response,) in zip(PROMPTS, answers, strict=True):
            with torch.no_grad():
                logits = make_model(0)(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1]
            expected = cut_log_probs(logits / 0.8, 0.7, 5).gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            differences.append((expected - torch.tensor(response.log_probs)).abs())
        assert torch.cat(differences).max() < 1e-4

    def test_responses_end_with_the_token_that_completes_a_stop_string(
        self, engine: Any, model_path: Path
    ) -> None:
        """The text is the tokenizer's, and the tokens before the end are those of a response without stop strings."""
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        stops = ["t5", "9 t2"]  # the first is within t5, t50..t59; the second needs two tokens, t?9 and t2 or t20..t29
        free = engine.generate(PROMPTS, FREE, n=4, seed=2)
        stopped = engine.generate(PROMPTS, dataclasses.replace(FREE, stop=stops), n=4, seed=2)
        reasons = []
        for group, short_group in zip(free, stopped, strict=True):
            for long, short in zip(group, short_group, strict=True):
                texts = [tokenizer.decode(long.token_ids[: end + 1]) for end in range(len(long.token_ids))]
                ends = [end for end, text in enumerate(texts) if any(stop in text for stop in stops)]
                kept = ends[0] + 1 if ends else len(texts)
                assert short.token_ids == long.token_ids[:kept] and short.finish_reason == ("stop" if ends else "length")
                assert short.log_probs == pytest.approx(long.log_probs[:kept], abs=1e-4)
                reasons += [next(stop for stop in stops if stop in texts[ends[0]])] if ends else []
        assert set(reasons) == set(stops)
        at_eos = engine.generate(PROMPTS, SamplingConfig(max_tokens=24, stop=stops), n=4, seed=2)
        assert all(EOS not in r.token_ids[:-1] for group in at_eos for r in group)

    def test_temperature_zero_is_greedy(self, engine: Any) -> None:
        """transformers' greedy answers; log-probs are those of temperature 1."""
        model = make_model(0)
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=0.0)
        answers = engine.generate(PROMPTS[:4], sampling, n=1, seed=0)
        for prompt, (response,) in zip(PROMPTS, answers, strict=False):
            ids = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
            )
            assert response.token_ids == ids[0, len(prompt) :].tolist()
        assert worst_difference(model, PROMPTS[:4], answers) < 1e-4
