"""Which role is on the device in which phase of a PPO step: the order that the trainer follows and the plan adds up.

The order saves switches. The first reward model waits on the device while the engine generates, in the critic's place. The
critic's values come last of the forwards, so its training finds the parameters there; the actor's training comes last
of all, so the weight sync does. With overlapped generation the forwards come round once for every wave of chunks
(``experience.pipeline``), the last time in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetero_ppo.step.kinds import FORWARD, TRAINING, Kind


@dataclass(frozen=True)
class Turn:
    """One phase of a step and what it holds on the device while it computes, all roles together."""

    phase: str  # as the step's timers name it
    resident: Mapping[str, frozenset[Kind]]  # role -> kinds; absent roles are in host memory
    engine_awake: bool = False  # the rollout engine holds its weights and KV cache
    engine_weights: bool = False  # the rollout engine holds its weights alone: during a weight sync


def score_phases(reward_models: Sequence[str]) -> dict[str, str]:
    """Phase -> reward model that scores in it, in the order of their turns."""
    if len(reward_models) == 1:
        return {"scores": reward_models[0]}
    return {f"scores_{number}": name for number, name in enumerate(reward_models)}


def ppo_turns(
    *,
    reward_models: Sequence[str],
    actor_scores_old: bool,
    overlap: bool = False,
    actor_generates: bool = False,
) -> list[Turn]:
    """The phases of one PPO step with residency on, in order.

    Args:
        reward_models: roles that score; empty: a function alone does.
        actor_scores_old: old log-probs come from a forward of the actor; otherwise from the rollout engine.
        overlap: forwards run beside generation, for chunk after chunk: the engine is awake in them.
        actor_generates: the actor is the rollout engine, whose turn is the actor's.
    """
    waiting = {"actor": FORWARD} if actor_generates else {name: FORWARD for name in reward_models[:1]}
    turns = [Turn("rollout", waiting, engine_awake=True)]
    for phase, name in score_phases(reward_models).items():
        turns.append(Turn(phase, {name: FORWARD}, engine_awake=overlap))
    turns.append(Turn("ref_log_probs", {"reference": FORWARD}, engine_awake=overlap))
    if actor_scores_old:
        turns.append(Turn("old_log_probs", {"actor": FORWARD}, engine_awake=overlap))
    turns.append(Turn("values", {"critic": FORWARD}, engine_awake=overlap))
    turns.append(Turn("train_critic", {"critic": TRAINING}))
    turns.append(Turn("train_actor", {"actor": TRAINING}))
    turns.append(Turn("weight_sync", {"actor": FORWARD}, engine_weights=True))
    return turns
