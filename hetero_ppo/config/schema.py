"""Every option of a run, with its unit and its one default.

The classes are OmegaConf structured configs: a key that is not here is an error. Cross-field rules live in
``checks.py``; what is derived from these few inputs (micro-batches per minibatch, steps per epoch) is computed in
``derived.py`` and printed when a run starts, never written back into the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Dtype(str, Enum):
    """Parameter dtype of a role. Main parameters and optimizer moments are fp32 in both cases."""

    fp32 = "fp32"
    bf16 = "bf16"


class HeadInit(str, Enum):
    """Initial value of a scalar head that the checkpoint of a critic or a reward model lacks."""

    zero = "zero"
    normal = "normal"  # N(0, 1 / (hidden + 1)), from model.init_seed (Stiennon et al. 2020)


class LrSchedule(str, Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class KlEstimator(str, Enum):
    """Per-token estimators of KL(policy || reference), Schulman 2020, "Approximating KL divergence"."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    locals()["k3+"] = "k3+"  # the value of k3, the gradient of k2; configs name members, and this name is no identifier


class KlController(str, Enum):
    fixed = "fixed"
    adaptive = "adaptive"


class TruncatedResponses(str, Enum):
    """How to treat a response that reached the length limit without an end-of-sequence token."""

    score = "score"  # scored like any other
    penalise = "penalise"  # its score is replaced by algorithm.truncation_score
    mask = "mask"  # it takes no part in the losses, nor in whitening


class OverlongPrompts(str, Enum):
    """How to treat a prompt over data.max_prompt_tokens, or an SFT or preference row over max_sequence_tokens."""

    drop = "drop"  # left out, and their number is printed
    error = "error"  # the run does not start


class RewardSource(str, Enum):
    """Source of a response's score."""

    model = "model"
    function = "function"
    mix = "mix"  # both: reward.model_weight x the model's score + reward.function_weight x the function's


class RolloutEngineKind(str, Enum):
    """What answers the prompts."""

    vllm = "vllm"  # servers beside the trainer
    megatron = "megatron"  # the actor itself, between its other turns; for machines without vLLM, and for debugging


class WeightTransfer(str, Enum):
    """How the actor's weights get into the servers; ``derived.weight_transfer`` has the rule for auto."""

    auto = "auto"
    shared_memory = "shared_memory"  # files that servers on the trainer's node read
    collective = "collective"  # broadcast in a process group of trainer and servers: gloo on CPUs, NCCL on GPUs
    cuda_ipc = "cuda_ipc"  # the one server on the trainer's own GPU reads the trainer's memory


class OldLogProbs(str, Enum):
    """Where the log-probs of the policy that sampled come from."""

    actor = "actor"  # a forward of the actor
    rollout = "rollout"  # the engine's own; saves a forward, and the engine's rounding enters the ratio


class RolloutCorrectionKind(str, Enum):
    """What is done about the engine sampling from a policy that is not quite the trainer's."""

    none = "none"
    truncated = "truncated"  # truncated importance sampling (Yao et al. 2025)


class CorrectionLevel(str, Enum):
    token = "token"  # one weight per token
    sequence = "sequence"  # one weight per response: the product of its tokens' ratios


@dataclass
class ParallelConfig:
    """A role's layout over the ranks of the run. Data parallelism is what is left of the world size."""

    tensor: int = 1  # TP ranks
    pipeline: int = 1  # PP stages
    virtual_pipeline: int | None = None  # model chunks per PP rank (interleaved schedule)
    context: int = 1  # CP ranks
    expert: int = 1  # EP ranks
    sequence: bool = False  # sequence parallelism over the TP ranks


@dataclass
class ModelConfig:
    path: str = MISSING  # Hugging Face checkpoint folder: config.json and *.safetensors
    tokenizer: str | None = None  # tokenizer folder; default: path
    dtype: Dtype | None = None  # null: bf16 on CUDA, fp32 on a CPU; a run that goes on from a checkpoint keeps the checkpoint's
    head_init: HeadInit | None = None  # of a scalar head that the checkpoint lacks; null: zero for the critic, normal for a reward model
    init_seed: int = 1234  # seed of such a head, with head_init normal


