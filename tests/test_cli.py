"""The command line: the bits of the API, clear errors, exit codes, no partial files."""

import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import oracle
import pytest
from devices import cpu_seconds

import racecore
from racecore import backends
from racecore.cli import main
from racecore.commands import demo, doctor, softmax_comparison
from racecore.commands.exact_rows import exact_rows
from racecore.outofcore import npy
from racecore.outofcore.passes import PassRunner
from racecore.runtime import progress, progress_bar

GRADIENTS = ("query", "key", "value")
# A shell that starts this in the background lets the child ignore Ctrl-C, so the handler is put
# back by hand.
START = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
START += "from racecore.cli import main; sys.exit(main(sys.argv[1:]))"


def call(*words):
    """Run the program in this process; return its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as error:  # argparse
        return error.code


def start(*words, **options):
    """Run the program in a new process."""
    command = [sys.executable, "-W", "error", "-c", START, *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small inputs, in the working directory: q k v g .npy, 2 query heads on 1 key head, V != D."""
    monkeypatch.chdir(tmp_path)
    save(np.float32)
    return tmp_path


def save(dtype, batch=()):
    rng = np.random.default_rng(0)
    shapes = {"q": (70, 2, 8), "k": (70, 1, 8), "v": (70, 1, 5), "g": (70, 2, 5)}
    arrays = {
        name: rng.standard_normal((*batch, *shape)).astype(dtype) for name, shape in shapes.items()
    }
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
    return list(arrays.values())


FILES = ("--query", "q.npy", "--key", "k.npy", "--value", "v.npy", "--out", "o.npy")
BACKWARD = ("--d-out", "g.npy", "--d-query", "dq.npy", "--d-key", "dk.npy", "--d-value", "dv.npy")


def attend(*words):
    return call("attend", *FILES, *words)


def refused(capsys, *parts, code=2, made=("o.npy",)):
    """The message has all the parts and no traceback, and nothing was written."""
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert "Traceback" not in error
    assert not [name for name in os.listdir() if name.endswith((".partial", ".journal", ".states"))]
    assert not any(os.path.exists(name) for name in made)
    return code


# Results


