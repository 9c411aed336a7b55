"""Runs the video UNet inside ComfyUI's own model and samplers and prints numbers, as JSON.

Run by tests/test_host_animate.py in a process of its own, in ComfyUI's folder:
python host_animate.py REPOSITORY GOLDEN_FOLDER CHECKPOINT_FOLDER.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

REPOSITORY, GOLDEN, FILES = (Path(sys.argv.pop(1)) for _ in range(3))
sys.argv[1:] = ["--cpu"]
sys.path.insert(0, str(Path.cwd()))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(True)

import comfy.context_windows  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
)
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])


def part(name: str):
    return importlib.import_module(f"pack.{name}")


golden = part("engine.checkpoints.golden")
loader, video = part("nodes.host.video_loader"), part("nodes.host.video_model")
engine, streams = part("engine.animate_sampling"), part("engine.sampling.streams")
ddim, windows = part("engine.sampling.ddim"), part("engine.sampling.windows")
opener = part("engine.checkpoints.dynamicrafter")
SPEED = part("engine.models.dynamicrafter").SPEED
Guider = part("nodes.host.video_guider").DualStreamGuider
clip_plan = part("engine.conditioning.key_images").clip_plan
gated = part("nodes.host.video_gate").gated

folder_paths.add_model_folder_path("checkpoints", str(FILES))
SIDE, SCALE = 8, 0.18215


def rows(clip: torch.Tensor) -> torch.Tensor:
    """Frames [B * T, ...] of a clip [B, C, T, h, w]."""
    return clip.transpose(1, 2).flatten(0, 1)


@torch.no_grad()
def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() - second.double()).abs().max())


def decibels(made: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted, made = wanted.double(), made.double()
    spread = (wanted.max() - wanted.min()) ** 2
    return float(10 * (spread / (made - wanted).square().mean()).log10())


def saved(case, name: str) -> str:
    path = FILES / f"{name}.ckpt"
    torch.save({"state_dict": case.weights("model.diffusion_model.")}, path)
    return str(path)


def forward(network, given: dict[str, torch.Tensor], text, image, speed):
    """A golden forward through the call that the host makes."""
    x = given["x"]
    frames = x.shape[2]
    with torch.inference_mode():
        out = network(
            rows(x),
            given["timesteps"].to(x.dtype).repeat_interleave(frames),
            text.repeat_interleave(frames, 0),
            num_video_frames=frames,
            image_context=image,
            scalars={SPEED: float(speed.flatten()[0])},
        )
    return out.unflatten(0, (-1, frames)).transpose(1, 2)


def golden_networks() -> dict:
    """Largest errors: released group sizes in float32; whole tiny files, which blow rounding up."""
    found = {}
    for name in ("dc_unet_512like_c32", "dc_unet_256like_c32"):
        case = golden.load_case(GOLDEN, name)
        network = loader.load_model(saved(case, name)).model.diffusion_model
        for key in sorted(case.tensors):
            if not key.startswith("out.") or not key.endswith(".y"):
                continue
            start = f"in.{key.split('.')[1]}."
            given = {k.removeprefix(start): t for k, t in case.tensors.items() if start in k}
            speed = given.get("fs", torch.tensor([case.description["config"]["default_fs"]]))
            if speed.unique().numel() > 1:
                continue  # one number serves a whole call of the host
            text, image = given["context"][:, :77], given["context"][:, 77:]
            made = forward(network, given, text, image, speed)
            found[f"{name} {key}"] = largest(made, case.tensors[key])
    for name in ("dc_ckpt_tiny_512like", "dc_ckpt_tiny_256like"):
        given, path = golden.load_case(GOLDEN, name).tensors, str(FILES / f"{name}.ckpt")
        exact = opener.load_dynamicrafter(path).double()
        _, wanted = part("engine.checkpoints.golden_dynamicrafter").whole(
            exact, given, torch.float64
        )
        network = loader.load_model(path).model.diffusion_model.double()
        with torch.inference_mode():
            image = network.image_projector(given["in.image_embeds"].double())
        x = torch.cat([given["in.x"], given["in.c_concat"]], dim=1).double()
        given = {**given, "x": x, "timesteps": given["in.timesteps"]}
        made = forward(network, given, given["in.text"].double(), image, given["in.fs"])
        found[f"{name} tokens"] = largest(image, given["out.image_tokens"])
        found[f"{name} as the engine"] = largest(made, wanted)
    return found


class Bench:
    """A tiny model with random conditions, in the host and in the engine."""

    def __init__(self, name: str, frames: int = 16, mode: str = "animate"):
        torch.manual_seed(0)
        self.path = str(FILES / f"dc_ckpt_tiny_{name}like.ckpt")
        self.model = loader.load_model(self.path)
        self.settings = self.model.model.settings
        picture, end = torch.randn(2, 1, 4, SIDE, SIDE)
        self.seen, self.grey = torch.randn(2, 1, 257, 20)
        self.text, self.empty = torch.randn(2, 1, 77, 16)
        images = [picture] if mode == "animate" else [picture, end]
        self.plan = clip_plan(len(images), mode == "loop", frames, 16)
        self.detail = engine.detail_latents(self.plan, images)
        self.noise = torch.randn(self.plan.frames, 4, SIDE, SIDE)
        self.sliding = windows.SlidingWindows(16, 8) if frames > 16 and mode == "animate" else None

    def conditionings(self):
        """Positive, image only and negative, as Animate Image makes them."""
        extra = {
            "concat_latent_image": rows(self.detail),
            video.FRAMES: self.plan.frames,
            video.MOTION: 24.0,
            video.WINDOWS: self.sliding,
        }
        pairs = ((self.text, self.seen), (self.empty, self.seen), (self.empty, self.grey))
        return [[[text, {**extra, video.TOKENS: tokens}]] for text, tokens in pairs]

    def sigmas(self, scheduler: str, steps: int) -> torch.Tensor:
        return comfy.samplers.calculate_sigmas(self.model.model.model_sampling, scheduler, steps)

    def host(self, guidance, sigmas, model=None, sampler="euler", clips: int = 1):
        guider = Guider(model or self.model)
        guider.set_streams(guidance)
        guider.set_conds(*self.conditionings())
        noise = self.noise.repeat(clips, 1, 1, 1)
        with torch.inference_mode():
            made = guider.sample(
                noise, noise * 0, comfy.samplers.sampler_object(sampler), sigmas, seed=0
            )
        return made * SCALE

    def engine(self, guidance, steps: int, network):
        with torch.no_grad():
            conditions = engine.ClipConditions(
                self.detail * SCALE,
                (network.image_projector(self.seen),),
                network.image_projector(self.grey),
                self.text,
                self.empty,
                24.0,
                1.0,
            )
        variant = self.settings.variant
        table = ddim.ddim_table(
            self.settings.schedule, steps, variant.spacing, 0.0, variant.rescale_base
        )
        sliding = self.sliding or windows.SlidingWindows(16, 8)
        made = ddim.sample_ddim(
            engine.predictor(network, conditions, self.plan, sliding, guidance, True),
            self.noise.transpose(0, 1)[None],
            table,
            prediction=self.settings.schedule.prediction,
            generator=torch.Generator(),
        )
        return rows(made), table


def smooth(self, x, timestep, context, *, image_context, scalars, **_more):
    """Stands in for the network: tiny ones blow rounding up until samplers cannot be compared."""
    noisy, given = x[:, :4], x[:, 4:]
    number = sum(s.to(x) for s in scalars.values()) + timestep.to(x)
    weight = (context.mean((1, 2)) + 3 * image_context.mean((1, 2)) + number / 1000).sin()
    # Looks along time, so that windows matter.
    after = noisy.roll(1, 2)
    return (noisy + 0.3 * after).tanh() * (1 + weight.view(-1, 1, 1, 1, 1)) + 0.4 * given


def sampling() -> dict:
    """The host's Euler against the engine's DDIM at eta 0, from the same noise."""
    found = {}
    network_class = next(c for c in video.VideoNetwork.__mro__ if c.__name__ == "VideoUNet")
    real, network_class.forward = network_class.forward, smooth
    try:
        for name, scheduler in (("512", "simple"), ("256", "ddim_uniform")):
            for frames in (16, 29):
                bench = Bench(name, frames)
                network = opener.load_dynamicrafter(bench.path)
                for scales in ((7.5, 7.5, 0.7), (5.0, 2.0, 0.3)):
                    guidance = streams.StreamGuidance(*scales)
                    sigmas = bench.sigmas(scheduler, 20)
                    wanted, table = bench.engine(guidance, 20, network)
                    visited = [
                        int(bench.model.model.model_sampling.timestep(s)) for s in sigmas[:-1]
                    ]
                    assert visited == table.timesteps
                    clean = bench.host(guidance, sigmas)
                    # The published sampler ends at its first timestep, at the scale of the last.
                    sigmas[-1] = bench.model.model.model_sampling.sigmas[0]
                    noisy = bench.host(guidance, sigmas)
                    same = noisy + (float(table.scales[-1]) - 1) * clean
                    same = same * float(table.alphas_prev[-1]) ** 0.5
                    found[f"{name} {frames} {scales}"] = {
                        "as it ends here": decibels(clean, wanted),
                        "as published": decibels(same, wanted),
                    }
        bench = Bench("512")
        guidance = streams.StreamGuidance(5.0, 2.0, 0.5)
        steps = bench.sigmas("simple", 6)
        one, two = bench.host(guidance, steps), bench.host(guidance, steps, clips=2)
        found["two clips are one twice"] = largest(two, one.repeat(2, 1, 1, 1))
    finally:
        network_class.forward = real
    return found


def branches() -> dict:
    """Forwards a step for each pair of scales."""
    bench, found = Bench("512"), {}
    network = bench.model.model.diffusion_model
    original, calls = network.forward, []

    def counted(x, *args, **kwargs):
        calls.append(x.shape[0] // 16)
        return original(x, *args, **kwargs)

    network.forward = counted
    for scales in ((1.0, 1.0), (7.5, 7.5), (7.5, 1.0), (7.5, 2.0)):
        calls.clear()
        bench.host(streams.StreamGuidance(*scales), bench.sigmas("simple", 2))
        found[str(scales)] = sum(calls) / 2
    network.forward = original
    return found


def gates() -> dict:
    """Gate 0 leaves the picture's tokens without a say; gates multiply, on a clone."""
    bench = Bench("512")
    steps, guidance = bench.sigmas("simple", 2), streams.StreamGuidance(1.0, 1.0)
    plain = bench.host(guidance, steps)
    off = gated(bench.model, 0.0, "all", "")
    closed = bench.host(guidance, steps, off)
    bench.seen = torch.randn_like(bench.seen)
    other, other_closed = bench.host(guidance, steps), bench.host(guidance, steps, off)
    twice = gated(gated(bench.model, 0.5, "all", ""), 0.5, "listed", "7-9, 2:4")
    return {
        "tokens matter": largest(plain, other),
        "tokens behind a closed gate": largest(closed, other_closed),
        "closed changes": largest(other, other_closed),
        "factors": twice.model_options["transformer_options"][video.GATE],
        "original": video.GATE in bench.model.model_options.get("transformer_options", {}),
    }


