"""OpenVINO's files of a model: writing them from an ONNX file, and running them.

Unusual: OpenVINO reads the ONNX file rather than the program of torch.export, in which it has no rule for the largest
of two sizes. `read_model` is used, not `convert_model`: the latter sends usage statistics to its authors, and so does
the import of openvino if openvino_telemetry can be imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._messages import one_line
from ._programs import ExportError


def import_openvino() -> Any:
    """Import openvino so that it sends no usage statistics; an import before this one may have sent some."""
    modules: dict[str, Any] = sys.modules  # type: ignore[assignment]
    if "openvino" in modules or "openvino_telemetry" in modules:
        return importlib.import_module("openvino")
    modules["openvino_telemetry"] = None  # as if it were not installed
    try:
        return importlib.import_module("openvino")
    finally:
        del modules["openvino_telemetry"]


def write_openvino(onnx: Path, draft: Path, metadata: dict[str, Any]) -> None:
    """Write the graph of an ONNX file to `draft`, an `.xml` file, and its float32 weights to the `.bin` file beside it.

    Each value of `metadata` becomes JSON in the file's rt_info, under "mixerzoo".
    """
    openvino = import_openvino()
    try:
        model = openvino.Core().read_model(onnx)
    except Exception as error:
        raise ExportError(f"OpenVINO cannot translate this model: {one_line(error)}") from error
    _resize_as_pillow(model)
    for key, value in metadata.items():
        model.set_rt_info(json.dumps(value), ["mixerzoo", key])
    openvino.save_model(model, draft, compress_to_fp16=False)


_PILLOW = {"cubic": "bicubic_pillow", "linear_onnx": "bilinear_pillow"}


def _resize_as_pillow(model: Any) -> None:
    """Replace interpolations with antialiasing, such as those of position embeddings, by the modes named after Pillow.

    These are what torch computes. The CPU plugin (2026.4) gets antialiasing in the other modes wrong.
    """
    openvino = import_openvino()
    for node in model.get_ordered_ops():
        found = node.get_attributes() if node.get_type_name() == "Interpolate" else {}
        half_pixel = found.get("coordinate_transformation_mode") == "half_pixel"
        if found.get("antialias") and half_pixel and found["mode"] in _PILLOW:
            image, size, *axes = [source.get_source_output() for source in node.inputs()]
            kept = {key: found[key] for key in ("shape_calculation_mode", "pads_begin", "pads_end", "cube_coeff")}
            if not axes:  # these modes take the sizes of two axes
                axes, size = [[2, 3]], openvino.opset8.gather(size, [2, 3], 0)
            new = openvino.opset11.interpolate(image, size, _PILLOW[found["mode"]], axes=axes[0], **kept)
            openvino.utils.replace_node(node, new)


def run_openvino(draft: Path, images: list[Tensor]) -> list[list[Tensor]]:
    """Run OpenVINO's files on the CPU in float32; without the hint some processors compute in bfloat16."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = import_openvino().Core().compile_model(draft, "CPU", settings)
    return [[torch.tensor(out) for out in model(image.numpy()).values()] for image in images]
