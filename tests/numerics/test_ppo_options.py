"""Options that the trainer itself obeys, in PPO runs of one step or two: this process is their one rank."""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests.helpers.chain import read_metrics
from tests.helpers.critic_free import registered
from tests.helpers.ppo_runs import PpoRuns, prepare
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hetero_ppo.cli.main import main
from hetero_ppo.errors import EXIT_STOPPED
from hetero_ppo.observability.trace import COPY_IN, read_trace
from hetero_ppo.rollout.replay import read_rollouts

LR, STEPS = 1e-3, 2
#: One minibatch of all 16 responses, so that the actor's only training forward of a step is of the policy that sampled.
FIELDS: dict[str, object] = {
    "run.tensorboard": False,
    "algorithm.minibatch_size": 16,
    "actor.optimizer.lr": LR,
    "train.trace_every": 1,
}
#: What has a state to lose.
STATEFUL: dict[str, object] = {
    "algorithm.kl.controller": "adaptive",
    "algorithm.kl.horizon": 100,
    "reward.normalise": True,
    "checkpoint.every": 1,
}
RUNS: dict[str, dict[str, object]] = {
    "aligned": {
        **STATEFUL,
        "checkpoint.export_hf": True,
        "actor.aligned": True,
        "critic.optimizer.lr_schedule": "linear",
    },
    "warm-up": {"algorithm.critic_warmup_steps": 1},
    "epochs": {
        "algorithm.ppo_epochs": 2,
        "algorithm.minibatch_size": 4,
        "algorithm.critic_epochs": 3,
        "algorithm.critic_minibatch_size": 8,
        "actor.optimizer.lr_schedule": "linear",
        "critic.optimizer.lr_schedule": "linear",
        "critic.optimizer.lr": LR,
        "checkpoint.every": 1,
        "checkpoint.keep": 1,
        "train.dump_rollouts": True,
    },
    # The actor answers the prompts itself, with the weights of the step before.
    "generated": {
        "rollout.engine": "megatron",
        "rollout.max_num_seqs": 16,
        "train.replay_rollouts": "null",
        "rollout.sampling.max_tokens": 4,
        "data.eval": "${data.train}",
        "train.eval_every": 2,
        "rollout.eval_sampling.max_tokens": 3,
    },
}
#: Asks the run to stop while it scores the first step, and gives 0.5 less than there are characters.
FUNCTION = """
import os, signal

def score(prompt, response, label, metadata):
    os.kill({pid}, signal.SIGUSR1)
    return len(response) - 0.5
"""


@dataclass
class OneRank:
    """Runs in this process."""

    runs: PpoRuns
    done: set[str] = field(default_factory=set)

    def folder(self, name: str) -> Path:
        """Return the folder of one of ``RUNS``. The first test that asks for it runs it."""
        if name not in self.done:
            assert self.launch(name, RUNS[name]) == 0
            self.done.add(name)
        return self.runs.root / name

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


def test_an_aligned_actors_first_ratio_is_one_to_the_bit(rank: OneRank) -> None:
    """The forward that gave the old log-probs, of other micro-batches and without a gradient, and the training forward agree."""
    for metrics in read_metrics(rank.folder("aligned")).values():
        assert metrics["actor/ppo_kl_first"] == metrics["actor/ppo_kl"] == 0.0
        assert metrics["actor/ratio_mean"] == 1.0 and metrics["actor/pg_clipfrac"] == 0.0
    trained_on = read_metrics(rank.folder("epochs"))[1]
    assert abs(trained_on["actor/ppo_kl_first"]) < 1e-6 and abs(trained_on["actor/ppo_kl"]) > 1e-4


def test_the_kl_controller_sees_every_step(rank: OneRank) -> None:
    """The first step's KL is 0, far below the target: its coefficient falls by the largest relative error, 0.2 x 16 / 100."""
    first, second = read_metrics(rank.folder("aligned")).values()
    assert first["kl/coef"] == 0.05 and abs(first["kl/reference"]) < 1e-5
    assert second["kl/coef"] == pytest.approx(0.05 * (1 - 0.2 * 16 / 100))


def test_the_critic_warms_up_alone(rank: OneRank) -> None:
    """The actor is the reference until it is trained: their KL is 0 in the step after the warm-up, and is not without it."""
    first, second = read_metrics(rank.folder("warm-up")).values()
    assert not [name for name in first if name.startswith("actor/")] and first["critic/grad_norm"] > 0
    assert second["actor/grad_norm"] > 0 and abs(second["kl/reference"]) < 1e-5
    trained = read_metrics(rank.folder("aligned"))[2]
    assert abs(trained["kl/reference"]) > 1e-3
    assert second["critic/vf_loss"] != first["critic/vf_loss"]


