"""Prints the estimated and the measured peak memory of two training steps, in bytes.

python memory_probe.py all|sixth|adapter SETTINGS_JSON, with MALLOC_MMAP_THRESHOLD_=65536 so that
freed tensors leave the process.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from layerloom.engine.models.layered_transformer import LayerSegment
from layerloom.engine.training.adapter import adapted_network
from layerloom.engine.training.estimate import estimate, work_of
from layerloom.engine.training.networks import build_network, choose_trainable
from layerloom.engine.training.settings import AdapterSettings, TrainingSettings
from layerloom.engine.training.trainer import Trainer

BATCH, TOKENS = 4, 48 + 16 * 12 * 12
SHAPE = {
    "num_layers": 12,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "time_embed_dim": 128,
    "text_embed_dim": 256,
}


class Stage:
    """Random latents of 16 frames and 24x24 positions."""

    hidden = ("transformer_blocks",)

    def __init__(self, network):
        self.network, self.blocks = network, network.transformer.transformer_blocks

    def draw(self, generator, shares):
        return [torch.randn(BATCH, 16, 16, 24, 24, generator=generator)]

    def loss(self, x):
        segments = [LayerSegment(n, 4) for n in ("foreground", "alpha", "background", "blended")]
        time, text = torch.full((BATCH,), 500), torch.zeros(BATCH, 3, 16, 256)
        out = self.network.transformer(x, time, text, segments)
        return (out.float() - x).square().mean(), {}


def status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def main(kind: str, changes: str) -> None:
    settings = TrainingSettings(
        **{"steps": 9, "batch": BATCH, "learning_rate": 1e-4, **json.loads(changes)}
    )
    # Libraries set themselves up before the measure is taken.
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    query = torch.randn(1, 2, 64, 64, requires_grad=True)
    nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    gc.collect()
    before = status("VmRSS")

    network = build_network(SHAPE, None)
    if kind == "sixth":
        choose_trainable(network, "sixth", set())
    elif kind == "adapter":
        network = adapted_network(network, AdapterSettings("a", 16, 16.0, "sixth"), {})
    for parameter in network.parameters():
        if not parameter.requires_grad and settings.frozen == "bf16":
            parameter.data = parameter.data.bfloat16()
    expected = estimate(work_of(network, TOKENS, BATCH), settings, cuda=False).total
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Stage(network), settings, Path(folder))
        for _ in range(2):
            trainer.train_step()
    print(expected, status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
