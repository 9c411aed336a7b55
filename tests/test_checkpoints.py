"""Checkpoints: detection by keys, conversion, loading, saving, and every way they can be wrong."""

import errno
import gzip
import json
import os
import pickle
import random
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from layerloom.engine.checkpoints.adapters import fold, unfold
from layerloom.engine.checkpoints.convert import convert_checkpoint
from layerloom.engine.checkpoints.detect import inspect_checkpoint
from layerloom.engine.checkpoints.load import from_store, load_transformer, open_checkpoint
from layerloom.engine.checkpoints.reader import TensorSpec, memory_store
from layerloom.engine.checkpoints.save import Pending, save_checkpoint, write_safetensors
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.layered_transformer import LayeredTransformer
from layerloom.engine.models.layerflow import VARIANTS

PREFIX = "model.diffusion_model."
MANIFESTS = {
    "layerflow_rgb_generate": "rgb",
    "layerflow_rgb_decompose": "rgb-decompose",
    "layerflow_rgba_generate": "rgba-generate",
    "layerflow_rgba_decompose": "rgba-decompose",
    "layerflow_rgba_conditioned": "rgba-conditioned",
}


def manifest(folder, name):
    return json.loads(gzip.decompress((folder / f"{name}.json.gz").read_bytes()))


def meta_checkpoint(shapes):
    tensors = {k: torch.empty(s, device="meta", dtype=torch.float16) for k, s in shapes.items()}
    return from_store(memory_store(tensors, "published"))


@pytest.fixture
def sat_file(tiny_sat, tmp_path):
    """A pickle as a training run leaves it: other networks and random states beside ``module``."""
    module = tiny_sat()
    module["conditioner.embedders.0.weight"] = torch.zeros(2)
    module["first_stage_model.decoder.weight"] = torch.zeros(2)
    path = tmp_path / "mp_rank_00_model_states.pt"
    states = {"np_rng_state": np.random.get_state(), "random_rng_state": random.getstate()}
    torch.save({"module": module, "iteration": 1000, **states}, path)
    return path


# Full size, on the meta device


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_published_key_maps(manifest_dir, name):
    checkpoint = meta_checkpoint(manifest(manifest_dir, name))
    checkpoint.check()
    info, variant = checkpoint.info, VARIANTS[MANIFESTS[name]]
    assert (info.variant, info.source) == (variant.name, "layerflow-sat")
    assert info.adapters == {"motion": 8, "content": 256}
    # CogVideoX-2B's count; the layer embedding adds Linear(1, 1920) and LayerNorm(1920).
    assert info.parameters == 1_693_783_872 + (4 * 1920 if variant.layer_embedding else 0)
    assert info.transformer["position_table"] == (
        variant.text_length,
        variant.latent_frames,
        30,
        45,
    )
    network = LayeredTransformer(**info.transformer, device="meta")
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    sources = checkpoint.plan.transformer.items()
    assert {key: source.spec(checkpoint.store).shape for key, source in sources} == expected
    linear = {key for key in expected if re.search(r"attn1\.to_(q|k|v|out\.0)\.weight", key)}
    for pairs in checkpoint.plan.adapters.values():
        assert {f"{module}.weight" for module in pairs} == linear


def test_the_eight_configs_are_the_five_variants(manifest_dir):
    """Shapes taken from the instantiated official classes, one layer repeated 30 times."""
    one = json.loads((manifest_dir / "lf_manifest_full_1layer.json").read_text())
    expected = {
        "gen_rgb": "rgb",
        "fg2bg_rgb": "rgb",
        "bg2fg_rgb": "rgb",
        "seg_rgb": "rgb-decompose",
        "gen_rgba": "rgba-generate",
        "seg_rgba": "rgba-decompose",
        "fg2bg_rgba": "rgba-conditioned",
        "bg2fg_rgba": "rgba-conditioned",
    }
    for config, variant in expected.items():
        shapes = {**one["gen_rgb"], **one.get(f"{config}_difference_to_gen_rgb", {})}
        full = {}
        for key, shape in shapes.items():
            for layer in range(30):
                full[re.sub(r"(layers|modulations|layernorm_list)\.0\.", rf"\1.{layer}.", key)] = (
                    shape
                )
        checkpoint = meta_checkpoint(full)
        checkpoint.check()
        assert checkpoint.info.variant == variant, config


