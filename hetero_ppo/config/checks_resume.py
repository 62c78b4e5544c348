"""Rules of a run that resumes from a checkpoint."""

from __future__ import annotations

from hetero_ppo.config.on_resume import rule_of
from hetero_ppo.config.require import require
from hetero_ppo.config.schema import CheckpointConfig
from hetero_ppo.config.schema.option import OnResume


def check_checkpoint_step(checkpoint: CheckpointConfig) -> None:
    """Raise for the step of a checkpoint where no folder to load from is given."""
    require(
        checkpoint.step is None or checkpoint.load is not None,
        "checkpoint.step",
        checkpoint.step,
        "needs checkpoint.load",
    )


def check_allowed_changes(checkpoint: CheckpointConfig, schema_class: type) -> None:
    """Raise for a name in checkpoint.allow_changes that is no field or section, or one that cannot change.

    Args:
        checkpoint: Section of the configuration.
        schema_class: Class of the whole configuration.
    """
    for name in checkpoint.allow_changes:
        rule = rule_of(schema_class, name)
        require(rule is not None, "checkpoint.allow_changes", name, "there is no such field or section")
        require(
            rule not in (OnResume.form, OnResume.start),
            "checkpoint.allow_changes",
            name,
            "this field cannot be another one than the checkpoint's"
            if rule is OnResume.form
            else "this field belongs to each start, and is not compared",
        )