@dataclass
class OptimizerConfig:
    lr: float = 1e-5
    min_lr: float = 0.0
    lr_schedule: LrSchedule = LrSchedule.constant
    warmup_steps: int = 0  # optimizer steps
    weight_decay: float = 0.0  # decoupled (AdamW); norm weights and biases are left out
    decay_norms_and_biases: bool = False  # weight_decay shrinks norm weights and biases too
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # global L2 norm; 0 switches clipping off
    max_skipped_steps: int = 0  # in a row, whose gradient is NaN or infinite, that are left out; one more stops the run
    distributed: bool = False  # shard fp32 main parameters and moments over the data-parallel ranks (ZeRO-1)


@dataclass
class DdpConfig:
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False  # needs optimizer.distributed
    bucket_size: int | None = None  # parameters per gradient bucket; None: Megatron-Core's choice


@dataclass
class RoleConfig:
    """One of actor, critic, reference, reward: a model and its own layout."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 8  # sequences per forward on one data-parallel rank, where micro_batch_tokens is null
    micro_batch_tokens: int | None = None  # tokens per forward on one data-parallel rank, padding included; null: micro_batch_size
    packing: bool | None = None  # sequences lie one after the other, no padding is computed; null: on a CPU and with Transformer Engine, where context is 1
    aligned: bool | None = False  # a forward's bits do not depend on batch, padding, micro-batches or layout; on CUDA in bf16 alone; null: where model, layout and dtype allow it and, on CUDA, the self-check passes


@dataclass
class TrainedRoleConfig(RoleConfig):
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ddp: DdpConfig = field(default_factory=DdpConfig)
    recompute: str | None = None  # None, "selective" or "full" activation recomputation
    forward_micro_batch_tokens: int | None = None  # as micro_batch_tokens, of forwards without a backward; null: the same


@dataclass
class ReEncodeConfig:
    """Texts are encoded anew for a reward model whose tokenizer or template is not the actor's."""

    max_tokens: int = MISSING  # of prompt and response in the reward model's tokens; of a longer sequence the end is cut off and counted
    chat_template: str | None = None  # Jinja file that replaces the template of its tokenizer


@dataclass
class RewardRoleConfig(RoleConfig):
    aligned: bool | None = None  # as of other roles, null by default
    re_encode: ReEncodeConfig | None = None  # None: it reads the actor's token ids


@dataclass
class TrainedRewardConfig(TrainedRoleConfig):
    aligned: bool | None = None  # as of other roles, null by default. Aligned, checkpoints carry golden scores


@dataclass
class DataConfig:
    train: str = MISSING  # .jsonl or .parquet file
    eval: str | None = None  # same format; None: no evaluation
    messages_key: str = "messages"
    prompt_key: str = "prompt"
    completion_key: str = "completion"  # SFT: the answer to prompt_key, where there is no messages_key
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    label_key: str = "label"
    metadata_key: str = "metadata"
    tools_key: str = "tools"  # tools that the messages may call, for the chat template: a list, or its JSON as text
    chat_template: str | None = None  # Jinja file that replaces the tokenizer's template
    apply_chat_template: bool = True  # False: prompt and answer are tokenised as they stand and concatenated
    max_prompt_tokens: int = 512
    max_sequence_tokens: int = 1024  # prompt and answer together (SFT, reward model)
    overlong_prompts: OverlongPrompts = OverlongPrompts.error
    shuffle: bool = True


@dataclass
class RunConfig:
    dir: str = MISSING  # everything a run writes lies below
    overwrite: bool = False  # a run from the beginning removes what an earlier one left in dir; False: it does not start there
    seed: int = 42
    log_every: int = 1  # steps
    threads: int | None = None  # CPU threads per rank; None: cores / local ranks
    deterministic: bool = True  # on CUDA: kernels and collectives that give the same bits twice; False: faster ones. A CPU always does
    tensorboard: bool = True
    wandb_project: str | None = None  # Weights & Biases, when installed
    timeout_minutes: float = 30.0  # deadline of a collective
    phase_timeout_minutes: float | None = 120.0  # without a phase's beginning or end, then the rank dumps its stacks and ends; null: never
    heartbeat_timeout_s: float | None = 300.0  # of a rank that is stopped, hangs in the kernel or in a call that holds the GIL, then the launcher ends the run; null: never
    stop_within_s: float = 240.0  # from SIGTERM, SIGUSR1 or SIGHUP to the end of the process, checkpoint or not


