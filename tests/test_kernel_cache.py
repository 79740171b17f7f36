"""Compiled kernels on disk: whatever happens to the files, results are right and at worst slower."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

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


def test_an_edited_helper_makes_other_file_names(monkeypatch):
    """The name depends on every source that kernels are made from, also those of helpers in other
    modules.
    """
    before = kernel_cache._source_digest()
    kernel_cache._source_digest.cache_clear()
    original = pathlib.Path.read_bytes

    def edited(self):
        return original(self) + (b"# edited" if self.name == "products.py" else b"")

    monkeypatch.setattr(pathlib.Path, "read_bytes", edited)
    assert kernel_cache._source_digest() != before
    monkeypatch.undo()
    kernel_cache._source_digest.cache_clear()
    assert kernel_cache._source_digest() == before


def test_describe(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    description = kernel_cache.describe()
    assert description["folder"] == str(tmp_path / "racecore")
    assert (description["files"], description["bytes"], description["writable"]) == (0, 0, True)
    assert np.isscalar(description["bytes"])