def adapters() -> dict:
    """Names that the host's own LoRA loader finds, and that a patch does something."""
    bench, found = Bench("512"), {}
    module = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k_ip"
    weight = bench.model.model.diffusion_model.get_submodule(module).weight
    rank, inside = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    flat = module.replace(".", "_")
    guidance, steps = streams.StreamGuidance(1.0, 1.0), bench.sigmas("simple", 1)
    plain = bench.host(guidance, steps)
    for name, names in {
        "kohya": (f"lora_unet_{flat}.lora_down.weight", f"lora_unet_{flat}.lora_up.weight"),
        "host": tuple(f"diffusion_model.{module}.lora_{half}.weight" for half in "AB"),
        "projector": tuple(
            f"diffusion_model.image_projector.proj_in.lora_{half}.weight" for half in "AB"
        ),
    }.items():
        halves = (rank, inside)
        if name == "projector":
            proj = bench.model.model.diffusion_model.image_projector.proj_in.weight
            halves = (torch.randn(2, proj.shape[1]), torch.randn(proj.shape[0], 2))
        state = dict(zip(names, halves, strict=True))
        patched, _ = comfy.sd.load_lora_for_models(bench.model, None, state, 1.0, 0.0)
        found[name] = [len(patched.patches), largest(bench.host(guidance, steps, patched), plain)]
    found["back"] = largest(bench.host(guidance, steps), plain)
    return found


