"""`layerloom bench`: what it reports, what it says to bad input, and what it measures against."""

import json
import math
import re
import time

import pytest
import torch
from attention_cases import (
    QUICK,
    cases,
    make_plan,
    oracle,
    oracle_bias,
    qkv,
    relative_error,
)
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from layerloom.engine import bench_block
from layerloom.engine.cli import main
from layerloom.kernels import list_backends, use_backend
from layerloom.kernels.bench import Candidate, Prepared, Protocol, measure, plot
from layerloom.kernels.bench.attention import candidate_names
from layerloom.kernels.bench.cases import (
    MASKS,
    SHAPES,
    Case,
    find_shape,
    make_mask,
    product,
    random_qkv,
)
from layerloom.kernels.bench.probes import Clock, look_inside

CPU = torch.device("cpu")
# The profiler warns once a process that it forgets events.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
SPREAD = {"median", "q1", "q3", "low", "high"}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def row_of(record: dict, candidate: str, case: int = 0) -> dict:
    return next(r for r in record["cases"][case]["rows"] if r["candidate"] == candidate)


def assert_measured(row: dict, rounds: int, worst: float) -> None:
    assert row["status"] == "measured" and row["reason"] == ""
    assert len(row["times"]) == rounds and min(row["times"]) > 0
    assert set(row["time"]) == SPREAD and row["time"]["median"] > 0
    assert row["cold"] > 0 and row["setup"] >= 0 and row["calls_per_sample"] >= 1
    assert row["flops_per_second"] > 0 and row["dense_flops_per_second"] > 0
    assert 0 <= row["error"] <= worst
    assert row["peak_bytes"] > 0 and row["memory"] == row["peak_bytes"] + row["held_bytes"]


# --- the commands ---------------------------------------------------------------------------


def test_attention_writes_table_json_and_plot(tmp_path, capsys):
    names = "dispatch,dispatch,reference,triton,sdpa,sdpa-masked,sdpa-cudnn"
    out = tmp_path / "bench"
    options = ("--shapes", "tiny,2x1x2x2+3", "--masks", "full,blended_sees_all+bias,window")
    options += ("--rounds", 4, "--heads", 2, "--device", "cpu", "--baseline", "sdpa,dispatch")
    assert run("bench", "attention", *options, "--backends", names, "--out", out) == 0
    shown = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {"attention.md", "attention.json"} | (
        {"attention.png"} if plot.available() else set()
    )
    assert (out / "attention.md").read_text(encoding="utf-8").strip() == shown.out.strip()
    record = json.loads((out / "attention.json").read_text(encoding="utf-8"))
    assert record["benchmark"] == "attention" and record["format"] == 1
    assert {"torch", "python", "date", "processor", "cores", "threads"} <= set(
        record["environment"]
    )
    titles = [(case["shape"], case["mask"]) for case in record["cases"]]
    masks = ("full", "blended_sees_all+bias", "window")
    assert titles == [(shape, mask) for shape in ("tiny", "2x1x2x2+3") for mask in masks]
    assert record["cases"][0]["tokens"] == 63 and record["cases"][3]["tokens"] == 14
    for case in record["cases"]:
        rows = {row["candidate"]: row for row in case["rows"]}
        assert list(rows) == names.replace(",dispatch,", ",dispatch#2,").split(",")
        for name in ("dispatch", "dispatch#2", "reference", "sdpa", "sdpa-masked"):
            # Rounding of float32: values of about 1, the project's bound for its backends.
            assert_measured(rows[name], 4, 2e-6)
            assert set(rows[name]["ratios"]) == {"sdpa", "dispatch"}
        assert rows["dispatch"]["ratios"]["dispatch"] == dict.fromkeys(SPREAD, 1.0)
        assert rows["dispatch#2"]["ratios"]["dispatch"]["low"] > 0
        assert [rows[name]["computes"] for name in ("dispatch", "sdpa")] == ["masked", "full"]
        # The dense mask is held; nothing else is.
        tokens = case["tokens"]
        assert rows["sdpa-masked"]["held_bytes"] >= tokens**2 * 4
        assert rows["dispatch"]["held_bytes"] == 0
        assert rows["sdpa-masked"]["operators"]
        if not torch.cuda.is_available():
            assert rows["sdpa-cudnn"]["status"] == "unavailable"
            assert "CUDA" in rows["sdpa-cudnn"]["reason"]
            assert rows["triton"]["status"] == "unavailable" and rows["triton"]["reason"]
    for text in ("| candidate | ms | x sdpa | x dispatch |", "sdpa-cudnn, unavailable", "flash"):
        assert text in shown.out
    assert re.search(r"layerloom bench attention --shapes tiny,2x1x2x2\+3 --masks full,", shown.out)


