"""The process group of the learners: how they meet, and sums and maxima over them."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store, TCPStore

_TIMEOUT = timedelta(minutes=30)
"""Time limit of one collective: how long a learner may wait for another's micro-batch. If a learner
dies, the driver ends the group long before that."""

_hosted: list[TCPStore] = []


def host_meeting() -> tuple[str, int]:
    """Opens the store where the ranks meet, in the process of rank 0; returns its host and port."""
    host = _own_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
    _hosted.append(store)  # it closes with its last reference
    return host, store.port


def join_group(rank: int, world: int, meeting: tuple[str, int] | None, timeout_s: float) -> None:
    """Makes this process one rank of the group; a group of one needs no meeting.

    A group of one keeps its store in memory: another process cannot take its port, and a child
    process does not inherit one through the environment.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; Ray shows one GPU
    if world == 1:
        store: Store = HashStore()
    elif rank == 0 and _hosted:
        store = _hosted[-1]
    elif meeting is not None:
        store = TCPStore(
            *meeting, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
    else:
        raise ValueError(f"rank {rank} of {world} has no meeting place")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT)


def rank() -> int:
    """Rank of this process; 0 before it joins a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank (on the CPU)."""
    if world_size() == 1:
        return tensor
    placed = tensor.clone().to("cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(placed)
    return placed.cpu()


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The largest of every rank's tensor, element by element, on every rank (on the CPU)."""
    if world_size() == 1:
        return tensor
    placed = tensor.clone().to("cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(placed, dist.ReduceOp.MAX)
    return placed.cpu()


def _own_address() -> str:
    """The address that other nodes reach this one by."""
    try:
        import ray

        if ray.is_initialized():
            return str(ray.util.get_node_ip_address())
    except ImportError:
        pass
    return socket.gethostbyname(socket.gethostname())
