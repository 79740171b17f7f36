"""Runs that are killed, stopped or damaged and then resumed: the same bytes as undisturbed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import racecore
from racecore import outofcore
from racecore.errors import CorruptFileError, InputChangedError, OutputInUseError
from racecore.outofcore import crash_points

LSH = racecore.SoftLSH.random(16, 3, 2, beta=1.5, rng=3)
READ = ("query", "key", "value", "d_out")
WRITTEN = ("out", "d_query", "d_key", "d_value")
BOUNDS = [0, 0, 700, 900, 4900, 4900, 8000]
CASES = {
    "bidirectional": {},
    "causal": {"is_causal": True},
    "packed": {"is_causal": True, "cu_seqlens": BOUNDS},
    "packed, both ways": {"cu_seqlens": BOUNDS},
}
# Python 3.12 and later warn of forking a process that has used threads, which racecore supports.
pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]
FORK = multiprocessing.get_context("fork")


class Run:
    """A run from files to files that takes a few dozen tasks."""

    def __init__(self, folder, options, memory_limit=3_700_000):
        rng = np.random.default_rng(0)
        heads = {"query": 4, "key": 2, "value": 2, "d_out": 4}
        for name in READ:
            dim = 16 if name in ("query", "key") else 24
            np.save(
                folder / f"{name}.npy",
                rng.standard_normal((8000, heads[name], dim), dtype=np.float32),
            )
        self.folder, self.options = folder, {"memory_limit": memory_limit, **options}

    def __call__(self, **options):
        paths = {name: self.folder / f"{name}.npy" for name in READ}
        written = {name: self.folder / f"{name}.result.npy" for name in WRITTEN}
        options = {
            **paths,
            **written,
            "d_lsh": self.folder / "lsh.result.npz",
            **self.options,
            **options,
        }
        return outofcore.run(
            *(options.pop(n) for n in ("query", "key", "value", "out")),
            options.pop("lsh", LSH),
            **options,
        )

    def take_results(self):
        """Return the bytes of all outputs, and remove them; nothing else may have been left."""
        found = {path.name: path.read_bytes() for path in self.left() if "result" in path.name}
        assert sorted(found) == sorted(
            [*(f"{name}.result.npy" for name in WRITTEN), "lsh.result.npz"]
        )
        for name in found:
            (self.folder / name).unlink()
        return found

    def left(self):
        """Return all files but the inputs."""
        return sorted(
            path
            for path in self.folder.iterdir()
            if path.name not in {f"{name}.npy" for name in READ}
        )

    def in_child(self, before=None):
        """Start it in a process of its own."""

        def work():
            if before is not None:
                before()
            try:
                self()
            except OSError as error:
                os._exit(100 if error.errno in (errno.EFBIG, errno.ENOSPC) else 1)
            except BaseException:
                os._exit(1)
            os._exit(0)

        child = FORK.Process(target=work)
        child.start()
        return child


@pytest.fixture(params=CASES, scope="module")
def undisturbed(request, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"), CASES[request.param])
    report = run()
    assert report.resumed_tokens == 0
    return run, run.take_results(), report


@pytest.fixture
def case(undisturbed):
    """A run, and what it gives when nothing disturbs it."""
    for path in undisturbed[0].left():
        path.unlink()
    return undisturbed


def kill_at(point, nth):
    """Return a function that makes a process kill itself when it reaches a crash point the n-th
    time.
    """

    def before():
        seen = 0

        def reached(name):
            nonlocal seen
            seen += name == point
            if name == point and seen == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        crash_points.reached = reached

    return before


def finish(run, wanted, report):
    """Call the run again and compare everything."""
    again = run()
    assert again.digests == report.digests
    np.testing.assert_array_equal(again.d_planes, report.d_planes)
    assert again.d_beta == report.d_beta
    assert run.take_results() == wanted
    assert run.left() == []
    return again


@pytest.mark.parametrize("which", [1, 2, 4, 9])
@pytest.mark.parametrize("point", crash_points.NAMES)
def test_killed_at_every_crash_point(case, point, which):
    run, wanted, report = case
    child = run.in_child(kill_at(point, which))
    child.join()
    assert child.exitcode in ((0,) if which > 1 else ()) + (-signal.SIGKILL,)
    if child.exitcode == 0:
        assert run.take_results() == wanted
        return
    names = {path.name for path in run.left()}
    before_renames = crash_points.NAMES.index(point) < crash_points.NAMES.index("one output named")
    assert not before_renames or not {f"{name}.result.npy" for name in WRITTEN} & names
    again = finish(run, wanted, report)
    assert (
        again.resumed_tokens > 0 or which < 9
    )  # that is enough for all tasks of a unit to be done


@pytest.mark.slow
def test_killed_two_hundred_times(case):
    run, wanted, report = case
    rng = np.random.default_rng(1)
    started = time.perf_counter()
    assert run.in_child().join() is None
    longest = time.perf_counter() - started
    assert run.take_results() == wanted
    kills = 0
    while kills < 50:  # in each of four cases
        child = run.in_child()
        child.join(rng.uniform(0, longest))
        child.kill()
        child.join()
        kills += child.exitcode != 0
        if child.exitcode == 0:
            assert run.take_results() == wanted
    finish(run, wanted, report)


def interrupt(run, nth=12, point="line written"):
    """Kill a run at a crash point."""
    child = run.in_child(kill_at(point, nth))
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (run.folder / "out.result.npy.journal").exists()


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(
    "name", ["out.result.npy.partial", "d_query.result.npy.partial", "out.result.npy.states"]
)
def test_flipped_bits_are_found_and_their_chunks_computed_again(case, name):
    run, wanted, report = case
    interrupt(run, 12)
    path = run.folder / name
    for offset in np.linspace(200, path.stat().st_size - 1, 23).astype(int).tolist():
        flip(path, offset)
    finish(run, wanted, report)


def test_damaged_lines_and_lost_files_cost_only_time(case):
    run, wanted, report = case
    journal = run.folder / "out.result.npy.journal"
    interrupt(run, 8)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"rows", b"ROWS")
    del lines[5]
    journal.write_bytes(b"".join(lines) + b"0000 torn")
    finish(run, wanted, report)
    interrupt(run, 8)
    for path in run.left():
        if path != journal:
            path.unlink()
    finish(run, wanted, report)
    interrupt(run, 8)
    flip(journal, 20)
    with pytest.raises(CorruptFileError, match="its first line is damaged; to discard what it did"):
        run()
    run(resume=False)
    assert run.take_results() == wanted


def test_only_what_is_missing_is_computed(case):
    run, wanted, report = case
    interrupt(run, 1, "all tasks done")
    reports = []
    again = run(progress=lambda done, total: reports.append((done, total)))
    assert run.take_results() == wanted
    assert again.resumed_tokens == reports[-1][0]
    assert again.digests == report.digests


def test_changed_inputs_and_parameters_are_refused_with_the_difference(tmp_path):
    run = Run(tmp_path, {})
    run()
    wanted = run.take_results()
    interrupt(run)
    left = {path: path.read_bytes() for path in run.left()}
    other = racecore.SoftLSH.random(16, 3, 2, beta=2.5, rng=3)
    mask = np.ones(8000, bool)
    for changes, message in (
        ({"is_causal": True}, "is_causal: False then, True now"),
        ({"readout": "bucket_mean"}, "readout: ratio then, bucket_mean now"),
        (
            {"lsh": other},
            r"hash: 3 tables of 2 planes, beta 1\.5.* then, 3 tables of 2 planes, beta 2\.5",
        ),
        ({"memory_limit": "100MB"}, "tokens per chunk, which follow from memory_limit"),
        ({"cu_seqlens": [0, 100, 8000]}, "sequences: 1"),
        ({"key_mask": mask}, "key_mask: None then, bool"),
        ({"d_lsh": None}, "d_planes: True then, False now"),
        ({"d_key": None}, r"d_key: d_key\.result\.npy then, digest only now"),
        (
            {
                "query": tmp_path / "d_out.npy",
                "d_out": None,
                "d_query": None,
                "d_key": None,
                "d_value": None,
                "d_lsh": None,
            },
            "query: float32",
        ),
    ):
        with pytest.raises(
            (ValueError, CorruptFileError),
            match=message if "query" not in changes else "head dim|query:",
        ):
            run(**changes)
        assert {path: path.read_bytes() for path in run.left()} == left
    flip(tmp_path / "value.npy", 5000)
    with pytest.raises(
        ValueError, match=r"value: float32 .* bytes, changed .* then, float32 .* now\); to discard"
    ):
        run()
    run(resume=False)
    assert run.take_results() != wanted


def test_another_version_is_refused(tmp_path, monkeypatch):
    run = Run(tmp_path, {})
    interrupt(run)
    monkeypatch.setattr("racecore.outofcore.checked.__version__", "9.9")
    with pytest.raises(ValueError, match=r"racecore: .* then, 9\.9 now"):
        run()


def test_a_second_run_on_the_same_output_is_refused_and_a_dead_one_does_not_block(tmp_path):
    run = Run(tmp_path, {})
    messages = []

    def meanwhile(done, total):
        if not messages:
            for options in ({}, {"is_causal": True}, {"journal": tmp_path / "j"}):
                with pytest.raises(OutputInUseError) as caught:
                    run(**options)
                messages.append(str(caught.value))

    run(progress=meanwhile)
    wanted = run.take_results()
    assert all("another run is writing it" in message for message in messages)
    assert run.left() == []
    interrupt(run)  # its lock died with it
    run()
    assert run.take_results() == wanted


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit, OSError, ValueError])
def test_a_run_can_be_resumed_after_any_exception(case, error):
    run, wanted, report = case

    def stop(done, total):
        if done > total // 2:
            raise error

    with pytest.raises(error):
        run(progress=stop)
    assert finish(run, wanted, report).resumed_tokens > 0


def test_a_full_disk_stops_a_run_before_it_begins_or_between_chunks(tmp_path):
    run = Run(tmp_path, {"is_causal": True})
    report = run()
    wanted = run.take_results()

    def limit(n_bytes):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    child = run.in_child(lambda: limit(1_000_000))
    child.join()
    assert child.exitcode == 100
    assert run.left() == []

    def later():
        crash_points.reached = lambda point: (
            limit(1_500_000) if point == "outputs reserved" else None
        )

    child = run.in_child(later)
    child.join()
    assert child.exitcode == 100
    assert finish(run, wanted, report).resumed_tokens > 0


def test_inputs_that_change_during_the_run_leave_nothing(tmp_path):
    run = Run(tmp_path, {})

    def change(done, total):
        if done > total // 2:
            os.utime(tmp_path / "key.npy")

    with pytest.raises(InputChangedError, match=r"key\.npy \(key\) changed during the run"):
        run(progress=change)
    assert run.left() == []


def test_digests_alone_can_be_resumed_where_a_journal_is_named(tmp_path):
    x = outofcore.Synthetic((20_000, 2, 16))

    def run(**options):
        return outofcore.run(
            x, x, x, None, LSH, d_out=x, journal=tmp_path / "j", memory_limit="5MB", **options
        )

    def stop(done, total):
        if done > total * 0.7:
            raise KeyboardInterrupt

    wanted = run()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"j", "j.states"}
    again = run()
    assert again.digests == wanted.digests
    assert again.d_beta == wanted.d_beta
    assert again.resumed_tokens > 0
    assert list(tmp_path.iterdir()) == []


def test_runs_to_arrays_have_no_journal(tmp_path):
    x = outofcore.Synthetic((3000, 2, 16))
    out = np.zeros((3000, 2, 16), np.float32)
    with pytest.raises(ValueError, match="a run that writes to arrays cannot be resumed"):
        outofcore.run(x, x, x, out, LSH, journal=tmp_path / "j")
    with pytest.raises(ZeroDivisionError):
        outofcore.run(
            x,
            x,
            x,
            out,
            LSH,
            d_out=x,
            d_query=tmp_path / "dq.npy",
            progress=lambda done, total: 1 / 0,
        )
    assert list(tmp_path.iterdir()) == []


def test_maps_and_arrays_are_identified_by_their_contents(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.npy"
    np.save(path, rng.standard_normal((6000, 2, 16), dtype=np.float32))
    mapped, held = np.load(path, mmap_mode="r"), np.load(path)

    def run(query, key, value, **options):
        return outofcore.run(
            query, key, value, tmp_path / "o.npy", LSH, memory_limit="2MB", **options
        )

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    first = (mapped[:5000], held[:5000], Sliceable(held[:5000]))
    with pytest.raises(KeyboardInterrupt):
        run(*first, progress=stop)
    for others, name in (
        ((mapped[1000:], *first[1:]), "query: float32 .* from byte"),
        ((first[0], held[1000:], first[2]), "key: float32 .* of checksum"),
        ((*first[:2], Sliceable(held[1000:])), "value: float32 .* with rows of checksum"),
    ):
        with pytest.raises(ValueError, match=name):
            run(*others)
    assert run(*first).resumed_tokens > 0


class Sliceable:
    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, index):
        return self.array[index]


def test_the_journal_has_one_line_per_task(tmp_path):
    run = Run(tmp_path, {})
    interrupt(run, 1, "all tasks done")
    lines = Path(tmp_path / "out.result.npy.journal").read_bytes().splitlines()
    assert len(lines) == 1 + 3 * 8
    assert max(map(len, lines[1:])) < 200
