"""The whole tiny chain, run once for all tests that look at it: data, tokenizer, model, SFT, reward model, PPO with vLLM."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.helpers.ranks import ENVIRONMENT, outer_environment, run_ranks

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests" / "helpers" / "commands_worker.py"
#: In the environment of everything that a run starts, so that what it left can be found.
MARK = "HETERO_PPO_TEST_MARK"

STAGES = ("sft", "rm", "ppo")
NUM_STEPS = 3
CHECKPOINT_STEP = 2
SFT_STEPS, SFT_CHECKPOINT_STEP = 8, 5
BATCH, MINIBATCH = 16, 8
MAX_PROMPT_TOKENS, MAX_SEQUENCE_TOKENS = 64, 96
ROWS = {
    "sft_rows": 192,
    "sft_eval_rows": 24,
    "preference_rows": 96,
    "preference_eval_rows": 24,
    "prompt_rows": 96,
    "heldout_rows": 12,
}


@dataclass(frozen=True)
class Chain:
    """Folder of the chain's files. ``<stage>/hf`` is a stage's export, ``<stage>.log`` its output."""

    root: Path

    @property
    def configs(self) -> dict[str, Path]:
        """Stage -> YAML file."""
        return {stage: self.root / f"{stage}.yaml" for stage in STAGES}

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def init(self) -> Path:
        return self.root / "init"

    @property
    def template(self) -> Path:
        """Chat template of the SFT run. Its export hands the template to the runs that start from it."""
        return self.root / "template.jinja"

    def run_dir(self, stage: str) -> Path:
        return self.root / stage

    def export(self, stage: str) -> Path:
        return self.root / stage / "hf"

    def train_command(self, stage: str, run_dir: Path, **overrides: Any) -> list[str]:
        """Return the arguments of ``hetero-ppo`` that run a stage in another folder. An override ``a.b=c`` is written ``a__b=c``."""
        fields = {"run.dir": run_dir} | {name.replace("__", "."): value for name, value in overrides.items()}
        return ["train", "--config", str(self.configs[stage]), *(f"{name}={value}" for name, value in fields.items())]


def environment(mark: str) -> dict[str, str]:
    """Return the environment of a launched run: one thread per process, no downloads, and the mark."""
    return {**outer_environment(), **ENVIRONMENT, "PYTHONUNBUFFERED": "1", MARK: mark}


def launch_command(num_processes: int, program: Sequence[str]) -> list[str]:
    """Return the command that scripts/train_*.sh start: the launcher around ``-m module ...`` or ``file.py ...``."""
    torchrun = [sys.executable, "-m", "hetero_ppo.cli.launcher", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(num_processes), *program]


def run_in_session(command: Sequence[str], mark: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing left of it after a timeout; stdout and stderr together."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(mark),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun's ranks are in its group, and end the rollout servers
            text, _ = process.communicate()
            raise AssertionError(f"{' '.join(command)} took over {timeout_s} s:\n{text[-6000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, text)


def launch(
    num_processes: int, program: Sequence[str], *, timeout_s: float = 400.0, check: bool = True, mark: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run under the launcher; stdout and stderr together. Fails the test when the run fails and ``check`` is set."""
    done = run_in_session(launch_command(num_processes, program), mark or uuid.uuid4().hex, timeout_s)
    if check and done.returncode:
        raise AssertionError(f"exit status {done.returncode} of {' '.join(program)}:\n{done.stdout[-6000:]}")
    return done