def test_missing_left_over_and_misshapen_keys_are_named(manifest_dir):
    shapes = manifest(manifest_dir, "layerflow_rgb_generate")
    gone = f"{PREFIX}transformer.layers.7.mlp.dense_4h_to_h.bias"
    with pytest.raises(LayerLoomError, match=r"transformer_blocks\.7\.ff\.net\.2\.bias is missing"):
        meta_checkpoint({k: s for k, s in shapes.items() if k != gone}).check()
    with pytest.raises(LayerLoomError, match="surprise.weight is not part of the network"):
        meta_checkpoint({**shapes, f"{PREFIX}surprise.weight": [3]}).check()
    with pytest.raises(LayerLoomError, match=r"ff\.net\.2\.bias has an unexpected shape"):
        meta_checkpoint({**shapes, gone: [1919]}).check()
    lora = f"{PREFIX}transformer.layers.7.attention.dense.matrix_D.0"
    with pytest.raises(LayerLoomError, match="content adapter of .*to_out.0 has an unexpected"):
        meta_checkpoint({**shapes, lora: [1920, 255]}).check()
    with pytest.raises(LayerLoomError, match="'content' lacks one of its two"):
        meta_checkpoint({k: s for k, s in shapes.items() if k != lora})
    table = f"{PREFIX}mixins.pos_embed.pos_embedding"
    with pytest.raises(LayerLoomError, match="position table of 18229 rows"):
        meta_checkpoint({**shapes, table: [1, 18229, 1920]})
    with pytest.raises(LayerLoomError, match="no published shape: 3 prompts, 14 latent frames"):
        meta_checkpoint({**shapes, table: [1, 678 + 14 * 1350, 1920]})


# A LayerFlow file on disk


def test_a_sat_pickle_is_detected_by_its_keys(sat_file):
    info = inspect_checkpoint(sat_file)
    assert (info.variant, info.source, info.dtype) == ("rgba-generate", "layerflow-sat", "float32")
    assert info.transformer["num_layers"] == 2 and info.transformer["layer_embedding"]
    assert info.adapters == {"motion": 3, "content": 6}
    assert info.bytes == sat_file.stat().st_size
    assert inspect_checkpoint(sat_file.parent) == info  # the folder stands for its one file
    renamed = sat_file.rename(sat_file.with_name("cat.jpg"))
    assert inspect_checkpoint(renamed).variant == "rgba-generate"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}])
def test_bare_and_state_dict_pickles_and_bare_names_open(tiny_sat, tmp_path, wrap):
    state = {key.removeprefix(PREFIX): t for key, t in tiny_sat().items()}
    torch.save(wrap(state), tmp_path / "x")
    load_transformer(tmp_path / "x")


def test_an_old_style_pickle_opens(tiny_sat, tmp_path):
    state = {"module": tiny_sat("layerflow_rgb_decompose")}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert inspect_checkpoint(tmp_path / "old.pt").variant == "rgb-decompose"


def test_adapters_fold_with_their_default_and_given_strengths(tiny_sat, sat_file):
    state = {k.removeprefix(PREFIX): t.double() for k, t in tiny_sat().items()}
    qkv = "transformer.layers.1.attention.query_key_value."
    key, rows = "transformer_blocks.1.attn1.to_k.weight", slice(16, 32)
    base = state[f"{qkv}original.weight"][rows]
    motion = state[f"{qkv}matrix_B.1"] @ state[f"{qkv}matrix_A.1"] / 3
    content = state[f"{qkv}matrix_D.1"] @ state[f"{qkv}matrix_C.1"] / 6
    checkpoint = open_checkpoint(sat_file)
    for given, expected in (
        (None, base + content),
        ({"motion": 1.0}, base + motion + content),
        ({"motion": 0.5, "content": 0.25}, base + 0.5 * motion + 0.25 * content),
        ({"content": 0.0}, base),
    ):
        found = checkpoint.transformer_state(given)[key]
        assert found.dtype == torch.float32
        # One rounding of values near 1 to float32.
        assert float((found.double() - expected).abs().max()) < 5e-7
    with pytest.raises(LayerLoomError, match="no adapter 'style'; its adapters: motion, content"):
        checkpoint.transformer_state({"style": 1.0})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fold_and_unfold_are_inverse(dtype):
    torch.manual_seed(0)
    weight, a, b = (torch.randn(s, dtype=dtype) for s in ((12, 10), (4, 10), (12, 4)))
    folded = fold(weight, a, b, 0.7)
    exact = weight.double() + 0.7 * (b.double() @ a.double()) / 4
    assert float((folded.double() - exact).abs().max()) < 8 * torch.finfo(dtype).eps
    back = unfold(folded, a, b, 0.7)
    assert float((back - weight).abs().max()) < 8 * torch.finfo(dtype).eps
    assert fold(weight, a, b, 0.0) is weight


