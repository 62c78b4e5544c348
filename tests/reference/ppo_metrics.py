"""Metrics of a reference step, under the names of this project."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor


def experience_metrics(experience: Any, responses: list[Any], config: Any) -> dict[str, float]:
    """Return the metrics of all responses that have a score, even of those that the losses leave out."""
    scored = [i for i, score in enumerate(experience.scores) if not math.isnan(score)]
    scores = [experience.scores[i] for i in scored]
    kl = [sum(p) - sum(q) for p, q in zip(experience.old, experience.ref)]
    lengths = [len(response.tokens) for response in responses]
    metrics = {
        "reward/mean": fmean(scores),
        "reward/std": pstdev(scores),
        "reward/min": min(scores),
        "reward/max": max(scores),
        "reward/num_excluded": len(experience.scores) - len(scored),
        "reward/with_kl_mean": fmean(sum(experience.rewards[i]) for i in scored),
        "kl/reference": fmean(kl),
        "kl/coef": experience.kl_coef,
        "response_length/mean": fmean(lengths),
        "response_length/max": max(lengths),
        "response_length/clip_ratio": fmean(response.truncated for response in responses),
    }
    for name, values in experience.parts.items():
        values = [value for value in values if not math.isnan(value)]
        metrics |= {f"reward/{name}/mean": fmean(values), f"reward/{name}/std": pstdev(values)}
    if config.reward.on_error == "exclude":
        kinds = {"error": metrics["reward/num_excluded"], "timeout": 0, "crash": 0, "bad_score": 0}
        metrics |= {f"reward/function/num_{kind}": number for kind, number in kinds.items()}
    return metrics | engine_metrics(experience, responses, config.algorithm)


def engine_metrics(experience: Any, responses: list[Any], algorithm: Any) -> dict[str, float]:
    """Return the mismatch between the trainer and the generator, and its importance weights."""
    if algorithm.old_log_probs == "rollout":  # the sampler's own: there is nothing to compare
        return {}
    gaps = [p - q for old, response in zip(experience.old, responses) for p, q in zip(old, response.sampled)]
    metrics = {
        "rollout/log_prob_diff_mean": fmean(abs(gap) for gap in gaps),
        "rollout/log_prob_diff_max": max(abs(gap) for gap in gaps),
        "rollout/ratio_outside_share": fmean(abs(math.exp(gap) - 1) > 0.01 for gap in gaps),
        "rollout/mismatch_kl": fmean(math.expm1(gap) - gap for gap in gaps),
    }
    if algorithm.rollout_correction.kind == "truncated":
        weights = [weight for row in experience.weights for weight in row]
        metrics["actor/tis_weight_mean"] = fmean(weights)
        metrics["actor/tis_clipped_share"] = fmean(weight == algorithm.rollout_correction.cap for weight in weights)
    return metrics


def update_metrics(name: str, seen: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the means over every token of all updates of a role. The explained variance is that of the values before the updates."""
    columns = {key: torch.cat([terms[key] for terms in seen]).double() for key in seen[0]}
    metrics = {f"{name}/{key}": float(column.mean()) for key, column in columns.items()}
    if name == "actor":
        return metrics | {"actor/ppo_kl_first": float(seen[0]["ppo_kl"].mean())}
    residual, returns = columns["returns"] - columns["old"], columns["returns"]
    metrics["critic/returns/mean"] = metrics.pop("critic/returns")
    del metrics["critic/old"]
    return metrics | {"critic/vf_explained_var": float(1 - residual.var(correction=0) / returns.var(correction=0))}
