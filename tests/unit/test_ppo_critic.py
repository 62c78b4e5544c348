"""What a run prints of the critic before its first update."""

import math

from hetero_ppo.trainers.ppo_critic import describe_first_values


def test_values_that_are_worse_than_none_are_warned_of() -> None:
    bad = describe_first_values(-5.31)
    assert bad.startswith("warning: critic: its values explain -5.31 of the variance of step 1's returns")
    assert "critic.model.head_init=zero" in bad and "algorithm.critic_warmup_steps" in bad
    assert describe_first_values(0.0).startswith("critic: its values explain 0 of the variance")
    assert describe_first_values(0.25).startswith("critic: its values explain 0.25 of")
    assert "nothing can be said" in describe_first_values(math.nan)
