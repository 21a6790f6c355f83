"""Any vision transformer of timm with fewer tokens: `reduce_tokens(model, "tome", r=13)`.

The model that comes back is a view of the one that went in: new objects of our classes around the same parameters,
buffers and sub-modules. Nothing of timm is patched and the model that went in works as before; training one trains the
other, and since layers are shared, dropout in them follows the last `train()` or `eval()` of either. `restore_tokens`
is the way back.

Unusual:
* A method (`ToMe`, `EViT`, …) is a small frozen dataclass that gives each block its `TokenReducer`.
* State names are timm's, so timm's and the papers' checkpoints load. Where a method has parameters of its own, they are
  `blocks.<i>.reducer.*`.
* Models that pool over all tokens (SigLIP, MAE, any with `global_pool="avg"`) get merged tokens spread over the places
  of their parts before they pool, so that each part counts once.
* Pre-norm and post-norm blocks with timm's `Attention` are known, with LayerScale, registers, query and key norms,
  gates and any MLP; parallel blocks, differential attention and rotary positions (Eva) are not.
"""

import copy
import dataclasses
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
from timm.layers import Attention, register_notrace_module
from timm.models import build_model_with_cfg, checkpoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from ...mixers.token_reduction import TokenReducer, TokenState, initial_state, on_raster
from ._isotropic import IsotropicBackbone

T = TypeVar("T", bound=nn.Module)


