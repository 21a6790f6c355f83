"""The private names of torch that the mixers rely on: what a module holds, and what others have hung on to it."""

from torch import Tensor, nn


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers below a module, without the names that `Module.parameters()` gathers on its way."""
    tensors = [t for group in (module._parameters, module._buffers) for t in group.values() if t is not None]
    for child in module._modules.values():
        if child is not None:
            tensors += tensors_of(child)
    return tensors


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says: hooks around `forward`, or another `forward`."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in vars(module)
