"""A failure is reported in one clear error, soon, and leaves nothing running."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tests.helpers.chain import Chain, launch_all, launch_cli, read_metrics
from tests.helpers.processes import RunningJob, running, wait_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hetero_ppo.rollout.replay import read_rollouts

pytestmark = pytest.mark.slow

#: A start on a busy machine; a quiet one needs a quarter of it.
START_S = 180.0
#: From the failure to the end of the run.
SOON_S = 60.0


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"error( \(rank \d+\))?: ", line)]


def assert_one_error(text: str, status: int, message: str) -> None:
    """Assert that the output ends with the error and the launcher's line, and has nothing that looks like a crash."""
    first, last = errors(text)
    assert re.match(message, first), text
    assert last == f"error: rank 0 ended with exit status {status}; see the error above", text
    # A traceback of ours begins its line; the end of a server's log, which the error quotes, is indented.
    assert not re.search("^Traceback", text, re.MULTILINE) and "ChildFailedError" not in text, text


def kill(job: RunningJob, part: str) -> None:
    """Send SIGKILL to the one process with ``part`` in its command line. The guardian's contains that of its server."""
    (pid,) = set(job.find(part)) - set(job.find("guardian.py"))
    os.kill(pid, signal.SIGKILL)


def test_a_bad_key_is_named_once_for_all_ranks(chain: Chain, tmp_path: Path) -> None:
    done = launch_cli(2, chain.train_command("ppo", tmp_path / "run", train__stps=3), check=False, timeout_s=SOON_S)
    assert done.returncode == 2
    (error, last) = errors(done.stdout)
    assert re.fullmatch(r"error( \(rank 1\))?: .*unknown key 'train.stps'; did you mean 'train.steps'\?", error)
    assert re.fullmatch(r"error: rank [01] ended with exit status 2; see the error above", last)
    assert len(done.stdout.splitlines()) == 2 and not (tmp_path / "run").exists()


def test_a_malformed_line_is_named_by_file_and_number(chain: Chain, tmp_path: Path) -> None:
    lines = (chain.data / "prompts.jsonl").read_text().splitlines()
    lines[6] = lines[6].replace('"prompt"', '"prmpt"')
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(lines) + "\n")
    text = launch_all(1, [["!", *chain.train_command("ppo", tmp_path / "run", data__train=data)]])
    assert (
        re.match(rf"error: {re.escape(str(data))}, line 7, field 'prompt': is missing", errors(text)[0])
        and len(errors(text)) == 1
    )
    assert not (tmp_path / "run" / "rollout").exists()  # before any server was started


def test_a_missing_tensor_is_named(chain: Chain, tmp_path: Path) -> None:
    """Said at once, though the rollout server is being started at that moment."""
    model = tmp_path / "model"
    shutil.copytree(chain.export("sft"), model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    command = chain.train_command("ppo", tmp_path / "run", actor__model__path=model)
    with running(1, command, tmp_path / "run") as job:
        assert job.wait_end(SOON_S) == 2
        assert_one_error(job.text, 2, r"error: .*model\.layers\.1\.mlp\.up_proj\.weight")
        assert str(model) in errors(job.text)[0]
        wait_for(lambda: not job.processes, "the server to end", 10.0)


def test_a_killed_server_is_restarted_until_no_restart_is_left(chain: Chain, tmp_path: Path) -> None:
    """The API server is killed after the first step, and the engine core some steps later.

    The run starts from PPO's export: vLLM loads it unedited.
    """
    run_dir, actor = tmp_path / "run", chain.export("ppo")
    command = chain.train_command("ppo", run_dir, train__steps=400, actor__model__path=actor, data__eval="null")
    command += ["algorithm.minibatch_size=16", "algorithm.ppo_epochs=1", "rollout.sampling.temperature=1.0"]
    command += ["train.eval_function=null", "checkpoint.every=0", "rollout.max_restarts=1"]
    with running(1, command, run_dir) as job:
        job.wait_steps(1, START_S)
        kill(job, "vllm.entrypoints.openai.api_server")
        wait_for(lambda: "restart 1 of 1" in job.text, "the restart", SOON_S)
        job.wait_steps(job.steps_done() + 2, START_S)
        assert not errors(job.text)
        kill(job, "EngineCore")
        assert job.wait_end(SOON_S) == 1
        assert_one_error(
            job.text, 1, r"error: (generate|weight sync|prompt_log_probs|wake|sleep): rollout server 0 .* died"
        )
        assert "rollout.max_restarts allows 1" in job.text and "server_0.log" in job.text
        assert "warning: checkpoint.every is 0 and the run has 400 steps to go" in job.text
        job.assert_nothing_is_left()
    metrics = read_metrics(run_dir)
    assert len(metrics) >= 3 and list(metrics) == list(range(1, len(metrics) + 1))
    for values in metrics.values():
        assert values["rollout/log_prob_diff_max"] < 1e-3 and values["rollout/probe_log_prob_diff"] < 1e-3
        # One minibatch and one epoch: the loss sees the policy that made the old log-probs.
        assert abs(values["actor/ppo_kl"]) < 1e-5 and values["actor/pg_clipfrac"] == 0
    assert_server_and_transformers_agree(run_dir, actor)


@torch.no_grad()
def assert_server_and_transformers_agree(run_dir: Path, actor: Path) -> None:
    """Assert that vLLM's log-probs of the first rollout are those of the exported weights."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(actor, dtype=torch.float32)
    for row in read_rollouts(run_dir / "rollouts" / "step_000001.jsonl"):
        logits = model(torch.tensor([row.prompt_ids + row.response_ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        ours = logits.log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]
        assert float((ours - torch.tensor(row.rollout_log_probs)).abs().max()) < 1e-3
