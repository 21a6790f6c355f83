"""Dilated re-parameterised convolution whose parts are no longer those it was built of: norms and branches."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixerzoo.mixers import DilatedReparamBlock
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode


def block() -> DilatedReparamBlock:
    """In evaluation, with statistics that differ from branch to branch."""
    module = DilatedReparamBlock(6, 7)
    module(torch.randn(2, 6, 8, 8))
    return module.eval()


class OperatorCounter(TorchDispatchMode):
    """Counts depth-wise convolutions, whoever does them."""

    convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += any(name in str(func) for name in ("mixerzoo.depthwise_conv2d", "aten.convolution"))
        return func(*args, **(kwargs or {}))


# Norms


def test_norms_that_were_replaced_by_frozen_ones_merge_in_training() -> None:
    module, x = block(), torch.randn(2, 6, 8, 8)
    want = module(x)
    frozen = freeze_batch_norm_2d(module).train()
    with OperatorCounter() as counter:
        torch.testing.assert_close(frozen(x), want)
    assert counter.convolutions == 1
    assert torch.jit.script(frozen)(x).allclose(want, atol=1e-4)


def test_norms_without_running_statistics_take_the_batch_s() -> None:
    module, x = block(), torch.randn(2, 6, 8, 8)
    module.small["k3_2"].norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    want = sum(branch(x) for branch in (module.large, *module.small.values()))
    torch.testing.assert_close(module(x), want)
    torch.testing.assert_close(torch.jit.script(module)(x), want)
    with pytest.raises(ValueError, match="merging needs norms with running statistics"):
        module.fuse()


@torch.no_grad()
def test_norms_that_count_no_batches() -> None:
    """Their statistics change in evaluation without a trace that autograd's counters keep."""
    module, x = block(), torch.randn(2, 6, 8, 8)
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.num_batches_tracked = None
    module(x)
    for mode in (True, False):
        for norm in norms:
            norm.train(mode)
        module(3 * x + 1)
    torch.testing.assert_close(module(x), copy.deepcopy(module)(x))  # copies remember nothing


# Branches


def prune_a_conv(module: DilatedReparamBlock) -> nn.Parameter:
    prune.l1_unstructured(module.large.conv, "weight", 0.5)
    return module.large.conv.weight_orig


def parametrize_a_conv(module: DilatedReparamBlock) -> nn.Parameter:
    parametrize.register_parametrization(module.large.conv, "weight", nn.Tanh())
    return module.large.conv.parametrizations.weight.original


def hook_a_norm(module: DilatedReparamBlock) -> nn.Parameter:
    module.large.norm.register_forward_hook(lambda _, __, out: out.relu())
    return module.large.norm.weight


def hook_a_branch(module: DilatedReparamBlock) -> nn.Parameter:
    module.large.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    return module.large.norm.weight


def patch_forward(module: DilatedReparamBlock) -> nn.Parameter:
    conv, forward = module.small["k3_2"].conv, module.small["k3_2"].conv.forward
    conv.forward = lambda x: forward(x).relu()
    return conv.weight


class Adapted(nn.Module):
    """As adapters wrap a layer: its weight is still there, and no longer all."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.gain, self.weight, self.dilation = conv, nn.Parameter(torch.ones(())), conv.weight, (2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1 + self.gain)


def adapt_a_conv(module: DilatedReparamBlock) -> nn.Parameter:
    module.small["k3_2"].conv = Adapted(module.small["k3_2"].conv)
    return module.small["k3_2"].conv.gain


@pytest.mark.parametrize(
    "alter",
    [prune_a_conv, parametrize_a_conv, hook_a_norm, hook_a_branch, patch_forward, adapt_a_conv],
    ids=lambda alter: alter.__name__,
)
@torch.no_grad()
def test_altered_branches_run_as_they_are(alter: Callable[[DilatedReparamBlock], nn.Parameter]) -> None:
    module, x = block(), torch.randn(2, 6, 8, 8)
    module(x)
    parameter = alter(module).requires_grad_()
    for _ in range(2):
        got = module(x)  # first: a call of the branch would bring a pruned weight up to date
        want = sum(branch(x) for branch in (module.large, *module.small.values()))
        torch.testing.assert_close(got, want)
        parameter.mul_(-1.5)
