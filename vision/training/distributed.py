"""Distributed training: the strategy, the cluster environment, sharded models and their checkpoints.

* DDP (S. Li et al.: PyTorch Distributed, VLDB 2020) keeps a copy of the model on every device. FSDP2
  (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html), through Lightning's ModelParallelStrategy,
  keeps a shard of every weight on every device and gathers one block at a time.
* Processes are started by `launch.py`, by torchrun or by Slurm's srun. Lightning is told which of them it was, because
  its own detection, inside a Slurm allocation without srun, would wait for processes that nobody starts and requeue
  the job by itself.
* A checkpoint is one file with unsharded weights under either strategy, and loads anywhere. With FSDP the state of the
  optimizer in it is unsharded too.
* Means over an epoch (the training loss) are saved for each process. Lightning saves that of rank 0 and restores it on
  all ranks: a resumed epoch would count it once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import TrainConfig
from .launch import started_by

_OTHER_WAYS_IN = ("forward_decided", "forward_intermediates", "forward_features", "forward_head")
"""Methods of a backbone that training may call instead of `forward` (distillation.py)."""


def make_strategy(train: TrainConfig) -> Strategy | str:
    if train.processes == 1:
        return "auto"
    if train.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=train.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy()


def on_gpu(train: TrainConfig) -> bool:
    """Return whether training will use CUDA devices."""
    return train.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def make_environment() -> ClusterEnvironment:
    starter = started_by()
    if starter == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if starter == "torchrun" else LightningEnvironment()


def shard(model: nn.Module, mesh: Any) -> None:
    """Apply FSDP2 with one unit for each block, which is gathered when it is computed, and one for the rest."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if is_sharded(model):  # Lightning asks again before the test
        return
    for block in _blocks(model):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    for method in _OTHER_WAYS_IN:
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a network: the members of its innermost sequences of equal modules."""
    blocks = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            members = [m for m in module if next(m.parameters(), None) is not None]
            kinds = {type(m) for m in members}
            if len(members) > 1 and len(kinds) == 1 and not isinstance(members[0], (nn.ModuleList, nn.Sequential)):
                blocks += members
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    return [block for block in blocks if id(block) not in inner]


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_shard(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor; other tensors are returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load an unsharded state dict into a module, sharded or not. Every process must call this."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=True))


def whole(model: nn.Module, make: Callable[[], nn.Module], state: Mapping[str, Any]) -> nn.Module:
    """Return `model`, or if it is sharded a new one from `make` with the weights of the task's `state`.

    The result can be used by one process alone.
    """
    if not is_sharded(model):
        return model
    unsharded = make()
    unsharded.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    )
    return unsharded


def of_all_processes(value: Tensor) -> Tensor:
    """Gather a tensor [...] from all processes into [processes, ...], by rank. Every process must call this."""
    count, _ = _group()
    if count == 1:
        return value[None]
    parts = [torch.empty_like(value) for _ in range(count)]
    torch.distributed.all_gather(parts, value.contiguous())
    return torch.stack(parts)


def of_this_process(values: Tensor) -> Tensor:
    """Return this process's part of what `of_all_processes` gathered.

    If the number of processes has changed since, rank 0 gets the sum and the others 0.
    """
    count, own = _group()
    if len(values) == count:
        return values[own]
    return values.sum(0) if own == 0 else torch.zeros_like(values[0])


def _group() -> tuple[int, int]:
    """Return the number of processes and the rank of this one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
