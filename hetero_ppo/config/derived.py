"""Values that follow from the few sizes that a user writes: computed once, printed when a run starts, never written back."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import (
    AlgorithmConfig,
    ParallelConfig,
    PpoConfig,
    RewardRoleConfig,
    RmConfig,
    RoleConfig,
    RolloutConfig,
    GeneratorKind,
    SftConfig,
    TrainedRoleConfig,
    WeightTransfer,
)
from hetero_ppo.table import render_table

#: Responses below which the last chunk of a step is not cut: forwards of fewer rows are slower by the row.
SMALLEST_CUT = 16
#: Tokens of the sequence that the generator and the trainer are compared on after every weight sync.
PROBE_TOKENS = 64
#: How error messages name the number of responses per PPO step.
RESPONSES_FIELDS = "algorithm.rollout_batch_size x algorithm.samples_per_prompt"


def config_roles(config: AnyConfig) -> dict[str, RoleConfig]:
    """Return path -> section of every role that the run builds: the fields of the configuration that are roles, or lists of them."""
    roles: dict[str, RoleConfig] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, RoleConfig):
            roles[field.name] = value
        elif isinstance(value, list):
            roles |= {
                f"{field.name}.{number}": role for number, role in enumerate(value) if isinstance(role, RoleConfig)
            }
    return roles


def config_reward_models(config: AnyConfig) -> dict[str, RewardRoleConfig]:
    """Return the roles of ``config_roles`` that score responses; none where only a function does."""
    return {name: role for name, role in config_roles(config).items() if isinstance(role, RewardRoleConfig)}


def trained_roles(config: AnyConfig) -> dict[str, TrainedRoleConfig]:
    """Return the roles of ``config_roles`` that have an optimizer."""
    return {name: role for name, role in config_roles(config).items() if isinstance(role, TrainedRoleConfig)}


def actor_generates(config: PpoConfig) -> bool:
    """Return whether the actor itself is the generator."""
    return config.rollout.engine is GeneratorKind.megatron and config.train.replay_rollouts is None


def has_servers(config: PpoConfig) -> bool:
    """Return whether vLLM servers are the generator."""
    return config.rollout.engine is GeneratorKind.vllm and config.train.replay_rollouts is None


def overlaps_generation(config: PpoConfig) -> bool:
    """Return whether forwards run during generation; they do not where the trainer itself generates."""
    return config.pipeline.overlap and not actor_generates(config)


def max_model_len(config: PpoConfig) -> int:
    """Return the tokens of the longest sequence that the generator is to take, prompt and response together."""
    rollout = config.rollout
    longest = config.data.max_prompt_tokens + max(rollout.sampling.max_tokens, rollout.eval_sampling.max_tokens)
    return max(longest, PROBE_TOKENS + 1)


def data_parallel_size(role: str, parallel: ParallelConfig, world_size: int) -> int:
    """Return the number of ranks that a layout leaves for data parallelism.

    Args:
        role: Path of the role's section, for the message.
        parallel: Layout of the role.
        world_size: Number of ranks of the run.

    Raises:
        ValueError: The layout does not divide the world size.
    """
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_ranks:
        raise ValueError(
            f"{role}.parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = "
            f"{model_ranks} ranks do not divide the world size {world_size}; change the layout, or start a multiple of "
            f"{model_ranks} processes (NPROC_PER_NODE x NNODES)"
        )
    return world_size // model_ranks


def longest_sequence(config: AnyConfig, role: str) -> tuple[int, str]:
    """Return the tokens of the longest sequence that a role reads in training, and the fields that they come from.

    Args:
        config: Configuration of the run.
        role: Path of the role's section.
    """
    reward_model = config_reward_models(config).get(role)
    if reward_model is not None and reward_model.re_encode is not None:
        return reward_model.re_encode.max_tokens, f"{role}.re_encode.max_tokens"
    return config.longest_sequence()


@dataclass(frozen=True)
class Passes:
    """Passes of a trained role over the rollout batch of a PPO step, and its minibatches."""

    epochs: int
    minibatch_size: int  # responses per optimizer step, over all ranks
    size_field: str  # field that gives this size


def passes(algorithm: AlgorithmConfig, role: str) -> Passes:
    """Return the passes of ``actor`` or ``critic``: the critic's are the actor's where it has none of its own."""
    epochs, size = algorithm.ppo_epochs, algorithm.minibatch_size
    if role == "critic":
        epochs = epochs if algorithm.critic_epochs is None else algorithm.critic_epochs
        if algorithm.critic_minibatch_size is not None:
            return Passes(epochs, algorithm.critic_minibatch_size, "algorithm.critic_minibatch_size")
    return Passes(epochs, size, "algorithm.minibatch_size")


@dataclass(frozen=True)
class RoleBatching:
    """Batches and micro-batches of one trained role."""

    role: str
    data_parallel_size: int  # ranks
    # Sequences, or pairs of a reward model, per optimizer step on one data-parallel rank, on average.
    batch_per_rank: int
    micro_batch_size: int  # the same per forward, where micro_batch_tokens is None
    micro_batch_tokens: int | None  # tokens per forward
    micro_batches: int | None  # per optimizer step on one rank; None: a budget of tokens and the lengths decide
    optimizer_steps_per_step: int  # optimizer steps per PPO step; 1 for SFT and reward model
    total_optimizer_steps: int


@dataclass(frozen=True)
class SupervisedBatching:
    """Batching of an SFT or reward-model run."""

    num_rows: int  # examples (SFT) or pairs (reward model) in the training file, after over-long ones were left out
    global_batch_size: int
    total_steps: int
    role: RoleBatching
    row_unit: str  # "examples" or "pairs"

    def describe(self) -> str:
        """Return a table with a number and its unit per line."""
        rows = [
            ("training data", self.num_rows, self.row_unit),
            ("global batch", self.global_batch_size, f"{self.row_unit} per optimizer step, over all ranks"),
            ("steps", self.total_steps, f"optimizer steps, {self._passes():.2f} passes over the data"),
        ]
        return _describe(rows + _role_rows(self.role, self.row_unit))

    def _passes(self) -> float:
        return self.total_steps * self.global_batch_size / self.num_rows


@dataclass(frozen=True)
class PpoBatching:
    """Batching of a PPO run, counted in prompts, responses or steps."""

    num_prompts: int  # in the training file, after over-long ones were left out
    rollout_batch_size: int  # prompts per PPO step, over all ranks
    samples_per_prompt: int
    responses_per_step: int  # over all ranks
    responses_per_rank: int  # per PPO step on one data-parallel rank of the actor
    chunk_size: int  # responses that go through the forwards together, over all ranks
    minibatches_per_epoch: dict[str, int]  # trained role -> its optimizer steps in one pass over the rollout batch
    epochs: dict[str, int]  # trained role -> its passes over the rollout batch
    total_steps: int  # PPO steps
    critic_warmup_steps: int  # PPO steps that train only the critic
    roles: dict[str, RoleBatching]  # of the trained roles, by name

    def describe(self) -> str:
        """Return a table with a number and its unit per line."""
        passes = self.total_steps * self.rollout_batch_size / self.num_prompts
        rows = [
            ("training data", self.num_prompts, "prompts"),
            ("rollout batch", self.rollout_batch_size, "prompts per PPO step, over all ranks"),
            ("samples per prompt", self.samples_per_prompt, "responses"),
            ("responses per step", self.responses_per_step, "responses per PPO step, over all ranks"),
            (
                "responses per rank",
                self.responses_per_rank,
                "responses per PPO step, on one data-parallel rank of the actor",
            ),
            (
                "chunks",
                len(chunk_sizes(self.responses_per_step, self.chunk_size)),
                f"of up to {self.chunk_size} responses per PPO step",
            ),
            (
                "minibatches",
                self.minibatches_per_epoch["actor"],
                f"per PPO epoch, {self.epochs['actor']} PPO epochs per step",
            ),
            *self._rows_of_other_passes(),
            ("PPO steps", self.total_steps, f"{passes:.2f} passes over the prompts"),
        ]
        if "critic" in self.roles:
            rows.append(("critic warm-up", self.critic_warmup_steps, "PPO steps that train the critic alone"))
        return _describe(rows + [row for role in self.roles.values() for row in _role_rows(role, "responses")])

    def _rows_of_other_passes(self) -> list[tuple[str, int, str]]:
        """Return table rows of the roles whose passes over the rollout batch differ from the actor's."""
        passes_of = {name: (self.minibatches_per_epoch[name], self.epochs[name]) for name in self.roles}
        return [
            (f"{name} minibatches", minibatches, f"per {name} epoch, {epochs} {name} epochs per step")
            for name, (minibatches, epochs) in passes_of.items()
            if (minibatches, epochs) != passes_of["actor"]
        ]