def test_json_is_all_that_is_printed_and_the_command_runs_again(capsys):
    options = ("--shapes", "tiny", "--masks", "blended_sees_all", "--rounds", 2, "-q", "--json")
    assert run("bench", "attention", *options, "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    record = json.loads(shown.out)
    assert [row["candidate"] for row in record["cases"][0]["rows"]] == candidate_names(CPU)
    assert run(*record["command"].split()[1:], "--quiet", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["command"] == record["command"] and again["settings"] == record["settings"]
    numbers = [[row["error"] for row in r["cases"][0]["rows"]] for r in (record, again)]
    assert numbers[0] == numbers[1]


def test_block_is_measured_against_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    options = ("--shapes", "tiny", "--masks", "full,blended_sees_all", "--rounds", 3)
    names = "layerloom,layerloom:reference,diffusers"
    options += ("--dtype", "float32,bfloat16", "--device", "cpu", "--threads", 1, "--clock", "cpu")
    assert run("bench", "block", *options, "--backends", names, "--out", tmp_path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "block.json").read_text(encoding="utf-8"))
    assert record["environment"]["threads"] == 1 and record["settings"]["clock"] == "cpu"
    assert [case["dtype"] for case in record["cases"]] == ["float32", "bfloat16"] * 2
    for index, case in enumerate(record["cases"]):
        # A block loses about a digit of float32's seven; bfloat16 has two and a half.
        worst = {"float32": 2e-6, "bfloat16": 3e-2}[case["dtype"]]
        for name in names.split(","):
            row = row_of(record, name, index)
            assert_measured(row, 3, worst)
            assert set(row["ratios"]) == {"diffusers"}
        assert row_of(record, "diffusers", index)["computes"] == "full"


def test_the_video_unet_is_measured_against_diffusers(tmp_path, capsys):
    pytest.importorskip("diffusers")
    options = ("--clip", "2x3x4", "--rounds", 3, "--device", "cpu", "--threads", 1, "--quiet")
    options += ("--dtype", "float32,bfloat16", "--clock", "cpu", "--budget", 0)
    assert run("bench", "unet", *options, "--out", tmp_path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((tmp_path / "unet.json").read_text(encoding="utf-8"))
    assert {path.name for path in tmp_path.iterdir()} == {"unet.json", "unet.md"}
    assert [case["dtype"] for case in record["cases"]] == ["float32", "bfloat16"]
    for index, case in enumerate(record["cases"]):
        assert case["channels"] == [64, 128, 256, 256] and case["clip"] == [2, 3, 4]
        for name in ("layerloom", "diffusers"):
            row = row_of(record, name, index)
            assert_measured(row, 3, {"float32": 5e-6, "bfloat16": 6e-2}[case["dtype"]])
            assert set(row["ratios"]) == {"diffusers"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--width", 100), ("width 100", "multiple of 64")),
        (("--clip", "16x20"), ("'16x20'", "FRAMESxHEIGHTxWIDTH")),
        (("--clip", "0x2x2"), ("'0x2x2'",)),
        (("--backends", "magic"), ("--backends", "'magic'", "diffusers")),
    ],
)
def test_bad_unets_give_one_sentence(arguments, words, tmp_path, capsys):
    assert run("bench", "unet", *arguments, "--device", "cpu", "--out", tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and not (tmp_path / "out").exists()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    options = ("--shapes", "tiny,starter", "--masks", "full,window", "--rounds", 2, "-q")
    assert run("bench", "attention", *options, "--device", "cpu", "--out", tmp_path) == 0
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 5


def test_without_matplotlib_the_tables_are_written_and_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "available", lambda: False)
    options = ("--shapes", "tiny", "--masks", "full", "--rounds", 2, "--device", "cpu")
    assert run("bench", "attention", *options, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"attention.md", "attention.json"}
    assert "pip install 'layerloom[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "huge"), ("--shapes", "'huge'", "preview", "starter")),
        (("--shapes", "0x1x2x3"), ("'0x1x2x3'", "1 to 16 layers")),
        (("--shapes", "tiny,"), ("--shapes", "commas")),
        (("--masks", "causal"), ("--masks", "'causal'", "blended_sees_all+bias")),
        (("--masks", "full+bias+bias"), ("'full+bias+bias'",)),
        (("--backends", "magic"), ("--backends", "'magic'", "dispatch")),
        (("--dtype", "int8"), ("--dtype", "int8", "bfloat16")),
        (("--device", "tpu"), ("'tpu'", "cpu")),
        (("--device", "meta"), ("meta", "cuda")),
        (("--batch", 0), ("--batch is 0",)),
        (("--heads", -1), ("--heads is -1",)),
        (("--rounds", 0), ("--rounds is 0",)),
        (("--rounds", "many"), ("--rounds",)),
        (("--seed", -3), ("--seed is -3",)),
        (("--clock", "sun"), ("--clock is sun", "wall")),
        (("--threads", 0), ("--threads is 0",)),
        (("--budget", -1), ("--budget is -1",)),
        (("--budget", "nan"), ("--budget is nan",)),
    ],
)
@pytest.mark.parametrize("command", ["attention", "block"])
def test_bad_options_give_one_sentence(command, arguments, words, tmp_path, capsys):
    assert run("bench", command, *arguments, "--out", tmp_path / "out") == 2
    shown = capsys.readouterr()
    assert shown.out == "" and not (tmp_path / "out").exists()
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("layerloom: ") and lines[0].endswith(".")
    assert ". " not in lines[0] and all(word in lines[0] for word in words), lines


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Clock, "sample", interrupted)
    out = tmp_path / "out"
    assert run("bench", "attention", "--shapes", "tiny", "--device", "cpu", "--out", out) == 130
    assert not out.exists()
    assert "interrupted" in capsys.readouterr().err


