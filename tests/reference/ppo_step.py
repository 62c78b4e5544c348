"""PPO steps of language models from the papers, in plain torch and transformers, to compare runs of this project with.

Nothing of the project is imported: a run's resolved config and its rollout dump are read as the YAML and JSON they are.
Rewards, KL, advantages and whitening are loops over rows and tokens in Python's floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, pstdev, pvariance
from types import SimpleNamespace

import torch
from tests.reference.plain_models import Trained, load, log_probs_and_entropy, padded, scalars
from tests.reference.ppo_metrics import experience_metrics, update_metrics
from tests.reference.recorded import Experience, Response, Rows
from torch import Tensor

Terms = dict[str, Tensor]  # of an update, by name, [tokens]


def kl_estimate(log_ratio: Tensor, kind: str, clamp: float | None) -> Tensor:
    """Estimate KL(policy || reference) from log(policy / reference) at tokens that the policy sampled (Schulman 2020)."""
    k2, k3 = log_ratio**2 / 2, torch.expm1(-log_ratio) + log_ratio
    value = {"k1": log_ratio, "k2": k2, "k3": k3, "k3+": k3}[kind]
    value = value if clamp is None else value.clamp(-clamp, clamp)
    return k2 + (value - k2).detach() if kind == "k3+" else value


class Ppo:
    """Four models, and what a run carries from step to step."""

    def __init__(self, config: SimpleNamespace, function: Callable[[str], float] | None) -> None:
        algorithm, steps = config.algorithm, config.train.steps
        self.config, self.algorithm, self.function = config, algorithm, function
        self.kl_coef, self.seen, self.steps = algorithm.kl.coef, [], 0
        self.passes = {"actor": (algorithm.ppo_epochs, algorithm.minibatch_size)}
        own = (algorithm.critic_epochs, algorithm.critic_minibatch_size)
        self.passes["critic"] = tuple(x or of_actor for x, of_actor in zip(own, self.passes["actor"]))
        rows = algorithm.rollout_batch_size * algorithm.samples_per_prompt
        updates = {name: epochs * (rows // size) for name, (epochs, size) in self.passes.items()}
        actor_updates = updates["actor"] * (steps - algorithm.critic_warmup_steps)
        self.actor = Trained(load(config.actor.model.path, True), config.actor.optimizer, actor_updates)
        self.critic = Trained(load(config.critic.model.path, False), config.critic.optimizer, updates["critic"] * steps)
        self.reference = load(config.reference.model.path, True)
        scorers = [config.reward_model] if config.reward_model else config.reward_models
        self.scorers = [load(role.model.path, False) for role in scorers]

    def step(self, responses: list[Response]) -> tuple[Experience, dict[str, float]]:
        """Run one step. Return the experience and all metrics."""
        experience, metrics = self.experience(responses)
        metrics |= self.update("critic", self.critic, responses, experience)
        if self.steps >= self.algorithm.critic_warmup_steps:
            metrics |= self.update("actor", self.actor, responses, experience)
        if self.algorithm.kl.controller == "adaptive":  # Ziegler et al. 2019, section 2.2
            error = metrics["kl/reference"] / self.algorithm.kl.target - 1
            self.kl_coef *= 1 + min(max(error, -0.2), 0.2) * len(responses) / self.algorithm.kl.horizon
        self.steps += 1
        return experience, metrics

    def log_probs(self, model: torch.nn.Module, responses: list[Response]) -> tuple[list[Tensor], list[Tensor]]:
        temperature = self.config.rollout.sampling.temperature
        both = log_probs_and_entropy(model, padded([r.prompt + r.tokens for r in responses]), temperature)
        log_probs, entropy = ([row[len(r.prompt) - 1 :][: len(r.tokens)] for row, r in zip(x, responses)] for x in both)
        return log_probs, entropy

    def values(self, responses: list[Response]) -> list[Tensor]:
        """Return the value of the state before each token."""
        outputs = scalars(self.critic.model, padded([r.prompt + r.tokens for r in responses]))
        return [row[len(r.prompt) - 1 :][: len(r.tokens)] for row, r in zip(outputs, responses)]

    def score(self, responses: list[Response]) -> tuple[list[float], dict[str, list[float]]]:
        """Return one score per response, NaN where the function raises, and the parts of the scores."""
        config, ids = self.config.reward, padded([r.prompt + r.tokens for r in responses])
        ends = [len(r.prompt) + len(r.tokens) - 1 for r in responses]
        each = [[float(row[end]) for row, end in zip(scalars(scorer, ids), ends)] for scorer in self.scorers]
        combine = {"mean": fmean, "min": min, "mean_minus_std": lambda s: fmean(s) - config.ensemble_k * pstdev(s)}
        model = [combine[config.ensemble](scores) for scores in zip(*each)] or [0.0] * len(responses)
        function = [0.0] * len(responses)
        if config.source != "model":
            for i, response in enumerate(responses):
                try:
                    function[i] = self.function(response.text)
                except ValueError:
                    function[i] = math.nan
        parts = {"model": model, "function": function} if config.source == "mix" else {}
        if len(each) > 1:
            parts |= {f"model_{i}": member for i, member in enumerate(each)}
            parts["ensemble_std"] = [pstdev(scores) for scores in zip(*each)]
        weights = {"model": (1, 0), "function": (0, 1), "mix": (config.model_weight, config.function_weight)}
        a, b = weights[config.source]
        return [a * x + b * y for x, y in zip(model, function)], parts

    def shape(self, score: float, truncated: bool) -> float:
        """Return a score as the policy sees it."""
        config = self.config.reward
        if config.normalise:
            score = (score - fmean(self.seen)) / math.sqrt(pvariance(self.seen))
        if config.clip:
            score = min(max(score, -config.clip), config.clip)
        return self.algorithm.truncation_score if truncated and self.algorithm.truncated == "penalise" else score

    @torch.no_grad()
    def experience(self, responses: list[Response]) -> tuple[Experience, dict[str, float]]:
        """Compute rewards (Ziegler et al. 2019, equation 2) and advantages (Schulman et al. 2016, equation 16)."""
        algorithm, correction = self.algorithm, self.algorithm.rollout_correction
        values = [row.tolist() for row in self.values(responses)]
        models = (self.reference, self.actor.model)
        ref, old = ([row.tolist() for row in self.log_probs(model, responses)[0]] for model in models)
        old = [r.sampled for r in responses] if algorithm.old_log_probs == "rollout" else old
        scores, parts = self.score(responses)
        scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
        self.seen += [scores[i] for i in scored]
        used = [i for i in scored if algorithm.truncated != "mask" or not responses[i].truncated]
        rewards, advantages, returns, weights = ([[] for _ in responses] for _ in range(4))
        for i in used:
            for p, q in zip(old[i], ref[i]):
                log_ratio = torch.tensor(p - q, dtype=torch.float64)
                kl = kl_estimate(log_ratio, algorithm.kl.estimator, algorithm.kl.clamp)
                rewards[i].append(-self.kl_coef * float(kl))
            rewards[i][-1] += self.shape(scores[i], responses[i].truncated)
            advantage = next_value = 0.0
            for reward, value in zip(reversed(rewards[i]), reversed(values[i])):
                advantage = reward + algorithm.gamma * next_value - value + algorithm.gamma * algorithm.lam * advantage
                next_value = value
                advantages[i].insert(0, advantage)
                returns[i].insert(0, advantage + value)
            gaps = [p - q for p, q in zip(old[i], responses[i].sampled)]
            gaps = [sum(gaps)] * len(gaps) if correction.level == "sequence" else gaps
            weights[i] = [min(math.exp(gap), correction.cap) if correction.kind == "truncated" else 1.0 for gap in gaps]
        if algorithm.whiten_advantages:
            tokens = [a for row in advantages for a in row]
            mean, std = fmean(tokens), pstdev(tokens)
            advantages = [[(a - mean) / std for a in row] for row in advantages]
        found = Experience(scores, old, ref, values, rewards, advantages, returns, weights, used, parts, self.kl_coef)
        return found, experience_metrics(found, responses, self.config)

    def minibatches(self, name: str, num_rows: int) -> list[list[int]]:
        """Draw the rows of every update as the run does."""
        generator = torch.Generator().manual_seed(self.config.run.seed * 7_919 + self.steps)
        epochs, size = self.passes[name]
        orders = [torch.randperm(num_rows, generator=generator).tolist() for _ in range(epochs)]
        return [order[i : i + size] for order in orders for i in range(0, num_rows, size)]

    def update(self, name: str, role: Trained, responses: list[Response], experience: Experience) -> dict[str, float]:
        """Run all updates of a role. Return the metrics over every token of them."""
        loss_of = {"actor": self.actor_loss, "critic": self.critic_loss}[name]
        norms, seen = [], []
        for minibatch in self.minibatches(name, len(responses)):
            rows = [i for i in minibatch if i in experience.used]
            loss, terms = loss_of([responses[i] for i in rows], experience, rows)
            norm, rate = role.step(loss)
            norms.append(norm)
            seen.append({key: term.detach() for key, term in terms.items()})
        others = {f"{name}/grad_norm": fmean(norms), f"{name}/lr": rate, f"{name}/skipped_steps": 0}
        return update_metrics(name, seen) | others

    def actor_loss(self, responses: list[Response], experience: Experience, rows: list[int]) -> tuple[Tensor, Terms]:
        """Compute the policy loss: Schulman et al. 2017, equation 7; Ye et al. 2020 (dual clip); Yao et al. 2025 (weights)."""
        algorithm = self.algorithm
        log_probs, entropy = (torch.cat(x) for x in self.log_probs(self.actor.model, responses))
        old, a = column(experience.old, rows), column(experience.advantages, rows)
        ratio = (log_probs - old).exp()
        plain, clipped = -a * ratio, -a * ratio.clamp(1 - algorithm.clip_ratio, 1 + algorithm.clip_ratio)
        loss = torch.maximum(plain, clipped)
        bounded = torch.zeros_like(loss)
        if algorithm.dual_clip is not None:
            bounded = ((a < 0) & (loss > -algorithm.dual_clip * a)).double()
            loss = torch.where(bounded > 0, -algorithm.dual_clip * a, loss)
        loss = loss * column(experience.weights, rows)
        terms = {"pg_loss": loss, "entropy": entropy, "ppo_kl": old - log_probs, "ratio_mean": ratio}
        terms |= {"pg_clipfrac": (clipped > plain).double(), "pg_clipfrac_lower": bounded}
        total = loss.mean() - algorithm.entropy_coef * entropy.mean()
        if algorithm.kl.loss_coef:
            kl, log_ratio = algorithm.kl, log_probs - column(experience.ref, rows)
            terms["kl_loss"] = kl_estimate(log_ratio, kl.loss_estimator, kl.clamp)
            total = total + kl.loss_coef * terms["kl_loss"].mean()
        return total, terms

    def critic_loss(self, responses: list[Response], experience: Experience, rows: list[int]) -> tuple[Tensor, Terms]:
        """Compute half the squared error, clipped as in openai/baselines' ppo2."""
        values, clip = torch.cat(self.values(responses)), self.algorithm.value_clip
        old, returns = column(experience.values, rows), column(experience.returns, rows)
        error = (values - returns) ** 2
        clipped = error if clip is None else (torch.clamp(values, old - clip, old + clip) - returns) ** 2
        terms = {"vf_loss": torch.maximum(error, clipped) / 2, "vf_clipfrac": (clipped > error).double()}
        return terms["vf_loss"].mean(), terms | {"vpred_mean": values, "returns": returns, "old": old}


def column(values: Rows, rows: list[int]) -> Tensor:
    """Concatenate these rows to [tokens] float64."""
    return torch.tensor([value for i in rows for value in values[i]], dtype=torch.float64)
