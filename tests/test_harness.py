"""Tasks of lm-evaluation-harness against the harness itself, on task files and rows made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from d2lora import (
    Adapter,
    AdaptSettings,
    DataError,
    EvaluateSettings,
    SettingsError,
    StudySettings,
    adapt,
    evaluate,
)
from d2lora.embedded import choice_rows, word_problem_rows
from d2lora.runtime.run_folder import provenance
from d2lora.study.run import run_study
from support import small_plan, write_rows

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: str, problems: str) -> Adapter:
    out = tmp_path_factory.mktemp("adapted") / "a"
    return adapt(
        AdaptSettings(
            base=tiny_base, data=(problems,), out=out, rank=4, max_steps=8, learning_rate=2e-2,
            quiet=True,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task of multiple choice, one that is generated, and a group."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"words": choice_rows(12), "problems": word_problem_rows("test", 6)}
    files = {name: write_rows(folder / f"{name}.jsonl", own) for name, own in rows.items()}
    means = {"aggregation": "mean", "higher_is_better": True}
    words = {
        "task": "our_words",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, **means} for name in ("acc", "acc_norm")],
    }
    problems = {
        "task": "our_problems",
        "output_type": "generate_until",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", **means}],
    }
    for card, file in ((words, files["words"]), (problems, files["problems"])):
        source = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": file}},
            "test_split": "test",
        }
        _write(folder, {**card, **source})
    _write(folder, {"group": "our_group", "task": ["our_words", "our_problems"]}, "our_group")
    return folder


def _write(folder: Path, card: dict[str, Any], name: str | None = None) -> None:
    path = folder / f"{name or card['task']}.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")


def of_the_harness(base: str, adapter: Path | None, tasks: Path, name: str) -> list[dict[str, Any]]:
    """Return the samples of `lm_eval --model hf --tasks NAME --include_path FOLDER`."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    peft = "" if adapter is None else f",peft={adapter}"
    found: Any = simple_evaluate(
        model="hf", model_args=f"pretrained={base}{peft}", device="cpu", tasks=[name],
        task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    return found["samples"][name]


def test_multiple_choice_and_its_change_are_the_harness_s_question_by_question(
    tiny_base: str, adapter: Adapter, tasks: Path, tmp_path: Path
) -> None:
    ours = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=("base", str(adapter.path)), data=("lm_eval:our_words",),
            choices=("lm_eval:our_words",), lm_eval_tasks=tasks, device="cpu", quiet=True,
            out=tmp_path / "scores",
        )
    )  # fmt: skip
    means = {}
    for name, folder in (("base", None), (str(adapter.path), adapter.path)):
        theirs = of_the_harness(tiny_base, folder, tasks, "our_words")
        records = ours.records[ours.records["adapter"] == name]
        assert len(records) == len(theirs) > 4
        for record, sample in zip(records.to_dict("records"), theirs, strict=True):
            expected = [response[0][0] for response in sample["resps"]]
            np.testing.assert_allclose(record["log_probabilities"], expected, atol=1e-3)
            assert (record["acc"], record["acc_norm"]) == (sample["acc"], sample["acc_norm"])
        means[name] = np.mean([sample["acc_norm"] for sample in theirs])
        accuracy = ours.forgetting[name].choice_accuracy
        assert accuracy is not None
        assert accuracy.mean == pytest.approx(means[name])
    change = ours.forgetting[str(adapter.path)].choice_accuracy_change
    assert change is not None
    assert change.mean == pytest.approx(means[str(adapter.path)] - means["base"])


