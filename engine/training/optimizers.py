"""Optimisers of a run: what they train, and where their states live."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..errors import LayerLoomError
from .settings import TrainingSettings

BETAS = (0.9, 0.98)


class Optimizers:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Muon: K. Jordan et al. 2024; updates are scaled to AdamW's size (Moonlight, arXiv 2502.16982),
    so one learning rate serves both. A convolution's kernel is the matrix from all it sees at one
    place to its output channels.

    With ``offload`` the optimisers work on master copies in the host's memory: gradients go there,
    new weights come back, and the GPU holds neither states nor copies.

    Args:
        network: its parameters that require gradients are trained.
        hidden: parts of the names of hidden matrices, which Muon may train.
    """

    def __init__(self, network: nn.Module, hidden: Iterable[str], settings: TrainingSettings):
        named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.masters = self.parameters
        if settings.offload:
            self.masters = [
                nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                for p in self.parameters
            ]
        matrices, rest = [], []
        # Kernels and their copies as matrices.
        self.kernels: list[tuple[nn.Parameter, nn.Parameter]] = []
        for (name, _), master in zip(named, self.masters, strict=True):
            matrix = master.ndim >= 2 and any(part in name for part in hidden)
            if not matrix or settings.optimizer != "muon":
                rest.append(master)
            elif master.ndim == 2:
                matrices.append(master)
            else:
                matrices.append(nn.Parameter(master.detach().flatten(1).clone()))
                self.kernels.append((master, matrices[-1]))
        self.each: list[torch.optim.Optimizer] = []
        decay, rate = settings.weight_decay, settings.learning_rate
        if rest:
            self.each.append(torch.optim.AdamW(rest, lr=rate, betas=BETAS, weight_decay=decay))
        if matrices:
            if not hasattr(torch.optim, "Muon"):
                raise LayerLoomError("optimizer = 'muon' needs torch 2.9 or newer; use adamw.")
            self.each.append(
                torch.optim.Muon(
                    matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )

    @property
    def offloaded(self) -> bool:
        return self.masters is not self.parameters

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at a learning rate; gradients are spent."""
        if self.offloaded:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if parameter.grad is not None:
                    master.grad = parameter.grad.to(master)
                    parameter.grad = None
        for kernel, matrix in self.kernels:
            matrix.copy_(kernel.flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
            kernel.grad = None
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for kernel, matrix in self.kernels:
            kernel.copy_(matrix.view(kernel.shape))
        if self.offloaded:
            self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the network."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the network's weights as masters, after they were loaded."""
        if self.offloaded:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.copy_(parameter)
