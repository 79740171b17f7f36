"""Compiled kernels on disk: whatever happens to the files, results are right, at worst slower."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

import racecore
from racecore.runtime import kernel_cache

pytestmark = pytest.mark.process

PROGRAM = """
import json, sys, logging
import numpy as np
messages = []
class Keep(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("racecore").addHandler(Keep())
logging.getLogger("racecore").setLevel(logging.INFO)
from racecore.ops.soft_hash import cpu
x = np.linspace(-1, 1, 60, dtype=np.float32).reshape(10, 2, 3)
out = cpu.soft_hash(x, np.ones((2, 1, 2, 3)), np.ones(2))
compiled = sum(cpu._hash_rows.stats.cache_misses.values())
print(json.dumps({"out": out.tolist(), "messages": messages, "compiled": compiled}))
"""


def compute(folder):
    """Use one kernel in a fresh process that keeps its kernels in `folder`."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return folder, compute(folder)


def kernel_files(folder):
    return sorted((pathlib.Path(folder) / "racecore").glob("*.kernel"))


def test_first_use_says_once_that_it_compiles(filled):
    folder, first = filled
    assert sum("compiling kernels" in message for message in first["messages"]) == 1
    assert first["compiled"] == 1
    assert len(kernel_files(folder)) == 1


def test_the_message_reaches_the_terminal_without_any_set_up(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    program = (
        "import numpy as np; from racecore.ops.soft_hash import cpu\n"
        "cpu.soft_hash(np.ones((3, 1, 2), np.float32), np.ones((1, 1, 2, 2)), np.ones(1))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stderr.count("compiling") == 1
    assert result.stdout == ""


def test_second_process_compiles_nothing_and_is_silent(filled):
    folder, first = filled
    second = compute(folder)
    assert second["compiled"] == 0
    assert second["messages"] == []
    assert second["out"] == first["out"]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "garbage"])
def test_damaged_files_are_compiled_again_and_replaced(filled, tmp_path, damage):
    folder, first = filled
    shutil.copytree(folder / "racecore", tmp_path / "racecore")
    for file in kernel_files(tmp_path):
        content = bytearray(file.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        replacement = {
            "empty": b"",
            "truncated": content[: len(content) // 2],
            "garbage": b"no kernel" * 100,
        }
        file.write_bytes(replacement.get(damage, content))
    again = compute(tmp_path)
    assert again["out"] == first["out"]
    assert again["compiled"] == 1
    assert any("damaged" in message for message in again["messages"])
    assert compute(tmp_path)["compiled"] == 0


def test_a_folder_that_cannot_be_made_costs_only_time(filled, tmp_path):
    _, first = filled
    (tmp_path / "racecore").write_text("a file where the folder should be")
    result = compute(tmp_path)
    assert result["out"] == first["out"]
    assert any("cannot be kept" in message for message in result["messages"])


def test_processes_that_race_for_the_cache_all_end_right(filled, tmp_path):
    _, first = filled
    results = []
    workers = [threading.Thread(target=lambda: results.append(compute(tmp_path))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [result["out"] for result in results] == [first["out"]] * 3
    assert not list((tmp_path / "racecore").glob("*.partial"))
    assert compute(tmp_path)["compiled"] == 0


def test_old_files_of_a_kernel_are_removed_when_a_new_one_is_saved(filled, tmp_path):
    folder, _ = filled
    name = kernel_files(folder)[0].name.rpartition("-")[0]
    (tmp_path / "racecore").mkdir()
    old, recent, other = (
        tmp_path / "racecore" / f
        for f in (f"{name}-0.kernel", f"{name}-1.kernel", "other-0.kernel")
    )
    for file in (old, recent, other):
        file.write_bytes(b"")
    for file in (old, other):
        os.utime(file, (0, 0))
    compute(tmp_path)
    assert not old.exists()
    assert recent.exists()
    assert other.exists()


PACKAGE = pathlib.Path(racecore.__file__).parent


@pytest.fixture
def package(tmp_path):
    """Return a copy of the sources, to be edited."""
    return pathlib.Path(
        shutil.copytree(
            PACKAGE, tmp_path / "racecore", ignore=shutil.ignore_patterns("__pycache__")
        )
    )


def kernel_digest(package):
    return kernel_cache.source_digest(package, kernel_cache.kernel_sources)


def other_digest(package):
    return kernel_cache.source_digest(package, kernel_cache.other_sources)


def edit(package, file, old, new):
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new, 1))


def test_the_digest_is_the_same_in_a_copy_of_the_package(package):
    assert kernel_digest(package) == kernel_digest(PACKAGE)
    assert other_digest(package) == other_digest(PACKAGE)


def test_comments_docstrings_and_blank_lines_compile_nothing(package):
    for file in package.rglob("*.py"):
        text = file.read_text().replace('"""\n', ' More prose."""\n\n', 1)
        file.write_text(f"# a comment\n{text}\n# another one\n")
    assert kernel_digest(package) == kernel_digest(PACKAGE)
    assert other_digest(package) == other_digest(PACKAGE)


def subtract(node):
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        node.op = ast.Sub()


def double(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value = 2 * node.value + 1


def rename(node):
    if isinstance(node, ast.FunctionDef):
        node.name += "_2"


def drop_a_flag(node):
    if isinstance(node, ast.Set):
        del node.elts[0]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("ops/simd/products.py", subtract),
        ("ops/socket/layout.py", double),
        ("chunking.py", double),
        ("ops/causal/cpu.py", rename),
        ("runtime/jit.py", drop_a_flag),
    ],
)
def test_an_operator_a_constant_a_name_or_a_flag_changes_the_digest(package, file, change):
    tree = ast.parse((package / file).read_bytes())
    (package / file).write_text(ast.unparse(tree))
    before = kernel_digest(package)
    for node in ast.walk(tree):
        change(node)
    (package / file).write_text(ast.unparse(tree))
    assert kernel_digest(package) != before


def test_a_new_module_of_kernels_changes_the_digest(package):
    (package / "ops" / "simd" / "new.py").write_text("x = 1\n")
    assert kernel_digest(package) != kernel_digest(PACKAGE)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("ops/soft_hash/reference.py", "def ", "def renamed_"),
        ("ops/reference_rows.py", "def ", "def renamed_"),
        ("ops/soft_hash/cuda.py", "def ", "def renamed_"),
        ("ops/cuda/call.py", "def ", "def renamed_"),
        ("ops/soft_hash/kernels.cu", "+", "-"),
    ],
)
def test_other_backends_compile_nothing_but_change_the_identity(package, file, old, new):
    edit(package, file, old, new)
    assert kernel_digest(package) == kernel_digest(PACKAGE)
    assert other_digest(package) != other_digest(PACKAGE)


