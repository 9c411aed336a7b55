"""The layered network: what it returns, what tells prompts apart, and how it is built and run."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layerloom.engine.models.layered_transformer import (
    TEXT_ROW,
    VIDEO_ROW,
    LayeredTransformer,
    LayerSegment,
)
from layerloom.engine.models.starter_autoencoder import StarterAutoencoder
from layerloom.engine.models.starter_text import WordEncoder
from layerloom.kernels import SegmentKVCache, clean_sees_clean, plan_attention

TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 6,
}
SEGMENTS = (
    LayerSegment("foreground", 2),
    LayerSegment("background", 1, clean=True),
    LayerSegment("blended", 2),
)


def network(seed: int = 0, **changes) -> LayeredTransformer:
    """Random weights with open gates: norms near 1, modulations and biases moderate."""
    torch.manual_seed(seed)
    model = LayeredTransformer(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.3
            scale = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(1 + noise if scale else noise)
    return model


def inputs(seed: int = 1, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "latents": draw(2, 4, 4, 6, 4),
        "timestep": torch.tensor([700, 20]),
        "text": draw(2, 3, 5, 6),
        "segments": SEGMENTS,
        "clean": draw(2, 1, 4, 6, 4),
    }


def block_inputs(model: LayeredTransformer):
    """Hidden states, time embedding, runs and plan as ``forward`` hands them to a block."""
    layout = model.layout(3, 5, (3, 2), SEGMENTS)
    runs = layout.runs(lambda s: TEXT_ROW if s.kind == "text" else VIDEO_ROW)
    plan = plan_attention(
        layout, None, model.heads, model.head_dim, torch.float32, torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, layout.length, model.dim, generator=generator)
    return hidden, torch.randn(2, TINY["time_embed_dim"], generator=generator), runs, plan


@torch.no_grad()
def test_only_noisy_layers_come_back_and_given_ones_count():
    model, given = network(), inputs()
    out = model(**given)
    assert out.shape == given["latents"].shape
    other = model(**{**given, "clean": -given["clean"]})
    assert float((out - other).abs().max()) > 1e-3
    # A given first or last layer shifts nothing: the noisy frames keep their order.
    blended, foreground = given["latents"][:, 2:], given["latents"][:, :2]
    clean = torch.cat([foreground, given["clean"]], dim=1)
    segments = [LayerSegment(s.name, s.frames, clean=s.name != "blended") for s in SEGMENTS]
    rest = model(blended, given["timestep"], given["text"], segments, clean)
    # The same sequence, so the same numbers: which tokens are given only selects the output.
    assert torch.allclose(rest, out[:, 2:], atol=1e-6)


@torch.no_grad()
def test_the_clean_embedding_marks_given_tokens():
    model, given = network(clean_embedding=True), inputs()
    marked = model(**given)
    model.clean_embedding.zero_()
    assert float((model(**given) - marked).abs().max()) > 1e-3
    plain = network().state_dict()
    model.load_state_dict({**model.state_dict(), **plain})
    assert torch.equal(model(**given), network()(**given))


@torch.no_grad()
@pytest.mark.parametrize("layer_embedding", [False, True])
def test_only_the_layer_embedding_orders_the_prompts(layer_embedding):
    # Text tokens have no positions, as in LayerFlow's files without it.
    model, given = network(layer_embedding=layer_embedding), inputs()
    out = model(**given)
    swapped = model(**{**given, "text": given["text"][:, [1, 0, 2]]})
    difference = float((swapped - out).abs().max())
    if layer_embedding:
        assert difference > 1e-3
    else:
        # Sums over keys in another order: rounding, on values of about 1.
        assert difference < 1e-5


def test_a_block_joins_nothing_without_autograd():
    model = network()
    arguments = block_inputs(model)
    kept = arguments[0].clone()
    with torch.profiler.profile() as profile, torch.no_grad():
        model.transformer_blocks[0](*arguments)
    names = {event.name for event in profile.events()}
    assert "aten::native_layer_norm" in names
    assert "aten::cat" not in names
    assert torch.equal(arguments[0], kept)  # work in place stays inside the block


@torch.no_grad()
def test_the_stored_positions_are_used_where_they_fit():
    stored = network(position_table=(15, 6, 3, 2))
    table = stored.patch_embed.pos_embedding
    computed = network()
    computed.load_state_dict(stored.state_dict(), strict=False)
    given = inputs()
    out = stored(**given)
    # The table is one frame longer than the clip, as LayerFlow's RGB tables are.
    positions = stored.patch_embed.positions(15, (5, 3, 2), given["text"])
    assert torch.equal(positions, table[:, : 15 + 5 * 6])
    assert float((out - computed(**given)).abs().max()) > 1e-3
    # Swapped prompts meet other positions.
    swapped = stored(**{**given, "text": given["text"][:, [1, 0, 2]]})
    assert float((swapped - out).abs().max()) > 1e-3

    for grid, text in (((5, 4, 2), 15), ((7, 3, 2), 15), ((5, 3, 2), 10)):
        found = stored.patch_embed.positions(text, grid, given["text"])
        assert torch.equal(found, computed.patch_embed.positions(text, grid, given["text"]))
        assert not found[:, :text].any()
    wide = {**given, "latents": torch.randn(2, 4, 4, 6, 8), "clean": torch.randn(2, 1, 4, 6, 8)}
    assert torch.equal(stored(**wide), computed(**wide))


def test_layers_come_from_the_given_operations():
    made = []

    def recording(kind: type[nn.Module]) -> type[nn.Module]:
        class Recorded(kind):
            def __init__(self, *arguments, **keywords):
                made.append(kind)
                super().__init__(*arguments, **keywords)

        return Recorded

    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.Embedding)
    operations = SimpleNamespace(**{kind.__name__: recording(kind) for kind in kinds})
    networks = (
        LayeredTransformer(**TINY, layer_embedding=True, operations=operations),
        StarterAutoencoder(
            width=8, encoder_blocks=1, decoder_blocks=1, latent_channels=2, operations=operations
        ),
        WordEncoder(vocabulary=3, tokens=2, dim=4, operations=operations),
    )
    modules = [module for model in networks for module in model.modules()]
    assert not [module for module in modules if type(module) in kinds]
    weighted = [module for module in modules if isinstance(module, kinds)]
    assert len(made) == len(weighted) and set(made) == set(kinds)
    # Nothing else holds weights of its own.
    owners = [m for m in modules if m not in weighted and list(m.parameters(recurse=False))]
    assert not owners


def test_a_compiled_block_equals_the_eager_one():
    if not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    model = network()
    arguments = block_inputs(model)
    with torch.no_grad():
        expected = model.transformer_blocks[0](*arguments)
        compiled = torch.compile(model.transformer_blocks[0], fullgraph=True, dynamic=False)
        found = compiled(*arguments)
    # Fused sums round differently; values are about 1.
    assert torch.allclose(found, expected, atol=1e-5)


def test_gradients_reach_every_parameter():
    model = network(layer_embedding=True, clean_embedding=True, position_table=(15, 5, 3, 2))
    given = inputs()
    model(**given).square().mean().backward()
    without = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # A vector added to all keys moves every score of a query alike, which softmax ignores.
    assert not [name for name in without if not name.endswith("norm_k.bias")]


def test_the_graph_and_the_in_place_path_agree():
    model, given = network(layer_embedding=True), inputs()
    with torch.no_grad():
        expected = model(**given)
    assert torch.allclose(model(**given), expected, atol=1e-5)


@torch.no_grad()
def test_single_precision_stays_close_to_double():
    model = network(layer_embedding=True, clean_embedding=True)
    single = model(**inputs())
    double = model.double()(**inputs(dtype=torch.float64))
    assert double.dtype == torch.float64 and float(double.std()) > 0.1
    # Float32 keeps seven digits; two blocks lose about one of them.
    assert float((single.double() - double).abs().max()) < 2e-5


def tokens_seen(model: LayeredTransformer) -> list[int]:
    """How many tokens the MLP of each block is called with, from now on."""
    counts: list[int] = []
    for block in model.transformer_blocks:
        block.ff.register_forward_hook(lambda module, args, out: counts.append(args[0].shape[1]))
    return counts


@torch.no_grad()
def test_given_tokens_are_computed_once_and_exactly_at_one_noise_level():
    model, base = network(layer_embedding=True, clean_embedding=True), inputs()
    base["timestep"] = torch.tensor([700, 700])
    closed = {**base, "attention_mask": clean_sees_clean}
    counts, cache = tokens_seen(model), SegmentKVCache(2**20)
    for step in range(3):
        closed["latents"] = inputs(10 + step)["latents"]
        made = model(**closed, kv_cache=cache)
        # Three prompts of 5 tokens and 1 + 4 latent frames of 3 x 2 patches.
        assert counts == [45, 45] if step == 0 else counts == [24, 24]
        expected = model(**closed)
        counts.clear()
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
        if step == 1:
            # One guidance branch alone finds its own row.
            half = {k: v[1:] if torch.is_tensor(v) else v for k, v in closed.items()}
            torch.testing.assert_close(
                model(**half, kv_cache=cache), expected[1:], atol=1e-5, rtol=1e-5
            )
            assert counts == [24, 24]
            counts.clear()


@torch.no_grad()
def test_reuse_over_noise_levels_is_an_approximation_that_a_refresh_ends():
    model, base = network(), inputs()
    closed = {**base, "attention_mask": clean_sees_clean}
    errors = {}
    for refresh in (None, 2, 1):
        cache, errors[refresh] = SegmentKVCache(2**20, refresh), []
        for time in (900, 500, 100):
            closed["timestep"] = torch.tensor([time, time])
            made, exact = model(**closed, kv_cache=cache), model(**closed)
            errors[refresh].append(float((made - exact).abs().max() / exact.abs().max()))
    assert max(errors[1]) < 1e-5
    # AdaLN modulates given layers with the step's time: what another step left is not the same.
    assert errors[2][1] > 1e-3 and errors[2][2] < 1e-5
    assert errors[None][0] < 1e-5 and min(errors[None][1:]) > 1e-3


@torch.no_grad()
def test_other_given_layers_or_prompts_are_never_taken_for_the_kept_ones():
    model, base = network(), inputs()
    base["timestep"] = torch.tensor([700, 700])
    closed = {**base, "attention_mask": clean_sees_clean}
    cache = SegmentKVCache(2**20)
    model(**closed, kv_cache=cache)
    for changed in ({"clean": base["clean"] * 0.5}, {"text": base["text"].flip(1)}):
        call = {**closed, **changed}
        torch.testing.assert_close(
            model(**call, kv_cache=cache), model(**call), atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_reuse_needs_a_closed_mask_and_inference(caplog):
    model, base = network(), inputs()
    counts, cache = tokens_seen(model), SegmentKVCache(2**20)
    for _ in range(2):
        out = model(**base, kv_cache=cache)
        torch.testing.assert_close(out, model(**base), atol=1e-6, rtol=1e-6)
    assert set(counts) == {45}
    assert len([r for r in caplog.records if "Nothing is kept" in r.message]) == 1
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        model(**base, attention_mask=clean_sees_clean, kv_cache=SegmentKVCache(2**20))


@torch.no_grad()
def test_under_a_compiler_nothing_is_kept():
    model, base = network(), inputs()
    base["timestep"] = torch.tensor([700, 700])
    cache = SegmentKVCache(2**20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    closed = {**base, "attention_mask": clean_sees_clean}
    for _ in range(2):
        made = compiled(**closed, kv_cache=cache)
        torch.testing.assert_close(made, model(**closed), atol=1e-5, rtol=1e-5)
    assert cache.held_bytes == 0
