"""Jobs on their way: which wait, which run, and which are tried again."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from typing import Any, Protocol

from d2lora.errors import D2LoraError
from d2lora.study.store import Job, TakenError

N_TRIES = 4
"""How often a job is tried whose worker died."""


class Submit(Protocol):
    """What starts jobs."""

    def __call__(self, job: Job, *, patient: bool) -> "Future[dict[str, Any]]":
        """Start a job; patient: another process that runs it is waited for."""
        ...


class Queue:
    """Jobs, in the order in which they were added.

    No more are started than run at a time, so that a worker that dies costs the jobs that ran a
    try, and not those that waited; those that ran are tried again first. A job that another study
    runs goes behind all others, where its result is waited for.
    """

    def __init__(self, submit: Submit, n_at_once: int | None) -> None:
        """Make an empty queue.

        Args:
            submit: Of an executor.
            n_at_once: Jobs that it runs at a time. None: it has a queue of its own.
        """
        self._submit, self._n_at_once = submit, n_at_once
        self._waiting: deque[Job] = deque()
        self._running: dict[Future[dict[str, Any]], Job] = {}
        self._keys: set[str] = set()
        self._taken: set[str] = set()
        self._n_deaths: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, jobs: Iterable[Job], *, ahead: bool = False) -> None:
        """Put jobs behind those that wait, or ahead of them, but for those on their way."""
        new = list({job.key: job for job in jobs if job.key not in self._keys}.values())
        self._keys.update(job.key for job in new)
        if ahead:
            self._waiting.extendleft(reversed(new))
        else:
            self._waiting.extend(new)

    def ended(self) -> Iterator[tuple[Job, dict[str, Any] | str]]:
        """Yield each job with its result, or the reason why it failed, until none is left.

        More may be added meanwhile.

        Raises:
            BaseException: An interrupt; it is no failure of a job.
        """
        while self._start():
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                job, error = self._running.pop(future), future.exception()
                if isinstance(error, TakenError):
                    self._taken.add(job.key)
                    self._waiting.append(job)
                elif isinstance(error, BrokenExecutor) and self._n_deaths[job.key] + 1 < N_TRIES:
                    self._n_deaths[job.key] += 1
                    self._waiting.appendleft(job)
                elif error is not None and not isinstance(error, Exception):
                    raise error
                else:
                    self._keys.discard(job.key)
                    yield job, future.result() if error is None else reason_of(error)

    def _start(self) -> bool:
        """Start what may run; say whether anything does."""
        while self._waiting and (self._n_at_once is None or len(self._running) < self._n_at_once):
            job = self._waiting.popleft()
            self._running[self._submit(job, patient=job.key in self._taken)] = job
        return bool(self._running)


def reason_of(error: Exception) -> str:
    """Return why a job failed; what is no error of a user's with its kind."""
    kind = "" if isinstance(error, D2LoraError) else f"{type(error).__name__}: "
    return f"{kind}{error}"
