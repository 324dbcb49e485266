"""A study's plan with its data in place, checked before hours are spent on it."""

import json
from pathlib import Path
from typing import Any

from d2lora.base_files import base_folder
from d2lora.claims import check_writable
from d2lora.data import is_local
from d2lora.embedded.__main__ import write_world
from d2lora.errors import D2LoraError, DataError, ModelError, RunError, listed
from d2lora.fingerprints import fingerprint_of
from d2lora.plan import WORLD, StudyPlan
from d2lora.plan_file import read_plan
from d2lora.settings import StudySettings
from d2lora.tasks import Say, read_task
from d2lora.warmstart import WarmStart


def place(settings: StudySettings) -> tuple[StudyPlan, Path, Path]:
    """Return the plan with its data in place, the store and the study's folder."""
    name = "-".join(Path(plan).stem for plan in settings.plan)
    out = settings.out or Path("studies") / name
    store = (settings.store or out.parent / "store").resolve()
    check_writable(store, "--store")
    return _with_world(read_plan(*settings.plan, changes=settings.set), store / "world"), store, out


def check_folder(out: Path) -> None:
    """Check that a folder is empty, not there yet, or a study's.

    Raises:
        RunError: If it is not.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "study.json").is_file():
        raise RunError(f"{out} holds something that is not a study; choose another --out")


def check(plan: StudyPlan, say: Say | None = None, *, fetch: bool = True) -> None:
    """Open everything that a study names before hours are spent on it.

    Args:
        plan: What is to run.
        say: Is told what test rows were read as; of training rows `decontaminated` tells.
        fetch: Ask the hub, too. False: what is not on this machine goes unchecked.

    Raises:
        D2LoraError: If a base, training rows or test rows cannot be used, all faults at once.
    """
    faults: list[str] = []
    if fetch:
        try:
            base_folder(plan.base, plan.revision, plan.gguf_file)
        except D2LoraError as error:
            faults.append(str(error))
    faults += _faults_of_warm_starts(plan, fetch=fetch)
    for name, task in plan.tasks.items():
        if not fetch and not all(map(is_local, (*task.data, *task.test))):
            continue
        try:
            rows = len(read_task(task.data, task.task).examples)
            read_task(task.test, task.task, say=say)
        except D2LoraError as error:
            faults.append(f"tasks.{name}: {error}")
            continue
        if rows < max(plan.sizes):
            faults.append(
                f"tasks.{name}: n = {max(plan.sizes)} is asked for, but it has {rows} rows"
            )
    if faults:
        raise DataError(f"the study cannot run:\n{listed(faults)}")


def _faults_of_warm_starts(plan: StudyPlan, *, fetch: bool) -> list[str]:
    """Open the warm starts that were made before, and compare their base with the plan's."""
    faults: list[str] = []
    for name in plan.warm_ups:
        path = plan.ready(name)
        if path is None:
            continue
        try:
            made = WarmStart.load(path)
            if fetch:
                base = fingerprint_of(base_folder(plan.base, plan.revision, plan.gguf_file))
                made.manifest.check_base(base, plan.base, path)
        except ModelError as error:
            faults.append(f"warm_ups.{name}: {error}")
    return faults


def _with_world(plan: StudyPlan, folder: Path) -> StudyPlan:
    """Write the small world's rows if the plan names some, and put their paths in its place."""
    values = plan.model_dump(mode="json")
    if WORLD not in json.dumps(values):
        return plan
    paths = write_world(folder)

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [placed(inner) for inner in value]
        if isinstance(value, str) and value.startswith(WORLD):
            name = value.removeprefix(WORLD)
            if name not in paths:
                known = ", ".join(f"{WORLD}{known}" for known in paths)
                raise RunError(f"{value}: no such data; the small world has {known}")
            return str(paths[name])
        return value

    return StudyPlan(**placed(values))
