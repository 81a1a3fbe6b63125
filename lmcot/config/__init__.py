"""Settings: typed, documented, and checked before anything starts.

Variants (frozen backend, teacher, rewards, KL controller, data source) are discriminated unions:
a wrong combination cannot be written. Every error is one sentence that names the key.
"""

from lmcot.config.aspects import ASPECTS, Aspect, AspectSpec
from lmcot.config.base import Dtype
from lmcot.config.data import (
    ContextSettings,
    CountingData,
    DataSettings,
    DataSource,
    FileData,
    HubData,
    SampleData,
)
from lmcot.config.dependence import NO_STAGE_DEPENDS_ON, depends, digested_settings
from lmcot.config.distill import AnswerTask, DistillSettings, ValidationSettings
from lmcot.config.evaluation import EvaluateSettings
from lmcot.config.frozen import (
    BudgetSettings,
    CacheSettings,
    FrozenSettings,
    OpenAIFrozen,
    TransformersFrozen,
    VllmFrozen,
)
from lmcot.config.load import (
    check_files,
    differences,
    dump_config,
    flat_settings,
    load_config,
    overridden,
    parse_config,
    parse_overrides,
    parse_settings,
    read_config,
    read_yaml_mapping,
    renamed_settings,
)
from lmcot.config.models import (
    LoraSettings,
    PolicySettings,
    Rollout,
    TransformersRollout,
    VllmRollout,
    VllmSettings,
)
from lmcot.config.monitor import AlarmSettings, MonitorSettings
from lmcot.config.prompts import (
    DrawnDemonstrations,
    GivenDemonstrations,
    PromptSettings,
)
from lmcot.config.rewards import (
    AspectSettings,
    CustomReward,
    FailureBudgets,
    GuidanceRewards,
    IncreasingRewards,
    Penalties,
)
from lmcot.config.root import Config
from lmcot.config.rows import Row
from lmcot.config.runtime import (
    ActorsSettings,
    CheckpointSettings,
    ComputingRole,
    RoleSettings,
)
from lmcot.config.serving import Limits, ServedRole, ServedSmall, ServeSettings
from lmcot.config.signal import CurriculumSettings, SignalFilter
from lmcot.config.stages import (
    TRAINED_POLICIES,
    TRAINING_STAGES,
    RefineSettings,
    TrainingStage,
    training_stage,
)
from lmcot.config.teachers import FileTeacher, FrozenTeacher, SupportingFactsTeacher
from lmcot.config.training import (
    AdaptiveKl,
    CispoLoss,
    FixedKl,
    Gae,
    Grpo,
    GspoLoss,
    HeadCritic,
    Kernel,
    LearnerSettings,
    ModelCritic,
    OptimiserSettings,
    PpoLoss,
    ReinforcePlusPlus,
    Rloo,
)

__all__ = [
    "ASPECTS",
    "NO_STAGE_DEPENDS_ON",
    "TRAINED_POLICIES",
    "TRAINING_STAGES",
    "ActorsSettings",
    "AdaptiveKl",
    "AlarmSettings",
    "AnswerTask",
    "Aspect",
    "AspectSettings",
    "AspectSpec",
    "BudgetSettings",
    "CacheSettings",
    "CheckpointSettings",
    "CispoLoss",
    "ComputingRole",
    "Config",
    "ContextSettings",
    "CountingData",
    "CurriculumSettings",
    "CustomReward",
    "DataSettings",
    "DataSource",
    "DistillSettings",
    "DrawnDemonstrations",
    "Dtype",
    "EvaluateSettings",
    "FailureBudgets",
    "FileData",
    "FileTeacher",
    "FixedKl",
    "FrozenSettings",
    "FrozenTeacher",
    "Gae",
    "GivenDemonstrations",
    "Grpo",
    "GspoLoss",
    "GuidanceRewards",
    "HeadCritic",
    "HubData",
    "IncreasingRewards",
    "Kernel",
    "LearnerSettings",
    "Limits",
    "LoraSettings",
    "ModelCritic",
    "MonitorSettings",
    "OpenAIFrozen",
    "OptimiserSettings",
    "Penalties",
    "PolicySettings",
    "PpoLoss",
    "PromptSettings",
    "RefineSettings",
    "ReinforcePlusPlus",
    "Rloo",
    "RoleSettings",
    "Rollout",
    "Row",
    "SampleData",
    "ServeSettings",
    "ServedRole",
    "ServedSmall",
    "SignalFilter",
    "SupportingFactsTeacher",
    "TrainingStage",
    "TransformersFrozen",
    "TransformersRollout",
    "ValidationSettings",
    "VllmFrozen",
    "VllmRollout",
    "VllmSettings",
    "check_files",
    "depends",
    "differences",
    "digested_settings",
    "dump_config",
    "flat_settings",
    "load_config",
    "overridden",
    "parse_config",
    "parse_overrides",
    "parse_settings",
    "read_config",
    "read_yaml_mapping",
    "renamed_settings",
    "training_stage",
]
