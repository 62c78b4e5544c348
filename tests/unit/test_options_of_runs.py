"""Options of every run reach the place where they act: its start, its loop, its evaluation, the layout of its models."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from tests.helpers.one_rank import ONE_RANK
import torch
from torch import Tensor

from hetero_ppo.config.load import load_config
from hetero_ppo.config.schema import (
    CheckpointConfig,
    Dtype,
    ModelConfig,
    ParallelConfig,
    PpoConfig,
    RoleConfig,
    RunConfig,
    SupervisedTrainConfig,
)
from hetero_ppo.data.preference import PreferenceExample
from hetero_ppo.data.sft import SftExample
from hetero_ppo.engines.layouts import role_bridge
from hetero_ppo.engines.loss_terms import TrainStepResult
from hetero_ppo.observability.trace import TraceRecorder
from hetero_ppo.rollout.generator import Capabilities, NullGenerator
from hetero_ppo.runtime import heartbeat as heartbeat_module
from hetero_ppo.trainers import launch, ppo, sft, stopping, supervised
from hetero_ppo.trainers.ppo import PpoTrainer
from hetero_ppo.trainers.ppo_turns import GeneratorTurns
from hetero_ppo.trainers.rm import RewardModelTrainer
from hetero_ppo.trainers.sft import SftTrainer
from hetero_ppo.trainers.supervised import SupervisedTrainer

CONFIG = "kind: sft\nrun: {dir: r, stop_within_s: 7, heartbeat_timeout_s: 8}\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\n"
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def test_a_run_listens_and_beats_as_long_as_its_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    for name in ("check_config", "check_paths", "check_tokenizers"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(stopping, "StopRequests", lambda within_s: nullcontext(within_s))
    monkeypatch.setattr(heartbeat_module, "Heartbeat", lambda timeout_s: nullcontext(timeout_s))
    monkeypatch.setattr(
        launch, "_train", lambda loaded, _, __, stop, beat: given.update(kind=loaded.kind, stop=stop, beat=beat)
    )
    (tmp_path / "sft.yaml").write_text(CONFIG)
    launch.main(load_config(str(tmp_path / "sft.yaml"), []))
    assert given == {"kind": "sft", "stop": 7, "beat": 8}


class Saves:
    """Stands for the manager of checkpoints."""

    is_saving = False

    def __init__(
        self, folder: Path, config: CheckpointConfig, world: object, *, timeout_s: float, about: object
    ) -> None:
        self.timeout_s = timeout_s
        self.steps: list[int] = []
        Saves.last = self

    last: Saves

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def check_room(self, roles: object) -> None: ...

    def save(self, step: int, *_: object, wait: bool) -> None:
        self.steps.append(step)


class OneParameter(SupervisedTrainer):
    """Trains nothing, and notes when it is evaluated."""

    def step(self, rows: list[int]) -> TrainStepResult:
        self.done = getattr(self, "done", 0) + 1
        return TrainStepResult(1.0, 1.0, 1.0, [])

    def evaluate(self) -> dict[str, float]:
        self.evaluated.append(self.done)
        return {}


@pytest.mark.parametrize("export", [False, True])
def test_a_supervised_run_evaluates_saves_and_exports(
    export: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[str] = []
    monkeypatch.setattr(supervised, "CheckpointManager", Saves)
    monkeypatch.setattr(supervised, "export_files", lambda *_: SimpleNamespace(files={}, config={}))
    run: Any = SimpleNamespace(
        dir=tmp_path, is_writer=False, world=ONE_RANK, about=None, watchdog=None, exported=lambda *_: None
    )
    run.forget_later_steps, run.should_stop = (lambda *_: None), (lambda *_: False)
    model = SimpleNamespace(head="lm", export=lambda folder, **_: exported.append(folder))
    engine: Any = SimpleNamespace(role="actor", model=model, config=SimpleNamespace(model=ModelConfig(path="m")))
    sampler: Any = SimpleNamespace(next_global_batch=lambda: [0], state_dict=dict)
    encoder: Any = SimpleNamespace(template_hash="")
    trainer = OneParameter(
        run,
        RunConfig(dir=str(tmp_path), timeout_minutes=3.0),
        SupervisedTrainConfig(eval_every=2),
        CheckpointConfig(every=3, export_hf=export),
        SimpleNamespace(total_steps=5),  # type: ignore[arg-type]
        sampler,
        engine,
        encoder,
    )
    trainer.evaluated = []
    trainer.fit()
    assert trainer.evaluated == [2, 4, 5] and Saves.last.steps == [3, 5] and Saves.last.timeout_s == 180.0
    assert exported == ([str(tmp_path / "hf")] if export else [])


def test_an_evaluation_takes_as_many_batches_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation on 7 rows takes two batches of 2, in SFT and for pairs."""
    rows: list[int] = []

    def forward(token_ids: Tensor, lengths: Tensor, *_: object) -> Tensor:
        rows.append(len(token_ids))
        return torch.zeros(len(token_ids), token_ids.shape[1] - 1)

    def scores(token_ids: Tensor, lengths: Tensor) -> Tensor:
        rows.append(len(token_ids))
        return torch.zeros(len(token_ids))

    train = SupervisedTrainConfig(global_batch_size=2, eval_batches=2)
    monkeypatch.setattr(sft, "log_probs_output", lambda **_: None)
    model = SimpleNamespace(forward=forward, vocab_size=9, groups=None, vocab_parts=None)
    engine = SimpleNamespace(model=model)
    texts = Rows([SftExample([1, 2, 3], [(1, 3)])] * 7)
    assert SftTrainer.evaluate(SimpleNamespace(held_out=texts, train=train, engine=engine)) == {"eval/loss": 0.0}  # type: ignore[arg-type]
    pairs = Rows([PreferenceExample([1, 2], [1, 3], 1)] * 7)
    loss = SimpleNamespace(margin=0.0, score_l2=0.0)
    scorer = SimpleNamespace(held_out=pairs, train=train, loss=loss, _scores=scores)
    assert RewardModelTrainer.evaluate(scorer)["eval/loss"] == pytest.approx(0.6931, abs=1e-4)  # type: ignore[arg-type]
    assert rows == [2, 2, 2, 2, 2, 2]