def test_generated_answers_are_the_harness_s_row_by_row(
    tiny_base: str, adapter: Adapter, tasks: Path, tmp_path: Path
) -> None:
    ours = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(str(adapter.path),), data=("lm_eval:our_problems",),
            lm_eval_tasks=tasks, limit=5, device="cpu", quiet=True, out=tmp_path / "scores",
        )
    )  # fmt: skip
    theirs = of_the_harness(tiny_base, adapter.path, tasks, "our_problems")[:5]
    assert ours.records["prompt"].tolist() == [sample["arguments"][0][0] for sample in theirs]
    assert ours.records["output"].tolist() == [sample["resps"][0][0] for sample in theirs]
    assert any(ours.records["output"])
    assert ours.records["exact_match"].tolist() == [sample["exact_match"] for sample in theirs]
    assert not ours.forgetting[str(adapter.path)].choice_accuracy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{prompt"}, "cannot be loaded: TemplateSyntaxError"),
        (
            {"doc_to_text": "{{nowhere}}"},
            "cannot be loaded: UndefinedError: 'nowhere' is",
        ),
        ({"doc_to_target": "nowhere"}, "the target of row 1 is 'nowhere', which is none of its"),
        ({"num_fewshot": 99, "fewshot_split": "test"}, "cannot be scored: ValueError"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "is a mean of rows"),
    ],
)
def test_a_task_file_that_does_not_fit_its_rows_says_so(
    tiny_base: str, tasks: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    task = yaml.safe_load((tasks / "our_words.yaml").read_text(encoding="utf-8"))
    _write(tmp_path, {**task, **changes, "task": "changed"})
    with pytest.raises(DataError, match=message):
        evaluate(
            EvaluateSettings(
                base=tiny_base, data=("lm_eval:changed",), lm_eval_tasks=tmp_path, limit=2,
                device="cpu", quiet=True, out=tmp_path / "scores",
            )
        )  # fmt: skip


def test_names_that_are_no_single_task_are_refused_with_what_to_do(
    tasks: Path, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], message: str, **settings: Any) -> None:
        with pytest.raises(kind, match=message):
            evaluate(
                EvaluateSettings(**settings, lm_eval_tasks=tasks, quiet=True, out=tmp_path / "s")
            )

    refused(DataError, "a group of tasks", data=("lm_eval:our_group",))
    refused(DataError, "give it as --data", choices=("lm_eval:our_problems",))
    task = yaml.safe_load((tasks / "our_words.yaml").read_text(encoding="utf-8"))
    _write(tasks, {**task, "task": "scored_otherwise", "metric_list": [{"metric": "mcc"}]})
    for use in ("data", "choices"):
        refused(
            DataError,
            r"none of its metrics \(mcc\) is a mean",
            **{use: ("lm_eval:scored_otherwise",)},
        )
    bits = [{"metric": "acc_bytes", "aggregation": "mean", "higher_is_better": True}]
    _write(tasks, {**task, "task": "of_bytes", "metric_list": bits})
    refused(DataError, "neither `acc_norm` nor `acc`", choices=("lm_eval:of_bytes",))
    refused(SettingsError, "one task", data=("lm_eval:our_words", "lm_eval:our_problems"))
    refused(SettingsError, "no task of it is named", data=("rows.jsonl",))
    refused(SettingsError, "leave out --task", data=("lm_eval:our_words",), task="gsm8k")


def test_a_study_measures_forgetting_on_a_task_of_the_harness(
    tmp_path: Path, tiny_base: str, general: str, titles: str, tasks: Path
) -> None:
    plan = small_plan(tmp_path, tiny_base, general, titles)
    plan |= {
        "arms": ["fresh"], "sizes": [4], "seeds": 1, "learning_rates": [0.03],
        "choices": ["lm_eval:our_words"], "lm_eval_tasks": str(tasks),
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    place: dict[str, Any] = {"plan": (str(path),), "store": tmp_path / "store", "quiet": True}
    study = run_study(StudySettings(out=tmp_path / "s", executor="inline", **place))
    study.check()
    base, cell = study.results
    alone = evaluate(
        EvaluateSettings(
            base=tiny_base, adapters=(cell["adapter"],), out=tmp_path / "e", quiet=True,
            choices=("lm_eval:our_words",), lm_eval_tasks=tasks,
        )
    )  # fmt: skip
    for row, name in ((base, "base"), (cell, cell["adapter"])):
        accuracy = alone.forgetting[name].choice_accuracy
        assert accuracy is not None
        assert np.mean(row["choices_right"]) == accuracy.mean
    assert "lm_eval" in provenance()["versions"]


def test_a_study_names_a_task_that_it_cannot_measure_forgetting_on_at_its_start(
    tmp_path: Path, tiny_base: str, general: str, titles: str, tasks: Path
) -> None:
    plan = small_plan(tmp_path, tiny_base, general, titles)
    path = tmp_path / "plan.yaml"
    for name, message in (
        ("our_word", r"no such task\. Did you mean `our_words`"),
        ("our_problems", "not a task of multiple choice"),
    ):
        plan |= {"choices": [f"lm_eval:{name}"], "lm_eval_tasks": str(tasks)}
        path.write_text(yaml.safe_dump(plan))
        with pytest.raises(DataError, match=message):
            run_study(StudySettings(plan=(str(path),), out=tmp_path / "s", quiet=True))
