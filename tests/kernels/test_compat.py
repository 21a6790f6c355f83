"""The private names of torch still mean what `kernels/_compat.py` takes them to mean."""

from pathlib import Path

import pytest
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


class Turn(torch.nn.Module):
    """Turns x by five places, with the remainder of `divide_with_remainder` or of torch."""

    def __init__(self, *, divides: bool) -> None:
        super().__init__()
        self.divides = divides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        number, length = torch.arange(x.shape[0]) + 5, x.shape[0]
        return x[_compat.divide_with_remainder(number, length)[1] if self.divides else number % length]


def _as_onnx(model: torch.nn.Module) -> torch.onnx.ONNXProgram:
    free = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.onnx.export(torch.export.export(model, (torch.randn(7),), dynamic_shapes=free), verbose=False)
    assert exported is not None
    return exported


def test_division_by_a_free_size_is_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = Turn(divides=True), torch.randn(9)
    _as_onnx(model).save(tmp_path / "turn.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "turn.onnx")
    (turned,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.as_tensor(turned), model(x))
    torch.testing.assert_close(model(x), x.roll(-5))


def test_the_remainder_by_a_free_size_still_needs_the_difference() -> None:
    """If this fails, torch.onnx has learnt it, and `divide_with_remainder` can become `divmod`."""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"aten\.remainder"):
        _as_onnx(Turn(divides=False))
