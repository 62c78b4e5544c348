"""Records that the stages hand to each other. Frozen; a shape on every tensor.

Letters: B sequences, S tokens of the padded sequence (prompt and response), T = S - 1 predicted tokens.

Sequences are right-padded: position 0 is the first prompt token, and under causal attention no real token sees
padding, so no attention mask is needed. All per-token tensors of the algorithm have T columns: column t speaks of
the prediction of token t + 1 from tokens 0..t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: A conversation: "role", "content", and what else a chat template reads.
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one PPO step on this data-parallel rank."""

    prompt_ids: list[list[int]]  # token ids, template applied, not padded
    prompt_texts: list[str]  # what the user asked, as the data has it
    prompt_messages: list[Messages | None]  # what the template rendered; None without a template
    prompt_index: list[int]  # row of the dataset, stable over epochs
    labels: list[Any]  # whatever the label key holds, or None
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """These prompts, in this order."""
        return PromptBatch(**{name: [values[row] for row in rows] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Response:
    """One answer of a generator."""

    token_ids: list[int]  # response tokens, end-of-sequence included when it was sampled
    log_probs: list[float]  # of the sampled tokens, in the distribution that was sampled from
    finish_reason: str  # "stop" (end-of-sequence or stop token) or "length"
    weight_version: str  # label of the weights that made it, or of a resumed one its last part
    earlier: tuple[tuple[str, int], ...] = ()  # of a resumed one: (label, tokens) of the weights before, oldest first


#: (prompt, sample, response) of a response that is complete. Called from the generator's thread: it must be quick, and an
#: error in it ends the rollout.
OnResponse = Callable[[int, int, Response], None]


@dataclass(frozen=True)
class Rollout:
    """Prompts and their responses. Those of a prompt lie next to each other; with over-sampling, rows are as they were complete."""

    token_ids: Tensor  # [B, S] int64, right-padded
    prompt_lengths: Tensor  # [B] int64
    sequence_lengths: Tensor  # [B] int64, prompt and response
    response_mask: Tensor  # [B, T] bool, True where column t predicts a response token
    rollout_log_probs: Tensor  # [B, T] float32, 0 outside response_mask
    truncated: Tensor  # [B] bool, no end-of-sequence within max_tokens
    weight_version: list[str]  # one per row: of its last token
    prompt_texts: list[str]  # what the user asked, as the data has it
    prompt_index: list[int]
    labels: list[Any]
    metadata: list[dict[str, Any]] = field(default_factory=list)
    prompt_messages: list[Messages | None] = field(
        default_factory=list
    )  # what the template rendered; None without a template
    chunk_index: list[int] = field(
        default_factory=list
    )  # of every row, the chunk that it was complete in; [] in a chunk
    #: Of every row, (label, tokens) of older weights, oldest first; [] when no response can be resumed.
    earlier_versions: list[list[tuple[str, int]]] = field(default_factory=list)

    @property
    def batch_size(self) -> int:
        return self.token_ids.shape[0]

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64."""
        return self.sequence_lengths - self.prompt_lengths


@dataclass(frozen=True)
class Chunk:
    """Responses that were complete before others: the unit of the pipeline."""

    index: int  # in the order of completion
    rows: list[int]  # of the whole rollout, ascending
    rollout: Rollout  # these rows alone


@dataclass(frozen=True)
class Scores:
    """What the scorers give for B responses."""

    outcome: Tensor  # [B] float32, of each whole response; NaN where the reward function has none
    process: Tensor | None = (
        None  # [B, T] float32, of the step that ends with token t + 1, and 0 elsewhere; None: no scorer scores steps
    )
    parts: dict[str, Tensor] = field(
        default_factory=dict
    )  # what outcome is made of, [B] float32 by name; {} where it is one score


@dataclass(frozen=True)
class Experience:
    """A rollout with all that the losses need. Per-token tensors are 0 outside response_mask."""

    rollout: Rollout
    response_mask: Tensor  # [B, T] bool; rows that the losses leave out are False throughout
    old_log_probs: Tensor  # [B, T] float32
    ref_log_probs: Tensor  # [B, T] float32
    values: Tensor | None  # [B, T] float32, of the state before token t + 1; None: the run has no critic
    scores: Scores  # raw: the reward model's, the function's, or their sum
    token_level_rewards: Tensor  # [B, T] float32, KL penalty, process scores, and the outcome's at the end
    advantages: Tensor  # [B, T] float32, whitened
    returns: Tensor | None  # [B, T] float32; None: the run has no critic
    tis_weights: Tensor | None = None  # [B, T] float32, truncated importance weights; None: no correction
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Microbatch:
    """Rows of one forward: right-padded to the longest of them."""

    token_ids: Tensor  # [b, s] int64
    sequence_lengths: Tensor  # [b] int64
    inputs: Any = None  # PolicyInputs, ValueInputs, ... with b rows and s - 1 columns; None for a forward alone
    wanted: Tensor | None = (
        None  # [b, s] bool, tokens whose output is read: the head computes these alone; None: every token
    )


@dataclass(frozen=True)
class PolicyInputs:
    """What the actor's loss takes beside the model's log-probs."""

    old_log_probs: Tensor  # [b, t] float32
    ref_log_probs: Tensor  # [b, t] float32
    advantages: Tensor  # [b, t] float32
    mask: Tensor  # [b, t] bool
    tis_weights: Tensor | None = None  # [b, t] float32, on the policy loss; None: no correction


@dataclass(frozen=True)
class ValueInputs:
    """What the critic's loss takes beside the model's values."""

    old_values: Tensor  # [b, t] float32
    returns: Tensor  # [b, t] float32
    mask: Tensor  # [b, t] bool


@dataclass(frozen=True)
class AnswerInputs:
    """What the SFT loss takes beside the model's log-probs."""

    mask: Tensor  # [b, t] bool


@dataclass(frozen=True)
class SupervisedBatch:
    """SFT examples."""

    token_ids: Tensor  # [B, S] int64, right-padded
    sequence_lengths: Tensor  # [B] int64
    loss_mask: Tensor  # [B, T] bool, True where column t predicts a token of an answer


@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs: row i of chosen answers the same prompt as row i of rejected."""

    chosen_ids: Tensor  # [B, S] int64, right-padded
    chosen_lengths: Tensor  # [B] int64
    rejected_ids: Tensor  # [B, S'] int64
    rejected_lengths: Tensor  # [B] int64


@dataclass(frozen=True)
class StepMetrics:
    """What one step reports: verl's metric names, and seconds by phase."""

    step: int
    values: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    note: str | None = None
