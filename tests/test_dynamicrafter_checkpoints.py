"""DynamiCrafter's files: every published layout opens, every key maps, nothing is lost."""

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerloom.engine.checkpoints.convert import convert_checkpoint
from layerloom.engine.checkpoints.dynamicrafter import (
    from_store,
    load_dynamicrafter,
    open_dynamicrafter,
)
from layerloom.engine.checkpoints.dynamicrafter_names import SCHEDULE, UNUSED
from layerloom.engine.checkpoints.dynamicrafter_save import save_dynamicrafter
from layerloom.engine.checkpoints.golden import load_case
from layerloom.engine.checkpoints.golden_dynamicrafter import official_networks
from layerloom.engine.checkpoints.load import open_checkpoint
from layerloom.engine.checkpoints.lora import inspect_file
from layerloom.engine.checkpoints.reader import memory_store, open_tensors
from layerloom.engine.cli import main
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.dynamicrafter import (
    IMAGE_PROJECTOR,
    VARIANTS,
    DynamiCrafter,
    Variant,
    published_unet,
)

MANIFESTS = ("256", "512", "1024", "512_interp")
UNET, PROJECTOR = "model.diffusion_model.", "image_proj_model."
ALPHA = f"{UNET}middle_block.1.transformer_blocks.0.attn2.alpha"


def manifest(folder, name):
    return json.loads(gzip.decompress((folder / f"dynamicrafter_{name}.json.gz").read_bytes()))


def meta_tensors(shapes):
    return {k: torch.empty(s, device="meta", dtype=torch.float16) for k, s in shapes.items()}


def published(folder, name):
    """A full-size official file on the meta device; its schedule buffers have values."""
    tensors = meta_tensors(manifest(folder, name))
    if "scale_arr" in tensors:
        tensors["scale_arr"] = torch.full((1400,), VARIANTS[name].rescale_base)
    return tensors


def opened(tensors, variant=None):
    return from_store(memory_store(tensors, "published"), variant)


@pytest.fixture(scope="module")
def tiny(golden_dir):
    """The tiny official checkpoint: its stored tensors under their official names."""
    case = load_case(golden_dir, "dc_ckpt_tiny_512like")
    return case.weights("")