def test_a_used_up_budget_is_said_row_by_row(capsys):
    options = ("--shapes", "tiny", "--device", "cpu", "--budget", 1e-9, "--json", "-q")
    assert run("bench", "attention", *options) == 0
    record = json.loads(capsys.readouterr().out)
    rows = [row for case in record["cases"] for row in case["rows"]]
    assert {row["status"] for row in rows} <= {"skipped", "unavailable"}
    assert any("time budget" in row["reason"] for row in rows)


# --- the protocol ---------------------------------------------------------------------------


def measured(*candidates: Candidate, baselines=(), rounds=3):
    return measure(
        candidates,
        baselines,
        100,
        CPU,
        Clock(CPU),
        Protocol(rounds),
        1,
        lambda computes, result: float(abs(result.sum())) * 0,
        lambda count, what: None,
    )


def test_what_fails_is_a_row_with_its_reason():
    calls = []

    def late():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("lost the device\nand more")
        return torch.ones(1)

    def prepared(call):
        return lambda: Prepared(call)

    def no_memory():
        raise MemoryError

    rows = measured(
        Candidate("fine", prepared(lambda: torch.ones(1))),
        Candidate("late", prepared(late)),
        Candidate("large", prepared(no_memory)),
        Candidate("huge", prepared(no_memory), needs=1 << 60),
        Candidate("nan", prepared(lambda: torch.full((1,), math.nan))),
        Candidate("out", reason="it is not installed"),
        baselines=("late", "fine"),
    )
    found = {row.candidate: (row.status, row.reason) for row in rows}
    assert found["fine"] == ("measured", "")
    assert found["late"] == ("failed", "RuntimeError: lost the device")
    assert found["large"] == ("failed", "out of memory")
    assert found["huge"][0] == "skipped" and "GiB are free" in found["huge"][1]
    assert found["nan"] == ("failed", "ValueError: the result is not finite")
    assert found["out"] == ("unavailable", "it is not installed")
    assert set(rows[0].ratios) == {"fine"}