def test_epochs_and_minibatches_are_optimizer_steps(rank: OneRank) -> None:
    """The actor's two epochs of four minibatches are 8 steps of 16 in the run: of a line to 0, the last rates of the two PPO steps are
    1 - 7/16 and 1 - 15/16. The critic's three epochs of two are 6 of 12.
    """
    rates = [(m["actor/lr"], m["critic/lr"]) for m in read_metrics(rank.folder("epochs")).values()]
    assert rates == [pytest.approx((LR * 9 / 16, LR * 7 / 12)), pytest.approx((LR / 16, LR / 12))]
    assert [m["actor/lr"] for m in read_metrics(rank.folder("aligned")).values()] == [LR] * STEPS


def test_scores_are_those_of_transformers(rank: OneRank) -> None:
    """Each score is that of the response alone, at its last token. Responses that reached the length limit are those of the record."""
    torch.set_num_threads(1)
    model = AutoModelForSequenceClassification.from_pretrained(rank.runs.root / "dense" / "scorer", dtype=torch.float32)
    rows = read_rollouts(rank.folder("epochs") / "rollouts" / "step_000001.jsonl")
    for row in rows:
        with torch.no_grad():
            score = float(model(torch.tensor([row.prompt_ids + row.response_ids])).logits)
        assert row.extra["score"] == pytest.approx(score, abs=1e-5)
    recorded = {
        tuple(r.response_ids): r.finish_reason for r in read_rollouts(rank.runs.root / "rollouts" / "step_000001.jsonl")
    }
    truncated = [recorded[tuple(row.response_ids)] == "length" for row in rows]
    assert 0 < sum(truncated) < len(rows)
    assert read_metrics(rank.folder("epochs"))[1]["response_length/clip_ratio"] == pytest.approx(
        sum(truncated) / len(rows)
    )


def test_old_checkpoints_go(rank: OneRank) -> None:
    for name, steps in (("aligned", [1, 2]), ("epochs", [2])):
        complete = sorted((rank.folder(name) / "checkpoints").glob("iter_*/COMPLETE"))
        assert [int(path.parent.name.removeprefix("iter_")) for path in complete] == steps, name


