"""The plan's memory of a CUDA device besides tensors equals sums by hand, and its groups are those that a world really makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hetero_ppo.config.checks import check_config
from hetero_ppo.config.derived import config_roles, has_servers
from hetero_ppo.config.load import AnyConfig, load_config
from hetero_ppo.config.schema import ParallelConfig, PpoConfig, RoleConfig, GeneratorKind, WeightTransfer
from hetero_ppo.config.unused import unused_options
from hetero_ppo.distributed import groups
from hetero_ppo.memory.plan import GIB, MemoryPlan, plan_memory
from hetero_ppo.memory.plan_check import Change
from hetero_ppo.memory.plan_compare import compare_reserved
from hetero_ppo.memory.plan_reserve import MIB, ReservePart, num_communicators, plan_reserve, server_parts

ROOT = Path(__file__).parents[2]
QWEN, LLAMA = "examples/memory/qwen3_8b.yaml", "examples/memory/llama3_70b.yaml"
DEVICE = int(79.1 * GIB)
ACTOR, CRITIC = 4_095_521_792, 3_784_360_960  # parameters on a rank, see test_memory_plan
GROUP = 24 * 9.2 * MIB  # of one communicator


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@cache
def loaded(path: str) -> AnyConfig:
    return load_config(path, []).config


@cache
def planned(*changes: tuple[str, Any]) -> MemoryPlan:
    return plan_memory(Change(changes).apply(loaded(QWEN)), 8, device_bytes=DEVICE)


def parts(*changes: tuple[str, Any], path: str = QWEN, world_size: int = 8, tensors: int = 0) -> dict[str, int]:
    """Name -> bytes in the weight sync, in which everything counts."""
    config = Change(changes).apply(loaded(path))
    check_config(config, world_size)
    servers: Sequence[ReservePart] = ()
    if isinstance(config, PpoConfig) and has_servers(config):
        servers = server_parts(config.rollout, config.memory, world_size, one_node=world_size <= 8)
    reserve = plan_reserve(config.memory, config_roles(config), world_size, has_experts=False, servers=servers)
    return {part.name: part.num_bytes for part in reserve.of_phase(tensors, generator_awake=False, syncing=True)}


def test_qwen3_8b_on_paper() -> None:
    """TP 2 x DP 4 for all roles: groups of 2, of 4 and of 8 ranks, and the world's: 4 communicators. One GPU a server: vLLM has none.

    Two contexts of 600 MiB; two cuBLAS workspaces of 8 x 4 MiB; one of Transformer Engine of 32 MiB. All that is 1200 + 4 * 220.8 + 64
    + 32 = 2179.2 MiB. To it come 5 % of the tensors; asleep, vLLM's graphs, 768 MiB; in the weight sync 256 MiB more.
    """
    plan = planned()
    phases = {phase.phase: phase for phase in plan.phases}
    always = int(2179.2 * MIB)
    assert phases["rollout"].reserve == always + int(0.05 * 2 * CRITIC)
    tensors = 9 * ACTOR + phases["train_actor"].activations
    assert phases["train_actor"].reserve == always + 768 * MIB + int(0.05 * tensors)
    sync = phases["weight_sync"]
    assert sync.reserve == always + (768 + 256) * MIB + int(0.05 * (2 * ACTOR + sync.activations + sync.ahead))
    assert sync.total == sync.counted + sync.activations + sync.ahead + sync.generator + sync.reserve
    # torch's allocator has the tensors, the workspaces that it allocates, and its slack.
    assert phases["train_actor"].pooled == tensors + (64 + 32) * MIB + int(0.05 * tensors)


def test_servers_of_several_gpus_and_nodes_have_communicators() -> None:
    """vLLM's two of its TP 4, and the weight group, in which trainer and server are on rank 0's device."""
    found = parts(path=LLAMA, world_size=64)
    assert found["vLLM's NCCL communicators"] == int(3 * GROUP)
    assert found["the weight group, trainer's end"] == int(GROUP)
    assert "vLLM's NCCL communicators" not in parts(
        ("rollout.weight_transfer", WeightTransfer.cuda_ipc), ("rollout.num_servers", 1)
    )


def test_buckets_of_a_weight_sync_are_on_the_device() -> None:
    """The largest tensor, 151,936 x 4096 in bf16, twice: as shards and joined. A bucket of 512 MiB and the largest tensor, as copies and
    packed. Where buckets are sent they stay, the whole model of 8,190,735,360 parameters, and the host has two versions of files or none.
    """
    largest, whole = 2 * 151_936 * 4096, 2 * 8_190_735_360
    bucket, collective = 512 * MIB + largest, ("rollout.weight_transfer", WeightTransfer.collective)
    plans = [
        planned(),
        planned(("rollout.weight_transfer", WeightTransfer.cuda_ipc), ("rollout.num_servers", 1)),
        planned(collective, ("rollout.max_restarts", 0), ("rollout.sleep", False)),
        planned(collective, ("rollout.tensor_parallel", 2), ("rollout.num_servers", 4)),
    ]
    found = [phase.activations for plan in plans for phase in plan.phases if phase.phase == "weight_sync"]
    by_file, sent = 2 * largest + 2 * bucket, 2 * largest + bucket + whole
    assert found == [by_file, sent, sent, by_file]
    assert [plan.host.weight_files for plan in plans] == [2 * whole, 2 * whole, 0, (2 + 4) * whole]


def test_an_engine_that_does_not_sleep_has_its_graphs_in_its_share() -> None:
    names = {part.name for phase in planned(("rollout.sleep", False)).phases for part in phase.reserves}
    assert not [name for name in names if "graphs" in name or "wake" in name]


def test_without_servers_there_is_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text(
        "kind: sft\nrun: {dir: r}\ndata: {train: a.jsonl}\nactor: {model: {path: examples/memory/qwen3_8b, dtype: bf16}}\n"
    )
    sft = parts(path=str(tmp_path / "sft.yaml"), world_size=1)
    own = parts(("rollout.engine", GeneratorKind.megatron), ("rollout.num_servers", None))
    assert not [name for found in (sft, own) for name in found if "vLLM" in name]
    assert "the trainer's NCCL communicators" not in sft


@pytest.mark.parametrize(
    ("option", "value", "part", "num_bytes"),
    [
        ("context_mib", 500, "the trainer's CUDA context", 500 * MIB),
        ("context_mib", 500, "vLLM's CUDA context", 500 * MIB),
        ("nccl_channels", 1, "the trainer's NCCL communicators", int(4 * 9.2 * MIB)),
        ("nccl_channel_mib", 10, "the trainer's NCCL communicators", 4 * 24 * 10 * MIB),
        ("cublas_mib", 17, "cuBLAS workspaces", 17 * MIB),
        ("te_workspace_mib", 4, "Transformer Engine's workspaces", 4 * MIB),
        ("engine_graphs_mib", 100, "vLLM's CUDA graphs, which it keeps asleep", 100 * MIB),
        ("engine_runtime_mib", 50, "what vLLM's weights wake with them", 50 * MIB),
        ("allocator_slack", 0.5, "slack of torch's allocator", 500),
    ],
)
def test_a_measured_value_takes_the_place_of_an_estimate(option: str, value: float, part: str, num_bytes: int) -> None:
    assert parts((f"memory.{option}", value), tensors=1000)[part] == num_bytes


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("context_mib", -1.0),
        ("nccl_channels", -2),
        ("allocator_slack", 1.0),
        ("cublas_mib", math.nan),
        ("te_workspace_mib", math.inf),
    ],
)
def test_a_size_that_no_device_has_is_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"memory.{option}={value}: "):
        parts((f"memory.{option}", value))


def test_sizes_of_servers_are_unused_without_them() -> None:
    config = load_config(QWEN, ["rollout.engine=megatron", "memory.engine_graphs_mib=1", "memory.context_mib=1"])
    told = [line for line in unused_options(config) if line.startswith("memory.")]
    assert told == ["memory.engine_graphs_mib=1.0 is not used: rollout.engine is megatron"]


@pytest.mark.parametrize(
    "layouts",
    [
        [{"tensor": 2}, {"tensor": 2}],
        [{"tensor": 2, "pipeline": 2, "context": 2}],
        [{"tensor": 4, "pipeline": 2}, {}],
        [{"tensor": 2, "expert": 4, "sequence": True}],
        [{"pipeline": 4, "expert": 2}, {"context": 4}],
    ],
)
def test_communicators_are_those_of_the_groups_that_a_world_makes(layouts: list[dict[str, int]]) -> None:
    """A world of 8 ranks that exchange nothing; every group of more than one rank, and the world itself."""
    roles = {f"role{place}": RoleConfig(parallel=ParallelConfig(**layout)) for place, layout in enumerate(layouts)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        for name, role in roles.items():
            groups.role_groups(name, role.parallel)
        made = [division for division in groups._made.groups if len(division[0]) > 1]
    finally:
        groups._made.forget()
        dist.destroy_process_group()
    assert num_communicators(roles, 8) == 1 + len(made)


def test_one_rank_has_no_communicator() -> None:
    assert num_communicators({"actor": RoleConfig()}, 1) == 0


def test_plan_and_reserved_memory_side_by_side() -> None:
    plan = planned()
    reserved = {phase.phase: phase.pooled for phase in plan.phases if phase.phase != "scores"}
    reserved["train_actor"] *= 2
    lines = compare_reserved(plan, reserved).splitlines()
    assert len(lines) == 1 + 7 + 1
    assert {line.split()[0]: line.split()[-2] for line in lines[1:]} == {
        **{phase: "+0.00" for phase in reserved},
        "train_actor": "-50.00",
        "the": "-50.00",
    }
