"""Importing racecore is cheap and loads NumPy only."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import json, sys, time
import numpy
start = time.process_time()  # not of the clock: the machine may be busy
import racecore
seconds = time.process_time() - start
names = ("cupy", "torch", "jax", "numba", "dask", "scipy", "tqdm", "matplotlib")
heavy = [name for name in names if name in sys.modules]
print(json.dumps({"seconds": seconds, "heavy": heavy}))
"""


def test_import_is_quick_and_light():
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert runs[0]["heavy"] == []
    assert min(run["seconds"] for run in runs) < 0.3


def test_public_names_exist_and_are_documented():
    import racecore

    for name in racecore.__all__:
        thing = getattr(racecore, name)
        assert name == "__version__" or thing.__doc__, name
