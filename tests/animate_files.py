"""A whole DynamiCrafter file in miniature: golden UNet and projector, random parts, a tokenizer."""

import gzip
import json
import re
from pathlib import Path

import torch

from layerloom.engine.checkpoints.golden import load_case

# Full width -> tiny width, for each part of the official file.
WIDTHS = {
    "first_stage_model.": {128: 8, 256: 16, 512: 24},
    "cond_stage_model.": {1024: 16, 3072: 48, 4096: 32, 49408: 514},
    "embedder.": {1280: 20, 3840: 60, 5120: 40, 1024: 16, 3072: 48, 4096: 32, 49408: 514},
}
BLOCKS = 3


def whole_state(golden_dir: Path, manifest_dir: Path, name: str = "512") -> dict[str, torch.Tensor]:
    """Tensors under the official names, all parts inside."""
    case = load_case(golden_dir, f"dc_ckpt_tiny_{name}like")
    state = case.weights("")
    manifest = manifest_dir / f"dynamicrafter_{name}.json.gz"
    generator = torch.Generator().manual_seed(0)
    for key, shape in json.loads(gzip.decompress(manifest.read_bytes())).items():
        part = next((part for part in WIDTHS if key.startswith(part)), None)
        block = re.search(r"resblocks\.(\d+)\.", key)
        if part is None or (block and int(block[1]) >= BLOCKS):
            continue
        noise = torch.randn([WIDTHS[part].get(n, n) for n in shape], generator=generator)
        norm = re.search(r"(?:norm\w*|ln_\w+)\.weight", key)
        state[key] = 1 + 0.1 * noise if norm else 0.15 * noise
    return state


def write_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """As the official release has it: a pickle with the tensors under ``state_dict``."""
    torch.save({"state_dict": state, "global_step": 1}, path)
    return path


def write_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer without merges: every byte is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    # The printable stand-ins for bytes that CLIP and GPT-2 use.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return folder