def test_half_precision_folds_round_once():
    torch.manual_seed(0)
    weight, a, b = (torch.randn(s, dtype=torch.bfloat16) for s in ((64, 64), (256, 64), (64, 256)))
    exact = weight.double() + (b.double() @ a.double()) / 256
    rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert float((fold(weight, a, b).double() - exact).abs().max()) <= 0.51 * rounding


def test_a_converted_file_loads_the_same_network(sat_file, tmp_path):
    calls = []
    target = tmp_path / "converted.safetensors"
    convert_checkpoint(sat_file, target, lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls) and calls[0][0] == 0 and calls[-1][0] == calls[-1][1] > 0
    assert (
        os.listdir(tmp_path).count("converted.safetensors")
        == 1
        == len([name for name in os.listdir(tmp_path) if "converted" in name])
    )
    direct, streamed = open_checkpoint(sat_file), open_checkpoint(target)
    assert streamed.info.source == "layerloom"
    for field in ("variant", "transformer", "adapters", "parameters", "dtype"):
        assert getattr(streamed.info, field) == getattr(direct.info, field), field
    assert streamed.metadata == direct.metadata
    for strengths in (None, {"motion": 1.0, "content": 0.3}):
        ours, theirs = streamed.transformer_state(strengths), direct.transformer_state(strengths)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    load_file(target)  # the safetensors library's own checks of the layout
    again = tmp_path / "again.safetensors"
    convert_checkpoint(target, again)
    assert again.read_bytes() == target.read_bytes()


def test_conversion_to_half_precision(sat_file, tmp_path):
    convert_checkpoint(sat_file, tmp_path / "half", dtype=torch.float16)
    assert inspect_checkpoint(tmp_path / "half").dtype == "float16"
    assert (tmp_path / "half").stat().st_size < 0.55 * sat_file.stat().st_size
    network = load_transformer(tmp_path / "half", dtype=torch.float32)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_network_is_free_of_its_file(sat_file, tmp_path):
    target = tmp_path / "x.safetensors"
    convert_checkpoint(sat_file, target)
    network = load_transformer(target)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with target.open("r+b") as file:
        file.write(b"\0" * target.stat().st_size)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    living = []

    def read():
        assert all(reference() is None for reference in living)
        tensor = torch.ones(1000)
        living.append(weakref.ref(tensor))
        return tensor

    pending = {f"t{i}": Pending(TensorSpec((1000,), torch.float32), read) for i in range(5)}
    write_safetensors(tmp_path / "x", pending, {})
    assert len(living) == 5 and len(load_file(tmp_path / "x")) == 5


# Our own format


def test_our_own_format_keeps_everything(tmp_path):
    torch.manual_seed(0)
    settings = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 3,
        "time_embed_dim": 8,
        "text_embed_dim": 5,
        "patch_size": 1,
        "clean_embedding": True,
        "layer_embedding": True,
    }
    network = LayeredTransformer(**settings)
    module = "transformer_blocks.0.attn1.to_q"
    pair = (torch.randn(2, 16), torch.randn(16, 2))
    path = tmp_path / "own.safetensors"
    save_checkpoint(
        path,
        network.state_dict(),
        variant="starter",
        transformer=settings,
        vae={"kind": "small"},
        text_encoder={"words": ["a", "red"]},
        sequence={"frames": 8},
        parts={"vae": {"conv.weight": torch.ones(2, 2)}, "text_encoder": {"word": torch.ones(3)}},
        adapters={"style": {module: pair}},
        adapter_scales={"style": 0.5},
        metadata={"trained": "sprite world"},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.info.parts == ("transformer", "vae", "text_encoder")
    assert checkpoint.info.adapters == {"style": 2}
    assert checkpoint.metadata["text_encoder"] == {"words": ["a", "red"]}
    assert checkpoint.metadata["trained"] == "sprite world"
    assert torch.equal(checkpoint.part_state("vae")["conv.weight"], torch.ones(2, 2))
    bare = checkpoint.transformer_state({"style": 0.0})
    assert all(torch.equal(bare[key], tensor) for key, tensor in network.state_dict().items())
    folded = load_transformer(checkpoint).state_dict()[f"{module}.weight"]
    assert torch.equal(folded, fold(bare[f"{module}.weight"], *pair, 0.5))
    assert torch.equal(checkpoint.adapter_state("style")[module][1], pair[1])

    save_checkpoint(path, network.state_dict(), variant="s", transformer=settings, half=True)
    checkpoint = open_checkpoint(path)
    assert checkpoint.info.dtype == "float16"
    with pytest.raises(LayerLoomError, match="holds no text encoder"):
        checkpoint.part_state("text_encoder")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("not json", "cannot be read"),
        ('{"format": 1}', "cannot be read"),
        ('{"format": 2, "family": "layered", "variant": "x", "transformer": {}}', "format 2"),
        (
            '{"format": 1, "family": "layered", "variant": "x", "transformer": {"depth": 3}}',
            "depth",
        ),
    ],
)
def test_own_files_of_other_versions_are_refused(tmp_path, metadata, message):
    path = tmp_path / "x.safetensors"
    save_file({"transformer.a": torch.zeros(1)}, path, metadata={"layerloom": metadata})
    with pytest.raises(LayerLoomError, match=message):
        load_transformer(path)


