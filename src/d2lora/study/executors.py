"""Where jobs run: in this process, in a pool of processes, or on a Ray cluster.

Each executor is a queue of jobs; the study knows nothing else about it.
"""

import os
import signal
import threading
from collections.abc import Generator
from concurrent.futures import (
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import Queue as ProcessQueue
from multiprocessing import active_children, get_context, parent_process
from typing import Any, cast

from d2lora.errors import SettingsError
from d2lora.runtime.console import quiet_libraries
from d2lora.runtime.extras import need_extra
from d2lora.runtime.loading import loading
from d2lora.runtime.signals import kept
from d2lora.study.queue import N_TRIES, Queue, Submit
from d2lora.study.store import Job, perform


def n_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def layout(kind: str, n_workers: int) -> tuple[int, int | None]:
    """Return how many jobs an executor runs at a time, and the threads of each.

    None: the threads are those of this process. Of a Ray cluster elsewhere the number of jobs is
    not known here; it is taken for this machine's.
    """
    if kind == "inline":
        return 1, None
    if kind == "ray":
        return n_workers or n_cores(), 1
    n_workers = n_workers or len(_gpus()) or n_cores()
    return n_workers, max(1, n_cores() // n_workers)


@contextmanager
def executor(kind: str, n_workers: int, address: str | None) -> Generator[Queue]:
    """Yield the queue of an executor: `inline`, `processes` or `ray`.

    Args:
        kind: Which.
        n_workers: Jobs at a time; 0: one per GPU, or per core where there is none.
        address: Ray cluster to join. None: one on this machine.

    Raises:
        SettingsError: If Ray is asked for and not installed or not there.
    """
    if kind == "ray":
        with _ray(n_workers, address) as submit:
            yield Queue(submit, None)
    elif kind == "inline":
        inline = ThreadPoolExecutor(1)
        try:
            yield Queue(lambda job, *, patient: inline.submit(perform, job, patient=patient), 1)
        finally:
            # Where the command is interrupted, the run in the thread is not waited for.
            inline.shutdown(wait=False, cancel_futures=True)
    else:
        n_at_once, n_threads = layout(kind, n_workers)
        pool = _Processes(n_at_once, n_threads)
        done = False
        try:
            yield Queue(pool.submit, n_at_once)
            pool.started()
            done = True
        finally:
            pool.close(at_once=not done)


class _Processes:
    """A pool that comes back after a worker died, as one that ran out of memory does."""

    def __init__(self, n_workers: int, n_threads: int | None) -> None:
        self._n_workers, self._n_threads = n_workers, n_threads
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        gpus = context.Queue()
        known = _gpus()
        for worker in range(self._n_workers):
            gpus.put(known[worker % len(known)] if known else "")
        # Set before torch is loaded in the workers: two OpenMP teams on the same cores slow
        # each other.
        os.environ["OMP_NUM_THREADS"] = str(self._n_threads or 1)
        pool = ProcessPoolExecutor(self._n_workers, context, _start_worker, (gpus,))
        self._starting = [pool.submit(_load) for _ in range(self._n_workers)]
        return pool

    def started(self) -> None:
        """Wait until the workers are there: one that starts without its parent complains."""
        wait(self._starting)

    def submit(self, job: Job, *, patient: bool) -> "Future[dict[str, Any]]":
        try:
            return self._pool.submit(perform, job, patient=patient)
        except BrokenExecutor:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = self._new()
            return self._pool.submit(perform, job, patient=patient)

    def close(self, *, at_once: bool) -> None:
        """Let the workers end; at once: in the middle of their runs."""
        if at_once:
            for worker in active_children():
                worker.terminate()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _gpus() -> list[str]:
    """Return the GPUs that CUDA may use, without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _start_worker(gpus: "ProcessQueue[str]") -> None:
    """Set up a worker: its GPU, quiet libraries, and an end with its parent."""
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study ends its workers
    tqdm.set_lock(threading.RLock())  # its own is one of the system's, which a killed worker leaves
    gpu = gpus.get()
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    quiet_libraries()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _load() -> None:
    """Load what jobs need, which takes seconds, while the study still checks its rows."""
    with loading():
        for module in ("adaptation", "evaluation"):
            import_module(f"d2lora.{module}")


def _end_with_parent() -> None:
    """Stop at once when the study's process is gone: its next run does the job again."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _ray(n_workers: int, address: str | None) -> Generator[Submit]:
    need_extra("ray", "--executor ray")
    import ray

    started = not ray.is_initialized()
    if started:
        n_cpus = None if address else n_workers or n_cores()
        try:
            with kept():
                ray.init(address or "local", num_cpus=n_cpus, log_to_driver=False)
        except ConnectionError as error:
            raise SettingsError(f"--address {address}: no Ray cluster there: {error}") from None
    n_gpus = 1 if ray.cluster_resources().get("GPU") else 0
    # A worker or a machine that is lost costs its job one of its retries, not the study.
    remote = ray.remote(num_cpus=1, num_gpus=n_gpus, max_retries=N_TRIES - 1)(_perform_quietly)
    try:
        yield lambda job, *, patient: cast("Any", remote.remote(job, patient)).future()
    finally:
        if started:
            ray.shutdown()


def _perform_quietly(job: Job, patient: bool) -> dict[str, Any]:  # noqa: FBT001  # Ray's types
    quiet_libraries()
    return perform(job, patient=patient)
