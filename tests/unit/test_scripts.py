from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = sorted(ROOT.glob("scripts/slurm/*"))
SCRIPTS = sorted(ROOT.glob("scripts/*.sh")) + SLURM


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


def test_quickstart_leaves_the_folder_of_a_running_one_alone(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    with (tmp_path / ".quickstart").open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        done = run_script("quickstart.sh", RUN_DIR=str(tmp_path), VENV=str(tmp_path / "env"))
    assert done.returncode == 1 and f"a quick start is working in RUN_DIR={tmp_path}" in done.stderr
    assert (tmp_path / "sft").is_dir() and not (tmp_path / "env").exists()


def test_quickstart_refuses_a_seed_that_is_none(tmp_path: Path) -> None:
    done = run_script("quickstart.sh", SEED="one", RUN_DIR=str(tmp_path / "run"), VENV=str(tmp_path / "env"))
    assert done.returncode == 1 and "SEED=one: must be a whole number" in done.stderr


def slurm_start(run_dir: Path, status: int) -> tuple[int, str]:
    """Run ``run_until_stopped`` and all before it, with a launcher that ends at once and a scontrol that prints its arguments."""
    program = f"""
source scripts/slurm/common.sh
scontrol() {{ echo "scontrol $*"; }}
launch() {{ return {status}; }}
start "$@"
"""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", program, "job", "run.seed=1"],
        cwd=ROOT,
        env={**os.environ, "RUN_DIR": str(run_dir), "SLURM_JOB_ID": "17", "DRY_RUN": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def save_step(run_dir: Path, step: int) -> None:
    """Make a checkpoint, and a half-written one after it. The tracker file names one that does not exist."""
    for name in (f"iter_{step:07d}", f"iter_{step + 1:07d}.tmp"):
        (run_dir / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
        (run_dir / "checkpoints" / name / "COMPLETE").touch()
    (run_dir / "checkpoints" / f"iter_{step + 2:07d}").mkdir(exist_ok=True)
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(step + 2))


def test_slurm_a_stopped_job_is_requeued_until_it_makes_no_progress(tmp_path: Path) -> None:
    for step in (0, 5):
        if step:
            save_step(tmp_path, step)
        for _ in range(2):
            status, text = slurm_start(tmp_path, 75)
            assert status == 75 and "scontrol requeue 17" in text and f"at step {step}" in text
    status, text = slurm_start(tmp_path, 75)
    assert status == 1 and "no step was saved in the last 2 starts (step 5)" in text and "scontrol" not in text


def test_slurm_a_finished_job_is_not_started_again_and_a_failed_one_not_requeued(tmp_path: Path) -> None:
    assert slurm_start(tmp_path / "bad", 2)[0] == 2 and not (tmp_path / "bad" / "FINISHED").exists()
    assert "scontrol" not in slurm_start(tmp_path / "bad", 2)[1]
    assert slurm_start(tmp_path / "good", 0)[0] == 0
    assert slurm_start(tmp_path / "good", 2) == (0, f"finished already: {tmp_path / 'good' / 'FINISHED'} is there\n")


def test_slurm_requests_reach_the_launcher(tmp_path: Path) -> None:
    """The batch shell gets the signal, passes it on, and waits for what the launcher makes of it."""
    program = """
source scripts/slurm/common.sh
scontrol() { echo "scontrol $*"; }
launch() { exec python3 -c 'import signal, sys; signal.signal(signal.SIGUSR1, lambda *a: sys.exit(75)); print("up", flush=True); signal.pause()'; }
start
"""
    env = {**os.environ, "RUN_DIR": str(tmp_path), "SLURM_JOB_ID": "17", "DRY_RUN": "0"}
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", program], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None and job.stdout.readline() == "up\n"
        job.send_signal(signal.SIGUSR1)
        text, _ = job.communicate(timeout=30)
    assert job.returncode == 75 and "scontrol requeue 17" in text


def test_slurm_dry_runs(tmp_path: Path) -> None:
    command = dry_run("slurm/ppo.sbatch", "run.seed=3", RUN_DIR="runs/mine", VENV="/env", SLURM_SUBMIT_DIR=str(ROOT))
    assert command[:3] == ["/env/bin/python", "-m", "hetero_ppo.cli.launcher"]
    assert command[-2:] == ["run.dir=runs/mine", "run.seed=3"]
    save_step(tmp_path, 7)
    command = dry_run("slurm/ppo.sbatch", RUN_DIR=str(tmp_path), VENV="/env")
    assert command[-2:] == [f"run.dir={tmp_path}", f"checkpoint.load={tmp_path}"]
    cluster = {"NNODES": "4", "SLURM_JOB_ID": "40123", "SLURM_CPUS_ON_NODE": "96"}
    command = dry_run("slurm/ppo_multinode.sbatch", RUN_DIR="runs/mine", VENV="/env", **cluster)
    assert command[:5] == ["srun", "--nodes", "4", "--ntasks", "4"]
    assert command[command.index("--cpus-per-task") + 1] == "96"
    assert command[command.index("--master-port") + 1] == str(20000 + 40123 % 20000)
    done = run_script("slurm/ppo.sbatch", DRY_RUN="1")
    assert done.returncode == 1 and "RUN_DIR=<folder that all nodes see> is needed" in done.stderr


def test_slurm_nodes_meet_where_asked_and_share_a_secret(tmp_path: Path) -> None:
    """MASTER_ADDR is the user's, or the first node's name. Every job has a key of its own, which no command line shows."""
    scontrol, srun = tmp_path / "scontrol", tmp_path / "srun"
    scontrol.write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    srun.write_text('#!/bin/sh\necho "key=$HETERO_PPO_RUN_KEY at=$MASTER_ADDR args=$*"\n')
    for path in (scontrol, srun):
        path.chmod(0o755)
    job = {
        "RUN_DIR": str(tmp_path / "run"),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    seen = []
    for asked in ("", "10.0.0.7"):
        done = run_script("slurm/ppo_multinode.sbatch", **job, MASTER_ADDR=asked, DRY_RUN="1")
        assert f"--master-addr {asked or 'node7'} " in done.stdout and "RUN_KEY" not in done.stdout, done.stdout
        done = run_script("slurm/ppo_multinode.sbatch", **job, MASTER_ADDR=asked, DRY_RUN="0", SLURM_JOB_ID="1")
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("key=")]
        key, at, arguments = line.split(" ", 2)
        seen.append(key)
        assert len(key) == len("key=") + 64 and at == f"at={asked or 'node7'}" and key[4:] not in arguments
        (tmp_path / "run" / "FINISHED").unlink()
    assert seen[0] != seen[1]


@pytest.mark.parametrize("path", [path for path in SLURM if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_slurm_options_come_before_the_first_command(path: Path) -> None:
    head = path.read_text().split("\nset -euo")[0]
    assert "#SBATCH --signal=B:USR1@300" in head and "#SBATCH --requeue" in head
    assert "#SBATCH --exclusive" in head and "#SBATCH --mem=0" in head  # whole nodes: all GPUs and CPUs


@pytest.fixture
def with_gpus(tmp_path: Path) -> dict[str, str]:
    """Variables of a shell on a machine with two GPUs."""
    return {"CUDA_VISIBLE_DEVICES": "0,1", "DEVICE": "", "VENV": str(tmp_path / "env"), "DRY_RUN": "1"}


def test_the_suite_runs_on_the_cpu_and_then_gpu_tests_on_gpus(with_gpus: dict[str, str]) -> None:
    def commands(**env: str) -> list[str]:
        done = run_script("test.sh", "-k", "gae", **(with_gpus | env))
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    venv = with_gpus["VENV"]
    on_cpu = [
        f"env VENV={venv}-cpu DEVICE=cpu bash scripts/install.sh ",
        f"env CUDA_VISIBLE_DEVICES= PYTHONDONTWRITEBYTECODE= {venv}-cpu/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -k gae ",
    ]
    on_gpu = [
        f"env VENV={venv} DEVICE=gpu bash scripts/install.sh ",
        f"env TESTS_USE_GPU=1 {venv}/bin/python -m pytest -m gpu -k gae ",
    ]
    assert commands() == on_cpu + on_gpu
    assert commands(DEVICE="cpu") == on_cpu and commands(DEVICE="gpu") == on_gpu
    alone = [line.replace(f"{venv}-cpu", venv).replace("DEVICE=cpu", "DEVICE=") for line in on_cpu]
    assert commands(CUDA_VISIBLE_DEVICES="") == alone
    os.mkdir(venv)
    Path(venv, ".hetero_ppo_made_for").write_text("gpu 0\n")
    assert commands(CUDA_VISIBLE_DEVICES="") == on_cpu  # a login node: its GPU install stays as it is


def test_gpu_tests_without_a_gpu_are_refused(with_gpus: dict[str, str]) -> None:
    done = run_script("test.sh", **(with_gpus | {"DEVICE": "gpu", "CUDA_VISIBLE_DEVICES": ""}))
    assert done.returncode == 1 and "no GPU" in done.stderr


def test_a_failure_on_the_cpu_is_the_status_of_the_whole(with_gpus: dict[str, str], tmp_path: Path) -> None:
    """And GPU tests run after it; that none of them was asked for is no failure."""
    log = tmp_path / "log"
    for name, status in (("env-cpu", 1), ("env", 5)):
        (tmp_path / name / "bin").mkdir(parents=True)
        python = tmp_path / name / "bin" / "python"
        python.write_text(f"#!/bin/sh\necho {name} $TESTS_USE_GPU >>{log}\nexit {status}\n")
        python.chmod(0o755)
    bash = tmp_path / "bash"  # scripts/install.sh alone runs through it
    bash.write_text(f'#!/bin/sh\n[ $1 = scripts/install.sh ] && exit 0\nexec {shutil.which("bash")} "$@"\n')
    bash.chmod(0o755)
    env = with_gpus | {"DRY_RUN": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert run_script("test.sh", **env).returncode == 1
    assert log.read_text().splitlines() == ["env-cpu", "env 1"]
    assert run_script("test.sh", **(env | {"DEVICE": "gpu"})).returncode == 0
    bash.write_text("#!/bin/sh\nexit 3\n")
    log.unlink()
    assert run_script("test.sh", **env).returncode == 3 and not log.exists()  # nothing runs without an install
