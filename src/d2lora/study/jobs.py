"""The jobs of a study: warm-ups, controls made of them, trials of learning rates, cells.

Only jobs of the last kind, `Scored`, can name test data: so nothing is tuned on it.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2lora.runtime.run_folder import DONE, SETTINGS, new_file
from d2lora.settings import (
    AdaptSettings,
    BaseSettings,
    ConvertSettings,
    EvaluateSettings,
    PairsSettings,
    WarmupSettings,
)
from d2lora.study.averages import average, interpolate, total_cost
from d2lora.study.store import Job, adapter_content, identity_of, shared_base


@dataclass(frozen=True)
class WarmUp(Job):
    """Phase 1."""

    settings: WarmupSettings

    @property
    def path(self) -> Path:
        """The warm start."""
        return self.folder / "warm-start"

    def identity(self) -> dict[str, Any]:
        """Return the warm-up's settings, by content."""
        return identity_of(self.settings)

    def run(self) -> dict[str, Any]:
        """Make the warm start, or resume a killed warm-up."""
        from d2lora.warmup import warm_up

        if not (self.path / DONE).exists():
            settings = self.settings.changed(out=self.path, resume=_can_resume(self.path))
            warm_up(settings, shared_base(settings))
        return _manifest_values(self.path)


@dataclass(frozen=True)
class Ready(Job):
    """A warm start made outside of the study, used as it is and known by its weights."""

    path: Path
    """The warm start."""

    def identity(self) -> dict[str, Any]:
        """Return the adapter, by content."""
        return {"adapter": adapter_content(self.path)}

    def run(self) -> dict[str, Any]:
        """Return the values of its manifest."""
        return _manifest_values(self.path)


@dataclass(frozen=True)
class Merged(Job):
    """A warm start folded into its base."""

    base: BaseSettings
    warm_up: WarmUp | Ready

    @property
    def path(self) -> Path:
        """The new base."""
        return self.folder / "model"

    def identity(self) -> dict[str, Any]:
        """Return the base, by content, and the warm-up's key."""
        return {"base": identity_of(self.base), "warm_up": self.warm_up.key}

    def run(self) -> dict[str, Any]:
        """Merge the warm start into a copy of the base."""
        from d2lora.tools.convert import convert

        shutil.rmtree(self.path, ignore_errors=True)
        adapter = str(self.warm_up.path)
        convert(ConvertSettings(**dict(self.base), adapter=adapter, out=self.path, merge=True))
        return {}


@dataclass(frozen=True)
class Norms(Job):
    """Random weights with the norms of a warm start's."""

    warm_up: WarmUp | Ready
    seed: int

    @property
    def path(self) -> Path:
        """The random adapter, in the form of a warm start."""
        return self.folder / "random"

    def identity(self) -> dict[str, Any]:
        """Return the warm-up's key and the seed."""
        return {"warm_up": self.warm_up.key, "seed": self.seed}

    def run(self) -> dict[str, Any]:
        """Write the random adapter."""
        from d2lora.tools.convert import randomise

        shutil.rmtree(self.path, ignore_errors=True)
        randomise(self.warm_up.path, self.path, self.seed)
        return {}


@dataclass(frozen=True)
class Mixed(Job):
    """General and task rows in one file, each as often as the two phases would show it."""

    general: WarmupSettings
    training: AdaptSettings

    @property
    def path(self) -> Path:
        """The rows to train on."""
        return self.folder / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """The task's validation rows; written where the training settings hold some out."""
        return self.folder / "valid.jsonl"

    def identity(self) -> dict[str, Any]:
        """Return the settings of both phases, by content."""
        return {"general": identity_of(self.general), "training": identity_of(self.training)}

    def run(self) -> dict[str, Any]:
        """Write the mixed rows."""
        from d2lora.study.mixture import write_mixture

        return write_mixture(self.general, self.training, self.path, self.held_out)


@dataclass(frozen=True)
class Paired(Job):
    """Preference pairs of the rows that a run would train on."""

    settings: PairsSettings

    @property
    def path(self) -> Path:
        """The pairs."""
        return self.folder / "pairs" / "pairs.jsonl"

    def identity(self) -> dict[str, Any]:
        """Return the settings, by content."""
        return identity_of(self.settings)

    def run(self) -> dict[str, Any]:
        """Sample the pairs."""
        from d2lora.tools.pairs import make_pairs

        shutil.rmtree(self.path.parent, ignore_errors=True)
        settings = self.settings.changed(out=self.path.parent)
        made = make_pairs(settings, shared_base(settings))
        return {"n_prompts": made.n_prompts, "n_pairs": made.n_pairs}


@dataclass(frozen=True)
class Trial(Job):
    """A learning rate tried on rows held out of the n; the adapter is thrown away."""

    training: AdaptSettings

    def identity(self) -> dict[str, Any]:
        """Return the training's settings, by content."""
        return identity_of(self.training)

    def run(self) -> dict[str, Any]:
        """Train on the fold's rows; return the validation curve."""
        path = self.folder / "adapter"
        values = adapted(self.training, path)
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        curve = [[r["step"], r["validation_loss"]] for r in rows if "validation_loss" in r]
        shutil.rmtree(path)
        return {**values, "learning_rate": self.training.learning_rate, "curve": curve}


