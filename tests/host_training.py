"""Run by test_host_train.py beside a ComfyUI: training on a published-format file in every type.

Arguments: the ComfyUI folder and a checkpoint that carries motion and content. Prints one JSON line
a type: the loss before and after a few steps, and the cosine between what the adapter adds to the
weights and what it adds in float32; then a line about the checkpoint's own adapters.
"""

import importlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

comfy, carrying = sys.argv[1:3]
base = Path(tempfile.mkdtemp())
for name in ("models/loras", "models/checkpoints", "custom_nodes", "temp", "user"):
    (base / name).mkdir(parents=True)
sys.argv = [sys.argv[0], "--cpu", "--base-directory", str(base)]
sys.path.insert(0, comfy)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(True)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location(
    "pack", root / "__init__.py", submodule_search_locations=[str(root)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
names = ("loader", "lora", "train")
loader, lora, train = (importlib.import_module(f"pack.nodes.host.{name}") for name in names)
open_checkpoint = importlib.import_module("pack.engine.checkpoints.load").open_checkpoint
given_clip = importlib.import_module("pack.engine.training.data.in_memory").given_clip
save = importlib.import_module("pack.engine.checkpoints.save").save_checkpoint
transformer = importlib.import_module("pack.engine.models.layered_transformer").LayeredTransformer
initialise = importlib.import_module("pack.engine.training.networks").initialise
network_of = importlib.import_module("pack.engine.training.networks").LayeredNetwork

SHAPE = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 16,
    "text_embed_dim": 12,
}


def checkpoint(path: Path) -> Path:
    """A small network without an autoencoder: the host chooses its type as for published files."""
    torch.manual_seed(0)
    network = transformer(**SHAPE)
    initialise(network_of(network))
    for name, parameter in network.named_parameters():
        # Gates and outputs begin at zero, where nothing could be learnt.
        if name.startswith(("proj_out", "norm_out")) or ".linear." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    sequence = {"layers": ["foreground", "alpha", "background", "blended"], "frames": 4}
    save(
        path,
        network.state_dict(),
        variant="rgba-generate",
        transformer=SHAPE,
        sequence=sequence,
        sampling={"sampler": "ddim", "steps": 4, "guidance": 1.0},
        metadata={"video": {"height": 64, "width": 64}, "tasks": ["generate"]},
    )
    return path


class Pooled:
    """Stands in for the VAE: colours of 8x8 pixels and one frame of four."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        colours = images.movedim(-1, 0)[None] * 2 - 1
        small = torch.nn.functional.avg_pool3d(colours, (4, 8, 8))
        return small.repeat(1, 6, 1, 1, 1)[:, :16]


def options(kind: str = "plain") -> object:
    return train.TrainOptions(
        name="small",
        kind=kind,
        rank=4,
        lora_alpha=4.0,
        steps=40,
        learning_rate=2e-2,
        batch_size=4,
        seed=0,
        continue_from="[None]",
        blocks="all",
        video_share=0.1,
        text_dropout=0.0,
        accumulate=1,
        save_every=100,
        width=0,
        height=0,
        frames=0,
    )


path = checkpoint(base / "models" / "checkpoints" / "small.safetensors")
generator = torch.Generator().manual_seed(1)
images = [torch.rand(4, 64, 64, 3, generator=generator) for _ in range(2)]
first = torch.empty(0)
for flag in (None, "bf16_unet", "fp16_unet", "fp8_e4m3fn_unet"):
    if flag:
        setattr(args, flag, True)
    said = []
    with torch.inference_mode():
        model = loader.load_model(str(path))
        text = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))
        clip = given_clip(
            "it", images[0], images[0][..., 0], images[1], None, text, model.model.settings.sequence
        )
        made = train.LoraTraining(model, Pooled(), [clip], options(), said.append).run().lora
    added = torch.cat([made.delta(module).flatten() for module in made.targets])
    first = first if flag else added
    before, after = said[-1].split(": ")[1].split(" before, ")
    result = {
        "type": str(model.model.get_dtype()).removeprefix("torch."),
        "before": float(before),
        "after": float(after.removesuffix(" after.")),
        "cosine": float(torch.nn.functional.cosine_similarity(added, first, dim=0)),
    }
    print(json.dumps(result))
    if flag:
        setattr(args, flag, False)

# Content is trained on the model as it is connected, but motion is switched by the kind of clip.
with torch.inference_mode():
    model = lora.toggled(loader.load_model(carrying), {"motion": 0.7, "content": 0.5})
    words = torch.zeros(3, 16, 64)
    sequence = model.model.settings.sequence
    clip = given_clip("it", images[0], images[0][..., 0], images[1], None, words, sequence)
    run = train.LoraTraining(model, None, [clip], options("content"), str)
    with torch.inference_mode(False), run._network() as (network, _):
        state = network.transformer.network.state_dict()
        strengths = {"motion": 0.0, "content": 0.5}
        expected = open_checkpoint(carrying).transformer_state(strengths, dtype=torch.float32)
        apart = max(float((state[name] - tensor).abs().max()) for name, tensor in expected.items())
        beside = {name: float(other.strength) for name, other in network.others.items()}
print(json.dumps({"type": "own", "beside": beside, "apart": apart}))