def _role_rows(role: RoleBatching, unit: str) -> list[tuple[str, int, str]]:
    per_step = f", {role.optimizer_steps_per_step} per PPO step" if role.optimizer_steps_per_step != 1 else ""
    batch = f"{unit} per optimizer step"
    if role.micro_batches is None:
        assert role.micro_batch_tokens is not None
        batch += " on average, dealt by their tokens"
        cut = ("micro-batch", role.micro_batch_tokens, "tokens at most, as many micro-batches as lengths make it")
    else:
        cut = ("micro-batches", role.micro_batches, f"of at most {role.micro_batch_size} {unit} per optimizer step")
    return [
        (f"{role.role} data parallel", role.data_parallel_size, "ranks"),
        (f"{role.role} batch per rank", role.batch_per_rank, batch),
        (f"{role.role} {cut[0]}", *cut[1:]),
        (f"{role.role} optimizer steps", role.total_optimizer_steps, f"in the whole run{per_step}"),
    ]


def _describe(rows: list[tuple[str, int, str]]) -> str:
    return render_table([(name, str(number), unit) for name, number, unit in rows], "lrl")


def total_steps(steps: int | None, epochs: int, num_rows: int, rows_per_step: int, source: str) -> int:
    """Return the length of a run in steps.

    Args:
        steps: Length as the user gives it; None: ``epochs`` decides.
        epochs: Number of times that every row is seen; the last step may begin one more pass.
        num_rows: Number of usable rows.
        rows_per_step: Number of rows of a step, over all ranks.
        source: Data file, for the message.

    Raises:
        ValueError: The run would have no steps.
    """
    total = steps if steps is not None else math.ceil(num_rows * epochs / rows_per_step)
    if num_rows == 0 or total <= 0:
        raise ValueError(
            f"the run would do zero steps: {num_rows} usable rows in {source}, train.steps={steps}, "
            f"train.epochs={epochs}; check the data file and what was left out of it, and the two settings"
        )
    return total


