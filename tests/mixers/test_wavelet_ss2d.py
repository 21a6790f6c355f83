"""WaveletSS2D: official transforms, the published convolutions against its additions, other filters, folding."""

import copy
from collections.abc import Callable

import pytest
import torch
from mixerzoo.kernels.cross_scan import BIDIRECTIONAL
from mixerzoo.mixers import SelectiveScan2d, WaveletSS2D
from mixerzoo.mixers.conv_norm import ConvNorm, LinearNorm
from mixerzoo.mixers.wavelet_ss2d import haar, inverse_haar
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

HAAR = torch.tensor([[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]) / 2


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def lively(dim: int = 16, kernel_size: int = 5) -> WaveletSS2D:
    """In evaluation, with statistics and scales that are not those of the start."""
    mixer = WaveletSS2D(dim, kernel_size=kernel_size)
    with torch.no_grad():
        for tensor in (*mixer.parameters(), *mixer.buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return mixer.eval()


def by_convolutions(x: Tensor, mixer: WaveletSS2D, analysis: Tensor, synthesis: Tensor) -> Tensor:
    """The published form: strided convolutions with filters [4, 2, 2, C], sub-bands that alternate."""
    height, width, dim = x.shape[1:]
    y = F.pad(x.permute(0, 3, 1, 2), [0, width % 2, 0, height % 2])
    bank = analysis.permute(3, 0, 1, 2).reshape(4 * dim, 1, 2, 2)
    y = F.conv2d(y, bank, stride=2, groups=dim)
    order = torch.arange(4 * dim).view(4, dim).T.flatten()  # of our channels, by channel first
    weight, scale = mixer.conv.weight[order], mixer.wavelet_scale[order]
    y = scale.view(-1, 1, 1) * F.conv2d(y, weight, padding=weight.shape[-1] // 2, groups=4 * dim)
    y = F.conv_transpose2d(y, synthesis.permute(3, 0, 1, 2).reshape(4 * dim, 1, 2, 2), stride=2, groups=dim)
    return mixer.base_scale * mixer.ss2d(x) + y[:, :, :height, :width].permute(0, 2, 3, 1)


def test_official_transform(scan_case: Callable) -> None:
    case = scan_case("haar_dwt")
    x = case.inputs()["x"].requires_grad_()
    bands = haar(x.permute(0, 2, 3, 1)).permute(0, 4, 3, 1, 2) / 2  # twice the orthonormal one
    bands.backward(case.grad())
    assert case.output_error("out", bands) < 1e-12 and case.grad_error("x", x.grad) < 1e-12


def test_official_inverse(scan_case: Callable) -> None:
    case = scan_case("haar_idwt")
    y = case.inputs()["y"].requires_grad_()
    x = inverse_haar(y.permute(0, 3, 4, 2, 1)).permute(0, 3, 1, 2) / 2
    x.backward(case.grad())
    assert case.output_error("out", x) < 1e-12 and case.grad_error("y", y.grad) < 1e-12


def test_official_scans(scan_case: Callable) -> None:
    case = scan_case("mobilemamba_ss2d_core")
    inputs = case.inputs()
    scan = SelectiveScan2d(6, state_dim=1, dt_rank=2, paths=BIDIRECTIONAL).double()
    names = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
    ours = ("x_proj_weight", "dt_weight", "dt_bias", "A_log", "D")
    shapes = {name: tensor.shape for name, tensor in scan.state_dict().items()}
    scan.load_state_dict({o: inputs[n].reshape(shapes[o]) for n, o in zip(names, ours, strict=True)})
    x = inputs["x"].requires_grad_()
    y = scan(x.permute(0, 2, 3, 1)).flatten(1, 2).transpose(1, 2)
    y.backward(case.grad())
    assert case.output_error("out", y) < 1e-12 and case.grad_error("x", x.grad) < 1e-12
    for name, parameter in zip(names, ours, strict=True):
        got = dict(scan.named_parameters())[parameter].grad
        assert case.grad_error(name, got.reshape(inputs[name].shape)) < 1e-12, name


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (7, 3), (1, 1), (2, 1)])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_additions_are_the_published_convolutions(size: tuple[int, int], kernel_size: int) -> None:
    mixer = lively(kernel_size=kernel_size)
    bank = HAAR[..., None].expand(4, 2, 2, 16)
    results = []
    for form in (mixer, lambda x: by_convolutions(x, mixer, bank, bank)):
        x = torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = form(x)
        mixer.zero_grad()
        (y * torch.arange(16)).sum().backward()
        grads = [p.grad.clone() for p in (mixer.conv.weight, mixer.wavelet_scale, mixer.base_scale)]
        results.append([y.detach(), x.grad, *grads])
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_other_filters(size: tuple[int, int]) -> None:
    mixer, x = lively(), torch.randn(2, *size, 16)
    haars = mixer(x)
    analysis, synthesis = torch.randn(2, 4, 2, 2, 16)
    mixer.use_filters(analysis, synthesis)
    assert_near(mixer(x), by_convolutions(x, mixer, analysis, synthesis), 1e-5)
    scripted = torch.jit.script(mixer)
    assert_near(scripted(x), mixer(x), 1e-6)
    assert {"analysis", "synthesis"} <= mixer.state_dict().keys()
    mixer.use_filters(*[HAAR[..., None].expand(4, 2, 2, 16)] * 2)
    assert_near(mixer(x), haars, 1e-6)
    with pytest.raises(ValueError, match=r"filters must be \(4, 2, 2, 16\); got"):
        mixer.use_filters(analysis[..., :8], synthesis)


def test_haars_filters_are_no_parameters() -> None:
    assert not [name for name in WaveletSS2D(16, kernel_size=3).state_dict() if "filter" in name or "thesis" in name]


@pytest.mark.parametrize("filters", [False, True])
def test_folding(filters: bool) -> None:
    mixer, x = lively(), torch.randn(2, 5, 6, 16)
    if filters:
        mixer.use_filters(*torch.randn(2, 4, 2, 2, 16))
    folded = reparameterize_model(nn.Sequential(mixer))[0]
    assert_near(folded(x), mixer(x).detach(), 1e-5)
    inner_first = reparameterize_model(mixer)  # timm leaves the outermost module alone
    inner_first.reparameterize()
    assert_near(inner_first(x), folded(x).detach(), 1e-5)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)] and folded.base_scale is None
    assert_near(torch.jit.script(folded)(x), folded(x), 1e-6)
    folded(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in folded.parameters())
    again = copy.deepcopy(folded)
    again.reparameterize()
    assert torch.equal(again(x), folded(x))
    assert mixer.base_scale is not None  # a copy was folded