def test_the_identity_has_both_digests(monkeypatch):
    before = kernel_cache.identity()
    original = kernel_cache._digest
    for sources in (kernel_cache.kernel_sources, kernel_cache.other_sources):
        monkeypatch.setattr(
            kernel_cache,
            "_digest",
            lambda of, changed=sources: "other" if of is changed else original(of),
        )
        assert kernel_cache.identity() != before


def test_kernels_are_made_from_nothing_that_the_digest_leaves_out():
    """Modules in the digest import no module of racecore outside of it, but for what no kernel
    compiles: arrays, threads and the package's own name.
    """
    sources = kernel_cache.kernel_sources(PACKAGE)
    inside = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in sources}
    harmless = {"runtime/arrays", "runtime/threads", "runtime/cuda", "runtime/progress", "errors"}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.ImportFrom) or not node.module.startswith("racecore"):
                continue
            base = node.module.replace(".", "/").removeprefix("racecore").removeprefix("/")
            for name in [base, *(f"{base}/{alias.name}".lstrip("/") for alias in node.names)]:
                if (PACKAGE / f"{name}.py").exists():
                    assert name in inside | harmless, (path.name, name)


def test_describe(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    description = kernel_cache.describe()
    assert description["folder"] == str(tmp_path / "racecore")
    assert (description["files"], description["bytes"], description["writable"]) == (0, 0, True)
    assert np.isscalar(description["bytes"])
