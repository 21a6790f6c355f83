"""The public functions of `mixerzoo.kernels.selective_scan`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _runtime
from ..cross_scan import CROSS, ScanPath, check_paths
from . import _operator, _plain, _traceable

MAX_STATE = 64


def _check_tensors(x: Tensor, name: str, **others: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating-point; got {x.dtype}")
    for other, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{other} is on {tensor.device} and {name} on {x.device}; move one to the other's device")
        if not tensor.is_floating_point():
            raise ValueError(f"{other} must be floating-point; got {tensor.dtype}")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must be [{meaning}] = {shape}; got {tuple(tensor.shape)}")


def _check_state(A: Tensor) -> None:
    if not 1 <= A.shape[-1] <= MAX_STATE:
        raise ValueError(f"the state must have 1 to {MAX_STATE} numbers per channel; got A {tuple(A.shape)}")


def _run(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    dt_weight: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    paths: tuple[ScanPath, ...],
    *,
    softplus: bool,
    merge: bool,
    save_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run the operator on maps [batch, height, width, slots, channels]; return y and the last states.

    y is [batch, height, width, dim], or unless `merge` [batch, scans, dim, pixels]. The last states [batch, scans,
    state, dim] are valid only if `save_states`.
    """
    maps, parameters = (x, delta, projected), (dt_weight, dt_bias, A, D)
    size = x.shape[1], x.shape[2]
    if _runtime.is_exporting():
        ys, last = _traceable.scan(*maps, *parameters, paths, softplus)
        if merge:
            return sum(ys[1:], start=ys[0]), last
        return torch.stack([y.flatten(1, 2).transpose(1, 2) for y in ys], 1), last
    flat = x.flatten(1, 2), None if delta is None else delta.flatten(1, 2), projected.flatten(1, 2)
    if _runtime.wants_plain_ops() or x.dtype == torch.float64:
        y, states = _plain.scan(*flat, *parameters, size, paths, softplus, merge)
        states = states.detach()
    else:
        fields = _plain.to_integers(paths)
        if _runtime.needs_operator(*maps, *parameters):
            tensors = (*maps, *parameters)
            differentiates = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
            options = fields, softplus, merge, save_states or differentiates
            y, states = torch.ops.mixerzoo.selective_scan(*flat, *parameters, list(size), *options)
        else:
            y, states = _operator.scan(*flat, *parameters, list(size), fields, softplus, merge, save_states)
    return (y.unflatten(1, size) if merge else y), (states[:, :, -1] if states.ndim == 5 else states)