@pytest.fixture
def official(tiny, tmp_path):
    """The same as an official .ckpt."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": tiny, "global_step": 100}, path)
    return path


def same(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# Full size, on the meta device


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_of_a_published_file_maps(manifest_dir, name):
    tensors = published(manifest_dir, name)
    checkpoint = opened(tensors, name)
    checkpoint.check()
    info = checkpoint.info
    assert info.parts == ("unet", "image_projector", "vae", "text_encoder", "image_encoder")
    assert info.unet == published_unet(VARIANTS[name])
    assert info.image_projector == IMAGE_PROJECTOR
    assert info.variant == name and checkpoint.variant == VARIANTS[name]
    assert checkpoint.left_over == ()
    # And back: every stored tensor is taken whole and once, or is listed as made anew or unused.
    pieces = {}
    for sources in checkpoint.plan.values():
        for source in sources.values():
            pieces.setdefault((source.key, source.of), []).extend(source.pieces)
    assert all(sorted(taken) == list(range(of)) for (_, of), taken in pieces.items())
    mapped = [key for key, _ in pieces]
    assert len(mapped) == len(set(mapped))
    rest = tensors.keys() - set(mapped)
    assert rest == (SCHEDULE | UNUSED) & tensors.keys() and info.ignored == len(rest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_networks_have_exactly_these_names_and_shapes(manifest_dir, name):
    checkpoint = opened(published(manifest_dir, name), name)
    settings = checkpoint.info
    network = DynamiCrafter(
        unet=settings.unet, image_projector=settings.image_projector, device="meta"
    )
    for part in ("unet", "image_projector"):
        state = getattr(network, part).state_dict()
        found = {k: s.spec(checkpoint.store).shape for k, s in checkpoint.plan[part].items()}
        assert found == {key: tuple(tensor.shape) for key, tensor in state.items()}


def test_the_other_parts_have_their_librarys_names_and_shapes(manifest_dir):
    from diffusers import AutoencoderKL
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    checkpoint = opened(published(manifest_dir, "512"))
    with torch.device("meta"):
        text = CLIPTextConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            vocab_size=49408,
            projection_dim=1024,
        )
        vision = CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=16,
            patch_size=14,
            projection_dim=1024,
        )
        sides = {"down_block_types": ("DownEncoderBlock2D",) * 4}
        sides["up_block_types"] = ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **sides
        )
        networks = {
            "vae": vae,
            "text_encoder": CLIPTextModelWithProjection(text),
            "image_encoder": CLIPVisionModelWithProjection(vision),
        }
    for part, network in networks.items():
        expected = {k: tuple(t.shape) for k, t in network.state_dict().items()}
        expected = {k: shape for k, shape in expected.items() if "position_ids" not in k}
        found = {k: s.spec(checkpoint.store).shape for k, s in checkpoint.plan[part].items()}
        assert found == expected, part


def test_the_autoencoders_weights_compute_the_same_under_their_new_names():
    """Level numbers, attention matrices: names that only look right would decode noise."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from layerloom.engine.checkpoints.dynamicrafter_names import VAE, plan_vae

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=2,
        norm_num_groups=4,
    )
    expected = vae.state_dict()
    # Original names from diffusers' own table, by its converter run over one-hot names.
    originals = {}
    for side, up, down in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for level in range(3):
            for block in range(2 + (side == "decoder")):
                for layer in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"):
                    for kind in ("weight", "bias"):
                        originals[f"{side}.{up}.{level}.block.{block}.{layer}.{kind}"] = None
            for kind in ("weight", "bias"):
                originals[f"{side}.{up}.{level}.{down}.conv.{kind}"] = None
        for place in ("mid.block_1", "mid.block_2"):
            for layer in ("norm1", "conv1", "norm2", "conv2"):
                for kind in ("weight", "bias"):
                    originals[f"{side}.{place}.{layer}.{kind}"] = None
        for layer in ("norm", "q", "k", "v", "proj_out"):
            for kind in ("weight", "bias"):
                originals[f"{side}.mid.attn_1.{layer}.{kind}"] = None
        for layer in ("conv_in", "norm_out", "conv_out"):
            for kind in ("weight", "bias"):
                originals[f"{side}.{layer}.{kind}"] = None
    for kind in ("weight", "bias"):
        originals[f"quant_conv.{kind}"] = originals[f"post_quant_conv.{kind}"] = None
    numbered = {f"{VAE}{key}": torch.tensor([[float(i)]]) for i, key in enumerate(originals)}
    config = {"down_block_types": [0] * 3, "up_block_types": [0] * 3}
    theirs = convert_ldm_vae_checkpoint(dict(numbered), config)
    ours, unknown = plan_vae(numbered, "")
    assert not unknown
    there = {key: float(t.flatten()[0]) for key, t in theirs.items() if key in expected}
    here = {key: float(numbered[source.key][0]) for key, source in ours.items() if key in expected}
    assert there == here and len(there) == len(expected)


def test_the_variant_is_found_as_far_as_the_weights_say_it(manifest_dir):
    def variants(name, *dropped):
        tensors = published(manifest_dir, name)
        info = opened({k: t for k, t in tensors.items() if k not in dropped}).info
        return info.variant, info.variants

    assert variants("256") == ("256", ("256",))
    # The official file keeps the dynamic rescale; 512 and its interpolation share that too.
    assert variants("1024") == ("1024", ("1024",))
    assert variants("512_interp") == ("512", ("512", "512_interp"))
    # A pruned file need not.
    assert variants("1024", "scale_arr") == ("512", ("512", "1024", "512_interp"))
    pruned = {k: t for k, t in published(manifest_dir, "1024").items() if k != "scale_arr"}
    assert opened(pruned, "1024").variant == VARIANTS["1024"]
    with pytest.raises(LayerLoomError, match="is not DynamiCrafter 256: .* 512 or 1024 or"):
        opened(pruned, "256")
    with pytest.raises(LayerLoomError, match="is no DynamiCrafter variant; give one of 256, 512"):
        opened(pruned, "2048")


