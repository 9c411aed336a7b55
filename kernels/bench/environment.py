"""Where a benchmark ran: versions, processor or card, date, and what memory is free."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "diffusers", "sageattention", "flash-attn", "flash-attn-3", "comfy-kitchen")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about this machine that the numbers depend on, as JSON can hold it."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "card_memory": card.total_memory,
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        found["vector_instructions"] = torch.backends.cpu.get_cpu_capability()
        if hasattr(os, "getloadavg"):
            # More than the threads above means that other work shared the cores.
            found["load_average_before"] = round(os.getloadavg()[0], 2)
    return found


def sentence(found: dict[str, Any]) -> str:
    """The environment in a line for people."""
    if found["device"] == "cuda":
        where = (
            f"{found['card']} (compute capability {found['capability']}, CUDA {found['cuda']}, "
            f"cuDNN {found['cudnn']})"
        )
    else:
        where = (
            f"{found['processor']} ({found['cores']} cores, threads: {found['threads']}, "
            f"{found['vector_instructions']}, load average {found.get('load_average_before', '?')}"
            " at the start)"
        )
    versions = ", ".join(f"{name} {found[name]}" for name in PACKAGES if name in found)
    versions = f", {versions}" if versions else ""
    return (
        f"{found['date']}, {where}, torch {found['torch']}{versions}, Python {found['python']}, "
        f"{found['system']}"
    )


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def free_memory(device: torch.device) -> int | None:
    """Bytes a run may still take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None
