"""The memory plan against figures worked out by hand, its refusals, and what the command prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hetero_ppo.cli.main import main
from hetero_ppo.config.load import AnyConfig, load_config
from hetero_ppo.memory.plan import GIB, MemoryPlan, plan_memory
from hetero_ppo.memory.plan_check import check_fits
from hetero_ppo.memory.plan_compare import compare
from hetero_ppo.memory.plan_limits import Limits, find_limits, machine_host_bytes
from hetero_ppo.memory.plan_text import bar, plan_values, render_plan
from hetero_ppo.step.kinds import Kind

ROOT = Path(__file__).parents[2]
QWEN, LLAMA = "examples/memory/qwen3_8b.yaml", "examples/memory/llama3_70b.yaml"
SERIAL = "pipeline.overlap=false"
DEVICE = int(79.1 * GIB)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model folders of the examples are relative to it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def config_of(path: str, *overrides: str) -> AnyConfig:
    return load_config(path, list(overrides)).config


def held(plan: MemoryPlan, phase: str) -> dict[str, dict[Kind, int]]:
    found = next(one for one in plan.phases if one.phase == phase)
    return {role: dict(kinds) for role, kinds in found.roles.items()}


def test_qwen3_8b_on_paper() -> None:
    """TP 2 x DP 4, SP, distributed optimizer; every size is a multiple of 128, so nothing is padded.

    A layer, whole: qkv (32 + 2 * 8) * 128 * 4096 = 25,165,824; output 4096 * 4096 = 16,777,216; gate and up
    2 * 12288 * 4096 = 100,663,296; down 50,331,648; norms 2 * 4096 + 2 * 128 = 8,448. On a rank of TP 2:
    192,937,984 / 2 + 8,448 = 96,477,440, times 36 layers = 3,473,187,840.
    Embedding and output layer: 2 * 151,936 * 4096 / 2 = 622,329,856. Last norm 4,096. In all 4,095,521,792.
    The critic has 4,096 parameters for an output layer of 311,164,928: 3,784,360,960.
    """
    config = config_of(QWEN, "residency.pcie_gb_s=12.5", "residency.device_gib=79.1", "residency.host_gib=900")
    limits = find_limits(config.residency)
    assert (limits.device, limits.host) == (DEVICE, 900 * GIB)
    plan = plan_memory(config, 8, device_bytes=limits.device)
    actor, critic = 4_095_521_792, 3_784_360_960
    assert [role.parameters_per_rank for role in plan.roles] == [actor, critic, actor, critic]
    assert plan.roles[0].parameters == 8_190_735_360
    # bf16: 2 bytes; fp32 gradients: 4; main parameters and two moments in fp32, over 4 ranks: 1 and 2.
    training = {Kind.params: 2, Kind.grads: 4, Kind.main_params: 1, Kind.moments: 2}
    assert held(plan, "train_actor") == {"actor": {kind: size * actor for kind, size in training.items()}}
    assert held(plan, "train_critic") == {"critic": {kind: size * critic for kind, size in training.items()}}
    assert held(plan, "rollout") == held(plan, "scores") == {"reward_model": {Kind.params: 2 * critic}}
    assert held(plan, "weight_sync") == {"actor": {Kind.params: 2 * actor}}

    phases = {phase.phase: phase for phase in plan.phases}
    # Micro-batches of 2 * 4096 = 8192 tokens, full recomputation. Kept: 36 layer inputs 8192 * 4096 / 2 * 2 bytes
    # = 33,554,432 each; the last norm 8192 * (2 * 2 * 4096 + 4) / 2 = 67,125,248; logits 8192 * 75,968 * 2
    # = 1,244,659,712. At work: their gradient, as large, and three fp32 slices of 2^26 logits, 805,306,368.
    assert phases["train_actor"].activations == 36 * 33_554_432 + 67_125_248 + 2 * 1_244_659_712 + 805_306_368
    # The way out: critic parameters, main parameters, moments; in: the actor's. 25e9 bytes a second each way.
    assert (phases["train_actor"].copied_out, phases["train_actor"].copied_in) == (5 * critic, 5 * actor)
    assert phases["train_actor"].seconds(25.0, overlap=False) == pytest.approx(5 * (critic + actor) / 25e9)
    assert phases["train_actor"].seconds(25.0, overlap=True) == pytest.approx(0.819, abs=5e-4)
    values = next(phase for phase in plan_values(plan, limits)["phases"] if phase["phase"] == "train_actor")
    assert values["seconds_serial"] == pytest.approx(5 * (critic + actor) / 12.5e9)
    assert "copies of a rank at 12.5 GB/s" in render_plan(plan, limits)
    # After forwards parameters are as the host has them: nothing is copied out.
    assert {name for name, phase in phases.items() if phase.copied_out} == {"rollout", "train_actor", "weight_sync"}
    assert phases["rollout"].copied_out == 2 * actor
    assert phases["values"].copied_in == 2 * critic
    assert phases["train_critic"].copied_in == 3 * critic  # its parameters are there
    # The turn after "values" is the critic's training, of which all but the parameters may come ahead; "train_critic"
    # leaves room for what the actor's training, the largest turn, is larger.
    serial = {phase.phase: phase for phase in plan_memory(config_of(QWEN, SERIAL), 8, device_bytes=DEVICE).phases}
    assert serial["values"].ahead == 7 * critic
    assert [phase.phase for phase in serial.values() if phase.generator] == ["rollout", "weight_sync"]
    # Beside generation the generator is awake in the forwards. In "values" it is not while the optimizer comes in: the larger
    # of the two counts, which is the generator here.
    assert (phases["values"].ahead, phases["values"].generator) == (0, phases["rollout"].generator)
    assert (phases["ref_log_probs"].ahead, phases["ref_log_probs"].generator) == (
        2 * actor,
        phases["rollout"].generator,
    )
    assert phases["train_critic"].ahead == 9 * (actor - critic)
    assert (phases["rollout"].generator, phases["weight_sync"].generator) == (int(0.6 * DEVICE), 2 * 8_190_735_360)
    assert plan.peak.phase == "ref_log_probs" and max(serial.values(), key=lambda phase: phase.total).phase == "rollout"
    # 8 ranks; trained roles 2 + 1 + 2 bytes a parameter, the others 2; two versions of the weights on their way.
    assert plan.host.pinned == {
        "actor": 40 * actor,
        "critic": 40 * critic,
        "reference": 16 * actor,
        "reward_model": 16 * critic,
    }
    # A checkpoint: 2 tensor-parallel ranks write 2 bytes a parameter, and with the other data-parallel ranks 12 of the optimizer.
    assert plan.host.checkpoint == 2 * (2 + 12) * (actor + critic)
    # A load holds the largest tensor at a time, on each rank: the slice of half the embedding, in fp32.
    assert plan.host.loading == 8 * 4 * 151_936 // 2 * 4096
    assert plan.host.total == (56 + 28) * (actor + critic) + 2 * 2 * 8_190_735_360


def test_an_ensemble_takes_turns_and_each_member_is_counted() -> None:
    """Two more scorers, one of them in a layout of its own: DP 8, so whole on every rank."""
    model = "model: {path: examples/memory/qwen3_8b, dtype: bf16}"
    members = [f"{{{model}, parallel: {{tensor: {tensor}}}}}" for tensor in (2, 1, 2)]
    config = config_of(QWEN, "reward_model=null", f"reward_models=[{', '.join(members)}]")
    plan, single = (plan_memory(one, 8, device_bytes=DEVICE) for one in (config, config_of(QWEN)))
    scorer = held(single, "scores")["reward_model"][Kind.params]
    whole = 2 * 7_568_409_600
    names = [f"reward_models.{number}" for number in range(3)]
    assert [role.name for role in plan.roles[3:]] == names
    assert [phase.phase for phase in plan.phases][:5] == [
        "rollout",
        "scores_0",
        "scores_1",
        "scores_2",
        "ref_log_probs",
    ]
    assert held(plan, "rollout") == held(plan, "scores_0") == {names[0]: {Kind.params: scorer}}
    assert held(plan, "scores_1") == {names[1]: {Kind.params: whole}}
    phases = {phase.phase: phase for phase in plan.phases}
    assert (phases["scores_1"].computing, phases["scores_1"].copied_in, phases["scores_1"].copied_out) == (
        names[1],
        whole,
        0,
    )
    assert phases["scores_0"].ahead == whole, "the next member comes in while this one computes"
    assert [plan.host.pinned[name] for name in names] == [8 * scorer, 8 * whole, 8 * scorer]


def test_llama3_70b_on_paper() -> None:
    """Actor TP 8 x PP 2 x DP 4. A layer: qkv (64 + 2 * 8) * 128 * 8192 = 83,886,080; output 67,108,864; gate and up
    469,762,048; down 234,881,024; norms 16,384. On a rank 855,638,016 / 8 + 16,384 = 106,971,136, times 40 layers
    = 4,278,845,440. The first stage has the embedding, 128,256 * 8192 / 8 = 131,334,144; the last one an output layer of
    that size and a norm of 8,192, so it is the fuller: 4,410,187,776.

    Critic and reward model, 8B, whole on every rank (DP 64): a layer 4096 * (6144 + 4096 + 3 * 14,336) + 2 * 4096
    = 218,112,000, times 32, embedding 525,336,576, norm and head 4096 each: 7,504,928,768.
    """
    plan = plan_memory(config_of(LLAMA), 64, device_bytes=DEVICE)
    actor, critic = 4_410_187_776, 7_504_928_768
    assert [role.parameters_per_rank for role in plan.roles[:2]] == [actor, critic]
    assert plan.roles[0].parameters == 70_553_706_496
    assert sum(held(plan, "train_actor")["actor"].values()) == 9 * actor  # 2 + 4 + 4 / 4 + 8 / 4
    assert held(plan, "train_critic")["critic"] == {
        Kind.params: 2 * critic,
        Kind.grads: 4 * critic,
        Kind.main_params: critic // 16,
        Kind.moments: critic // 8,
    }
    halved = plan_memory(config_of(LLAMA, "critic.parallel.tensor=2"), 64, device_bytes=DEVICE)
    held_bytes = [sum(held(one, "train_critic")["critic"].values()) for one in (plan, halved)]
    assert (held_bytes[0] - held_bytes[1]) / GIB == pytest.approx(21, abs=0.05)
    phases = {phase.phase: phase for phase in plan.phases}
    assert phases["train_actor"].rank >= 32  # the last stage's
    assert phases["rollout"].copied_out == 2 * actor
    # TP 4 generator: a quarter of the weights, and keys and values of 2 of the 8 heads: 2 * 80 * 256 * 2 bytes a token.
    assert plan.generator is not None
    assert plan.generator.weights == 2 * 70_553_706_496 // 4
    assert plan.generator.kv_tokens == (int(0.5 * DEVICE) - plan.generator.weights) // 81_920
    # A node of 8 ranks is one pipeline stage: 8 * 5 bytes a parameter of the last; the critic 2 + 12 / 64 on each.
    assert plan.host.pinned["actor"] == 40 * actor
    assert plan.host.pinned["critic"] == 16 * critic + 8 * 12 * critic // 64


def test_without_offload_all_roles_stay() -> None:
    plan = plan_memory(config_of(QWEN, "residency.offload=false"), 8, device_bytes=DEVICE)
    actor, critic = 4_095_521_792, 3_784_360_960
    assert {phase.counted for phase in plan.phases} == {11 * (actor + critic)}
    assert not any(phase.copied_in or phase.copied_out or phase.ahead for phase in plan.phases)
    assert plan.host.pinned == {}


def test_an_engine_that_does_not_sleep() -> None:
    plan = plan_memory(config_of(QWEN, "rollout.sleep=false"), 8, device_bytes=DEVICE)
    assert {phase.generator for phase in plan.phases} == {int(0.6 * DEVICE)}


@pytest.mark.parametrize(("device", "element"), [(DEVICE, 2), (None, 4)])
def test_the_actor_as_its_own_engine(device: int | None, element: int) -> None:
    """Its parameters are there anyway; a cache of 16 sequences of 4096 tokens comes with them.

    A token's keys and values on a rank of TP 2: 2 * 36 layers * 4 of the 8 groups * 128. On a CPU they are float32.
    """
    config = config_of(QWEN, "rollout.engine=megatron", "rollout.max_num_seqs=16")
    plan = plan_memory(config, 8, device_bytes=device)
    cache = 16 * 4096 * 2 * 36 * 4 * 128 * element
    generator = {phase.phase: phase.generator for phase in plan.phases}
    assert generator["rollout"] == cache
    assert {generator[phase] for phase in generator if phase != "rollout"} == ({0} if device else {cache})
    assert held(plan, "rollout") == {"actor": {Kind.params: 2 * 4_095_521_792}}
    assert plan.host.weight_files == plan.host.generator == 0
    with pytest.raises(ValueError, match="phase rollout: .* the cheapest change: rollout.max_num_seqs=128 "):
        check_fits(config_of(QWEN, "rollout.engine=megatron", "rollout.num_servers=1", "rollout.max_num_seqs=512"), 8)


def test_a_rank_of_its_own() -> None:
    """The first stage has no last norm, and two micro-batches in flight; the generator's cpu twin needs no device."""
    plan = plan_memory(config_of(LLAMA), 64, rank=0)
    assert held(plan, "train_actor")["actor"][Kind.params] == 2 * (4_410_187_776 - 8_192)
    assert [phase.rank for phase in plan.phases] == [0] * 8
    assert plan.device_bytes is None and all(phase.generator == phase.reserve == 0 for phase in plan.phases)
    # On a CPU the device is host memory: the ranks' bytes count there, and the servers are processes beside them.
    assert plan.host.device_is_host == 8 * plan.peak.total
    assert plan.host.generator == 2 * 70_553_706_496 + 256 * 2**20  # one of the two servers, dealt over eight nodes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["residency.offload=false"],
            ["phase ref_log_probs", "58.60 GiB over", "cheapest change: residency.offload=true"],
        ),
        (
            ["residency.offload=false", SERIAL],
            ["phase rollout", "55.25 GiB over", "cheapest change: residency.offload=true"],
        ),
        (
            ["rollout.gpu_memory_utilization=0.95", SERIAL],
            ["5.57 GiB over on a device (reward_model)", "utilization=0.85 (the"],
        ),
        (
            ["rollout.gpu_memory_utilization=0.85"],
            ["phase ref_log_probs: 9.64 GiB over on a device (reference)", "utilization=0.7 (the"],
        ),
        (["rollout.gpu_memory_utilization=0.1"], ["share of the device is 7.35 GiB too small", "utilization=0.2 (the"]),
        (
            ["actor.recompute=null", "actor.micro_batch_size=8"],
            ["phase train_actor: ", "actor.micro_batch_size=2 (the fullest"],
        ),
        (
            ["actor.recompute=null", "actor.micro_batch_tokens=32768"],
            ["phase train_actor: ", "actor.micro_batch_tokens=8192 (the fullest"],
        ),
        (
            ["residency.host_gib=605"],
            ["41.96 GiB over (actor, critic, reference, ", "change: reference.parallel.tensor=8 "],
        ),
        (["residency.host_gib=20"], ["host memory of a node: 626.96 GiB over", "use more nodes"]),
        (
            ["residency.device_gib=48", "rollout.gpu_memory_utilization=0.5"]
            + [f"{role}.optimizer.distributed=false" for role in ("actor", "critic")],
            [
                "phase train_actor",
                "these together are: actor.optimizer.distributed=true critic.optimizer.distributed=true (",
            ],
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cheapest_change(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(ValueError, match="the run does not fit") as error:
        check_fits(config_of(QWEN, *overrides), 8)
    for text in expected:
        assert text in str(error.value)


def test_the_advice_fits() -> None:
    changed = config_of(QWEN, "actor.recompute=null", "actor.micro_batch_size=2")
    assert check_fits(changed, 8).peak.total <= DEVICE


def test_a_budget_of_tokens_is_planned_as_the_rows_that_fill_it() -> None:
    """2 rows of 1024 + 3072 tokens; the rotary embedding of one long row is all that differs."""
    rows = plan_memory(config_of(QWEN), 8, device_bytes=DEVICE)
    overrides = ["actor.micro_batch_tokens=8192", "actor.forward_micro_batch_tokens=16384"]
    tokens = plan_memory(config_of(QWEN, *overrides), 8, device_bytes=DEVICE)
    of_rows, of_tokens = ({phase.phase: phase.activations for phase in plan.phases} for plan in (rows, tokens))
    assert of_tokens["train_actor"] == pytest.approx(of_rows["train_actor"], rel=0.01)
    assert of_tokens["old_log_probs"] == pytest.approx(2 * of_rows["old_log_probs"], rel=0.3)


def test_the_critic_is_planned_with_minibatches_of_its_own() -> None:
    """One response a rank, where the actor's minibatches make micro-batches of several."""
    both = ([], ["algorithm.critic_minibatch_size=8"])
    plans = [plan_memory(config_of(QWEN, "critic.micro_batch_size=4", *own), 8, device_bytes=DEVICE) for own in both]
    usual, small = ({phase.phase: phase.activations for phase in plan.phases} for plan in plans)
    assert small["train_critic"] < 0.7 * usual["train_critic"]
    assert small["train_actor"] == usual["train_actor"]


def test_supervised_runs_have_one_phase(tmp_path: Path) -> None:
    for kind, role, head in (("sft", "actor", 151_936 * 4096), ("rm", "reward", 4096)):
        path = tmp_path / f"{kind}.yaml"
        model = "{model: {path: examples/memory/qwen3_8b, dtype: bf16}, optimizer: {distributed: true}}"
        path.write_text(f"kind: {kind}\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\n{role}: {model}\n")
        plan = plan_memory(config_of(str(path)), 8, device_bytes=DEVICE)
        parameters = 7_568_405_504 + head
        assert [phase.phase for phase in plan.phases] == ["train"]
        assert plan.peak.counted == 2 * parameters + 4 * parameters + 12 * parameters // 8
        assert plan.host.total == plan.host.checkpoint == 14 * parameters


def test_a_load_counts_where_it_holds_more_than_a_save() -> None:
    plan = plan_memory(config_of(QWEN), 8, device_bytes=DEVICE)
    host = replace(plan.host, loading=plan.host.checkpoint + GIB)
    assert host.total == plan.host.total + GIB
    text = [render_plan(replace(plan, host=one), Limits(DEVICE, 2**40, "a test")) for one in (plan.host, host)]
    assert ["a checkpoint's copy" in one for one in text] == [True, False]
    assert ["a tensor of a checkpoint on each rank, while it is loaded" in one for one in text] == [False, True]


def test_experts_spread_over_ranks_are_sharded_over_their_replicas(tmp_path: Path) -> None:
    """TP 2 x DP 2, EP 4, one layer, 128 wide, 8 experts of 64: each rank has 2 of them, 3 * 128 * 64 = 24,576 parameters each.

    Dense, on a rank of TP 2: qkv (4 + 2 * 2) * 32 * 128 / 2 = 16,384, output 8,192, norms of heads 2 * 32, two norms of 128,
    router 8 * 128, embedding and output 2 * 256 * 128 / 2 = 32,768, last norm 128: 58,816, of which ZeRO-1 keeps a half.
    All replicas of an expert are one rank: nothing of it is sharded.
    """
    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 999, "num_hidden_layers": 1, "head_dim": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **sizes, **experts, **heads}))
    layout = "{tensor: 2, expert: 4, sequence: true}"
    role = f"{{model: {{path: {tmp_path}, dtype: bf16}}, parallel: {layout}, optimizer: {{distributed: true}}}}"
    (tmp_path / "sft.yaml").write_text(f"kind: sft\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nactor: {role}\n")
    plan = plan_memory(config_of(str(tmp_path / "sft.yaml")), 4)
    assert plan.roles[0].parameters_per_rank == 58_816 + 49_152
    dense = 58_880  # padded: parameters start at multiples of 64, the bucket ends at one of 128
    assert held(plan, "train")["actor"][Kind.grads] == 4 * (dense + 49_152)
    assert held(plan, "train")["actor"][Kind.moments] <= 8 * (dense // 2 + 49_152)
    assert held(plan, "train")["actor"][Kind.moments] > 8 * (dense // 2 - 64 + 49_152)


def test_host_limit_is_the_lowest_of_the_cgroups(tmp_path: Path) -> None:
    machine, source = machine_host_bytes(tmp_path, tmp_path / "none")
    assert source == "the machine's memory"
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    (tmp_path / "job" / "memory.max").write_text(f"{machine // 4}\n")
    limit = machine_host_bytes(tmp_path, tmp_path / "own")
    assert limit == (machine // 4, f"the cgroup limit in {tmp_path}/job/memory.max")
    (tmp_path / "own").write_text("7:cpu,memory:/gone\n3:cpuset:/\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    assert machine_host_bytes(tmp_path, tmp_path / "own")[0] == 1_000_000


def test_plan_and_ledger_side_by_side() -> None:
    plan = plan_memory(config_of(QWEN), 8, device_bytes=DEVICE)
    ledger = {phase.phase: {role: dict(kinds) for role, kinds in phase.roles.items()} for phase in plan.phases}
    assert compare(plan, ledger).plan_error_pct == 0
    actor = 4_095_521_792
    ledger["train_actor"]["actor"][Kind.moments] += actor  # of 9 parts 10 are there: the plan is a tenth short
    ledger["export"] = {"actor": {Kind.params: 2 * actor}}
    del ledger["scores"]
    comparison = compare(plan, ledger)
    assert comparison.plan_error_pct == pytest.approx(10.0)
    assert (comparison.only_planned, comparison.only_recorded) == (("scores",), ("export",))
    lines = comparison.render().splitlines()
    assert next(line for line in lines if "moments" in line and "train_actor" in line).split()[-2:] == ["-33.33", "%"]
    assert lines[-1] == "largest difference of a phase: 10.00 %"
    with pytest.raises(ValueError, match="compare a plan with a ledger of the same config"):
        compare(plan, {"export": {}})


def test_bars() -> None:
    assert bar(0.5) == "|████████████            |"
    assert bar(0.51) == "|████████████▎           |"
    assert bar(1.25) == "|" + "█" * 24 + "|██████"


@pytest.mark.parametrize(("path", "world_size"), [(QWEN, 8), (LLAMA, 64)])
def test_the_document_shows_what_the_command_prints(
    path: str, world_size: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    arguments = ["--config", path, "--world-size", str(world_size), "--json", str(out), "--figure", str(picture)]
    assert main(["plan", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    values = json.loads(out.read_text(encoding="utf-8"))
    plan = plan_memory(config_of(path), world_size, device_bytes=DEVICE)
    assert [phase["total"] for phase in values["phases"]] == [phase.total for phase in plan.phases]
    assert values["peak"] == {QWEN: "ref_log_probs", LLAMA: "scores"}[path]
    drawn = picture.read_text(encoding="utf-8")
    assert all(text in drawn for text in ("train_critic", "main_params", "generator", "one device"))


def test_a_small_run_on_a_cpu_is_told_in_mib(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama of 2 layers, 64 wide: a layer 64 * (128 + 64 + 3 * 128) + 2 * 64 = 36,992, two embeddings of 320 * 64, a norm:
    115,008 parameters. fp32: 460,032 bytes, 0.44 MiB, and as much of gradients and twice that of moments.
    """
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    role = f"{{model: {{path: {tmp_path}}}, micro_batch_size: 2}}"
    (tmp_path / "sft.yaml").write_text(f"kind: sft\nrun: {{dir: r}}\ndata: {{train: a.jsonl}}\nactor: {role}\n")
    assert main(["plan", "--config", str(tmp_path / "sft.yaml"), "--host-gib", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "115,008" in next(line for line in lines if line.startswith("actor"))
    assert next(line for line in lines if line.startswith("train ")).split()[:6] == [
        *("train", "actor", "0.44", "0.44", "-", "0.88"),
    ]
    assert "host memory, MiB on the fullest node (of 8192.00: --host-gib)" in lines


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", QWEN, "--world-size", "8", "--device-gib", "40"]) == 2
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out and captured.err.startswith("error: the run does not fit: phase ")
    assert captured.err.count("\n") == 1
    assert main(["plan", "--config", QWEN, "--world-size", "8", "residency.offload=false"]) == 2
    assert capsys.readouterr().err in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    stages = ["actor.parallel.pipeline=8", "actor.parallel.tensor=1", "actor.parallel.sequence=false"]
    assert main(["plan", "--config", QWEN, "--world-size", "8", *stages]) == 2
    assert "in actor.parallel): num_hidden_layers 36 is not a multiple of pipeline 8" in capsys.readouterr().err
    assert main(["plan", "--config", QWEN, "--world-size", "8", "--device-gib", "-1"]) == 2
    assert "--device-gib is -1.0: a memory size in GiB is above 0" in capsys.readouterr().err
    assert main(["plan", "--config", QWEN, "--world-size", "8", "--figure", "plan.gif"]) == 2
    assert "--figure plan.gif: a picture ends in .svg, .png, .pdf" in capsys.readouterr().err
    assert main(["plan", "--config", QWEN, "--world-size", "8", "critic.model.path=nowhere"]) == 2
    assert (
        "critic (critic.model.path=nowhere in critic.parallel): nowhere/config.json: no such file"
        in capsys.readouterr().err
    )
