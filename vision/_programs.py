"""Programs of torch.export: tracing with free sizes, finding the bounds of these sizes, writing ONNX, running `.pt2`.

Unusual: a model is traced once, with `Dim.AUTO`. A named `Dim` would reject every model that has a smallest size; AUTO
finds that size. A bound on a product of two sizes belongs to neither axis and is found by running the program.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ._messages import one_line

Shape = tuple[int, int, int, int]

AXES = {0: "batch", 2: "height", 3: "width"}
OPSET = 20


class ExportError(RuntimeError):
    """Raised if a model cannot be traced or its file gives other outputs; nothing is written."""


def trace(module: nn.Module, image: Tensor, free: list[int]) -> ExportedProgram:
    """Trace the module with the given axes free or, if that fails, with only the batch free."""
    shapes = {axis: Dim.AUTO for axis in free}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch that no caller of ours can act on
        try:
            return torch.export.export(module, (image,), dynamic_shapes=(shapes,))
        except Exception as error:
            if len(free) > 1:
                return trace(module, image, [0])
            raise ExportError(f"torch.export cannot trace this model: {one_line(error)}") from error


def free_axes(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the axes that stayed free, with their bounds. An axis that the model used as a constant is missing."""
    (name,) = program.graph_signature.user_inputs
    image = next(node for node in program.graph.nodes if node.name == name).meta["val"]
    bounds = {str(symbol): bound for symbol, bound in program.range_constraints.items()}
    axes: dict[str, tuple[int, int | None]] = {}
    for axis, label in AXES.items():
        if not isinstance(image.shape[axis], int):
            bound = bounds.get(str(image.shape[axis]))
            low, high = (int(bound.lower), bound.upper) if bound is not None else (1, None)
            # torch writes 2 for every axis that is not the constant 1, and does not check it.
            axes[label] = (1 if low == 2 else low, int(high) if high is not None and high < 2**31 else None)
    return axes


def raise_bounds(
    program: ExportedProgram, traced: Shape, axes: dict[str, tuple[int, int | None]]
) -> dict[str, tuple[int, int | None]]:
    """Raise the smallest height and width until the program accepts them.

    A bound on the product of both appears in neither axis. It is found by bisection, moving height and width together
    from their own bounds to the traced size.
    """
    run = program.module()
    labels = [label for label in ("height", "width") if label in axes]

    def sizes(share: float) -> dict[str, int]:
        lows = {label: axes[label][0] for label in labels}
        own = dict(zip(AXES.values(), (traced[axis] for axis in AXES), strict=True))
        return own | {label: low + math.ceil(share * (own[label] - low)) for label, low in lows.items()}

    def accepted(share: float) -> bool:
        size = sizes(share)
        try:
            run(torch.zeros(traced[0], traced[1], size["height"], size["width"]))
        except Exception:  # a guard is an AssertionError, a size that no layer takes a RuntimeError
            return False
        return True

    share, refused = 0.0, 0.0
    if labels and not accepted(0.0):
        share = 1.0
        while sizes(share) != sizes(refused) and share - refused > 1e-3:
            middle = (share + refused) / 2
            share, refused = (middle, refused) if accepted(middle) else (share, middle)
    return axes | {label: (sizes(share)[label], axes[label][1]) for label in labels}


def write_onnx(
    program: ExportedProgram,
    draft: Path,
    names: list[str],
    axes: dict[str, tuple[int, int | None]],
    metadata: dict[str, Any],
) -> None:
    """Write the program as ONNX. Each value of `metadata` becomes JSON in the file's metadata."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=names,
                dynamic_shapes=({axis: label for axis, label in AXES.items() if label in axes},),
                verbose=False,
                optimize=False,
            )
            assert onnx_program is not None  # None belongs to the exporter that dynamo=True replaces
            # Layers compute the same sizes again and again: with one of each, optimising takes half the time.
            CommonSubexpressionEliminationPass()(onnx_program.model)
            onnx_program.optimize()
        except Exception as error:
            raise ExportError(f"torch.onnx cannot translate this model: {one_line(error)}") from error
    onnx_program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    onnx_program.save(draft, external_data=False)


def run_onnx(draft: Path, images: list[Tensor]) -> list[list[Tensor]]:
    """Run an ONNX file by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
    return [[torch.from_numpy(out) for out in session.run(None, {"image": image.numpy()})] for image in images]


_RUN_PT2 = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
outputs = [program(image) for image in torch.load(sys.argv[2], weights_only=True)]
torch.save([[out] if isinstance(out, torch.Tensor) else list(out) for out in outputs], sys.argv[3])
assert not {"mixerzoo", "timm"} & set(sys.modules), "the program needs more than torch"
"""


def run_pt2(draft: Path, images: list[Tensor]) -> list[list[Tensor]]:
    """Run a `.pt2` file in a new process that imports torch alone, as a user of the file may."""
    given, returned = draft.with_name("images.pt"), draft.with_name("outputs.pt")
    torch.save(images, given)
    command = [sys.executable, "-I", "-c", _RUN_PT2, *map(str, (draft, given, returned))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return torch.load(returned, weights_only=True)
