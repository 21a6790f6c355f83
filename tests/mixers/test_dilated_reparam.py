"""Dilated re-parameterised convolution: the official block, and a merged kernel that is never stale."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixerzoo.mixers import DepthwiseConv2d, DilatedReparamBlock
from mixerzoo.mixers.dilated_reparam import PUBLISHED_BRANCHES, spread_taps
from timm.layers import freeze_batch_norm_2d
from timm.utils import ModelEmaV3, reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def randomized(module: nn.Module) -> nn.Module:
    """With statistics and weights that no two branches share; in evaluation."""
    for norm in module.modules():
        if isinstance(norm, NORMS):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return module.eval()


def block(dim: int = 6, kernel_size: int = 7, **kwargs: Any) -> DilatedReparamBlock:
    return randomized(DilatedReparamBlock(dim, kernel_size, **kwargs))


def by_definition(module: DilatedReparamBlock, x: Tensor) -> Tensor:
    """The sum of all branches, by PyTorch's own convolution and norm, with running statistics."""
    out = torch.zeros_like(x)
    for branch in (module.large, *module.small.values()):
        conv, norm = branch.conv, branch.norm
        y = F.conv2d(x, conv.weight, padding=conv.padding, dilation=conv.dilation, groups=len(conv.weight))
        out = out + F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0, norm.eps)
    return out


def assert_right(module: DilatedReparamBlock, x: Tensor | None = None) -> None:
    """In evaluation, with gradients and without, remembered or not."""
    parameter = module.large.conv.weight
    x = torch.randn(2, module.dim, 9, 11, device=parameter.device, dtype=parameter.dtype) if x is None else x
    want = by_definition(module, x)
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)


# Against the official block


def ours(name: str) -> str:
    """The name of a parameter of the official block."""
    for theirs, new in [("lk_origin.", "large.conv."), ("origin_bn.", "large.norm."), ("dil_conv_", "small.")]:
        name = name.replace(theirs, new)
    if name.startswith("dil_bn_"):
        return name.replace("dil_bn_", "small.").replace(".", ".\0", 2).replace("\0", "", 1).replace("\0", "norm.")
    return name.replace(".weight", ".conv.weight") if name.startswith("small.") else name


@pytest.mark.parametrize("kernel_size", PUBLISHED_BRANCHES)
def test_official_outputs_and_gradients(operator_case: Callable, kernel_size: int) -> None:
    case = operator_case("lka_ops", f"dilated_reparam_k{kernel_size}")
    record = case.record
    published = list(zip(record["kernel_sizes"], record["dilates"], strict=True))
    assert published == [tuple(branch) for branch in PUBLISHED_BRANCHES[kernel_size]]
    module = DilatedReparamBlock(16, kernel_size)
    module.load_state_dict({ours(name): tensor for name, tensor in case.state().items()})
    module.eval()
    x = case.draw("x", record["x_shape"]).requires_grad_()
    y = module(x)
    y.backward(case.draw("g", y.shape))
    assert case.error(record["y"], y) < 3e-6
    assert case.error(record["grad_x"], x.grad) < 3e-6
    parameters = dict(module.named_parameters())
    assert parameters.keys() == {ours(name) for name in record["param_grads"]}
    for name, want in record["param_grads"].items():
        assert case.error(want, parameters[ours(name)].grad) < 1e-5, name

    fused = module.fuse()
    assert case.error(record["merged_weight"], fused.weight) < 1e-6
    assert case.error(record["merged_bias"], fused.bias) < 1e-6
    assert case.error(record["y_merged"], fused(x)) < 3e-6


# Training and evaluation


def test_training_is_the_sum_of_normalised_branches() -> None:
    module = block().train()
    x = torch.randn(3, 6, 8, 10)
    want = torch.zeros_like(x)
    for branch in (module.large, *module.small.values()):
        conv, norm = branch.conv, branch.norm
        y = F.conv2d(x, conv.weight, padding=conv.padding, dilation=conv.dilation, groups=6)
        want = want + F.batch_norm(y, None, None, norm.weight, norm.bias, True, 0, norm.eps)
    before = module.large.norm.running_mean.clone()
    torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)
    assert not torch.equal(module.large.norm.running_mean, before)
    assert_right(module.eval())


