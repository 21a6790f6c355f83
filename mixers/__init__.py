"""Token mixers as modules that preserve the input shape. Norm, residual and drop path belong to the block.

Attention and scans over maps take [B, *spatial, C], scans over sequences [B, N, C], convolutions [B, C, H, W] in any
memory format.
"""

from .bidirectional_mamba import BidirectionalMamba
from .boundary_fusion import BGAF
from .depthwise_conv import DepthwiseConv2d
from .dilated_reparam import DilatedReparamBlock
from .gated_linear_attention import GatedLinearAttention2d
from .hilo import HiLo
from .inception_dwconv import InceptionDWConv
from .large_kernel_attention import LargeKernelAttention
from .lookup_attention import GatherAttention, TransposedAttention
from .neighborhood_attention import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
from .pyramid_pooling import DLKPPM
from .semantic_tokens import CrossAttention, WindowCrossAttention, pool_to_tokens
from .separable_kernel_attention import CKS, LSKA, SDLSKA
from .ss2d import SS2D, AtrousSS2D, SelectiveScan2d
from .token_predictor import PredictorLG
from .wavelet_ss2d import WaveletSS2D

__all__ = [
    "BGAF",
    "CKS",
    "DLKPPM",
    "LSKA",
    "SDLSKA",
    "SS2D",
    "AtrousSS2D",
    "BidirectionalMamba",
    "CrossAttention",
    "DepthwiseConv2d",
    "DilatedReparamBlock",
    "GatedLinearAttention2d",
    "GatherAttention",
    "HiLo",
    "InceptionDWConv",
    "LargeKernelAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "PredictorLG",
    "SelectiveScan2d",
    "TransposedAttention",
    "WaveletSS2D",
    "WindowCrossAttention",
    "pool_to_tokens",
]
