"""The optimiser's state spread over the processes, whole parameters each (ZeRO stage 1, arXiv:1910.02054).

Each process has all weights and all averaged gradients, steps the parameters it owns and hands them to the others.  An
optimiser passes over a parameter that has no gradient and keeps nothing of it, so any of them works, also those that
need the whole tensor (LAMB, Muon), and every weight is what it would be without sharding, bit for bit.
Parameters are numbered as in the optimiser's state_dict.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.config import TrainConfig
from training.world import World


def assign_owners(config: TrainConfig, optimizer: torch.optim.Optimizer, world: World) -> list[int]:
    """Return the rank that steps each parameter, or nothing if every process is to step all.

    The largest parameter first, each to the process that has the fewest weights yet.
    """
    if not config.shard_optimizer or world.size == 1:
        return []
    sizes = [parameter.numel() for parameter in _list_parameters(optimizer)]
    owners, loads = [0] * len(sizes), [0] * world.size
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


def drop_gradients_of_others(optimizer: torch.optim.Optimizer, owners: list[int], rank: int) -> None:
    """Leave gradients only where this process is the one to step."""
    for parameter, owner in zip(_list_parameters(optimizer), owners, strict=True):
        if owner != rank:
            parameter.grad = None


def share_weights(optimizer: torch.optim.Optimizer, owners: list[int]) -> None:
    """Give every process each parameter as its owner has it."""
    pairs = zip(_list_parameters(optimizer), owners, strict=True)
    waits = [dist.broadcast(parameter.data, src=owner, async_op=True) for parameter, owner in pairs]
    for wait in waits:
        wait.wait()  # type: ignore[union-attr]


def send_state(state: dict[str, Any], owners: list[int], world: World) -> None:
    """Give the first process what this one's optimiser.state_dict() has of its own parameters."""
    for number, owner in enumerate(owners):
        if owner == world.rank:
            dist.send_object_list([_to_memory(state["state"].get(number))], dst=0, group=world.group)


def receive_state(state: dict[str, Any], owners: list[int], world: World) -> dict[str, Any]:
    """Return the first process's optimiser.state_dict() with what the others send, one parameter at a time."""
    whole = dict(state["state"])
    for number, owner in enumerate(owners):
        if owner != 0:
            box: list[Any] = [None]
            dist.recv_object_list(box, src=owner, group=world.group)
            whole |= {} if box[0] is None else {number: box[0]}
    return state | {"state": dict(sorted(whole.items()))}


def keep_own(state: dict[str, Any], owners: list[int], rank: int) -> dict[str, Any]:
    """Return a whole optimiser.state_dict() without what other processes hold."""
    if not owners:
        return state
    return state | {"state": {number: value for number, value in state["state"].items() if owners[number] == rank}}


def _list_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _to_memory(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
