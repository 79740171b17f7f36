"""Time before anything is computed: import, and the first call with an empty or filled cache."""

from __future__ import annotations

import shutil
import tempfile

from .common import seconds_in_fresh_process

IMPORT = (
    "import time, numpy; t = time.perf_counter(); import racecore; print(time.perf_counter() - t)"
)
FIRST_CALL = """
import time, numpy as np, racecore
x = np.ones((100, 1, 16), np.float32)
t = time.perf_counter()
{call}
print(time.perf_counter() - t)
"""
CALLS = {
    "forward": "racecore.attention(x, x, x)",
    "causal forward and backward": "racecore.attention_backward(*racecore.attention_forward(x, x, "
    "x, is_causal=True))",
}


def track_import():
    """Seconds for `import racecore` beyond NumPy, the best of five processes."""
    return min(seconds_in_fresh_process(IMPORT) for _ in range(5))


track_import.unit = "seconds"


class FirstCall:
    """The first call of a process; an empty cache is what a newcomer has."""

    params = (["empty", "filled"], list(CALLS))
    param_names = ("cache", "call")
    timeout = 600

    def setup(self, cache, call):
        self.folder = tempfile.mkdtemp(prefix="racecore-bench-")
        self.code = FIRST_CALL.format(call=CALLS[call])
        if cache == "filled":
            seconds_in_fresh_process(self.code, self.folder)

    def teardown(self, cache, call):
        shutil.rmtree(self.folder, ignore_errors=True)

    def track_first_call(self, cache, call):
        return seconds_in_fresh_process(self.code, self.folder)

    track_first_call.unit = "seconds"
