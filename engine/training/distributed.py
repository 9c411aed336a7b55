"""The processes of a run: one by itself, or many through Hugging Face accelerate."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..device import pick_device
from ..errors import LayerLoomError
from .settings import TrainingSettings


class Step(nn.Module):
    """A stage's loss as a module, so that wrappers see one forward pass a step."""

    def __init__(self, stage: Any):
        super().__init__()
        self.network = stage.network
        self._loss = stage.loss

    def forward(self, drawn: Any) -> tuple[torch.Tensor, dict[str, float]]:
        return self._loss(drawn)


class Processes:
    """A run's processes as the trainer sees them: this class is the run of a single one.

    Attributes:
        rank, count: which process this is, of how many.
        device: where this process computes.
        sharded: every process holds a part of each weight (FSDP).
    """

    rank, count, sharded = 0, 1, False

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def wrap(self, stage: Any) -> nn.Module:
        """The stage's loss on this process's device, gradients shared with the others."""
        stage.network.to(self.device)
        return Step(stage)

    def held_back(self, step: nn.Module) -> AbstractContextManager[None]:
        """Gradients stay on the process while this is open."""
        return nullcontext()

    def means(self, numbers: dict[str, float]) -> dict[str, float]:
        """Each number's mean over the processes that have it: not every share has every number."""
        return numbers

    def wait(self) -> None:
        """Until all processes are here."""


class AcceleratedProcesses(Processes):
    """Processes started by ``accelerate launch`` or torchrun, on one machine or many."""

    def __init__(self, accelerator: Any, sharded: bool):
        super().__init__(accelerator.device)
        self.accelerator, self.sharded = accelerator, sharded
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def wrap(self, stage: Any) -> nn.Module:
        stage.network.to(self.device)
        step = Step(stage)
        if self.sharded:
            shard(step, stage.blocks, self.device, self.count)
            return step
        return self.accelerator.prepare_model(step)

    def held_back(self, step: nn.Module) -> AbstractContextManager[None]:
        if self.sharded:
            return _unsynchronised(step)
        return self.accelerator.no_sync(step)

    def means(self, numbers: dict[str, float]) -> dict[str, float]:
        from accelerate.utils import gather_object

        found: dict[str, list[float]] = {}
        for own in gather_object([numbers]):
            for name, value in own.items():
                found.setdefault(name, []).append(value)
        return {name: fmean(values) for name, values in found.items()}

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


class _unsynchronised(AbstractContextManager):
    def __init__(self, step: nn.Module):
        self.step = step

    def __enter__(self) -> None:
        self.step.set_requires_gradient_sync(False)

    def __exit__(self, *error: object) -> None:
        self.step.set_requires_gradient_sync(True)


def find_processes(settings: TrainingSettings) -> Processes:
    """The processes of this run; accelerate is imported only where there are several, or FSDP.

    Raises:
        LayerLoomError: accelerate is missing, or the device cannot be had.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sharded = settings.parallel == "fsdp"
    if not several and not sharded:
        return Processes(pick_device(settings.device or None))
    if settings.offload and several:
        raise LayerLoomError(
            "offload = true is for one process; with several use parallel = 'fsdp', which splits "
            "what would be offloaded."
        )
    if sharded and "RANK" not in os.environ:
        raise LayerLoomError(
            "parallel = 'fsdp' splits the weights among processes: start it with accelerate launch "
            "or torchrun (docs/training.md)."
        )
    if sharded:
        try:
            from torch.distributed.fsdp import fully_shard  # noqa: F401
        except ImportError:
            raise LayerLoomError("parallel = 'fsdp' needs torch 2.6 or newer; use ddp.") from None
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ModuleNotFoundError as error:
        raise LayerLoomError(
            "Training on several processes needs accelerate; pip install 'layerloom[train]'."
        ) from error
    # A launcher's own FSDP settings would wrap what is wrapped here.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    # Each task leaves other weights unused: text of the scene, the mark of given layers.
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=settings.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",
        kwargs_handlers=[options],
    )
    return AcceleratedProcesses(accelerator, sharded)


def shard(step: nn.Module, blocks: Iterable[nn.Module], device: torch.device, count: int) -> None:
    """Split every weight among the processes, in place: a unit a block, one for the rest.

    PyTorch FSDP2 (Zhao et al., arXiv 2304.11277, in its per-parameter form): a block's weights are
    gathered when it runs and let go after.

    Raises:
        LayerLoomError: a unit mixes types or has nothing to train beside what has.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kinds = {p.dtype for p in step.parameters()}
    if len(kinds) > 1:
        raise LayerLoomError(
            "parallel = 'fsdp' needs weights of one type; leave frozen = 'bf16' out or use ddp."
        )
    mesh = init_device_mesh(device.type, (count,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep a block's input alone and compute the block again for its gradients.

    Chen et al. 2016 (arXiv 1604.06174); set on the instances, so names and classes stay.
    """
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def leave_together() -> None:
    """End this process of several once every one has written all it will; one alone goes on.

    Threads of torch.distributed can let go of tensors while Python takes itself down, and that
    aborts a run that is complete (github.com/pytorch/pytorch/pull/179291): here nothing is taken
    down.
    """
    if not torch.distributed.is_initialized():
        return
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from all processes where they share it; on the CPU."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu")
