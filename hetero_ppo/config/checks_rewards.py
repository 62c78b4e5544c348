"""Rules of what scores responses."""

from __future__ import annotations

from hetero_ppo.config.require import require
from hetero_ppo.config.schema import EnsembleScore, PpoConfig, RewardConfig, RewardSource


def check_reward_source(reward: RewardConfig, *, has_model: bool) -> None:
    """Raise where reward.source asks for a score that is not there, or leaves one out that is.

    Args:
        reward: Section of the rewards.
        has_model: Whether the run has a reward model.
    """
    source, has_function = reward.source.value, reward.function is not None
    if reward.source is RewardSource.model:
        fix = "reward.source is model, so it would not be used; set reward.source=mix or function, or reward.function=null"
        require(not has_function, "reward.function", reward.function, fix)
    else:
        fix = "set reward.function to package.module:function or path/to/file.py:function"
        require(has_function, "reward.source", source, fix)
    if reward.source is RewardSource.function:
        fix = "reward_model is set and would not be used; set reward_model=null (reward_models=[]), or reward.source=mix or model"
        require(not has_model, "reward.source", source, fix)
    else:
        fix = "set reward_model.model.path (reward_models for an ensemble), or reward.source=function"
        require(has_model, "reward.source", source, fix)
    for field in ("model_weight", "function_weight"):
        weight, name = vars(reward)[field], f"reward.{field}"
        require(
            weight != 0,
            name,
            weight,
            "a score with weight 0 would not be used; give another weight, or change reward.source",
        )
        fix = f"reward.source is {source}, so it would not be used; set reward.source=mix, or leave it out"
        require(weight == 1 or reward.source is RewardSource.mix, name, weight, fix)


def check_ensemble(config: PpoConfig) -> None:
    """Raise for an ensemble of one model, a second place of reward models, or options of an ensemble without one."""
    reward, size = config.reward, len(config.reward_models)
    fix = "reward_model is set too; an ensemble's models all stand in reward_models, so set reward_model=null"
    require(size == 0 or config.reward_model is None, "reward_models", f"[{size} models]", fix)
    require(size != 1, "reward_models", "[1 model]", "an ensemble has two at least; give a single one as reward_model")
    fix = "there is no ensemble; give reward_models, or leave it out"
    require(size > 0 or reward.ensemble is EnsembleScore.mean, "reward.ensemble", reward.ensemble.value, fix)
    k, name = reward.ensemble_k, "reward.ensemble_k"
    fix = "only reward.ensemble=mean_minus_std uses it; set that, or leave it out"
    require(k == 1 or reward.ensemble is EnsembleScore.mean_minus_std, name, k, fix)
