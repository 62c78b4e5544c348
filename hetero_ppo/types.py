"""Records that the stages hand to each other. They are frozen, and every tensor has its shape.

Letters: B sequences, S tokens of the padded sequence (prompt and response), T = S - 1 predicted tokens.

Sequences are right-padded: position 0 is the first prompt token. Under causal attention no real token sees padding, so no attention mask is
needed. All per-token tensors of the algorithm have T columns: column t belongs to the prediction of token t + 1 from tokens 0..t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: One conversation. Every message has "role", "content", and any other keys that a chat template reads.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one PPO step on this data-parallel rank."""

    prompt_ids: list[list[int]]  # token ids with the template applied, not padded
    prompt_texts: list[str]  # the user's question, as in the data
    prompt_messages: list[Messages | None]  # messages that the template rendered; None without a template
    prompt_index: list[int]  # row of the dataset, the same in all epochs
    labels: list[Any]  # value of the label key, or None
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """Return the prompts of these rows, in this order."""
        return PromptBatch(**{name: [values[row] for row in rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Response:
    """One answer of a generator."""

    token_ids: list[int]  # response tokens, with the end-of-sequence token if it was sampled
    log_probs: list[float]  # log-probs of the sampled tokens, in the distribution that they were sampled from
    finish_reason: str  # "stop" (end-of-sequence or stop token) or "length"
    weight_version: str  # label of the weights that sampled it, or the last part of a resumed response
    #: For a resumed response: (label, number of tokens) of the weights before, the oldest first.
    earlier: tuple[tuple[str, int], ...] = ()


#: Function that gets (prompt, sample, response) of each complete response. The generator's thread calls it, so it must be quick, and an
#: error in it ends the rollout.
OnResponse = Callable[[int, int, Response], None]


@dataclass(frozen=True)
class Rollout:
    """Prompts with their responses. Rows of one prompt are neighbours; with over-sampling, rows are in the order of completion."""

    token_ids: Tensor  # [B, S] int64, right-padded
    prompt_lengths: Tensor  # [B] int64
    sequence_lengths: Tensor  # [B] int64, prompt and response
    response_mask: Tensor  # [B, T] bool, True where column t predicts a response token
    rollout_log_probs: Tensor  # [B, T] float32, 0 outside response_mask
    truncated: Tensor  # [B] bool, True: no end-of-sequence within max_tokens
    weight_version: list[str]  # weights that sampled the last token of each row
    prompt_texts: list[str]  # the user's question, as in the data
    prompt_index: list[int]
    labels: list[Any]
    metadata: list[dict[str, Any]] = field(default_factory=list)
    #: Messages that the template rendered; None without a template.
    prompt_messages: list[Messages | None] = field(default_factory=list)
    #: Chunk in which each row was complete; [] in a chunk.
    chunk_index: list[int] = field(default_factory=list)
    #: (label, number of tokens) of older weights for each row, the oldest first; [] if no response can be resumed.
    earlier_versions: list[list[tuple[str, int]]] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        return self.token_ids.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """Number of tokens of each response, [B] int64."""
        return self.sequence_lengths - self.prompt_lengths


@dataclass(frozen=True)
class Chunk:
    """Responses that were complete before others; the unit of the pipeline."""

    index: int  # in the order of completion
    rows: list[int]  # rows of the whole rollout, ascending
    rollout: Rollout  # only these rows


@dataclass(frozen=True)
class Scores:
    """Scores of B responses."""

    outcome: Tensor  # [B] float32, score of each whole response; NaN if the reward function gave none
    #: [B, T] float32, score of the step that ends with token t + 1, and 0 elsewhere; None: no scorer scores steps.
    process: Tensor | None = None
    #: Name -> part of the outcome, [B] float32; {} if the outcome is one score.
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Experience:
    """A rollout with everything that the losses need. Per-token tensors are 0 outside response_mask."""

    rollout: Rollout
    response_mask: Tensor  # [B, T] bool; all False for rows that the losses leave out
    old_log_probs: Tensor  # [B, T] float32
    ref_log_probs: Tensor  # [B, T] float32
    values: Tensor | None  # [B, T] float32, value of the state before token t + 1; None: the run has no critic
    scores: Scores  # raw scores of the reward model, the function, or both
    token_level_rewards: Tensor  # [B, T] float32: KL penalty, process scores, and the outcome score at the end
    advantages: Tensor  # [B, T] float32, whitened
    returns: Tensor | None  # [B, T] float32; None: the run has no critic
    tis_weights: Tensor | None = None  # [B, T] float32, truncated importance weights; None: no correction
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward, right-padded to the longest of them."""

    token_ids: Tensor  # [b, s] int64
    sequence_lengths: Tensor  # [b] int64
    inputs: Any = None  # PolicyInputs, ValueInputs, ... with b rows and s - 1 columns; None without a loss
    #: [b, s] bool, tokens whose outputs are read: the head computes only these; None: every token.
    output_mask: Tensor | None = None


@dataclass(frozen=True)
class PolicyInputs:
    """Inputs of the actor's loss in addition to the model's log-probs."""

    old_log_probs: Tensor  # [b, t] float32
    ref_log_probs: Tensor  # [b, t] float32
    advantages: Tensor  # [b, t] float32
    mask: Tensor  # [b, t] bool
    tis_weights: Tensor | None = None  # [b, t] float32, weights of the policy loss; None: no correction


@dataclass(frozen=True)
class ValueInputs:
    """Inputs of the critic's loss in addition to the model's values."""

    old_values: Tensor  # [b, t] float32
    returns: Tensor  # [b, t] float32
    mask: Tensor  # [b, t] bool


@dataclass(frozen=True)
class AnswerInputs:
    """Inputs of the SFT loss in addition to the model's log-probs."""

    mask: Tensor  # [b, t] bool


@dataclass(frozen=True)
class SupervisedBatch:
    """One batch of SFT examples."""

    token_ids: Tensor  # [B, S] int64, right-padded
    sequence_lengths: Tensor  # [B] int64
    loss_mask: Tensor  # [B, T] bool, True where column t predicts a token of an answer


@dataclass(frozen=True)
class PreferenceBatch:
    """One batch of pairs: row i of chosen answers the same prompt as row i of rejected."""

    chosen_ids: Tensor  # [B, S] int64, right-padded
    chosen_lengths: Tensor  # [B] int64
    rejected_ids: Tensor  # [B, S'] int64
    rejected_lengths: Tensor  # [B] int64


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step by verl's names, and its seconds by phase."""

    step: int
    values: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    note: str | None = None
