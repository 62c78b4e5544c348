"""Rules for the options of a run that goes on from a checkpoint."""

from __future__ import annotations

from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.on_resume import rule_of
from hetero_ppo.config.require import require
from hetero_ppo.config.schema.option import OnResume


def check_allowed_changes(config: AnyConfig, world_size: int) -> None:
    """Every name in checkpoint.allow_changes is a field or a section that can be allowed to change."""
    for name in config.checkpoint.allow_changes:
        rule = rule_of(type(config), name)
        require(rule is not None, "checkpoint.allow_changes", name, "there is no such field or section")
        require(
            rule not in (OnResume.form, OnResume.start),
            "checkpoint.allow_changes",
            name,
            "this field cannot be another one than the checkpoint's"
            if rule is OnResume.form
            else "this field belongs to each start, and is not compared",
        )
