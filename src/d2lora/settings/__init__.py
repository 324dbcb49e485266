"""Settings of every command: frozen, validated, flat in YAML and on the command line.

Each command has one class; what both phases share is inherited, so a function asks for the
section that it needs (`train(settings: TrainSettings)`) and is given the whole. Defaults live
here and nowhere else.
"""

from d2lora.settings.core import Settings
from d2lora.settings.fitting import FitSettings
from d2lora.settings.phases import AdaptSettings, PhaseSettings, WarmupSettings
from d2lora.settings.sections import (
    DATA_INITS,
    DEFAULT_RANK,
    FRESH,
    MILORA,
    NAMED_INITS,
    BaseSettings,
    Epochs,
    GenerationSettings,
    HygieneSettings,
    LearningRate,
    LoraSettings,
    ObjectiveSettings,
    Overlong,
    Reference,
    ReplaySettings,
    TrainSettings,
    changes_base,
    is_named_init,
)
from d2lora.settings.studies import DemoSettings, ReportSettings, StudySettings
from d2lora.settings.tools import (
    ConvertSettings,
    EvaluateSettings,
    GenerateSettings,
    InspectSettings,
    PairsSettings,
    PublishSettings,
    SchemaSettings,
    SelectSettings,
)

__all__ = [
    "DATA_INITS",
    "DEFAULT_RANK",
    "FRESH",
    "MILORA",
    "NAMED_INITS",
    "AdaptSettings",
    "BaseSettings",
    "ConvertSettings",
    "DemoSettings",
    "Epochs",
    "EvaluateSettings",
    "FitSettings",
    "GenerateSettings",
    "GenerationSettings",
    "HygieneSettings",
    "InspectSettings",
    "LearningRate",
    "LoraSettings",
    "ObjectiveSettings",
    "Overlong",
    "PairsSettings",
    "PhaseSettings",
    "PublishSettings",
    "Reference",
    "ReplaySettings",
    "ReportSettings",
    "SchemaSettings",
    "SelectSettings",
    "Settings",
    "StudySettings",
    "TrainSettings",
    "WarmupSettings",
    "changes_base",
    "is_named_init",
]