def derive_supervised(config: SftConfig | RmConfig, world_size: int, num_rows: int) -> SupervisedBatching:
    """Return the batching of an SFT or reward-model run.

    Args:
        config: Configuration of the run.
        world_size: Number of ranks.
        num_rows: Number of usable training rows.

    Raises:
        ValueError: Sizes do not divide, or the run would have no steps.
    """
    name, role = next(iter(trained_roles(config).items()))
    train = config.train
    steps = total_steps(train.steps, train.epochs, num_rows, train.global_batch_size, config.data.train)
    batching = _role_batching(name, role, world_size, train.global_batch_size, "train.global_batch_size", 1, steps)
    return SupervisedBatching(num_rows, train.global_batch_size, steps, batching, config.data.row_unit)


def derive_ppo(config: PpoConfig, world_size: int, num_prompts: int) -> PpoBatching:
    """Return the batching of a PPO run.

    Args:
        config: Configuration of the run.
        world_size: Number of ranks.
        num_prompts: Number of usable prompts.

    Raises:
        ValueError: Sizes do not divide, or the run would have no steps.
    """
    algorithm, train = config.algorithm, config.train
    responses = algorithm.rollout_batch_size * algorithm.samples_per_prompt
    minibatches = {
        name: exact_quotient(responses, own.minibatch_size, RESPONSES_FIELDS, own.size_field)
        for name in trained_roles(config)
        for own in [passes(algorithm, name)]
    }
    steps = total_steps(train.steps, train.epochs, num_prompts, algorithm.rollout_batch_size, config.data.train)
    if algorithm.critic_warmup_steps >= steps:
        raise ValueError(
            f"algorithm.critic_warmup_steps={algorithm.critic_warmup_steps}: the run has {steps} PPO steps, so the "
            "actor would never be trained; warm up for fewer steps, or raise train.steps or train.epochs"
        )
    roles = {}
    for name, role in trained_roles(config).items():
        trained = steps - algorithm.critic_warmup_steps if role is config.actor else steps
        own = passes(algorithm, name)
        per_step = own.epochs * minibatches[name]
        roles[name] = _role_batching(
            name, role, world_size, own.minibatch_size, own.size_field, per_step, per_step * trained
        )
    responses_per_rank = exact_quotient(
        responses, roles["actor"].data_parallel_size, RESPONSES_FIELDS, "the data-parallel size of actor"
    )
    return PpoBatching(
        num_prompts=num_prompts,
        rollout_batch_size=algorithm.rollout_batch_size,
        samples_per_prompt=algorithm.samples_per_prompt,
        responses_per_step=responses,
        responses_per_rank=responses_per_rank,
        chunk_size=chunk_size(config, world_size),
        minibatches_per_epoch=minibatches,
        epochs={name: passes(algorithm, name).epochs for name in roles},
        total_steps=steps,
        critic_warmup_steps=algorithm.critic_warmup_steps,
        roles=roles,
    )


def chunk_size(config: PpoConfig, world_size: int) -> int:
    """Return the number of responses of a chunk of the pipeline, over all ranks."""
    responses = config.algorithm.rollout_batch_size * config.algorithm.samples_per_prompt
    return min(config.pipeline.chunk_size or running_batch(config.rollout, world_size), responses)


