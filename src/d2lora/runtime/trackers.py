"""Trackers beside a run's log: TensorBoard, MLflow, W&B and trackio, by way of accelerate.

They are a view of `metrics.jsonl`, which stays the truth: one that fails on the way is left out.
Nothing is sent anywhere unless a tracker's own variables say so (WANDB_MODE, MLFLOW_TRACKING_URI).

trackers.json   under which names the trackers know the run, so that a resumed run goes on there
"""

import os
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from d2lora.errors import SettingsError, first_line
from d2lora.runtime.claims import is_main_process
from d2lora.runtime.console import Reporter
from d2lora.runtime.run_folder import RunFolder, read_json, write_json
from d2lora.settings import PhaseSettings

IDENTITY = "trackers.json"


@contextmanager
def tracked(settings: PhaseSettings, run: RunFolder, reporter: Reporter) -> Generator[None]:
    """Send what the run logs inside the block to its trackers, too; from the main process.

    Raises:
        SettingsError: If a tracker cannot start.
    """
    if not is_main_process():
        yield
        return
    path = run.path / IDENTITY
    known = read_json(path) if path.is_file() else {"id": uuid.uuid4().hex[:8]}
    trackers = {name: _started(name, settings, run, known) for name in settings.track}
    write_json(path, known)
    lost: set[str] = set()

    def send(values: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in values.items() if k != "step" and isinstance(v, int | float)}
        for name, tracker in trackers.items():
            if name in lost:
                continue
            try:
                tracker.log(numbers, step=values["step"])
            except _faults(name) as error:
                lost.add(name)
                reporter.say(f"warning: {name} is left out from here: {first_line(error)}")

    run.listeners.append(send)
    try:
        yield
    finally:
        run.listeners.remove(send)
        for name, tracker in trackers.items():
            try:
                tracker.finish()
            except _faults(name) as error:
                reporter.say(f"warning: {name} was not closed: {first_line(error)}")


def _started(
    name: str, settings: PhaseSettings, run: RunFolder, known: dict[str, Any]
) -> GeneralTracker:
    """Start a tracker, which then knows the run's settings.

    Args:
        name: Of the tracker.
        settings: Of the run.
        run: Its folder.
        known: Under which names trackers know the run; a new one is added.
    """
    project, title = settings.track_project, run.path.name
    own = f"{title}-{known['id']}"
    match name:
        case "tensorboard":
            tracker = TensorBoardTracker(title, logging_dir=run.path / "tensorboard")
        case "mlflow":
            tracker = MLflowTracker(project, run_name=title, run_id=known.get("mlflow"))
        case "wandb":
            mode = os.environ.get("WANDB_MODE", "offline")
            place = {"dir": str(run.path), "id": own, "resume": "allow"}
            tracker = WandBTracker(project, name=title, mode=mode, **place)
        case _:
            tracker = TrackioTracker(project, name=own, resume="allow")
    try:
        tracker.start()
        if name not in known:
            tracker.store_init_configuration(_flat(settings))
    except _faults(name) as error:
        raise SettingsError(f"--track {name}: it cannot start: {first_line(error)}") from None
    known[name] = tracker.tracker.info.run_id if isinstance(tracker, MLflowTracker) else own
    return tracker


def _flat(settings: PhaseSettings) -> dict[str, Any]:
    """Return settings as trackers take them: numbers, texts and switches."""
    values = settings.model_dump(mode="json")
    return {k: v if isinstance(v, bool | int | float) else str(v) for k, v in values.items()}


def _faults(name: str) -> tuple[type[Exception], ...]:
    """Return what a tracker raises where its server or its files fail."""
    common = (OSError, RuntimeError, ValueError)
    if name == "mlflow":
        return (*common, import_module("mlflow.exceptions").MlflowException)
    if name == "wandb":
        return (*common, import_module("wandb.errors").Error)
    return common
