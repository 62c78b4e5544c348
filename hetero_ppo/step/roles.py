"""The models of a run as values: memory plan, trace, report, export and checkpoints read these and name no model themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hetero_ppo.config.derived import config_roles
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import RoleConfig, TrainedRoleConfig

#: What the last stage of a model computes.
Head = Literal["lm", "value", "score"]

#: Places of the report's palette that roles leave to the generator and to waiting.
GENERATOR_COLOUR, WAIT_COLOUR = 4, 5


@dataclass(frozen=True)
class RoleSection:
    """What all roles of one section of the configuration have in common."""

    head: Head  # what the last stage computes
    is_trained: bool  # it has gradients and an optimizer, and lies in checkpoints
    colour: int  # index into the report's palette


#: Names of the roles that a PPO run treats one by one.
ACTOR, CRITIC, REFERENCE = "actor", "critic", "reference"

#: Section of the configuration -> its role, or the roles of its list. The order is that of building them, and of the trace's lanes.
ROLE_SECTIONS: Mapping[str, RoleSection] = {
    ACTOR: RoleSection("lm", True, 0),
    CRITIC: RoleSection("value", True, 1),
    REFERENCE: RoleSection("lm", False, 2),
    "reward": RoleSection("score", True, 3),
    "reward_model": RoleSection("score", False, 3),
    "reward_models": RoleSection("score", False, 3),
}


@dataclass(frozen=True)
class RoleSpec:
    """One model of a run."""

    name: str  # path of its section: "actor", "reward_models.0"; also its lane in the trace and its folder in a checkpoint
    head: Head
    is_trained: bool
    config: RoleConfig

    @property
    def trained_config(self) -> TrainedRoleConfig:
        """Its section, with an optimizer."""
        assert isinstance(self.config, TrainedRoleConfig), f"{self.name} is not trained"
        return self.config


def section_of(role: str) -> RoleSection:
    """Return what the section of a role says: ``reward_models`` for the role ``reward_models.0``."""
    return ROLE_SECTIONS[role.partition(".")[0]]


def role_spec(name: str, config: RoleConfig) -> RoleSpec:
    """Return the specification of a role.

    Args:
        name: Path of its section.
        config: The section.
    """
    section = section_of(name)
    return RoleSpec(name, section.head, section.is_trained, config)


def run_roles(config: AnyConfig) -> dict[str, RoleSpec]:
    """Return name -> specification of every role that a run builds, in the order of building."""
    return {name: role_spec(name, role) for name, role in config_roles(config).items()}
