"""Rules of the generator and of the transfer of weights to it."""

from __future__ import annotations

from hetero_ppo.config.derived import actor_generates, servers_of_nodes
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import (
    OldLogProbs,
    PpoConfig,
    RolloutConfig,
    GeneratorKind,
    SamplingConfig,
    WeightTransfer,
)


def check_sampling(rollout: RolloutConfig) -> None:
    """Raise for greedy rollouts, and for empty stop texts."""
    _check_stop_texts("rollout.sampling", rollout.sampling)
    require(
        rollout.sampling.temperature > 0,
        "rollout.sampling.temperature",
        rollout.sampling.temperature,
        "PPO samples from the policy and divides the trainer's logits by it, so it is greater than 0; greedy "
        "answers are for rollout.eval_sampling",
    )
    _check_stop_texts("rollout.eval_sampling", rollout.eval_sampling)


def _check_stop_texts(field: str, sampling: SamplingConfig) -> None:
    require(all(sampling.stop), f"{field}.stop", sampling.stop, "an empty text would end every response")


def check_weight_transfer(config: PpoConfig, world_size: int) -> None:
    """Raise for a way of weight transfer that the places of the servers do not allow."""
    rollout, field = config.rollout, "rollout.weight_transfer"
    kind = rollout.weight_transfer
    require(
        kind is WeightTransfer.auto or not actor_generates(config),
        field,
        kind.value,
        "with rollout.engine=megatron the actor itself generates and there is nothing to transfer; leave it at auto",
    )
    counts = servers_of_nodes(rollout, world_size)
    require(
        kind is not WeightTransfer.shared_memory or not any(counts[1:]),
        field,
        kind.value,
        f"servers read files of rank 0's node, and {sum(counts[1:])} of {sum(counts)} are on other nodes; use auto or collective",
    )
    servers = sum(counts)
    require(
        kind is not WeightTransfer.cuda_ipc or (servers == 1 and rollout.tensor_parallel == 1),
        field,
        kind.value,
        f"the one server shares the trainer's GPU, but there are {servers} with rollout.tensor_parallel={rollout.tensor_parallel}; "
        "use auto or collective",
    )


def check_over_sampling(config: PpoConfig) -> None:
    """Raise for over-sampling in a run that cannot resume responses.

    Several versions of the weights sample a resumed response. So only the generator has its old log-probs, and it has no text of the
    first part, in which a stop text may begin.
    """
    factor, field = config.rollout.over_sampling, "rollout.over_sampling"
    fits = {
        "algorithm.old_log_probs=rollout (the log-probs of the weights that sampled)": config.algorithm.old_log_probs
        is OldLogProbs.rollout,
        "rollout.engine=vllm": config.rollout.engine is GeneratorKind.vllm,
        "rollout.sampling.stop=[] (a text may begin in one part and end in the next)": not config.rollout.sampling.stop,
        "train.replay_rollouts=null": config.train.replay_rollouts is None,
    }
    for needed, is_so in fits.items():
        require(factor == 1 or is_so, field, factor, f"above 1 it needs {needed}")


def check_actor_as_generator(config: PpoConfig) -> None:
    """Raise for options that do not fit an actor that generates in its own layout, with its own parameters."""
    rollout = config.rollout
    for axis in ("pipeline", "context", "expert"):
        require(
            vars(config.actor.parallel)[axis] == 1,
            f"actor.parallel.{axis}",
            vars(config.actor.parallel)[axis],
            "with rollout.engine=megatron the actor generates in its own layout, which has only tensor and data parallelism; "
            "set it to 1, or rollout.engine to vllm",
        )
    for field, unset in (("num_servers", None), ("tensor_parallel", 1)):
        require(
            vars(rollout)[field] in (1, unset),
            f"rollout.{field}",
            vars(rollout)[field],
            "rollout.engine=megatron has no servers, and divides the model as actor.parallel.tensor says; leave it out",
        )
    require(
        config.pipeline.chunk_size != 0,
        "pipeline.chunk_size",
        config.pipeline.chunk_size,
        "a sweep finds the chunk of forwards during generation, and with rollout.engine=megatron there are none; set it to null",
    )
    actor = config.actor.model.dtype
    require(
        rollout.dtype is None or rollout.dtype is actor,
        "rollout.dtype",
        None if rollout.dtype is None else rollout.dtype.value,
        f"rollout.engine=megatron generates with the actor's own parameters ({'null' if actor is None else actor.value}); set it to null",
    )
