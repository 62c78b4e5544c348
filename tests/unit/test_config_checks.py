"""Rules between fields: each refuses what it should, names the field, and lets the rest pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hetero_ppo.config.checks import check_config, check_paths
from hetero_ppo.config.derived import chunk_sizes, config_roles, data_parallel_size, derive_ppo, derive_supervised
from hetero_ppo.config.load import AnyConfig, load_config
from hetero_ppo.config.schema import RolloutCorrectionKind
from hetero_ppo.health.mismatch import mismatch_bounds
from hetero_ppo.runtime.settle import settle

TEXT = {
    "sft": "kind: sft\nrun: {dir: run}\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\n",
    "rm": "kind: rm\nrun: {dir: run}\ndata: {train: a.jsonl}\nreward: {model: {path: m}}\n",
    "ppo": "kind: ppo\nrun: {dir: run}\ndata: {train: a.jsonl}\nactor: {model: {path: m}}\ncritic: {model: {path: m}}\n"
    "reference: {model: {path: m}}\nreward_model: {model: {path: m}}\n",
}


def config_of(folder: Path, kind: str, *overrides: str) -> AnyConfig:
    path = folder / f"{kind}.yaml"
    path.write_text(TEXT[kind], encoding="utf-8")
    return settle(load_config(str(path), list(overrides)), on_cuda=False)[0].config


#: A run whose function alone scores.
FUNCTION = ["reward.source=function", "reward_model=null", "reward.function=a:b"]


@pytest.mark.parametrize("kind", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_the_defaults_pass(tmp_path: Path, kind: str, world_size: int) -> None:
    check_config(config_of(tmp_path, kind), world_size)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["run.heartbeat_timeout_s=1"], "run.heartbeat_timeout_s=1.0: allowed: at least 4 .s., or null"),
        (["rollout.hang_timeout_s=1"], "rollout.hang_timeout_s=1.0: allowed: at least 5 .s., or null"),
        (["actor.parallel.tensor=3"], "actor.parallel: tensor 3 .* do not divide the world size 4"),
        (["critic.parallel.pipeline=8"], "critic.parallel: .*pipeline 8"),
        (["actor.parallel.tensor=0"], "actor.parallel.tensor=0"),
        (["actor.parallel.expert=3"], "actor.parallel.expert=3: a pipeline stage has 4 ranks"),
        (["actor.parallel.expert=4", "actor.parallel.pipeline=2"], "a pipeline stage has 2 ranks"),
        (["actor.parallel.sequence=true"], "actor.parallel.tensor is 1"),
        (["actor.parallel.virtual_pipeline=2"], "needs actor.parallel.pipeline > 1"),
        (["actor.parallel.pipeline=2", "actor.parallel.virtual_pipeline=1"], "at least 2"),
        (["reference.micro_batch_size=0"], "reference.micro_batch_size=0"),
        (["actor.packing=true", "actor.parallel.context=2"], "actor.packing=True: actor.parallel.context is 2"),
        (["critic.micro_batch_tokens=639"], "critic.micro_batch_tokens=639: a sequence may have 640 tokens"),
        (["actor.forward_micro_batch_tokens=8"], "actor.forward_micro_batch_tokens=8: a sequence may have 640 tokens"),
        (["critic.optimizer.lr=-1"], "critic.optimizer.lr=-1"),
        (["critic.optimizer.min_lr=1"], "critic.optimizer.min_lr=1"),
        (["actor.optimizer.beta2=1"], "actor.optimizer.beta2=1"),
        (["actor.ddp.overlap_param_gather=true"], "set actor.optimizer.distributed=true"),
        (["actor.recompute=some"], "actor.recompute=some: allowed: selective or full, or null"),
        (["data.train=a.csv"], "data.train=a.csv: allowed: a text that ends in .jsonl or .parquet. Meaning"),
        (["train.steps=0"], "train.steps=0: allowed: at least 1 .PPO steps., or null"),
        (["train.epochs=0"], "train.epochs=0"),
        (["train.eval_every=5"], "set data.eval"),
        (["train.trace_every=-1"], "train.trace_every=-1"),
        (["run.timeout_minutes=0"], "run.timeout_minutes=0"),
        (["checkpoint.keep=0"], "checkpoint.keep=0"),
        (["algorithm.minibatch_size=24"], "= 64 is not a multiple of algorithm.minibatch_size = 24; .* 48 or 72"),
        (
            ["algorithm.minibatch_size=2"],
            "algorithm.minibatch_size = 2 is not a multiple of the data-parallel size of actor = 4",
        ),
        (["algorithm.minibatch_size=2", "actor.parallel.tensor=2"], "the data-parallel size of critic = 4"),
        (["algorithm.critic_minibatch_size=24"], "is not a multiple of algorithm.critic_minibatch_size = 24"),
        (
            ["algorithm.critic_minibatch_size=2"],
            "algorithm.critic_minibatch_size = 2 is not .* the data-parallel size of critic = 4",
        ),
        (
            ["algorithm.critic_epochs=0"],
            "algorithm.critic_epochs=0: allowed: at least 1 .passes., or null. Meaning: .* null: ppo_epochs",
        ),
        (["algorithm.kl.clamp=0"], "algorithm.kl.clamp=0"),
        (
            ["reference.model.head_init=zero"],
            "reference.model.head_init is no option of this kind of run, leave it out: only the critic",
        ),
        (
            ["reward_model.model.head_init=normal"],
            "reward_model.model.head_init is no option of this kind of run, leave it out: only the critic",
        ),
        (
            ["rollout.sampling.top_p=0.9", "algorithm.rollout_correction.kind=truncated"],
            "rollout.sampling.top_p=0.9: .*no importance weight; .*top_p=1, or algorithm.rollout_correction.kind=none",
        ),
        (
            ["rollout.sampling.top_k=50", "algorithm.rollout_correction.kind=truncated"],
            "rollout.sampling.top_k=50: .*top_k=-1, or algorithm.rollout_correction.kind=none",
        ),
        (
            ["rollout.sampling.top_p=0.9", "algorithm.old_log_probs=rollout"],
            "rollout.sampling.top_p=0.9: .*algorithm.old_log_probs=actor",
        ),
        (["algorithm.rollout_batch_size=0"], "algorithm.rollout_batch_size=0"),
        (["algorithm.dual_clip=1"], "algorithm.dual_clip=1.0: allowed: above 1, or null. Meaning: .*dual-clip PPO"),
        (["algorithm.value_clip=0"], "algorithm.value_clip=0"),
        (["algorithm.gamma=1.1"], "algorithm.gamma=1.1"),
        (
            ["critic=null", "algorithm.critic_warmup_steps=1"],
            "algorithm.critic_warmup_steps=1: critic is null, so the run trains no values",
        ),
        (["critic=null", "algorithm.critic_epochs=2"], "algorithm.critic_epochs=2: critic is null"),
        (["critic=null", "algorithm.critic_minibatch_size=16"], "algorithm.critic_minibatch_size=16: critic is null"),
        (["critic=null", "algorithm.value_clip=0.2"], "algorithm.value_clip=0.2: critic is null"),
        (["train.steps=3", "algorithm.critic_warmup_steps=3"], "the actor would never be trained"),
        (["algorithm.kl.controller=adaptive", "algorithm.kl.coef=0"], "algorithm.kl.coef=0"),
        (["algorithm.kl.controller=adaptive", "algorithm.kl.horizon=0"], "algorithm.kl.horizon=0"),
        (["reward.source=function", "reward_model=null"], "set reward.function"),
        (["reward.source=function", "reward.function=a:b"], "set reward_model=null"),
        (["reward.function=a:b"], "set reward.source=mix or function"),
        (["reward.source=mix"], "reward.source=mix: set reward.function"),
        (["reward.source=mix", "reward.function=a:b", "reward_model=null"], "set reward_model.model.path"),
        (
            ["reward.source=mix", "reward.function=a:b", "reward.model_weight=0"],
            "reward.model_weight=0.0: a score with weight 0 would not be used",
        ),
        (["reward_models=[{model: {path: m}}, {model: {path: m}}]"], "reward_model is set too"),
        (["reward_model=null", "reward_models=[{model: {path: m}}]"], "an ensemble has two at least"),
        (["reward.ensemble=min"], "reward.ensemble=min: there is no ensemble"),
        (["reward.ensemble_k=2"], "reward.ensemble_k=2.0: only reward.ensemble=mean_minus_std uses it"),
        (
            ["reward_model=null", "reward_models=[{model: {path: m}}, {model: {path: m}, parallel: {tensor: 3}}]"],
            "reward_models.1.parallel: tensor 3",
        ),
        (["reward.function_weight=0.5"], "reward.function_weight=0.5: reward.source is model, so it would not be used"),
        (["reward_model=null"], "set reward_model.model.path"),
        (["reward.source=function", "reward_model=null", "reward.function=score"], "package.module:function"),
        (["train.eval_function=a:b"], "set data.eval"),
        (["reward.timeout_s=0"], "reward.timeout_s=0.0: allowed: above 0 and finite .s."),
        (["reward.timeout_s=.inf"], "reward.timeout_s=inf: allowed: above 0 and finite .s."),
        (["reward.workers=4"], "reward.workers=4: reward.function or train.eval_function is not set"),
        (["reward.concurrency=4"], "reward.concurrency=4: reward.function or train.eval_function is not set"),
        ([*FUNCTION, "reward.workers=0"], "reward.workers=0: allowed: at least 1 .processes., or null"),
        ([*FUNCTION, "reward.concurrency=0"], "reward.concurrency=0: allowed: at least 1 .calls., or null"),
        ([*FUNCTION, "reward.batch=0"], "reward.batch=0: allowed: at least 1 .responses., or null"),
        ([*FUNCTION, "train.eval_batch=2"], "train.eval_batch=2: train.eval_function is not set"),
        (
            ["data.eval=e.jsonl", "train.eval_function=a:b", "reward.batch=2"],
            "reward.batch=2: reward.function is not set",
        ),
        (["rollout.sampling.temperature=0"], "rollout.sampling.temperature=0"),
        (["rollout.eval_sampling.temperature=-1"], "rollout.eval_sampling.temperature=-1"),
        (["rollout.sampling.top_p=0"], "rollout.sampling.top_p=0"),
        (["rollout.sampling.top_k=0"], "rollout.sampling.top_k=0: allowed: at least 1 or -1 .tokens."),
        (
            ["rollout.sampling.stop_token_ids=[5,-1]"],
            "rollout.sampling.stop_token_ids=.5, -1.: allowed: at least 0 .token ids.",
        ),
        (
            ["pipeline.chunk_size=-1"],
            "pipeline.chunk_size=-1: allowed: at least 0 .responses., or null. Meaning: .* 0: a sweep",
        ),
        (
            ["pipeline.chunk_size=0", "train.replay_rollouts=runs"],
            "pipeline.chunk_size=0: a sweep needs a generator to measure",
        ),
        (["pipeline.sweep_s=0"], "pipeline.sweep_s=0"),
        (["rollout.sampling.stop=['']"], "rollout.sampling.stop=.*an empty text would end every response"),
        (["rollout.over_sampling=0.5"], "rollout.over_sampling=0.5"),
        (["rollout.over_sampling=1.5"], "rollout.over_sampling=1.5: above 1 it needs algorithm.old_log_probs=rollout"),
        (
            ["rollout.over_sampling=2", "algorithm.old_log_probs=rollout", "rollout.sampling.stop=[x]"],
            "rollout.over_sampling=2.0: above 1 it needs rollout.sampling.stop=",
        ),
        (["rollout.num_servers=0"], "rollout.num_servers=0"),
        (["rollout.weight_transfer=nfs"], "rollout.weight_transfer.*auto, shared_memory, collective, cuda_ipc"),
        (
            ["rollout.weight_transfer=cuda_ipc", "rollout.num_servers=2"],
            "rollout.weight_transfer=cuda_ipc: .*there are 2 with rollout.tensor_parallel=1; use auto",
        ),
        (
            ["rollout.weight_transfer=collective", "rollout.engine=megatron"],
            "rollout.weight_transfer=collective: with rollout.engine=megatron .* leave it at auto",
        ),
        (["rollout.mismatch.patience=0"], "rollout.mismatch.patience=0: allowed: at least 1 .PPO steps."),
        (["rollout.mismatch.max_ratio_outside_share=-1"], "rollout.mismatch.max_ratio_outside_share=-1"),
        (
            ["rollout.mismatch.max_log_prob_diff_mean=1", "algorithm.old_log_probs=rollout"],
            "rollout.mismatch.max_log_prob_diff_mean=1.*nothing to compare; set that to actor, or this to null",
        ),
        (
            ["algorithm.rollout_correction.kind=truncated", "algorithm.old_log_probs=rollout"],
            "algorithm.rollout_correction.kind=truncated: .*set that to actor, or this to none",
        ),
        (
            ["algorithm.rollout_correction.cap=0.5"],
            "algorithm.rollout_correction.cap=0.5: allowed: at least 1 and finite",
        ),
        (["residency.pcie_gb_s=0"], "residency.pcie_gb_s=0"),
        (["residency.host_gib=-1"], "residency.host_gib=-1"),
        (["rollout.engine=sglang"], "rollout.engine.*vllm, megatron"),
        (
            ["rollout.engine=megatron", "actor.parallel.pipeline=2"],
            "actor.parallel.pipeline=2: with rollout.engine=megatron .* rollout.engine to vllm",
        ),
        (
            ["rollout.engine=megatron", "actor.parallel.context=2"],
            "actor.parallel.context=2: with rollout.engine=megatron",
        ),
        (
            ["rollout.engine=megatron", "actor.parallel.expert=2"],
            "actor.parallel.expert=2: with rollout.engine=megatron",
        ),
        (["rollout.engine=megatron", "rollout.num_servers=2"], "rollout.num_servers=2: rollout.engine=megatron has no"),
        (["rollout.engine=megatron", "pipeline.chunk_size=0"], "pipeline.chunk_size=0: .* rollout.engine=megatron"),
        (
            ["rollout.engine=megatron", "rollout.dtype=bf16"],
            "rollout.dtype=bf16: rollout.engine=megatron .*fp32.* null",
        ),
        (["rollout.gpu_memory_utilization=2"], "allowed: above 0 and at most 1 .share of the device."),
    ],
)
def test_each_rule_names_the_field(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_config(config_of(tmp_path, "ppo", *overrides), world_size=4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["actor.parallel.tensor=2", "actor.parallel.sequence=true", "rollout.dtype=fp32"],
        ["actor.parallel.pipeline=2", "train.replay_rollouts=recorded"],  # nothing is generated
    ],
)
def test_the_actor_may_be_its_own_engine(tmp_path: Path, overrides: list[str]) -> None:
    check_config(config_of(tmp_path, "ppo", "rollout.engine=megatron", *overrides), world_size=4)


def test_what_is_allowed_stays_allowed(tmp_path: Path) -> None:
    overrides = [
        "actor.parallel.tensor=2",
        "actor.parallel.sequence=true",
        "critic.parallel.pipeline=2",
        "critic.parallel.virtual_pipeline=2",
        "actor.optimizer.distributed=true",
        "actor.ddp.overlap_param_gather=true",
        "actor.recompute=full",
        "actor.optimizer.lr=0",
        "algorithm.dual_clip=3",
        "algorithm.rollout_correction.kind=truncated",
        "algorithm.rollout_correction.level=sequence",
        "algorithm.rollout_correction.cap=1",
        "rollout.mismatch.max_ratio_outside_share=0",
        "rollout.eval_sampling.temperature=0",
        "data.eval=e.parquet",
        "train.eval_every=5",
        "train.eval_function=examples/check.py:is_right",
    ]
    check_config(config_of(tmp_path, "ppo", *overrides), world_size=4)


def test_the_mixed_layout_of_the_docs(tmp_path: Path) -> None:
    example = (Path(__file__).parents[2] / "docs" / "layouts.md").read_text().split("```yaml\n")[1].split("```")[0]
    merged = OmegaConf.merge(OmegaConf.create(TEXT["ppo"]), OmegaConf.create(example))
    (tmp_path / "mixed.yaml").write_text(OmegaConf.to_yaml(merged))
    config = load_config(str(tmp_path / "mixed.yaml"), []).config
    check_config(config, world_size=8)
    sizes = {name: data_parallel_size(name, role.parallel, 8) for name, role in config_roles(config).items()}
    assert sizes == {"actor": 2, "critic": 4, "reference": 4, "reward_model": 8}


def test_the_options_of_the_mismatch_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "mismatch.md").read_text()
    blocks = [OmegaConf.create(block.split("```")[0]) for block in text.split("```yaml\n")[1:]]
    (tmp_path / "docs.yaml").write_text(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.create(TEXT["ppo"]), *blocks)))
    config = settle(load_config(str(tmp_path / "docs.yaml"), []), on_cuda=False)[0].config
    check_config(config, world_size=1)
    assert [bound.limit for bound in mismatch_bounds(config)] == [0.001, 0.01]
    assert config.algorithm.rollout_correction.kind is RolloutCorrectionKind.truncated


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "sft",
            ["train.global_batch_size=6"],
            "train.global_batch_size = 6 is not a multiple of the data-parallel size of actor",
        ),
        ("rm", ["train.global_batch_size=6"], "the data-parallel size of reward = 4"),
        ("rm", ["loss.score_l2=-1"], "loss.score_l2=-1"),
        (
            "rm",
            [
                "reward.parallel.pipeline=2",
                "reward.parallel.virtual_pipeline=2",
                "reward.micro_batch_size=8",
                "train.global_batch_size=24",
            ],
            "reward.micro_batch_size=8: .* multiple of 2 micro-batches of one size, and the 12 pairs",
        ),
        ("sft", ["train.eval_batches=0"], "train.eval_batches=0"),
    ],
)
def test_supervised_rules(tmp_path: Path, kind: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_config(config_of(tmp_path, kind, *overrides), world_size=4)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "sft")
    model = tmp_path / "m"

    def expect(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            check_paths(config)

    expect("data.train=a.jsonl: no such file")
    (tmp_path / "a.jsonl").write_text("{}")
    expect("actor.model.path=m: no such folder")
    model.mkdir()
    expect("actor.model.path=m: the folder has no config.json")
    (model / "config.json").write_text("{")
    expect("config.json is not valid JSON")
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    expect("no \\*.safetensors")
    (model / "model.safetensors").write_bytes(b"")
    expect("data.max_sequence_tokens=1024: actor.model.path has max_position_embeddings 512")
    (model / "config.json").write_text(
        json.dumps({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 4}})
    )
    check_paths(config)


def test_ppo_batching_by_hand(tmp_path: Path) -> None:
    """48 prompts x 2 = 96 responses, 4 minibatches of 24, 2 epochs: 8 optimizer steps. 100 prompts twice: 5 steps."""
    config = config_of(
        tmp_path,
        "ppo",
        "algorithm.rollout_batch_size=48",
        "algorithm.samples_per_prompt=2",
        "algorithm.minibatch_size=24",
        "algorithm.ppo_epochs=2",
        "algorithm.critic_warmup_steps=1",
        "train.epochs=2",
        "actor.parallel.tensor=2",
        "actor.micro_batch_size=5",
        "critic.micro_batch_size=8",
    )
    batching = derive_ppo(config, world_size=4, num_prompts=100)
    assert (batching.responses_per_step, batching.minibatches_per_epoch["actor"], batching.total_steps) == (96, 4, 5)
    assert (batching.roles["actor"].data_parallel_size, batching.roles["critic"].data_parallel_size) == (2, 4)
    assert (batching.roles["actor"].batch_per_rank, batching.roles["actor"].micro_batches) == (12, 3)
    assert (batching.roles["critic"].batch_per_rank, batching.roles["critic"].micro_batches) == (6, 1)
    assert (batching.roles["actor"].total_optimizer_steps, batching.roles["critic"].total_optimizer_steps) == (32, 40)
    assert batching.responses_per_rank == 48
    lines = batching.describe().splitlines()
    assert "responses per step       96  responses per PPO step, over all ranks" in lines
    assert not any(line.startswith("critic minibatches") for line in lines)


def test_the_critic_has_passes_of_its_own(tmp_path: Path) -> None:
    """64 responses: the actor does 2 epochs of 2 minibatches, the critic 3 of 4."""
    own = ["algorithm.minibatch_size=32", "algorithm.ppo_epochs=2", "algorithm.critic_minibatch_size=16"]
    config = config_of(tmp_path, "ppo", *own, "algorithm.critic_epochs=3", "train.steps=5", "critic.micro_batch_size=3")
    check_config(config, 2)
    batching = derive_ppo(config, world_size=2, num_prompts=100)
    assert (batching.roles["actor"].total_optimizer_steps, batching.roles["critic"].total_optimizer_steps) == (
        5 * 2 * 2,
        5 * 3 * 4,
    )
    assert (
        batching.roles["actor"].batch_per_rank,
        batching.roles["critic"].batch_per_rank,
        batching.roles["critic"].micro_batches,
    ) == (16, 8, 3)
    lines = [" ".join(line.split()) for line in batching.describe().splitlines()]
    assert "minibatches 2 per PPO epoch, 2 PPO epochs per step" in lines
    assert "critic minibatches 4 per critic epoch, 3 critic epochs per step" in lines


@pytest.mark.parametrize(("estimator", "found"), [("k3+", "k3+"), ("k1", "k1")])
def test_every_estimator_has_its_name_in_a_config(tmp_path: Path, estimator: str, found: str) -> None:
    config = config_of(
        tmp_path, "ppo", f"algorithm.kl.estimator={estimator}", f"algorithm.kl.loss_estimator={estimator}"
    )
    assert config.algorithm.kl.estimator.value == config.algorithm.kl.loss_estimator.value == found
    with pytest.raises(ValueError, match=r"algorithm.kl.estimator.*k3\+"):
        config_of(tmp_path, "ppo", "algorithm.kl.estimator=k4")


def test_supervised_batching_by_hand(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sft", "train.global_batch_size=16", "train.epochs=3", "actor.micro_batch_size=3")
    batching = derive_supervised(config, world_size=2, num_rows=50)
    assert batching.total_steps == 10  # ceil(50 x 3 / 16)
    assert (batching.role.batch_per_rank, batching.role.micro_batches) == (8, 3)
    assert "3.20 passes over the data" in batching.describe()
    assert derive_supervised(config_of(tmp_path, "sft", "train.steps=7"), 1, 50).total_steps == 7


def test_a_budget_of_tokens_is_what_the_run_says(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sft", "train.global_batch_size=16", "actor.micro_batch_tokens=4096")
    check_config(config, 2)
    described = derive_supervised(config, world_size=2, num_rows=50).describe()
    assert "8  examples per optimizer step on average, dealt by their tokens" in described
    assert "actor micro-batch      4096  tokens at most, as many micro-batches as lengths make it" in described


def test_pairs_in_equal_numbers_take_no_budget_of_tokens(tmp_path: Path) -> None:
    interleaved = ["reward.parallel.pipeline=2", "reward.parallel.virtual_pipeline=2"]
    with pytest.raises(ValueError, match="reward.micro_batch_tokens=4096: the interleaved schedule and expert"):
        check_config(config_of(tmp_path, "rm", "reward.micro_batch_tokens=4096", *interleaved), 2)
    check_config(config_of(tmp_path, "rm", "reward.micro_batch_tokens=4096"), 2)


def test_a_run_of_zero_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run would do zero steps: 0 usable rows in a.jsonl"):
        derive_supervised(config_of(tmp_path, "sft"), 1, 0)
    with pytest.raises(ValueError, match="the run has 1 PPO steps"):
        derive_ppo(config_of(tmp_path, "ppo", "algorithm.critic_warmup_steps=1"), 1, 64)


@pytest.mark.parametrize(
    ("num_responses", "size", "expected"),
    [
        (256, 64, [64, 64, 64, 32, 16, 16]),
        (100, 64, [64, 18, 18]),
        (90, 64, [64, 26]),
        (64, 64, [64]),  # a single chunk has nothing to overlap with
        (10, 4, [4, 4, 2]),
        (3, 8, [3]),
    ],
)
def test_the_last_chunk_of_several_is_cut(num_responses: int, size: int, expected: list[int]) -> None:
    assert chunk_sizes(num_responses, size) == expected
