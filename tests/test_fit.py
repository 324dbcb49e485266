"""`d2lora fit`: what is tried, what decides, and what comes out."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d2lora import WarmStart, adapt
from d2lora.cli import main
from d2lora.data.reading import read_task
from d2lora.errors import DataError, RunError, SettingsError
from d2lora.fitting.compare import Answers, LearningCurve, of_folds
from d2lora.fitting.fit import Fit, fit
from d2lora.fitting.found import Contender, Interpolation, Longer
from d2lora.fitting.jobs import Split
from d2lora.fitting.ledger import Ledger
from d2lora.fitting.words import verdict
from d2lora.runtime.run_folder import read_json
from d2lora.settings import AdaptSettings, FitSettings
from d2lora.study.averages import interpolate
from d2lora.study.tuning import Tuned
from support import read_rows, write_rows

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, titles: str) -> str:
    hostile, *others = read_rows(Path(titles))[:20]
    hostile["text"] = f"<script>alert(1)</script> {hostile['text']}"
    return write_rows(tmp_path_factory.mktemp("fit") / "rows.jsonl", [hostile, *others])


@pytest.fixture(scope="session")
def test_rows(tmp_path_factory: pytest.TempPathFactory, titles: str) -> str:
    return write_rows(tmp_path_factory.mktemp("fit") / "test.jsonl", read_rows(Path(titles))[20:26])


def settings(base: str, rows: str, out: Path, **values: Any) -> FitSettings:
    given: dict[str, Any] = {
        "learning_rates": (1e-3,), "steps": 2, "folds": 2, "runs": 2, "shots": 2,
        "max_new_tokens": 4, "executor": "inline", "quiet": True, "warm_starts": ("none",),
        "rank": 4, **values,
    }  # fmt: skip
    if given.keys() & {"test", "choices", "general_text"}:
        given.setdefault("keep_out_words", 0)
    return FitSettings(base=base, data=(rows,), out=out, **given)


@pytest.fixture(scope="session")
def fitted(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: str,
    warm_start: WarmStart,
    rows: str,
    test_rows: str,
    general: str,
) -> Fit:
    out = tmp_path_factory.mktemp("fit") / "best"
    values: dict[str, Any] = {"test": (test_rows,), "general_text": (general,), "rank": None}
    return fit(settings(tiny_base, rows, out, n=16, warm_starts=(str(warm_start.path),), **values))


def test_a_fit_hands_back_a_plain_adapter_that_peft_loads(fitted: Fit, tiny_base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert isinstance(PeftModel.from_pretrained(model, fitted.adapter), PeftModel)
    for name in ("index.html", "fit.json", "commands.sh", "done.json"):
        assert (fitted.path / name).is_file()


def test_all_candidates_have_the_rank_of_the_warm_start(fitted: Fit, warm_start: WarmStart) -> None:
    rank = warm_start.manifest.lora.rank
    for file in (fitted.path / "store").glob("*/adapter/adapter_config.json"):
        assert json.loads(file.read_text())["r"] == rank


def test_every_row_is_answered_once_by_an_adapter_that_did_not_see_it(
    tiny_base: str, rows: str
) -> None:
    place: dict[str, Any] = {"base": tiny_base, "data": (rows,), "out": Path("unused"), "n": 10}
    splits = [Split.of(AdaptSettings(**place, fold=(fold, 3)), 10) for fold in range(3)]
    assert sorted(place for split in splits for place in split.left) == list(range(10))
    for split in splits:
        assert sorted(split.trained + split.left) == list(range(10))


def test_training_on_fewer_rows_leaves_out_all_the_others(tiny_base: str, rows: str) -> None:
    place: dict[str, Any] = {"base": tiny_base, "data": (rows,), "out": Path("unused")}
    whole = Split.of(AdaptSettings(**place, n=12, fold=(0, 2)), 12)
    half = Split.of(AdaptSettings(**place, n=6, fold=(0, 2)), 12)
    assert half.data.examples == whole.data.examples
    assert set(half.trained) < set(range(6))
    assert sorted(half.trained + half.left) == list(range(12))


def test_the_commands_of_a_fit_make_the_same_adapter(
    fitted: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (fitted.path / "commands.sh").read_text().splitlines()
    monkeypatch.chdir(tmp_path)
    again = ""
    for line in lines:
        _, *words = shlex.split(line.replace(str(fitted.path.parent), str(tmp_path)))
        assert main([*words, *(["--quiet"] if words[0] == "adapt" else [])]) == 0
        again = words[words.index("--out") + 1]
    own, made = (load_file(Path(folder) / WEIGHTS) for folder in (fitted.adapter, again))
    assert own.keys() == made.keys()
    assert all((own[name] == made[name]).all() for name in own)


def test_a_second_run_of_a_finished_fit_trains_nothing_and_finds_the_same(
    fitted: Fit, tiny_base: str, rows: str, test_rows: str, general: str, warm_start: WarmStart
) -> None:
    store = fitted.path / "store"
    before = {file: file.stat().st_mtime_ns for file in store.glob("*/result.json")}
    values: dict[str, Any] = {"test": (test_rows,), "general_text": (general,), "rank": None}
    starts = (str(warm_start.path),)
    again = fit(settings(tiny_base, rows, fitted.path, n=16, warm_starts=starts, **values))
    assert verdict(again.found) == verdict(fitted.found)
    assert before == {file: file.stat().st_mtime_ns for file in store.glob("*/result.json")}


def test_test_rows_decide_nothing(
    fitted: Fit, tmp_path: Path, tiny_base: str, rows: str, warm_start: WarmStart
) -> None:
    values: dict[str, Any] = {"warm_starts": (str(warm_start.path),), "rank": None}
    # Runs are known by what decides them: a test row that did would make new ones.
    shutil.copytree(fitted.path / "store", tmp_path / "alone" / "store")
    before = len(list((tmp_path / "alone" / "store").glob("*/result.json")))
    alone = fit(settings(tiny_base, rows, tmp_path / "alone", n=16, **values))
    own, other = (load_file(one.adapter / WEIGHTS) for one in (fitted, alone))
    assert all((own[name] == other[name]).all() for name in own)
    assert alone.found.tests == {}
    assert len(list((tmp_path / "alone" / "store").glob("*/result.json"))) == before


def test_a_fit_says_what_it_found_and_how_sure_that_is(fitted: Fit) -> None:
    text = "\n".join(verdict(fitted.found))
    assert "ROUGE-L" in text
    assert "against" in text
    assert "Twice the rows brought" in text
    assert "Test rows (6, scored once)" in text
    page = (fitted.path / "index.html").read_text()
    assert "<script" not in page
    assert "Content-Security-Policy" in page
    assert read_json(fitted.path / "fit.json")["winner"] in page


def test_what_a_budget_has_no_time_for_is_left_out_and_named(
    tmp_path: Path, tiny_base: str, rows: str
) -> None:
    done = fit(settings(tiny_base, rows, tmp_path / "best", budget="0.001s"))
    assert (done.adapter / WEIGHTS).is_file()
    assert done.found.soup is None
    assert "Left out, as the budget ends: " in "\n".join(verdict(done.found))


def test_a_fit_without_time_left_still_keeps_room_for_the_final_run() -> None:
    ledger = Ledger(budget_s=10.0, n_workers=2)
    assert ledger.affords("much", 18.0)
    assert not ledger.affords("as much beside the final run", 18.0, reserve_s=4.0)
    assert ledger.left_out == ["as much beside the final run"]


def test_a_run_that_two_stages_ask_for_is_paid_once(fitted: Fit) -> None:
    results = (fitted.path / "store").glob("*/result.json")
    whole_s = sum(read_json(file)["job_s"] for file in results)
    assert fitted.found.ledger.spent_s == pytest.approx(whole_s, rel=0.01)


def test_a_candidate_beats_another_by_its_score_where_that_can_tell() -> None:
    even = np.tile([0.0, 1.0], 10)
    better, worse = (
        Answers(np.full(20, 2.0), {"rougeL": even * 0.4 + 0.6}),
        Answers(np.full(20, 1.0), {"rougeL": even * 0.4}),
    )
    assert better.beats(worse)
    assert not worse.beats(better)


def test_a_candidate_beats_another_by_its_loss_where_the_score_cannot_tell() -> None:
    first = Answers(np.full(4, 2.0), {"rougeL": np.array([0.0, 1.0, 0.0, 1.0])})
    second = Answers(np.full(4, 1.0), {"rougeL": np.array([1.0, 0.0, 0.0, 1.0])})
    assert second.beats(first)
    assert not first.beats(second)


def test_the_whole_schedule_is_kept_only_where_the_score_shows_that_it_answers_better() -> None:
    tuned = Tuned(1e-3, step=4, curve=((0, 3.0), (4, 1.0), (8, 2.0)))
    scores = np.linspace(0.0, 0.5, 20)
    stopped = Contender("fresh", tuned, [], Answers(np.full(20, 1.0), {"rougeL": scores}))
    better, worse = (
        replace(stopped, answers=Answers(np.full(20, 2.0), {"rougeL": scores + by}))
        for by in (0.3, -0.01)
    )
    assert Longer(better, stopped).kept
    assert not Longer(worse, stopped).kept


def test_a_point_on_the_way_is_kept_only_where_it_beats_the_end() -> None:
    scores = {"rougeL": np.tile([0.0, 1.0], 4)}
    end = Answers(np.full(8, 1.0), scores)
    half, most = Answers(np.full(8, 0.9), scores), Answers(np.full(8, 0.95), scores)
    better = Interpolation({0.5: half, 0.75: most}, end)
    assert (better.best, better.kept) == (0.5, True)
    assert not Interpolation({0.5: Answers(np.full(8, 1.1), scores)}, end).kept
    clearly_worse = Answers(np.full(8, 0.9), {"rougeL": np.zeros(8)})
    assert not Interpolation({0.5: clearly_worse}, Answers(end.losses, {"rougeL": np.ones(8)})).kept


@pytest.mark.parametrize("init", ["fresh", "warm start"])
def test_a_point_on_the_way_lies_between_the_initialization_and_the_end(
    init: str, tmp_path: Path, tiny_base: str, rows: str, warm_start: WarmStart
) -> None:
    name = "fresh" if init == "fresh" else str(warm_start.path)
    rank = warm_start.manifest.lora.rank
    given: dict[str, Any] = {"max_steps": 2, "learning_rate": 0.03, "quiet": True}
    if init == "fresh":
        given["rank"] = rank
    asked = AdaptSettings(base=tiny_base, data=(rows,), init=name, out=tmp_path / "end", **given)
    adapt(asked)
    interpolate(name, tmp_path / "end", 0.25, tmp_path / "between")
    interpolate(name, tmp_path / "end", 1.0, tmp_path / "again")
    end, between, again = (
        load_file(tmp_path / one / WEIGHTS) for one in ("end", "between", "again")
    )
    start = None if init == "fresh" else load_file(warm_start.path / WEIGHTS)
    for key, weight in end.items():
        assert torch.equal(again[key], weight)
        if start is not None:
            expected = 0.75 * start[key] + 0.25 * weight
        else:
            expected = 0.25 * weight if "lora_B" in key else weight
        torch.testing.assert_close(between[key], expected)


@pytest.mark.parametrize("runs", [1, 2])
def test_a_kept_point_on_the_way_is_handed_back_with_the_commands_that_make_it(
    runs: int, tmp_path: Path, tiny_base: str, rows: str, warm_start: WarmStart,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values: dict[str, Any] = {
        "warm_starts": (str(warm_start.path),), "inits": (), "rank": None, "shots": 0,
        "runs": runs, "interpolate": (0.1,),
    }  # fmt: skip
    monkeypatch.setattr(Interpolation, "kept", property(lambda _: True))
    done = fit(settings(tiny_base, rows, tmp_path / "best", n=8, **values))
    assert done.found.share == 0.1
    text = "\n".join(verdict(done.found))
    assert "0.1 of the way from the initialization" in text
    monkeypatch.chdir(tmp_path)
    again = ""
    for line in (done.path / "commands.sh").read_text().splitlines():
        _, *words = shlex.split(line)
        assert main([*words, *(["--quiet"] if words[0] == "adapt" else [])]) == 0
        again = words[words.index("--out") + 1]
    own, made = (load_file(Path(folder) / WEIGHTS) for folder in (done.adapter, again))
    assert own.keys() == made.keys()
    assert all((own[name] == made[name]).all() for name in own)


def test_answers_of_folds_are_put_in_the_order_of_the_rows(rows: str) -> None:
    data = read_task((rows,))
    golds = [example.completion for example in data.examples]
    places = [list(range(0, 20, 2)), list(range(1, 20, 2))]
    results = [
        {"places": own, "outputs": [golds[p] for p in own], "losses": [float(p) for p in own]}
        for own in places
    ]
    answers = of_folds(data, results)
    assert answers.losses.tolist() == list(map(float, range(20)))
    assert answers.score is not None
    assert answers.score.mean == 1.0


def test_a_learning_curve_continues_a_straight_line_in_the_logarithm_of_the_rows() -> None:
    def answers(score: float) -> Answers:
        return Answers(np.zeros(8), {"rougeL": score + np.linspace(-0.1, 0.1, 8)})

    curve = LearningCurve.of([4, 8, 16], [answers(0.3), answers(0.4), answers(0.5)])
    assert curve.per_doubling.mean == pytest.approx(0.1)
    assert curve.twice.mean == pytest.approx(0.6)
    assert curve.twice.low < 0.6 < curve.twice.high


def test_a_warm_start_of_another_rank_is_brought_to_the_rank_that_is_asked_for(
    tmp_path: Path, tiny_base: str, rows: str, warm_start: WarmStart
) -> None:
    values: dict[str, Any] = {"inits": (), "warm_starts": (str(warm_start.path),), "runs": 1}
    done = fit(settings(tiny_base, rows, tmp_path / "best", n=4, rank=2, **values))
    assert json.loads((done.adapter / "adapter_config.json").read_text())["r"] == 2


def test_warm_starts_beside_the_base_are_found(
    tmp_path: Path, tiny_base: str, other_base: str, warm_start: WarmStart
) -> None:
    from d2lora.fitting.starts import warm_starts_of

    for name, folder in {"base": tiny_base, "other": other_base}.items():
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "warm").symlink_to(warm_start.path)
    for name, wanted in {"base": [(tmp_path / "warm").resolve()], "other": []}.items():
        found = warm_starts_of(
            FitSettings(base=str(tmp_path / name), data=("x",), out=tmp_path / "out")
        )
        assert [path.resolve() for path in found] == wanted


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ({"inits": ("warm",)}, SettingsError, "a warm start is given as --warm-starts"),
        ({"budget": "soon"}, SettingsError, "as in 90s, 30m or 2h"),
        ({"overlong": "drop"}, SettingsError, "every row of a fit is held out once"),
        ({"n": 21}, DataError, "21 rows are requested, but the data has 20"),
        ({"inits": ()}, SettingsError, "nothing to try"),
        ({"warm_starts": ("nowhere",)}, SettingsError, "nowhere: no such folder"),
    ],
)
def test_what_a_fit_cannot_use_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_base: str, rows: str,
    values: dict[str, Any], kind: type[Exception], text: str,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=text):
        fit(settings(tiny_base, rows, tmp_path / "best", **values))
    assert not (tmp_path / "best" / "store").exists()


def test_a_fit_does_not_write_into_a_folder_of_something_else(
    tmp_path: Path, tiny_base: str, rows: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not a fit"):
        fit(settings(tiny_base, rows, tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        ("settings.yaml", "adapter.json", "done.json"),  # a finished run of `adapt`
        ("settings.yaml", "metrics.jsonl", "checkpoint"),  # one that was killed
        ("settings.yaml",),
        ("store", "my-study"),
    ],
)
def test_a_fit_does_not_write_over_a_run_of_another_command(
    tmp_path: Path, tiny_base: str, rows: str, files: tuple[str, ...]
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="not a fit"):
        fit(settings(tiny_base, rows, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_documents_are_fitted_by_their_loss_alone(tmp_path: Path, tiny_base: str) -> None:
    texts = [{"text": f"The river number {n} is long and cold."} for n in range(6)]
    data = write_rows(tmp_path / "texts.jsonl", [*texts, {"text": ""}])
    values: dict[str, Any] = {"task": "text", "runs": 1, "skip_bad_rows": True}
    done = fit(settings(tiny_base, data, tmp_path / "best", **values))
    assert json.loads((done.path / "bad_rows.jsonl").read_text())["line"] == 7
    assert done.found.prompted == {}
    assert "nats per token" in verdict(done.found)[0]


def test_more_folds_than_rows_are_one_fold_a_row(
    tmp_path: Path, tiny_base: str, rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"runs": 1, "shots": 0, "folds": 9, "quiet": False}
    done = fit(settings(tiny_base, rows, tmp_path / "best", n=3, **values))
    assert "cross-validation in 3 folds" in capsys.readouterr().err
    assert max(tried.n_folds for one in done.found.candidates for tried in one.tried) == 3
