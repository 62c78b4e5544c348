"""Options that a configuration leaves to the device are decided before the run begins, saved with it, and kept by a run that resumes from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.test_resume_changes import configured, save_checkpoint

from hetero_ppo.cli.main import main
from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.devices import dtype_of
from hetero_ppo.config.load import AnyConfig, load_config
from hetero_ppo.config.render import save_config
from hetero_ppo.config.schema import Dtype, ModelConfig
from hetero_ppo.health.mismatch import mismatch_bounds
from hetero_ppo.runtime.resume import read_resume
from hetero_ppo.runtime.settle import settle

BF16, FP32 = Dtype.bf16, Dtype.fp32


def dtypes(config: AnyConfig) -> dict[str, Dtype]:
    return {name: dtype_of(role.model) for name, role in config_roles(config).items()}


@pytest.mark.parametrize(("on_cuda", "default"), [(True, BF16), (False, FP32)])
def test_null_goes_by_the_device(tmp_path: Path, on_cuda: bool, default: Dtype) -> None:
    given = [
        "critic.model.dtype=fp32",
        "reward_model=null",
        "reward_models=[{model: {path: a, dtype: bf16}}, {model: {path: b}}]",
    ]
    loaded, lines = settle(configured(tmp_path, "ppo", *given), on_cuda=on_cuda)
    expected = {
        "actor": default,
        "critic": FP32,
        "reference": default,
        "reward_models.0": BF16,
        "reward_models.1": default,
    }
    assert dtypes(loaded.config) == expected
    device = "CUDA" if on_cuda else "a CPU"
    fields = "actor.model.dtype, reference.model.dtype, reward_models.1.model.dtype"
    assert lines == [f"{default.value} for {fields}: the default on {device}"]
    # The engine's dtype stays the actor's, and so does what may differ between the two.
    assert loaded.config.rollout.dtype is None
    assert [bound.limit for bound in mismatch_bounds(loaded.config)] == ([0.1, 1] if on_cuda else [1e-3, 0.01])
    # What the run saves names them, so that it reads back the same on any device.
    save_config(loaded, str(tmp_path / "saved.yaml"))
    again = load_config(str(tmp_path / "saved.yaml"), [])
    assert settle(again, on_cuda=not on_cuda) == (again, []) and again.config == loaded.config


def test_an_open_dtype_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="somewhere: the dtype is open"):
        dtype_of(ModelConfig(path="somewhere"))


@pytest.mark.parametrize("kind", ["ppo", "rm"])
def test_a_run_that_goes_on_keeps_the_checkpoints_dtypes(tmp_path: Path, kind: str) -> None:
    """On the same device it is not a changed run, and on another one it stays what it was, which is printed."""
    written, _ = settle(configured(tmp_path, kind), on_cuda=False)
    run_dir = save_checkpoint(written)
    for on_cuda in (False, True):
        loaded, (line,) = settle(configured(tmp_path, kind, f"checkpoint.load={run_dir}"), on_cuda=on_cuda)
        assert set(dtypes(loaded.config).values()) == {FP32}
        assert line.startswith("fp32 for ")
        assert line.endswith(
            ": as in the checkpoint; the default on CUDA is bf16" if on_cuda else ": the default on a CPU"
        )
        resume = read_resume(loaded)
        assert resume is not None and resume.changes == []
    role = "actor" if kind == "ppo" else "reward"
    changed, _ = settle(
        configured(tmp_path, kind, f"checkpoint.load={run_dir}", f"{role}.model.dtype=bf16"), on_cuda=True
    )
    with pytest.raises(
        ValueError, match=f"stored in another form than this run reads: {role}.model.dtype: fp32 -> bf16"
    ):
        read_resume(changed)


def test_a_checkpoint_that_is_not_there_is_left_to_the_resume(tmp_path: Path) -> None:
    loaded, _ = settle(configured(tmp_path, "sft", f"checkpoint.load={tmp_path}"), on_cuda=True)
    assert dtypes(loaded.config) == {"actor": BF16}
    with pytest.raises(ValueError, match="no complete checkpoint"):
        read_resume(loaded)


def test_a_plan_with_the_size_of_a_gpu_is_one_for_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    model = {"path": "examples/memory/llama3_8b"}
    file = tmp_path / "rm.yaml"
    file.write_text(
        json.dumps(
            {"kind": "rm", "run": {"dir": str(tmp_path)}, "data": {"train": "a.jsonl"}, "reward": {"model": model}}
        )
    )
    sizes = {}
    for size in ("--device-gib=400", None):
        options = [
            "--config",
            str(file),
            "--host-gib=2000",
            "--json",
            str(tmp_path / "plan.json"),
            *([size] if size else []),
        ]
        assert main(["plan", *options]) == 0
        (role,) = json.loads((tmp_path / "plan.json").read_text())["roles"]
        sizes[role["dtype"]] = role["parameters_per_rank"]
        assert (
            f"{role['dtype']} for reward.model.dtype: the default on {'CUDA' if size else 'a CPU'}"
            in capsys.readouterr().out
        )
    assert set(sizes) == {"bf16", "fp32"}
