"""Procedural clips with exact ground truth: one sprite moving over one patterned background."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from .sprite_prompts import (
    CHANGES,
    COLOURS,
    DIRECTIONS,
    PATTERNS,
    SHAPES,
    SPEEDS,
    VOCABULARY,
    RandomSource,
    choose,
    prompts,
    tokenise,
)

__all__ = [
    "CHANGES",
    "COLOURS",
    "DIRECTIONS",
    "HELD_OUT_PAIRS",
    "PATTERNS",
    "SHAPES",
    "SPEEDS",
    "VOCABULARY",
    "RenderedBatch",
    "Scene",
    "placed",
    "prompts",
    "render",
    "sample_scene",
    "scene_at",
    "tokenise",
]

# Colour and shape of sprites kept for evaluation; each colour and each shape is still seen.
HELD_OUT_PAIRS: tuple[tuple[str, str], ...] = (
    ("red", "triangle"),
    ("green", "star"),
    ("blue", "circle"),
    ("yellow", "square"),
    ("magenta", "star"),
    ("cyan", "triangle"),
)

SPRITE_RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.08, 0.82, 0.15),
    "blue": (0.10, 0.22, 0.98),
    "yellow": (1.00, 0.92, 0.08),
    "magenta": (0.95, 0.12, 0.90),
    "cyan": (0.08, 0.92, 0.95),
}
# A background tone is the sprite colour pulled this far towards mid-dark grey, so that sprites
# stand out; the second tone of a pattern is the first one darkened.
_GREY_SHARE, _GREY_LEVEL, _DARK = 0.42, 0.36, 0.45

# Circumradius for size 1. Exactly equal areas would need 1, 1.25, 1.56, 1.54 and would make
# circles look small; these keep areas within 20 % of each other.
CIRCUMRADIUS: dict[str, float] = {"circle": 1.10, "square": 1.30, "triangle": 1.55, "star": 1.55}
STAR_INNER = 0.46  # inner over outer radius of the star
SIZE_RANGE = (0.145, 0.168)  # largest size during the clip, in shorter sides
GROWTH = 1.4  # last size over first size of a growing sprite
TURN = math.radians(60.0)  # angle a turning sprite turns through
TILT = math.radians(15.0)  # largest starting tilt
TRAVEL: dict[str, float] = {"slow": 0.18, "fast": 0.40}  # path over the clip, in shorter sides
_MARGIN = 0.012  # free space kept around the sprite, in shorter sides

_STEPS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
    "still": (0, 0),
}


@dataclass(frozen=True)
class Scene:
    """One clip in words and numbers; lengths are fractions of the frame's shorter side.

    ``start`` is the sprite's first centre as fractions of width and height. ``size`` is the first
    size (circumradius = size times ``CIRCUMRADIUS[shape]``), ``angle`` the first tilt in radians
    (clockwise on screen). ``growth`` and ``turn`` are last size over first size and the angle
    turned through. Motion spans the clip, whatever its length.
    A background is one of six colours, muted; stripes, checker and gradient alternate it with
    the same tone darkened. ``period`` (of stripes or checker) is in shorter sides, ``phase`` in
    periods along the pattern's axis and across it, ``orientation`` in radians.
    ``caption`` seeds the scene's own wording (``random.Random(scene.caption)``).
    ``path`` is the length of the way in shorter sides, where it is not the speed's. ``returns``:
    the sprite goes half of it out and comes back to where it began.
    """

    shape: str
    colour: str
    direction: str
    speed: str
    change: str
    size: float
    growth: float
    angle: float
    turn: float
    start: tuple[float, float]
    pattern: str
    background_colour: str
    period: float
    phase: tuple[float, float]
    orientation: float
    caption: int
    path: float | None = None
    returns: bool = False

    @property
    def travel(self) -> tuple[float, float]:
        """Displacement (x, y) to where the sprite turns back or ends, in shorter sides."""
        x, y = _STEPS[self.direction]
        path = TRAVEL[self.speed] if self.path is None else self.path
        length = (path / 2 if self.returns else path) / max(math.hypot(x, y), 1.0)
        return x * length, y * length


def background_tones(colour: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (main, dark) RGB tones, 0..1, of a background in one of the six colours."""
    main = tuple(
        (1 - _GREY_SHARE) * value + _GREY_SHARE * _GREY_LEVEL for value in SPRITE_RGB[colour]
    )
    return main, tuple(_DARK * value for value in main)