def launch_cli(num_processes: int, command: Sequence[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Launch one ``hetero-ppo`` command."""
    return launch(num_processes, ["-m", "hetero_ppo.cli.main", *command], **kwargs)


def launch_nodes(num_nodes: int, command: Sequence[str], *, timeout_s: float = 400.0) -> list[str]:
    """Run one ``hetero-ppo`` command on several "nodes": launchers of one process each, on this machine. Return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mark = uuid.uuid4().hex

    def node(rank: int) -> str:
        rendezvous = [
            "--nnodes",
            str(num_nodes),
            "--node-rank",
            str(rank),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(port),
        ]
        program = ["--nproc-per-node", "1", "-m", "hetero_ppo.cli.main", *command]
        done = run_in_session([sys.executable, "-m", "hetero_ppo.cli.launcher", *rendezvous, *program], mark, timeout_s)
        assert done.returncode == 0, f"node {rank}: exit status {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    with ThreadPoolExecutor(num_nodes) as pool:
        return list(pool.map(node, range(num_nodes)))


def launch_all(num_processes: int, commands: Sequence[list[str]]) -> str:
    """Run several ``hetero-ppo`` commands in forked ranks, without the launcher. Return their output."""
    return run_ranks(num_processes, [str(WORKER), json.dumps(commands)])


def read_metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> metric -> value."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["metrics"] for record in map(json.loads, lines)}


def run_chain(root: Path) -> Chain:
    """Run the chain from data to an exported PPO actor."""
    # transformers and torch take seconds to import, which collecting tests should not.
    from hetero_ppo.cli.main import main
    from hetero_ppo.data.tokenizer_training import CHATML_TEMPLATE

    chain = Chain(root)
    write_data(chain.data)
    chain.template.write_text("{# not the tokenizer's own #}" + CHATML_TEMPLATE)
    tokenizer = ["tokenizer", "--input", str(chain.data / "sft.jsonl"), "--vocab-size", "300"]
    assert main([*tokenizer, "--out", str(root / "tokenizer")]) == 0
    sizes = "--family qwen3 --hidden-size 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 32 --ffn 128 --init-std 0.1"
    model = ["init-model", *sizes.split(), "--tokenizer", str(root / "tokenizer"), "--out", str(chain.init)]
    assert main(model) == 0
    for stage, config in configs(chain).items():
        chain.configs[stage].write_text(json.dumps(config, indent=1))  # JSON is YAML
    for stage in STAGES:
        command = ["train", "--config", str(chain.configs[stage])]
        text = launch_all(1, [command]) if stage == "sft" else launch_cli(1, command).stdout
        (root / f"{stage}.log").write_text(text)
    return chain


def golden_lines(chain: Chain) -> list[dict[str, Any]]:
    """Read the pairs of the reward model's golden scores."""
    lines = (chain.export("rm") / "golden_scores.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def write_data(folder: Path) -> None:
    """Write a small data set of the word-sort demo."""
    demo = _load_module(ROOT / "examples" / "word_sort" / "make_data.py")
    folder.mkdir()
    for name, rows in demo.make_rows(0, demo.Recipe(min_words=2, max_words=4, **ROWS)).items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def configs(chain: Chain) -> dict[str, dict[str, Any]]:
    """Stage -> config. fp32 and one thread throughout; PPO uses what has a state to lose or ranks to disagree on."""

    def run(stage: str) -> dict[str, Any]:
        return {"dir": str(chain.run_dir(stage)), "threads": 1}

    def data(train: str, held_out: str, **limit: int) -> dict[str, Any]:
        return {"train": str(chain.data / train), "eval": str(chain.data / held_out), **limit}

    def role(path: Path, micro_batch_size: int, lr: float | None = None, **optimizer: Any) -> dict[str, Any]:
        model = {"model": {"path": str(path)}, "micro_batch_size": micro_batch_size}
        return model if lr is None else {**model, "optimizer": {"lr": lr, **optimizer}}

    sft, rm = chain.export("sft"), chain.export("rm")
    return {
        "sft": {
            "kind": "sft",
            "run": run("sft"),
            "data": {
                **data("sft.jsonl", "sft_eval.jsonl", max_sequence_tokens=MAX_SEQUENCE_TOKENS),
                "chat_template": str(chain.template),
            },
            "actor": role(chain.init, 32, 2e-3, lr_schedule="cosine", warmup_steps=2),
            "train": {"steps": SFT_STEPS, "global_batch_size": 32},
            "checkpoint": {"every": SFT_CHECKPOINT_STEP},
        },
        "rm": {
            "kind": "rm",
            "run": run("rm"),
            "data": data("preference.jsonl", "preference_eval.jsonl", max_sequence_tokens=MAX_SEQUENCE_TOKENS),
            "reward": {**role(sft, 32, 1e-3), "aligned": True},
            "train": {"steps": 4, "global_batch_size": 16},
        },
        "ppo": {
            "kind": "ppo",
            "run": run("ppo"),
            "data": data("prompts.jsonl", "heldout.jsonl", max_prompt_tokens=MAX_PROMPT_TOKENS),
            "actor": role(sft, 3, 3e-4, distributed=True),
            "critic": role(rm, 4, 1e-3),
            "reference": role(sft, 16),
            "reward_model": {**role(rm, 16), "aligned": True},
            "reward": {"normalise": True, "golden_every": 1},
            "algorithm": {
                "rollout_batch_size": BATCH // 2,
                "samples_per_prompt": 2,
                "minibatch_size": MINIBATCH,
                "ppo_epochs": 2,
                "dual_clip": 3.0,
                "value_clip": 3.0,  # wide: of hundreds of tokens on its edge, rounding would move one to the other side
                "entropy_coef": 0.01,
                "truncated": "penalise",
                "kl": {"controller": "adaptive", "horizon": 100, "target": 0.5, "loss_coef": 0.02},
            },
            "rollout": {
                "max_num_seqs": 6,  # a step's 16 responses are three chunks of the pipeline
                "kv_cache_mib": 32,
                "server_threads": 1,
                "sleep": True,  # on a CPU it frees nothing, but every call of it is made
                "sampling": {"max_tokens": 12, "temperature": 0.8},
                "eval_sampling": {"max_tokens": 12},
            },
            "train": {
                "steps": NUM_STEPS,
                "eval_function": str(ROOT / "examples" / "word_sort" / "check.py") + ":exact",
            },
            "checkpoint": {"every": CHECKPOINT_STEP},
        },
    }