# Files that are something else


class Shell:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("new_style", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, tiny_sat, new_style):
    proof = tmp_path / "proof"
    content = {"module": tiny_sat(), "args": Shell(f"touch {proof}")}
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=new_style)
    with pytest.raises(LayerLoomError, match=r"wants to run code .*system"):
        inspect_checkpoint(path)
    path.write_bytes(pickle.dumps(Shell(f"touch {proof}"), protocol=2))
    with pytest.raises(LayerLoomError, match="run code|damaged"):
        inspect_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "safetensors"])
@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_named_so(tmp_path, tiny_sat, kind, kept):
    state = tiny_sat("layerflow_rgb_decompose")
    path = tmp_path / "weights"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"module": state}, path, _use_new_zipfile_serialization=kind == "pickle")
    assert inspect_checkpoint(path).variant == "rgb-decompose"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(LayerLoomError, match="weights is cut short or damaged"):
        inspect_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; download"),
        (b"x", "is not a checkpoint"),
        (b"just some text, nothing more", "is not a checkpoint"),
        (b"PK\x03\x04 not a zip", "is cut short or damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, message):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(LayerLoomError, match=f"file.safetensors {message}"):
        inspect_checkpoint(path)


def test_unknown_contents_name_what_was_found(tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({"input_blocks.0.weight": torch.zeros(1), "out.2.bias": torch.zeros(1)}, path)
    with pytest.raises(LayerLoomError, match=r"input_blocks\.0\.weight.*supported are LayerFlow"):
        inspect_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(LayerLoomError, match="no named tensors"):
        inspect_checkpoint(path)
    with pytest.raises(LayerLoomError, match="no file"):
        inspect_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LayerLoomError, match="holds no checkpoint"):
        inspect_checkpoint(tmp_path / "folder")


# Places that cannot be written to


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "may not be written"), (errno.EIO, "cannot")],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, code, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    spec = TensorSpec((4,), torch.float32)

    def fail():
        raise OSError(code, os.strerror(code))

    pending = {"a": Pending(spec, lambda: torch.ones(4)), "b": Pending(spec, fail)}
    with pytest.raises(LayerLoomError, match=message):
        write_safetensors(path, pending, {})
    assert os.listdir(tmp_path) == ["x.safetensors"] and path.read_bytes() == b"old"


def test_a_cancel_leaves_nothing(sat_file, tmp_path):
    def cancel(done, total):
        if done:
            raise KeyboardInterrupt

    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(sat_file, folder / "x.safetensors", cancel)
    assert os.listdir(folder) == []


def test_a_full_disk_is_said_before_work_starts(sat_file, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(LayerLoomError, match=r"needs 0\.00 GB and .* has 0\.00 GB free"):
        convert_checkpoint(sat_file, folder / "x.safetensors", lambda *_: pytest.fail("started"))
    assert os.listdir(folder) == []


def test_bad_targets(sat_file, tmp_path):
    with pytest.raises(LayerLoomError, match="does not exist"):
        convert_checkpoint(sat_file, tmp_path / "no" / "x.safetensors")
    with pytest.raises(LayerLoomError, match="is a folder"):
        convert_checkpoint(sat_file, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(sat_file, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(LayerLoomError, match="may not be written"):
        convert_checkpoint(sat_file, folder / "x.safetensors")