def test_variants_hold_what_was_published():
    """The facts that wrappers got wrong: noise schedule, dynamic rescale, the number's meaning."""
    facts = {
        name: (v.prediction, v.zero_terminal_snr, v.rescale_base, v.image_gate, v.spacing)
        for name, v in VARIANTS.items()
    }
    assert facts == {
        "256": ("eps", False, None, True, "uniform"),
        "512": ("v", True, 0.7, False, "trailing"),
        "1024": ("v", True, 0.3, False, "trailing"),
        "512_interp": ("v", True, 0.7, False, "trailing"),
    }
    speeds = {
        name: (v.speed, v.speed_default, v.speed_range, v.more_is_faster)
        for name, v in VARIANTS.items()
    }
    assert speeds == {
        "256": ("frame stride", 3, (1, 6), True),
        "512": ("fps", 24, (15, 30), False),
        "1024": ("fps", 10, (5, 20), False),
        "512_interp": ("fps", 5, (5, 30), False),
    }
    assert [v.frame_by_frame for v in VARIANTS.values()] == [False, True, True, True]
    assert [v.guidance_rescale for v in VARIANTS.values()] == [0.0, 0.7, 0.7, 0.7]
    sizes = [(v.height, v.width) for v in VARIANTS.values()]
    assert sizes == [(256, 256), (320, 512), (576, 1024), (320, 512)]


# Layouts of files


def test_the_256_files_own_name_of_the_stride_embedding(manifest_dir):
    tensors = published(manifest_dir, "256")
    renamed = {k.replace("fps_embedding", "framestride_embed"): t for k, t in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) == 4
    checkpoint = opened(renamed)
    checkpoint.check()
    assert checkpoint.info.unet == opened(tensors).info.unet


def test_a_pruned_file_and_unet_with_projector_and_unet_alone(manifest_dir):
    tensors = published(manifest_dir, "512")
    kept = {
        ("unet", "image_projector", "vae"): (UNET, PROJECTOR, "first_stage_model."),
        ("unet", "image_projector"): (UNET, PROJECTOR),
        ("unet",): (UNET,),
    }
    for parts, prefixes in kept.items():
        checkpoint = opened({k: t for k, t in tensors.items() if k.startswith(prefixes)})
        checkpoint.check()
        assert checkpoint.info.parts == parts and checkpoint.info.ignored == 0
    with pytest.raises(LayerLoomError, match="holds no text encoder; name its file"):
        checkpoint.part_state("text_encoder")
    bare = {k.removeprefix(UNET): t for k, t in tensors.items() if k.startswith(UNET)}
    opened(bare).check()


def test_another_autoencoder_beside_the_same_unet(manifest_dir):
    """ToonCrafter's: some names of Stable Diffusion's, and more. UNet and projector are shared."""
    tensors = published(manifest_dir, "512_interp")
    extra = "first_stage_model.decoder.mid.block_1.time_stack.in_layers.0.weight"
    checkpoint = opened({**tensors, extra: torch.empty(512, device="meta")}, "512_interp")
    checkpoint.check()
    assert checkpoint.info.parts == ("unet", "image_projector", "text_encoder", "image_encoder")
    assert checkpoint.info.ignored > 200


def test_missing_left_over_and_misshapen_keys_are_named(manifest_dir):
    tensors = published(manifest_dir, "512")
    key = f"{UNET}output_blocks.5.1.transformer_blocks.0.attn2.to_v_ip.weight"
    engine = r"unet\.up_blocks\.1\.attentions\.2\.transformer_blocks\.0\.attn2\.to_v_ip\.weight"
    with pytest.raises(LayerLoomError, match=f"{engine} is missing"):
        opened({k: t for k, t in tensors.items() if k != key}).check()
    with pytest.raises(LayerLoomError, match=f"{engine} has an unexpected shape"):
        opened({**tensors, key: torch.empty(1280, 768, device="meta")}).check()
    with pytest.raises(LayerLoomError, match="surprise.weight is not part of the network"):
        opened({**tensors, f"{UNET}surprise.weight": torch.empty(3, device="meta")}).check()
    with pytest.raises(LayerLoomError, match="out.2.weight is missing from its video UNet"):
        opened({k: t for k, t in tensors.items() if k != f"{UNET}out.2.weight"})
    with pytest.raises(LayerLoomError, match="its image projector lacks latents"):
        opened({k: t for k, t in tensors.items() if k != f"{PROJECTOR}latents"})
    down = f"{UNET}input_blocks.6.0.op.weight"
    with pytest.raises(LayerLoomError, match="in no order"):
        opened({k: t for k, t in tensors.items() if k != down})


