"""A small training run in a process of its own, for tests that need several or kill one.

python train_worker.py RECIPE FOLDER LOSSES [key=value ...]: appends "step loss" lines to LOSSES.
"""

import os
import sys
from pathlib import Path

import torch

from layerloom.engine.training.distributed import leave_together
from layerloom.engine.training.recipe import train_from_recipe


def main(recipe: str, folder: str, losses: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    changes = dict(item.split("=", 1) for item in overrides)
    resume = changes.pop("resume", "false") == "true"

    def report(phase, done, total, numbers):
        if phase == "training":
            with open(losses, "a", encoding="utf-8") as file:
                file.write(f"{done} {numbers['loss']!r}\n")

    train_from_recipe(Path(recipe), {**changes, "folder": folder}, resume, report)
    leave_together()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
