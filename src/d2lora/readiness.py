"""A study's plan with its data in place, checked before hours are spent on it."""

import json
from pathlib import Path
from typing import Any

from d2lora.data import is_local
from d2lora.embedded.__main__ import write_world
from d2lora.encode import Encoder, resolve_format
from d2lora.encoded_sets import answers_beyond, encode_prompts, every
from d2lora.errors import D2LoraError, DataError, RunError, listed
from d2lora.models import base_folder, load_tokenizer
from d2lora.plan import WORLD, StudyPlan
from d2lora.plan_file import read_plan
from d2lora.recipes import base_values
from d2lora.settings import BaseSettings, EvaluateSettings, StudySettings
from d2lora.tasks import Say, read_task

LIMITS = ("max_length", "overlong", "chat_format")
"""Settings of a task's training that its test rows share."""


def place(settings: StudySettings) -> tuple[StudyPlan, Path, Path]:
    """Return the plan with its data in place, the store and the study's folder."""
    name = "-".join(Path(plan).stem for plan in settings.plan)
    out = settings.out or Path("studies") / name
    if out.is_dir() and any(out.iterdir()) and not (out / "study.json").is_file():
        raise RunError(f"{out} holds something that is not a study; choose another --out")
    store = (settings.store or out.parent / "store").resolve()
    return _with_world(read_plan(*settings.plan, changes=settings.set), store / "world"), store, out


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
            base_folder(plan.base, plan.revision)
        except D2LoraError as error:
            faults.append(str(error))
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


def cut_short(plan: StudyPlan) -> list[str]:
    """Say of every task how many rows its limits cut, and how many answers they cannot hold."""
    base = BaseSettings(**base_values(plan))
    tokenizer = load_tokenizer(base)
    told: list[str] = []
    for name, task in plan.tasks.items():
        own = {key: value for key, value in {**plan.adapt, **task.adapt}.items() if key in LIMITS}
        limits = EvaluateSettings(**dict(base), out=Path(), **own)
        encoder = Encoder(tokenizer, resolve_format(tokenizer, limits.chat_format))
        rows, tests = (read_task(files, task.task) for files in (task.data, task.test))
        if tests.task.score in ("loss", "preference"):
            continue
        examples, length = tests.examples[: task.n_test], limits.max_length
        found = [
            encode_prompts(encoder, examples, length, limits.overlong).report(length),
            answers_beyond(encoder, examples, task.max_new_tokens),
        ]
        if limits.overlong == "truncate":
            over = [item.length - length for item in every(encoder.encode, rows.examples)]
            n_long, n_cut = sum(n > 0 for n in over), sum(n for n in over if n > 0)
            if n_long:
                told.append(
                    f"tasks.{name}: {n_long:,} of {len(over):,} training rows are cut to "
                    f"{length:,} tokens, by {n_cut:,} tokens"
                )
        told += [f"tasks.{name}: {fault}" for fault in found if fault]
    return told


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