def _between(rng: RandomSource, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def sample_scene(rng: RandomSource, held_out: bool = False) -> Scene:
    """Draw a scene.

    ``rng`` is a ``random.Random`` or a numpy ``Generator``. Without ``held_out`` the sprite is
    never one of ``HELD_OUT_PAIRS``; with it, always. Sprite and background differ in colour.
    """
    if held_out:
        colour, shape = choose(rng, HELD_OUT_PAIRS)
    else:
        shape = choose(rng, SHAPES)
        colour = choose(rng, [c for c in COLOURS if (c, shape) not in HELD_OUT_PAIRS])
    direction = choose(rng, DIRECTIONS)
    speed = choose(rng, SPEEDS)
    if direction == "still":
        speed = "slow"
    change = choose(rng, CHANGES, (0.5, 0.25, 0.25))
    if shape == "circle" and change == "turn":
        change = "none"  # a circle's turning cannot be seen
    growth = GROWTH if change == "grow" else 1.0
    turn = (TURN if rng.random() < 0.5 else -TURN) if change == "turn" else 0.0
    largest = _between(rng, *SIZE_RANGE)
    angle = 0.0 if shape == "circle" else _between(rng, -TILT, TILT)

    pattern = choose(rng, PATTERNS)
    background_colour = choose(rng, [c for c in COLOURS if c != colour])
    period, phase, orientation = 0.0, (0.0, 0.0), 0.0
    quarter = math.pi / 4
    if pattern == "stripes":
        period = _between(rng, 0.22, 0.34)
        phase = (float(rng.random()), 0.0)
        orientation = choose(rng, range(4)) * quarter
    elif pattern == "checker":
        period = _between(rng, 0.30, 0.44)
        phase = (float(rng.random()), float(rng.random()))
    elif pattern == "gradient":
        orientation = choose(rng, range(8)) * quarter

    draft = Scene(
        shape=shape,
        colour=colour,
        direction=direction,
        speed=speed,
        change=change,
        size=largest / growth,
        growth=growth,
        angle=angle,
        turn=turn,
        start=(0.0, 0.0),
        pattern=pattern,
        background_colour=background_colour,
        period=period,
        phase=phase,
        orientation=orientation,
        caption=int(rng.random() * 2**31),
    )
    return placed(draft, largest * CIRCUMRADIUS[shape], rng)


def placed(scene: Scene, reach: float, rng: RandomSource) -> Scene:
    """The scene with a drawn start from which a sprite of this radius stays inside the frame."""
    reach += _MARGIN
    # Inside at both ends of the way means inside throughout: it is straight.
    x, y = (
        _between(rng, reach + max(-step, 0.0), 1.0 - reach - max(step, 0.0))
        for step in scene.travel
    )
    return replace(scene, start=(x, y))


def scene_at(seed: int, index: int, held_out: bool = False) -> Scene:
    """Return scene ``index`` of the endless set ``seed``: the same whatever was drawn before."""
    return sample_scene(random.Random(f"sprite world {seed} {index} {held_out}"), held_out)


@dataclass(frozen=True)
class RenderedBatch:
    """Layers of B rendered clips, floats 0..1, with what is known about the sprites.

    foreground, background, blended: [B, F, 3, H, W], colour straight (not premultiplied).
    alpha: [B, F, 1, H, W]. boxes: [B, F, 4] as (x0, y0, x1, y1) in fractions of width and height.
    foreground and background may be expanded views: clone before writing.
    """

    foreground: torch.Tensor
    alpha: torch.Tensor
    background: torch.Tensor
    blended: torch.Tensor
    boxes: torch.Tensor
    scenes: tuple[Scene, ...]
    pose: _Pose = field(repr=False)

    @cached_property
    def masks(self) -> torch.Tensor:
        """Sprite pixels, bool [B, F, H, W]: alpha above one half."""
        return self.alpha[:, :, 0] > 0.5

    @cached_property
    def flow(self) -> torch.Tensor:
        """Optical flow [B, F-1, 2, H, W], (x, y) pixels from each frame to the next.

        Exact at sprite pixels (motion, growth and turn); zero at the static background.
        """
        pose = self.pose
        height, width = self.alpha.shape[-2:]
        xs, ys = _pixel_centres(height, width, self.alpha.device)
        now, after = slice(None, -1), slice(1, None)
        scale = pose.size[:, after] / pose.size[:, now]
        turn = pose.angle[:, after] - pose.angle[:, now]
        a, b = _cell(scale * torch.cos(turn)), _cell(scale * torch.sin(turn))
        dx, dy = xs - _cell(pose.x[:, now]), ys - _cell(pose.y[:, now])
        flow_x = a * dx - b * dy + _cell(pose.x[:, after]) - xs
        flow_y = b * dx + a * dy + _cell(pose.y[:, after]) - ys
        return torch.stack((flow_x, flow_y), 2) * self.masks[:, now, None]


@dataclass(frozen=True)
class _Pose:
    """Centre (pixels), circumradius (pixels) and tilt (radians) of each sprite, each [B, F]."""

    x: torch.Tensor
    y: torch.Tensor
    size: torch.Tensor
    angle: torch.Tensor


def _cell(values: torch.Tensor) -> torch.Tensor:
    return values[..., None, None]


def _where(scenes: Sequence[Scene], name: str, value: str, device) -> torch.Tensor | None:
    rows = [i for i, scene in enumerate(scenes) if getattr(scene, name) == value]
    return torch.tensor(rows, device=device) if rows else None


def _pixel_centres(
    height: int, width: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    xs = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    ys = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    return xs[None, :], ys[:, None]


def _pose(scenes: Sequence[Scene], frames: int, height: int, width: int, device) -> _Pose:
    side = min(height, width)
    table = torch.tensor(
        [
            (
                scene.start[0] * width,
                scene.start[1] * height,
                scene.travel[0] * side,
                scene.travel[1] * side,
                scene.size * CIRCUMRADIUS[scene.shape] * side,
                scene.growth - 1.0,
                scene.angle,
                scene.turn,
            )
            for scene in scenes
        ],
        device=device,
        dtype=torch.float32,
    )
    x, y, dx, dy, size, growth, angle, turn = table.T[:, :, None]
    time = torch.linspace(0.0, 1.0, frames, device=device)[None]
    back = torch.tensor([scene.returns for scene in scenes], device=device)[:, None]
    way = torch.where(back, 1 - (2 * time - 1).abs(), time)
    return _Pose(x + dx * way, y + dy * way, size * (1 + growth * time), angle + turn * time)


def shape_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius) -> torch.Tensor:
    """Signed distance (negative inside) to a shape of circumradius ``radius`` at the origin.

    x points right and y down; triangle and star point up. Exact along edges; beyond a corner it
    is the distance to the nearer edge's line, which keeps corners sharp.
    """
    if shape == "circle":
        return torch.sqrt(x * x + y * y) - radius
    x = x.abs()
    if shape == "square":
        return torch.maximum(x, y.abs()) - radius * math.sqrt(0.5)
    if shape == "triangle":
        return torch.maximum(y, x * math.cos(math.pi / 6) - y * 0.5) - radius * 0.5
    # Fold the plane twice into the wedge between an outer and an inner corner: one edge is left.
    y = -y
    nx, ny = math.cos(math.pi / 5), -math.sin(math.pi / 5)
    for _ in range(2):
        beyond = 2 * (x * nx + y * ny).clamp_(min=0)
        x = (x - beyond * nx).abs_()
        y = y - beyond * ny
    edge_x = STAR_INNER * math.sin(math.pi / 5)
    edge_y = STAR_INNER * math.cos(math.pi / 5) - 1
    length = math.hypot(edge_x, edge_y)
    return (x * -edge_y + (y - radius) * edge_x) / length


def _alpha(scenes: Sequence[Scene], pose: _Pose, xs, ys) -> torch.Tensor:
    frames = pose.x.shape[1]
    alpha = torch.empty(len(scenes), frames, 1, ys.shape[0], xs.shape[1], device=xs.device)
    for shape in SHAPES:
        rows = _where(scenes, "shape", shape, xs.device)
        if rows is None:
            continue
        dx, dy = xs - _cell(pose.x[rows]), ys - _cell(pose.y[rows])
        cos, sin = _cell(torch.cos(pose.angle[rows])), _cell(torch.sin(pose.angle[rows]))
        x, y = dx * cos + dy * sin, dy * cos - dx * sin
        distance = shape_distance(shape, x, y, _cell(pose.size[rows]))
        alpha[rows, :, 0] = (0.5 - distance).clamp_(0, 1)
    return alpha


def wave(position: torch.Tensor, period_pixels) -> torch.Tensor:
    """Antialiased square wave 0..1 of ``position`` in periods; 1 near whole numbers."""
    offset = (position - torch.floor(position) - 0.5).abs_()
    return ((offset - 0.25) * period_pixels + 0.5).clamp_(0, 1)


def _backgrounds(scenes: Sequence[Scene], height: int, width: int, xs, ys) -> torch.Tensor:
    side = min(height, width)
    tones = torch.tensor([background_tones(s.background_colour) for s in scenes], device=xs.device)
    table = torch.tensor(
        [
            (math.cos(s.orientation), math.sin(s.orientation), s.period * side, *s.phase)
            for s in scenes
        ],
        device=xs.device,
    )
    share = torch.ones(len(scenes), height, width, device=xs.device)
    for pattern in PATTERNS[1:]:
        rows = _where(scenes, "pattern", pattern, xs.device)
        if rows is None:
            continue
        cos, sin, period, phase, phase_across = table[rows].T[:, :, None, None]
        if pattern == "gradient":
            along = (xs / width - 0.5) * cos + (ys / height - 0.5) * sin
            share[rows] = 0.5 + along / (cos.abs() + sin.abs())
            continue
        stripes = wave((xs * cos + ys * sin) / period + phase, period)
        if pattern == "checker":
            across = wave((ys * cos - xs * sin) / period + phase_across, period)
            stripes = stripes * across + (1 - stripes) * (1 - across)
        share[rows] = stripes
    main, dark = tones[:, 0, :, None, None], tones[:, 1, :, None, None]
    return dark + (main - dark) * share[:, None]


def _boxes(scenes: Sequence[Scene], pose: _Pose, height: int, width: int) -> torch.Tensor:
    boxes = torch.empty(*pose.x.shape, 4, device=pose.x.device)
    for shape in SHAPES:
        rows = _where(scenes, "shape", shape, pose.x.device)
        if rows is None:
            continue
        x, y, size = pose.x[rows], pose.y[rows], pose.size[rows]
        if shape == "circle":
            sides = (x - size, y - size, x + size, y + size)
        else:
            # First corner and number of corners, in turns clockwise from straight up.
            first, count = {"square": (0.125, 4), "triangle": (0.0, 3), "star": (0.0, 5)}[shape]
            steps = first + torch.arange(count, device=x.device) / count
            corner = pose.angle[rows][..., None] + 2 * math.pi * steps
            corner_x = x[..., None] + torch.sin(corner) * size[..., None]
            corner_y = y[..., None] - torch.cos(corner) * size[..., None]
            sides = (corner_x.amin(-1), corner_y.amin(-1), corner_x.amax(-1), corner_y.amax(-1))
        boxes[rows] = torch.stack(sides, -1)
    return boxes / torch.tensor([width, height, width, height], device=boxes.device)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    frames: int = 8,
    size: tuple[int, int] = (96, 96),
    device: torch.device | str | None = None,
) -> RenderedBatch:
    """Render scenes to layers of ``frames`` frames of ``size`` (height, width) pixels."""
    height, width = size
    xs, ys = _pixel_centres(height, width, device)
    pose = _pose(scenes, frames, height, width, device)
    alpha = _alpha(scenes, pose, xs, ys)
    colours = torch.tensor([SPRITE_RGB[scene.colour] for scene in scenes], device=device)
    shape = (len(scenes), frames, 3, height, width)
    foreground = colours[:, None, :, None, None].expand(shape)
    background = _backgrounds(scenes, height, width, xs, ys)[:, None].expand(shape)
    blended = background + alpha * (foreground - background)
    boxes = _boxes(scenes, pose, height, width)
    return RenderedBatch(foreground, alpha, background, blended, boxes, tuple(scenes), pose)
