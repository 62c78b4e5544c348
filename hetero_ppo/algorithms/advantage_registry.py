"""The advantage estimators that ``algorithm.advantage`` may name, and the rule that they and the critic go together."""

from __future__ import annotations

from hetero_ppo.algorithms.advantages import AdvantageEstimator
from hetero_ppo.algorithms.gae import Gae
from hetero_ppo.config.load import AnyConfig
from hetero_ppo.config.schema import AlgorithmConfig, PpoConfig

#: Value of ``algorithm.advantage`` -> estimator.
ESTIMATORS: dict[str, type[AdvantageEstimator]] = {estimator.name: estimator for estimator in (Gae,)}


def build_estimator(config: AlgorithmConfig) -> AdvantageEstimator:
    """Return the estimator of a run.

    Args:
        config: Checked section ``algorithm`` of the run.
    """
    return ESTIMATORS[config.advantage].for_run(config)


def check_advantage(config: AnyConfig) -> None:
    """Check that the estimator exists, and that there is a critic if and only if it reads values.

    Args:
        config: Configuration of a run of any kind.

    Raises:
        ValueError: It names the field, the value and what to change.
    """
    if not isinstance(config, PpoConfig):
        return
    name = config.algorithm.advantage
    if name not in ESTIMATORS:
        raise ValueError(f"algorithm.advantage={name}: no such estimator; allowed: {', '.join(ESTIMATORS)}")
    needs_values, has_critic = ESTIMATORS[name].needs_values, config.critic is not None
    if needs_values and not has_critic:
        free = [other for other, estimator in ESTIMATORS.items() if not estimator.needs_values]
        instead = f", or choose an estimator that needs none ({', '.join(free)})" if free else ""
        raise ValueError(
            f"critic=null: algorithm.advantage={name} needs the values of a critic; give critic.model.path{instead}"
        )
    if has_critic and not needs_values:
        raise ValueError(
            f"algorithm.advantage={name}: the estimator reads no values, and the critic would be trained for nothing; set critic: null"
        )