def chunk_sizes(num_responses: int, chunk_size: int) -> list[int]:
    """Return the number of responses of each chunk, in the order of completion.

    The last of several chunks is cut again. Its responses are the longest and complete one by one, so the first of them need not wait
    for the very last.

    Args:
        num_responses: Number of responses of a step, at least 1.
        chunk_size: Number of responses of a whole chunk.
    """
    sizes = [chunk_size] * ((num_responses - 1) // chunk_size)
    rest = num_responses - sum(sizes)
    while sizes and rest >= 2 * SMALLEST_CUT:
        sizes.append(rest // 2)
        rest -= rest // 2
    return [*sizes, rest]


def num_servers(rollout: RolloutConfig, world_size: int) -> int:
    """Return the number of vLLM servers of the run: as the configuration says, else one for every ``tensor_parallel`` ranks."""
    if rollout.num_servers is not None:
        return rollout.num_servers
    return max(1, world_size // rollout.tensor_parallel)


def num_nodes(world_size: int) -> int:
    """Return the number of nodes of the run: world size over torchrun's LOCAL_WORLD_SIZE, or 1 without torchrun."""
    return max(1, world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def servers_of_nodes(rollout: RolloutConfig, world_size: int) -> list[int]:
    """Return the number of vLLM servers of each node: equal numbers, and one more on the first nodes where that leaves a rest."""
    nodes = num_nodes(world_size)
    each, rest = divmod(num_servers(rollout, world_size), nodes)
    return [each + (node < rest) for node in range(nodes)]


def weight_transfer(rollout: RolloutConfig, *, one_node: bool) -> WeightTransfer:
    """Return how weights get into the servers: as the config says, or for ``auto`` as the places allow.

    Args:
        rollout: Section of the config.
        one_node: Whether all servers are on rank 0's node.
    """
    if rollout.weight_transfer is not WeightTransfer.auto:
        return rollout.weight_transfer
    # One GPU's server reads files too: CUDA IPC has not run on a GPU.
    return WeightTransfer.shared_memory if one_node else WeightTransfer.collective


def sends_buckets(kind: WeightTransfer, rollout: RolloutConfig) -> bool:
    """Return whether a weight sync sends buckets from the trainer's device, which stay on the servers' devices until they are loaded.

    A server of several GPUs may hold a model that does not fit on one of them, so its weights go through host memory.

    Args:
        kind: Way of the weights; not ``auto``.
        rollout: Section of the config.
    """
    return kind is not WeightTransfer.shared_memory and rollout.tensor_parallel == 1


def keeps_weight_files(rollout: RolloutConfig, *, sent: bool, can_sleep: bool) -> bool:
    """Return whether a weight sync writes files: servers read them, or may lose their weights and need them again.

    Args:
        rollout: Section of the config.
        sent: Whether the servers are sent buckets, see ``sends_buckets``.
        can_sleep: Whether the servers sleep. They drop their weights then, and may wake without a sync.
    """
    return not sent or rollout.max_restarts > 0 or can_sleep


def running_batch(rollout: RolloutConfig, world_size: int) -> int:
    """Return the number of responses that all servers generate at once."""
    return rollout.max_num_seqs * num_servers(rollout, world_size)


def _role_batching(
    name: str,
    role: TrainedRoleConfig,
    world_size: int,
    batch: int,
    batch_field: str,
    optimizer_steps_per_step: int,
    total_optimizer_steps: int,
) -> RoleBatching:
    ranks = data_parallel_size(name, role.parallel, world_size)
    per_rank = exact_quotient(batch, ranks, batch_field, f"the data-parallel size of {name}")
    return RoleBatching(
        role=name,
        data_parallel_size=ranks,
        batch_per_rank=per_rank,
        micro_batch_size=role.micro_batch_size,
        micro_batch_tokens=role.micro_batch_tokens,
        micro_batches=None if role.micro_batch_tokens is not None else math.ceil(per_rank / role.micro_batch_size),
        optimizer_steps_per_step=optimizer_steps_per_step,
        total_optimizer_steps=total_optimizer_steps,
    )


def exact_quotient(numerator: int, denominator: int, numerator_name: str, denominator_name: str) -> int:
    """Return a quotient that has to be a whole number.

    Args:
        numerator: Number that is divided.
        denominator: Number that divides it.
        numerator_name: Field of the first number, for the message.
        denominator_name: Field of the second number, for the message.

    Raises:
        ValueError: It is not a whole number; the message names the nearest sizes that would do.
    """
    if numerator % denominator:
        below = numerator - numerator % denominator
        nearest = f"{below} or {below + denominator}" if below else str(denominator)
        raise ValueError(
            f"{numerator_name} = {numerator} is not a multiple of {denominator_name} = {denominator}; "
            f"the nearest multiple is {nearest}"
        )
    return numerator // denominator
