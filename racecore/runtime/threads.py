"""A small pool of threads that runs serial, GIL-free kernels on fixed parts of the work.

Why not Numba's own parallel loops: its OpenMP layer kills a forked child at its first parallel
loop, its workqueue layer aborts when two Python threads compute at once, and neither obeys Ctrl-C.
Here the calling thread does the work itself and helpers only take part, so that nothing can
dead-lock: a forked child starts without helpers and makes its own, any number of Python threads may
compute at once, and between two launches (milliseconds) signals are handled.

Parts are cut by shape, never by the number of threads, so results keep their bits.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["count", "default_count", "requested", "run", "threads"]

_requested: ContextVar[int | None] = ContextVar("racecore_threads", default=None)
_lock = threading.Lock()
_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_n_helpers = 0


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Use `n` threads for every call inside the block, in this Python thread.

    The default is the number of processors this process may run on, or OMP_NUM_THREADS if that
    is set (as joblib, Dask and batch systems do to share a machine). Results do not depend on it,
    not even in the last bit.

    Parameters
    ----------
    n : int
        At least 1. More than there are processors is legal and useless.

    Raises
    ------
    ValueError
        `n` is not a positive integer.

    Examples
    --------
    >>> with threads(1):
    ...     pass
    """
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"threads takes a positive integer, got {n!r}")
    token = _requested.set(int(n))
    try:
        yield
    finally:
        _requested.reset(token)


def default_count() -> int:
    """Return the number of threads outside of `threads`."""
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return (
        min(int(limit), processors)
        if limit.isascii() and limit.isdigit() and int(limit) > 0
        else processors
    )


def requested() -> int | None:
    """Return the number of threads set by `threads` in this Python thread, None outside of it."""
    return _requested.get()


def count() -> int:
    """Return the number of threads that a call from this Python thread uses."""
    return _requested.get() or default_count()


def run(launch: Callable[[int, int], object], n_tasks: int, tasks_per_launch: int) -> None:
    """Call ``launch(first, last)`` over 0 ... n_tasks in steps of `tasks_per_launch`, on several
    threads.

    Returns when every launch has returned. An exception in a launch, or one that a signal raises in
    the calling thread, stops further launches, waits for those under way (they write to memory that
    the caller may free) and is raised.
    """
    n_launches = -(-n_tasks // tasks_per_launch)
    # small work, such as one decoded token, must not pay for a job
    if n_launches <= 1:
        if n_tasks > 0:
            launch(0, n_tasks)
        return
    job = _Job(launch, n_tasks, tasks_per_launch)
    _work_and_wait(job, min(count(), n_launches) - 1)
    if job.error is not None:
        raise job.error


def _work_and_wait(job: _Job, n_helpers: int) -> None:
    """Work with helpers and wait for them, even if an error is raised meanwhile.

    They write to memory that the caller may free.
    A signal handler can raise anything anywhere, KeyboardInterrupt or SystemExit, and more than
    once; the first is raised here.
    """
    raised: BaseException | None = None
    try:
        _ensure_helpers(n_helpers)
        for _ in range(n_helpers):
            _jobs.put(job)
        job.work()
    except BaseException as error:
        raised = error
    # until helpers are done, however many exceptions signal handlers raise meanwhile
    while True:
        try:
            job.finish()
            break
        except BaseException as error:
            raised = raised or error
    if raised is not None:
        raise raised


class _Job:
    """One call of `run`: a counter of launches that any number of threads may draw from."""

    def __init__(self, launch: Callable[[int, int], object], n_tasks: int, step: int) -> None:
        self._launch = launch
        self._n_tasks = n_tasks
        self._step = step
        self._starts = itertools.count(0, step)
        self._state = threading.Condition(threading.Lock())
        self._n_working = 0
        self._closed = False
        self.error: BaseException | None = None

    def work(self) -> None:
        """Draw launches until none is left."""
        while not self._closed and (start := next(self._starts)) < self._n_tasks:
            self._launch(start, min(start + self._step, self._n_tasks))

    def help(self) -> None:
        """Do `work` in a helper thread; errors are kept for the caller."""
        # checked under the lock: after `finish` no helper may begin
        with self._state:
            if self._closed:
                return
            self._n_working += 1
        try:
            self.work()
        except BaseException as error:
            self.error = self.error or error
            self._closed = True
        finally:
            with self._state:
                self._n_working -= 1
                self._state.notify_all()

    def finish(self) -> None:
        """Close the job to helpers, wait for those at work, and drop the arrays.

        An idle helper may hold a finished job for long.
        """
        self._closed = True
        with self._state:
            while self._n_working:
                self._state.wait()
        self._launch = _nothing


def _nothing(first: int, last: int) -> None:
    """Replace the launches of a finished job."""


def _ensure_helpers(n: int) -> None:
    global _n_helpers
    with _lock:
        while _n_helpers < n:
            _n_helpers += 1
            threading.Thread(
                target=_help_forever, args=(_jobs,), name=f"racecore-{_n_helpers}", daemon=True
            ).start()


def _help_forever(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        job.help()
        del job  # an idle helper must not keep the arrays of its last job alive


def _forget_helpers() -> None:
    """Start without helpers in a forked child."""
    # the parent's threads do not exist there, and its locks may be held for ever
    global _lock, _jobs, _n_helpers
    _lock, _jobs, _n_helpers = threading.Lock(), queue.SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)
