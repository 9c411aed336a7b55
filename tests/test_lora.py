"""Adapters as data and as trainable pairs: reading, folding, saving, and every way to be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerloom.engine.checkpoints import golden_layerflow
from layerloom.engine.checkpoints.golden import load_case
from layerloom.engine.checkpoints.load import load_transformer, open_checkpoint
from layerloom.engine.checkpoints.lora import (
    LoRA,
    folded_state,
    lora_tensors,
    read_lora,
    read_loras,
    save_lora,
)
from layerloom.engine.checkpoints.save import save_checkpoint
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.models.layered_transformer import LayeredTransformer, LayerSegment
from layerloom.engine.models.lora import attach, targets_of

SIZES = {
    "num_layers": 7,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 6,
    "patch_size": 1,
}
Q, OUT = "transformer_blocks.5.attn1.to_q", "transformer_blocks.5.attn1.to_out.0"
UP, DOWN = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"


def network(seed: int = 0) -> LayeredTransformer:
    torch.manual_seed(seed)
    made = LayeredTransformer(**SIZES).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(0, 0.2)
    return made


def forward(made: LayeredTransformer, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, 4, 4, 4, generator=generator)
    text = torch.randn(batch, 3, 5, 6, generator=generator)
    times = torch.tensor([7, 800])[:batch]
    return made(latents, times, text, [LayerSegment("foreground", 4)])


def random_lora(name="style", rank=4, alpha=2.0, modules=(Q, OUT, UP, DOWN), dtype=torch.float32):
    """A pair for each module, at the sizes of ``network()``."""
    generator = torch.Generator().manual_seed(len(name) + rank)
    shapes = {key: tuple(t.shape) for key, t in network().state_dict().items()}
    weights = {}
    for module in modules:
        out, inputs = shapes[f"{module}.weight"]
        a = torch.randn(rank, inputs, generator=generator).to(dtype)
        weights[module] = (a, torch.randn(out, rank, generator=generator).to(dtype))
    return LoRA(name, rank, alpha, weights)


def exact(lora: LoRA, module: str) -> torch.Tensor:
    a, b = (half.double() for half in lora.weights[module])
    return lora.alpha / lora.rank * b @ a


def same(first: LoRA, second: LoRA, bound: float = 1e-6) -> None:
    assert set(first.targets) == set(second.targets)
    for module in first.targets:
        assert float((exact(first, module) - exact(second, module)).abs().max()) <= bound, module


# Folding


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_folded_weights_equal_the_attached_forward(strength):
    base = network()
    first = attach(base, "motion", 4, 1.0, targets_of(base, "sixth"))
    second = attach(base, "content", 3, 3.0, targets_of(base, [0, 5], ("to_v", "ff.net.2")))
    torch.manual_seed(2)
    for pairs in (first, second):
        for parameter in pairs.parameters():
            parameter.data.normal_(0, 0.3)
    first.strength, second.strength = strength, 0.5
    attached = forward(base).detach()
    loras = [(first.as_lora(), strength), (second.as_lora(), 0.5)]
    first.detach()
    second.detach()
    plain, state = forward(base), base.state_dict()
    folded = network(1)
    folded.load_state_dict(folded_state(state, loras))
    assert float((attached - plain).abs().max()) > 0.01
    assert float((attached - forward(folded)).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_toggling_twice_returns_bit_identical_weights(dtype):
    state = {name: tensor.to(dtype) for name, tensor in network().state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    lora = random_lora()
    on = folded_state(state, [(lora, 0.8)])
    off = folded_state(state, [(lora, 0.0)])
    again = folded_state(state, [(lora, 0.8)])
    changed = {name for name in state if not torch.equal(on[name], kept[name])}
    assert changed == {f"{module}.weight" for module in lora.targets}
    for name in state:
        assert on[name].dtype == dtype
        assert torch.equal(off[name], kept[name]) and torch.equal(state[name], kept[name])
        assert torch.equal(on[name], again[name])


def test_several_adapters_are_summed_and_rounded_once():
    state = {name: tensor.bfloat16() for name, tensor in network().state_dict().items()}
    loras = [(random_lora("a"), 0.5), (random_lora("bc", rank=2), -1.5)]
    folded = folded_state(state, loras)
    for module in (Q, DOWN):
        name = f"{module}.weight"
        wanted = state[name].double() + sum(s * exact(lora, module) for lora, s in loras)
        rounding = torch.finfo(torch.bfloat16).eps * wanted.abs()
        assert ((folded[name].double() - wanted).abs() <= 0.51 * rounding + 1e-6).all()


def test_an_adapter_that_does_not_fit_is_one_sentence():
    state, lora = network().state_dict(), random_lora()
    wider = {**lora.weights, Q: (torch.zeros(4, 20), torch.zeros(16, 4))}
    with pytest.raises(LayerLoomError, match=r"does not fit starter: .*to_q is 16x16 there and"):
        folded_state(state, [(LoRA("x", 4, 1.0, wider), 1.0)], "starter")
    absent = {"transformer_blocks.30.attn1.to_q": lora.weights[Q]}
    with pytest.raises(LayerLoomError, match=r"has no transformer_blocks\.30\.attn1\.to_q"):
        folded_state(state, [(LoRA("x", 4, 1.0, absent), 0.0)])


# Attaching


def test_attaching_leaves_names_and_weights_of_the_base_alone():
    base = network()
    names, kept = list(base.state_dict()), {k: t.clone() for k, t in base.state_dict().items()}
    plain, parameters = forward(base), [name for name, _ in base.named_parameters()]
    pairs = attach(base, "motion", 2, 1.0, targets_of(base), generator=torch.manual_seed(3))
    assert list(base.state_dict()) == names
    assert [name for name, _ in base.named_parameters()] == parameters
    assert torch.equal(forward(base), plain)  # B is zero
    assert len(list(pairs.parameters())) == 2 * 4 * SIZES["num_layers"]
    assert all(parameter.requires_grad for parameter in pairs.parameters())
    pairs.detach()
    assert {type(m) for m in base.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    assert all(torch.equal(base.state_dict()[name], kept[name]) for name in names)
    again = attach(base, "motion", 2, 1.0, targets_of(base), generator=torch.manual_seed(3))
    same_draw = zip(pairs.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in same_draw)


def test_only_the_pairs_learn():
    base = network()
    pairs = attach(base, "motion", 2, 1.0, targets_of(base, "sixth"))
    optimizer = torch.optim.SGD(pairs.parameters(), lr=0.1)
    before = forward(base).detach()
    for _ in range(2):
        optimizer.zero_grad()
        forward(base).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in pairs.parameters())
    assert not torch.equal(forward(base), before)
    pairs.strength = 0.0
    assert torch.equal(forward(base), before)


def test_the_strength_can_differ_between_samples():
    base = network()
    pairs = attach(base, "motion", 2, 1.0, targets_of(base))
    for parameter in pairs.parameters():
        parameter.data.normal_(0, 0.4)
    each = []
    for strength in (1.0, 0.0):
        pairs.strength = strength
        each.append(forward(base))
    pairs.strength = torch.tensor([1.0, 0.0])
    mixed = forward(base)
    # The batch is the same, so the sums run in the same order.
    assert torch.allclose(mixed[0], each[0][0], atol=1e-6)
    assert torch.allclose(mixed[1], each[1][1], atol=1e-6)


def test_compiled_blocks_follow_the_adapters_without_compiling_anew():
    from torch._dynamo.testing import CompileCounterWithBackend

    base, eager = network(), network()
    counter = CompileCounterWithBackend("eager")
    for block in base.transformer_blocks:
        block.compile(backend=counter)
    results = {}
    for made in (base, eager):
        generator = torch.Generator().manual_seed(4)
        outputs, compiled = [forward(made)], []
        pairs = attach(made, "motion", 2, 1.0, targets_of(made))
        for parameter in pairs.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
        for strength in (1.0, 0.5, -0.25, 0.0):
            pairs.strength = strength
            outputs.append(forward(made).detach())
            compiled.append(counter.frame_count)
        pairs.detach()
        results[made] = (outputs + [forward(made)], compiled)
    for found, wanted in zip(results[base][0], results[eager][0], strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    counts = results[base][1]
    assert counts[0] == counts[1] == counts[2]


def test_what_was_trained_comes_out_and_goes_in_again():
    base = network()
    pairs = attach(base, "motion", 4, 1.0, (Q, OUT))
    lora = random_lora(modules=(Q, OUT), alpha=1.0)
    pairs.load(lora)
    same(pairs.as_lora(), lora, 0.0)
    pairs.load(random_lora(modules=(Q, OUT), alpha=4.0))
    same(pairs.as_lora(), random_lora(modules=(Q, OUT), alpha=4.0))
    with pytest.raises(LayerLoomError, match="changes other modules"):
        pairs.load(random_lora())
    with pytest.raises(LayerLoomError, match="has rank 2 for .* but 4"):
        pairs.load(random_lora(modules=(Q, OUT), rank=2))


def test_targets_follow_layerflow_or_a_list():
    made = network()
    kinds = ("to_q", "to_k", "to_v", "to_out.0")
    assert targets_of(made, "sixth") == tuple(f"transformer_blocks.5.attn1.{k}" for k in kinds)
    assert len(targets_of(made)) == 4 * SIZES["num_layers"]
    assert targets_of(made, [0], ("ff.net.0.proj", "ff.net.2")) == (UP, DOWN)
    for blocks, message in (([7], "7 .0 to 6."), ("third", "all, sixth or a list"), ([], "not in")):
        with pytest.raises(LayerLoomError, match=message):
            targets_of(made, blocks)
    with pytest.raises(LayerLoomError, match="no linear layer transformer_blocks.0.attn1.to_x"):
        targets_of(made, [0], ("to_x",))
    with pytest.raises(LayerLoomError, match="no linear layer norm_final"):
        attach(made, "x", 4, 1.0, ["norm_final"])
    with pytest.raises(LayerLoomError, match="rank is 0"):
        attach(made, "x", 0, 1.0, [Q])
    with pytest.raises(LayerLoomError, match="no modules"):
        attach(made, "x", 4, 1.0, [])


# Files


@pytest.mark.parametrize("naming", ["diffusers", "host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_adapters_load_again(tmp_path, naming, dtype):
    lora = random_lora("sketch", dtype=dtype)
    path = tmp_path / "renamed.safetensors"
    save_lora(path, lora, naming, {"steps": 100})
    found = read_lora(path)
    assert (found.name, found.rank) == ("sketch", 4)
    same(found, lora, 0.0)  # alpha / rank is a power of two
    if naming == "host":
        assert found.alpha == lora.alpha
    tensors = load_file(path)
    prefix = {"diffusers": "transformer.", "host": "diffusion_model."}[naming]
    assert all(key.startswith(prefix) for key in tensors)
    # diffusers refuses a file with other names than these.
    assert naming == "host" or all("lora" in key for key in tensors)


def renamed(lora: LoRA, style: str) -> dict[str, torch.Tensor]:
    """The pairs under the names that other programs give them."""
    tensors = {}
    for module, (a, b) in lora.weights.items():
        flat = module.replace(".", "_")
        prefix, down, up, alpha = {
            "kohya": (f"lora_unet_{flat}", ".lora_down.weight", ".lora_up.weight", lora.alpha),
            "onetrainer": (
                f"lora_transformer_{flat}",
                ".lora_down.weight",
                ".lora_up.weight",
                lora.alpha,
            ),
            "peft": (f"base_model.model.{module}", ".lora_A.weight", ".lora_B.weight", None),
            "named": (
                f"base_model.model.transformer.{module}",
                ".lora_A.default.weight",
                ".lora_B.default.weight",
                None,
            ),
            "bare": (module, ".lora_A", ".lora_B", None),
            "host": (f"diffusion_model.{module}", ".lora_down.weight", ".lora_up.weight", None),
            "old": (f"unet.{module}", "_lora.down.weight", "_lora.up.weight", None),
        }[style]
        tensors |= {f"{prefix}{down}": a, f"{prefix}{up}": b}
        if alpha is not None:
            tensors[f"{prefix}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize("style", ["kohya", "onetrainer", "peft", "named", "bare", "host", "old"])
def test_names_of_other_programs_are_read(tmp_path, style):
    has_alpha = style in ("kohya", "onetrainer")
    lora = random_lora(alpha=2.0 if has_alpha else 4.0)  # without alpha the scale is 1
    save_file(renamed(lora, style), tmp_path / "watercolour.safetensors")
    found = read_lora(tmp_path / "watercolour.safetensors")
    assert (found.name, found.rank) == ("watercolour", 4)
    same(found, lora)


def test_ranks_and_alphas_may_differ_between_modules(tmp_path):
    wide, narrow = random_lora("w", 8, 8.0, (Q, OUT)), random_lora("n", 2, 1.0, (UP,))
    tensors = {**renamed(wide, "kohya"), **renamed(narrow, "kohya")}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors")
    assert found.rank == 8
    for lora in (wide, narrow):
        for module in lora.targets:
            assert float((exact(lora, module) - found.delta(module)).abs().max()) < 1e-5
    for naming in ("host", "diffusers"):
        save_lora(tmp_path / "again.safetensors", found, naming)
        again = read_lora(tmp_path / "again.safetensors")
        assert float((again.delta(UP) - found.delta(UP)).abs().max()) < 1e-6


def test_alpha_in_settings_beside_the_weights_counts(tmp_path):
    lora = random_lora(alpha=8.0)
    save_file(renamed(lora, "peft"), tmp_path / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    same(read_lora(tmp_path / "adapter_model.safetensors"), lora)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    found = read_lora(tmp_path / "adapter_model.safetensors")
    assert found.scale == 8 / 4**0.5
    tensors = {f"transformer.{k}": t for k, t in renamed(lora, "bare").items()}
    header = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})
    save_file(tensors, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": header})
    same(read_lora(tmp_path / "d.safetensors"), lora)
    save_file(tensors, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": "[]"})
    with pytest.raises(LayerLoomError, match="settings that cannot be read"):
        read_lora(tmp_path / "d.safetensors")


def test_sat_names_and_fused_projections_are_read(tmp_path):
    lora = random_lora(modules=[Q.replace("to_q", f"to_{part}") for part in "qkv"], alpha=4.0)
    a = lora.weights[Q][0]
    fused = torch.cat([b for _, b in lora.weights.values()])
    key = "model.diffusion_model.transformer.layers.5.attention.query_key_value"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": fused}, tmp_path / "sat")
    found = read_lora(tmp_path / "sat")
    shared = {module: (a, b) for module, (_, b) in lora.weights.items()}
    same(found, LoRA("sat", 4, 4.0, shared))


def test_layerflow_checkpoints_give_their_two_adapters(tiny_sat, tmp_path):
    state = tiny_sat()
    torch.save({"module": state}, tmp_path / "flow.pt")
    loras = read_loras(tmp_path / "flow.pt")
    assert list(loras) == ["motion", "content"]
    assert (loras["motion"].rank, loras["motion"].alpha) == (3, 1.0)
    layer = "model.diffusion_model.transformer.layers.1.attention.dense."
    wanted = state[f"{layer}matrix_B.0"].double() @ state[f"{layer}matrix_A.0"].double() / 3
    delta = loras["motion"].delta("transformer_blocks.1.attn1.to_out.0")
    assert float((delta - wanted).abs().max()) < 1e-6
    assert read_lora(tmp_path / "flow.pt", "content").rank == 6
    with pytest.raises(LayerLoomError, match=r"several adapters \(motion, content\)"):
        read_lora(tmp_path / "flow.pt")
    with pytest.raises(LayerLoomError, match="no adapter 'style'; it holds motion, content"):
        read_lora(tmp_path / "flow.pt", "style")
    # The checkpoint's own folding and the adapters' as data are one thing.
    checkpoint = open_checkpoint(tmp_path / "flow.pt")
    base = checkpoint.transformer_state({"motion": 0.0, "content": 0.0})
    strengths = {"motion": 0.5, "content": -1.0}
    ours = folded_state(base, [(loras[name], s) for name, s in strengths.items()])
    theirs = checkpoint.transformer_state(strengths)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"diffusion_model.extra.lora_A.weight": torch.zeros(4, 4)}, "holds diffusion_model.extra"),
        ({"lora_te_text_model.lora_down.weight": torch.zeros(4, 4)}, "holds lora_te_text_model"),
        ({f"diffusion_model.{Q}.dora_scale": torch.zeros(4)}, "dora_scale, which is no LoRA pair"),
        ({f"diffusion_model.{Q}.lora_B.weight": None}, "lacks its B matrix .lora_B or lora_up"),
        ({f"diffusion_model.{Q}.lora_A.weight": None}, "lacks its A matrix"),
        (
            {f"diffusion_model.{Q}.lora_A.weight": torch.zeros(3, 16)},
            "does not fit together: .*to_q is 3x16 and 16x4",
        ),
        ({f"diffusion_model.{Q}.lora_A.weight": torch.zeros(4)}, "to_q is 4 and 16x4"),
        ({f"transformer.{Q}.lora_A.weight": torch.zeros(4, 16)}, "lacks its B"),
    ],
)
def test_files_that_are_no_adapter_of_ours_are_one_sentence(tmp_path, change, message):
    tensors = lora_tensors(random_lora()) | change
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / "x.safetensors")
    with pytest.raises(LayerLoomError, match=message) as error:
        read_lora(tmp_path / "x.safetensors")
    assert str(error.value).startswith("x.safetensors ")


def test_two_pairs_for_one_module_are_refused(tmp_path):
    lora = random_lora()
    tensors = {**lora_tensors(lora), **lora_tensors(lora, "diffusers")}
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(LayerLoomError, match="two pairs for"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.999])
def test_a_truncated_adapter_is_named_so(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    save_lora(path, random_lora())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(LayerLoomError, match="x.safetensors is cut short or damaged"):
        read_lora(path)


def test_missing_files_and_other_files_are_one_sentence(tmp_path):
    with pytest.raises(LayerLoomError, match="no file"):
        read_lora(tmp_path / "absent.safetensors")
    (tmp_path / "text").write_text("not a tensor in sight")
    with pytest.raises(LayerLoomError, match="is not a checkpoint"):
        read_lora(tmp_path / "text")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(LayerLoomError, match="is not a checkpoint LayerLoom knows"):
        read_lora(tmp_path / "unet.safetensors")
    with pytest.raises(LayerLoomError, match="does not exist"):
        save_lora(tmp_path / "no" / "x.safetensors", random_lora())


# Checkpoints that carry adapters


def test_a_checkpoint_carries_adapters_with_alpha_and_default_strength(tmp_path):
    made, path = network(), tmp_path / "own.safetensors"
    motion = random_lora("motion", 2, 1.0, targets_of(made, "sixth"))
    content = random_lora("content", 8, 16.0, targets_of(made, "sixth"))
    save_checkpoint(
        path,
        made.state_dict(),
        variant="starter",
        transformer=SIZES,
        adapters={lora.name: lora.weights for lora in (motion, content)},
        adapter_scales={"motion": 0.0},
        adapter_alphas={"content": 16.0},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.metadata["adapters"] == {
        "motion": {"rank": 2, "alpha": 1.0, "scale": 0.0},
        "content": {"rank": 8, "alpha": 16.0, "scale": 1.0},
    }
    assert checkpoint.strengths(None) == {"motion": 0.0, "content": 1.0}
    same(checkpoint.lora("content"), content, 0.0)
    wanted = folded_state(made.state_dict(), [(content, 1.0)])
    found = load_transformer(path).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    extra = random_lora("extra")
    wanted = folded_state(made.state_dict(), [(motion, 0.5), (content, 0.0), (extra, 0.25)])
    strengths = {"motion": 0.5, "content": 0.0}
    loaded = load_transformer(path, adapters=strengths, loras=[(extra, 0.25)])
    assert all(torch.equal(loaded.state_dict()[name], wanted[name]) for name in wanted)
    with pytest.raises(LayerLoomError, match=r"does not fit own\.safetensors, which has no"):
        other = {"transformer_blocks.9.attn1.to_q": extra.weights[Q]}
        load_transformer(path, loras=[(LoRA("x", 4, 1.0, other), 1.0)])


def test_half_precision_files_fold_in_the_type_they_run_in(tmp_path):
    made, path = network().half(), tmp_path / "half.safetensors"
    lora = random_lora("content", 8, 1.0, (Q,), torch.float16)
    save_checkpoint(
        path,
        made.state_dict(),
        variant="starter",
        transformer=SIZES,
        adapters={"content": lora.weights},
    )
    name = f"{Q}.weight"
    wanted = made.state_dict()[name].double() + exact(lora, Q)
    found = load_transformer(path, dtype=torch.float32).state_dict()[name]
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max()) < 1e-6
    stored = load_transformer(path).state_dict()[name]
    assert stored.dtype == torch.float16 and torch.equal(stored, found.half())


# The official code's numbers

FORWARDS = ("lf_dit_rgba_gen", "lf_dit_rgba_cond", "lf_dit_rgba_seg", "lf_dit_rgb")


@pytest.mark.parametrize("how", ["attached", "folded"])
@pytest.mark.parametrize("name", FORWARDS)
def test_golden_cases_pass_with_adapters_beside_the_weights(golden_dir, monkeypatch, name, how):
    """The cases' motion strengths 0 and 1, content at 1, without the loader's own folding."""
    strengths = []

    def with_pairs(checkpoint, adapters):
        wanted = {"content": 1.0, **adapters}
        strengths.append(wanted["motion"])
        made = load_transformer(checkpoint, adapters=dict.fromkeys(wanted, 0.0))
        loras = {adapter: checkpoint.lora(adapter) for adapter in wanted}
        if how == "folded":
            pairs = [(loras[adapter], strength) for adapter, strength in wanted.items()]
            made.load_state_dict(folded_state(made.state_dict(), pairs))
            return made
        for adapter, strength in wanted.items():
            lora = loras[adapter]
            attached = attach(made, adapter, lora.rank, lora.alpha, lora.targets)
            attached.load(lora)
            attached.strength = strength
        return made

    monkeypatch.setattr(golden_layerflow, "load_transformer", with_pairs)
    results = [
        r for r in golden_layerflow.run_forward(load_case(golden_dir, name)) if "@" in r.case
    ]
    assert 0.0 in strengths and (1.0 in strengths or name != "lf_dit_rgba_gen")
    assert len(results) == len(strengths) and all(result.passed for result in results), results
