"""The actor as its own rollout generator, in one process: what every generator does, and what its cache and its slots add."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.bridge_models import hf_model, save_case
from tests.helpers.generator_contract import (
    EOS,
    FREE,
    MAX_MODEL_LEN,
    PROMPTS,
    SamplingContract,
    make_model,
    model_log_probs,
    save_model,
    tokens,
)
from tests.helpers.generator_requests import ask
from transformers import AutoTokenizer

from hetero_ppo.config.derived import max_model_len
from hetero_ppo.config.load import load_config
from hetero_ppo.config.schema import (
    Dtype,
    ModelConfig,
    ResidencyConfig,
    RolloutConfig,
    SamplingConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.outputs import log_probs_output
from hetero_ppo.engines.residency import OffloadedParameter
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.inference import decoder as generation
from hetero_ppo.memory.plan import plan_memory
from hetero_ppo.rollout.megatron import MegatronGenerator
from hetero_ppo.step.kinds import Kind
from hetero_ppo.types import Response
from megatron_bridge.model.cached_attention import SlotCache

pytestmark = pytest.mark.usefixtures("world")


def make_actor(path: Path, dtype: Dtype = Dtype.fp32, aligned: bool = False) -> TrainEngine:
    """Make a role that leaves the device between its turns."""
    config = TrainedRoleConfig(model=ModelConfig(path=str(path), dtype=dtype), micro_batch_size=4, aligned=aligned)
    return TrainEngine("actor", config, "lm", 1, SharedDevice(ResidencyConfig()))


def make_generator(
    actor: TrainEngine,
    num_slots: int,
    max_model_len: int = MAX_MODEL_LEN,
    decode: Callable[[list[int]], str] | None = None,
) -> MegatronGenerator:
    return MegatronGenerator(
        RolloutConfig(max_num_seqs=num_slots, sleep=True),
        actor.model,
        max_model_len=max_model_len,
        eos_token_ids=[EOS],
        decode=decode,
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def actor(world: None, model_path: Path) -> Iterator[TrainEngine]:
    actor = make_actor(model_path)
    yield actor
    actor.device.close()


@pytest.fixture(scope="module")
def generator(actor: TrainEngine, model_path: Path) -> Iterator[MegatronGenerator]:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with make_generator(actor, 32, decode=partial(tokenizer.decode, skip_special_tokens=True)) as generator:
        yield generator


class TestContract(SamplingContract):
    """The contract of every generator."""


def responses_of(answers: list[list[Response]]) -> list[Response]:
    return [response for group in answers for response in group]


@pytest.mark.parametrize(
    ("case", "aligned"),
    [
        ("llama_tied_llama3", False),
        ("qwen2_untied_yarn", False),
        ("qwen3_tied", False),
        ("qwen3_moe_untied", False),
        ("qwen3_tied", True),
    ],
)
def test_greedy_answers_are_those_of_transformers(case: str, aligned: bool, tmp_path: Path) -> None:
    actor = make_actor(save_case(case, tmp_path / case), aligned=aligned)
    model = hf_model(case)
    prompts = [[2 + (5 * i + 3 * j * j) % 120 for j in range(3 + 4 * i)] for i in range(5)]
    sampling = SamplingConfig(max_tokens=30, ignore_eos=True, temperature=0.0)
    with make_generator(actor, 3, max_model_len=64) as generator:
        answers = ask(generator, prompts, sampling, n=1, seed=0)
    for prompt, (response,) in zip(prompts, answers, strict=True):
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30, min_new_tokens=30)
        assert response.token_ids == ids[0, len(prompt) :].tolist()
        ours = model_log_probs(model, prompt + response.token_ids)[len(prompt) - 1 :]
        assert (ours - torch.tensor(response.log_probs)).abs().max() < 1e-4
    actor.device.close()


@pytest.mark.parametrize("prefill_tokens", [generation.PREFILL_TOKENS, 11])
def test_slots_do_not_show_in_the_responses(
    actor: TrainEngine, monkeypatch: pytest.MonkeyPatch, prefill_tokens: int
) -> None:
    """One slot, fewer than there are requests, and one for each: the same tokens, and log-probs that differ in their last bits.

    Responses end at different times, so that slots are left, refilled, and moved into.
    """
    monkeypatch.setattr(generation, "PREFILL_TOKENS", prefill_tokens)
    limits = [40, 3, 17, 1, 25, 8, 40, 2, 33, 12, 5, 21]
    sampling = SamplingConfig(max_tokens=40, stop_token_ids=list(range(2, 8)), temperature=0.9)
    found = {}
    for num_slots in (1, 5, 24):
        with make_generator(actor, num_slots) as generator:
            found[num_slots] = ask(generator, PROMPTS, sampling, n=2, seed=7, max_tokens=limits)
    reasons = [response.finish_reason for response in responses_of(found[1])]
    assert {"stop", "length"} == set(reasons)
    for num_slots in (5, 24):
        assert tokens(found[num_slots]) == tokens(found[1])
        for one, other in zip(responses_of(found[1]), responses_of(found[num_slots]), strict=True):
            assert one.finish_reason == other.finish_reason
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_the_engine_takes_turns_with_its_actor(actor: TrainEngine, generator: MegatronGenerator) -> None:
    """Parameters are there while it generates alone; asleep it has no cache, and a sync reads nothing."""
    seen: list[bool] = []

    def look(prompt: int, sample: int, response: Response) -> None:
        seen.append(any(isinstance(p, OffloadedParameter) for p in actor.model.models[0].parameters()))

    before = ask(generator, PROMPTS[:2], FREE, n=1, seed=1, on_response=look)
    assert seen == [False, False]
    assert all(isinstance(p, OffloadedParameter) for p in actor.model.models[0].parameters())
    generator.sleep()
    for needs_cache in (
        lambda: ask(generator, PROMPTS[:1], FREE, n=1, seed=0),
        lambda: generator.verify_sync(PROMPTS[0], []),
    ):
        with pytest.raises(RuntimeError, match="the generator is asleep; wake it before"):
            needs_cache()
    generator.wake(weights_only=True)
    stream = iter([("name", torch.zeros(1))])
    generator.sync_weights(stream, "step_1")
    assert next(stream, None) is not None and generator.version == "step_1"
    generator.wake()
    after = ask(generator, PROMPTS[:2], FREE, n=1, seed=1)
    assert tokens(after) == tokens(before) and {r.weight_version for r in responses_of(after)} == {"step_1"}
    generator.sync_weights(stream, "initial")


def test_a_probe_prompt_that_differs_is_an_error(generator: MegatronGenerator) -> None:
    wrong = [value + 0.01 for value in generator.prompt_log_probs(PROMPTS[-1])]
    with pytest.raises(RuntimeError, match="weight sync 'initial': the megatron generator gives token .* of the probe"):
        generator.verify_sync(PROMPTS[-1], wrong)


def test_logits_that_are_not_finite_are_an_error(actor: TrainEngine, generator: MegatronGenerator) -> None:
    with actor.on_device(phase="test"), torch.no_grad():
        weight = actor.model.models[0].decoder.final_layernorm.weight
        before = weight[0].clone()
        weight[0] = torch.nan
        actor.residency.mark_changed(frozenset(Kind))
    with pytest.raises(FloatingPointError, match="generation: actor's logits are not finite"):
        ask(generator, PROMPTS[:1], FREE, n=1, seed=0)
    with actor.on_device(phase="test"), torch.no_grad():
        weight[0] = before
        actor.residency.mark_changed(frozenset(Kind))
    assert ask(generator, PROMPTS[:1], FREE, n=1, seed=0)


def test_the_plan_counts_the_cache(actor: TrainEngine, model_path: Path, tmp_path: Path) -> None:
    role = {"model": {"path": str(model_path)}}
    config = {"kind": "ppo", "run": {"dir": "run"}, "data": {"train": "a.jsonl", "max_prompt_tokens": 40}}
    config |= {"actor": role, "critic": role, "reference": role, "reward_model": role}
    path = tmp_path / "ppo.yaml"
    path.write_text(json.dumps(config))
    overrides = ["rollout.engine=megatron", "rollout.max_num_seqs=7", "rollout.sampling.max_tokens=30"]
    loaded = load_config(str(path), overrides).config
    cache = SlotCache(actor.model.bridge.transformer, 7, max_model_len(loaded))
    plan = plan_memory(loaded, 1)
    assert plan.generator is not None
    assert plan.generator.awake == cache.keys.nbytes + cache.values.nbytes
    assert plan.generator.kv_tokens == 7 * (40 + 128)  # rollout.eval_sampling's 128 are the longer response


def test_bf16_log_probs_are_near_the_trainers(tmp_path: Path) -> None:
    """bf16 rounds the activations in both, at different places: to 2^-9 of logits of up to 10."""
    make_model(0).save_pretrained(tmp_path)
    actor = make_actor(tmp_path, Dtype.bf16)
    with make_generator(actor, 8) as generator:
        answers = ask(generator, PROMPTS, FREE, n=1, seed=2)
    width = max(len(prompt) for prompt in PROMPTS) + 24
    rows = [p + r.token_ids for p, (r,) in zip(PROMPTS, answers, strict=True)]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    output = log_probs_output(temperature=1.0, vocab_size=actor.model.vocab_size, groups=actor.groups)
    with actor.on_device(phase="old_log_probs"):
        found: Any = actor.model.forward(ids, torch.tensor([len(row) for row in rows]), output)
    differences = []
    for values, prompt, (response,) in zip(found, PROMPTS, answers, strict=True):
        ours = values[len(prompt) - 1 : len(prompt) - 1 + len(response.token_ids)]
        differences.append((ours - torch.tensor(response.log_probs)).abs())
    assert torch.cat(differences).mean() < 0.05 and torch.cat(differences).max() < 0.5
    actor.device.close()