def same_bits(path, array):
    stored = np.load(path)
    assert stored.shape == array.shape
    assert stored.tobytes() == array.tobytes()
    assert stored.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_attend_gives_the_bits_of_the_api(dtype, batch, folder, capsys):
    q, k, v, g = save(dtype, batch)
    words = ["--dtype", "bfloat16"] if dtype is ml_dtypes.bfloat16 else []
    words += [
        "--tables",
        3,
        "--planes",
        2,
        "--beta",
        1.5,
        "--seed",
        7,
        "--causal",
        "--readout",
        "bucket_mean",
    ]
    assert attend(*words, *BACKWARD, "--threads", 2, "--memory-limit", "20MB") == 0
    lsh = racecore.SoftLSH.random(8, 3, 2, beta=1.5, rng=7)
    out, saved = racecore.attention_forward(q, k, v, lsh, is_causal=True, readout="bucket_mean")
    grads = racecore.attention_backward(g, saved)
    for path, array in zip(("o.npy", "dq.npy", "dk.npy", "dv.npy"), (out, *grads[:3]), strict=True):
        same_bits(path, array)
    stored_as = "V2" if dtype is ml_dtypes.bfloat16 else dtype
    assert np.load("o.npy").dtype == np.dtype(stored_as)
    printed = capsys.readouterr().out
    assert float(re.search(r"d_beta = (\S+)", printed)[1]) == pytest.approx(grads.beta, rel=1e-8)
    n_tokens = 70 * int(np.prod(batch, dtype=int))
    assert re.search(
        rf"{n_tokens} tokens in \S+ s \(\S+ tokens/s\): o.npy, dq.npy, dk.npy, dv.npy\n$", printed
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_defaults_forward_only(dtype, folder, capsys):
    save(dtype)
    assert attend() == 0
    same_bits("o.npy", racecore.attention(*(np.load(f"{name}.npy") for name in "qkv")))
    assert "d_beta" not in capsys.readouterr().out
    assert sorted(os.listdir()) == ["g.npy", "k.npy", "o.npy", "q.npy", "v.npy"]


def test_a_saved_hash_and_its_gradients(folder, capsys):
    rng = np.random.default_rng(1)
    lsh = racecore.SoftLSH(rng.standard_normal((2, 3, 2, 8)), [0.5, 2.0])
    lsh.save("lsh.npz")
    assert attend("--lsh", "lsh.npz", "--d-out", "g.npy", "--d-lsh", "dl.npz") == 0
    q, k, v, g = (np.load(f"{name}.npy") for name in "qkvg")
    _, saved = racecore.attention_forward(q, k, v, lsh)
    grads = racecore.attention_backward(g, saved)
    with np.load("dl.npz") as stored:
        assert stored["planes"].tobytes() == grads.planes.tobytes()
        assert stored["beta"].tobytes() == grads.beta.tobytes()
    assert "d_beta = [" in capsys.readouterr().out


@pytest.mark.parametrize("wanted", GRADIENTS)
def test_a_single_gradient(wanted, folder):
    assert attend("--d-out", "g.npy", f"--d-{wanted}", "d.npy") == 0
    q, k, v, g = (np.load(f"{name}.npy") for name in "qkvg")
    grads = racecore.attention_backward(g, racecore.attention_forward(q, k, v)[1])
    same_bits("d.npy", getattr(grads, wanted))


def test_fortran_order_and_foreign_byte_order(folder):
    expected = racecore.attention(*(np.load(f"{name}.npy") for name in "qkv"))
    np.save("q.npy", np.asfortranarray(np.load("q.npy")))
    np.save("k.npy", np.load("k.npy").astype(">f4"))
    assert attend() == 0
    same_bits("o.npy", expected)


def test_no_tokens(folder):
    for name, shape in {"q": (0, 2, 8), "k": (0, 1, 8), "v": (0, 1, 5), "g": (0, 2, 5)}.items():
        np.save(f"{name}.npy", np.zeros(shape, np.float32))
    assert attend(*BACKWARD) == 0
    assert np.load("o.npy").shape == (0, 2, 5)
    assert np.load("dv.npy").shape == (0, 1, 5)


def test_queries_and_keys_may_differ_in_number(folder):
    np.save("q.npy", np.load("q.npy")[:9])
    assert attend() == 0
    assert np.load("o.npy").shape == (9, 2, 5)


# Refused inputs


def test_cut_short_and_bytes_to_spare(folder, capsys):
    content = pathlib.Path("k.npy").read_bytes()
    for changed, what in ((content[:-1], "was cut short"), (content + b"x", "has bytes to spare")):
        pathlib.Path("k.npy").write_bytes(changed)
        assert attend() == 2
        refused(capsys, f"k.npy {what}", f"{len(content):,} bytes", f"has {len(changed):,}")


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", b"no array at all" * 9, b"\x93NUMPY\x09\x00" + b" " * 200]
)
def test_not_an_npy_file(content, folder, capsys):
    pathlib.Path("v.npy").write_bytes(content)
    assert attend() == 2
    refused(capsys, "v.npy is not an .npy file", "write one with numpy.save")


def test_pickles_are_not_loaded(folder, capsys):
    np.save("v.npy", np.array([[[{}]]]), allow_pickle=True)
    assert attend() == 2
    refused(capsys, "v.npy holds object")


def test_wrong_dtypes(folder, capsys):
    np.save("v.npy", np.load("v.npy").astype(np.int32))
    assert attend() == 2
    refused(
        capsys,
        "v.npy holds int32; expected float16, bfloat16 (ml_dtypes), float32 or float64",
        "astype(numpy.float32)",
    )
    np.save("v.npy", np.load("k.npy").astype(np.float64))
    assert attend() == 2
    refused(capsys, "query, key, value must have one dtype, got float32, float32, float64")
    np.save("v.npy", np.load("k.npy").astype(ml_dtypes.bfloat16))
    assert attend() == 2
    refused(capsys, "v.npy holds entries of two untyped bytes", "--dtype bfloat16")


