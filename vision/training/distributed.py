"""Several processes: which one this is, how gradients and weights are shared, and what a checkpoint holds of them.

Lightning moves the data; here is what it leaves open.

* DDP (S. Li et al.: PyTorch Distributed, VLDB 2020): a copy of the model on every device. FSDP2
  (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html), through Lightning's ModelParallelStrategy: a
  part of every weight on every device, gathered a block at a time.
* Processes are started by `launch.py`, by torchrun or by Slurm's srun. The environment is told to Lightning, not
  guessed by it: inside an allocation of Slurm without srun it would wait for processes that nobody starts, and it
  would requeue the job behind our back.
* A checkpoint is one file with whole weights under either strategy, and loads anywhere. With FSDP the optimiser's
  state in it is whole too.
* Means that run through an epoch (the training loss) are kept in the checkpoint for each process. Lightning saves the
  first one's and gives it to all: a resumed epoch would count it as often as there are processes.
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
"""Methods of a backbone by which training may call it instead of `forward` (distillation.py)."""


def make_strategy(train: TrainConfig) -> Strategy | str:
    if train.processes == 1:
        return "auto"
    if train.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=train.processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return DDPStrategy()


def on_gpu(train: TrainConfig) -> bool:
    """Whether training will be on CUDA devices."""
    return train.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def make_environment() -> ClusterEnvironment:
    starter = started_by()
    if starter == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if starter == "torchrun" else LightningEnvironment()


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2: a unit of its own for every block, which is gathered when its turn comes, and one for the rest."""
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
    """The repeated parts of a network: the members of its innermost sequences that hold most of the weights."""
    found = []
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            members = [m for m in module if next(m.parameters(), None) is not None]
            kinds = {type(m) for m in members}
            if len(members) > 1 and len(kinds) == 1 and not isinstance(members[0], (nn.ModuleList, nn.Sequential)):
                found += members
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inner]


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor that is spread over processes is here; of any other all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """A whole state dict into a module, in whatever way that one is shared. Every process calls it."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=True, strict=True))


def whole(model: nn.Module, make: Callable[[], nn.Module], state: Mapping[str, Any]) -> nn.Module:
    """`model`, or where it is in parts a new one with the weights of the task's `state`, for one process alone."""
    if not is_sharded(model):
        return model
    again = make()
    again.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    )
    return again


def of_all_processes(value: Tensor) -> Tensor:
    """[...] of this process to [processes, ...] of all, in their order. Every process calls it."""
    count, _ = _group()
    if count == 1:
        return value[None]
    parts = [torch.empty_like(value) for _ in range(count)]
    torch.distributed.all_gather(parts, value.contiguous())
    return torch.stack(parts)


def of_this_process(values: Tensor) -> Tensor:
    """What `of_all_processes` made, back; with another number of processes the first takes the sum, the others 0."""
    count, own = _group()
    if len(values) == count:
        return values[own]
    return values.sum(0) if own == 0 else torch.zeros_like(values[0])


def _group() -> tuple[int, int]:
    """How many processes there are, and which this is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
