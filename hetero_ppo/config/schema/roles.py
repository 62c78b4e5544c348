"""Sections of a role: its model, its layout and, where it is trained, its optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from hetero_ppo.config.schema.choices import Dtype, HeadInit, LrSchedule
from hetero_ppo.config.schema.option import PLAIN, OnResume, option, section


@dataclass
class ParallelConfig:
    """Layout of a role over the ranks of the run. The ranks that are left over are data parallel."""

    tensor: int = option(1, "Tensor-parallel size", unit="ranks", minimum=1)
    pipeline: int = option(1, "Number of pipeline stages", unit="ranks", minimum=1)
    virtual_pipeline: int | None = option(
        None,
        "Model chunks of each pipeline rank in the interleaved schedule; null: one chunk",
        unit="chunks",
        minimum=2,
    )
    context: int = option(1, "Context-parallel size", unit="ranks", minimum=1)
    expert: int = option(1, "Expert-parallel size", unit="ranks", minimum=1)
    sequence: bool = option(False, "Sequence parallelism over the tensor-parallel ranks")


@dataclass
class ModelConfig:
    """Weights and tokenizer of a role."""

    path: str = option(
        MISSING, "Hugging Face checkpoint folder with config.json and *.safetensors", resume=OnResume.weights
    )
    tokenizer: str | None = option(None, "Tokenizer folder; null: path", resume=OnResume.content)
    dtype: Dtype | None = option(
        None,
        "Parameter dtype; null: bf16 on CUDA, fp32 on a CPU. A run that resumes keeps the dtype of its checkpoint",
        resume=OnResume.dtype,
    )


@dataclass
class HeadedModelConfig(ModelConfig):
    """Weights and tokenizer of a trained role with a scalar head, which its checkpoint may lack."""

    head_init: HeadInit | None = option(
        None,
        "Initial scalar head where the checkpoint has none; null: zero for the critic, normal for a reward model",
        resume=OnResume.no_effect,
    )
    init_seed: int = option(
        1234, "Seed of the initial scalar head with head_init normal", unit=PLAIN, resume=OnResume.no_effect
    )


@dataclass
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = option(1e-5, "Peak learning rate", unit=PLAIN, minimum=0, resume=OnResume.applied)
    min_lr: float = option(
        0.0, "Learning rate at the end of the schedule", unit=PLAIN, minimum=0, resume=OnResume.applied
    )
    lr_schedule: LrSchedule = option(
        LrSchedule.constant, "Shape of the learning rate after the warm-up", resume=OnResume.applied
    )
    warmup_steps: int = option(
        0, "Length of the linear warm-up", unit="optimizer steps", minimum=0, resume=OnResume.applied
    )
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay (AdamW); it leaves out norm weights and biases",
        unit=PLAIN,
        minimum=0,
        resume=OnResume.applied,
    )
    decay_norms_and_biases: bool = option(
        False, "Weight decay shrinks norm weights and biases too", resume=OnResume.applied
    )
    beta1: float = option(
        0.9, "Decay rate of Adam's first moment", unit=PLAIN, minimum=0, below=1, resume=OnResume.applied
    )
    beta2: float = option(
        0.95, "Decay rate of Adam's second moment", unit=PLAIN, minimum=0, below=1, resume=OnResume.applied
    )
    eps: float = option(1e-8, "Term that Adam adds to the denominator", unit=PLAIN, above=0, resume=OnResume.applied)
    grad_clip: float = option(
        1.0,
        "Largest global L2 norm of the gradient; 0 switches clipping off",
        unit=PLAIN,
        minimum=0,
        resume=OnResume.applied,
    )
    max_skipped_steps: int = option(
        0,
        "Longest series of steps that are left out because their gradient is NaN or infinite; one more stops the run",
        unit="optimizer steps",
        minimum=0,
        resume=OnResume.operation,
    )
    distributed: bool = option(
        False,
        "fp32 main parameters and moments are sharded over the data-parallel ranks (ZeRO-1)",
        resume=OnResume.form,
    )


@dataclass
class DdpConfig:
    """Communication of gradients and parameters among the data-parallel ranks."""

    overlap_grad_reduce: bool = option(False, "Gradients are reduced during the backward pass")
    overlap_param_gather: bool = option(
        False, "Parameters are gathered during the forward pass; needs optimizer.distributed"
    )
    bucket_size: int | None = option(
        None, "Size of a gradient bucket; null: the choice of Megatron-Core", unit="parameters", minimum=1
    )


@dataclass
class RoleConfig:
    """One of actor, critic, reference and reward model: a model and its own layout."""

    model: ModelConfig = section(ModelConfig, "Weights and tokenizer")
    parallel: ParallelConfig = section(
        ParallelConfig,
        "Layout over the ranks; the ranks that are left over are data parallel",
        resume=OnResume.operation,
    )
    micro_batch_size: int = option(
        8,
        "Size of a forward on one data-parallel rank where micro_batch_tokens is null",
        unit="sequences",
        minimum=1,
        resume=OnResume.operation,
    )
    micro_batch_tokens: int | None = option(
        None,
        "Size of a forward on one data-parallel rank, padding included; null: micro_batch_size decides",
        unit="tokens",
        minimum=1,
        resume=OnResume.operation,
    )
    packing: bool | None = option(
        None,
        "Sequences lie one after the other without padding; null: on a CPU and with Transformer Engine, where context is 1",
        resume=OnResume.operation,
    )
    aligned: bool | None = option(
        False,
        "Bits of a forward do not depend on batch, padding, micro-batches or layout (on CUDA in bf16 only); "
        "null: where model, layout and dtype allow it and, on CUDA, the self-check passes",
        resume=OnResume.operation,
    )

    def token_budgets(self) -> dict[str, int | None]:
        """Return field -> tokens of a micro-batch, of every field that limits them."""
        return {"micro_batch_tokens": self.micro_batch_tokens}


@dataclass
class TrainedRoleConfig(RoleConfig):
    """A role with an optimizer."""

    optimizer: OptimizerConfig = section(OptimizerConfig, "AdamW and the schedule of its learning rate")
    ddp: DdpConfig = section(DdpConfig, "Communication among the data-parallel ranks", resume=OnResume.operation)
    recompute: str | None = option(
        None,
        "Recomputation of activations in the backward pass; null: none",
        choices=("selective", "full"),
        resume=OnResume.operation,
    )
    forward_micro_batch_tokens: int | None = option(
        None,
        "Size of a forward that no backward follows, padding included; null: micro_batch_tokens decides",
        unit="tokens",
        minimum=1,
        resume=OnResume.operation,
    )

    def token_budgets(self) -> dict[str, int | None]:
        """Return field -> tokens of a micro-batch, of every field that limits them."""
        return super().token_budgets() | {"forward_micro_batch_tokens": self.forward_micro_batch_tokens}


@dataclass
class CriticConfig(TrainedRoleConfig):
    """The value model of a PPO run."""

    model: HeadedModelConfig = section(HeadedModelConfig, "Weights, tokenizer and initial value head")


@dataclass
class ReEncodeConfig:
    """Encoding of texts for a reward model whose tokenizer or chat template is not the actor's."""

    max_tokens: int = option(
        MISSING,
        "Longest sequence, prompt and response, in tokens of the reward model; the end of a longer one is cut off and counted",
        unit="tokens",
        minimum=2,
        resume=OnResume.objective,
    )
    chat_template: str | None = option(
        None, "Jinja file that replaces the chat template of the model's tokenizer", resume=OnResume.content
    )


@dataclass
class RewardRoleConfig(RoleConfig):
    """A frozen reward model of a PPO run."""

    aligned: bool | None = option(
        None,
        "Bits of a forward do not depend on batch, padding, micro-batches or layout (on CUDA in bf16 only); "
        "null: where model, layout and dtype allow it and, on CUDA, the self-check passes",
        resume=OnResume.operation,
    )
    re_encode: ReEncodeConfig | None = option(
        None,
        "Encoding with the tokenizer of the reward model; null: the model reads the token ids of the actor",
        resume=OnResume.section,
    )


@dataclass
class TrainedRewardConfig(TrainedRoleConfig):
    """The reward model that a reward-model run trains."""

    model: HeadedModelConfig = section(HeadedModelConfig, "Weights, tokenizer and initial score head")
    aligned: bool | None = option(
        None,
        "Bits of a forward do not depend on batch, padding, micro-batches or layout (on CUDA in bf16 only), and "
        "checkpoints carry golden scores; null: where model, layout and dtype allow it and, on CUDA, the self-check passes",
        resume=OnResume.operation,
    )
