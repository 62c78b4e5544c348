"""PPO that waits for no straggler: unfinished responses are resumed, by the next step and by a run from a checkpoint.

That run is over two nodes, each with a rollout server. Its held-out answers end at a stop string, and its chunks are as large as a sweep says.
A function scores the answers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.helpers.chain import Chain, launch_all, launch_nodes, read_metrics

from hetero_ppo.rollout.replay import read_rollouts

pytestmark = pytest.mark.slow

WANTED, SENT = 16, 24
LONGEST_TOKEN = 16  # characters
OVERRIDES = {
    "algorithm__old_log_probs": "rollout",
    "rollout__over_sampling": SENT / WANTED,
    "rollout__sampling__ignore_eos": "true",  # all responses go to their limit, so some are always under way
    "pipeline__chunk_size": 0,
    "pipeline__sweep_s": 1,
    "rollout__eval_sampling__stop": "[a]",
    "checkpoint__every": 2,
    "reward_model": "null",
    "reward__source": "function",
}
FUNCTION = """
def score(prompt, response, label, metadata):
    return len(response) - 0.25 * len(prompt)
"""


def test_unfinished_responses_are_resumed(chain: Chain, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "function.py").write_text(FUNCTION)
    overrides = {**OVERRIDES, "reward__function": f"{tmp_path / 'function.py'}:score"}
    command = chain.train_command("ppo", run_dir, train__steps=2, **overrides)
    assert "running batch  tokens/s  of the best" in launch_all(1, [command])
    answers = [sample["response"] for sample in json.loads((run_dir / "eval_after.json").read_text())["samples"]]
    assert any("a" in answer for answer in answers)
    assert all("a" not in answer or len(answer) - answer.index("a") <= LONGEST_TOKEN for answer in answers)

    waiting = json.loads((run_dir / "checkpoints" / "iter_0000002" / "trainer.json").read_text())["waiting"]
    kept = [one for one in waiting["begun"] if one is not None]
    assert kept and all(one["token_ids"] for one in kept)
    assert len(waiting["begun"]) + 2 * WANTED == 3 * WANTED  # three batches of prompts were read

    command = chain.train_command("ppo", run_dir, train__steps=3, checkpoint__load=run_dir, **overrides)
    first, other = launch_nodes(2, [*command, "rollout.num_servers=null"])
    assert "rollout servers on 2 nodes, [1, 1]; node 0 is reached at 127.0.0.1" in first
    assert "weights get into the rollout servers by collective" in first and "rollout server" not in other
    metrics = read_metrics(run_dir)
    assert 0.2 < metrics[3]["rollout/least_server_share"] <= 0.5  # both nodes' servers answered
    log = (run_dir / "rollout" / "server_1.log").read_text()
    assert "'host': '127.0.0.1'" in log and "'uds'" not in log
    assert metrics[1]["rollout/resumed_share"] == 0 and metrics[1]["rollout/weight_versions_max"] == 1
    records = read_rollouts(run_dir / "rollouts" / "step_000003.jsonl")
    assert len(records) == WANTED
    resumed = [record for record in records if "earlier_versions" in record.extra or record.weight_version != "step2"]
    assert metrics[3]["rollout/resumed_share"] == pytest.approx(len(resumed) / WANTED)
    assert metrics[3]["rollout/stale_token_share"] > 0
    scores = [len(record.extra["response"]) - 0.25 * len(record.extra["prompt"]) for record in records]
    assert [record.extra["score"] for record in records] == scores
    assert metrics[3]["reward/mean"] == pytest.approx(sum(scores) / WANTED, rel=1e-5)
    partial_of = list(zip(waiting["prompts"]["prompt_ids"], waiting["begun"], strict=True))
    for record in resumed:  # two prompts may have partial responses that begin alike
        assert any(
            prompt == record.prompt_ids
            and partial is not None
            and record.response_ids[: len(partial["token_ids"])] == partial["token_ids"]
            and record.rollout_log_probs[: len(partial["token_ids"])] == partial["log_probs"]
            for prompt, partial in partial_of
        ), record
