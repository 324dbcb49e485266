"""The queue of a study's jobs: workers that die, and jobs that another study runs."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from filelock import FileLock

from d2lora.study.executors import executor
from d2lora.study.queue import N_TRIES
from d2lora.study.store import LOCK, Job, perform


@dataclass(frozen=True)
class Note(Job):
    """Notes that it was begun; kills its process as often as it is told to."""

    n_deaths: int = 0

    def identity(self) -> dict[str, Any]:
        return {"label": self.label}

    def run(self) -> dict[str, Any]:
        with (self.store / "begun").open("a", encoding="utf-8") as begun:
            begun.write(f"{self.label}\n")
        if self.begun(self.store).count(self.label) <= self.n_deaths:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    @staticmethod
    def begun(store: Path) -> list[str]:
        return (store / "begun").read_text("utf-8").split()


def note(label: str, store: Path, n_deaths: int = 0) -> Note:
    return Note(label, ("", 0), store, n_deaths)


def test_workers_that_die_cost_no_job_that_only_waited(tmp_path: Path) -> None:
    mortal = [note(f"mortal-{i}", tmp_path, N_TRIES - 1) for i in range(2)]
    jobs = [*mortal, *(note(f"job-{i}", tmp_path) for i in range(4))]
    with executor("processes", 1, None) as queue:
        queue.add(jobs)
        outcomes = {job.label: outcome for job, outcome in queue.ended()}
    failed = {name: what for name, what in outcomes.items() if isinstance(what, str)}
    assert failed == {}, "the pool broke more often than any job may die"
    assert set(outcomes) == {job.label for job in jobs}
    assert Note.begun(tmp_path).count("job-0") == 1


def test_a_job_whose_worker_always_dies_fails_and_the_others_are_done(tmp_path: Path) -> None:
    with executor("processes", 1, None) as queue:
        queue.add([note("deadly", tmp_path, 99), note("job", tmp_path)])
        outcomes = {job.label: outcome for job, outcome in queue.ended()}
    assert "BrokenProcessPool" in str(outcomes["deadly"])
    assert isinstance(outcomes["job"], dict)
    assert Note.begun(tmp_path) == ["deadly"] * N_TRIES + ["job"]


def test_a_job_that_another_study_runs_is_waited_for_behind_all_others(tmp_path: Path) -> None:
    jobs = [note(name, tmp_path) for name in ("taken", "first", "second")]
    jobs[0].folder.mkdir()
    elsewhere = FileLock(jobs[0].folder / LOCK, thread_local=False)
    elsewhere.acquire()
    ended: list[str] = []
    with executor("inline", 0, None) as queue:
        queue.add(jobs)
        for job, _ in queue.ended():
            ended.append(job.label)
            if job.label == "second":  # the other study ends while this one has nothing else to do
                Thread(target=lambda: (time.sleep(0.2), elsewhere.release()), daemon=True).start()
    assert ended == ["first", "second", "taken"]
    assert Note.begun(tmp_path) == ended


def test_a_job_is_queued_once_however_many_cells_need_it(tmp_path: Path) -> None:
    with executor("inline", 0, None) as queue:
        for _ in range(3):
            queue.add([note("shared", tmp_path)] * 2)
        assert len(queue) == 1
        assert [job.label for job, _ in queue.ended()] == ["shared"]
        assert len(queue) == 0


def test_what_continues_a_cell_goes_ahead_of_what_begins_others(tmp_path: Path) -> None:
    with executor("inline", 0, None) as queue:
        queue.add([note(f"trial-{i}", tmp_path) for i in range(3)])
        for job, _ in queue.ended():
            if job.label == "trial-0":
                queue.add([note(name, tmp_path) for name in ("cell-0", "other-0")], ahead=True)
    first, *rest = Note.begun(tmp_path)
    assert (first, rest) == ("trial-0", ["cell-0", "other-0", "trial-1", "trial-2"])


def test_what_a_killed_job_had_half_written_is_cleared_away(tmp_path: Path) -> None:
    job = note("job", tmp_path)
    job.folder.mkdir()
    (job.folder / ".records.parquet.tmp-12345678").write_bytes(b"half")
    perform(job)
    assert sorted(path.name for path in job.folder.iterdir()) == [".lock", "result.json"]
