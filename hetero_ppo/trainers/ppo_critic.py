"""What a PPO run prints of its critic before it has learned anything."""

from __future__ import annotations

import math


def describe_first_values(explained_variance: float) -> str:
    """Return a line on the critic's values of the first step, which no update has touched.

    Args:
        explained_variance: ``critic/vf_explained_var`` of step 1: the share of the returns' variance that the values explain. NaN
            where all returns are equal.
    """
    if math.isnan(explained_variance):
        return "critic: all returns of step 1 are equal, so nothing can be said of its values"
    line = f"critic: its values explain {explained_variance:.3g} of the variance of step 1's returns"
    if explained_variance >= 0:
        return f"{line} (0: as good as their mean; 1: all of it)"
    return (
        f"warning: {line}: advantages are noisier than with no critic at all until it has learned. Start its head at zero "
        "(critic.model.head_init=zero, with a critic.model.path without a score head), train it alone for some steps "
        "(algorithm.critic_warmup_steps), or bring the rewards to the scale of its checkpoint's scores (reward.normalise, reward.clip)"
    )
