"""Forwards during generation, and their serial twin: the same bits, every role in its turn, errors that arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hetero_ppo.algorithms.advantage_registry import build_estimator
from hetero_ppo.algorithms.kl import FixedKlController
from hetero_ppo.algorithms.rewards import RunningMoments
from hetero_ppo.config import derived
from hetero_ppo.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    OldLogProbs,
    ResidencyConfig,
    RewardConfig,
    RewardSource,
    RoleConfig,
    SamplingConfig,
    TrainedRoleConfig,
)
from hetero_ppo.engines.model_engine import ModelEngine
from hetero_ppo.engines.shared_device import SharedDevice
from hetero_ppo.engines.train_engine import TrainEngine
from hetero_ppo.errors import RunError
from hetero_ppo.experience.bank import RolloutBank
from hetero_ppo.experience.pending_rollout import PendingRollout, collect_rollout
from hetero_ppo.experience.pipeline import Pipeline
from hetero_ppo.experience.scorers import Scorers
from hetero_ppo.experience.stages import ExperienceMaker
from hetero_ppo.observability.timers import PhaseTimer
from hetero_ppo.reward.function import FunctionReward
from hetero_ppo.rollout.generator import Capabilities, GenerationRequest, Generator
from hetero_ppo.rollout.replay import ReplayGenerator, RolloutRecord, write_records
from hetero_ppo.step.kinds import FORWARD, Kind
from hetero_ppo.step.phases import ppo_phases
from hetero_ppo.types import Experience, OnResponse, PromptBatch, Response, Rollout

pytestmark = pytest.mark.usefixtures("world")

VOCAB, PROMPTS, SAMPLES, CHUNK = 64, 5, 2, 4
SAMPLING = SamplingConfig(max_tokens=9)
#: Rows in the order in which their responses are complete: the chunks are [1, 3, 6, 8], [0, 2, 7, 9], [4, 5].
ORDER = [3, 8, 1, 6, 9, 0, 7, 2, 5, 4]
CHUNKS = [[1, 3, 6, 8], [0, 2, 7, 9], [4, 5]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> PromptBatch:
    ids = [[1 + (3 * i + j) % (VOCAB - 1) for j in range(2 + i)] for i in range(PROMPTS)]
    return PromptBatch(ids, ["?"] * PROMPTS, [None] * PROMPTS, list(range(PROMPTS)), [None] * PROMPTS, [{}] * PROMPTS)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, prompts: PromptBatch) -> Path:
    """One step of responses of 1 to 9 tokens, with the chunks of ORDER."""
    folder = tmp_path_factory.mktemp("rollouts")
    generator = torch.Generator().manual_seed(3)
    chunk_of = {row: index for index, rows in enumerate(CHUNKS) for row in rows}
    records = []
    for row in range(PROMPTS * SAMPLES):
        length = 1 + (5 * row) % 9
        tokens = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        log_probs = (-4 * torch.rand(length, generator=generator)).tolist()
        ids = prompts.prompt_ids[row // SAMPLES]
        records.append(RolloutRecord(1, row // SAMPLES, ids, tokens, log_probs, "stop", "step0", None, chunk_of[row]))
    write_records(folder, 1, records)
    return folder


class Paced(ReplayGenerator):
    """Answers as recorded, but a response at a time and only as far as it is let: the test is the generator's speed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.may = threading.Semaphore(0)

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        answers = super().generate(request)
        for row in ORDER:
            assert self.may.acquire(timeout=60)
            assert on_response is not None
            on_response(row // SAMPLES, row % SAMPLES, answers[row // SAMPLES][row % SAMPLES])
        return answers


class Killed(Paced):
    """Takes responses that are there already, as the servers' generator does; may be ended after so many others."""

    def __init__(self, directory: Path, end_after: int | None = None) -> None:
        super().__init__(directory)
        self.end_after = end_after
        self.asked: list[int] = []  # places that were not there

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        answers = ReplayGenerator.generate(self, replace(request, partial=None))
        assert on_response is not None
        for row in ORDER:
            there = request.partial[row] if request.partial is not None else None
            if there is None:
                if len(self.asked) == self.end_after:
                    raise RunError("killed")
                self.asked.append(row)
            on_response(row // SAMPLES, row % SAMPLES, there or answers[row // SAMPLES][row % SAMPLES])
        return answers


class Collective(ReplayGenerator):
    """A generator on every rank, like an actor that answers itself. It notes who calls it."""

    capabilities = Capabilities(is_collective=True)

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.caller: threading.Thread | None = None

    def generate(
        self,
        request: GenerationRequest,
        *,
        on_response: OnResponse | None = None,
        on_stalled: Callable[[], None] | None = None,
    ) -> list[list[Response]]:
        self.caller = threading.current_thread()
        return super().generate(request, on_response=on_response)


def started(
    generator: Generator,
    prompts: PromptBatch,
    *,
    n: int = SAMPLES,
    version: str = "step0",
    chunk_size: int = CHUNK,
    **more: Any,
) -> PendingRollout:
    request = GenerationRequest(prompts, SAMPLING, n=n, seed=0)
    return PendingRollout(
        generator, request, dist.group.WORLD, generator_rank=0, version=version, chunk_size=chunk_size, **more
    ).start()


def collected(recorded: Path, prompts: PromptBatch) -> Rollout:
    return collect_rollout(
        ReplayGenerator(recorded),
        GenerationRequest(prompts, SAMPLING, n=SAMPLES, seed=0),
        dist.group.WORLD,
        generator_rank=0,
        version="step0",
    )


class Roles:
    """The four roles on one device, and the maker over them."""

    def __init__(self, model: Path, *, overlap: bool, old_log_probs: OldLogProbs = OldLogProbs.actor) -> None:
        schedule = ppo_phases(
            reward_models=["reward_model"], actor_scores_old=old_log_probs is OldLogProbs.actor, overlap=overlap
        )
        self.device = SharedDevice(ResidencyConfig(), schedule)
        trained = TrainedRoleConfig(model=ModelConfig(path=str(model)), micro_batch_size=3)
        plain = RoleConfig(model=ModelConfig(path=str(model)), micro_batch_size=3)
        self.critic = TrainEngine("critic", trained, "value", 1, self.device)
        reward_model = ModelEngine("reward_model", plain, "score", device=self.device)
        self.maker = ExperienceMaker(
            engines={
                "actor": TrainEngine("actor", trained, "lm", 1, self.device).model,
                "critic": self.critic.model,
                "reference": ModelEngine("reference", plain, "lm", device=self.device),
                "reward_model": reward_model,
            },
            phases=schedule,
            scorers=Scorers([reward_model], None, RewardConfig()),
            estimator=build_estimator(AlgorithmConfig()),
            algorithm=AlgorithmConfig(old_log_probs=old_log_probs),
            reward_config=RewardConfig(),
            temperature=1.0,
            kl_controller=FixedKlController(0.1),
            score_moments=RunningMoments(),
        )
        self.pipeline = Pipeline(self.maker, overlap)
        self.generated = 0

    def make(self, generator: ReplayGenerator, prompts: PromptBatch, chunk_size: int = CHUNK) -> Experience:
        self.device.generator_turn("rollout")
        pending = started(generator, prompts, chunk_size=chunk_size)

        def generated() -> None:
            self.generated += 1

        return self.pipeline.make(pending, PhaseTimer(), when_generated=generated)


def tensors(record: Experience | Rollout) -> dict[str, Tensor]:
    values = {entry.name: getattr(record, entry.name) for entry in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def differing(one: Experience, other: Experience) -> list[str]:
    names = [name for name, value in tensors(one).items() if not torch.equal(value, tensors(other)[name])]
    return names + [
        name for name, value in tensors(one.rollout).items() if not torch.equal(value, tensors(other.rollout)[name])
    ]


def let_waves_happen(roles: Roles, generator: Paced) -> None:
    """Let a chunk complete, and the next ones only when the trainer is at work on the ones before."""
    original = roles.pipeline._run_wave

    def run_wave(stages: Any, chunks: Any, *args: Any, **kwargs: Any) -> None:
        generator.may.release(CHUNK)
        original(stages, chunks, *args, **kwargs)

    roles.pipeline._run_wave = run_wave  # type: ignore[method-assign]
    generator.may.release(CHUNK)


@pytest.mark.parametrize("old_log_probs", OldLogProbs)
def test_overlapped_and_serial_give_the_same_bits(
    model: Path, prompts: PromptBatch, recorded: Path, old_log_probs: OldLogProbs
) -> None:
    overlapped, serial = (Roles(model, overlap=mode, old_log_probs=old_log_probs) for mode in (True, False))
    paced = Paced(recorded)
    let_waves_happen(overlapped, paced)
    one, other = overlapped.make(paced, prompts), serial.make(ReplayGenerator(recorded), prompts)
    assert differing(one, other) == []
    assert one.rollout.chunk_index == other.rollout.chunk_index == [1, 0, 1, 0, 2, 2, 0, 1, 0, 1]

    assert [wave.chunks for wave in overlapped.pipeline.waves] == [[0], [1], [2]]
    assert [wave.during_generation for wave in overlapped.pipeline.waves] == [True, True, False]
    forwards = [stage.name for stage in overlapped.maker.stages()]
    assert [wave.stages for wave in overlapped.pipeline.waves] == [forwards, forwards[::-1], forwards]
    assert [wave.chunks for wave in serial.pipeline.waves] == [[0, 1, 2]]
    assert (overlapped.generated, serial.generated) == (1, 1)
    assert one.metrics["pipeline/chunks_during_generation"] == 2 and other.metrics["pipeline/num_waves"] == 1
    for roles in (overlapped, serial):
        assert roles.critic.residency.bytes_by_kind()[0][Kind.params] == roles.critic.residency.num_bytes(FORWARD)
        roles.device.close()


FUNCTION = """
import os, time

def score(prompt, response, label, metadata):
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    return len(response)
"""


def test_a_reward_function_scores_while_the_engine_and_the_models_are_at_work(
    model: Path, prompts: PromptBatch, recorded: Path, tmp_path: Path
) -> None:
    """No call ends before the last response is there, and the same bits as one after the other."""
    gate = tmp_path / "gate"
    (tmp_path / "reward.py").write_text(FUNCTION.format(gate=str(gate)))
    made = []
    for overlap in (True, False):
        roles = Roles(model, overlap=overlap)
        reward = FunctionReward(
            f"{tmp_path}/reward.py:score", lambda ids: "x" * len(ids), timeout_s=30.0, workers=2, world=dist.group.WORLD
        )
        roles.maker.scorers = Scorers(roles.maker.scorers.models, reward, RewardConfig(source=RewardSource.mix))
        generator = Paced(recorded)
        let_waves_happen(roles, generator)
        if not overlap:
            generator.may.release(len(ORDER))
        roles.device.generator_turn("rollout")
        pending = started(generator, prompts)
        made.append(roles.pipeline.make(pending, PhaseTimer(), when_generated=gate.touch))
        assert len(roles.pipeline.waves) == (3 if overlap else 1)
        reward.close()
        roles.device.close()
    assert differing(*made) == []
    assert made[0].scores.parts["function"].tolist() == made[0].rollout.response_lengths.tolist()


def test_the_cut_into_chunks_changes_no_value(model: Path, prompts: PromptBatch, recorded: Path) -> None:
    roles = Roles(model, overlap=True)
    whole = roles.make(ReplayGenerator(recorded), prompts, chunk_size=PROMPTS * SAMPLES)
    for size in (1, 4):
        cut = roles.make(ReplayGenerator(recorded), prompts, chunk_size=size)
        for name, value in tensors(whole).items():
            torch.testing.assert_close(tensors(cut)[name], value, atol=2e-6, rtol=1e-5, msg=name)
    roles.device.close()


def test_parts_of_the_last_chunk_are_handed_out_as_they_complete(
    prompts: PromptBatch, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "SMALLEST_CUT", 1)
    generator = Paced(recorded)
    pending = started(generator, prompts)
    rows = []
    for more in (5, 3, 1, 1):
        for _ in range(more):
            generator.may.release()
        rows += [chunk.rows for chunk in pending.next_chunks()]
    assert rows == [*CHUNKS[:2], [5], [4]] and pending.finished
    assert [pending.rollout().chunk_index[row] for row in (1, 0, 5, 4)] == [0, 1, 2, 3]


def test_rows_keep_their_place(prompts: PromptBatch, recorded: Path) -> None:
    pending = started(ReplayGenerator(recorded), prompts)
    chunks = pending.next_chunks(wait_for_all=True)
    assert [chunk.rows for chunk in chunks] == CHUNKS and pending.finished
    whole = pending.rollout()
    at_once = collected(recorded, prompts)
    assert all(torch.equal(value, tensors(at_once)[name]) for name, value in tensors(whole).items())
    for chunk in chunks:
        part = chunk.rollout
        assert part.prompt_index == [row // SAMPLES for row in chunk.rows]
        width = part.token_ids.shape[1]
        assert torch.equal(part.token_ids, whole.token_ids[chunk.rows, :width])
        assert torch.equal(part.rollout_log_probs, whole.rollout_log_probs[chunk.rows, : width - 1])
        assert int(part.sequence_lengths.max()) == width, "padded to the longest of the chunk alone"


def test_a_collective_engine_answers_in_the_trainers_thread(prompts: PromptBatch, recorded: Path) -> None:
    """What the ranks do together has one order: nothing else goes on until every response is there."""
    generator = Collective(recorded)
    pending = started(generator, prompts)
    assert generator.caller is threading.current_thread()
    assert [len(chunk.rows) for chunk in pending.next_chunks()] == [4, 4, 2] and pending.finished


def test_errors_of_the_engine_reach_the_trainer(prompts: PromptBatch, recorded: Path) -> None:
    stale = started(ReplayGenerator(recorded), prompts, version="step7")
    with pytest.raises(RunError, match="made by weights .'step0'., the actor is at 'step7'"):
        stale.next_chunks()
    failing = started(ReplayGenerator(recorded), prompts, n=SAMPLES + 1)
    with pytest.raises(ValueError, match="needs 3 recorded responses, 2 are left"):
        failing.next_chunks()


def test_banked_responses_are_not_asked_for_again(prompts: PromptBatch, recorded: Path, tmp_path: Path) -> None:
    """A generation that is ended after seven of ten responses, and the one that takes its place: the same chunks, the same rows."""
    bank = RolloutBank(tmp_path, resumes=False)
    assert bank.begin(0, "key") == []
    first = started(Killed(recorded, end_after=7), prompts, bank=bank)
    with pytest.raises(RunError, match="killed"):
        first.next_chunks(wait_for_all=True)

    bank = RolloutBank(tmp_path, resumes=True)
    banked = bank.begin(0, "key")
    assert [place for place, _ in banked] == ORDER[:7]
    generator = Killed(recorded)
    second = started(generator, prompts, bank=bank, banked=banked)
    chunks = second.next_chunks(wait_for_all=True)
    assert generator.asked == ORDER[7:] and [chunk.rows for chunk in chunks] == CHUNKS
    assert second.metrics() == {"rollout/banked_share": 0.7}
    at_once = collected(recorded, prompts)
    assert all(torch.equal(value, tensors(at_once)[name]) for name, value in tensors(second.rollout()).items())
    bank.end()
    assert [place for place, _ in bank.begin(0, "key")] == ORDER