def types_() -> dict:
    """Stored types, kept as on a GPU that has them: the weights, and a run against float32's.

    Both runs have the same numbers in their weights, so that they make the same.
    """
    found = {}
    convert = part("engine.checkpoints.convert").convert_checkpoint
    bench, management = Bench("512"), comfy.model_management
    guidance, steps = streams.StreamGuidance(1.0, 1.0), bench.sigmas("simple", 1)
    for name in ("float16", "bfloat16", "float8_e4m3fn"):
        target = FILES / f"{name}.safetensors"
        convert(bench.path, target, dtype=getattr(torch, name))
        bench.model = loader.load_model(str(target), "512")
        plain = bench.host(guidance, steps)
        usual = management.unet_dtype, management.unet_manual_cast
        management.unet_dtype = lambda *_, weight_dtype=None, **__: weight_dtype
        management.unet_manual_cast = lambda *_, **__: torch.float32
        try:
            bench.model = loader.load_model(str(target), "512")
        finally:
            management.unet_dtype, management.unet_manual_cast = usual
        weights = bench.model.model.diffusion_model.state_dict()
        kinds = {str(t.dtype).removeprefix("torch.") for t in weights.values()}
        norm = bench.model.model.diffusion_model.conv_norm_out
        assert norm.weight_comfy_model_dtype == norm.weight.dtype
        made = bench.host(guidance, steps)
        found[name] = {"kinds": sorted(kinds), "error": largest(made, plain)}
    return found


