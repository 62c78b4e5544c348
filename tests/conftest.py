"""Fixtures of all tests. This file also hides GPUs and runs the tiny chain once for all tests that read its results."""

from __future__ import annotations

import os

#: Tests compute on the CPU on every machine, but with this variable (scripts/test.sh, scripts/gpu_check.sh). Nothing has asked for a
#: device before this line.
USES_GPU = os.environ.get("TESTS_USE_GPU") == "1"
if not USES_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import fcntl
import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers import chain as tiny_chain
import pytest
from tests.helpers.ranks import run_ranks


MEGATRON_STEPS = 2

# A million objects of imported modules are not looked through for garbage, neither while they come nor later.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that are marked gpu, or gpu(n), where fewer GPUs are visible."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("gpu"))]
    if not marked:
        return
    import torch

    visible = torch.cuda.device_count() if USES_GPU else 0
    for item, marker in marked:
        needed = marker.args[0] if marker.args else 1
        if visible < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs and TESTS_USE_GPU=1; {visible} are visible"))


def _variables_of_runs() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("HETERO_PPO_")}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Return the log records of the package from level info on."""
    caplog.set_level(logging.INFO, logger="hetero_ppo")
    return caplog


@pytest.fixture(autouse=True)
def _leaves_no_variable_of_a_run() -> Iterator[None]:
    """A test that leaves a key or a rank behind would be part of the runs that later tests start."""
    before = _variables_of_runs()
    yield
    assert _variables_of_runs() == before, (
        "the test changed the environment of this process (monkeypatch.setenv undoes it)"
    )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that ``make`` fills. The first of pytest-xdist's processes that asks calls it, and the others wait."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = root.with_suffix(".made")
        if not made.exists():
            assert not root.exists(), f"{root} could not be made; the first test that asked for it says why"
            root.mkdir()
            make(root)
            made.touch()
    return root


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tiny_chain.Chain:
    """SFT, reward model and PPO with a real vLLM server; see tests/helpers/chain.py."""
    return tiny_chain.Chain(made_once(tmp_path_factory, "chain", tiny_chain.run_chain))


@pytest.fixture(scope="session")
def one_process(chain: tiny_chain.Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process that repeat parts of the chain: ``ppo_resumed``, ``sft_resumed``, ``sft_unexported``, ``sft_gone_back``
    (to its first checkpoint, in its folder), ``log``."""

    def make(root: Path) -> None:
        ppo, sft = chain.run_dir("ppo"), chain.run_dir("sft")
        resume_ppo = {"checkpoint__load": root / "ppo_at_2", "train__replay_rollouts": ppo / "rollouts"}
        only_step(ppo, tiny_chain.CHECKPOINT_STEP, root / "ppo_at_2")
        only_step(sft, tiny_chain.SFT_CHECKPOINT_STEP, root / "sft_at_5")
        unexported = root / "sft_unexported"
        only_step(sft, tiny_chain.SFT_STEPS, unexported)
        gone_back = root / "sft_gone_back"
        shutil.copytree(sft, gone_back)
        with (gone_back / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "met')  # as a kill leaves it
        go_back = {"checkpoint__load": gone_back, "checkpoint__step": tiny_chain.SFT_CHECKPOINT_STEP}
        commands = [
            chain.train_command("ppo", root / "ppo_resumed", **resume_ppo),
            chain.train_command("sft", root / "sft_resumed", checkpoint__load=root / "sft_at_5"),
            chain.train_command("sft", unexported, checkpoint__load=unexported),
            chain.train_command("sft", gone_back, **go_back),
            ["!", *chain.train_command("sft", sft)],
            ["!", *chain.train_command("ppo", root / "ppo_no_steps", checkpoint__load=ppo)],
            ["!", *chain.train_command("sft", root / "sft_no_steps", checkpoint__load=sft)],
        ]
        (root / "log").write_text(tiny_chain.launch_all(1, commands))

    return made_once(tmp_path_factory, "one_process", make)


@pytest.fixture(scope="session")
def two_processes(chain: tiny_chain.Chain, one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded rollouts again on two processes: ``dp2``, ``resumed`` (DP 2). And ``megatron`` (DP 2), whose rollouts are its own actor's; and what
    the commands on the reward model say in other layouts than it was trained in: ``pairs.html``, ``scores.jsonl``."""

    def make(root: Path) -> None:
        replay = {"train__replay_rollouts": chain.run_dir("ppo") / "rollouts"}
        commands = [
            chain.train_command("ppo", root / "dp2", **replay),
            chain.train_command("ppo", root / "resumed", checkpoint__load=one_process / "ppo_at_2", **replay),
            chain.train_command("ppo", root / "megatron", rollout__engine="megatron", train__steps=MEGATRON_STEPS),
        ]
        reward_model = ["--checkpoint", str(chain.export("rm")), "--tensor", "2", "--sequence"]
        pairs = ["--data", str(chain.data / "preference_eval.jsonl"), "--out", str(root / "pairs.html")]
        ids = [pair["chosen_ids"] for pair in tiny_chain.golden_lines(chain)]
        (root / "ids.jsonl").write_text("".join(json.dumps({"token_ids": one}) + "\n" for one in ids))
        commands += [
            ["verify", "rm", *reward_model],
            ["eval", "rm", *reward_model, *pairs],
            ["score", *reward_model, "--data", str(root / "ids.jsonl"), "--out", str(root / "scores.jsonl")],
        ]
        (root / "log").write_text(tiny_chain.launch_all(2, commands))

    return made_once(tmp_path_factory, "two_processes", make)


@pytest.fixture(scope="session")
def reference_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that tests/reference compares with steps in plain torch, in several layouts; see tests/reference/configurations.py."""

    def make(root: Path) -> None:
        from tests.reference import configurations

        configurations.prepare(root)
        for processes in (1, 2):
            files = configurations.config_files(root, processes)
            if files:
                commands = json.dumps([["train", "--config", str(file)] for file in files])
                run_ranks(processes, [str(configurations.WORKER), commands])

    return made_once(tmp_path_factory, "reference", make)


def only_step(run_dir: Path, step: int, copy: Path) -> None:
    """Make a run folder whose newest checkpoint is that of ``step``."""
    name = f"iter_{step:07d}"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "checkpoints" / name).symlink_to(run_dir / "checkpoints" / name)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """This process as the one rank of a world, with one thread, for the tests of a module."""
    import torch

    from hetero_ppo.distributed.groups import finish, initialise

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for name, value in {**here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        initialise(2.0)
        yield
        finish()