def test_one_convolution_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    import mixerzoo.mixers.dilated_reparam as module_file

    calls = []
    convolve = module_file.convolve
    monkeypatch.setattr(module_file, "convolve", lambda *args: calls.append(args[1]) or convolve(*args))
    module = block()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        module(x), module(x)
    assert len(calls) == 2 and calls[0] is calls[1], "merged once"
    module(x)
    assert calls[2].requires_grad, "merged anew where a gradient is wanted"
    with torch.no_grad():
        module.eval()(x)
    assert calls[3] is not calls[1], "eval() forgets"
    module.train()(x)
    assert len(calls) == 4


def test_the_norms_decide() -> None:
    module, x = block(), torch.randn(2, 6, 8, 8)
    frozen = copy.deepcopy(module).train()
    for norm in frozen.modules():
        if isinstance(norm, NORMS):
            norm.eval()
    torch.testing.assert_close(frozen(x), module(x))
    adapting = copy.deepcopy(module)
    adapting.small["k3_2"].norm.train()
    shifted = x + 3 * torch.randn(6, 1, 1)
    assert (adapting(shifted) - module(shifted)).abs().max() > 0.1, "batch statistics are heard"


@pytest.mark.parametrize("kernel_size", [5, 9, 13])
@pytest.mark.parametrize("size", [(1, 1), (2, 17), (14, 14), (31, 7)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_size_and_format(kernel_size: int, size: tuple[int, int], memory_format: torch.memory_format) -> None:
    module = block(kernel_size=kernel_size)
    x = torch.randn(2, 6, *size).contiguous(memory_format=memory_format)
    assert_right(module, x)
    assert module(x).is_contiguous(memory_format=memory_format)


def test_other_branches() -> None:
    module = block(kernel_size=19, branches=[(3, 9), (5, 4), (3, 1), (1, 1)])
    assert_right(module)
    assert list(module.small) == ["k3_9", "k5_4", "k3_1", "k1_1"]


@pytest.mark.parametrize(("side", "dilation", "size"), [(3, 1, 3), (3, 2, 5), (3, 1, 9), (5, 3, 15), (1, 4, 3)])
def test_spread_taps(side: int, dilation: int, size: int) -> None:
    kernel = torch.randn(2, 1, side, side, dtype=torch.float64)
    dense = torch.zeros(2, 1, size, size, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            at = [size // 2 + (i - side // 2) * dilation for i in (row, column)]
            dense[:, :, at[0], at[1]] = kernel[:, :, row, column]
    assert torch.equal(spread_taps(kernel, dilation, size), dense)


# The remembered kernel


def no_change(module: DilatedReparamBlock) -> DilatedReparamBlock:
    return module


def load(module: DilatedReparamBlock) -> DilatedReparamBlock:
    module.load_state_dict(block().state_dict())
    return module


def load_by_assignment(module: DilatedReparamBlock) -> DilatedReparamBlock:
    module.load_state_dict(block().state_dict(), assign=True)
    return module


def write_in_place(module: DilatedReparamBlock) -> DilatedReparamBlock:
    with torch.no_grad():
        module.small["k5_1"].norm.running_var.mul_(2)
    return module


def step(module: DilatedReparamBlock) -> DilatedReparamBlock:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(2, 6, 8, 8)).square().mean().backward()
    optimizer.step()
    return module


def exchange_data(module: DilatedReparamBlock) -> DilatedReparamBlock:
    """As tools do that swap averaged weights in."""
    weight = module.large.conv.weight
    weight.data = torch.randn_like(weight)
    return module


def train_and_return(module: DilatedReparamBlock) -> DilatedReparamBlock:
    module.train()(torch.randn(2, 6, 8, 8))
    return module.eval()


def write_unseen(module: DilatedReparamBlock) -> DilatedReparamBlock:
    module.large.conv.weight.data.mul_(2)
    return module.eval()


def replace_norms(module: DilatedReparamBlock) -> DilatedReparamBlock:
    module = freeze_batch_norm_2d(module)
    with torch.no_grad():
        module.large.norm.running_mean.add_(1)
    return module


def synchronise(module: DilatedReparamBlock) -> DilatedReparamBlock:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def average(module: DilatedReparamBlock) -> DilatedReparamBlock:
    ema = ModelEmaV3(module, decay=0.5, use_warmup=False)
    with torch.no_grad():
        ema.module(torch.randn(1, 6, 4, 4))
    ema.update(block())
    return ema.module


def through_a_file(module: DilatedReparamBlock) -> DilatedReparamBlock:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    size = buffer.tell()
    buffer.seek(0)
    fresh = io.BytesIO()
    torch.save(block(), fresh)
    assert abs(size - fresh.tell()) < 1000, "what is remembered is not saved"
    return torch.load(buffer, weights_only=False)


def copied(module: DilatedReparamBlock) -> DilatedReparamBlock:
    copy_ = write_in_place(copy.deepcopy(module))
    assert_right(module)
    return copy_


CHANGES = [
    no_change,
    load,
    load_by_assignment,
    write_in_place,
    step,
    exchange_data,
    train_and_return,
    write_unseen,
    replace_norms,
    synchronise,
    average,
    through_a_file,
    copied,
    DilatedReparamBlock.double,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_never_stale(change: Callable[[DilatedReparamBlock], DilatedReparamBlock]) -> None:
    module = block()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        module(x), module(x)
    names = set(module.state_dict())
    module = change(module)
    assert_right(module.eval())
    if change is not replace_norms:  # which drops the counters
        assert set(module.state_dict()) == names
    with torch.no_grad():
        module(x.to(module.large.conv.weight.dtype))
    assert not [name for name in module.state_dict() if "merge" in name or "memo" in name]


def test_reused_memory_is_not_mistaken_for_the_same_weights() -> None:
    """Weights that come and go through functional_call may lie where the last ones lay."""
    module, x = block(), torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        for _ in range(20):
            state = {name: t * 1.5 if t.is_floating_point() else t for name, t in block().state_dict().items()}
            got = torch.func.functional_call(module, state, (x,))
            other = DilatedReparamBlock(6, 7)
            other.load_state_dict(state)
            torch.testing.assert_close(got, other.eval()(x))
            del state, other


def test_inference_mode_mixes_with_the_others() -> None:
    module, x = block(), torch.randn(1, 6, 8, 8)
    with torch.inference_mode():
        module(x)
        made_inside = DilatedReparamBlock(6, 7).eval()
        torch.testing.assert_close(made_inside(x), by_definition(made_inside, x), rtol=1e-4, atol=1e-4)
    module.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()  # what was remembered in inference mode may be saved for backward
    want = torch.autograd.grad(by_definition(module, x).sum(), x)[0]
    torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-4)


def test_functional_transforms() -> None:
    module = block().requires_grad_(False)
    x, tangent = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        module(x)
    _, got = torch.func.jvp(module, (x,), (tangent,))
    torch.testing.assert_close(got, module(tangent) - module(torch.zeros_like(x)), rtol=1e-4, atol=1e-4)
    states = [dict(block().named_parameters()) | dict(block().named_buffers()) for _ in range(3)]
    stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    many = torch.func.vmap(lambda state: torch.func.functional_call(module, state, (x,)))(stacked)
    for state, got in zip(states, many, strict=True):
        want = torch.func.functional_call(module, state, (x,))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Types, copies, compilers, files


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_merging_in_other_types_loses_nothing_but_the_last_rounding(dtype: torch.dtype) -> None:
    module = block(dim=8, kernel_size=13).to(dtype)
    wide = copy.deepcopy(module).double()
    fused = module.fuse()
    assert fused.weight.dtype == fused.bias.dtype == dtype
    weight, bias = wide.merge()
    for got, want in [(fused.weight, weight), (fused.bias, bias)]:
        assert (got.double() - want).abs().max() <= want.abs().max() * 1.01 * torch.finfo(dtype).eps
    x = torch.randn(1, 8, 20, 20)
    error = (module(x.to(dtype)).double() - wide(x.double())).abs().max() / wide(x.double()).abs().max()
    assert error < 8 * torch.finfo(dtype).eps


def test_fuse_for_good() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), block(), nn.ReLU())
    x = torch.randn(2, 3, 9, 9)
    want = model(x)
    fused = reparameterize_model(model)
    assert type(fused[1]) is DepthwiseConv2d and type(model[1]) is DilatedReparamBlock
    assert {"1.weight", "1.bias"} == {name for name in fused.state_dict() if name.startswith("1.")}
    torch.testing.assert_close(fused(x), want, rtol=1e-4, atol=1e-4)
    assert fused[1].weight.requires_grad and not fused[1].training
    frozen = block().requires_grad_(False).train().fuse()
    assert not frozen.weight.requires_grad and frozen.training


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_module_follows_train_and_eval(backend: str) -> None:
    torch._dynamo.reset()
    module, x = block(), torch.randn(2, 6, 8, 8)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), by_definition(module, x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(x), by_definition(module, x), rtol=1e-4, atol=1e-4)
        twin = copy.deepcopy(module).train()
        compiled.train()
        got, want = compiled(x), twin(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        got.square().sum().backward()
        want.square().sum().backward()
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
        compiled.eval()
        module.zero_grad()


@torch.no_grad()
def test_torchscript() -> None:
    module = block()
    x = torch.randn(2, 6, 8, 8)
    module(x)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    torch.testing.assert_close(scripted(x), module(x))
    assert {name for name, _ in scripted.named_parameters()} == {name for name, _ in module.named_parameters()}
    torch.testing.assert_close(scripted.train()(x), module.train()(x))
    scripted.eval(), module.eval()
    torch.testing.assert_close(scripted(x), module(x))
    torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


@torch.no_grad()
def test_export_holds_standard_operators_and_the_parameters() -> None:
    module, x = block(), torch.randn(1, 6, 8, 8)
    module(x)
    program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "mixerzoo" in str(node.target)]
    torch.testing.assert_close(program.module()(x), module(x))
    assert dict(program.named_parameters()).keys() == dict(module.named_parameters()).keys()


