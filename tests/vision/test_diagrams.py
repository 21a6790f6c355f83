"""The diagram of HiLo shows what the module computed."""

from pathlib import Path

import pytest
import torch
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from mixerzoo.mixers import HiLo
from mixerzoo.vision.diagrams import DIM, SIDE, draw_hilo, load_picture, make_mixer, make_tokens, trace_hilo
from mixerzoo.vision.visualize import main
from PIL import Image


@torch.no_grad()
def test_drawn_attention_is_the_module_s() -> None:
    mixer = make_mixer()
    assert (mixer.h_heads, mixer.l_heads) == (2, 10)
    inputs: dict[str, torch.Tensor] = {}
    for name in ("h_proj", "l_proj"):
        getattr(mixer, name).register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    tokens = make_tokens(torch.rand(3, 64, 64))
    assert tokens.shape == (1, SIDE, SIDE, DIM)
    trace = trace_hilo(mixer, torch.rand(3, 64, 64), tokens, (9, 5))
    assert trace.window.shape == (4, 4) and trace.pooled.shape == (7, 7)
    torch.testing.assert_close(trace.window.sum(1), torch.ones(4))
    torch.testing.assert_close(trace.pooled.sum(), torch.tensor(1.0))
    assert trace.shapes["h_qkv"] == (14, 14, 48) and trace.shapes["l_kv"] == (7, 7, 160)

    # The same value in every head turns the output into values weighted by the mean attention that is drawn.
    h_value, l_value = mixer.h_qkv.weight[-16:].view(2, 8, DIM), mixer.l_kv.weight[-80:].view(10, 8, DIM)
    h_value[:], l_value[:] = h_value[:1].clone(), l_value[:1].clone()
    trace = trace_hilo(mixer, torch.rand(3, 64, 64), tokens, (9, 5))
    values = tokens[0, 8:10, 4:6].flatten(0, 1) @ h_value[0].T
    got = inputs["h_proj"][0, 8:10, 4:6].flatten(0, 1).view(4, 2, 8).mean(1)
    torch.testing.assert_close(trace.window @ values, got, atol=1e-5, rtol=1e-4)
    pooled = torch.nn.functional.avg_pool2d(tokens.permute(0, 3, 1, 2), 2)[0].flatten(1).T
    got = inputs["l_proj"][0, 9, 5].view(10, 8).mean(0)
    torch.testing.assert_close(trace.pooled.flatten() @ (pooled @ l_value[0].T), got, atol=1e-5, rtol=1e-4)


def test_the_picture_says_what_the_module_has() -> None:
    mixer, tokens = HiLo(24, 4, window_size=3, alpha=0.5), torch.randn(1, 12, 12, 24)
    figure = draw_hilo(trace_hilo(mixer, torch.rand(3, 64, 64), tokens, (4, 8)))
    texts = " ".join(text.get_text() for text in figure.findobj(Text))
    for said in ("2 of 4 heads see the pooled map, 2 see windows", "map [12, 12, 24]", "16 windows of 3 x 3 tokens"):
        assert said in texts
    corners = {(box.get_x(), box.get_y()) for box in figure.findobj(Rectangle) if box.get_width() == 3}
    assert corners == {(6, 3)}, "the window of the query, in both maps"


def test_a_picture_of_a_folder(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    assert main(["hilo", "--folder", str(tmp_path), "--query", "0", "13", "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new" / "hilo_paths.png").read_bytes().startswith(b"\x89PNG")
    assert torch.allclose(load_picture(tmp_path / "picture.png")[0], torch.ones(224, 224))


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hilo", "--query", "14", "0", "--output", str(tmp_path)]) == 2
    assert "from 0 to 13; got (14, 0)" in capsys.readouterr().err
    assert main(["hilo", "--folder", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "has 0 images" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
