"""Options of a PPO run reach what ``trainers`` builds of them: prompts, engines, functions, traces, checks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.helpers.one_rank import ONE_RANK
from tests.helpers.data_fixtures import TEXTS, write_jsonl

from hetero_ppo.config.derived import actor_generates, derive_ppo, max_model_len
from hetero_ppo.config.schema import (
    Dtype,
    PpoConfig,
    ReEncodeConfig,
    RewardErrors,
    RewardRoleConfig,
    GeneratorKind,
    WeightTransfer,
)
from hetero_ppo.data.sampler import ResumableSampler
from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE, train_tokenizer
from hetero_ppo.reward.re_encoding import load_re_encoders
from hetero_ppo.rollout.generator import Capabilities, NullGenerator
from hetero_ppo.rollout.replay import ReplayGenerator
from hetero_ppo.rollout.vllm import VllmGenerator
from hetero_ppo.step.placement import Placement
from hetero_ppo.trainers import ppo_bank, ppo_chunks, ppo_functions, ppo_generator, ppo_nodes
from hetero_ppo.trainers.ppo_data import load_data


@dataclass
class FakeRun:
    """The part of a run that these functions use."""

    dir: Path
    is_writer: bool = True
    world_size: int = 1
    continues_its_folder: bool = False
    world: Any = field(default_factory=lambda: ONE_RANK)
    beginning: Any = field(default_factory=lambda: SimpleNamespace(started_at=None))
    watchdog: Any = field(default_factory=lambda: SimpleNamespace(progress=None))

    def keep_template(self, encoder: object) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS * 3, 320, folder)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def config(tokenizer: Path, tmp_path: Path) -> PpoConfig:
    config = PpoConfig()
    config.actor.model.path, config.actor.model.dtype = str(tokenizer), Dtype.fp32
    config.run.dir = str(tmp_path)
    config.data.train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"hello {number}"} for number in range(6)])
    config.data.eval = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "hello there"}] * 3)
    config.algorithm.rollout_batch_size = 4
    config.algorithm.samples_per_prompt = 3
    config.algorithm.minibatch_size = 12
    return config


def test_prompts_of_a_step(config: PpoConfig, tmp_path: Path) -> None:
    config.run.seed = 7
    data = load_data(config, FakeRun(tmp_path))
    order = ResumableSampler(6, 4, dp_rank=0, dp_size=1, seed=7, shuffle=True, fingerprint="").next_global_batch()
    assert order != sorted(order)
    responses = derive_ppo(config, 1, 6).responses_per_step
    request = data.next_request(config.algorithm, config.rollout.sampling, responses, 5)
    assert (request.n, request.seed) == (3, 5) and request.prompts.prompt_texts == [f"hello {row}" for row in order]
    assert request.sampling is config.rollout.sampling and request.partial is request.num_needed is None
    assert data.held_out is not None and len(data.held_out) == 3
    config.data.shuffle = False
    config.data.eval = None
    data = load_data(config, FakeRun(tmp_path))
    assert data.next_prompts().prompt_texts == [f"hello {row}" for row in range(4)] and data.eval_prompts is None


def test_sizes_of_a_run(config: PpoConfig) -> None:
    """6 prompts in 3 epochs are 18, of which 5 steps take 4 each; 4 x 3 responses a step, in chunks of 5."""
    config.train.epochs = 3
    config.pipeline.chunk_size = 5
    batching = derive_ppo(config, 1, 6)
    assert (batching.total_steps, batching.responses_per_step, batching.chunk_size) == (5, 12, 5)
    config.train.steps = 9
    assert derive_ppo(config, 1, 6).total_steps == 9
    config.data.max_prompt_tokens, config.rollout.sampling.max_tokens, config.rollout.eval_sampling.max_tokens = (
        50,
        30,
        40,
    )
    assert max_model_len(config) == 90


def test_a_step_asks_for_more_prompts_than_it_needs_with_over_sampling(config: PpoConfig, tmp_path: Path) -> None:
    config.rollout.over_sampling = 1.25
    data = load_data(config, FakeRun(tmp_path))
    responses = derive_ppo(config, 1, 6).responses_per_step
    request = data.next_request(config.algorithm, config.rollout.sampling, responses, 5)
    assert (request.n, request.num_needed, request.num_rows, request.num_places) == (1, 12, 12, 15)
    assert request.partial == [None] * 15


def test_a_generator_is_what_the_options_say(
    config: PpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.rollout.num_servers, config.rollout.max_num_seqs = 3, 10
    config.rollout.weight_transfer = WeightTransfer.collective
    config.rollout.dtype = Dtype.bf16
    encoder: Any = SimpleNamespace(end_token_ids=[2], decode=None)
    placement = Placement({}, generator_rank=1)  # a rank that writes nothing may own the generator
    owner = FakeRun(tmp_path, is_writer=False, world=SimpleNamespace(rank=lambda: 1))
    other = FakeRun(tmp_path, world=SimpleNamespace(rank=lambda: 0))
    generator = ppo_generator.build_generator(config, owner, encoder, 0, None, placement)
    assert isinstance(generator, VllmGenerator) and generator.config.num_servers == 3 and generator.dtype is Dtype.bf16
    assert generator.config.weight_transfer is WeightTransfer.collective and generator.config.max_num_seqs == 10
    assert generator._spec.model_path == config.actor.model.path
    stand_in = ppo_generator.build_generator(config, other, encoder, 0, None, placement)
    assert not stand_in.is_here and stand_in.capabilities == generator.capabilities
    config.train.replay_rollouts = str(tmp_path / "recorded")
    stand_in = ppo_generator.build_generator(config, other, encoder, 4, None, placement)
    assert not stand_in.is_here and stand_in.capabilities == ReplayGenerator.capabilities
    asked: list[tuple[Path, int]] = []
    monkeypatch.setattr(ReplayGenerator, "__init__", lambda self, folder, first: asked.append((folder, first)))
    assert ppo_generator.build_generator(config, owner, encoder, 4, None, placement).capabilities.is_recorded
    assert asked == [(tmp_path / "recorded", 5)]
    config.rollout.engine = GeneratorKind.megatron
    assert not actor_generates(config), "the recorded responses are used"
    config.train.replay_rollouts = None
    assert actor_generates(config)


def test_servers_of_several_nodes_meet_over_the_interface(
    config: PpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[tuple[Any, ...]] = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(
        ppo_nodes, "rendezvous", lambda *args: (met.append(args), SimpleNamespace(address="10.0.0.1"))[1]
    )
    config.rollout.interface, config.rollout.sync_timeout_s = "eth7", 5.0
    ppo_nodes.find_nodes(config.rollout, FakeRun(tmp_path, world_size=2))
    assert met == [([1, 1], "eth7", "10.0.0.1", 5.0, ONE_RANK)]


@pytest.mark.parametrize("bank", [False, True])
def test_responses_are_banked_where_that_is_asked_for(bank: bool, config: PpoConfig, tmp_path: Path) -> None:
    config.rollout.bank, config.checkpoint.every = bank, 2
    generator: Any = SimpleNamespace(is_here=True, capabilities=Capabilities(can_resume=True))
    with ppo_bank.open_bank(config.rollout, config.checkpoint, FakeRun(tmp_path), generator) as found:
        assert (found is not None) is bank


def test_nothing_is_banked_where_no_generator_could_resume_it(config: PpoConfig, tmp_path: Path) -> None:
    config.checkpoint.every = 2
    recorded: Any = SimpleNamespace(is_here=True, capabilities=ReplayGenerator.capabilities)
    for generator in (recorded, NullGenerator(Capabilities(can_resume=True))):
        with ppo_bank.open_bank(config.rollout, config.checkpoint, FakeRun(tmp_path), generator) as found:
            assert found is None


def test_functions_get_their_options(config: PpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **options: Any) -> SimpleNamespace:
        made.append((args, options))
        return SimpleNamespace(open=lambda: None, close=lambda: None)

    monkeypatch.setattr(ppo_functions, "FunctionReward", record)
    config.reward.function, config.train.eval_function = "scorer.py:score", "scorer.py:check"
    config.reward.batch, config.train.eval_batch = 5, 6
    config.reward.timeout_s, config.reward.workers, config.reward.concurrency = 7.0, 8, 9
    config.reward.on_error = RewardErrors.exclude
    with ppo_functions.open_functions(config.reward, config.train, FakeRun(tmp_path), SimpleNamespace(decode="decode")):
        pass
    common = {"timeout_s": 7.0, "workers": 8, "concurrency": 9, "progress": None, "world": ONE_RANK, "decode": "decode"}
    assert made == [
        (("scorer.py:score",), {"on_error": RewardErrors.exclude, "batch": 5, **common}),
        (("scorer.py:check",), {"field": "train.eval_function", "batch": 6, **common}),
    ]


def test_a_sweep_has_its_time(config: PpoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    def sweep(generator: Any, prompts: Any, sampling: Any, **limits: Any) -> SimpleNamespace:
        found.update(limits)
        return SimpleNamespace(batch=2, table=lambda: "")

    monkeypatch.setattr(ppo_chunks, "find_running_batch", sweep)
    config.pipeline.chunk_size, config.pipeline.sweep_s = 0, 1.5
    config.rollout.max_num_seqs, config.rollout.num_servers = 10, 2
    data = load_data(config, FakeRun(tmp_path))
    turns: Any = SimpleNamespace(generating=lambda: nullcontext(SimpleNamespace(is_here=True)))
    size = ppo_chunks.find_chunk_size(config.pipeline, config.rollout, ONE_RANK, data, derive_ppo(config, 1, 6), turns)
    assert size == 2 and found == {"largest": 20, "budget_s": 1.5}


def test_texts_are_encoded_again_with_the_reward_models_template(
    config: PpoConfig, tokenizer: Path, tmp_path: Path
) -> None:
    template = tmp_path / "scorer.jinja"
    template.write_text(CHATML_TEMPLATE.replace("assistant", "scorer"))
    scorer = RewardRoleConfig(re_encode=ReEncodeConfig(max_tokens=17, chat_template=str(template)))
    scorer.model.path = str(tokenizer)
    data = load_data(config, FakeRun(tmp_path))
    found = load_re_encoders({"reward_model": scorer}, config.data, data.encoder, data.datasets)["reward_model"]
    assert found.max_tokens == 17 and found.encoder.template == template.read_text() != data.encoder.template