@dataclass
class CheckpointConfig:
    every: int = 0  # steps; 0: at the end alone
    async_save: bool = True  # written while the run goes on, from a copy in host memory; False: the run stands still for it
    keep: int = 2  # newest checkpoints that are kept
    keep_best: str | None = None  # metric whose best checkpoint is kept beside them: the highest, with a leading "-" the lowest
    load: str | None = None  # run folder to resume from
    step: int | None = None  # of the checkpoint to load; null: the newest
    allow_changes: list[str] = field(default_factory=list)  # fields, or sections, of the objective that may differ from the checkpoint's
    export_hf: bool = True  # write <run.dir>/hf when training ends


@dataclass
class SupervisedTrainConfig:
    """Batching and length of an SFT or reward-model run."""

    steps: int | None = None  # optimizer steps; None: epochs decides
    epochs: int = 1
    global_batch_size: int = 32  # examples (or pairs) per optimizer step, over all ranks
    eval_every: int = 0  # steps; 0: at the end alone
    eval_batches: int | None = None  # global batches; None: all of them


@dataclass
class RewardModelLossConfig:
    margin: float = 0.0  # Bradley-Terry: -log sigmoid(chosen - rejected - margin)
    score_l2: float = 0.0  # weight of mean(score^2), keeps scores near 0


