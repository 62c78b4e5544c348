"""Options that the trainer itself obeys, in PPO runs of one step or two on recorded rollouts: this process is their one rank."""

from __future__ import annotations

import itertools
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
from chain import read_metrics
from distributed.ppo_runs import PpoRuns, prepare

from hetero_ppo.cli.main import main
from hetero_ppo.observability.trace import COPY_IN, read_trace

LR, STEPS = 1e-3, 2
#: One minibatch of all 16 responses, so that the actor's only training forward of a step is of the policy that sampled.
FIELDS: dict[str, object] = {
    "run.tensorboard": False,
    "algorithm.minibatch_size": 16,
    "actor.optimizer.lr": LR,
    "train.trace_every": 1,
}
RUNS: dict[str, dict[str, object]] = {
    "aligned": {"actor.aligned": True, "algorithm.kl.controller": "adaptive", "algorithm.kl.horizon": 100},
    "warm-up": {"algorithm.critic_warmup_steps": 1},
    "epochs": {
        "algorithm.ppo_epochs": 2,
        "algorithm.minibatch_size": 4,
        "actor.optimizer.lr_schedule": "linear",
        "critic.optimizer.lr_schedule": "linear",
        "critic.optimizer.lr": LR,
    },
}


@dataclass(frozen=True)
class OneRank:
    """Runs in this process."""

    runs: PpoRuns

    def launch(self, name: str, fields: dict[str, object]) -> int:
        """Train in the folder ``name``; returns the exit status."""
        with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
            free.bind(("127.0.0.1", 0))
            world = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
            for variable, value in {**world, "MASTER_PORT": free.getsockname()[1]}.items():
                patch.setenv(variable, str(value))
            free.close()
            return main(self.runs.command(name, "dense", {}, STEPS, fields={**FIELDS, **fields}))


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(prepare(tmp_path_factory.mktemp("ppo"), num_hidden_layers=1))


@pytest.fixture(scope="module")
def folders(rank: OneRank) -> dict[str, Path]:
    """Run -> its folder."""
    assert [rank.launch(name, fields) for name, fields in RUNS.items()] == [0] * len(RUNS)
    return {name: rank.runs.root / name for name in RUNS}


def test_an_aligned_actors_first_ratio_is_one_to_the_bit(folders: dict[str, Path]) -> None:
    """The forward that gave the old log-probs, of other micro-batches and without a gradient, and the training forward agree."""
    for metrics in read_metrics(folders["aligned"]).values():
        assert metrics["actor/ppo_kl_first"] == metrics["actor/ppo_kl"] == 0.0
        assert metrics["actor/ratio_mean"] == 1.0 and metrics["actor/pg_clipfrac"] == 0.0
    trained_on = read_metrics(folders["epochs"])[1]
    assert abs(trained_on["actor/ppo_kl_first"]) < 1e-6 and abs(trained_on["actor/ppo_kl"]) > 1e-4


def test_the_kl_controller_sees_every_step(folders: dict[str, Path]) -> None:
    """The first step's KL is 0, far below the target: its coefficient falls by the largest relative error, 0.2 x 16 / 100."""
    first, second = read_metrics(folders["aligned"]).values()
    assert first["kl/coef"] == 0.05 and abs(first["kl/reference"]) < 1e-5
    assert second["kl/coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100))


def test_the_critic_warms_up_alone(folders: dict[str, Path]) -> None:
    """The actor is the reference until it is trained: their KL is 0 in the step after the warm-up, and is not without it."""
    first, second = read_metrics(folders["warm-up"]).values()
    assert not [name for name in first if name.startswith("actor/")] and first["critic/grad_norm"] > 0
    assert second["actor/grad_norm"] > 0 and abs(second["kl/reference"]) < 1e-5
    trained = read_metrics(folders["aligned"])[2]
    assert abs(trained["kl/reference"]) > 1e-3
    assert second["critic/vf_loss"] != first["critic/vf_loss"]


def test_epochs_and_minibatches_are_optimizer_steps(folders: dict[str, Path]) -> None:
    """Two epochs of four minibatches are 8 steps of 16 in the run: of a line to 0, the last rate of a step is 1 - 7/16, and 1 - 15/16."""
    rates = [(m["actor/lr"], m["critic/lr"]) for m in read_metrics(folders["epochs"]).values()]
    assert rates == [pytest.approx((LR * left, LR * left)) for left in (9 / 16, 1 / 16)]
    assert [m["actor/lr"] for m in read_metrics(folders["aligned"]).values()] == [LR] * STEPS


def test_a_role_is_on_its_way_before_its_turn(folders: dict[str, Path]) -> None:
    """Its parameters begin to come in while the role before it computes."""
    came_early = 0
    for path in sorted((folders["aligned"] / "trace").glob("step_*.json")):
        spans = read_trace(path).spans
        turns = [span for span in spans if span.name in ("scores", "ref_log_probs", "old_log_probs", "values") and span.lane != "trainer"]
        assert [turn.lane for turn in turns] == ["reward_model", "reference", "actor", "critic"]
        for before, turn in itertools.pairwise(turns):
            copies = [s for s in spans if s.lane == COPY_IN and s.name == f"{turn.lane} params" and s.start < turn.end]
            came_early += any(copy.start < before.end for copy in copies)
    assert came_early > 0


def test_a_step_beyond_the_mismatch_bound_is_not_trained_on(rank: OneRank, capfd: pytest.CaptureFixture[str]) -> None:
    """The recorded log-probs are random."""
    assert rank.launch("mismatch", {"rollout.mismatch.max_log_prob_diff_mean": 0.5, "rollout.mismatch.patience": 2}) == 1
    assert "step 2: the engine's log-probs are not the trainer's" in capfd.readouterr().err
    assert list(read_metrics(rank.runs.root / "mismatch")) == [1]
