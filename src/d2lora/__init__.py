"""d2lora: warm a LoRA adapter up once on general data, then start every scarce task from it.

    from pathlib import Path
    from d2lora import AdaptSettings, WarmupSettings, adapt, warm_up

    warm_up(WarmupSettings(base="model", data=("general.jsonl",), out=Path("warm")))
    adapt(AdaptSettings(base="model", data=("task.jsonl",), init="warm", out=Path("adapter")))

Names are imported on first use, so that `import d2lora` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2lora.adaptation import adapt
    from d2lora.adapters.manifest import Adapter
    from d2lora.errors import (
        D2LoraError,
        DataError,
        ModelError,
        RunError,
        SettingsError,
        TrainingError,
        WarmStartError,
    )
    from d2lora.evaluation.evaluate import evaluate
    from d2lora.evaluation.generate import generate
    from d2lora.evaluation.scores import Evaluation
    from d2lora.fitting.fit import Fit, fit
    from d2lora.report.analysis import read_findings
    from d2lora.selection.select import Selection, select
    from d2lora.settings import (
        AdaptSettings,
        ConvertSettings,
        EvaluateSettings,
        FitSettings,
        GenerateSettings,
        InspectSettings,
        PairsSettings,
        PublishSettings,
        SelectSettings,
        StudySettings,
        WarmupSettings,
    )
    from d2lora.study.run import Study, run_study
    from d2lora.tools.convert import Conversion, convert
    from d2lora.tools.inspect import Inspection, inspect
    from d2lora.tools.pairs import PairsMade, make_pairs
    from d2lora.tools.publish import Publication, publish
    from d2lora.warmstart import WarmStart
    from d2lora.warmup import warm_up

_HOMES = {
    "adapt": "adaptation",
    "convert": "tools.convert",
    "Adapter": "adapters.manifest",
    "Conversion": "tools.convert",
    "ConvertSettings": "settings",
    "D2LoraError": "errors",
    "DataError": "errors",
    "InspectSettings": "settings",
    "Inspection": "tools.inspect",
    "ModelError": "errors",
    "PairsMade": "tools.pairs",
    "PairsSettings": "settings",
    "make_pairs": "tools.pairs",
    "Publication": "tools.publish",
    "PublishSettings": "settings",
    "publish": "tools.publish",
    "RunError": "errors",
    "SettingsError": "errors",
    "TrainingError": "errors",
    "WarmStartError": "errors",
    "Evaluation": "evaluation.scores",
    "Fit": "fitting.fit",
    "FitSettings": "settings",
    "fit": "fitting.fit",
    "evaluate": "evaluation.evaluate",
    "generate": "evaluation.generate",
    "inspect": "tools.inspect",
    "AdaptSettings": "settings",
    "EvaluateSettings": "settings",
    "GenerateSettings": "settings",
    "Selection": "selection.select",
    "SelectSettings": "settings",
    "Study": "study.run",
    "StudySettings": "settings",
    "read_findings": "report.analysis",
    "run_study": "study.run",
    "select": "selection.select",
    "WarmupSettings": "settings",
    "WarmStart": "warmstart",
    "warm_up": "warmup",
}

__all__ = [
    "AdaptSettings",
    "Adapter",
    "Conversion",
    "ConvertSettings",
    "D2LoraError",
    "DataError",
    "EvaluateSettings",
    "Evaluation",
    "Fit",
    "FitSettings",
    "GenerateSettings",
    "InspectSettings",
    "Inspection",
    "ModelError",
    "PairsMade",
    "PairsSettings",
    "Publication",
    "PublishSettings",
    "RunError",
    "SelectSettings",
    "Selection",
    "SettingsError",
    "Study",
    "StudySettings",
    "TrainingError",
    "WarmStart",
    "WarmStartError",
    "WarmupSettings",
    "adapt",
    "convert",
    "evaluate",
    "fit",
    "generate",
    "inspect",
    "make_pairs",
    "publish",
    "read_findings",
    "run_study",
    "select",
    "warm_up",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'd2lora' has no attribute {name!r}")
    return getattr(import_module(f"d2lora.{_HOMES[name]}"), name)
