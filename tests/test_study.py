"""Studies: what is planned, run, resumed, chosen and kept apart."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from d2lora import AdaptSettings, WarmStart, WarmupSettings, adapt
from d2lora.adapters.manifest import Manifest
from d2lora.cli import main
from d2lora.embedded.__main__ import write_world
from d2lora.errors import DataError, RunError, SettingsError
from d2lora.report.analysis import read_findings
from d2lora.report.words import cautions
from d2lora.report.write import write_report
from d2lora.settings import StudySettings
from d2lora.study.calibration import Calibration
from d2lora.study.cells import Cell
from d2lora.study.decontamination import contamination_lines, decontaminated
from d2lora.study.jobs import Scored, Trial, WarmUp
from d2lora.study.mixture import write_mixture
from d2lora.study.needs import Needs
from d2lora.study.plan import KINDS, StudyPlan
from d2lora.study.read_plan import read_plan, shipped
from d2lora.study.run import Study, run_study
from d2lora.study.steps import Missing, reached
from d2lora.study.store import Job, perform
from d2lora.tools.convert import randomise
from support import read_rows, small_plan, visible, write_rows


@pytest.fixture
def plan(tmp_path: Path, tiny_base: str, general: str, titles: str) -> dict[str, Any]:
    return small_plan(tmp_path, tiny_base, general, titles)


def settings(folder: Path, plan: dict[str, Any], **values: Any) -> StudySettings:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    given = {"executor": "inline", "quiet": True, "report": False, **values}
    return StudySettings(plan=(str(path),), out=folder / "study", store=folder / "store", **given)


def outcome(study: Study) -> list[dict[str, Any]]:
    """What a study measured, without times."""
    timed = {"job_s", "evaluation_s", "cost", "adapter"}
    return [{k: v for k, v in row.items() if k not in timed} for row in study.results]


def runs_in(store: Path) -> set[str]:
    return {path.parent.name for path in store.glob("*/result.json")}


# Plans


def test_a_plan_tells_all_its_faults_at_once_with_the_nearest_names(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan["warm_ups"] = {"general": {"lerning_rate": 1}, "other": {"out": "x"}}
    plan["adapt"]["schedul"] = "linear"
    plan["arms"] = ["fresh", {"kind": "warm", "warm_up": "genral"}, {"kind": "init"}]
    plan["rates"] = {"titels": {}, "titles": {"frsh": {4: 0.1}}}
    with pytest.raises(SettingsError) as error:
        run_study(settings(tmp_path, plan))
    text = str(error.value)
    for part in (
        "Did you mean `learning_rate`?",
        "`out` is set by the study itself",
        "Did you mean `schedule`?",
        "no warm-up `genral`. Did you mean `general`?",
        "kind `init`, and it alone, needs `init`",
        "no task `titels`. Did you mean `titles`?",
        "no arm `frsh`. Did you mean `fresh`?",
    ):
        assert part in text


def test_a_plan_says_once_how_long_to_train(tmp_path: Path) -> None:
    assert not read_plan("quick").steps
    assert read_plan("scarcity", changes=["epochs={16: 3}"]).steps == {}
    assert read_plan("quick", changes=["steps.16=40"]).epochs == {}
    with pytest.raises(SettingsError, match="steps and epochs both set the length"):
        read_plan("scarcity", changes=["epochs={16: 3}", "steps={16: 40}"])
    with pytest.raises(SettingsError, match=r"adapt: `max_steps` and the plan's `steps` both set"):
        read_plan("scarcity", changes=["adapt.max_steps=3"])
    plan = tmp_path / "plan.yaml"
    plan.write_text("adapt: {max_steps: 3}\nsteps: {}\n")
    assert read_plan(str(plan)).adapt["max_steps"] == 3


def test_copies_of_sizes_rates_and_tasks_and_tasks_without_tests_are_refused(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    for copied in ({"sizes": [4, 4]}, {"learning_rates": [0.1, 0.1]}):
        with pytest.raises(SettingsError, match="each may be given once"):
            run_study(settings(tmp_path, plan | copied))
    twin = {**plan["tasks"]["titles"], "title": "Again"}
    untested = {"titles": {**plan["tasks"]["titles"], "test": []}}
    with pytest.raises(SettingsError, match=r"tasks\.titles: give test rows as `test`"):
        run_study(settings(tmp_path, plan | {"tasks": untested}))
    with pytest.raises(SettingsError, match="tasks again and titles are the same"):
        run_study(settings(tmp_path, plan | {"tasks": {**plan["tasks"], "again": twin}}))


@pytest.mark.parametrize("change", ["sizs=[4]", "tasks.titles.n_tst=3", "seeds", "seeds.a=1"])
def test_a_wrong_change_of_a_plan_is_an_error(
    tmp_path: Path, plan: dict[str, Any], change: str
) -> None:
    with pytest.raises(SettingsError):
        run_study(settings(tmp_path, plan, set=(change,)))


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rates": [0.01, -0.01]}, {"learning_rates": []},
        {"rates": {"titles": {"fresh": {4: 0}}}}, {"epochs": {4: -1}},
        {"epochs": {}, "steps": {4: 0}}, {"tasks": {"a/b": {"data": ["d"], "test": ["t"]}}},
    ],
)  # fmt: skip
def test_a_rate_length_or_name_that_could_not_be_used_is_a_fault_of_the_plan(
    values: dict[str, Any], plan: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="wrong settings"):
        read_plan(*settings(tmp_path, plan | values).plan)


def test_a_study_is_not_written_among_the_runs_of_its_store(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    own = settings(tmp_path, plan)
    with pytest.raises(SettingsError, match="choose another for one of the two"):
        run_study(own.changed(out=own.store))
    assert not (tmp_path / "store").exists()


def test_an_arm_that_is_not_trained_is_not_averaged(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan["arms"] = ["fresh", {"kind": "warm_only", "average_of": 2}]
    with pytest.raises(SettingsError, match="arm warm_only: `average_of` is of arms"):
        read_plan(*settings(tmp_path, plan).plan)


@pytest.mark.parametrize("where", ["warm_up", "arm"])
def test_arms_in_different_chat_formats_stop_a_study_before_it_runs(
    where: str, tmp_path: Path, plan: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(plan["base"], tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    plan["base"] = str(base)
    if where == "warm_up":
        plan["warm_up"] |= {"chat_format": "plain"}
    else:
        plan["arms"] = ["warm", {"kind": "fresh", "adapt": {"chat_format": "plain"}}]
    with pytest.raises(DataError, match="is in chat format plain, the task in template"):
        run_study(settings(tmp_path, plan))


def test_rows_that_are_missing_stop_a_study_before_it_runs(
    tmp_path: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan["tasks"]["more"] = {"data": ["nowhere.jsonl"], "test": ["nowhere.jsonl"]}
    plan["sizes"] = [4, 1000]
    given = settings(tmp_path, plan)
    with pytest.raises(DataError) as error:
        run_study(given)
    too_few = "tasks.titles: n = 1000 is requested, but it has 40 rows"
    assert "tasks.more: nowhere.jsonl" in str(error.value)
    assert too_few in str(error.value)
    assert main(["study", *given.plan, "--out", str(given.out), "--dry-run"]) == 2
    reported = " ".join(capsys.readouterr().err.split())
    assert too_few in reported
    assert "tasks.more: nowhere.jsonl: no such file" in reported
    assert not (tmp_path / "study").exists()


def test_a_size_that_leaves_no_row_to_choose_by_stops_a_study_before_it_runs(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan["sizes"] = [1, 4]
    with pytest.raises(DataError, match="n = 1 leaves no row to choose the learning rate"):
        run_study(settings(tmp_path, plan))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_plan_is_whole(name: str) -> None:
    assert read_plan(name).question


ON_THE_REAL_BASE = {"demo", "few_rows", "gemma", "intents", "lengths", "slots", "smollm2"}
"""Plans whose estimate takes minutes, as it measures some steps of everything."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(shipped()) - ON_THE_REAL_BASE))
def test_every_shipped_plan_can_be_estimated_where_its_files_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", name, "--dry-run", "--out", str(tmp_path / "study")]
    tasks = read_plan(name).tasks.values()
    files = [file for task in tasks for file in task.data]
    files = [file for file in files if ":" not in file]  # neither shipped nor of the small world
    code = main(words)
    shown = capsys.readouterr()
    if files:
        assert code == 2
        assert f"{files[0]}: no such file" in shown.err
    else:
        assert code == 0
        assert "cells" in shown.out
    assert not (tmp_path / "study").exists()


