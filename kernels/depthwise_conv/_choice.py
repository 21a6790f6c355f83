"""Choosing between implementations by the clock, on GPUs, where `torch.backends.cudnn.benchmark` asks for it.

That switch already means "measure each new shape once and keep the fastest"; here it covers cuDNN's rivals as well.
Without it the first of the methods runs, which is PyTorch's own.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_fastest: dict[Hashable, str] = {}


def seconds(run: Callable[[], Tensor]) -> float:
    """Of one call, after warming up and with the device synchronised."""
    from torch.utils.benchmark import Timer  # imports torch's build tools, for whose sake nobody should wait

    return Timer("run()", globals={"run": run}).timeit(20).median


def run_fastest(key: Hashable, methods: Sequence[str], run: Callable[[str], Tensor]) -> Tensor:
    """The result of `run` for the fastest of `methods`; `key` names all that the time depends on."""
    chosen = methods[0]
    if torch.backends.cudnn.benchmark and len(methods) > 1:
        if key not in _fastest and not torch.cuda.is_current_stream_capturing():
            _fastest[key] = min(methods, key=lambda method: seconds(lambda: run(method)))
        chosen = _fastest.get(key, chosen)
    return run(chosen)
