"""Trackers show what `metrics.jsonl` holds, and a run that is resumed goes on in them."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from adapters import run
from d2lora import SettingsError
from d2lora.cli import main
from support import dies_at_step, read_rows

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="not installed")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="not installed")


@pytest.fixture
def mlruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of MLflow in local files, which the whole package would keep in a database."""
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


def logged(folder: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_rows(folder / "metrics.jsonl") if name in row}


def in_tensorboard(folder: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / folder.name))
    events.Reload()
    return {point.step: point.value for point in events.Scalars(name)}


def in_mlflow(uri: str, name: str) -> list[dict[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'd2lora'")
    runs = client.search_runs([experiment.experiment_id])
    histories = [client.get_metric_history(run.info.run_id, name) for run in runs]
    return [{point.step: point.value for point in history} for history in histories]


@needs_tensorboard
def test_tensorboard_shows_the_log(tmp_path: Path, tiny_base: str, titles: str) -> None:
    out = tmp_path / "titles"
    run(out, tiny_base, titles, track=("tensorboard",), validation_fraction=0.2)
    for name in ("loss", "learning_rate", "validation_loss"):
        expected = logged(out, name)
        assert expected
        assert in_tensorboard(out, name) == pytest.approx(expected)


@needs_mlflow
@pytest.mark.filterwarnings("ignore")  # MLflow's own, of the store in files
def test_mlflow_shows_the_log_and_a_resumed_run_goes_on_in_its_own(
    tmp_path: Path, tiny_base: str, titles: str, mlruns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "titles"
    asked: dict[str, Any] = {"track": ("mlflow",), "checkpoint_every": 1, "max_steps": 4}
    with monkeypatch.context() as patched:
        killed = dies_at_step(patched, 3)
        with pytest.raises(killed):
            run(out, tiny_base, titles, **asked)
    run(out, tiny_base, titles, **asked, resume=True)
    assert in_mlflow(mlruns, "loss") == [pytest.approx(logged(out, "loss"))]
    assert set(logged(out, "loss")) == {1, 2, 3, 4}


@needs_mlflow
@pytest.mark.usefixtures("mlruns")
@pytest.mark.filterwarnings("ignore")
def test_a_tracker_that_fails_on_the_way_costs_no_run(
    tmp_path: Path,
    tiny_base: str,
    titles: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    def unreachable(*_: Any, **__: Any) -> None:
        raise mlflow.exceptions.MlflowException("no answer")

    monkeypatch.setattr(mlflow, "log_metrics", unreachable)
    out = tmp_path / "titles"
    run(out, tiny_base, titles, track=("mlflow",), quiet=False)
    assert set(logged(out, "loss")) == {1, 2, 3}
    assert capsys.readouterr().err.count("mlflow is left out from here: no answer") == 1


def test_trackers_change_nothing_and_are_not_asked_for_by_default(
    tmp_path: Path, tiny_base: str, titles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = "d2lora.runtime.trackers"  # the one module that imports them
    monkeypatch.delitem(sys.modules, door, raising=False)
    plain = run(tmp_path / "plain", tiny_base, titles).path
    assert not (plain / "trackers.json").exists()
    assert door not in sys.modules
    if find_spec("tensorboard") is not None:
        tracked = run(tmp_path / "tracked", tiny_base, titles, track=("tensorboard",)).path
        name = "adapter_model.safetensors"
        assert (plain / name).read_bytes() == (tracked / name).read_bytes()
        assert set(json.loads((tracked / "trackers.json").read_text())) == {"id", "tensorboard"}


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed")
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(
    tmp_path: Path, tiny_base: str, titles: str
) -> None:
    with pytest.raises(SettingsError, match=r"--track wandb needs wandb.*d2lora\[wandb\]"):
        run(tmp_path / "a", tiny_base, titles, track=("wandb",))
    assert not (tmp_path / "a").exists()


def test_an_unknown_tracker_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("adapt --data x.jsonl --out y --track visdom".split())
    assert "visdom" in capsys.readouterr().err
