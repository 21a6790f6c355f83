"""Wrap the private names of torch that the mixers rely on: the tensors of a module, and changes made to it."""

from torch import Tensor, nn


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of a module tree, without building names as `Module.parameters()` does."""
    tensors = [t for group in (module._parameters, module._buffers) for t in group.values() if t is not None]
    for child in module._modules.values():
        if child is not None:
            tensors += tensors_of(child)
    return tensors


def has_hooks(module: nn.Module) -> bool:
    """Return whether calling the module runs more than its class: hooks around `forward`, or a replaced `forward`."""
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in vars(module)
