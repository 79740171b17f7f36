"""Threads, forks, worker processes, Ctrl-C: every call ends right, in fresh processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
from devices import cpu_seconds

pytestmark = pytest.mark.process

HEADER = """
import numpy as np, racecore, sys, threading, time
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((3000, 2, 16), dtype=np.float32) for _ in range(3))
def work(causal=True):
    out, saved = racecore.attention_forward(q, k, v, is_causal=causal)
    return out.tobytes() + racecore.attention_backward(out, saved).query.tobytes()
expected = work()
"""


def run(program):
    result = subprocess.run(
        [sys.executable, "-c", HEADER + program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_four_python_threads_compute_at_once():
    program = """
wrong = []
def caller():
    for _ in range(50):
        if work() != expected:
            wrong.append(1)
threads = [threading.Thread(target=caller) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print("wrong:", len(wrong))
"""
    assert "wrong: 0" in run(program)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_after_the_parent_has_computed(method):
    program = f"""
import multiprocessing
def child(_):
    return work() == expected
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    with context.Pool(3) as pool:
        print("right:", pool.map(child, range(6)) == [True] * 6)
"""
    if method == "spawn":  # a spawned child imports the main module, which must be a file
        program = """
import concurrent.futures, multiprocessing
spawn = multiprocessing.get_context("spawn")
with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
    outs = list(pool.map(racecore.attention, [q, q], [k, k], [v, v]))
print("right:", all((out == racecore.attention(q, k, v)).all() for out in outs))
"""
    assert "right: True" in run(program)


def test_fork_while_other_threads_compute():
    program = """
import os
stop = False
def busy():
    while not stop:
        work()
threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads: t.start()
codes = []
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() == expected else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop = True
for t in threads: t.join()
print("codes:", set(codes))
"""
    assert "codes: {0}" in run(program)


def test_threads_and_forks_while_kernels_are_being_compiled(tmp_path):
    """Nothing is compiled yet: two threads compute at once, and children are forked in the middle
    of it.
    """
    program = """
import numpy as np, os, threading, time
import racecore
x = np.random.default_rng(0).standard_normal((300, 2, 16)).astype(np.float32)
outs = []
def work():
    outs.append(racecore.attention(x, x, x))
threads = [threading.Thread(target=work) for _ in range(2)]
for t in threads: t.start()
children = []
for _ in range(3):
    time.sleep(0.7)
    pid = os.fork()
    if pid == 0:
        racecore.attention(x[:50], x[:50], x[:50])
        os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
for t in threads: t.join()
print("same:", (outs[0] == outs[1]).all(), codes)
"""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert result.stdout == "same: True [0, 0, 0]\n"


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(backend):
    program = f"""
import joblib
call = joblib.delayed(racecore.attention)
outs = joblib.Parallel(n_jobs=2, backend="{backend}")(call(q, k, v) for _ in range(4))
print("right:", all((out == racecore.attention(q, k, v)).all() for out in outs))
"""
    assert "right: True" in run(program)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_ctrl_c_ends_a_long_call_within_a_second(causal, threads):
    """Thirty-two million tokens of one wide row, many seconds of work, interrupted early; then
    computing goes on.
    """
    program = f"""
x = np.broadcast_to(rng.standard_normal((1, 1, 512), dtype=np.float32), (1 << 25, 1, 512))
value = np.broadcast_to(np.float32(1), (1 << 25, 1, 1))
import signal
# a shell's background job inherits that it is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
print("started", flush=True)
try:
    with racecore.threads({threads}):
        racecore.attention(x, x, value, is_causal={causal})
    print("finished too early")
except KeyboardInterrupt:
    print("interrupted; right afterwards:", work() == expected, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", HEADER + program], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.7)
    before = cpu_seconds(process.pid)
    os.kill(process.pid, signal.SIGINT)
    line = process.stdout.readline()
    # of CPU time for each thread: other processes may take the cores meanwhile
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = (cpu_seconds(process.pid) - before) / threads
    process.stdout.close()
    assert process.wait() == 0
    assert line == "interrupted; right afterwards: True\n"
    assert seconds < 1.5  # a second for the interrupt, the rest for the check that follows it


def test_exit_while_helpers_are_alive_is_quiet():
    program = "print('done')"
    assert run(program).endswith("done\n")
