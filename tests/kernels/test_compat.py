"""The private names of torch still mean what `kernels/_compat.py` takes them to mean."""

import torch
import torch.utils.flop_counter
from mixerzoo.kernels import _compat


class Probe(torch.nn.Module):
    """Adds 1 where the code believes that it is being exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _compat.is_exporting() else x + 0


def test_exporting_is_seen_in_export_and_not_in_compile() -> None:
    x = torch.zeros(2)
    assert not _compat.is_exporting()
    for strict in (False, True):
        assert torch.export.export(Probe(), (x,), strict=strict).module()(x).sum() == 2
    assert torch.compile(Probe(), fullgraph=True, backend="eager")(x).sum() == 0


def test_functional_transforms_are_seen() -> None:
    seen = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.is_differentiated_functionally())
        return x.sum()

    x = torch.zeros(2)
    probe(x)
    torch.func.grad(probe)(x)
    torch.func.vmap(probe)(x[None])
    with torch.autograd.forward_ad.dual_level():
        probe(torch.autograd.forward_ad.make_dual(x, x))
    probe(x)
    assert seen == [False, True, True, True, False]


def test_watchers_of_operators_are_seen() -> None:
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(_compat.is_watched())
            return x + 1

    x = torch.zeros(2)
    Watched()(x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        Watched()(x)
    torch.jit.trace(Watched(), x, check_trace=False)
    torch.export.export(Watched(), (x,), strict=False)
    Watched()(x)
    assert seen[0] is False and seen[-1] is False and len(seen) >= 5 and all(seen[1:-1])
