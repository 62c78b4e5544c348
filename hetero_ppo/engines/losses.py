"""The losses in the form that a TrainEngine calls: from model output and micro-batch to sums."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from hetero_ppo.algorithms.losses import (
    Loss,
    bradley_terry_loss,
    entropy_bonus,
    kl_loss,
    policy_loss,
    sft_loss,
    value_loss,
)
from hetero_ppo.config.schema import AlgorithmConfig, RewardModelLossConfig
from hetero_ppo.engines.loss_terms import LossFn
from hetero_ppo.engines.outputs import scores_output, token_log_probs, values_output
from hetero_ppo.types import Microbatch

#: Losses come as sums over tokens; the engine divides gradients by the minibatch's number of tokens.
SUM = 1.0


def sft_loss_fn(vocab_size: int, groups: ProcessGroupCollection, num_parts: int | None = None) -> LossFn:
    """Return the negative log-likelihood of the answers' tokens. The arguments are those of ``token_log_probs``."""

    def loss_fn(logits: Tensor, microbatch: Microbatch) -> Loss:
        log_probs, _ = token_log_probs(
            logits, microbatch, temperature=1.0, vocab_size=vocab_size, groups=groups, num_parts=num_parts
        )
        return sft_loss(log_probs, microbatch.inputs.mask, SUM)

    return loss_fn


def reward_loss_fn(config: RewardModelLossConfig) -> LossFn:
    """Return the Bradley-Terry loss. Its micro-batches come from ``split_pairs``."""

    def loss_fn(output: Tensor, microbatch: Microbatch) -> Loss:
        chosen, rejected = scores_output(output, microbatch).chunk(2)
        return bradley_terry_loss(chosen, rejected, config.margin, config.score_l2, SUM)

    return loss_fn


def actor_loss_fn(
    config: AlgorithmConfig,
    temperature: float,
    vocab_size: int,
    groups: ProcessGroupCollection,
    num_parts: int | None = None,
) -> LossFn:
    """Return the loss of the actor: clipped policy objective, entropy bonus and, with ``kl.loss_coef``, the KL to the reference.

    The objective is weighted if the micro-batch has importance weights. Arguments besides ``config`` are those of ``token_log_probs``.

    Args:
        config: Section ``algorithm`` of the run.
    """

    def loss_fn(logits: Tensor, microbatch: Microbatch) -> Loss:
        inputs = microbatch.inputs
        log_probs, entropy = token_log_probs(
            logits,
            microbatch,
            temperature=temperature,
            vocab_size=vocab_size,
            groups=groups,
            with_entropy=True,
            num_parts=num_parts,
        )
        assert entropy is not None
        loss = policy_loss(
            log_probs,
            inputs.old_log_probs,
            inputs.advantages,
            inputs.mask,
            config.clip_ratio,
            config.dual_clip,
            SUM,
            inputs.tis_weights,
        )
        loss = loss + entropy_bonus(entropy, inputs.mask, config.entropy_coef, SUM)
        kl = config.kl
        if kl.loss_coef:
            loss = loss + kl_loss(
                log_probs, inputs.ref_log_probs, inputs.mask, kl.loss_estimator, kl.clamp, kl.loss_coef, SUM
            )
        return loss

    return loss_fn


def critic_loss_fn(config: AlgorithmConfig) -> LossFn:
    """Return the loss of the critic: the clipped squared error of the values."""

    def loss_fn(output: Tensor, microbatch: Microbatch) -> Loss:
        inputs = microbatch.inputs
        values = values_output(output, microbatch)
        return value_loss(values, inputs.old_values, inputs.returns, inputs.mask, config.value_clip, SUM)

    return loss_fn
