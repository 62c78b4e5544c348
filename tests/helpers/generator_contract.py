"""Tests that every generator passes: vLLM, the actor as its own generator, and recorded rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.generator_requests import ask
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hetero_ppo.config.schema import SamplingConfig
from hetero_ppo.rollout.generator import Generator
from hetero_ppo.types import Response

VOCAB = 128
EOS = 1
MAX_MODEL_LEN = 256
FREE = SamplingConfig(max_tokens=24, ignore_eos=True)
PROMPTS = [[2 + (7 * i + 3 * j * j) % (VOCAB - 2) for j in range(4 + i)] for i in range(12)]


def make_model(seed: int, *, tied: bool = False) -> LlamaForCausalLM:
    """Make a model of 2.7 M parameters, with logits far enough from uniform that a wrong weight shows.

    Args:
        seed: Seed of the weights.
        tied: True to use the matrix of the embedding as the head too.
    """
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
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def model_log_probs(model: LlamaForCausalLM, token_ids: list[int], temperature: float = 1.0) -> Tensor:
    """Return transformers' [L - 1] log-probs of all tokens but the first."""
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


def save_model(path: Path, *, tied: bool = False) -> None:
    make_model(0, tied=tied).save_pretrained(path)
    vocabulary = {"<pad>": 0, "<eos>": EOS} | {f"t{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)


def cut_log_probs(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return [L, V] log-probs of the tokens that top-k and top-p keep in each row, and -inf elsewhere."""
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


#: Response tokens of the prompts that every generator is asked for.
LIMITS = [40, 2, 9, 1]


class GeneratorContract:
    """The contract of every generator. A test module brings a ``generator`` that answers ``PROMPTS`` with responses as long as ``LIMITS``."""

    def test_responses_are_reported_as_they_complete_each_with_its_own_limit(self, generator: Generator) -> None:
        reported: list[tuple[int, int, Response]] = []
        prompts, sampling = PROMPTS[: len(LIMITS)], SamplingConfig(max_tokens=64, ignore_eos=True)
        answers = ask(
            generator, prompts, sampling, n=2, seed=1, max_tokens=LIMITS, on_response=lambda *one: reported.append(one)
        )
        assert [[len(r.token_ids) for r in group] for group in answers] == [[limit] * 2 for limit in LIMITS]
        assert [[len(r.log_probs) for r in group] for group in answers] == [[limit] * 2 for limit in LIMITS]
        places = [(prompt, sample) for prompt, sample, _ in reported]
        assert sorted(places) == [(prompt, sample) for prompt in range(len(LIMITS)) for sample in range(2)]
        assert all(answers[prompt][sample] is response for prompt, sample, response in reported)
        assert reported[0][0] != 0, "shorter responses are reported before the longest"

    def test_partial_responses_are_resumed_or_refused(self, generator: Generator) -> None:
        """A complete one among them is not asked for again."""
        prompts, sampling = PROMPTS[:2], SamplingConfig(max_tokens=64, ignore_eos=True)
        partial = [Response([5, 6], [-1.0, -2.0], "stop", "older"), None]
        arguments: dict[str, Any] = {"n": 1, "seed": 1, "max_tokens": LIMITS[:2], "partial": partial}
        if generator.capabilities.can_resume:
            assert ask(generator, prompts, sampling, **arguments)[0][0] is partial[0]
            return
        for more in ({"partial": partial}, {"num_needed": 1}):
            with pytest.raises(ValueError, match="resumes and aborts no responses"):
                ask(generator, prompts, sampling, n=1, seed=1, max_tokens=LIMITS[:2], **more)

    def test_the_generator_of_this_rank_is_here(self, generator: Generator) -> None:
        """It has no servers that are down, and needs weights or not, as its capabilities say."""
        assert generator.is_here and generator.num_down == 0
        stream = iter([])
        if not generator.capabilities.needs_weight_sync:
            stream = iter([("w", torch.zeros(1))])
            generator.sync_weights(stream, "initial")
            assert next(stream, None) is not None, "the tensors are left alone"


class SamplingContract(GeneratorContract):
    """The contract of generators with weights. They begin with those of ``make_model(0)``, whose version is "initial". A test module brings its ``model_path`` too."""

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    def test_log_probs_are_those_of_the_sampled_distribution(self, generator: Generator, temperature: float) -> None:
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=temperature)
        answers = ask(generator, PROMPTS, sampling, n=1, seed=3)
        assert all(len(group[0].token_ids) == 24 and group[0].finish_reason == "length" for group in answers)
        assert {group[0].weight_version for group in answers} == {"initial"}
        assert worst_difference(make_model(0), PROMPTS, answers, temperature) < 1e-4
        assert worst_difference(make_model(0), PROMPTS, answers, 1.6 - temperature) > 0.1

    def test_seeds_repeat_and_samples_differ(self, generator: Generator) -> None:
        first = ask(generator, PROMPTS, FREE, n=3, seed=5)
        assert [len(group) for group in first] == [3] * len(PROMPTS)
        assert all(len({tuple(ids) for ids in group}) == 3 for group in tokens(first))
        assert tokens(ask(generator, PROMPTS, FREE, n=3, seed=5)) == tokens(first)
        assert tokens(ask(generator, PROMPTS[:2], FREE, n=1, seed=5)) == [group[:1] for group in tokens(first)[:2]]
        other = ask(generator, PROMPTS, FREE, n=3, seed=6)
        assert all(a != b for a, b in zip(tokens(first), tokens(other), strict=True))

    def test_responses_end_at_eos_and_stop_tokens(self, generator: Generator) -> None:
        stops = list(range(2, 20))
        sampling = SamplingConfig(max_tokens=64, stop_token_ids=stops)
        responses = [r for group in ask(generator, PROMPTS, sampling, n=4, seed=1) for r in group]
        stopped = [r for r in responses if r.finish_reason == "stop"]
        assert len(stopped) > len(responses) // 2
        assert {r.token_ids[-1] for r in stopped} <= {EOS, *stops}
        assert all(not {EOS, *stops} & set(r.token_ids[:-1]) for r in responses)
        assert all(len(r.token_ids) == 64 for r in responses if r.finish_reason == "length")

        prompt = PROMPTS[0]
        free = ask(generator, [prompt], SamplingConfig(max_tokens=200, ignore_eos=True), n=12, seed=1)[0]
        at_eos = ask(generator, [prompt], SamplingConfig(max_tokens=200), n=12, seed=1)[0]
        assert any(EOS in r.token_ids for r in free)
        for long, short in zip(free, at_eos, strict=True):
            end = long.token_ids.index(EOS) + 1 if EOS in long.token_ids else 200
            assert short.token_ids == long.token_ids[:end] and short.finish_reason == (
                "stop" if end < 200 else "length"
            )

    def test_probe_prompt_is_scored_as_the_trainer_scores_it(self, generator: Generator) -> None:
        ours = model_log_probs(make_model(0), PROMPTS[-1]).tolist()
        assert generator.prompt_log_probs(PROMPTS[-1]) == pytest.approx(ours, abs=1e-4)
        assert generator.verify_sync(PROMPTS[-1], ours) < 1e-4

    def test_log_probs_after_top_k_and_top_p(self, generator: Generator) -> None:
        """The tokens that are left share the probability, and no other comes."""
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=0.8, top_p=0.7, top_k=5)
        answers = ask(generator, PROMPTS, sampling, n=1, seed=9)
        differences = []
        for prompt, (response,) in zip(PROMPTS, answers, strict=True):
            with torch.no_grad():
                logits = make_model(0)(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1]
            expected = cut_log_probs(logits / 0.8, 0.7, 5).gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
            differences.append((expected - torch.tensor(response.log_probs)).abs())
        assert torch.cat(differences).max() < 1e-4

    def test_responses_end_with_the_token_that_completes_a_stop_string(
        self, generator: Generator, model_path: Path
    ) -> None:
        """The text is the tokenizer's, and the tokens before the end are those of a response without stop strings."""
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        stops = ["t5", "9 t2"]  # the first is within t5, t50..t59; the second needs two tokens, t?9 and t2 or t20..t29
        free = ask(generator, PROMPTS, FREE, n=4, seed=2)
        stopped = ask(generator, PROMPTS, dataclasses.replace(FREE, stop=stops), n=4, seed=2)
        reasons = []
        for group, short_group in zip(free, stopped, strict=True):
            for long, short in zip(group, short_group, strict=True):
                texts = [tokenizer.decode(long.token_ids[: end + 1]) for end in range(len(long.token_ids))]
                ends = [end for end, text in enumerate(texts) if any(stop in text for stop in stops)]
                kept = ends[0] + 1 if ends else len(texts)
                assert short.token_ids == long.token_ids[:kept] and short.finish_reason == (
                    "stop" if ends else "length"
                )
                assert short.log_probs == pytest.approx(long.log_probs[:kept], abs=1e-4)
                reasons += [next(stop for stop in stops if stop in texts[ends[0]])] if ends else []
        assert set(reasons) == set(stops)
        at_eos = ask(generator, PROMPTS, SamplingConfig(max_tokens=24, stop=stops), n=4, seed=2)
        assert all(EOS not in r.token_ids[:-1] for group in at_eos for r in group)

    def test_temperature_zero_is_greedy(self, generator: Generator) -> None:
        """transformers' greedy answers; log-probs are those of temperature 1."""
        model = make_model(0)
        sampling = SamplingConfig(max_tokens=24, ignore_eos=True, temperature=0.0)
        answers = ask(generator, PROMPTS[:4], sampling, n=1, seed=0)
        for prompt, (response,) in zip(PROMPTS, answers, strict=False):
            ids = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
            )
            assert response.token_ids == ids[0, len(prompt) :].tolist()
        assert worst_difference(model, PROMPTS[:4], answers) < 1e-4
