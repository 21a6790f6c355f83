"""Token reduction for timm's vision transformers: `reduce_tokens(model, "tome", r=13)`.

The result is a view of the given model: new objects of our classes around the same parameters, buffers and sub-modules.
timm is not patched, and the given model works as before. Training one model trains the other. Since layers are shared,
dropout in them follows the last `train()` or `eval()` of either. `restore_tokens` reverses the reduction.

What is unusual:
* A method (`ToMe`, `EViT`, …) is a small frozen dataclass that creates the `TokenReducer` of each block.
* State dict names are timm's, so checkpoints of timm and of the papers load. Parameters that a method adds are named
  `blocks.<i>.reducer.*`.
* Models that pool over all tokens (SigLIP, MAE, any with `global_pool="avg"`) copy each merged token to the positions
  of its parts before pooling, so that each part counts once.
* Pre-norm and post-norm blocks with timm's `Attention` are supported, with LayerScale, registers, query and key norms,
  gates and any MLP; parallel blocks, differential attention and rotary positions (Eva) are not.
"""

import copy
import dataclasses
import math
import numbers
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    """Return a `kind` that shares the parameters, buffers and sub-modules of `module`, with separate dictionaries.

    Hooks and the result of `module.compile()` are not copied to the view.
    """
    if "forward" in module.__dict__:
        raise ValueError(
            f"this {type(module).__name__} has a forward of its own, put there by some library; reduce the model "
            "before that library changes it"
        )
    view = kind.__new__(kind)
    nn.Module.__init__(view)
    excluded = {name for name in view.__dict__ if "hook" in name} | {"_compiled_call_impl"}
    shared = {name: value for name, value in module.__dict__.items() if name not in excluded}
    view.__dict__.update({name: copy.copy(v) if isinstance(v, dict | set) else v for name, v in shared.items()})
    return view


def view_of_model(model: nn.Module, kind: type[T]) -> T:
    """Return a view of `model` with a separate patch embedding, since `set_input_size` changes that in place."""
    view = view_as(model, kind)
    patch_embed: Any = view.patch_embed
    view.patch_embed = view_as(patch_embed, type(patch_embed))
    return view


class TokenAttention(Attention):
    """timm's attention split in two, for a reducer to compute the attention itself between `heads` and `output`."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project [B, N, C] to queries, keys and values [B, heads, N, head_dim]."""
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim]).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return self.q_norm(query), self.k_norm(key), value

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """Project attended values [B, heads, N, head_dim] to [B, N, C]; the gate, if any, depends on the input x."""
        attended = self.norm(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(attended))


@register_notrace_module
class TokenBlock(Block):
    """timm's pre-norm block with a reducer; maps (tokens [B, N, C], state) to (tokens [B, M, C], state)."""

    if TYPE_CHECKING:  # TorchScript cannot parse these annotations
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
    """timm's post-norm block with a reducer; maps (tokens [B, N, C], state) to (tokens [B, M, C], state)."""

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
    """A token reduction method with its settings."""

    merges: ClassVar[bool]
    """True if tokens are merged, so that values can be copied back to all positions; False if tokens are dropped."""

    def reducers(self, model: VisionTransformer) -> list[TokenReducer]:
        """Return one reducer for each block of the model."""
        ...


def numbers_of(name: str, value: Any, *, whole: bool = False, or_number: bool = False) -> list[Any]:
    """Convert a sequence of finite numbers to a list; raise a ValueError for anything else.

    Args:
        name: what the error calls the value.
        whole: require whole numbers.
        or_number: the caller takes a single number as well, and the error says so.
    """
    try:
        entries = None if isinstance(value, str) else list(value)
    except TypeError:
        entries = None
    if entries is None or not all(_is_number(entry) and (not whole or float(entry).is_integer()) for entry in entries):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{name} must be {'a number or ' if or_number else ''}a sequence of {kind}; got {value!r}")
    return entries


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def check_flag(name: str, value: Any) -> None:
    """Raise unless the value is True or False: a text such as "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def stage_blocks(locations: Sequence[int] | None, rates: float | Sequence[float], depth: int) -> dict[int, float]:
    """Return the keep rate of each block in which a method prunes.

    Args:
        locations: indices of blocks; None for a quarter, a half and three quarters of the depth, as in all the papers.
            If a model is so shallow that two of these coincide, the later rate applies.
        rates: one number, or one per location.
    """
    blocks = [depth * i // 4 for i in (1, 2, 3)]
    if locations is not None:
        blocks = [int(block) for block in numbers_of("locations", locations, whole=True)]
    is_number = isinstance(rates, numbers.Real)
    shares = [float(rates)] * len(blocks) if is_number else numbers_of("keep_rate", rates, or_number=True)
    repeated = locations is not None and len(set(blocks)) != len(blocks)
    if not blocks or repeated or any(not 0 <= block < depth for block in blocks):
        raise ValueError(f"locations are blocks of the model, each once, from 0 to {depth - 1}; got {blocks}")
    if len(shares) != len(blocks):
        raise ValueError(f"keep_rate needs one number, or one per location, {len(blocks)}; got {rates}")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"keep_rate is a share of the tokens, above 0 and up to 1; got {rates}")
    return dict(zip(blocks, shares, strict=True))


METHODS: dict[str, type[Any]] = {}
"""The class of each method, by the name that `reduce_tokens` accepts; each family's file adds its own."""


