"""MobileMamba's long-range mixer (WTE-Mamba): selective scans of a map plus a convolution of its wavelet transform.

    y = base_scale * SS2D(x) + inverse_haar(wavelet_scale * depthwise(haar(x)))

Paper: He et al., "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network" (CVPR 2025, arXiv 2411.15941). Code:
github.com/lewandofskee/MobileMamba, MIT. The convolution of a wavelet transform is Finder et al.'s (arXiv 2407.05848).

What is unusual:
* The transform consists of sums and differences over each 2 x 2 square; the published code convolves with filters that
  are part of its state dict. All its factors of one half are folded into the convolution's weights.
* The four sub-bands are blocks of channels: mean, difference between rows, difference between columns, and diagonal,
  each with all channels of the map; in the published weights they alternate channel by channel.
* Maps of odd height or width are zero-padded at the bottom and on the right before the transform, as published.
* The scans traverse the rows in both directions with one state element per channel. The projections around them are
  followed by batch norms, which `timm.utils.reparameterize_model` folds together with both scales.
* `use_filters` sets filters other than Haar's, for weights trained with them; no published weights need it.
"""

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels._runtime import is_exporting
from ..kernels.cross_scan import BIDIRECTIONAL
from .conv_norm import LinearNorm
from .depthwise_conv import DepthwiseConv2d, convolve
from .ss2d import SS2D


def haar(x: Tensor) -> Tensor:
    """Return twice the orthonormal Haar transform: [B, H, W, C], even height and width, to [B, H / 2, W / 2, 4, C]."""
    rows = x.unflatten(1, [x.shape[1] // 2, 2])
    upper, lower = rows[:, :, 0], rows[:, :, 1]
    pairs = torch.stack([upper + lower, upper - lower], dim=3).unflatten(2, [x.shape[2] // 2, 2])
    left, right = pairs[:, :, :, 0], pairs[:, :, :, 1]
    return torch.cat([left + right, left - right], dim=3)


def inverse_haar(bands: Tensor) -> Tensor:
    """Invert `haar` up to a factor, [B, h, w, 4, C] to [B, 2 h, 2 w, C]: `inverse_haar(haar(x))` is 4 x."""
    along, across = bands[:, :, :, :2], bands[:, :, :, 2:]
    columns = torch.stack([along + across, along - across], dim=3).flatten(2, 3)
    total, change = columns[:, :, :, 0], columns[:, :, :, 1]
    return torch.stack([total + change, total - change], dim=2).flatten(1, 2)


class WaveletSS2D(nn.Module):
    """Mix a map [B, H, W, C] of any height and width by scans and by a convolution of its wavelet transform.

    Args:
        kernel_size: of the convolution of the sub-bands, odd.
        expand: inner channels of the scans, as a multiple of `dim`.
        dt_rank: see `SelectiveScan2d`; None for a sixteenth of `dim`, rounded up.
    """

    analysis: Tensor | None
    synthesis: Tensor | None

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int,
        expand: float = 2.0,
        state_dim: int = 1,
        dt_rank: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.ss2d = SS2D(
            dim, expand=expand, state_dim=state_dim, dt_rank=dt_rank, paths=BIDIRECTIONAL, device=device, dtype=dtype
        )
        inner = self.ss2d.inner_dim
        self.ss2d.in_proj = LinearNorm(dim, 2 * inner, device=device, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
        self.ss2d.out_proj = LinearNorm(inner, dim, device=device, dtype=dtype)  # pyright: ignore[reportAttributeAccessIssue]
        self.conv = DepthwiseConv2d(4 * dim, kernel_size, bias=False, device=device, dtype=dtype)
        self.base_scale: nn.Parameter | None = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.wavelet_scale: nn.Parameter | None = nn.Parameter(torch.empty(4 * dim, device=device, dtype=dtype))
        self.register_buffer("analysis", None)
        self.register_buffer("synthesis", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the scales; the layers initialise themselves."""
        if self.base_scale is not None and self.wavelet_scale is not None:
            nn.init.ones_(self.base_scale)
            nn.init.constant_(self.wavelet_scale, 0.1)

    def use_filters(self, analysis: Tensor, synthesis: Tensor) -> None:
        """Replace Haar's filters by others, [4, 2, 2, C]: for each sub-band the weights of a 2 x 2 square's pixels."""
        if analysis.shape != (4, 2, 2, self.dim) or synthesis.shape != analysis.shape:
            shapes = tuple(analysis.shape), tuple(synthesis.shape)
            raise ValueError(f"filters must be (4, 2, 2, {self.dim}); got {shapes}")
        self.analysis, self.synthesis = analysis.to(self.conv.weight), synthesis.to(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[-1] != self.dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f"needed [B, H, W, {self.dim} channels] with H, W >= 1; got shape {list(x.shape)}")
        scans, bands = self.ss2d(x), self._convolve_bands(x)
        base_scale = self.base_scale
        return bands + scans if base_scale is None else torch.addcmul(bands, scans, base_scale)

    def _convolve_bands(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        below, right = height % 2, width % 2
        padded = is_exporting() or below > 0 or right > 0
        if padded:
            x = F.pad(x, [0, 0, 0, right, 0, below])
        # Combine Haar's four factors of one half, two per transform, into one.
        weight, factor = self.conv.weight, 1.0 if self.analysis is not None else 0.25
        scale = self.wavelet_scale
        weight = weight * factor if scale is None else weight * (scale * factor).view(-1, 1, 1, 1)
        bands = self._split(x).flatten(3).permute(0, 3, 1, 2)
        bands = convolve(bands, weight, None, [1, 1]).permute(0, 2, 3, 1).unflatten(3, [4, self.dim])
        y = self._join(bands)
        return F.pad(y, [0, 0, 0, -right, 0, -below]) if padded else y

    def _split(self, x: Tensor) -> Tensor:
        filters = self.analysis
        if filters is None:
            return haar(x)
        squares = x.unflatten(2, [x.shape[2] // 2, 2]).unflatten(1, [x.shape[1] // 2, 2])
        return torch.einsum("bhiwjc,nijc->bhwnc", squares, filters)

    def _join(self, bands: Tensor) -> Tensor:
        filters = self.synthesis
        if filters is None:
            return inverse_haar(bands)
        return torch.einsum("bhwnc,nijc->bhiwjc", bands, filters).flatten(3, 4).flatten(1, 2)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold both scales into the preceding layers, in place; the projections' batch norms fuse by themselves."""
        if self.base_scale is None or self.wavelet_scale is None:
            return
        last: nn.Module = self.ss2d.out_proj
        layer: Any = last.norm if isinstance(last, LinearNorm) else last  # a plain linear layer if already fused
        layer.weight *= self.base_scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias *= self.base_scale
        self.conv.weight *= self.wavelet_scale.view(-1, 1, 1, 1)
        self.base_scale, self.wavelet_scale = None, None

    def extra_repr(self) -> str:
        return f"{self.dim}"


register_notrace_module(WaveletSS2D)  # not as a decorator, which would hide the class's type
