"""Select between implementations by timing them, on GPUs, if `torch.backends.cudnn.benchmark` is on.

That flag already means "measure each new shape once and keep the fastest"; here it covers the alternatives to cuDNN as
well. If it is off, the first method runs, which is PyTorch's own.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_fastest: dict[Hashable, str] = {}


def seconds(run: Callable[[], Tensor]) -> float:
    """Return the median seconds of one call of `run`, after warm-up and with the device synchronised."""
    from torch.utils.benchmark import Timer  # imported here because it pulls in torch's build tools, which is slow

    return Timer("run()", globals={"run": run}).timeit(20).median


def run_fastest(key: Hashable, methods: Sequence[str], run: Callable[[str], Tensor]) -> Tensor:
    """Return the result of `run` for the fastest of `methods`; `key` must contain all that the time depends on."""
    chosen = methods[0]
    if torch.backends.cudnn.benchmark and len(methods) > 1:
        if key not in _fastest and not torch.cuda.is_current_stream_capturing():
            _fastest[key] = min(methods, key=lambda method: seconds(lambda: run(method)))
        chosen = _fastest.get(key, chosen)
    return run(chosen)