class Decided(NamedTuple):
    """The outputs of `forward_decided`, from which the losses of models with keep decisions are computed."""

    logits: Tensor
    """[B, classes]"""
    tokens: Tensor
    """[B, N, C]: the patch tokens after the final norm."""
    decisions: list[Tensor]
    """[B, N] for each stage: 1 for kept and 0 for dropped tokens, differentiable."""
    mask: Tensor | None
    """[B, N]: the last decision; None if the token loss includes all tokens."""


class TokenStage(NamedTuple):
    """The positions and sizes of the tokens after one block, returned by `trace_tokens`."""

    block: int
    assign: Tensor
    """[B, N0] int64: the index, among the current tokens, of each token of the first block, prefix included; -1 if
    dropped."""
    size: Tensor | None
    """[B, N]: how many tokens of the first block each token represents; None if none has been merged."""
    stage: int | None = None
    """The stage of `block` in a hierarchical model, where all positions stay and -1 marks those on the fast path."""


class TokenReducedViT(IsotropicBackbone):
    """A vision transformer with a reducer in each block.

    Args:
        method: the reduction method, which creates the reducers.
        vit_args: arguments of timm's `VisionTransformer`.
    """

    # TorchScript does not compile these properties. It still reads them, so they must not raise.
    __jit_unused_properties__: ClassVar[list[str]] = ["target_keep_rates", "reducers"]

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
    def target_keep_rates(self) -> list[float]:
        """The target share of the first block's patches for each stage, for methods that learn which tokens to keep."""
        learning = [reducer for reducer in self.reducers if hasattr(reducer, "predictor")]
        return [reducer.keep_rate for reducer in learning]  # type: ignore[misc]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def set_keep_rate(self, rate: float | Sequence[float]) -> None:
        """Change the keep rates of the pruning blocks; the weights do not change.

        Args:
            rate: one number, with the meaning of the method's `keep_rate`, or one rate for each block that prunes.
        """
        pruning = [i for i, reducer in enumerate(self.reducers) if hasattr(reducer, "keep_rate")]
        method: Any = self.method
        if not pruning or not hasattr(method, "stages"):
            raise ValueError(
                f"{type(method).__name__} has no keep rate that can be changed; reduce_tokens makes another model on "
                "the same weights"
            )
        depth = len(self.blocks)
        changed = dataclasses.replace(method, keep_rate=rate, locations=pruning)
        if method.locations is None and isinstance(rate, numbers.Real):
            by_depth = dataclasses.replace(method, keep_rate=rate)
            if set(by_depth.stages(depth)) == set(pruning):  # not so if `features_only` has cut blocks off
                changed = by_depth
        for block, share in changed.stages(depth).items():
            self.reducers[block].keep_rate = share  # type: ignore[assignment]
        self.method = changed

    def initial_state(self, x: Tensor, grid: tuple[int, int], dense: bool = False) -> TokenState:  # type: ignore[override]
        return initial_state(x, dense and not self.merges)

    def dense_tokens(self, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        spread = on_raster(x, state)
        return spread[:, : self.num_prefix_tokens], spread[:, self.num_prefix_tokens :]

    def final_tokens(self, x: Tensor, state: TokenState) -> Tensor:  # type: ignore[override]
        """Normalise the remaining tokens [B, M, C], and undo merging if the head pools over all tokens.

        In training with masks, tokens are weighted such that their mean over all patches is the mean over kept patches.
        """
        x = self.norm(x)
        policy = state.policy
        if policy is not None and self.global_pool not in ("token", "avg", ""):
            raise ValueError("this pooling cannot leave out masked patches; use global_pool token or avg")
        if policy is not None and self.global_pool == "avg":
            num_prefix = 0 if self.pool_include_prefix else self.num_prefix_tokens
            prefix, kept = policy[:, :num_prefix], policy[:, num_prefix:]
            weight = kept / kept.mean(1, keepdim=True).clamp(min=1 / kept.shape[1])
            x = x * torch.cat([prefix, weight], 1).unsqueeze(2)
        return on_raster(x, state) if self.merges and self.global_pool != "token" else x

    def _walk(self, x: Tensor) -> Iterator[tuple[Tensor, TokenState]]:
        """Yield the tokens and the state after each block."""
        x, grid = self._embed(x)
        state = self.initial_state(x, grid)
        for block in self.blocks:
            x, state = checkpoint(block, x, state) if self.grad_checkpointing else block(x, state)
            yield x, state

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def trace_tokens(self, x: Tensor) -> list[TokenStage]:
        """Return the positions and sizes of the tokens of images [B, 3, H, W] after each block."""
        return [TokenStage(i, state.assign, state.size) for i, (_, state) in enumerate(self._walk(x))]

    @torch.jit.ignore  # pyright: ignore[reportArgumentType]
    def forward_decided(self, x: Tensor) -> Decided:
        """Classify images, and return what the losses on decisions need; in training mode, no token is dropped."""
        (x, state), prefix = deque(self._walk(x), maxlen=1).pop(), self.num_prefix_tokens
        mask = None if state.policy is None else state.policy[:, prefix:]
        logits = self.forward_head(self.final_tokens(x, state))
        return Decided(logits, self.norm(x)[:, prefix:], state.decisions, mask)


R = TypeVar("R", bound=TokenReducedViT)


def create_reduced(
    kind: type[R], name: str, pretrained: bool, method: type[Any], filter_fn: Callable[..., Any], **kwargs: Any
) -> R:
    """Create a registered model with timm's builder; by default, features are maps and images may have any size.

    Args:
        method: class of the reduction method; its fields are removed from `kwargs`.
        kwargs: arguments of `create_model`.
    """
    settings = {field.name: kwargs.pop(field.name) for field in dataclasses.fields(method) if field.name in kwargs}
    return build_model_with_cfg(
        kind,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        method=method(**settings),
        **{"dynamic_img_size": True, "dynamic_img_pad": True, **kwargs},
    )


class TokenReducedDistilledViT(TokenReducedViT, VisionTransformerDistilled):
    """DeiT with a distillation token, two classifiers, and a reducer in each block."""


REDUCED: dict[type[VisionTransformer], type[TokenReducedViT]] = {
    VisionTransformer: TokenReducedViT,
    VisionTransformerDistilled: TokenReducedDistilledViT,
}
"""Our class for each reducible class of models, with subclasses after their base classes; families add their own."""


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
    """Return a view of a vision transformer that merges or drops tokens; weights are shared, not copied.

    Args:
        model: any `VisionTransformer` of timm (ViT, DeiT, DeiT III, DINOv2, SigLIP, MAE, …), or a model returned by
            this function, whose method is then replaced.
        method: "tome", "evit", "dynamicvit", "eet", "spatten", or an instance such as `ToMe(r=13)`.
        settings: arguments of a method given by name: `r=13`, `keep_rate=0.7`, …

    Raises:
        ValueError: for an unknown method or setting, and for models with unsupported blocks.

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
    """Return the model without reducers: a plain model of timm that shares the same weights."""
    kind = next((plain for plain, reduced in reversed(REDUCED.items()) if isinstance(model, reduced)), None)
    if kind is None:
        raise ValueError(f"restore_tokens takes what reduce_tokens returned; got {type(model).__name__}")
    plain: Any = view_of_model(model, kind)
    blocks = [_plain_block(block) for block in model.blocks]
    plain.blocks = nn.ModuleList(blocks) if issubclass(kind, IsotropicBackbone) else nn.Sequential(*blocks)
    del plain.method, plain.merges
    return plain