def test_bfloat16_without_its_package(folder, capsys, monkeypatch):
    save(ml_dtypes.bfloat16)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert attend("--dtype", "bfloat16") == 2
    refused(capsys, "needs the package ml_dtypes")


def test_wrong_shapes(folder, capsys):
    np.save("g.npy", np.load("q.npy"))
    assert attend(*BACKWARD) == 2
    refused(
        capsys,
        "d_out must have the shape and dtype of the output, (70, 2, 5) and float32, got (70, 2, 8)",
    )
    np.save("k.npy", np.load("k.npy")[:60])
    assert attend() == 2
    refused(capsys, "key and value must agree in tokens and heads")
    np.save("q.npy", np.load("q.npy")[0])
    assert attend() == 2
    refused(capsys, "q.npy has shape (2, 8); expected [tokens, heads, dim]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--query", "none.npy"), "cannot read none.npy: No such file"),
        (("--query", "."), "cannot read .: Is a directory"),
        (("--lsh", "none.npz"), "cannot read none.npz: No such file"),
        (("--lsh", "q.npy"), "q.npy is not a racecore.SoftLSH file"),
        (("--lsh", "q.npy", "--tables", "4", "--seed", "1"), "leave out --tables, --seed"),
        (("--out", "none/o.npy"), "there is no folder"),
        (("--out", "."), "is not a regular file"),
        (("--d-query", "dq.npy"), "gradients need --d-out"),
        (("--d-out", "g.npy"), "say which gradients to write"),
        (("--memory-limit", "lots"), "a memory size is a number of bytes or text such as '512MB'"),
        (("--memory-limit", "1kB"), "memory_limit is 1,000 bytes; the smallest that works here is"),
        (("--planes", "17"), "n_planes must be at most 16"),
        (("--beta", "nan"), "beta must be finite"),
        (("--seed", "-1"), "argument --seed: expected an integer of at least 0"),
        (("--tables", "0"), "argument --tables: expected a positive integer"),
        (("--threads", "many"), "argument --threads"),
        (("--readout", "mean"), "argument --readout: invalid choice"),
        (("--caus",), "unrecognized arguments: --caus"),
    ],
)
def test_bad_usage(words, message, folder, capsys):
    assert attend(*words) == 2
    refused(capsys, message)


def test_a_missing_argument(capsys):
    assert call("attend", "--query", "q.npy") == 2
    assert "the following arguments are required: --key, --value, --out" in capsys.readouterr().err
    assert call("fly") == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_an_output_that_is_an_input_or_another_output(folder, capsys):
    before = pathlib.Path("q.npy").read_bytes()
    os.link("q.npy", "hard.npy")
    os.symlink("q.npy", "soft.npy")
    for name in ("q.npy", "hard.npy", "soft.npy", folder / "q.npy"):
        assert attend("--overwrite", "--out", name) == 2
        refused(capsys, "--out is the same file as --query")
    assert attend(*BACKWARD, "--overwrite", "--d-key", "g.npy") == 2
    refused(capsys, "--d-key is the same file as --d-out")
    assert attend(*BACKWARD, "--d-key", "./dq.npy") == 2
    refused(capsys, "--d-key is the same file as --d-query")
    assert pathlib.Path("q.npy").read_bytes() == before


def test_existing_outputs_are_kept_without_overwrite(folder, capsys):
    pathlib.Path("o.npy").write_text("mine")
    pathlib.Path("elsewhere").mkdir()
    os.symlink("elsewhere/dq.npy", "dq.npy")
    assert attend(*BACKWARD) == 2
    refused(
        capsys, "o.npy exists; choose another name for --out, or add --overwrite", made=("dk.npy",)
    )
    assert pathlib.Path("o.npy").read_text() == "mine"
    assert attend(*BACKWARD, "--overwrite") == 0
    assert np.load("o.npy").shape == (70, 2, 5)
    assert os.path.islink("dq.npy")
    assert np.load("elsewhere/dq.npy").shape == (70, 2, 8)