def selective_scan_2d(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    *,
    paths: Sequence[ScanPath] = CROSS,
) -> Tensor:
    """Scan a map along several paths and sum the results: the core of VMamba's SS2D.

    delta_t = softplus(dt_weight @ low_rank_t + dt_bias) for each scan and channel. No sequence is materialised: the
    paths are index arithmetic, and delta is expanded where it is used. The result is differentiable once. The state and
    all sums are float32 (float64 for float64 input), whatever the dtypes.

    Args:
        x: [batch, height, width, dim], shared by all scans, or [batch, height, width, scans, dim], one per scan.
        projected: [batch, height, width, scans, rank + 2 * state], along the last axis the low-rank delta, B and C of
            each scan; or [batch, height, width, rank + 2 * state], shared by all scans.
        dt_weight: [scans, dim, rank].
        dt_bias: [scans, dim].
        A: [scans, dim, state], negative for states that decay; `state` is 1 to 64.
        D: [scans, dim], weight of the skip connection from the input.
        paths: one per scan.

    Returns:
        [batch, height, width, dim] in the dtype of x.

    Raises:
        ValueError: if shapes, devices or dtypes are inconsistent.
    """
    paths = tuple(paths)
    check_paths(paths)
    scans = len(paths)
    _check_tensors(x, "x", projected=projected, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    if x.ndim not in (4, 5) or 0 in x.shape[1:3] or (x.ndim == 5 and x.shape[3] != scans):
        raise ValueError(
            f"x must be [batch, height, width, dim] or [batch, height, width, {scans}, dim] for {scans} paths, with at "
            f"least one pixel; got {tuple(x.shape)}"
        )
    batch, height, width, dim = x.shape[0], x.shape[1], x.shape[2], x.shape[-1]
    if A.ndim != 3 or dt_weight.ndim != 3:
        raise ValueError(
            f"A must be [{scans}, {dim}, state] and dt_weight [{scans}, {dim}, rank]; got {tuple(A.shape)} and "
            f"{tuple(dt_weight.shape)}"
        )
    rank, state = dt_weight.shape[2], A.shape[2]
    _check_state(A)
    _check_shape("A", A, (scans, dim, state), "scans, dim, state")
    _check_shape("dt_weight", dt_weight, (scans, dim, rank), "scans, dim, rank")
    _check_shape("dt_bias", dt_bias, (scans, dim), "scans, dim")
    _check_shape("D", D, (scans, dim), "scans, dim")
    slots = (scans,) if projected.ndim == 5 else ()
    expected = (batch, height, width, *slots, rank + 2 * state)
    _check_shape("projected", projected, expected, "batch, height, width, (scans,) rank + 2 * state")
    x = x if x.ndim == 5 else x.unsqueeze(3)
    projected = projected if slots else projected.unsqueeze(3)
    return _run(x, None, projected, dt_weight, dt_bias, A, D, paths, softplus=True, merge=True)[0]


def _by_groups(B: Tensor, C: Tensor, batch: int, dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Expand B and C to the common form [batch, groups, state, length]."""
    grouped = []
    for name, tensor in (("B", B), ("C", C)):
        if tensor.ndim == 2 and tensor.shape[0] == dim:
            tensor = tensor.expand(batch, *tensor.shape).unsqueeze(3).expand(-1, -1, -1, length)
        elif tensor.ndim == 3:
            tensor = tensor.unsqueeze(1)
        if tensor.ndim != 4 or tensor.shape[0] != batch or tensor.shape[3] != length or dim % tensor.shape[1]:
            raise ValueError(
                f"{name} must be [batch, state, length], [batch, groups, state, length] with groups that divide dim, "
                f"or [dim, state], for batch {batch}, dim {dim}, length {length}; got {tuple(tensor.shape)}"
            )
        grouped.append(tensor)
    groups = max(tensor.shape[1] for tensor in grouped)
    if any(groups % tensor.shape[1] for tensor in grouped):
        raise ValueError(f"the groups of B and C do not divide each other: {[t.shape[1] for t in grouped]}")
    B, C = (t.repeat_interleave(groups // t.shape[1], 1) if t.shape[1] != groups else t for t in grouped)
    return B, C


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan a sequence, in the tensor layouts of Mamba's function of this name.

    The result is differentiable once. The state and all sums are float32 (float64 for float64 input), whatever the
    dtypes.

    Args:
        u: [batch, dim, length].
        delta: [batch, dim, length], the step sizes; softplus(delta + delta_bias) if `delta_softplus`.
        A: [dim, state], negative for states that decay; `state` is 1 to 64.
        B: [batch, state, length], or [batch, groups, state, length] where dim / groups neighbouring channels share
            one, or [dim, state], constant over the steps.
        C: in one of the forms of B.
        D: [dim], weight of the skip connection from the input.
        z: [batch, dim, length], a gate: the result is multiplied by silu(z).
        delta_bias: [dim].
        return_last_state: also return the last state [batch, dim, state], without gradient.

    Returns:
        [batch, dim, length] in the dtype of u.

    Raises:
        ValueError: if shapes, devices or dtypes are inconsistent.
    """
    _check_tensors(u, "u", delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    if u.ndim != 3 or u.shape[2] == 0 or A.ndim != 2:
        raise ValueError(
            "u must be [batch, dim, length] with at least one step and A [dim, state]; got "
            f"{tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, dim, length = u.shape
    _check_state(A)
    _check_shape("A", A, (dim, A.shape[1]), "dim, state")
    for name, tensor in (("delta", delta), ("z", z)):
        _check_shape(name, tensor, (batch, dim, length), "batch, dim, length")
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        _check_shape(name, tensor, (dim,), "dim")
    B, C = _by_groups(B, C, batch, dim, length)
    groups = B.shape[1]
    _check_shape("B", B, (batch, groups, A.shape[1], length), "batch, groups, state, length")
    _check_shape("C", C, (batch, groups, A.shape[1], length), "batch, groups, state, length")
    by_group = (groups, dim // groups)
    y, last = _run(
        u.unflatten(1, by_group).permute(0, 3, 1, 2).unsqueeze(1),
        delta.unflatten(1, by_group).permute(0, 3, 1, 2).unsqueeze(1),
        torch.cat([B, C], 2).permute(0, 3, 1, 2).unsqueeze(1),
        None,
        None if delta_bias is None else delta_bias.unflatten(0, by_group),
        A.unflatten(0, by_group),
        None if D is None else D.unflatten(0, by_group),
        (ScanPath(),) * groups,
        softplus=delta_softplus,
        merge=False,
        save_states=return_last_state,
    )
    y = y.flatten(1, 2)
    if z is not None:
        y = (y * torch.nn.functional.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(u.dtype)
    if not return_last_state:
        return y
    return y, last.transpose(2, 3).flatten(1, 2).detach()