def test_a_resumed_run_takes_the_step_of_the_straight_one_to_the_bit(rank: OneRank) -> None:
    """Weights, optimizers, learning rates, the KL coefficient, the moments of the scores and the place in the prompts come back."""
    load = {"checkpoint.load": rank.folder("aligned"), "checkpoint.step": 1}
    assert rank.launch("resumed", {**RUNS["aligned"], **load}) == 0
    straight, resumed = (results(folder) for folder in (rank.folder("aligned"), rank.runs.root / "resumed"))
    assert list(resumed) == [2] and resumed[2] == straight[2]
    expected, found = (
        load_file(folder / "hf" / "model.safetensors")
        for folder in (rank.folder("aligned"), rank.runs.root / "resumed")
    )
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_without_a_critic_trains_saves_and_resumes_to_the_bit(rank: OneRank) -> None:
    """No phase, metric, lane or checkpoint folder of a critic is left; the policy moves all the same."""
    fields = {**RUNS["aligned"], "algorithm.advantage": "group_mean", "critic": "null"}
    del fields["critic.optimizer.lr_schedule"]
    folder, resumed = rank.runs.root / "critic-free", rank.runs.root / "critic-free resumed"
    with registered():
        assert rank.launch(folder.name, fields) == 0
        assert rank.launch(resumed.name, {**fields, "checkpoint.load": folder, "checkpoint.step": 1}) == 0
    metrics = results(folder)
    assert list(metrics) == [1, 2] and not [name for name in metrics[2] if "critic" in name or "vf_" in name]
    assert metrics[2]["actor/grad_norm"] > 0 and abs(metrics[2]["kl/reference"]) > 1e-3
    assert results(resumed) == {2: metrics[2]}
    expected, found = (load_file(run / "hf" / "model.safetensors") for run in (folder, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    (checkpoint,) = (folder / "checkpoints").glob("iter_0000002")
    assert [path.name for path in checkpoint.iterdir() if "critic" in path.name] == []
    lanes = {span.lane for path in (folder / "trace").glob("step_*.json") for span in read_trace(path).spans}
    assert "actor" in lanes and "critic" not in lanes


def test_a_resumed_run_keeps_its_critic(rank: OneRank, capfd: pytest.CaptureFixture[str]) -> None:
    load = {"checkpoint.load": rank.folder("aligned"), "checkpoint.step": 1}
    fields = {**RUNS["aligned"], **load, "algorithm.advantage": "group_mean", "critic": "null"}
    del fields["critic.optimizer.lr_schedule"]
    with registered():
        assert rank.launch("refused", fields) == 2
    error = capfd.readouterr().err
    assert "critic" in error and "algorithm.advantage" in error


def results(folder: Path) -> dict[int, dict[str, float]]:
    """Return the metrics without those of memory and time."""
    return {
        step: {n: v for n, v in found.items() if not n.startswith(("memory/", "pipeline/")) and not n.endswith("_s")}
        for step, found in read_metrics(folder).items()
    }


def test_every_step_generates_with_its_own_weights(rank: OneRank) -> None:
    """The log-probs that the generator sampled with are those of the trained actor: of step 2, those of the weights after step 1."""
    for step, metrics in read_metrics(rank.folder("generated")).items():
        assert metrics["rollout/log_prob_diff_max"] < 1e-4, step
        assert metrics["rollout/probe_log_prob_diff"] < 1e-4, step
    assert abs(read_metrics(rank.folder("generated"))[2]["kl/reference"]) > 1e-4


def test_held_out_prompts_are_answered_when_and_as_the_options_say(rank: OneRank) -> None:
    """They are answered after every second step, with the sampling of the evaluation. Without a word about it the run writes no export and no rollouts."""
    folder = rank.folder("generated")
    metrics = read_metrics(folder)
    assert [step for step in metrics if "eval/reward" in metrics[step]] == [2]
    assert metrics[2]["eval/response_length"] <= 3 < metrics[2]["response_length/mean"]
    assert not (folder / "hf").exists() and not (folder / "rollouts").exists()


def test_a_function_scores_and_a_signal_stops_after_the_step(rank: OneRank) -> None:
    """The mean of scores that are half numbers; a checkpoint of step 1, and no second step."""
    (rank.runs.root / "function.py").write_text(FUNCTION.format(pid=os.getpid()))
    function = {
        "reward.source": "function",
        "reward.function": f"{rank.runs.root / 'function.py'}:score",
        "reward_model": "null",
    }
    folder = rank.runs.root / "stopped"
    assert rank.launch("stopped", {**function, "reward.timeout_s": 60, "train.dump_rollouts": True}) == EXIT_STOPPED
    metrics = read_metrics(folder)
    assert list(metrics) == [1] and [path.name for path in (folder / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    rows = read_rollouts(folder / "rollouts" / "step_000001.jsonl")
    scores = [len(row.extra["response"]) - 0.5 for row in rows]
    assert [row.extra["score"] for row in rows] == scores
    assert metrics[1]["reward/mean"] == pytest.approx(sum(scores) / len(scores))


def test_a_role_is_on_its_way_before_its_turn(rank: OneRank) -> None:
    """Its parameters begin to come in while the role before it computes."""
    came_early = 0
    for path in sorted((rank.folder("aligned") / "trace").glob("step_*.json")):
        spans = read_trace(path).spans
        turns = [
            span
            for span in spans
            if span.name in ("scores", "ref_log_probs", "old_log_probs", "values") and span.lane != "trainer"
        ]
        assert [turn.lane for turn in turns] == ["reward_model", "reference", "actor", "critic"]
        for before, turn in itertools.pairwise(turns):
            copies = [s for s in spans if s.lane == COPY_IN and s.name == f"{turn.lane} params" and s.start < turn.end]
            came_early += any(copy.start < before.end for copy in copies)
    assert came_early > 0


def test_a_step_beyond_the_mismatch_bound_is_not_trained_on(rank: OneRank, capfd: pytest.CaptureFixture[str]) -> None:
    """The recorded log-probs are random."""
    assert (
        rank.launch("mismatch", {"rollout.mismatch.max_log_prob_diff_mean": 0.5, "rollout.mismatch.patience": 2}) == 1
    )
    assert "step 2: the generator's log-probs are not the trainer's" in capfd.readouterr().err
    assert list(read_metrics(rank.runs.root / "mismatch")) == [1]