# Failures


@pytest.mark.parametrize("failing", [1, 3])
def test_a_full_disk_is_found_before_the_work_starts(failing, folder, capsys, monkeypatch):
    calls = []
    genuine = os.posix_fallocate

    def allocate(descriptor, offset, size):
        calls.append(size)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        genuine(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(racecore, "attention_forward", None)
    assert attend(*BACKWARD) == 1
    size = os.path.getsize("g.npy" if failing == 1 else "k.npy")
    refused(
        capsys,
        f"cannot reserve {size:,} bytes: No space left on device",
        made=("o.npy", "dq.npy", "dk.npy"),
    )


@pytest.mark.process
def test_a_file_size_limit_is_an_error_and_no_signal(folder):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
    command = [sys.executable, "-c", limit + START, "attend", *FILES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "racecore attend: error: [Errno 27] cannot reserve" in done.stderr
    assert sorted(os.listdir()) == ["g.npy", "k.npy", "q.npy", "v.npy"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "racecore attend: interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (OSError(5, "Input/output error"), 1, "Input/output error"),
        (racecore.errors.BackendUnavailableError("cpu", {"cpu": "no reason"}), 1, "cpu: no reason"),
    ],
)
def test_the_same_command_resumes_after_an_error(error, code, message, folder, capsys, monkeypatch):
    for name in "qkvg":
        np.save(
            f"{name}.npy", np.tile(np.load(f"{name}.npy"), (400, 1, 1))
        )  # 28,000 tokens: two chunks at least
    genuine = PassRunner.compute

    def fail(self, task, *rest):
        if task.pass_name == "sum back":
            raise error
        genuine(self, task, *rest)

    monkeypatch.setattr(PassRunner, "compute", fail)
    assert attend(*BACKWARD) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert "run the same command again to resume" in printed
    assert "Traceback" not in printed
    left = sorted(set(os.listdir()) - {"g.npy", "k.npy", "q.npy", "v.npy"})
    partial = [f"{name}.npy.partial" for name in ("dk", "dq", "dv", "o")]
    assert left == sorted([*partial, "o.npy.journal", "o.npy.states"])
    monkeypatch.setattr(PassRunner, "compute", genuine)
    assert attend(*BACKWARD, "--json") == 0
    assert json.loads(capsys.readouterr().out)["resumed_tokens"] == 84_000
    assert not {*left} & {*os.listdir()}
    same_bits("o.npy", racecore.attention(*(np.load(f"{name}.npy") for name in "qkv")))


def test_a_bug_shows_its_traceback(folder, monkeypatch):
    monkeypatch.setattr(PassRunner, "compute", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attend()
    assert not os.path.exists("o.npy")


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_long_run_ended_by_a_signal_can_be_resumed(number, code, folder):
    """Four million tokens and 8,192 buckets, at least a minute of work, on sparse input files."""
    assert attend() == 0  # compiles the kernels
    os.unlink("o.npy")
    for name, dim in {"q": 16, "k": 16, "v": 1}.items():
        with open(folder / f"{name}.npy", "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 22, 1, dim)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + (1 << 24) * dim)
    process = start("attend", *FILES, "--tables", 32, "--planes", 8, cwd=folder)
    with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
        while (
            not (folder / "o.npy.states").exists() or (folder / "o.npy.states").stat().st_size == 0
        ):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        time.sleep(0.5)
        before = cpu_seconds(process.pid)
        process.send_signal(number)
        try:
            # waits for the end, and leaves the process for its CPU time to be read
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = cpu_seconds(process.pid) - before
            assert process.wait() == code
        finally:
            process.kill()
        message = process.stderr.read()
    # Of CPU time, on two cores or more: other processes may take the cores meanwhile.
    assert seconds < 10  # usually a fraction of one
    assert "Traceback" not in message
    assert "interrupted" in message or number == signal.SIGTERM
    assert "run the same command again to resume" in message
    left = ["o.npy.journal", "o.npy.partial", "o.npy.states"]
    assert sorted(os.listdir(folder)) == ["g.npy", "k.npy", *left, "q.npy", "v.npy"]


def test_restart_discards_an_interrupted_run(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(PassRunner, "compute", lambda *_, **__: 1 / 0)
        attend()
    assert attend("--causal") == 2
    error = capsys.readouterr().err
    assert "is_causal: False then, True now" in error
    assert "--restart" in error
    assert attend("--causal", "--restart") == 0
    same_bits(
        "o.npy", racecore.attention(*(np.load(f"{name}.npy") for name in "qkv"), is_causal=True)
    )
    assert sorted(os.listdir()) == ["g.npy", "k.npy", "o.npy", "q.npy", "v.npy"]


def test_masks_and_packed_sequences_from_files(folder):
    q, k, v = (np.load(f"{name}.npy") for name in "qkv")
    mask = np.arange(70) % 3 > 0
    np.save("mask.npy", mask)
    np.save("bounds.npy", [0, 20, 70])
    assert attend("--key-mask", "mask.npy") == 0
    same_bits("o.npy", racecore.attention(q, k, v, key_mask=mask[None]))
    assert attend("--cu-seqlens", "bounds.npy", "--causal", "--overwrite") == 0
    same_bits("o.npy", racecore.attention(q, k, v, cu_seqlens=[0, 20, 70], is_causal=True))


def test_non_finite_numbers(folder, capsys):
    k = np.load("k.npy")
    k[66, 0, 3] = np.inf
    np.save("k.npy", k)
    assert attend() == 2
    refused(capsys, "key is inf at token 66, head 0, dimension 3")
    assert attend("--no-check-finite") == 0


def test_the_plan_writes_nothing(folder, capsys):
    assert attend(*BACKWARD, "--plan") == 0
    printed = capsys.readouterr().out
    assert re.search(r"sum back +1 +70 ", printed)
    assert "time     about" in printed
    assert sorted(os.listdir()) == ["g.npy", "k.npy", "q.npy", "v.npy"]


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress_bar, "SECONDS_UNTIL_BAR", 0.0)
    with progress_bar.token_bar("working", 100):
        for _ in range(3):
            time.sleep(0.11)  # tqdm draws ten times a second
            progress.advance(40)
    assert "working  40 % |" in screen.getvalue()
    assert "100 %" in screen.getvalue()
    assert "120" not in screen.getvalue()


def test_no_bar_for_less_than_a_second(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert progress_bar.SECONDS_UNTIL_BAR >= 1
    monkeypatch.setattr(progress_bar, "SECONDS_UNTIL_BAR", 3600.0)  # the machine may be busy
    with progress_bar.token_bar("working", 100):
        progress.advance(100)
    assert screen.getvalue().strip() == ""


def test_plain_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    with progress_bar.token_bar("working", 100):
        progress.advance(40)
    pattern = r"working: 40% after \d+ s, [\d,]+ s left, [\d,]+ tokens/s, [\d,]+ MB\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_bar_ends_full(causal, gradients, folder, monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    assert attend(*(["--causal"] if causal else []), *(BACKWARD if gradients else [])) == 0
    shares = [
        int(share)
        for share in re.findall(r"racecore attend: (\d+)% after", capsys.readouterr().err)
    ]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert len(set(shares)) == len(shares)


def test_a_generous_memory_limit_does_not_hide_progress(folder, monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0.0)
    for name in "qkv":
        np.save(f"{name}.npy", np.zeros((1 << 18, 1, 8), np.float32))
    assert attend("--memory-limit", "100GB", "--causal", "--tables", 8) == 0
    assert len(re.findall("racecore attend: ", capsys.readouterr().err)) >= 5


# The program


@pytest.mark.process
def test_version_and_module():
    for command in (["-m", "racecore"], ["-c", START]):
        done = subprocess.run(
            [sys.executable, *command, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout == f"racecore {racecore.__version__}\n"
    (script,) = (
        s for s in importlib.metadata.entry_points(group="console_scripts") if s.name == "racecore"
    )
    assert script.load() is main


def test_help(capsys):
    assert call() == 0
    listing = capsys.readouterr().out
    for command in ("attend", "demo", "doctor"):
        assert command in listing
        assert call(command, "--help") == 0
        assert f"usage: racecore {command}" in capsys.readouterr().out
    assert "Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted" in listing


@pytest.mark.process
def test_the_command_line_imports_nothing_heavy():
    program = "import racecore.cli, sys; heavy = ('numba', 'scipy', 'tqdm', 'matplotlib'); "
    program += "print([name for name in heavy if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.process
def test_a_reader_that_stops_reading_is_no_error():
    process = start("doctor")
    process.stdout.close()
    assert process.wait(60) == 1
    assert "error" not in process.stderr.read().lower()
    process.stderr.close()


# racecore doctor


@pytest.mark.process
def test_doctor_in_json_without_importing_what_is_optional():
    program = START.replace("sys.exit(main(sys.argv[1:]))", "code = main(['doctor', '--json']); ")
    program += "optional = ('torch', 'jax', 'cupy', 'matplotlib', 'ml_dtypes'); "
    program += "print([name for name in optional if name in sys.modules], code)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert last == "[] 0"
    report = json.loads(text)
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["versions"]["numpy"] == np.__version__
    assert set(report["optional"]) == {"ml_dtypes", "matplotlib", "torch", "jax", "cupy"}
    assert report["backends"]["cpu"] is None
    assert "CUDA" in report["backends"]["cuda"]
    assert report["threads"] >= 1
    assert report["cpu"]["name"]
    assert report["kernel_cache"]["files"] >= 0
    assert report["self_test"]["ok"] is True


def test_doctor_in_words(capsys):
    assert call("doctor") == 0
    text = capsys.readouterr().out
    for part in (
        "numpy",
        "backend cuda",
        "threads",
        "processor",
        "kernel cache",
        "self-test",
        "All is well.",
    ):
        assert part in text


def test_doctor_finds_wrong_results(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_TOLERANCE", 0.0)
    assert call("doctor") == 1
    text = capsys.readouterr().out
    assert "FAILED: largest relative difference" in text
    assert "Something is wrong:\n  - self-test:" in text


def test_doctor_reports_an_error_and_a_missing_backend(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no luck")

    with monkeypatch.context() as patch:
        patch.setattr(racecore, "attention_forward", fail)
        assert call("doctor", "--json") == 1
        assert json.loads(capsys.readouterr().out)["problems"] == [
            "self-test: RuntimeError: no luck"
        ]
    reasons = {"reference": None, "cpu": "numba is not installed", "cuda": "none"}
    monkeypatch.setattr(backends, "available", lambda: reasons)
    assert call("doctor", "--json") == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems == [
        "backend cpu: numba is not installed",
        "self-test: needs the backends cpu and reference",
    ]


# racecore demo


def test_exact_rows_agree_with_the_oracle():
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((90, 1, dim)) for dim in (6, 6, 4, 4))
    planes, rows = rng.standard_normal((3, 2, 6)), np.array([0, 17, 89])
    exact = exact_rows(q[:, 0], k[:, 0], v[:, 0], g[:, 0], planes, 1.3, rows)
    out, _, _ = oracle.attention(q, k, v, planes, 1.3)
    grads = oracle.gradients(q, k, v, planes, 1.3, g)
    for name, wanted in {"out": out, **{f"d_{name}": grads[name] for name in GRADIENTS}}.items():
        np.testing.assert_allclose(
            getattr(exact, name), wanted[rows, 0], rtol=1e-10, atol=1e-13, err_msg=name
        )


def test_exact_rows_over_several_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    arguments = [rng.standard_normal((50, 4)) for _ in range(4)] + [
        rng.standard_normal((2, 2, 4)),
        1.0,
        np.arange(5),
    ]
    whole = exact_rows(*arguments)
    monkeypatch.setattr("racecore.commands.exact_rows._BLOCK", 7)
    cut = exact_rows(*arguments)
    for name in ("out", "d_query", "d_key", "d_value"):
        np.testing.assert_allclose(getattr(cut, name), getattr(whole, name), rtol=1e-12, atol=1e-14)


def test_softmax_attention_of_the_comparison():
    from concurrent.futures import ThreadPoolExecutor

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((150, 2, 8), dtype=np.float32) for _ in range(3))
    weights = np.exp(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(8))
    wanted = np.einsum("hij,jhd->ihd", weights / weights.sum(axis=2, keepdims=True), v)
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_allclose(
            softmax_comparison.softmax_attention(q, k, v, pool), wanted, rtol=1e-4, atol=1e-6
        )


@pytest.mark.process
def test_demo_quick(tmp_path):
    process = start("demo", "--quick", "--threads", 2, cwd=tmp_path)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    for part in (
        "1. Inputs: 4,096 tokens",
        "racecore attend --query racecore-demo/q.npy",
        "d_key",
        "4,096 tokens in",
    ):
        assert part in printed
    for part in ("WRONG", "No picture"):
        assert part not in printed
    assert float(re.search(r"largest    (\S+)", printed)[1]) < 1e-5
    assert re.search(r"plain mean of all values: \d+%", printed)
    assert re.search(r"64 tables +\d+% +\d+%", printed)
    assert re.search(r"softmax (is|was not) faster here", printed, re.IGNORECASE)
    assert re.search(r"All rows are correct; the demo took \d+ s", printed)
    assert (tmp_path / "racecore-demo" / "race_vs_softmax.png").read_bytes().startswith(b"\x89PNG")
    made = {"q", "k", "v", "d_out", "out", "d_query", "d_key", "d_value"}
    assert {path.stem for path in tmp_path.glob("racecore-demo/*.npy")} == made


def test_demo_without_matplotlib_and_with_wrong_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    monkeypatch.setattr(softmax_comparison, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(demo, "_TOLERANCE", 0.0)
    folder = tmp_path / "new" / "folder"
    words = (
        "demo",
        "--quick",
        "--tokens",
        40,
        "--heads",
        1,
        "--head-dim",
        8,
        "--seed",
        3,
        "--folder",
        folder,
    )
    assert call(*words) == 1
    printed = capsys.readouterr().out
    assert "No picture: Matplotlib is not installed (pip install matplotlib)" in printed
    assert "WRONG: more than 0" in printed
    assert "ROWS ARE WRONG" in printed
    monkeypatch.setattr(demo, "_TOLERANCE", 1e-4)
    assert call(*words) == 0  # again, in its own folder
    assert not (folder / "race_vs_softmax.png").exists()


def test_demo_destroys_no_files_of_others(folder, capsys):
    before = pathlib.Path("q.npy").read_bytes()
    assert call("demo", "--quick", "--folder", ".") == 2
    assert (
        "the folder . holds files that are not the demo's; choose another --folder"
        in capsys.readouterr().err
    )
    assert pathlib.Path("q.npy").read_bytes() == before
    assert call("demo", "--folder", "q.npy") == 2
    assert "q.npy exists and is not a folder" in capsys.readouterr().err


def test_the_comparison_names_lengths_where_softmax_is_faster():
    timings = [
        softmax_comparison.Timing(64, 0.002, 0.006, 0.001),
        softmax_comparison.Timing(128, 0.003, 0.009, 0.006),
        softmax_comparison.Timing(256, 0.004, 0.01, None),
    ]
    assert softmax_comparison.lengths_where_softmax_is_faster(timings) == [64]
    lines = softmax_comparison.table(timings).splitlines()
    assert lines[2].endswith("2.0 x slower")
    assert lines[3].endswith("2.0 x faster")
    assert lines[4].endswith("-")


def test_created_files_are_not_sparse(tmp_path):
    array = npy.create(str(tmp_path / "a.npy"), (1 << 18, 1, 4), np.dtype(np.float32))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
    array.flush()
    assert np.load(tmp_path / "a.npy").shape == (1 << 18, 1, 4)
