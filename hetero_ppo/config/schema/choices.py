"""Options that take one of a few names. A configuration holds the name of a member."""

from __future__ import annotations

from enum import Enum


class Dtype(str, Enum):
    """Parameter dtype of a role. Main parameters and optimizer moments are fp32 in both cases."""

    fp32 = "fp32"
    bf16 = "bf16"


class HeadInit(str, Enum):
    """Initial value of a scalar head that the checkpoint of a critic or a reward model lacks."""

    zero = "zero"
    normal = "normal"  # N(0, 1 / (hidden + 1)), from model.init_seed (Stiennon et al. 2020)


class LrSchedule(str, Enum):
    """Shape of the learning rate over the optimizer steps, after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class KlEstimator(str, Enum):
    """Per-token estimators of KL(policy || reference), Schulman 2020, "Approximating KL divergence"."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    locals()["k3+"] = "k3+"  # the value of k3, the gradient of k2; configs name members, and this name is no identifier


class KlController(str, Enum):
    """Rule by which the weight of the KL penalty changes during a run."""

    fixed = "fixed"
    adaptive = "adaptive"


class LogLevel(str, Enum):
    """Lowest level of the lines that a run prints."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(str, Enum):
    """Form of the lines that a run prints on stdout."""

    text = "text"
    json = "json"  # one object per line


class TruncatedResponses(str, Enum):
    """Treatment of a response that reached the length limit without an end-of-sequence token."""

    score = "score"  # scored like any other
    penalise = "penalise"  # its score is replaced by algorithm.truncation_score
    mask = "mask"  # it takes no part in the losses, nor in whitening


class OverlongPrompts(str, Enum):
    """Treatment of a prompt over data.max_prompt_tokens, or an SFT or preference row over max_sequence_tokens."""

    drop = "drop"  # left out, and their number is printed
    error = "error"  # the run does not start


class RewardSource(str, Enum):
    """Source of a response's score."""

    model = "model"
    function = "function"
    mix = "mix"  # both: reward.model_weight x the model's score + reward.function_weight x the function's


class GeneratorKind(str, Enum):
    """Kind of generator. The generator answers the prompts."""

    vllm = "vllm"  # servers next to the trainer
    megatron = "megatron"  # the actor itself, between its other turns; for machines without vLLM, and for debugging


class WeightTransfer(str, Enum):
    """Path of the actor's weights into the servers; ``derived.weight_transfer`` has the rule for auto."""

    auto = "auto"
    shared_memory = "shared_memory"  # files that servers on the trainer's node read
    collective = "collective"  # broadcast in a process group of trainer and servers: gloo on CPUs, NCCL on GPUs
    cuda_ipc = "cuda_ipc"  # the one server on the trainer's own GPU reads the trainer's memory


class OldLogProbs(str, Enum):
    """Source of the log-probs of the policy that sampled."""

    actor = "actor"  # a forward of the actor
    rollout = "rollout"  # the generator's own; saves a forward, and the generator's rounding enters the ratio


class RolloutCorrectionKind(str, Enum):
    """Correction of the small difference between the generator's policy and the trainer's."""

    none = "none"
    truncated = "truncated"  # truncated importance sampling (Yao et al. 2025)


class CorrectionLevel(str, Enum):
    """Part of a response that one importance weight of the rollout correction covers."""

    token = "token"  # one weight per token
    sequence = "sequence"  # one weight per response: the product of its tokens' ratios


class EnsembleScore(str, Enum):
    """Rule that combines the scores of reward_models (Coste et al. 2023; Eisenstein et al. 2023)."""

    mean = "mean"
    min = "min"  # the most sceptical of them
    mean_minus_std = "mean_minus_std"  # mean - reward.ensemble_k x population standard deviation


class RewardErrors(str, Enum):
    """Treatment of a response that the reward function raises for, hangs on, or gives no finite number for."""

    stop = "stop"  # the run ends, naming the response
    exclude = (
        "exclude"  # it takes no part in losses, whitening and running moments, and is counted in reward/num_excluded
    )