@dataclass(frozen=True)
class Scored(Job):
    """An adapter (trained here, or the warm start, or none) measured on the test rows."""

    tests: EvaluateSettings
    training: AdaptSettings | None = None
    adapter: Path | None = None
    """Where nothing is trained: the adapter to measure. None: the base alone."""
    shots: AdaptSettings | None = None
    """Where the base is prompted with examples: which rows, as `adapt` would choose them."""
    average_of: int = 1
    """Runs that are trained, each in an order of its own, and averaged in A and B."""
    share: float = 1.0
    """Of the way from the initialization to what was trained."""
    keep: bool = True
    """Keep the trained adapter."""

    def identity(self) -> dict[str, Any]:
        """Return tests, training, adapter and examples, by content."""
        return {
            "tests": identity_of(self.tests),
            "training": None if self.training is None else identity_of(self.training),
            **({"average_of": self.average_of} if self.average_of > 1 else {}),
            **({"share": self.share} if self.share < 1 else {}),
            "adapter": None if self.adapter is None else adapter_content(self.adapter),
            "shots": None if self.shots is None else identity_of(self.shots),
        }

    def run(self) -> dict[str, Any]:
        """Train where there is something to train, and score the test rows once."""
        import pandas as pd

        from d2lora.evaluation.measure import BASE, measure
        from d2lora.evaluation.test_sets import TestSets
        from d2lora.runtime.console import Reporter

        path = self.folder / "adapter" if self.training else self.adapter
        values = self._trained(self.training, self.folder / "adapter") if self.training else {}
        if self.training and path and self.share < 1:
            end, path = path, self.folder / "between"
            interpolate(self.training.init, end, self.share, path)
        started = time.perf_counter()
        sets = TestSets.read(self.tests)
        if self.shots is not None:
            sets = replace(sets, shots=_shots(self.shots))
        base = shared_base(self.training or self.tests)
        name = BASE if path is None else str(path)
        measured = measure(name, base, sets, self.tests, Reporter(quiet=True))
        records = pd.DataFrame(measured.task.records)
        with new_file(self.folder / "records.parquet") as file:
            records.drop(columns="adapter").to_parquet(file, index=False)
        if self.training and not self.keep:
            for file in self.folder.rglob("*.safetensors"):
                file.unlink()
        return {
            **values,
            "learning_rate": self.training.learning_rate if self.training else None,
            "adapter": None if path is None or not self.keep else str(path),
            "scores": {column: records[column].tolist() for column in measured.task.columns},
            "fast_passes": measured.fast_passes,
            "general_loss": measured.general_loss,
            "choices_right": None if measured.right is None else measured.right.tolist(),
            # Closed answers and preferences are scored without generating.
            "n_output_tokens": sum(r.get("n_output_tokens", 0) for r in measured.task.records),
            "evaluation_s": round(time.perf_counter() - started, 3),
        }

    def _trained(self, training: AdaptSettings, path: Path) -> dict[str, Any]:
        """Train the adapter, or the runs of which it is the average; return what they cost."""
        if self.average_of == 1:
            return adapted(training, path)
        paths = [path.with_name(f"run-{order}") for order in range(self.average_of)]
        runs = [adapted(training.changed(seed_order=order), own) for order, own in enumerate(paths)]
        average(paths, path)
        cost = total_cost([run["cost"] for run in runs])
        return {**runs[0], "average_of": self.average_of, "cost": cost}


def adapted(settings: AdaptSettings, path: Path) -> dict[str, Any]:
    """Train an adapter, or resume a killed run; return what its manifest says."""
    from d2lora.adaptation import adapt

    if not (path / DONE).exists():
        settings = settings.changed(out=path, resume=_can_resume(path))
        adapt(settings, shared_base(settings))
    return _manifest_values(path)


def _manifest_values(adapter: Path) -> dict[str, Any]:
    """Return what a study needs of a manifest; of an adapter made elsewhere nothing is known."""
    from d2lora.warmstart import WarmStart

    manifest = WarmStart.load(adapter).manifest
    return {
        "cost": manifest.cost,
        "validation_loss_before": manifest.validation_loss_before,
        "validation_loss_after": manifest.validation_loss_after,
        "provenance": manifest.provenance,
    }


def _shots(training: AdaptSettings) -> Any:
    """Return worked examples, in the order that `adapt` would choose them."""
    from d2lora.data.reading import read_task
    from d2lora.data.shots import chosen_shots
    from d2lora.settings.seeds import seed_of

    examples = read_task(training.data, training.task).examples
    return chosen_shots(examples, training.n or len(examples), seed_of(training, "subset"))


def _can_resume(path: Path) -> bool:
    """Say whether a killed run can go on; one without a checkpoint is cleared away."""
    from d2lora.training import checkpoint

    if checkpoint.exists(path) and (path / SETTINGS).is_file():
        return True
    shutil.rmtree(path, ignore_errors=True)
    return False
