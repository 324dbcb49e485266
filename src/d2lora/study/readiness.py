"""A study's plan with its data in place, checked before hours are spent on it."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from d2lora.adapters.base import tokenizer_of
from d2lora.adapters.base_files import base_folder
from d2lora.adapters.fingerprints import identity_of
from d2lora.adapters.lora import BESIDE
from d2lora.data.encode import Encoder, resolve_format
from d2lora.data.encoded_sets import answers_beyond, encode_prompts, every
from d2lora.data.reading import Say, labels_of, read_task
from d2lora.data.sources import is_remote
from d2lora.data.tasks import Task
from d2lora.embedded.__main__ import write_world
from d2lora.errors import D2LoraError, DataError, ModelError, RunError, SettingsError, listed
from d2lora.evaluation.harness import read_harness_tasks, split_names
from d2lora.evaluation.test_sets import never_chosen
from d2lora.runtime.claims import check_writable
from d2lora.runtime.devices import device_of, dtype_of, slow_dtype
from d2lora.runtime.run_folder import present, write_shared
from d2lora.settings import BaseSettings, EvaluateSettings, StudySettings
from d2lora.study.plan import FROM_WARM_START, SHIPPED, UNTRAINED, WORLD, StudyPlan
from d2lora.study.read_plan import read_plan
from d2lora.study.recipes import base_values
from d2lora.warmstart import WarmStart

_BEFORE_STUDY = {"results.jsonl", "trials.jsonl", "removed_rows.jsonl"}
"""Files of a study that are written before `study.json`."""
LIMITS = ("max_length", "overlong", "chat_format")
"""Settings of a task's training that its test rows share."""


def place(settings: StudySettings) -> tuple[StudyPlan, Path, Path]:
    """Return the plan with its data in place, the store and the study's folder."""
    name = "-".join(Path(plan).stem for plan in settings.plan)
    out = settings.out or Path("studies") / name
    store = (settings.store or out.parent / "store").resolve()
    if store == out.resolve():
        raise SettingsError(
            f"--out {out}: the runs of studies go to this folder (--store); choose another for one "
            "of the two"
        )
    check_writable(store, "--store")
    return _placed(read_plan(*settings.plan, changes=settings.set), store / "world"), store, out


def check_folder(out: Path) -> None:
    """Check that a folder is empty, not there yet, or a study's, be it one that died as it wrote.

    Raises:
        RunError: If it is not.
    """
    if not (out / "study.json").is_file() and not set(present(out)) <= _BEFORE_STUDY:
        raise RunError(f"{out} holds something that is not a study; choose another --out")


def check(plan: StudyPlan, say: Say | None = None, *, fetch: bool = True) -> None:
    """Open everything that a study names before hours are spent on it.

    Args:
        plan: What is to run.
        say: Gets the formats of test rows; those of training rows come from `decontaminated`.
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
    faults += _faults_of_warm_starts(plan, fetch=fetch) or _faults_of_arms(plan)
    if fetch and not faults:
        faults += _faults_of_formats(plan)
    for name, task in plan.tasks.items():
        if not fetch and any(map(is_remote, (*task.data, *task.test))):
            continue
        try:
            rows = len(read_task(task.data, task.task).examples)
            tests = read_task(task.test, task.task, say=say) if task.test else None
        except D2LoraError as error:
            faults.append(f"tasks.{name}: {error}")
            continue
        if tests is not None:
            faults += [f"tasks.{name}: {fault}" for fault in _faults_of_answers(plan, tests.task)]
        if rows < max(plan.sizes):
            faults.append(
                f"tasks.{name}: n = {max(plan.sizes)} is requested, but it has {rows} rows"
            )
    faults += [*_faults_of_single_rows(plan), *_faults_of_choices(plan)]
    if faults:
        raise DataError(f"the study cannot run:\n{listed(faults)}")


def _faults_of_arms(plan: StudyPlan) -> list[str]:
    """Look for controls of warm-ups that train more than LoRA's factors."""
    faults: list[str] = []
    for arm in plan.arms:
        if arm.kind not in {"norms", "merged"} or arm.warm_up is None:
            continue
        ready = plan.ready(arm.warm_up)
        own = {**plan.warm_up, **plan.warm_ups[arm.warm_up]}
        made = dict(WarmStart.load(ready).manifest.lora) if ready else own
        if arm.kind == "norms" and any(made.get(name) for name in BESIDE):
            faults.append(
                f"arm {arm.name}: random weights have the norms of LoRA's factors, and the warm-up "
                f"trains more ({' or '.join(BESIDE)}): leave the arm out"
            )
        tokens = [
            token
            for task in plan.tasks.values()
            for token in {**plan.adapt, **task.adapt, **arm.adapt}.get("add_tokens") or ()
            if token in (made.get("add_tokens") or ())
        ]
        if arm.kind == "merged" and tokens:
            faults.append(
                f"arm {arm.name}: the merged base has `{tokens[0]}` from the warm-up already; give "
                "the arm `adapt: {add_tokens: []}`"
            )
    return faults