def test_an_unknown_plan_is_an_error_that_names_the_shipped_ones() -> None:
    with pytest.raises(SettingsError, match=r"Did you mean `scarcity`\?.*quick"):
        read_plan("scarcty")


def test_a_plan_laid_over_another_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("sizes: [4]\nwarm_up: {m: 30}\nadapt: {max_length: 99}\n")
    plan, rank = read_plan("rank", str(over)), read_plan("rank")
    assert plan.sizes == (4,)
    assert plan.warm_up == {**rank.warm_up, "m": 30}
    assert plan.adapt == {**rank.adapt, "max_length": 99}
    assert (plan.arms, plan.warm_ups, plan.tasks) == (rank.arms, rank.warm_ups, rank.tasks)


def test_a_study_of_two_plans_is_named_after_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.yaml").write_text("sizes: [4]\nseeds: 1\narms: [few_shot]\n")
    assert main(["study", "rank", "few.yaml", "--dry-run"]) == 0
    assert "few_shot" in capsys.readouterr().out
    with pytest.raises(SettingsError, match=r"rank \+ few.yaml:"):
        read_plan("rank", "few.yaml", changes=["arms=[{kind: warm, warm_up: nix}]"])


def test_arms_of_several_warm_ups_come_once_for_each(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan["warm_ups"] = {"a": {}, "b": {"m": 20}}
    plan["arms"] = ["fresh", "warm", {"kind": "merged", "warm_up": "b", "name": "folded"}]
    (path,) = settings(tmp_path, plan).plan
    arms = [(arm.name, arm.warm_up) for arm in read_plan(path).arms]
    assert arms == [("fresh", None), ("warm (a)", "a"), ("warm (b)", "b"), ("folded", "b")]


# Running


def test_a_killed_study_goes_on_to_the_results_of_an_uninterrupted_one(
    tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan["sizes"] = [4]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = run_study(settings(tmp_path / "a", plan))
    assert not whole.failures
    broken = settings(tmp_path / "b", plan)
    for n_jobs in (3, 9):
        monkeypatch.setattr("d2lora.study.executors.perform", dies_after(n_jobs))
        with pytest.raises(KeyboardInterrupt):
            run_study(broken)
        assert not (tmp_path / "b" / "study" / "done.json").exists()
    monkeypatch.setattr("d2lora.study.executors.perform", perform)
    before = runs_in(tmp_path / "b" / "store")
    resumed = run_study(broken)
    assert len(before) >= 11
    assert before < runs_in(tmp_path / "b" / "store")
    assert outcome(resumed) == outcome(whole)


def test_a_study_that_is_not_finished_can_be_looked_at(
    tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without trials: a warm-up, two arms of two seeds, and the base, in this order.
    asked = settings(tmp_path, {**plan, "sizes": [4], "learning_rates": [0.01]})
    out, shown = tmp_path / "study", list[set[tuple[str, int]]]()
    monkeypatch.setattr("d2lora.study.run._LEAST_BETWEEN_S", 0.0)
    for n_jobs in (2, 1, 1):
        with monkeypatch.context() as patch:
            patch.setattr("d2lora.study.executors.perform", dies_after(n_jobs))
            with pytest.raises(KeyboardInterrupt):
                run_study(asked)
        findings = read_findings(out)
        assert findings.n_unfinished == 5 - len(read_rows(out / "results.jsonl"))
        assert any("is not finished" in caution for caution in cautions(findings))
        shown.append({(v.arm, seed) for v in findings.levels for seed in v.seeds})
    both = {("fresh", 0), ("warm", 0)}
    assert shown[1:] == [both, both], "arms are compared at seeds that each has finished"
    write_report(findings)
    lines = read_rows(out / "results.jsonl")
    others = [row for row in lines if (row["arm"], row["seed"]) != ("fresh", 0)]
    write_rows(out / "results.jsonl", others)  # fresh of seed 1 and warm of seed 0
    with pytest.raises(RunError, match="no seed is finished by every arm yet"):
        read_findings(out)
    run_study(asked)
    whole = read_findings(out)
    assert whole.n_unfinished == 0
    assert not any("is not finished" in caution for caution in cautions(whole))


def kinds_of_jobs(asked: StudySettings, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a study; return the kinds of its jobs in their order, those that train marked."""
    order: list[str] = []

    def noted(job: Job, *, patient: bool) -> dict[str, Any]:
        trains = isinstance(job, Scored) and job.training is not None
        order.append("cell" if trains else type(job).__name__)
        return perform(job, patient=patient)

    monkeypatch.setattr("d2lora.study.executors.perform", noted)
    run_study(asked)
    return order


def test_cells_are_finished_one_after_the_other(
    tmp_path: Path, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = kinds_of_jobs(settings(tmp_path, {**plan, "sizes": [4]}), monkeypatch)
    first_cell = kinds.index("cell")
    assert "Trial" in kinds[first_cell:], "every trial comes before the first cell"


def test_what_cells_wait_for_comes_before_them(
    tmp_path: Path, plan: dict[str, Any], warm_start: WarmStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: dict[str, Any] = {"mine": {"path": str(warm_start.path)}}
    plan |= {"sizes": [4], "learning_rates": [0.01], "warm_ups": ready, "warm_up": {}, "adapt": {}}
    kinds = kinds_of_jobs(settings(tmp_path, plan), monkeypatch)
    assert kinds == ["Ready", "cell", "cell", "cell", "cell", "Scored"]


def test_a_study_killed_inside_of_its_warm_up_can_be_estimated_and_resumed(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    asked = settings(tmp_path, plan)
    whole = outcome(run_study(asked))
    (warm_start,) = (tmp_path / "store").glob("*/warm-start")
    for file in (warm_start.parent / "result.json", *warm_start.iterdir()):
        file.unlink()
    words = ["study", *asked.plan, "--out", str(asked.out), "--store", str(asked.store)]
    assert main([*words, "--dry-run"]) == 0
    assert outcome(run_study(asked)) == whole


def dies_after(n_jobs: int) -> Callable[..., dict[str, Any]]:
    left = n_jobs

    def run(job: Job, *, patient: bool) -> dict[str, Any]:
        nonlocal left  # the job after the last allowed one is where the user loses patience
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return perform(job, patient=patient)

    return run


def test_a_changed_plan_runs_only_what_it_touches(tmp_path: Path, plan: dict[str, Any]) -> None:
    store = tmp_path / "store"
    run_study(settings(tmp_path, plan))
    first, trials = runs_in(store), trial_keys(tmp_path)
    assert len(first) == 1 + 1 + len(trials) + 2 * 2 * 2  # base, warm-up, trials, cells
    run_study(settings(tmp_path, plan))
    assert runs_in(store) == first
    # Other test rows: cells are scored again, but nothing is tried again.
    run_study(settings(tmp_path, plan, set=("tasks.titles.n_test=3",)))
    assert trial_keys(tmp_path) == trials
    second = runs_in(store)
    assert len(second) == len(first) + (1 + 2 * 2 * 2)
    run_study(settings(tmp_path, plan, set=("seeds=3",)))
    more = trial_keys(tmp_path) - trials
    assert len(runs_in(store)) == len(second) + 2 * 2 + len(more)
    assert len(more) >= 2 * 2 * 2, "a seed tries learning rates of its own"


def trial_keys(folder: Path) -> set[str]:
    return {trial["key"] for trial in read_rows(folder / "study" / "trials.jsonl")}


def test_a_study_that_died_as_it_wrote_its_first_results_goes_on(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan |= {"learning_rates": [0.03], "sizes": [4], "seeds": 1, "arms": ["fresh"]}
    given = settings(tmp_path, plan)
    run_study(given)
    for name in ("study.json", "done.json"):
        (tmp_path / "study" / name).unlink()
    (tmp_path / "study" / ".study.json.tmp-1").write_text("{")
    assert len(run_study(given).results) == 2
    (tmp_path / "study" / "study.json").unlink()
    (tmp_path / "study" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="not a study"):
        run_study(given)


def test_a_study_with_failed_cells_is_not_done_and_ends_with_an_error_that_says_why(
    tmp_path: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan |= {"learning_rates": [0.03], "sizes": [4]}
    run_study(settings(tmp_path, plan))
    assert (tmp_path / "study" / "done.json").exists()
    plan["arms"] = ["fresh", {"kind": "init", "init": str(tmp_path / "nowhere")}]
    study = run_study(settings(tmp_path, plan))
    assert len(study.results) == 1 + 2
    assert len(study.failures) == 2
    assert all("nowhere" in reason for reason in study.failures.values())
    assert not (tmp_path / "study" / "done.json").exists(), "that of the earlier run is gone"
    saved = json.loads((tmp_path / "study" / "study.json").read_text())
    assert saved["failures"] == study.failures
    asked = settings(tmp_path, plan)
    words = ["study", *asked.plan, "--out", str(asked.out), "--store", str(asked.store)]
    assert main([*words, "--executor", "inline", "--quiet", "--no-report"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "2 of 5 cells failed" in printed
    assert "nowhere" in printed


def test_each_seed_takes_its_own_best_learning_rate_and_one_that_diverges_is_out(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan |= {"learning_rates": [1e-4, 0.03, 1e30], "sizes": [8], "seeds": 3}
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    trials = read_rows(tmp_path / "study" / "trials.jsonl")
    assert any("failed" in trial for trial in trials)
    place = ("arm", "n", "seed")
    for row in study.results:
        if row["learning_rate"] is None:
            continue
        own = [t for t in trials if all(t[name] == row[name] for name in place) and "curve" in t]
        assert {t["learning_rate"] for t in own} >= {1e-4, 0.03}
        best = min(own, key=lambda trial: trial["validation_loss_after"])
        assert row["learning_rate"] == best["learning_rate"]
    before = {t["curve"][0][1] for t in trials if t["arm"] == "fresh" and "curve" in t}
    assert len(before) == 3, "seeds validate on rows of their own"


def test_each_cell_ends_at_the_step_of_its_lowest_loss_over_the_folds_of_its_rows(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    del plan["epochs"]
    plan |= {"steps": {4: 3}, "folds": 2, "sizes": [4], "learning_rates": [0.03]}
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    chosen = json.loads((tmp_path / "study" / "study.json").read_text())["chosen"]
    trials = read_rows(tmp_path / "study" / "trials.jsonl")
    assert len(chosen) == 4
    for one in chosen:
        place = {name: one[name] for name in ("arm", "n", "seed")}
        (row,) = [r for r in study.results if place.items() <= r.items()]
        own = [t for t in trials if place.items() <= t.items()]
        assert {t["fold"] for t in own} == {0, 1}
        assert len({t["validation_loss_before"] for t in own}) == 2, "folds hold other rows out"
        length = one["curve"][-1][0]
        assert length == 3 * 2 ** one["doublings"]
        folds = [t["curve"] for t in own if t["curve"][-1][0] == length]
        mean = {step: (a + b) / 2 for (step, a), (_, b) in zip(*folds, strict=True)}
        assert dict(map(tuple, one["curve"])) == pytest.approx(mean)
        assert mean[one["step"]] == min(mean.values())
        assert row["cost"]["n_steps"] == one["step"]
        adapter = yaml.safe_load((Path(row["adapter"]) / "settings.yaml").read_text())
        assert adapter["max_steps"] in (length, 0)
        assert adapter["n"] == 4


def test_a_cell_whose_lowest_loss_is_the_untrained_one_is_the_initialization_itself(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    del plan["epochs"]
    plan |= {"steps": {4: 2}, "sizes": [4], "seeds": 1, "arms": ["fresh"]}
    plan["learning_rates"] = [1e-30]
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    base, fresh = study.results
    assert fresh["cost"]["n_steps"] == 0
    assert (fresh["scores"], fresh["general_loss"]) == (base["scores"], base["general_loss"])
    assert read_findings(study.path).levels[1].learning_rates == (1e-30,)


def test_seeds_are_initialized_from_their_own_warm_ups_where_the_plan_says_so(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan |= {"learning_rates": [0.01], "sizes": [4], "seeds": 3, "warm_up_seeds": 2}
    plan["arms"] = ["fresh", "warm", "warm_only"]
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    warm_ups = json.loads((tmp_path / "study" / "study.json").read_text())["warm_ups"]
    assert list(warm_ups) == ["general", "general, seed 1"]
    paths = [warm_up["path"] for warm_up in warm_ups.values()]
    assert [Manifest.read(Path(path)).settings["seed"] for path in paths] == [0, 1]
    inits = [
        yaml.safe_load((Path(row["adapter"]) / "settings.yaml").read_text())["init"]
        for row in study.results
        if row["arm"] == "warm"
    ]
    assert inits == [paths[0], paths[1], paths[0]]
    assert [row["adapter"] for row in study.results if row["arm"] == "warm_only"] == paths


def test_a_warm_start_that_is_there_is_used_as_it_is_and_known_by_its_weights(
    tmp_path: Path, plan: dict[str, Any], warm_start: WarmStart
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(warm_start.path, mine)
    plan |= {"learning_rates": [0.01], "sizes": [4], "seeds": 1}
    plan |= {"warm_ups": {"mine": {"path": str(mine)}}, "arms": ["fresh", "warm", "longer"]}
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    adapter = next(row["adapter"] for row in study.results if row["arm"] == "warm")
    assert Manifest.read(Path(adapter)).lineage[0].path == str(mine)
    before = runs_in(tmp_path / "store")
    changed = load_file(mine / "adapter_model.safetensors")
    save_file({k: 2 * v for k, v in changed.items()}, mine / "adapter_model.safetensors")
    run_study(settings(tmp_path, plan))
    new = runs_in(tmp_path / "store") - before
    kinds = [json.loads((tmp_path / "store" / key / "result.json").read_text())["about"][0]
             for key in new]  # fmt: skip
    assert sorted(kinds) == ["Ready", "Scored"], "what is initialized from it, and nothing else"


def test_a_warm_start_that_cannot_be_used_stops_a_study_before_it_runs(
    tmp_path: Path, plan: dict[str, Any], other_base: str, warm_start: WarmStart
) -> None:
    plan |= {"warm_ups": {"gone": {"path": str(tmp_path / "nowhere")}}}
    with pytest.raises(DataError, match=r"warm_ups.gone: .*nowhere: no such folder"):
        run_study(settings(tmp_path, plan))
    plan |= {"warm_ups": {"mine": {"path": str(warm_start.path)}}, "base": other_base}
    with pytest.raises(DataError, match=r"warm_ups.mine: .*has other weights"):
        run_study(settings(tmp_path, plan))
    plan |= {"warm_ups": {"mine": {"path": 3, "m": 5}}, "arms": ["fresh", "mixed"]}
    with pytest.raises(SettingsError) as error:
        run_study(settings(tmp_path, plan))
    for part in ("leave out `m`", "expected a folder, got 3", "rows cannot be mixed"):
        assert part in str(error.value)


@pytest.mark.parametrize("arm", ["fresh", "warm"])
def test_an_interpolated_arm_lies_between_its_initialization_and_what_was_trained(
    arm: str, tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan |= {"learning_rates": [0.01], "sizes": [8], "seeds": 1}
    plan["arms"] = [arm, {"kind": arm, "interpolate": 0.25, "against": arm}]
    if arm == "warm":
        del plan["adapt"]["rank"]
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    whole, quarter = study.results[1:]
    assert quarter["arm"] == f"{arm} (0.25 of the way)"
    end, between = (
        load_file(Path(one["adapter"]) / "adapter_model.safetensors") for one in (whole, quarter)
    )
    made = yaml.safe_load((Path(whole["adapter"]) / "settings.yaml").read_text())
    start = load_file(Path(made["init"]) / "adapter_model.safetensors") if arm == "warm" else {}
    for name, weight in end.items():
        if start:
            expected = torch.lerp(start[name], weight, 0.25)
        else:
            expected = 0.25 * weight if "lora_B" in name else weight
        torch.testing.assert_close(between[name], expected)
    assert quarter["cost"]["n_tokens"] == whole["cost"]["n_tokens"]
    assert quarter["general_loss"] != whole["general_loss"]


def test_what_has_no_way_to_go_is_not_interpolated(tmp_path: Path, plan: dict[str, Any]) -> None:
    for arm in ("warm_only", "warm_a"):
        plan["arms"] = ["fresh", {"kind": arm, "interpolate": 0.5}]
        with pytest.raises(SettingsError, match=f"arm {arm}: `interpolate` is of arms that are"):
            read_plan(*settings(tmp_path, plan).plan)


@pytest.mark.parametrize("keep", [True, False])
def test_an_averaged_arm_is_the_mean_of_runs_in_other_orders_and_costs_as_much(
    tmp_path: Path, plan: dict[str, Any], keep: bool
) -> None:
    plan |= {"learning_rates": [0.01], "sizes": [8], "seeds": 1}
    plan["arms"] = ["warm", {"kind": "warm", "average_of": 3}]
    del plan["adapt"]["rank"]
    study = run_study(settings(tmp_path, plan, keep_adapters=keep))
    assert not study.failures
    one, averaged = study.results[1:]
    assert averaged["arm"] == "warm (average of 3)"
    for name in ("n_steps", "n_tokens", "flops"):
        assert averaged["cost"][name] == pytest.approx(3 * one["cost"][name])
    assert averaged["cost"]["n_trainable_parameters"] == one["cost"]["n_trainable_parameters"]
    folder = tmp_path / "store" / averaged["key"]
    if not keep:
        assert not list(folder.rglob("*.safetensors"))
        assert averaged["adapter"] is None
        return
    own = Path(averaged["adapter"])
    assert own.parent == folder
    made = AdaptSettings(**yaml.safe_load((folder / "run-2" / "settings.yaml").read_text()))
    alone = adapt(made.changed(out=tmp_path / "alone"))
    paths = [folder / "run-0", folder / "run-1", alone.path]
    runs = [load_file(path / "adapter_model.safetensors") for path in paths]
    for name, mean in load_file(own / "adapter_model.safetensors").items():
        parts = torch.stack([run[name] for run in runs])
        torch.testing.assert_close(mean, parts.mean(dim=0))
        if "lora_B" in name:
            assert (parts[0] != parts[1]).any(), "in another order"
    read_findings(study.path)


def test_only_the_last_job_of_a_cell_knows_the_test_rows(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    (test,) = plan["tasks"]["titles"]["test"]
    study = run_study(settings(tmp_path, plan))
    needs = Needs(study.plan, tmp_path / "store", keep_adapters=True)
    cell = Cell("warm", "titles", 4, 1)
    tried = reached(needs.trials(cell))
    assert not isinstance(tried, Missing)
    trials = [trial for folds in tried.values() for trial in folds]
    assert len(trials) >= 2
    for trial in trials:
        assert isinstance(trial, Trial)
        assert test not in str(trial)
    last = reached(needs.last_job(cell))
    assert isinstance(last, Scored)
    assert test in str(last)


@pytest.mark.slow
def test_a_study_killed_twice_from_outside_leaves_no_worker_and_resumes(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = run_study(settings(tmp_path / "a", plan))
    given = settings(tmp_path / "b", plan)
    store = tmp_path / "b" / "store"
    words = [sys.executable, "-m", "d2lora", "study", *given.plan, "--out", str(given.out)]
    words += ["--store", str(store), "--workers", "2", "--no-report"]
    for n_runs in (2, 8):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda wanted=n_runs: len(runs_in(store)) >= wanted, process)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    subprocess.run(words, check=True, capture_output=True, timeout=300)
    again = [
        {k: v for k, v in row.items() if k in ("arm", "n", "seed", "scores", "general_loss")}
        for row in read_rows(tmp_path / "b" / "study" / "results.jsonl")
    ]
    first = [
        {k: v for k, v in row.items() if k in ("arm", "n", "seed", "scores", "general_loss")}
        for row in whole.results
    ]
    assert again == first
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=300)
    assert "Traceback" not in done.stderr, "workers that start after the study has ended"


def wait_until(true: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if true():
            return
        assert process.poll() is None, "the study ended before it could be killed"
        time.sleep(0.1)
    pytest.fail("nothing was run in two minutes")


# Contamination


def test_training_rows_that_are_test_rows_are_taken_out_and_reported_and_the_study_runs(
    tmp_path: Path, plan: dict[str, Any], titles: str, general: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own, pool = read_rows(Path(titles)), read_rows(Path(general))
    (test,) = plan["tasks"]["titles"]["test"]
    plan["keep_out_words"] = 0  # the small world's rows share the wording of templates
    plan["tasks"]["titles"]["test"] = [write_rows(Path(test), [own[3], own[30]])]
    leaks = [{"prompt": f"Write a title for this text.\n\n{own[30]['text']}", "response": "x"}]
    plan["warm_up"]["data"] = write_rows(tmp_path / "pool.jsonl", [*pool, *leaks])
    study = run_study(settings(tmp_path, plan, quiet=False))
    assert not study.failures
    (cleaned,) = study.plan.tasks["titles"].data
    assert read_rows(Path(cleaned)) == [r for i, r in enumerate(own) if i not in (3, 30)]
    assert read_rows(Path(study.plan.warm_ups["general"]["data"][0])) == pool
    removed = read_rows(tmp_path / "study" / "removed_rows.jsonl")
    assert [(Path(row["file"]), row["line"]) for row in removed] == [
        (tmp_path / "pool.jsonl", len(pool) + 1), (Path(titles), 4), (Path(titles), 31)
    ]  # fmt: skip
    assert "task titles: 2 of 40 training rows overlap with an evaluation row" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    findings = read_findings(study.path)
    assert [(c["use"], c["n_rows"], c["n_removed"]) for c in findings.contamination] == [
        ("warm-up general", len(pool) + 1, 1), ("task titles", 40, 2)
    ]  # fmt: skip
    text = visible(write_report(findings).read_text("utf-8"))
    assert "Task titles: 2 of 40 training rows overlap with an evaluation row" in text
    assert run_study(settings(tmp_path, plan)).plan == study.plan


def test_uses_of_one_fate_are_reported_together() -> None:
    first = "is in a.jsonl, line 3"
    fates = {"warm-up a": 0, "warm-up b": 0, "task c": 0, "task d": 2}
    checks = [{"use": u, "n_rows": 1000, "n_removed": n, "first": first} for u, n in fates.items()]
    assert contamination_lines([*checks, {"use": "task e", "n_rows": None, "n_removed": 0}]) == [
        "warm-ups a, b; task c: none of 1,000 training rows overlaps with an evaluation row",
        "task d: 2 of 1,000 training rows overlap with an evaluation row and were removed; the "
        "first is in a.jsonl, line 3",
        "task e: not checked against the evaluation files, as not all are here",
    ]


def test_files_that_lose_no_row_are_used_as_they_are(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan["keep_out_words"] = 0
    (path,) = settings(tmp_path, plan).plan
    asked = read_plan(path)
    left, checks = decontaminated(asked, tmp_path, tmp_path / "world")
    assert left == asked
    assert [len(check.removed) for check in checks] == [0, 0]
    assert not (tmp_path / "cleaned").exists()


def test_the_small_world_loses_no_row_to_its_templates_and_other_files_do(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world", n_general=300, n_task=60, n_test=60)
    plan = read_plan("quick")
    values = json.loads(plan.model_dump_json())
    text = json.dumps(values)
    for name, file in world.items():
        text = text.replace(f'"world:{name}"', json.dumps(str(file)))
    asked = StudyPlan(**json.loads(text)).changed(sizes=(8,), warm_up={**plan.warm_up, "m": 300,
        "data": [str(world["general-train"])]})  # fmt: skip
    _, checks = decontaminated(asked, tmp_path, tmp_path / "world")
    assert [(check.n_rows, len(check.removed)) for check in checks] == [(300, 0), (60, 0), (60, 0)]
    _, checks = decontaminated(asked, tmp_path, tmp_path / "elsewhere")
    assert len(checks[2].removed) > 10


def test_a_study_that_is_left_too_few_rows_says_why(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan["tasks"]["titles"]["test"] = plan["tasks"]["titles"]["data"]
    with pytest.raises(DataError, match=r"task titles: 8 rows are requested, but 0 of 40 are left"):
        run_study(settings(tmp_path, plan))


# Arms and controls


def test_every_kind_of_arm_runs(tmp_path: Path, plan: dict[str, Any]) -> None:
    plan["arms"] = [*(kind for kind in KINDS if kind != "init")]
    plan["sizes"], plan["seeds"], plan["learning_rates"], plan["shots"] = [4], 1, [0.01], 1
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    assert {row["kind"] for row in study.results} == {*KINDS, "base"} - {"init"}
    steps = {row["kind"]: row["cost"]["n_steps"] for row in study.results if "cost" in row}
    assert steps["fresh"] == steps["warm"] == steps["merged"] == steps["warm_a"] == 2
    assert steps["longer"] == 2 + 4
    base = next(row for row in study.results if row["arm"] == "base")
    assert base["n"] == 0
    shots = next(row for row in study.results if row["kind"] == "few_shot")
    assert shots["general_loss"] == base["general_loss"]


def test_what_becomes_of_long_rows_holds_for_training_and_for_test_rows(
    tmp_path: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan |= {"arms": ["fresh"], "sizes": [4], "seeds": 1, "learning_rates": [0.01]}
    plan["adapt"] |= {"max_length": 40, "overlong": "truncate"}
    study = run_study(settings(tmp_path, plan).changed(quiet=False))
    assert not study.failures
    printed = " ".join(capsys.readouterr().err.split())
    assert "warning: tasks.titles: 40 of 40 training rows are cut to 40 tokens" in printed
    assert "warning: tasks.titles: truncated 6 of 6 prompts longer than 40 tokens" in printed
    assert "of 6 gold answers are longer than max_new_tokens 6" in printed
    plan["adapt"] |= {"overlong": "error"}
    study = run_study(settings(tmp_path, plan))
    cell = "base, titles, n = 0, seed 0"
    assert "longer than --max-length 40" in study.failures[cell]
    assert cell not in study.failures[cell], "the reason names the cell again"


def test_an_objective_of_preferences_learns_from_pairs_of_the_same_rows(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    """Pairs are sampled from what each training is initialized from, and made once."""
    plan["warm_ups"] = {"sft": {}, "dpo": {"objective": "dpo"}}
    plan["arms"] = [
        {"kind": "fresh", "name": "fresh", "adapt": {"objective": "orpo"}},
        {"kind": "warm", "name": "warm", "warm_up": "sft", "adapt": {"objective": "dpo"}},
        {"kind": "warm", "name": "dpo first", "warm_up": "dpo"},
    ]
    plan |= {"sizes": [4], "seeds": 1, "pairs": {"samples": 2, "max_new_tokens": 6}}
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    made = {
        path.parent.parent: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "store").glob("*/pairs/pairs.jsonl")
    }
    assert sorted(len(rows) for rows in made.values()) == [4, 4, 40]
    adapters = [
        yaml.safe_load((f / "pairs" / "settings.yaml").read_text())["adapter"] for f in made
    ]
    assert sum(adapter is not None for adapter in adapters) == 1
    objectives = {
        row["arm"]: Manifest.read(Path(row["adapter"])).objective
        for row in study.results
        if row["arm"] != "base"
    }
    assert objectives == {"fresh": "orpo", "warm": "dpo", "dpo first": "sft"}


def test_a_task_of_preferences_is_studied_and_reported(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    rows = [{"prompt": f"Say {i}", "chosen": f"It is {i}", "rejected": "No"} for i in range(12)]
    files = [write_rows(tmp_path / f"{part}.jsonl", rows[part::2]) for part in (0, 1)]
    plan["tasks"] = {"pairs": {"data": files[:1], "test": files[1:]}}
    plan |= {"sizes": [4], "seeds": 1, "learning_rates": [0.03], "arms": ["fresh"]}
    study = run_study(settings(tmp_path, plan))
    assert not study.failures
    assert all(len(row["scores"]["preference_accuracy"]) == 6 for row in study.results)
    page = visible(write_report(read_findings(study.path)).read_text("utf-8"))
    assert "preference accuracy" in page
    assert "not in the study" not in page


def test_a_row_that_the_chat_template_refuses_stops_a_study_before_it_runs(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(plan["base"], tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ raise_exception('no such turns') }}")
    plan["base"] = str(base)
    with pytest.raises(DataError, match=r"titles\.jsonl, line 1: the chat template .* refuses"):
        run_study(settings(tmp_path, plan))


def test_preferences_are_not_scored_with_examples_in_the_prompt(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    rows = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]
    files = [
        write_rows(tmp_path / n, part) for n, part in (("d.jsonl", rows[:8]), ("t.jsonl", rows[8:]))
    ]
    plan["tasks"] = {"pairs": {"data": [files[0]], "test": [files[1]]}}
    plan["arms"] = ["fresh", "few_shot"]
    with pytest.raises(DataError, match="few_shot shows answers"):
        run_study(settings(tmp_path, plan))


def test_a_task_without_answers_stops_a_study_before_it_runs(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    tests = write_rows(tmp_path / "t.jsonl", [{"text": "Some text."}])
    rows = write_rows(tmp_path / "d.jsonl", [{"text": f"Number {i}."} for i in range(8)])
    plan["tasks"] = {"texts": {"data": [rows], "test": [tests]}}
    with pytest.raises(DataError, match=r"tasks\.texts: task text has no answers to score"):
        run_study(settings(tmp_path, plan))


def test_random_weights_have_the_norms_of_the_warm_start_and_nothing_else(
    warm_start: WarmStart, tmp_path: Path
) -> None:
    randomise(warm_start.path, tmp_path / "random", seed=1)
    old = load_file(warm_start.path / "adapter_model.safetensors")
    new = load_file(tmp_path / "random" / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        torch.testing.assert_close(new[name].norm(), tensor.norm())
        cosine = (new[name] * tensor).sum() / tensor.norm() ** 2
        assert abs(float(cosine)) < 0.6
    assert Manifest.read(tmp_path / "random").conversion == {"random_weights_seed": 1}


def test_a_mixture_shows_each_row_as_often_as_the_two_phases_do(
    tmp_path: Path, general: str, titles: str
) -> None:
    warm_up = WarmupSettings(data=(general,), out=tmp_path, m=10, epochs=2)
    training = AdaptSettings(
        data=(titles,), out=tmp_path, n=8, epochs=3, validation_fraction=0.25, seed=5
    )
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    write_mixture(warm_up, training, train, valid)
    texts = [json.dumps(row) for row in read_rows(train)]
    counts = sorted({texts.count(text) for text in texts})
    assert counts == [2, 3]
    assert len(texts) == 2 * 10 + 3 * 6
    held_out = {json.dumps(row) for row in read_rows(valid)}
    assert len(held_out) == 2
    assert not held_out & set(texts)


def test_a_mixture_shows_rows_as_often_as_the_steps_of_a_warm_up_do(
    tmp_path: Path, general: str, titles: str
) -> None:
    warm_up = WarmupSettings(data=(general,), out=tmp_path, m=10, max_steps=5, batch_size=6)
    training = AdaptSettings(data=(titles,), out=tmp_path, n=4, epochs=1)
    write_mixture(warm_up, training, tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    assert len(read_rows(tmp_path / "train.jsonl")) == (6 + 4) + (6 + 4) + 6 + 4
    by_tokens = warm_up.changed(max_steps=None, max_tokens=100)
    with pytest.raises(SettingsError, match="max_tokens"):
        write_mixture(by_tokens, training, tmp_path / "t.jsonl", tmp_path / "v.jsonl")


# Findings


def write_study(folder: Path, plan: StudyPlan, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    write_rows(folder / "results.jsonl", rows)
    write_rows(folder / "trials.jsonl", [])
    values = {"plan": plan.model_dump(mode="json"), "failures": {}, "chosen": [], "warm_ups": {}}
    (folder / "study.json").write_text(json.dumps({**values, "store": "", "provenance": {}}))


def row(arm: str, n: int, seed: int, right: list[float], **values: Any) -> dict[str, Any]:
    kind = arm if arm in KINDS else "base"
    place = {"arm": arm, "kind": kind, "task": "problems", "n": n, "seed": seed}
    scored = {"scores": {"exact_match": right}, "general_loss": None, "choices_right": None}
    return {**place, **scored, "learning_rate": 0.01, "adapter": None, **values}


def test_arms_that_failed_at_different_seeds_are_not_compared(tmp_path: Path) -> None:
    plan = read_plan("quick", changes=["sizes=[16, 64, 256]", "seeds=2"])
    right = [1.0, 0.0] * 5
    rows = [
        row("base", 0, 0, right),
        row("fresh", 16, 0, right), row("warm", 16, 1, right),
        row("fresh", 64, 0, right), row("warm", 64, 0, right),
        row("fresh", 256, 1, right), row("warm", 256, 1, right),
    ]  # fmt: skip
    write_study(tmp_path / "study", plan, rows)
    findings = read_findings(tmp_path / "study")
    assert [c.n for c in findings.comparisons] == [64, 256]
    assert not findings.pooled, "the two have no seed in common"


def test_findings_pair_arms_by_seed_and_item_and_speak_plainly(tmp_path: Path) -> None:
    plan = read_plan("quick", changes=["sizes=[16, 64]", "seeds=2"])
    bad, good = [1.0] * 10 + [0.0] * 90, [1.0] * 60 + [0.0] * 40
    rows = [
        row("base", 0, 0, [0.0] * 100, general_loss=1.0),
        *(row("fresh", 16, seed, bad, general_loss=1.5) for seed in (0, 1)),
        *(row("warm", 16, seed, good, general_loss=1.25) for seed in (0, 1)),
        *(row("fresh", 64, seed, good) for seed in (0, 1)),
        *(row("warm", 64, seed, good) for seed in (0, 1)),
    ]
    write_study(tmp_path / "study", plan, rows)
    findings = read_findings(tmp_path / "study")
    gain, none = findings.comparisons
    assert gain.difference.mean == pytest.approx(0.5)
    assert gain.verdict == "helps"
    assert none.verdict == "no difference seen"
    assert none.p_value == 1
    pooled, first, second = findings.verdicts()
    assert pooled.startswith(
        "Pooled over 1 task and 2 sizes: warm helps compared with fresh (+25.0 points"
    )
    assert first.startswith("Word problems, n = 16: warm helps compared with fresh (+50.0 points")
    assert "no difference seen" in second
    by_n = {e.n: e.equals for e in findings.efficiency if e.arm == "warm"}
    assert by_n == pytest.approx({16: 64, 64: 64})
    level = findings.level("problems", "warm", 16)
    assert level is not None
    assert level.general_loss_change is not None
    assert level.general_loss_change.tolist() == [0.25, 0.25]


def estimated(printed: str, what: str) -> list[str]:
    """Return a row of the table of runs: in the store, to be run, minutes."""
    line = next(line for line in printed.splitlines() if line.startswith(f"│ {what}"))
    return [part.strip() for part in line.split("│")][2:5]


def test_a_dry_run_estimates_roughly_where_nothing_has_run_and_leaves_no_run(
    tmp_path: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    plan["arms"] = ["fresh", "warm", "longer", "mixed", "merged", "few_shot"]
    given = settings(tmp_path, plan)
    words = ["study", *given.plan, "--out", str(given.out), "--store", str(tmp_path / "store")]
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for what in ("warm-ups", "trials", "cells", "all"):
        *_, minutes = estimated(printed, what)
        assert minutes.startswith("about")
    assert "a rough estimate from 4 steps" in printed
    assert not runs_in(tmp_path / "store")
    assert main([*words, "--dry-run", "--set", "base=who/knows"]) == 0
    printed = capsys.readouterr().out
    assert estimated(printed, "all")[2] == "unknown"
    assert "the base who/knows is not on this machine" in printed


def test_an_estimate_knows_how_much_more_work_a_longer_run_is(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    checked = read_plan(*settings(tmp_path, plan).plan)
    needs = Needs(checked, tmp_path / "store", keep_adapters=True)
    calibration = Calibration(checked, n_threads=1)
    short = reached(needs.warm_up("general"))
    assert isinstance(short, WarmUp)
    long = replace(short, settings=short.settings.changed(max_steps=400))
    first, second = calibration.seconds(short), calibration.seconds(long)
    assert first is not None
    assert first > 0
    assert second == pytest.approx(100 * first)
    budget = {"max_steps": None, "max_tokens": 10_000}
    some, more = (
        calibration.seconds(
            replace(short, settings=short.settings.changed(**{**budget, **changes}))
        )
        for changes in ({}, {"max_tokens": 30_000})
    )
    assert some is not None
    assert more == pytest.approx(3 * some)


def test_a_dry_run_estimates_from_what_has_run(
    tmp_path: Path, plan: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tmp_path, plan)
    run_study(given)
    words = ["study", *given.plan, "--out", str(given.out), "--store", str(tmp_path / "store")]
    assert main([*words, "--dry-run", "--set", "seeds=3"]) == 0
    present, missing, minutes = estimated(capsys.readouterr().out, "cells")
    assert (present, missing) == ("9", "4")
    assert 0 <= float(minutes) < 5


def test_arms_share_new_tokens_and_are_averaged_with_them(
    tmp_path: Path, plan: dict[str, Any]
) -> None:
    plan["warm_up"]["add_tokens"] = ["<new>"]
    plan["adapt"] |= {"add_tokens": "<new>", "modules_to_save": "norm"}
    plan["arms"] = ["fresh", {"kind": "warm", "average_of": 2}]
    plan |= {"sizes": [4], "seeds": 1, "learning_rates": [0.003]}
    study = run_study(settings(tmp_path, plan, keep_adapters=True))
    assert not study.failures
    for result in study.results[1:]:
        made = Manifest.read(Path(result["adapter"])).lora
        assert made.add_tokens == ("<new>",)
        assert made.modules_to_save == (("norm",) if result["arm"] == "fresh" else ())


@pytest.mark.parametrize(
    ("kind", "message"), [("norms", "the warm-up trains more"), ("merged", "has `<new>` from the")]
)
def test_controls_of_new_tokens_that_cannot_be_are_named_before_anything_runs(
    tmp_path: Path, plan: dict[str, Any], kind: str, message: str
) -> None:
    plan["warm_up"]["add_tokens"] = ["<new>"]
    plan["adapt"]["add_tokens"] = ["<new>"]
    plan["arms"] = ["fresh", kind]
    with pytest.raises(DataError, match=message):
        run_study(settings(tmp_path, plan))
