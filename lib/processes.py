"""Many processes: minibatches are dealt to them, and one result comes back to all.

Under ``torchrun`` every process runs the same program. Process 0 keeps the cache and writes files.
With a single process everything here does nothing.
"""

import dataclasses
import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def joined(device="cpu"):
    """Join the processes that ``torchrun`` has started, if it has; yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        yield device
        return
    if on_gpu := torch.device(device).type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    # States of a metric may be on the GPU and on the CPU.
    # One process may wait long for another that works; a dead one is noticed at once.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=2))
    try:
        yield device
    except RuntimeError as error:
        # It may say no more than that another process is gone.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        why = "another process of this run has failed, see what it says; no record was written"
        raise RuntimeError(why) from error
    finally:
        dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Share:
    """The minibatches of this process: ``number in share``."""

    place: int
    of: int
    group: object = None  # of the processes that have minibatches, None if all have some

    def __contains__(self, batch: int) -> bool:
        return batch % self.of == self.place

    @property
    def idle(self) -> bool:
        """Whether nothing is left for this process."""
        return self.place >= self.of


def share(full_batches: int) -> Share:
    """Deal minibatches, so that every process that has any has a full one.

    Adding up a metric's states needs all who take part, with the same states. So processes for
    which no minibatch is left, or only a last one that may be too small to use, take no part.
    """
    of = max(1, min(count(), full_batches))
    group = dist.new_group(range(of)) if of < count() else None
    return Share(rank(), of, group)


def together(keep: Callable, compute: Callable):
    """``keep(compute)`` in process 0, with ``compute`` in all; its result, in all.

    ``keep`` decides whether to compute at all, as a cache does.
    """
    if count() == 1:
        return keep(compute)
    if rank() == 0:
        result = keep(lambda: _tell("compute") and compute())
        return _tell("result", result)[1]
    while (told := _tell())[0] == "compute":
        compute()
    return told[1]


def _tell(*message):
    """Process 0 tells the others something; what it told, in all."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]