def _faults_of_single_rows(plan: StudyPlan) -> list[str]:
    """Look for arms that choose a learning rate or length where no row can be held out."""
    if 1 not in plan.sizes:
        return []
    several = len(set(plan.learning_rates)) > 1
    return [
        f"tasks.{task}: n = 1 leaves no row to choose the learning rate and length of {arm.name} "
        "by; give `rates` and `epochs`, or larger sizes"
        for task in plan.tasks
        for arm in plan.arms
        if arm.kind not in UNTRAINED
        and (plan.steps or (several and plan.learning_rate_of(task, arm.name, 1) is None))
    ]


def _faults_of_choices(plan: StudyPlan) -> list[str]:
    """Look for the tasks of lm-evaluation-harness that forgetting is measured on."""
    try:
        names = split_names(plan.choices)[1]
        for task in read_harness_tasks(names, plan.lm_eval_tasks, quiet=True).values():
            task.check_choices()
    except D2LoraError as error:
        return [f"choices: {error}"]
    return []


def _faults_of_answers(plan: StudyPlan, task: Task) -> list[str]:
    """Check that a task's test rows can be scored, in every arm."""
    if task.answers == "none":
        return [f"task {task.name} has no answers to score; give such rows as general_text"]
    if task.answers == "pairs" and any(arm.kind == "few_shot" for arm in plan.arms):
        return ["few_shot shows answers, and preferences are scored without; leave the arm out"]
    return []


def _faults_of_formats(plan: StudyPlan) -> list[str]:
    """Compare the chat formats of each task's arms: they are measured against one base."""
    tokenizer = tokenizer_of(BaseSettings(**base_values(plan)))
    faults: list[str] = []
    for name, task in plan.tasks.items():
        shared = {**plan.adapt, **task.adapt}.get("chat_format")
        for arm in plan.arms:
            wanted = {"chat_format": shared, **arm.adapt}["chat_format"]
            if arm.kind in FROM_WARM_START and arm.warm_up is not None:
                ready = plan.ready(arm.warm_up)
                made = {**plan.warm_up, **plan.warm_ups[arm.warm_up]}.get("chat_format")
                wanted = WarmStart.load(ready).manifest.chat_format if ready else made
            own, others = (resolve_format(tokenizer, form) for form in (wanted, shared))
            if own != others:
                faults.append(
                    f"tasks.{name}: arm {arm.name} is in chat format {own}, the task in {others}, "
                    "and what they score cannot be compared; set chat_format in `adapt`, and in "
                    "`warm_up` alike"
                )
    return faults


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
                base = identity_of(base_folder(plan.base, plan.revision, plan.gguf_file))
                made.manifest.check_base(base, plan.base, path)
        except ModelError as error:
            faults.append(f"warm_ups.{name}: {error}")
    return faults


def warnings_of(plan: StudyPlan) -> list[str]:
    """Return warnings: a slow dtype, rows that each task's limits cut, answers beyond them.

    Raises:
        DataError: If the chat template refuses a row.
    """
    base = BaseSettings(**base_values(plan))
    device = device_of(base.device)
    slow = slow_dtype(dtype_of(base.dtype, device), device)
    messages = [] if slow is None else [slow]
    for name, task in plan.tasks.items():
        own = {key: value for key, value in {**plan.adapt, **task.adapt}.items() if key in LIMITS}
        limits = EvaluateSettings(**dict(base), out=Path(), **own)
        encoder = Encoder.of_tokenizer(base, limits.chat_format)
        rows, tests = (
            read_task(files, task.task, check=encoder.check) for files in (task.data, task.test)
        )
        if tests.task.has_labels and (unknown := never_chosen(tests, labels_of(rows))):
            messages.append(f"tasks.{name}: {unknown}")
        if tests.task.answers != "open":
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
                messages.append(
                    f"tasks.{name}: {n_long:,} of {len(over):,} training rows are cut to "
                    f"{length:,} tokens, by {n_cut:,} tokens"
                )
        messages += [f"tasks.{name}: {fault}" for fault in found if fault]
    return messages


def _placed(plan: StudyPlan, world: Path) -> StudyPlan:
    """Put paths in the place of data named `world:` or `shipped:`.

    The small world's rows are written where the plan names some.
    """
    values = plan.model_dump(mode="json")
    paths = write_world(world, write_shared) if WORLD in json.dumps(values) else {}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [placed(inner) for inner in value]
        if isinstance(value, str) and value.startswith(SHIPPED):
            folder = resources.files("d2lora") / "shipped"
            return str(folder / value.removeprefix(SHIPPED))
        if isinstance(value, str) and value.startswith(WORLD):
            name = value.removeprefix(WORLD)
            if name not in paths:
                known = ", ".join(f"{WORLD}{known}" for known in paths)
                raise RunError(f"{value}: no such data; the small world has {known}")
            return str(paths[name])
        return value

    return StudyPlan.unchecked(placed(values))