def test_rounds_run_every_candidate_once_in_changing_order():
    order = []

    def candidate(name):
        def call():
            order.append(name)
            time.sleep(0.005)  # long enough for one call a sample
            return torch.ones(1)

        return Candidate(name, lambda: Prepared(call))

    names = [f"c{index}" for index in range(4)]
    measured(*map(candidate, names), rounds=6)
    # Two first calls each, then the rounds, then a watched call each.
    rounds = [order[start : start + 4] for start in range(8, 8 + 24, 4)]
    assert all(sorted(turn) == names for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert order[-4:] == names


def test_peak_memory_of_a_call_is_exact_on_a_cpu():
    kept = torch.ones(1000)

    def call():
        large = torch.empty(300_000)  # 1.2 MB beside what follows
        both = torch.cat([kept, large])
        del large
        return both[:10].clone()

    for _ in range(2):
        # Peak: 300,000 and 301,000 numbers of four bytes.
        assert look_inside(call, CPU).peak_bytes == 4 * 601_000


def test_shapes_have_the_published_lengths():
    tokens = {name: shape.layout.length for name, shape in SHAPES.items()}
    published = {"A": 70_878, "B": 22_278, "rgb": 16_878, "preview": 5_958}
    assert {name: tokens[name] for name in published} == published
    assert find_shape("4x4x15x22").layout == SHAPES["preview"].layout
    assert find_shape("A", 4).heads == 4
    for mask in MASKS:
        case = Case(SHAPES["B"], mask, torch.float32, CPU)
        expected = {"full": 1.0, "blended_sees_all": 0.5625, "blended_sees_all+bias": 0.5625}
        if mask in expected:
            assert case.plan().flop_fraction == pytest.approx(expected[mask], abs=0.01)
        biases = {run.bias for runs in case.plan().kv_runs for run in runs}
        assert (len(biases) > 2) == mask.endswith("+bias")
    assert make_mask("window", SHAPES["B"].layout).frame_window == 2


def test_inputs_are_normalised_and_lie_as_projections_leave_them():
    (case,) = product([SHAPES["tiny"]], ["full"], [torch.float32], CPU, 2)
    q, k, v = random_qkv(case, 0)
    assert q.shape == (2, 2, 63, 32) and q.transpose(1, 2).is_contiguous()
    for x in (q, k):
        assert torch.allclose(x.var(-1, unbiased=False), torch.ones(1), atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), random_qkv(case, 0), strict=True))


# --- FlexAttention --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@given(case=cases(most_tokens=700))
@settings(QUICK, max_examples=15)
def test_flex_attention_agrees_with_the_dense_oracle(case):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    layout, mask = case
    plan = make_plan(layout, mask, head_dim=16)
    made = plan.to_block_mask()
    # torch's own way evaluates the mask on all pairs.
    length = layout.length
    asked = flex.create_block_mask(made.mask_mod, None, None, length, length, device="cpu")
    assert made.seq_lengths == asked.seq_lengths
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(made, name), getattr(asked, name)), name
    dense = oracle_bias(layout, mask)
    index = torch.arange(length)
    visible = made.mask_mod(0, 0, index[:, None], index[None, :])
    assert torch.equal(visible, ~torch.isneginf(dense))
    q, k, v = qkv(layout, head_dim=16)
    out = flex.flex_attention(q, k, v, block_mask=made, score_mod=plan.score_mod())
    expected, _ = oracle(q, k, v, dense, 16**-0.5)
    assert relative_error(out, expected) <= 1e-6