def host_windows() -> dict:
    """The core's own context windows over a long clip: conditions are cut to each window."""
    bench = Bench("512", 24)
    bench.sliding = None
    model = bench.model.clone()
    context = comfy.context_windows
    model.model_options["context_handler"] = context.IndexListContextHandler(
        context_schedule=context.get_matching_context_schedule("standard_static"),
        fuse_method=context.get_matching_fuse_method("pyramid"),
        context_length=16,
        context_overlap=4,
        context_stride=1,
        closed_loop=False,
        dim=0,
    )
    made = bench.host(streams.StreamGuidance(2.0, 2.0), bench.sigmas("simple", 2), model)
    return {"finite": bool(made.isfinite().all()), "frames": len(made)}


def long_clips() -> dict:
    """Memory that the host is asked for: windows are seen one after another."""
    bench = Bench("512", 64)
    conditions = [dict(entry[1]) for entry in bench.conditionings()[0]]
    helpers = types.SimpleNamespace(model=bench.model.model)
    estimate = importlib.import_module("comfy.sampler_helpers").estimate_memory
    long, _ = estimate(helpers, bench.noise.shape, {"positive": conditions})
    short, _ = estimate(helpers, bench.noise[:16].shape, {"positive": []})
    return {"long over short": long / short}


@torch.inference_mode()
def inputs() -> dict:
    """What Animate Image makes of pictures, with the parts of a whole tiny file."""
    conditioning = part("nodes.host.video_conditioning")
    loaded = loader.load_animator("tiny.safetensors")
    encode = loaded.clip.encode_from_tokens_scheduled
    texts = [encode(loaded.clip.tokenize(text)) for text in ("a red circle", "")]
    start, end = torch.rand(2, 64, 64, 3), torch.rand(1, 80, 40, 3)

    def made(pictures, seen=None, vae=loaded.vae, vision=loaded.clip_vision, texts=texts, **wish):
        try:
            return conditioning.animate(
                loaded.model, *texts, vae, vision, pictures, seen, conditioning.Wish(**wish)
            )
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found = {}
    for name, pictures, wish in (
        ("animate", [start], {}),
        ("long", [start], {"frames": 40}),
        ("interpolate", [start, end], {"frames": 9}),
        ("loop", [start], {"loop": True, "width": 64, "height": 64, "exact": True, "batch": 2}),
    ):
        one = made(pictures, **wish)
        extra = one.positive[0][1]
        detail = extra["concat_latent_image"]
        filled = [i for i in range(len(detail)) if detail[i].any()]
        found[name] = {
            "latent": list(one.latent["samples"].shape),
            "filled": filled,
            "first": largest(detail[filled[0]], detail[filled[-1]]),
            "kept": one.kept,
            "windows": extra[video.WINDOWS] and extra[video.WINDOWS].overlap,
            "motion": extra[video.MOTION],
            "mask": [int(row.sum() == 0) for row in one.latent.get("noise_mask", torch.ones(0, 1))],
            "samples": float(one.latent["samples"].abs().max()),
            "picture in": [
                largest(extra[video.TOKENS], other[0][1][video.TOKENS]) > 0
                for other in (one.image_only, one.negative)
            ],
            "notes": one.notes,
        }
    vision = loaded.clip_vision
    wide = torch.rand(1, 48, 96, 3)
    whole, middle = (vision.encode_image(wide, crop=crop) for crop in (False, True))
    other = vision.encode_image(torch.rand(1, 32, 32, 3), crop=True)
    for name, seen in (("whole", whole), ("other", other)):
        tokens = made([wide], seen).positive[0][1][video.TOKENS]
        found[f"{name} output"] = largest(tokens, seen["last_hidden_state"])

    class Wrong:
        """An encoder of another width, and an autoencoder with another number of channels."""

        image_size = 32

        def encode_image(self, image, crop=True):
            return {"last_hidden_state": torch.zeros(1, 5, 7)}

        def encode(self, image):
            return torch.zeros(1, 16, 2, 2)

    other = [[[torch.zeros(1, 77, 768), {}]]] * 2
    found["wrong"] = {
        "cropped": made([wide], middle),
        "vae": made([start], vae=Wrong()),
        "vision": made([start], vision=Wrong()),
        "text": made([start], texts=other),
        "loop": made([start, end], loop=True),
        "short": made([start, end], frames=1),
        "overlap": made([start], frames=40, overlap=16),
        "motion": made([start], motion=-1.0),
    }
    # Pictures that the file's own autoencoder makes, against the engine's.
    codec = part("engine.conditioning.video_encoders").load_frame_codec(
        opener.open_dynamicrafter(FILES / "tiny.safetensors"), None, torch.device("cpu")
    )
    pixels = torch.rand(3, 64, 96, 3)
    wanted = codec.encode(pixels.movedim(-1, 1) * 2 - 1, torch.Generator())
    found["vae"] = [
        largest(loaded.vae.encode(pixels), wanted),
        largest(
            loaded.vae.decode(wanted), ((codec.decode(wanted) + 1) / 2).clamp(0, 1).movedim(1, -1)
        ),
    ]
    previewer = importlib.import_module("latent_preview").Latent2RGBPreviewer
    pictures = []
    for latents in (loaded.model.model.latent_format, Bench("512").model.model.latent_format):
        show = previewer(
            latents.latent_rgb_factors,
            latents.latent_rgb_factors_bias,
            latents.latent_rgb_factors_reshape,
        ).decode_latent_to_preview
        empty, first, middle = torch.zeros(3, 16, 4, 8, 12)
        first[0], middle[7] = 1.0, 1.0
        plain = show(empty).tobytes()
        pictures.append(
            [show(empty).size, show(first).tobytes() == plain, show(middle).tobytes() == plain]
        )
    found["preview"] = pictures
    return found


for name, what in {
    "inputs": inputs,
    "golden": golden_networks,
    "sampling": sampling,
    "branches": branches,
    "gates": gates,
    "adapters": adapters,
    "types": types_,
    "host windows": host_windows,
    "long": long_clips,
}.items():
    print("RESULT", json.dumps({name: what()}, default=str), flush=True)