def view_as(module: nn.Module, kind: type[T]) -> T:
    """A `kind` with all that `module` has: the same parameters, buffers and sub-modules in dictionaries of its own."""
    view = kind.__new__(kind)
    view.__dict__.update(
        {name: copy.copy(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    )
    return view


def view_of_model(model: nn.Module, kind: type[T]) -> T:
    """A view with a patch embedding of its own, since `set_input_size` changes that in place."""
    view = view_as(model, kind)
    patch_embed: Any = view.patch_embed
    view.patch_embed = view_as(patch_embed, type(patch_embed))
    return view


class TokenAttention(Attention):
    """timm's attention in three parts, the middle one of which is the reducer's."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, C] to queries, keys and values [B, heads, N, head_dim]."""
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.q_norm(query), self.k_norm(key), value

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """[B, heads, N, head_dim], and the attention's input for its gate, to [B, N, C]."""
        attended = self.norm(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(attended))


@register_notrace_module
class TokenBlock(Block):
    """timm's pre-norm block around a reducer; maps (tokens [B, N, C], state) to (tokens [B, M, C], state)."""

    if TYPE_CHECKING:  # TorchScript cannot read these
        attn: TokenAttention
        reducer: TokenReducer

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:  # pyright: ignore
        x, state = self.reducer.before(x, state)
        normed = self.norm1(x)
        query, key, value = self.attn.heads(normed)
        attended, evidence = self.reducer.attend(query, key, value, state)
        x = x + self.drop_path1(self.ls1(self.attn.output(attended, normed)))
        x, state = self.reducer.between(x, state, evidence)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return self.reducer.after(x, state, evidence)


@register_notrace_module
class TokenResPostBlock(ResPostBlock):
    """The same for timm's post-norm block."""

    if TYPE_CHECKING:
        attn: TokenAttention
        reducer: TokenReducer

    def forward(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:  # pyright: ignore
        x, state = self.reducer.before(x, state)
        query, key, value = self.attn.heads(x)
        attended, evidence = self.reducer.attend(query, key, value, state)
        x = x + self.drop_path1(self.norm1(self.attn.output(attended, x)))
        x, state = self.reducer.between(x, state, evidence)
        x = x + self.drop_path2(self.norm2(self.mlp(x)))
        return self.reducer.after(x, state, evidence)


class ReductionMethod(Protocol):
    """A way to get rid of tokens, with its settings."""

    merges: ClassVar[bool]
    """Whether tokens become others, so that they can be spread again; otherwise they are dropped."""

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        """One for each block of the model."""
        ...


def numbers_of(name: str, given: Any) -> list[Any]:
    """A sequence of numbers as a list; a ValueError for anything else."""
    entries = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if isinstance(given, str | numbers.Real) or not all(isinstance(entry, numbers.Real) for entry in entries):
        raise ValueError(f"{name} must be a sequence of numbers; got {given!r}")
    return entries


def stage_blocks(locations: Sequence[int] | None, rates: float | Sequence[float], depth: int) -> dict[int, float]:
    """The rate of each block in which a method prunes.

    Args:
        locations: blocks, from 0; None for a quarter, a half and three quarters of the depth, as all the papers do.
            Where a model is so shallow that two of these fall together, the later one counts.
        rates: one number, or one a location.
    """
    blocks = [depth * i // 4 for i in (1, 2, 3)]
    if locations is not None:
        blocks = [int(block) for block in numbers_of("locations", locations)]
    shares = [float(rates)] * len(blocks) if isinstance(rates, numbers.Real) else numbers_of("keep_rate", rates)
    repeated = locations is not None and len(set(blocks)) != len(blocks)
    if repeated or any(not 0 <= block < depth for block in blocks):
        raise ValueError(f"locations are blocks of the model, each once, from 0 to {depth - 1}; got {blocks}")
    if len(shares) != len(blocks):
        raise ValueError(f"keep_rate needs one number or one a location, {len(blocks)}; got {rates}")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"keep_rate is a share of the tokens, above 0 and up to 1; got {rates}")
    return dict(zip(blocks, shares, strict=True))


METHODS: dict[str, type[Any]] = {}
"""The methods by the name that `reduce_tokens` takes; each family's file adds its own."""


class Decided(NamedTuple):
    """What the losses need of a model that decides while it trains (`forward_decided`)."""

    logits: Tensor
    """[B, classes]"""
    tokens: Tensor
    """[B, N, C]: the patch tokens behind the final norm."""
    decisions: list[Tensor]
    """For each stage [B, N] of 1 for kept and 0 for dropped tokens, with gradient."""
    mask: Tensor | None
    """[B, N]: the last decision; None if the loss on tokens counts all of them."""


class TokenStage(NamedTuple):
    """The tokens behind one block (`trace_tokens`)."""

    block: int
    assign: Tensor
    """[B, N0] int64: the place of each token of the first block among those of now, prefix included; -1 if dropped."""
    size: Tensor | None
    """[B, N]: how many tokens each one stands for; None if none was merged."""


class TokenReducedViT(IsotropicBackbone):
    """A vision transformer with a reducer in each block.

    Args:
        method: what the reducers do.
        vit_args: as of timm's `VisionTransformer`.
    """

    # TorchScript compiles all other properties, and reads all of them: they must not raise.
    __jit_unused_properties__: ClassVar[list[str]] = ["keep_rates", "reducers"]

    def __init__(self, *, method: ReductionMethod, **vit_args: Any) -> None:
        super().__init__(**vit_args)
        self._install(method)

    def _install(self, method: ReductionMethod) -> None:
        reducers = method.reducers(self)
        self.method = method
        self.merges = method.merges
        self.blocks = nn.ModuleList(
            _reduced_block(block, reducer) for block, reducer in zip(self.blocks, reducers, strict=True)
        )

    @property
    def reducers(self) -> list[TokenReducer]:
        return [block.reducer for block in self.blocks]  # type: ignore[misc]

    @property
    def keep_rates(self) -> list[float]:
        """The share of the first block's patches that each stage should keep, if the method learns what to keep."""
        learning = [reducer for reducer in self.reducers if hasattr(reducer, "predictor")]
        return [reducer.keep_rate for reducer in learning]  # type: ignore[misc]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_keep_rate(self, rate: float | Sequence[float]) -> None:
        """Change what the pruning blocks keep, without new weights.

        Args:
            rate: as the method's own `keep_rate`; if a sequence, one number for each block that prunes.
        """
        pruning = [i for i, reducer in enumerate(self.reducers) if hasattr(reducer, "keep_rate")]
        method: Any = self.method
        if not pruning or not hasattr(method, "stages"):
            raise ValueError(
                f"{type(method).__name__} has no keep rate that can be changed; reduce_tokens makes another model on "
                "the same weights"
            )
        method = dataclasses.replace(method, keep_rate=rate, locations=pruning)
        for block, share in method.stages(len(self.blocks)).items():
            self.reducers[block].keep_rate = share  # type: ignore[assignment]
        self.method = method

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> TokenState:  # type: ignore[override]
        return initial_state(x, dense and not self.merges)

    def dense_tokens(self, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        spread = on_raster(x, state)
        return spread[:, : self.num_prefix_tokens], spread[:, self.num_prefix_tokens :]

    def final_tokens(self, x: Tensor, state: TokenState) -> Tensor:  # type: ignore[override]
        """The remaining tokens [B, M, C]; spread over all places if tokens were merged and the head pools over them.

        While training with masks they are weighted so that the mean over all patches is that over kept ones.
        """
        x = self.norm(x)
        policy = state.policy
        if policy is not None and self.global_pool == "avg":
            prefix, kept = policy[:, : self.num_prefix_tokens], policy[:, self.num_prefix_tokens :]
            weight = kept / kept.mean(1, keepdim=True).clamp(min=1 / kept.shape[1])
            x = x * torch.cat([prefix, weight], 1).unsqueeze(2)
        return on_raster(x, state) if self.merges and self.global_pool != "token" else x

    def _walk(self, x: Tensor) -> Iterator[tuple[Tensor, TokenState]]:
        """Tokens and state behind each block."""
        x, grid = self._embed(x)
        state = self.initial_state(x, grid)
        for block in self.blocks:
            x, state = checkpoint(block, x, state) if self.grad_checkpointing else block(x, state)
            yield x, state

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def trace_tokens(self, x: Tensor) -> list[TokenStage]:
        """Where the tokens of pictures [B, 3, H, W] are behind each block."""
        return [TokenStage(i, state.assign, state.size) for i, (_, state) in enumerate(self._walk(x))]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_decided(self, x: Tensor) -> Decided:
        """Classify, and tell what the losses of a method with decisions need; in training mode nothing is dropped."""
        (x, state), prefix = deque(self._walk(x), maxlen=1).pop(), self.num_prefix_tokens
        mask = None if state.policy is None else state.policy[:, prefix:]
        logits = self.forward_head(self.final_tokens(x, state))
        return Decided(logits, self.norm(x)[:, prefix:], state.decisions, mask)


R = TypeVar("R", bound=TokenReducedViT)


def create_reduced(
    kind: type[R], name: str, pretrained: bool, method: ReductionMethod, filter_fn: Callable[..., Any], **kwargs: Any
) -> R:
    """A registered model: timm's builder, with features on the raster and any picture size unless `kwargs` say no."""
    return build_model_with_cfg(
        kind,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        method=method,
        **{"dynamic_img_size": True, "dynamic_img_pad": True, **kwargs},
    )


class TokenReducedDistilledViT(TokenReducedViT, VisionTransformerDistilled):
    """The same for DeiT with a distillation token and two classifiers."""


REDUCED: dict[type[VisionTransformer], type[TokenReducedViT]] = {
    VisionTransformer: TokenReducedViT,
    VisionTransformerDistilled: TokenReducedDistilledViT,
}
"""Our class for each class of models that can be reduced, the special behind the general; families add theirs."""


def _reduced_block(block: nn.Module, reducer: TokenReducer) -> nn.Module:
    attention = getattr(block, "attn", None)
    if type(block) not in (Block, ResPostBlock) or type(attention) is not Attention:
        raise ValueError(
            f"reduce_tokens knows timm's Block and ResPostBlock with Attention; this model is made of "
            f"{type(block).__name__} with {type(attention).__name__}"
        )
    if attention.attn_drop.p > 0:
        raise ValueError(
            f"attention that scores tokens has no dropout; this model has attn_drop_rate={attention.attn_drop.p}. "
            "Create it with attn_drop_rate=0"
        )
    kind: type[Any] = TokenBlock if type(block) is Block else TokenResPostBlock
    reduced = view_as(block, kind)
    reduced.attn = view_as(attention, TokenAttention)
    reduced.reducer = reducer.train(block.training)
    return reduced


def _plain_block(block: nn.Module) -> nn.Module:
    kind: type[Any] = Block if isinstance(block, TokenBlock) else ResPostBlock
    plain = view_as(block, kind)
    del plain.reducer
    plain.attn = view_as(plain.attn, Attention)
    return plain


def reduce_tokens(model: VisionTransformer, method: str | ReductionMethod, **settings: Any) -> TokenReducedViT:
    """A view of a vision transformer that merges or drops tokens on the way; weights are shared, not copied.

    Args:
        model: any `VisionTransformer` of timm (ViT, DeiT, DeiT III, DINOv2, SigLIP, MAE, …), or one that this function
            returned: then the other method takes the place of the first.
        method: "tome", "evit", "dynamicvit", "eet", "spatten", or an instance such as `ToMe(r=13)`.
        settings: of the method, if it was named: `r=13`, `keep_rate=0.7`, …

    Raises:
        ValueError: for an unknown method or setting, and for models whose blocks are built in another way.

    Example:
        >>> vit = timm.create_model("vit_small_patch16_224", pretrained=True)
        >>> faster = reduce_tokens(vit, "tome", r=13)
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}; got {method!r}")
        try:
            method = METHODS[method](**settings)
        except TypeError as error:
            raise ValueError(f"reduce_tokens: {error}") from None
    elif settings:
        raise ValueError(f"settings belong to a method that is named; {method} has its own, got {sorted(settings)}")
    if isinstance(method, type) or not hasattr(method, "reducers"):
        raise ValueError(f"method must be a name or an instance with reducers(model), such as ToMe(r=13); got {method}")
    if isinstance(model, TokenReducedViT):
        model = restore_tokens(model)
    kind = REDUCED.get(type(model))
    if kind is None:
        known = ", ".join(known.__name__ for known in REDUCED)
        raise ValueError(
            f"reduce_tokens takes models of the classes {known}; got {type(model).__name__}. Reduce a model before it "
            "is wrapped (features_only, compile); Eva's rotary positions and hierarchical models are not known"
        )
    reduced = view_of_model(model, kind)
    reduced._install(cast(ReductionMethod, method))
    return reduced


def restore_tokens(model: TokenReducedViT) -> VisionTransformer:
    """The way back: a plain model of timm on the same weights, without reducers."""
    kind = next((plain for plain, reduced in reversed(REDUCED.items()) if isinstance(model, reduced)), None)
    if kind is None:
        raise ValueError(f"restore_tokens takes what reduce_tokens returned; got {type(model).__name__}")
    plain: Any = view_of_model(model, kind)
    blocks = [_plain_block(block) for block in model.blocks]
    plain.blocks = nn.ModuleList(blocks) if issubclass(kind, IsotropicBackbone) else nn.Sequential(*blocks)
    del plain.method, plain.merges
    return plain