def test_the_published_block_mask_skips_what_the_plan_skips():
    pytest.importorskip("torch.nn.attention.flex_attention")
    case = Case(SHAPES["B"], "blended_sees_all", torch.float32, CPU)
    mask = case.plan().to_block_mask()
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    share = blocks / mask.kv_num_blocks.shape[-1] ** 2
    # Blocks of 128 tokens that a segment's end cuts are computed whole.
    assert 0 < share - case.plan().flop_fraction < 0.02


# --- one block ------------------------------------------------------------------------------


class Joined(TorchDispatchMode):
    """Sizes of everything that `aten::cat` returns."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket is torch.ops.aten.cat:
            self.sizes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("mask", ["full", "blended_sees_all"])
@torch.no_grad()
def test_a_block_never_joins_hidden_states(mask):
    case = Case(find_shape("4x2x4x5+7", 4, 16), mask, torch.float32, CPU, batch=2)
    setting = bench_block.BlockSetting(case, 0)
    arguments = (setting.hidden, torch.nn.functional.silu(setting.time), setting.runs, case.plan())
    with torch.profiler.profile() as profile:
        setting.block(*arguments)
    names = [event.name for event in profile.events()]
    assert "aten::scaled_dot_product_attention" in names
    with Joined() as joined:
        setting.block(*arguments)
    assert len(joined.sizes) == names.count("aten::cat")
    if mask == "full":
        assert not joined.sizes
    # Only visible keys and values, heads apart, and never all tokens.
    batch, tokens, width = setting.hidden.shape
    for size in joined.sizes:
        assert len(size) == 4 and size[:2] == (batch, 4) and size[3] == 16
        assert math.prod(size) < batch * tokens * width


@pytest.mark.parametrize("shape", ["4x2x4x5+7", "3x1x6x4+9"])
@torch.no_grad()
def test_a_block_equals_diffusers_block(shape):
    module = pytest.importorskip("diffusers.models.transformers.cogvideox_transformer_3d")
    case = Case(find_shape(shape, 3, 32), "full", torch.float32, CPU, batch=2)
    setting = bench_block.BlockSetting(case, 1)
    theirs = module.CogVideoXBlock(96, 3, 32, bench_block.TIME_DIM, attention_bias=True).eval()
    theirs.load_state_dict(setting.state)
    hidden, text = setting.hidden, setting.text
    video, words = theirs(hidden[:, text:], hidden[:, :text], setting.time)
    rows = torch.nn.functional.silu(setting.time)
    ours = setting.block(hidden, rows, setting.runs, case.plan())
    assert float(video.std()) > 0.5
    # Sums in another order, on values of about 5.
    assert torch.allclose(ours[:, text:], video, atol=1e-5)
    assert torch.allclose(ours[:, :text], words, atol=1e-5)
    for found in (ours, (video, words)):
        assert setting.error("full", found) <= 1e-6
    assert setting.error("masked", ours) <= 1e-6


@torch.no_grad()
def test_the_blocks_exact_result_knows_masks():
    case = Case(find_shape("4x2x4x5+7", 3, 32), "blended_sees_all+bias", torch.float32, CPU)
    setting = bench_block.BlockSetting(case, 2)
    rows = torch.nn.functional.silu(setting.time)
    for info in list_backends():
        if info.approximate or not info.available or info.constraints.devices:
            continue
        with use_backend(info.name):
            ours = setting.block(setting.hidden, rows, setting.runs, case.plan())
        assert setting.error("masked", ours) <= 1e-6
        assert setting.error("full", ours) > 1e-3
