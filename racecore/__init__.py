"""racecore: RACE attention over millions of tokens, forward and backward, in linear time.

>>> import numpy as np, racecore
>>> rng = np.random.default_rng(0)
>>> q, k, v = (rng.standard_normal((4096, 4, 64), dtype=np.float32) for _ in range(3))
>>> racecore.attention(q, k, v, is_causal=True).shape
(4096, 4, 64)

Importing racecore loads NumPy and nothing heavier; kernels are compiled when first used.
"""

from racecore import errors, exact, outofcore
from racecore._version import __version__
from racecore.gradients import Gradients, StateGradient
from racecore.race_attention import attention, attention_backward, attention_forward
from racecore.runtime.threads import threads
from racecore.soft_lsh import SoftLSH
from racecore.sparse import SocketIndex, sparse_attention
from racecore.state import RaceState

__all__ = [
    "Gradients",
    "RaceState",
    "SocketIndex",
    "SoftLSH",
    "StateGradient",
    "__version__",
    "attention",
    "attention_backward",
    "attention_forward",
    "errors",
    "exact",
    "outofcore",
    "sparse_attention",
    "threads",
]
