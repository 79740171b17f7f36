"""racecore in PyTorch: a function, a module, and a cache for decoding.

>>> import torch
>>> from racecore.adapters.torch import RaceAttention
>>> attention = RaceAttention(64, 4)
>>> attention(torch.randn(2, 1000, 64)).shape
torch.Size([2, 1000, 64])

Tensors in host memory go to the Numba kernels, tensors on a GPU to the CUDA kernels on PyTorch's
current stream, both without a copy and in their dtype. `function` has the calls for autograd,
`operator` the operators for the compiler, `tensors` the conversion of tensors to arrays and back,
`module` and `cache` the parts of models.
"""

from racecore.adapters.torch.cache import RaceCache
from racecore.adapters.torch.function import race_attention, race_sdpa
from racecore.adapters.torch.module import RaceAttention

__all__ = ["RaceAttention", "RaceCache", "race_attention", "race_sdpa"]
