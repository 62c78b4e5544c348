"""Every option of a run: its default, documentation, unit and bounds, all in one place.

Start in ``kinds.py``, which has the sections of each kind of run. The classes are OmegaConf structured configs: a key
that is not here is an error. Rules between fields are in ``config/checks.py``. Values that follow from these inputs
(micro-batches per minibatch, steps per epoch) are computed in ``config/derived.py`` and never written back.
"""

from __future__ import annotations

from hetero_ppo.config.schema.algorithm import AlgorithmConfig, KlConfig, RolloutCorrectionConfig
from hetero_ppo.config.schema.choices import (
    CorrectionLevel,
    Dtype,
    EnsembleScore,
    HeadInit,
    KlController,
    KlEstimator,
    LogFormat,
    LogLevel,
    LrSchedule,
    OldLogProbs,
    OverlongPrompts,
    RewardErrors,
    RewardSource,
    RolloutCorrectionKind,
    GeneratorKind,
    TruncatedResponses,
    WeightTransfer,
)
from hetero_ppo.config.schema.data import (
    AnsweredDataConfig,
    DataConfig,
    PreferenceDataConfig,
    PromptDataConfig,
    SftDataConfig,
)
from hetero_ppo.config.schema.kinds import PpoConfig, RmConfig, SCHEMAS, SftConfig
from hetero_ppo.config.schema.memory import MemoryConfig, PpoMemoryConfig
from hetero_ppo.config.schema.ppo import PipelineConfig, PpoTrainConfig, ResidencyConfig
from hetero_ppo.config.schema.reward import RewardConfig
from hetero_ppo.config.schema.roles import (
    CriticConfig,
    HeadedModelConfig,
    DdpConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReEncodeConfig,
    RewardRoleConfig,
    RoleConfig,
    TrainedRewardConfig,
    TrainedRoleConfig,
)
from hetero_ppo.config.schema.rollout import MismatchConfig, RolloutConfig, SamplingConfig
from hetero_ppo.config.schema.run import CheckpointConfig, RunConfig
from hetero_ppo.config.schema.supervised import RewardModelLossConfig, SupervisedTrainConfig

__all__ = [
    "SCHEMAS",
    "AlgorithmConfig",
    "AnsweredDataConfig",
    "CheckpointConfig",
    "CorrectionLevel",
    "CriticConfig",
    "DataConfig",
    "DdpConfig",
    "Dtype",
    "EnsembleScore",
    "GeneratorKind",
    "HeadInit",
    "HeadedModelConfig",
    "KlConfig",
    "KlController",
    "KlEstimator",
    "LogFormat",
    "LogLevel",
    "LrSchedule",
    "MemoryConfig",
    "MismatchConfig",
    "ModelConfig",
    "OldLogProbs",
    "OptimizerConfig",
    "OverlongPrompts",
    "ParallelConfig",
    "PipelineConfig",
    "PpoConfig",
    "PpoMemoryConfig",
    "PpoTrainConfig",
    "PreferenceDataConfig",
    "PromptDataConfig",
    "ReEncodeConfig",
    "ResidencyConfig",
    "RewardConfig",
    "RewardErrors",
    "RewardModelLossConfig",
    "RewardRoleConfig",
    "RewardSource",
    "RmConfig",
    "RoleConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RolloutCorrectionKind",
    "RunConfig",
    "SamplingConfig",
    "SftConfig",
    "SftDataConfig",
    "SupervisedTrainConfig",
    "TrainedRewardConfig",
    "TrainedRoleConfig",
    "TruncatedResponses",
    "WeightTransfer",
]
