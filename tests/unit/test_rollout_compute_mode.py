"""A GPU that takes one process alone is refused before a server is started on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetero_ppo.rollout.servers.compute_mode import check_compute_mode, exclusive_devices, mps_runs

ANSWER = """0, GPU-aa, Default
1, GPU-bb, Exclusive_Process
2, GPU-cc, Exclusive_Process
"""


@pytest.mark.parametrize(
    ("visible", "found"), [(None, ["1", "2"]), ("0", []), ("0,2", ["2"]), ("GPU-bb", ["1"]), ("", [])]
)
def test_exclusive_devices_among_the_visible_ones(visible: str | None, found: list[str]) -> None:
    assert exclusive_devices(ANSWER, visible) == found


def test_an_exclusive_device_is_refused_unless_mps_shares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<X\n{ANSWER}X\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "mps"))
    with pytest.raises(ValueError, match="GPU 2: compute mode Exclusive_Process .*nvidia-smi -c DEFAULT"):
        check_compute_mode()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_compute_mode()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    (tmp_path / "mps").mkdir()
    (tmp_path / "mps" / "control").touch()
    assert mps_runs({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path / "mps")})
    check_compute_mode()