@dataclass
class SamplingConfig:
    """Every field is sent to the engine explicitly: no server-side default takes part."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    max_tokens: int = 128  # response tokens
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)  # beside those that end a sequence (tokenizer, config.json, generation_config.json)
    stop: list[str] = field(default_factory=list)  # texts; the token that completes one is the response's last


@dataclass
class MismatchConfig:
    """Bounds on what the engine's log-probs differ from the trainer's, over the response tokens of a step."""

    max_log_prob_diff_mean: float | None = None  # nats, mean |difference|; None: 1e-3 (fp32), 0.1 (bf16)
    max_ratio_outside_share: float | None = None  # of tokens, ratio outside 0.99..1.01; None: 0.01 (fp32), 1 (bf16)
    patience: int = 1  # steps in a row beyond a bound, at the last of which the run stops


@dataclass
class RolloutConfig:
    engine: RolloutEngineKind = RolloutEngineKind.vllm
    num_servers: int | None = None  # vLLM HTTP servers, dealt over the nodes; None: one for every tensor_parallel ranks
    interface: str | None = None  # network interface that nodes reach each other's servers by (eth0); None: the one to MASTER_ADDR
    dtype: Dtype | None = None  # engine dtype; None: the actor's
    max_num_seqs: int = 64  # running batch of one server; megatron: of one data-parallel rank of the actor
    kv_cache_mib: int = 256  # KV cache of one server (CPU); megatron: room for max_num_seqs longest sequences instead
    gpu_memory_utilization: float = 0.4  # share of the device (GPU)
    server_threads: int | None = None  # OMP threads of one server (CPU); None: cores / servers, at least 1
    tensor_parallel: int = 1  # GPUs per server
    batch_invariant: bool = False  # on GPUs: vLLM's kernels whose bits do not depend on the batch (VLLM_BATCH_INVARIANT=1); slower
    sleep: bool | None = None  # the engine gives its device memory back while the trainer computes; None: on GPUs
    start_timeout_s: float = 240.0
    request_timeout_s: float = 600.0
    sync_timeout_s: float = 120.0
    weight_transfer: WeightTransfer = WeightTransfer.auto
    hang_timeout_s: float | None = 120.0  # of a server that answers nothing, or whose guardian is stopped, then it is restarted; null: never
    max_restarts: int = 2  # of a server that died or hung, before the run stops
    bank: bool = True  # responses go to <run.dir>/bank as they complete: a run that is killed does not ask for them again
    verify_sync: bool = True  # after every sync compare checksums of the engine's parameters, and its log-probs of a golden prompt
    verify_sync_tolerance: float | None = None  # max |difference| in log-prob; None: 1e-3 (fp32), 0.15 (bf16)
    over_sampling: float = 1.0  # responses sent in a step over those it needs; the rest is aborted and resumed in the next
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval_sampling: SamplingConfig = field(default_factory=SamplingConfig)


class EnsembleScore(str, Enum):
    """How to combine the scores of reward_models (Coste et al. 2023; Eisenstein et al. 2023)."""

    mean = "mean"
    min = "min"  # the most sceptical of them
    mean_minus_std = "mean_minus_std"  # mean - reward.ensemble_k x population standard deviation


class RewardErrors(str, Enum):
    """How to treat a response that the reward function raises for, hangs on, or gives no finite number for."""

    stop = "stop"  # the run ends, naming the response
    exclude = "exclude"  # it takes no part in losses, whitening and running moments, and is counted in reward/num_excluded


@dataclass
class RewardConfig:
    source: RewardSource = RewardSource.model
    function: str | None = None  # "package.module:function", or "path/to/file.py:function"
    model_weight: float = 1.0  # with source mix, of the model's score; below 0 it is a cost
    function_weight: float = 1.0  # with source mix, of the function's score
    ensemble: EnsembleScore = EnsembleScore.mean  # of reward_models
    ensemble_k: float = 1.0  # with ensemble mean_minus_std: standard deviations that are subtracted
    timeout_s: float = 60.0  # seconds that one call of the function, or of train.eval_function, may take
    workers: int | None = None  # processes that call the function (train.eval_function has as many); None: derived, printed
    batch: int | None = None  # responses of one call; the function then gets lists and returns as many numbers. None: one
    concurrency: int | None = None  # calls at once in one process, of an `async def` function; None: 64
    on_error: RewardErrors = RewardErrors.stop
    clip: float = 10.0  # |score| is clipped to it; 0 switches clipping off
    golden_every: int = 50  # PPO steps between checks of the reward model's golden scores; 0: at the start alone
    normalise: bool = False  # divide by the running standard deviation of the scores (after subtracting the mean)


@dataclass
class KlConfig:
    estimator: KlEstimator = KlEstimator.k1
    controller: KlController = KlController.fixed
    coef: float = 0.05  # initial, or fixed, weight of the KL penalty in the reward
    target: float = 6.0  # adaptive: KL per sequence, in nats
    horizon: int = 10_000  # adaptive: samples (Ziegler et al. 2019, section 2.2)
    loss_coef: float = 0.0  # weight of the KL in the actor's loss
    loss_estimator: KlEstimator = KlEstimator.k3
    clamp: float | None = 10.0  # nats: a token's estimate, of the penalty and of the loss, is clamped to [-clamp, clamp]; null: none


@dataclass
class RolloutCorrectionConfig:
    """Weights on the policy loss for the difference of engine and trainer."""

    kind: RolloutCorrectionKind = RolloutCorrectionKind.none
    cap: float = 2.0  # largest weight
    level: CorrectionLevel = CorrectionLevel.token


@dataclass
class AlgorithmConfig:
    gamma: float = 1.0
    lam: float = 0.95
    clip_ratio: float = 0.2
    dual_clip: float | None = None  # c > 1 of dual-clip PPO (Ye et al. 2020); None: off
    value_clip: float | None = None  # |value - old value| beyond which the value loss is clipped, in units of the reward; None: off
    entropy_coef: float = 0.0
    old_log_probs: OldLogProbs = OldLogProbs.actor
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    whiten_advantages: bool = True  # over the whole rollout batch and all ranks
    ppo_epochs: int = 1  # passes over the rollout batch
    rollout_batch_size: int = 64  # prompts per PPO step, over all ranks
    samples_per_prompt: int = 1
    minibatch_size: int = 16  # responses per optimizer step, over all ranks
    critic_epochs: int | None = None  # passes of the critic over the rollout batch; null: ppo_epochs
    critic_minibatch_size: int | None = None  # responses per optimizer step of the critic, over all ranks; null: minibatch_size
    critic_warmup_steps: int = 0  # PPO steps that train the critic alone
    truncated: TruncatedResponses = TruncatedResponses.score
    truncation_score: float = -1.0  # with truncated: penalise
    kl: KlConfig = field(default_factory=KlConfig)


@dataclass
class PpoTrainConfig:
    steps: int | None = None  # PPO steps; None: epochs decides
    epochs: int = 1  # passes over the prompts
    eval_every: int = 0  # PPO steps; 0: before the first and after the last alone
    eval_function: str | None = None  # held-out check of an answer; same form as reward.function
    eval_batch: int | None = None  # answers of one call of eval_function, as reward.batch; None: one
    dump_rollouts: bool = True  # <run.dir>/rollouts/step_*.jsonl
    trace_every: int = 50  # PPO steps between traces in <run.dir>/trace, beside the first two; 0: none
    replay_rollouts: str | None = None  # take token ids from this folder's rollouts instead of an engine


@dataclass
class PipelineConfig:
    """Forwards of finished responses beside the generation of others."""

    overlap: bool = True  # forwards begin with the first complete chunk; False: when all responses are complete
    chunk_size: int | None = None  # responses of a chunk, over all ranks; None: the running batch of all servers; 0: a sweep
    sweep_s: float = 20.0  # seconds for the sweep, which finds the fewest responses at once that the engine is fastest with


@dataclass
class ResidencyConfig:
    """Turns of the roles on the device, and the sizes that the memory plan is made for."""

    offload: bool = True  # roles leave the device for host memory when their turn ends; False: all stay
    overlap: bool = True  # one role leaves while the next comes in, which begins before its turn; False: one after the other
    device_gib: float | None = None  # memory of one device, GiB; None: what CUDA reports, and on a CPU no limit
    host_gib: float | None = None  # host memory of one node, GiB; None: the cgroup's limit, or the machine's
    pcie_gb_s: float = 25.0  # copy rate of one device in one direction, GB/s, for the plan's transfer times


@dataclass
class MemoryConfig:
    """Memory of a CUDA device beside tensors, for the memory plan; a CPU has none of it. The sizes are estimates: put in what you measured."""

    context_mib: float = 600.0  # CUDA context and loaded kernels of one process, MiB
    nccl_channels: int = 24  # of one NCCL communicator
    nccl_channel_mib: float = 9.2  # buffers of one channel, MiB: Simple 4 (NCCL_BUFFSIZE), LL128 4.7, LL 0.5
    cublas_mib: float = 64.0  # cuBLAS workspaces of the trainer, MiB: one of 8 x 4 for the forward's thread and one for the backward's
    te_workspace_mib: float = 32.0  # one workspace of Transformer Engine, MiB; roles with experts have five
    allocator_slack: float = 0.05  # memory that torch's allocator has beyond the tensors in it, as a share of their bytes
    engine_graphs_mib: float = 768.0  # CUDA graphs of one vLLM worker, MiB: part of its share while it is awake, and kept asleep
    engine_runtime_mib: float = 256.0  # what a vLLM worker takes with its weights as it wakes for a weight sync, MiB


@dataclass
class SftConfig:
    kind: str = "sft"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: TrainedRoleConfig = field(default_factory=TrainedRoleConfig)
    train: SupervisedTrainConfig = field(default_factory=SupervisedTrainConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class RmConfig:
    kind: str = "rm"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: TrainedRewardConfig = field(default_factory=TrainedRewardConfig)
    train: SupervisedTrainConfig = field(default_factory=SupervisedTrainConfig)
    loss: RewardModelLossConfig = field(default_factory=RewardModelLossConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class PpoConfig:
    kind: str = "ppo"
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    actor: TrainedRoleConfig = field(default_factory=TrainedRoleConfig)
    critic: TrainedRoleConfig = field(default_factory=TrainedRoleConfig)
    reference: RoleConfig = field(default_factory=RoleConfig)
    reward_model: RewardRoleConfig | None = None
    reward_models: list[RewardRoleConfig] = field(default_factory=list)  # an ensemble, in place of reward_model; each in its own layout
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: PpoTrainConfig = field(default_factory=PpoTrainConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    residency: ResidencyConfig = field(default_factory=ResidencyConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


#: ``kind`` of a YAML file -> its schema.
SCHEMAS: dict[str, Any] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}
