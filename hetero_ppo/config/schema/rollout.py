"""Sections of the generator, and of how closely its log-probs have to agree with the trainer's."""

from __future__ import annotations

from dataclasses import dataclass

from hetero_ppo.config.schema.choices import Dtype, GeneratorKind, WeightTransfer
from hetero_ppo.config.schema.option import PLAIN, OnResume, option, section


@dataclass
class SamplingConfig:
    """Sampling of responses. Every field is sent to the generator, so that no default of a server takes part."""

    temperature: float = option(
        1.0, "Divisor of the logits; 0 is greedy", unit=PLAIN, minimum=0, resume=OnResume.objective
    )
    top_p: float = option(
        1.0,
        "Probability of the likeliest tokens that are kept; 1 keeps all",
        unit=PLAIN,
        above=0,
        maximum=1,
        resume=OnResume.objective,
    )
    top_k: int = option(
        -1,
        "Number of likeliest tokens that are kept; -1 keeps all",
        unit="tokens",
        minimum=1,
        also=(-1,),
        resume=OnResume.objective,
    )
    max_tokens: int = option(128, "Longest response", unit="tokens", minimum=1, resume=OnResume.objective)
    ignore_eos: bool = option(False, "Responses do not stop at an end-of-sequence token", resume=OnResume.objective)
    stop_token_ids: list[int] = option(
        [],
        "Token ids that end a response, besides those of tokenizer, config.json and generation_config.json",
        unit="token ids",
        minimum=0,
        resume=OnResume.objective,
    )
    stop: list[str] = option(
        [],
        "Texts that end a response; the token that completes one is the last of the response",
        resume=OnResume.objective,
    )


@dataclass
class MismatchConfig:
    """Bounds on the difference between the generator's log-probs and the trainer's over the response tokens of a step."""

    max_log_prob_diff_mean: float | None = option(
        None, "Largest mean |difference|; null: 1e-3 (fp32), 0.1 (bf16)", unit="nats", minimum=0
    )
    max_ratio_outside_share: float | None = option(
        None,
        "Largest share of tokens whose ratio lies outside 0.99..1.01; null: 0.01 (fp32), 1 (bf16)",
        unit="share of tokens",
        minimum=0,
    )
    patience: int = option(
        1, "Consecutive steps beyond a bound, at the last of which the run stops", unit="PPO steps", minimum=1
    )


@dataclass
class RolloutConfig:
    """Generator that answers prompts, its servers, and the transfer of weights to them."""

    engine: GeneratorKind = option(GeneratorKind.vllm, "Generator that answers prompts", resume=OnResume.operation)
    num_servers: int | None = option(
        None,
        "Number of vLLM HTTP servers, dealt over the nodes; null: one for every tensor_parallel ranks",
        unit="servers",
        minimum=1,
        resume=OnResume.operation,
    )
    interface: str | None = option(
        None,
        "Network interface (eth0) through which nodes reach each other's servers; null: the one towards MASTER_ADDR",
        resume=OnResume.operation,
    )
    dtype: Dtype | None = option(None, "Dtype of the generator; null: the actor's", resume=OnResume.applied)
    max_num_seqs: int = option(
        64,
        "Running batch of one server; with engine megatron, of one data-parallel rank of the actor",
        unit="sequences",
        minimum=1,
        resume=OnResume.operation,
    )
    kv_cache_mib: int = option(
        256,
        "Key-value cache of one server on a CPU; with engine megatron, it has room for max_num_seqs longest sequences "
        "instead",
        unit="MiB",
        minimum=1,
        resume=OnResume.operation,
    )
    gpu_memory_utilization: float = option(
        0.4,
        "Part of a GPU's memory that a server takes",
        unit="share of the device",
        above=0,
        maximum=1,
        resume=OnResume.operation,
    )
    server_threads: int | None = option(
        None,
        "OpenMP threads of one server on a CPU; null: cores / servers, at least 1",
        unit="threads",
        minimum=1,
        resume=OnResume.operation,
    )
    tensor_parallel: int = option(1, "GPUs of one server", unit="GPUs", minimum=1, resume=OnResume.operation)
    batch_invariant: bool = option(
        False,
        "vLLM on GPUs uses slower kernels whose bits do not depend on the batch (VLLM_BATCH_INVARIANT=1)",
        resume=OnResume.operation,
    )
    sleep: bool | None = option(
        None,
        "The generator frees its device memory while the trainer computes; null: on GPUs",
        resume=OnResume.operation,
    )
    start_timeout_s: float = option(240.0, "Deadline of a server's start", unit="s", above=0, resume=OnResume.operation)
    request_timeout_s: float = option(600.0, "Deadline of one request", unit="s", above=0, resume=OnResume.operation)
    sync_timeout_s: float = option(120.0, "Deadline of a weight sync", unit="s", above=0, resume=OnResume.operation)
    weight_transfer: WeightTransfer = option(
        WeightTransfer.auto, "Way of the actor's weights into the servers", resume=OnResume.operation
    )
    # Several looks at a server, so that a busy machine restarts none.
    hang_timeout_s: float | None = option(
        120.0,
        "Longest silence of a server that answers nothing, or whose guardian is stopped, after which it is restarted; "
        "null: for ever",
        unit="s",
        minimum=5,
        resume=OnResume.operation,
    )
    max_restarts: int = option(
        2,
        "Restarts of servers that died or hung, before the run stops",
        unit="restarts of a server",
        minimum=0,
        resume=OnResume.operation,
    )
    bank: bool = option(
        True,
        "Complete responses are stored in <run.dir>/bank, so that a run that is killed does not ask for them again",
        resume=OnResume.operation,
    )
    verify_sync: bool = option(
        True,
        "Every sync compares checksums of the generator's parameters, and its log-probs of a probe prompt",
        resume=OnResume.operation,
    )
    verify_sync_tolerance: float | None = option(
        None,
        "Largest |difference| in log-prob of the probe prompt; null: 1e-3 (fp32), 0.15 (bf16)",
        unit="nats",
        minimum=0,
        resume=OnResume.operation,
    )
    over_sampling: float = option(
        1.0,
        "Responses that a step asks for, relative to those that it needs; the rest is aborted and resumed in the next step",
        unit=PLAIN,
        minimum=1,
        finite=True,
        resume=OnResume.applied,
    )
    mismatch: MismatchConfig = section(
        MismatchConfig,
        "Bounds on the difference between the generator's log-probs and the trainer's",
        resume=OnResume.operation,
    )
    sampling: SamplingConfig = section(SamplingConfig, "Sampling of the responses that are trained on")
    eval_sampling: SamplingConfig = section(SamplingConfig, "Sampling of held-out answers", resume=OnResume.applied)
