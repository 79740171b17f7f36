"""A key/value cache on the disk: which of its pages a step reads, and what memory it takes."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"

LONG_CACHE = """
import json, pathlib, sys
import long_cache as example

folder, n_tokens = pathlib.Path(sys.argv[1]), int(sys.argv[2])
example.warm_up()
example.write(folder, n_tokens)
index = example.racecore.SocketIndex.load(folder / "index.npz")
key, value = example.mapped(folder / "keys"), example.mapped(folder / "values")
at_first = int(example.in_memory(key).sum() + example.in_memory(value).sum())
base = example.anonymous_bytes()
with example.PeakMemory() as memory:
    steps = [step._asdict() for step in example.decode(index, key, value, 3)]
pages = 2 * len(example.in_memory(key))
print(json.dumps({"at_first": at_first, "pages": pages, "own": memory.peak - base, "steps": steps}))
"""


@pytest.mark.parametrize("n_tokens", [200_000, 400_000])
def test_a_cache_on_the_disk_is_read_where_rows_were_chosen_and_nowhere_else(tmp_path, n_tokens):
    done = subprocess.run(
        [sys.executable, "-c", LONG_CACHE, str(tmp_path), str(n_tokens)],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found["at_first"]:
        pytest.skip(
            "this file system keeps its pages in memory, so which of them are read cannot be seen"
        )
    assert found["pages"] == n_tokens * 2 * 2 * 64 * 2 // 4096
    for step in found["steps"]:
        assert step["read"] == step["wanted"] <= 2 * 8 * (2048 + 256)
        assert step["found"]
    assert sum(step["read"] for step in found["steps"]) < found["pages"]
    scores = 4 * n_tokens * 4  # of the heads of a key/value head
    assert found["own"] <= scores + 16e6  # the files have 51 and 102 MB each
