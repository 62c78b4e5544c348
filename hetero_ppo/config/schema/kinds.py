"""Sections of each kind of run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hetero_ppo.config.schema.algorithm import AlgorithmConfig
from hetero_ppo.config.schema.data import AnsweredDataConfig, PreferenceDataConfig, PromptDataConfig, SftDataConfig
from hetero_ppo.config.schema.memory import MemoryConfig, PpoMemoryConfig
from hetero_ppo.config.schema.option import OnResume, option, section
from hetero_ppo.config.schema.ppo import PipelineConfig, PpoTrainConfig, ResidencyConfig
from hetero_ppo.config.schema.reward import RewardConfig
from hetero_ppo.config.schema.roles import (
    CriticConfig,
    RewardRoleConfig,
    RoleConfig,
    TrainedRewardConfig,
    TrainedRoleConfig,
)
from hetero_ppo.config.schema.rollout import RolloutConfig
from hetero_ppo.config.schema.run import CheckpointConfig, RunConfig
from hetero_ppo.config.schema.supervised import RewardModelLossConfig, SupervisedTrainConfig

_KIND = "Kind of run, which chooses the schema"
_RUN = "Run folder, logging, reproducibility and deadlines"
_DATA = "Data files and how their rows are read"
_MEMORY = "Memory of a CUDA device besides tensors, for the memory plan"
_CHECKPOINT = "Saving, keeping and loading of checkpoints"


class SupervisedRun:
    """Properties that SFT and reward-model runs share."""

    data: AnsweredDataConfig

    @property
    def residency(self) -> None:
        """None: the only role of the run never leaves the device."""
        return None

    def longest_sequence(self) -> tuple[int, str]:
        """Return the tokens of the longest sequence that is trained on, and the fields that they come from."""
        return self.data.max_sequence_tokens, "data.max_sequence_tokens"


@dataclass
class SftConfig(SupervisedRun):
    """Supervised fine-tuning of a policy."""

    kind: str = option("sft", _KIND, resume=OnResume.form)
    run: RunConfig = section(RunConfig, _RUN)
    data: SftDataConfig = section(SftDataConfig, _DATA)
    actor: TrainedRoleConfig = section(TrainedRoleConfig, "Policy that is trained")
    train: SupervisedTrainConfig = section(SupervisedTrainConfig, "Batching and length")
    memory: MemoryConfig = section(MemoryConfig, _MEMORY, resume=OnResume.operation)
    checkpoint: CheckpointConfig = section(CheckpointConfig, _CHECKPOINT)


@dataclass
class RmConfig(SupervisedRun):
    """Training of a reward model on preference pairs."""

    kind: str = option("rm", _KIND, resume=OnResume.form)
    run: RunConfig = section(RunConfig, _RUN)
    data: PreferenceDataConfig = section(PreferenceDataConfig, _DATA)
    reward: TrainedRewardConfig = section(TrainedRewardConfig, "Reward model that is trained")
    train: SupervisedTrainConfig = section(SupervisedTrainConfig, "Batching and length")
    loss: RewardModelLossConfig = section(RewardModelLossConfig, "Loss of preference pairs (Bradley-Terry)")
    memory: MemoryConfig = section(MemoryConfig, _MEMORY, resume=OnResume.operation)
    checkpoint: CheckpointConfig = section(CheckpointConfig, _CHECKPOINT)


@dataclass
class PpoConfig:
    """Proximal policy optimization from human or programmed feedback."""

    kind: str = option("ppo", _KIND, resume=OnResume.form)
    run: RunConfig = section(RunConfig, _RUN)
    data: PromptDataConfig = section(PromptDataConfig, _DATA)
    actor: TrainedRoleConfig = section(TrainedRoleConfig, "Policy that is trained")
    critic: CriticConfig | None = section(
        CriticConfig, "Value model; null: none, with an algorithm.advantage that needs no values"
    )
    reference: RoleConfig = section(RoleConfig, "Frozen policy that the KL penalty is measured from")
    reward_model: RewardRoleConfig | None = option(
        None, "Model that scores responses; null: none", resume=OnResume.section
    )
    reward_models: list[RewardRoleConfig] = option(
        [],
        "Ensemble of models that score responses, in place of reward_model; each has its own layout",
        resume=OnResume.section,
    )
    reward: RewardConfig = section(RewardConfig, "Scores of responses, and how they become one")
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "Objective and batches")
    rollout: RolloutConfig = section(RolloutConfig, "Generator that answers prompts")
    train: PpoTrainConfig = section(PpoTrainConfig, "Length, evaluation and records")
    pipeline: PipelineConfig = section(
        PipelineConfig, "Forwards of complete responses during the generation of others", resume=OnResume.operation
    )
    residency: ResidencyConfig = section(ResidencyConfig, "Turns of the roles on the device", resume=OnResume.operation)
    memory: PpoMemoryConfig = section(PpoMemoryConfig, _MEMORY, resume=OnResume.operation)
    checkpoint: CheckpointConfig = section(CheckpointConfig, _CHECKPOINT)

    def longest_sequence(self) -> tuple[int, str]:
        """Return the tokens of the longest sequence that is trained on, and the fields that they come from."""
        tokens = self.data.max_prompt_tokens + self.rollout.sampling.max_tokens
        return tokens, "data.max_prompt_tokens + rollout.sampling.max_tokens"


#: ``kind`` of a YAML file -> its schema.
SCHEMAS: dict[str, Any] = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}
