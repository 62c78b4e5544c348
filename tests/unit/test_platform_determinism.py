"""Variables that CUDA's bits depend on are set before anything runs, and a user's own values stay and are reported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_bridge.platform.determinism import VARIABLES, set_deterministic


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_variables_are_set() -> None:
    environment: dict[str, str] = {}
    assert set_deterministic(environment) == {}
    assert environment == dict(VARIABLES)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_values_of_the_user_stay_and_are_returned() -> None:
    environment = {"NCCL_ALGO": "Tree", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert set_deterministic(environment) == {"NCCL_ALGO": "Tree"}
    assert environment["NCCL_ALGO"] == "Tree" and environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
