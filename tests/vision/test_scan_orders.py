"""The picture of scan orders shows the paths that the operators take."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.text import Annotation
from mixerzoo.kernels.cross_scan import ATROUS, CROSS
from mixerzoo.vision.scan_orders import ROWS, VIM, draw_scan_orders, steps_of
from mixerzoo.vision.visualize import main
from PIL import Image


def test_paths_visit_what_the_family_says() -> None:
    places = {(column + 0.5, row + 0.5) for column in range(6) for row in range(6)}
    for path in CROSS:
        assert set(steps_of(path, 6)) == places
    grids = [steps_of(path, 6) for path in ATROUS]
    assert sorted(itertools.chain(*grids)) == sorted(places), "each patch once"
    rows, columns = (steps_of(path, 6) for path in CROSS[:2])
    assert rows[:2] == [(0.5, 0.5), (1.5, 0.5)] and columns[:2] == [(0.5, 0.5), (0.5, 1.5)]
    assert steps_of(CROSS[2], 6) == rows[::-1] and steps_of(CROSS[3], 6) == columns[::-1]


@torch.no_grad()
def test_the_class_token_stands_where_vim_puts_it() -> None:
    model = timm.create_model("vim_tiny", depth=1, img_size=96).eval()
    model.pos_embed.zero_()
    model.cls_token.fill_(7.0)
    sequence = model._pos_embed(torch.zeros(1, 6, 6, 192))
    sequence = sequence[0] if isinstance(sequence, tuple) else sequence
    (place,) = (sequence.flatten(0, -2).abs().amax(-1) > 1).nonzero(as_tuple=True)
    drawn = steps_of(VIM.paths[0], 6, has_token=True)
    assert len(drawn) == 37 and drawn.index((3.0, 3.0)) == place.item() == 18


def test_every_step_is_an_arrow() -> None:
    figure = draw_scan_orders(torch.rand(3, 32, 32), side=4)
    panels = figure.axes
    assert len(panels) == sum(len(order.paths) for orders in ROWS for order in orders) == 12
    arrows = [[a for a in axes.get_children() if isinstance(a, Annotation)] for axes in panels]
    assert [len(of) for of in arrows] == [15] * 4 + [3] * 4 + [15] * 2 + [16] * 2
    first = arrows[2][0]  # VMamba's third path begins at the end
    assert first.xyann == (3.5, 3.5) and first.xy == (2.5, 3.5)


def test_a_picture_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    assert main(["scan_orders", "--folder", str(tmp_path), "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "scan_orders.png").read_bytes().startswith(b"\x89PNG")