@pytest.mark.slow
@torch.no_grad()
def test_onnx() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, x = block(kernel_size=13), torch.randn(1, 6, 8, 8)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), module(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_meta_device() -> None:
    module = DilatedReparamBlock(6, 7, device="meta").eval()
    x = torch.empty(1, 6, 8, 8, device="meta")
    assert module(x).shape == x.shape and module(x).dtype == torch.float32
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_autocast() -> None:
    module, x = block(), torch.randn(1, 6, 9, 9)
    for run in (module, module.fuse()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        assert out.dtype == torch.bfloat16
        assert (out.float() - module(x)).norm() < 0.01 * module(x).norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 6), "kernel_size must be odd and at least 1, so that a filter has a centre; got 6"),
        ((8, 19), "known for kernel_size 5, 7, 9, 11, 13, 15, 17; got 19: pass `branches`"),
        ((8, 9, [(4, 1)]), "kernel_size must be odd .* got 4"),
        ((8, 9, [(3, 5)]), "within the kernel of 9 x 9; got kernel size 3 with dilation 5, which spans 11"),
        ((8, 9, [(3, 0)]), "got kernel size 3 with dilation 0"),
        ((8, 9, [(3, 1), (3, 1)]), r"each branch must be there once; got \(\(3, 1\), \(3, 1\)\)"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    dim, kernel_size, *branches = arguments
    with pytest.raises(ValueError, match=message):
        DilatedReparamBlock(dim, kernel_size, branches=branches[0] if branches else None)


def test_bad_input() -> None:
    for module in (block(), block().train()):
        with pytest.raises(ValueError, match="one filter for each channel of x"):
            module(torch.randn(1, 7, 9, 9))
        with pytest.raises(ValueError, match=r"x must be .*\[batch, channels, height, width\]"):
            module(torch.randn(6, 9, 9))