def test_official_and_deepspeed_pickles_open_the_same(tiny, official, tmp_path):
    expected = load_dynamicrafter(official)
    # DeepSpeed's name is sixteen letters before everybody else's.
    deepspeed = {f"_forward_module.{key}": tensor for key, tensor in tiny.items()}
    folder = tmp_path / "epoch=1-step=100.ckpt" / "checkpoint"
    folder.mkdir(parents=True)
    torch.save({"module": deepspeed, "dp_world_size": 8}, folder / "mp_rank_00_model_states.pt")
    for path in (folder / "mp_rank_00_model_states.pt", folder, folder.parent):
        checkpoint = open_dynamicrafter(path)
        assert checkpoint.info.parts == ("unet", "image_projector")
        assert same(load_dynamicrafter(checkpoint), expected)
    save_file(tiny, tmp_path / "holiday.jpg")
    assert same(load_dynamicrafter(tmp_path / "holiday.jpg"), expected)


def test_info_says_what_it_is(official, capsys):
    info = inspect_file(official)
    assert (info.family, info.variant, info.source) == ("dynamicrafter", "512", "dynamicrafter")
    assert info.variants == ("512", "512_interp") and info.dtype == "float32"
    assert info.bytes == official.stat().st_size
    with pytest.raises(SystemExit) as done:
        main(["info", str(official), "--json"])
    assert done.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "dynamicrafter" and said["unet"]["context_dim"] == 16


def test_the_layered_loader_says_whose_file_it_is(official):
    with pytest.raises(LayerLoomError, match="animates pictures and makes no layers"):
        open_checkpoint(official)


