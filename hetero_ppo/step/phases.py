"""The phases of a training step as values: whose work each is, and what it needs on the device.

Memory plan, residency, trace, ledger and the stages of the experience read this list. Its order saves switches of the device:

- The first reward model is on the device while the generator works, so that it can score at once.
- The critic's values are the last forward, so that its training finds its parameters on the device.
- The actor's training is the last training, so that the weight synchronisation finds them too.

Without a critic its two phases are absent. When the forwards run during generation, they run once for every wave of chunks
(``experience.pipeline``), and in this order in the last wave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from hetero_ppo.config.derived import actor_generates, config_reward_models, overlaps_generation
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import OldLogProbs, PpoConfig
from hetero_ppo.step.kinds import FORWARD, TRAINING, Kind
from hetero_ppo.step.roles import ACTOR, CRITIC, REFERENCE, run_roles


#: Prefix of the names of weights among what phases read and write.
WEIGHTS = "weights of "


class GeneratorMemory(Enum):
    """The memory that the generator holds on the device."""

    nothing = "nothing"  # it sleeps
    weights = "weights"  # during a weight synchronisation
    everything = "everything"  # weights and key-value cache


@dataclass(frozen=True)
class Phase:
    """One phase of a step."""

    name: str  # as the step's timers, the trace and the ledger name it
    role: str | None  # role that computes; None: the generator works
    needs: Mapping[str, frozenset[Kind]]  # role -> kinds on the device while it runs; absent roles are in host memory
    reads: Sequence[str] = ()  # names of tensors of the step, and "weights of <role>"
    writes: Sequence[str] = ()  # names of the same kind
    generator: GeneratorMemory = GeneratorMemory.nothing
    is_concurrent: bool = False  # whether it runs during generation, chunk after chunk

    @property
    def is_forward(self) -> bool:
        """True when it is a role's forward over the rollout, which writes the tensor of the phase's own name."""
        return self.role is not None and self.name in self.writes

    @property
    def is_training(self) -> bool:
        """True when it ends with an update of the role's weights."""
        return self.role is not None and weights_of(self.role) in self.writes


def weights_of(role: str) -> str:
    """Return how ``Phase.reads`` and ``Phase.writes`` name a role's weights."""
    return f"{WEIGHTS}{role}"


def score_phases(reward_models: Sequence[str]) -> dict[str, str]:
    """Return phase -> reward model that scores in it, in the order of their turns."""
    if len(reward_models) == 1:
        return {"scores": reward_models[0]}
    return {f"scores_{number}": name for number, name in enumerate(reward_models)}


def step_phases(config: AnyConfig) -> list[Phase]:
    """Return the phases of one training step, in order, as they are with residency on."""
    if not isinstance(config, PpoConfig):
        return [training_phase(name, phase="train") for name, spec in run_roles(config).items() if spec.is_trained]
    return ppo_phases(
        reward_models=list(config_reward_models(config)),
        has_critic=config.critic is not None,
        actor_scores_old=config.algorithm.old_log_probs is OldLogProbs.actor,
        overlap=overlaps_generation(config),
        actor_generates=actor_generates(config),
    )


def ppo_phases(
    *,
    reward_models: Sequence[str],
    actor_scores_old: bool,
    has_critic: bool = True,
    overlap: bool = False,
    actor_generates: bool = False,
) -> list[Phase]:
    """Return the phases of one PPO step with residency on, in order.

    Args:
        reward_models: Roles that score; empty: a function alone does.
        actor_scores_old: Whether old log-probs come from a forward of the actor; otherwise they are the generator's.
        has_critic: Whether a critic gives values and is trained.
        overlap: Whether forwards run while the generator works, for chunk after chunk; it is then awake in them.
        actor_generates: Whether the actor is the generator; the rollout is then the actor's turn.
    """
    waiting = {ACTOR: FORWARD} if actor_generates else {name: FORWARD for name in reward_models[:1]}
    phases = [Phase("rollout", None, waiting, writes=("rollout",), generator=GeneratorMemory.everything)]
    scoring = score_phases(reward_models)
    phases += [forward_phase(phase, name, overlap=overlap) for phase, name in scoring.items()]
    phases.append(forward_phase("ref_log_probs", REFERENCE, overlap=overlap))
    phases += [forward_phase("old_log_probs", ACTOR, overlap=overlap)] if actor_scores_old else []
    phases += [forward_phase("values", CRITIC, overlap=overlap)] if has_critic else []
    experience = [name for phase in phases for name in phase.writes]
    phases += [training_phase(name, experience) for name in ([CRITIC, ACTOR] if has_critic else [ACTOR])]
    sync_reads = (weights_of(ACTOR),)
    phases.append(Phase("weight_sync", ACTOR, {ACTOR: FORWARD}, sync_reads, generator=GeneratorMemory.weights))
    return phases


def forward_phase(phase: str, role: str, *, overlap: bool) -> Phase:
    """Return the phase of a role's forward over the rollout, which writes the tensor of its own name."""
    generator = GeneratorMemory.everything if overlap else GeneratorMemory.nothing
    reads = ("rollout", weights_of(role))
    return Phase(phase, role, {role: FORWARD}, reads, (phase,), generator, is_concurrent=overlap)


def training_phase(role: str, reads: Sequence[str] = (), *, phase: str | None = None) -> Phase:
    """Return the phase of a role's optimizer steps.

    Args:
        role: The role.
        reads: Tensors of the step that its loss is computed from.
        phase: Its name; None: ``train_<role>``.
    """
    weights = weights_of(role)
    return Phase(phase or f"train_{role}", role, {role: TRAINING}, (*reads, weights), (weights,))


def check_order(phases: Sequence[Phase]) -> None:
    """Check that a step can run in this order: every phase reads what an earlier one wrote, or the weights of a role.

    Raises:
        ValueError: A phase reads a tensor that no earlier phase writes, has the name of another one, or needs nothing of its own role.
    """
    written: set[str] = set()
    names: set[str] = set()
    for phase in phases:
        if phase.name in names:
            raise ValueError(f"phase {phase.name!r} is in the step twice; give each phase a name of its own")
        if phase.role is not None and not phase.needs.get(phase.role):
            raise ValueError(
                f"phase {phase.name!r} needs nothing of {phase.role}, whose work it is; add its kinds to needs"
            )
        for name in phase.reads:
            if name not in written and not name.startswith(WEIGHTS):
                raise ValueError(
                    f"phase {phase.name!r} reads {name}, which no phase before it writes; move it behind the one that does"
                )
        names.add(phase.name)
        written |= {*phase.writes}