class Rows(list):  # type: ignore[type-arg]
    """Held-out rows."""

    @property
    def examples(self) -> Rows:
        return self


class Recorded(NullGenerator):
    """Answers nothing; its log-probs of the probe prompt are always as far off."""

    is_here = True

    def __init__(self, is_recorded: bool) -> None:
        super().__init__(Capabilities(is_recorded=is_recorded))

    def verify_sync(self, token_ids: list[int], log_probs: list[float]) -> float:
        assert (token_ids, log_probs) == ([1, 2], [0.0])
        return 0.25


@pytest.mark.parametrize(("verify", "is_recorded"), [(False, False), (True, False), (True, True)])
def test_the_probe_prompt_is_compared_where_that_is_asked_for(
    verify: bool, is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded responses have no weights that could be compared."""
    monkeypatch.setattr(ppo, "probe_log_probs", lambda actor, ids: [0.0])
    generator = Recorded(is_recorded)
    device: Any = SimpleNamespace(trace=TraceRecorder(), wait_for_room=lambda: None, generator_turn=lambda phase: None)
    turns = GeneratorTurns(generator, device, ONE_RANK, 0)
    actor = SimpleNamespace(on_device=lambda phase: nullcontext(), model=SimpleNamespace(stream_weights=list))
    config = SimpleNamespace(rollout=SimpleNamespace(verify_sync=verify))
    trainer: Any = SimpleNamespace(
        data=SimpleNamespace(probe_ids=[1, 2]), config=config, actor=actor, turns=turns, generator=generator
    )
    assert PpoTrainer.sync_weights(trainer, 1) == (
        {"rollout/probe_log_prob_diff": 0.25} if verify and not is_recorded else {}
    )


def test_the_actor_learns_from_the_tokens_of_its_losses_alone() -> None:
    """``truncated: mask`` leaves rows out of the experience's mask; the rollout's has them."""
    kept, sampled = torch.tensor([[True], [False]]), torch.ones(2, 1, dtype=torch.bool)
    old, ref, advantages, weights = (torch.full((2, 1), value) for value in (1.0, 2.0, 3.0, 4.0))
    experience: Any = SimpleNamespace(
        old_log_probs=old, ref_log_probs=ref, advantages=advantages, response_mask=kept, tis_weights=weights
    )
    experience.rollout = SimpleNamespace(response_mask=sampled)
    actor = SimpleNamespace(model=SimpleNamespace(vocab_size=9, groups=None, vocab_parts=None))
    trainer: Any = SimpleNamespace(actor=actor, config=PpoConfig(), maker=SimpleNamespace(temperature=1.0))
    trainer._update = lambda engine, experience, inputs, loss_fn, step: inputs
    inputs: Any = PpoTrainer.update_actor(trainer, experience, 0)
    assert (inputs.old_log_probs, inputs.ref_log_probs, inputs.advantages) == (old, ref, advantages)
    assert inputs.mask is kept and inputs.tis_weights is weights


def test_a_layout_reaches_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    layout = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=4, context=2, expert=4, sequence=True)
    model = ModelConfig(path=str(tmp_path), dtype=Dtype.bf16)
    found = role_bridge(RoleConfig(model=model, parallel=layout)).transformer
    sizes = (
        found.tensor_model_parallel_size,
        found.pipeline_model_parallel_size,
        found.virtual_pipeline_model_parallel_size,
    )
    assert sizes == (2, 2, 4)
    assert (found.context_parallel_size, found.expert_model_parallel_size, found.sequence_parallel) == (2, 4, True)
    assert found.params_dtype is torch.bfloat16 and found.bf16