def test_a_layered_file_is_said_to_be_none(tmp_path):
    save_file({"transformer.x.weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(LayerLoomError, match="is no DynamiCrafter checkpoint"):
        open_dynamicrafter(tmp_path / "a.safetensors")


# Conversion and element types


def test_a_converted_file_is_the_same_networks(official, tmp_path, capsys):
    target = tmp_path / "converted.safetensors"
    with pytest.raises(SystemExit) as done:
        main(["convert", str(official), str(target), "--variant", "512_interp", "--quiet"])
    assert done.value.code == 0 and "Wrote" in capsys.readouterr().out
    checkpoint = open_dynamicrafter(target)
    checkpoint.check()
    assert checkpoint.variant == VARIANTS["512_interp"]
    assert checkpoint.info.variants == ("512_interp",) and checkpoint.info.source == "layerloom"
    assert checkpoint.info.unet == open_dynamicrafter(official).info.unet
    assert checkpoint.info.ignored == 0
    assert same(load_dynamicrafter(checkpoint), load_dynamicrafter(official))
    with pytest.raises(LayerLoomError, match="says it is 512_interp, not 512"):
        open_dynamicrafter(target, "512")
    again = tmp_path / "again.safetensors"
    convert_checkpoint(target, again)
    assert same(load_dynamicrafter(again), load_dynamicrafter(target))


@pytest.mark.parametrize("name, kept", [("fp16", 2), ("bf16", 2), ("fp8", 1)])
def test_conversion_to_smaller_types(official, tmp_path, name, kept):
    target = tmp_path / f"{name}.safetensors"
    with pytest.raises(SystemExit) as done:
        main(["convert", str(official), str(target), "--dtype", name, "--quiet"])
    assert done.value.code == 0
    kinds = {tensor.dtype for tensor in load_file(target).values()}
    if name == "fp8":
        assert kinds == {torch.float8_e4m3fn, torch.float16}
        vectors = [k for k, t in load_file(target).items() if t.dtype == torch.float16]
        assert all("norm" in k or k.endswith((".bias", "weight")) for k in vectors)
    assert target.stat().st_size < kept / 4 * official.stat().st_size + 300_000
    network = load_dynamicrafter(target)
    stored = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[name]
    assert {p.dtype for p in network.parameters()} == {stored}
    exact = load_dynamicrafter(official)
    # A bit less than three (fp8), eight (bf16) and eleven (fp16) bits of each number are kept.
    slack = {"fp16": 2**-10, "bf16": 2**-7, "fp8": 2**-3}[name]
    for (key, found), wanted in zip(
        network.state_dict().items(), exact.state_dict().values(), strict=True
    ):
        assert ((found.float() - wanted).abs() <= slack * wanted.abs() + 2**-9).all(), key


def test_bad_conversions_are_a_sentence(official, tmp_path, capsys):
    for option, value, said in (
        ("--dtype", "int4", "give one of fp32, fp16, bf16, fp8"),
        ("--variant", "4096", "give one of 256, 512, 1024, 512_interp"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["convert", str(official), str(tmp_path / "x.safetensors"), option, value])
        assert done.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_loading_as_another_type(official):
    network = load_dynamicrafter(official, dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not network.training


def test_the_network_is_free_of_its_file(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tiny, path)
    network = load_dynamicrafter(path)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    data = bytearray(path.read_bytes())
    data[-4000:] = bytes(4000)
    path.write_bytes(data)
    assert all(torch.equal(before[key], t) for key, t in network.state_dict().items())
    # Pieces of one stored matrix (to_kv) do not keep the rest of it alive.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in network.state_dict().values())


def test_reading_past_the_map_reads_the_same(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    odd = {"flag": torch.tensor([True, False, True]), "one": torch.tensor(3.5).half()}
    odd["none"] = torch.zeros(0, 4)
    save_file({**tiny, **odd}, path)
    store = open_tensors(path)
    for key in store.specs:
        assert torch.equal(store.read(key), store.owned().read(key)), key


# Our own format


def test_a_trained_model_of_other_numbers_keeps_them_all(golden_dir, tmp_path):
    case = load_case(golden_dir, "dc_ckpt_tiny_256like")
    networks = official_networks(case)
    published = from_store(memory_store(case.weights(""), case.name)).info
    variant = Variant(
        name="starter",
        height=96,
        width=96,
        prediction="v",
        zero_terminal_snr=True,
        rescale_base=None,
        image_gate=True,
        spacing="trailing",
        guidance_rescale=0.5,
        speed="frame stride",
        speed_default=2,
        speed_range=(1, 4),
        more_is_faster=True,
        frame_by_frame=True,
        frames=12,
        guidance=3.0,
    )
    path = tmp_path / "starter.safetensors"
    save_dynamicrafter(
        path,
        {
            "unet": networks.unet.state_dict(),
            "image_projector": networks.image_projector.state_dict(),
            "vae": {"encoder.weight": torch.ones(2)},
        },
        variant=variant,
        unet={**published.unet, "image_tokens_per_frame": 4},
        image_projector=published.image_projector,
        vae={"kind": "frames", "dim": 8},
        metadata={"training": {"steps": 5}},
    )
    checkpoint = open_dynamicrafter(path)
    checkpoint.check()
    assert checkpoint.variant == variant and checkpoint.info.variant == "starter"
    assert checkpoint.info.parts == ("unet", "image_projector", "vae")
    assert checkpoint.metadata["vae"] == {"kind": "frames", "dim": 8}
    assert checkpoint.metadata["text_encoder"] is None
    assert checkpoint.metadata["training"] == {"steps": 5}
    loaded = load_dynamicrafter(checkpoint)
    assert same(loaded, networks) and loaded.unet.image_tokens_per_frame == 4
    with pytest.raises(ValueError, match="'clip' is not one of"):
        save_dynamicrafter(path, {"clip": {}}, variant=variant, unet={}, image_projector=None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 2}, "is LayerLoom format 2; this version reads format 1"),
        ({"variant": {"name": "x"}}, "metadata that cannot be read"),
        ({"unet": None}, "metadata that cannot be read"),
        ({"unet": {"heads": 3}}, "describes a network this version cannot build"),
    ],
)
def test_own_files_that_cannot_be_read_are_a_sentence(official, tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    convert_checkpoint(official, path)
    store = open_tensors(path)
    metadata = {**json.loads(store.metadata["layerloom"]), **change}
    save_file(load_file(path), path, {"layerloom": json.dumps(metadata)})
    with pytest.raises(LayerLoomError, match=message):
        open_dynamicrafter(path).check()