@pytest.mark.parametrize(
    "layer",
    [
        ConvNorm(6, 8, 3, stride=2),
        ConvNorm(6, 8),
        ConvNorm(6, 6, 3, depthwise=True),
        ConvNorm(6, 6, 3, stride=2, depthwise=True),
        LinearNorm(6, 8),
    ],
    ids=["strided", "1x1", "depthwise", "strided depthwise", "linear"],
)
def test_norms_fuse(layer: nn.Module) -> None:
    for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean, layer.norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(2, 6, 7, 5)
    if isinstance(layer, LinearNorm):
        x = x.permute(0, 2, 3, 1)
    want = layer.eval()(x).detach()
    layer.requires_grad_(False)
    fused = copy.deepcopy(layer).fuse()
    assert_near(fused(x), want, 1e-5)
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    half = copy.deepcopy(layer).bfloat16().fuse()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(x.bfloat16()).shape == want.shape


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        WaveletSS2D(16, kernel_size=4)
    with pytest.raises(ValueError, match="kernel_size must be odd, and a depth-wise convolution keep its channels"):
        ConvNorm(4, 8, 3, depthwise=True)


@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (1, 0, 4, 16), (4, 4, 16)])
def test_an_input_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needed \[B, H, W, 16 channels\] with H, W >= 1; got shape"):
        WaveletSS2D(16, kernel_size=3)(torch.zeros(shape))
