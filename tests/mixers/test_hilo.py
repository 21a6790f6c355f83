"""HiLo against the authors' records, the padding rule written out, and the ways a module is compiled."""

import json
import math
from pathlib import Path

import pytest
import torch
from mixerzoo.mixers import HiLo
from torch import Tensor, nn
from torch.nn import functional as F

RECORDS = Path(__file__).parent.parent / "goldens" / "lka_ops.json"
FLOORED = "hilo_nopad_lofi_only_13x15"  # the official code drops the last row and column; ours pads
CASES = [name for name in json.loads(RECORDS.read_text())["cases"] if name.startswith("hilo_") and name != FLOORED]
SPLITS = [(0.5, 2), (0.0, 2), (1.0, 2), (0.5, 3), (0.5, 1)]  # alpha, window_size


def build(case) -> HiLo:
    config = case.record["config"]
    bias = config.get("qkv_bias", True)
    mixer = HiLo(
        config["dim"], config["num_heads"], window_size=config["window_size"], alpha=config["alpha"], qkv_bias=bias
    )
    mixer.load_state_dict(case.state())
    return mixer.eval()


def reference(mixer: HiLo, x: Tensor) -> Tensor:
    """One picture, one head, one query at a time; x [B, H, W, C]."""
    side, head_dim, (batch, height, width, _) = mixer.window_size, mixer.head_dim, x.shape
    whole = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    pooled = whole.unflatten(2, (-1, side)).unflatten(1, (-1, side)).mean((2, 4)).flatten(1, 2)
    out = []
    for n in range(batch):
        for i in range(height):
            for j in range(width):
                token = []
                rows, columns = slice(i // side * side, (i // side + 1) * side), slice(j // side * side, None)
                window = whole[n, rows, columns][:, :side].flatten(0, 1)
                if mixer.h_heads:
                    query = mixer.h_qkv(whole[n, i, j]).view(3, mixer.h_heads, head_dim)[0]
                    keys, values = mixer.h_qkv(window).view(-1, 3, mixer.h_heads, head_dim)[:, 1:].unbind(1)
                    token.append(mixer.h_proj(attend(query, keys, values)))
                if mixer.l_heads:
                    query = mixer.l_q(x[n, i, j]).view(mixer.l_heads, head_dim)
                    keys, values = mixer.l_kv(pooled[n]).view(-1, 2, mixer.l_heads, head_dim).unbind(1)
                    token.append(mixer.l_proj(attend(query, keys, values)))
                out.append(torch.cat(token))
    return torch.stack(out).view(x.shape)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query [heads, d]; keys and values [keys, heads, d]."""
    heads = [
        (keys[:, h] @ query[h] / math.sqrt(query.shape[-1])).softmax(0) @ values[:, h] for h in range(query.shape[0])
    ]
    return torch.cat(heads)


@pytest.mark.parametrize("name", CASES)
def test_official_outputs_and_gradients(operator_case, name: str) -> None:
    case = operator_case("lka_ops", name)
    mixer, config = build(case), case.record["config"]
    x = case.draw("x", case.record["x_shape"]).requires_grad_()
    y = mixer(x.unflatten(1, (config["H"], config["W"]))).flatten(1, 2)
    (y * case.draw("g", y.shape)).sum().backward()
    assert case.error(case.record["y"], y) < 5e-6
    assert case.error(case.record["grad_x"], x.grad) < 5e-6
    for parameter, tensor in mixer.named_parameters():
        assert case.error(case.record["param_grads"][parameter], tensor.grad) < 2e-5, parameter


def test_the_official_flooring_is_not_reproduced(operator_case) -> None:
    """Its record is the pooled path over the map without its last row and column, asked by every position."""
    case = operator_case("lka_ops", FLOORED)
    mixer = build(case)
    x = case.draw("x", case.record["x_shape"]).unflatten(1, (13, 15))
    floored = mixer._low_frequency(x, x[:, :12, :14]).flatten(1, 2)
    assert case.error(case.record["y"], floored) < 5e-6
    assert case.error(case.record["y"], mixer(x).flatten(1, 2)) > 1e-2


@pytest.mark.parametrize(("alpha", "window_size"), SPLITS)
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1), (7, 4)])
def test_every_size_equals_the_definition(alpha: float, window_size: int, size: tuple[int, int]) -> None:
    mixer = HiLo(12, 4, alpha=alpha, window_size=window_size).double()
    x = torch.randn(2, *size, 12, dtype=torch.double)
    torch.testing.assert_close(mixer(x), reference(mixer, x))
    turned = x.transpose(1, 2)  # not contiguous
    torch.testing.assert_close(mixer(turned), mixer(turned.contiguous()))


def test_heads_are_split_as_officially() -> None:
    table = json.loads(RECORDS.read_text())["hilo_heads"]
    assert len(table) == 90
    for entry, low in table.items():
        heads, alpha = entry.split("*")
        mixer = HiLo(int(heads), int(heads), alpha=float(alpha), device="meta")
        assert (mixer.l_heads, mixer.h_heads) == (low, int(heads) - low), entry


def test_a_path_without_heads_has_no_parameters() -> None:
    names = {"low": {"l_q", "l_kv", "l_proj"}, "high": {"h_qkv", "h_proj"}}
    for arguments, parts in [({"alpha": 1.0}, "low"), ({"window_size": 1}, "low"), ({"alpha": 0.0}, "high")]:
        state = HiLo(8, 4, **arguments).state_dict()
        assert {name.split(".")[0] for name in state} == names[parts]


def test_window_one_is_plain_attention() -> None:
    mixer = HiLo(16, 4, window_size=1, alpha=0.3).double()
    plain = nn.MultiheadAttention(16, 4, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([mixer.l_q.weight, mixer.l_kv.weight]))
        plain.in_proj_bias.copy_(torch.cat([mixer.l_q.bias, mixer.l_kv.bias]))
        plain.out_proj.load_state_dict(mixer.l_proj.state_dict())
    x = torch.randn(2, 3, 5, 16, dtype=torch.double)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(mixer(x).flatten(1, 2), plain(tokens, tokens, tokens)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    mixer = HiLo(32, 4)
    x = torch.randn(2, 7, 6, 32)
    want = mixer(x)
    got = mixer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and (got.float() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("alpha", "window_size"), [SPLITS[0], *(pytest.param(*split, marks=pytest.mark.slow) for split in SPLITS[1:])]
)
@torch.no_grad()
def test_scripted_and_compiled(alpha: float, window_size: int) -> None:
    mixer = HiLo(16, 4, alpha=alpha, window_size=window_size).eval()
    scripted = torch.jit.script(mixer)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for size in [(4, 6), (3, 5), (1, 1)]:
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(scripted(x), mixer(x))
        torch.testing.assert_close(compiled(x), mixer(x))


@torch.no_grad()
def test_compiled_without_padding_where_none_is_needed() -> None:
    """torch 2.11's compiler says of itself that it exports."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    torch.compile(HiLo(16, 4).eval(), backend=keep, fullgraph=True)(torch.randn(2, 4, 6, 16))
    (graph,) = graphs
    assert not [node for node in graph.graph.nodes if "pad" in str(node.target)]


@pytest.mark.parametrize(("alpha", "window_size"), [(0.5, 2), (0.5, 1)])
@torch.no_grad()
def test_exports_with_dynamic_sizes(alpha: float, window_size: int) -> None:
    mixer = HiLo(16, 4, alpha=alpha, window_size=window_size).eval()
    shapes = ({axis: torch.export.Dim.DYNAMIC for axis in range(3)},)
    program = torch.export.export(mixer, (torch.randn(2, 6, 9, 16),), dynamic_shapes=shapes)
    for size in [(4, 6), (5, 7), (12, 8)]:
        x = torch.randn(3, *size, 16)
        torch.testing.assert_close(program.module()(x), mixer(x), atol=1e-5, rtol=1e-5)


def test_other_devices_take_the_fused_kernel() -> None:
    """The meta device stands for them: the shapes fit."""
    assert HiLo(16, 4, device="meta")(torch.empty(2, 5, 6, 16, device="meta")).shape == (2, 5, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10}, "multiple of num_heads; got dim 10 and num_heads 4"),
        ({"num_heads": 0}, "got dim 8 and num_heads 0"),
        ({"window_size": 0}, "window_size must be 1 or more.*got 0"),
        ({"alpha": 1.1}, "from 0 to 1; got 1.1"),
        ({"alpha": -0.1}, "from 0 to 1; got -0.1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiLo(**{"dim": 8, "num_heads": 4, **arguments})


SHAPES = [(1, 8, 8), (1, 5, 5, 9), (1, 0, 5, 8), (1, 5, 0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window_size", [1, 2])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...], window_size: int) -> None:
    with pytest.raises(ValueError, match=r"needed \[B, H, W, 8 channels\] with H, W >= 1; got shape"):
        HiLo(8, 2, window_size=window_size)(torch.zeros(shape))


def test_a_batch_of_none_stays_one() -> None:
    assert HiLo(8, 2)(torch.zeros(0, 5, 4, 8)).shape == (0, 5, 4, 8)
