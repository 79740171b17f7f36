"""The thread pool: every task once, errors and interrupts surface, forks start afresh."""

import importlib
import os
import signal
import threading
import time
import weakref

import pytest

import racecore
from racecore.runtime.threads import default_count, run


@pytest.mark.parametrize("n_threads", [1, 2, 8])
@pytest.mark.parametrize(
    ("n_tasks", "step"), [(0, 1), (1, 1), (7, 3), (100, 1), (100, 100), (5, 1000)]
)
def test_every_task_runs_once(n_threads, n_tasks, step):
    seen = []
    with racecore.threads(n_threads):
        run(lambda first, last: seen.extend(range(first, last)), n_tasks, step)
    assert sorted(seen) == list(range(n_tasks))


def test_several_threads_take_part():
    names = set()
    barrier = threading.Barrier(3, timeout=600)

    def meet(first, last):
        names.add(threading.get_ident())
        barrier.wait()

    with racecore.threads(3):
        run(meet, 3, 1)
    assert len(names) == 3


@pytest.mark.parametrize("n_threads", [1, 4])
def test_an_error_is_raised_after_all_have_stopped(n_threads):
    running = []

    def launch(first, last):
        running.append(first)
        try:
            time.sleep(0.01)
            if first == 3:
                raise OSError("disk on fire")
        finally:
            running.remove(first)

    with racecore.threads(n_threads), pytest.raises(OSError, match="disk on fire"):
        run(launch, 1000, 1)
    assert running == []


def test_concurrent_callers_do_not_wait_for_each_other():
    results = []

    def caller(offset):
        seen = []
        with racecore.threads(4):
            run(lambda first, last: seen.append(first), 200, 1)
        results.append(sorted(seen) == list(range(200)))

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(600)
    assert results == [True] * 8


def test_the_setting_belongs_to_the_block_and_the_thread():
    seen = {}

    def count(name, pause=lambda: time.sleep(0.005)):
        identities = set()
        run(lambda first, last: (pause(), identities.add(threading.get_ident())), 20, 1)
        seen[name] = len(identities)

    with racecore.threads(1):
        count("inside")
        with racecore.threads(4):
            count("nested", threading.Barrier(2, timeout=600).wait)
        count("inside again")
    assert seen["inside"] == seen["inside again"] == 1
    assert seen["nested"] > 1


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True])
def test_bad_counts(n):
    with pytest.raises(ValueError, match="positive integer"), racecore.threads(n):
        pass


def test_default_count(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    processors = len(os.sched_getaffinity(0))
    assert default_count() == processors
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert default_count() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100000,2")
    assert default_count() == processors
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_count() == processors


def test_a_finished_job_keeps_nothing_alive_before_its_helpers_begin(monkeypatch):
    """A starved helper holds the jobs it never got round to; their arrays would count as the next
    call's memory.
    """
    threads = importlib.import_module(
        "racecore.runtime.threads"
    )  # the package's attribute of that name is a function
    monkeypatch.setattr(threads, "_ensure_helpers", lambda n: None)
    jobs = threads.queue.SimpleQueue()
    monkeypatch.setattr(threads, "_jobs", jobs)

    class Array:
        pass

    array = Array()
    gone = weakref.ref(array)
    with racecore.threads(2):
        run(lambda first, last, array=array: None, 8, 1)
    del array
    assert jobs.qsize() == 1
    assert gone() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_exception_of_a_signal_handler_waits_for_the_helpers(error):
    """They write to arrays that the caller gives up when it unwinds."""
    working = set()

    def launch(first, last):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.001)
            return
        working.add(first)
        time.sleep(0.03)
        working.remove(first)

    waiting = importlib.import_module("racecore.runtime.threads")._work_and_wait.__code__

    def raise_it(number, frame):
        while frame is not None:  # not outside, where it would hit this test
            if frame.f_code is waiting:
                raise error
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        for delay in (0.005, 0.01, 0.02, 0.04, 0.05):
            signal.setitimer(signal.ITIMER_REAL, delay, 0.004)  # and again and again
            with racecore.threads(3):
                try:
                    run(launch, 100, 1)
                except error:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                assert not working
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
