"""Sprite world for paths: one or two sprites that go any way and change size, and their boxes.

Boxes are exact. Captions may name the sprites or leave that to their pictures; where they go is in
the boxes alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..conditioning.box_paths import box_at
from ..conditioning.boxes import SMOOTH, Key, Track
from .moving_world import LARGER
from .sprite_prompts import COLOURS, SHAPES, RandomSource, background_phrases, choose
from .sprite_world import CIRCUMRADIUS, HELD_OUT_PAIRS, SPRITE_RGB, Scene, render, sample_scene

# Words of a prompt.
TOKENS = 16
# Places a way goes through, and how much larger or smaller than usual a sprite is at each.
STOPS = (2, 3, 4)
SIZES = (0.75, 1.2)
# Of two sprites each is smaller: they share the frame, and may pass before one another.
PAIR_SIZES = (0.65, 0.95)
_MARGIN = 0.012
_VERBS = ("moving", "going", "gliding", "drifting")
_OVER = ("over", "on", "in front of")
_OVER_WEIGHTS = (0.7, 0.15, 0.15)


@dataclass(frozen=True)
class Actor:
    """A sprite's looks, which stand still, and its way: a track of (x, y, size, size).

    x and y are the sprite's middle in shares of width and height, size its circumradius over
    ``CIRCUMRADIUS``, as in ``Scene``.
    """

    looks: Scene
    way: Track

    def at(self, frame: int) -> Scene:
        """The sprite at a frame as a scene that stands still."""
        x, y, size, _ = box_at(self.way, frame)
        return replace(self.looks, start=(x, y), size=size)


@dataclass(frozen=True)
class TrajectoryScene:
    """A clip of so many frames: actors over the first one's background, earlier ones in front."""

    actors: tuple[Actor, ...]
    frames: int


def trajectory_scene(
    rng: RandomSource, frames: int, held_out: bool = False, count: int = 1
) -> TrajectoryScene:
    """Draw a clip of one or two sprites.

    Without ``held_out`` no sprite is one of ``HELD_OUT_PAIRS``, with it all are. Colours of sprites
    and background differ.
    """
    while True:
        base = _still(sample_scene(rng, held_out))
        used, looks = {base.colour, base.background_colour}, [base]
        for _ in range(count - 1):
            pairs = [
                (colour, shape)
                for colour in COLOURS
                for shape in SHAPES
                if colour not in used and ((colour, shape) in HELD_OUT_PAIRS) == held_out
            ]
            if pairs:
                colour, shape = choose(rng, pairs)
                used.add(colour)
                looks.append(replace(base, colour=colour, shape=shape))
        if len(looks) == count:
            break
    sizes = SIZES if count == 1 else PAIR_SIZES
    actors = tuple(Actor(each, _way(each, rng, frames, sizes)) for each in looks)
    return TrajectoryScene(actors, frames)


def trajectory_scene_at(
    seed: int, index: int, frames: int, held_out: bool = False, count: int = 1
) -> TrajectoryScene:
    """Clip ``index`` of the endless set ``seed``: the same whatever was drawn before."""
    rng = random.Random(f"trajectory world {seed} {index} {held_out} {count}")
    return trajectory_scene(rng, frames, held_out, count)


def _still(scene: Scene) -> Scene:
    size = LARGER * scene.size * scene.growth
    return replace(
        scene,
        size=size,
        direction="still",
        path=0.0,
        change="none",
        growth=1.0,
        turn=0.0,
        returns=False,
    )


def _way(looks: Scene, rng: RandomSource, frames: int, sizes: tuple[float, float]) -> Track:
    """A smooth way through a few places that keeps the sprite inside the frame."""
    stops = min(choose(rng, STOPS), frames)
    low, high = (looks.size * share for share in sizes)
    drawn = [low + (high - low) * float(rng.random()) for _ in range(stops)]
    # Place and size go by curves of their own: there is room for the largest all the way.
    reach = max(drawn) * CIRCUMRADIUS[looks.shape] + _MARGIN
    keys = []
    for stop, size in enumerate(drawn):
        frame = round(stop * (frames - 1) / max(1, stops - 1))
        x, y = (reach + (1 - 2 * reach) * float(rng.random()) for _ in range(2))
        keys.append(Key(frame, x, y, size, size, SMOOTH))
    return Track("a", tuple(keys))


def caption(scene: TrajectoryScene, rng: RandomSource, named: bool) -> str:
    """What a person may write; ``named`` says what the sprites are. At most ``TOKENS`` words."""
    subjects = [
        f"a {actor.looks.colour} {actor.looks.shape}" if named else "a sprite"
        for actor in scene.actors
    ]
    text = " and ".join(subjects)
    if rng.random() < 0.5:
        text += f" {choose(rng, _VERBS)}"
    first = scene.actors[0].looks
    phrases = background_phrases(first.pattern, first.background_colour)
    where = phrases[0] if len(subjects) > 1 or rng.random() < 0.5 else choose(rng, phrases)
    return f"{text} {choose(rng, _OVER, _OVER_WEIGHTS)} {where}"


def plain_caption(scene: TrajectoryScene) -> str:
    """The background in the plainest words, the sprites left to their pictures."""
    first = scene.actors[0].looks
    subjects = " and ".join(["a sprite"] * len(scene.actors))
    return f"{subjects} moving over {background_phrases(first.pattern, first.background_colour)[0]}"


@dataclass(frozen=True)
class RenderedTrajectories:
    """Rendered clips with what is known of their S sprites.

    clips: floats [B, F, 3, H, W] in 0..1. behind: the background alone, [B, 3, H, W]. alphas:
    [B, S, F, H, W], each sprite as if nothing were before it.
    """

    clips: torch.Tensor
    behind: torch.Tensor
    alphas: torch.Tensor

    @property
    def seen(self) -> torch.Tensor:
        """Alphas [B, S, F, H, W] less what stands before them."""
        before = torch.cumprod(1 - self.alphas, dim=1)
        return self.alphas * torch.cat([torch.ones_like(before[:, :1]), before[:, :-1]], dim=1)


def render_trajectories(
    scenes: Sequence[TrajectoryScene], size: tuple[int, int]
) -> RenderedTrajectories:
    """Clips at (height, width), all of as many frames and sprites."""
    batch, count, frames = len(scenes), len(scenes[0].actors), scenes[0].frames
    stills = [a.at(f) for scene in scenes for a in scene.actors for f in range(frames)]
    alphas = render(stills, 1, size).alpha.reshape(batch, count, frames, *size)
    behind = render([scene.actors[0].looks for scene in scenes], 1, size).background[:, 0]
    clips = behind[:, None].repeat(1, frames, 1, 1, 1)
    for number in reversed(range(count)):
        colours = torch.tensor([SPRITE_RGB[s.actors[number].looks.colour] for s in scenes])
        alpha = alphas[:, number, :, None]
        clips = torch.lerp(clips, colours[:, None, :, None, None].expand_as(clips), alpha)
    return RenderedTrajectories(clips, behind, alphas)


def sprite_boxes(scenes: Sequence[TrajectoryScene]) -> torch.Tensor:
    """Exact boxes [B, S, F, 4] as (x0, y0, x1, y1) in shares of a square frame."""
    batch, count, frames = len(scenes), len(scenes[0].actors), scenes[0].frames
    stills = [a.at(f) for scene in scenes for a in scene.actors for f in range(frames)]
    # Boxes come from the sprites' poses: the number of pixels does not matter.
    return render(stills, 1, (1, 1)).boxes.reshape(batch, count, frames, 4)


def scene_paths(boxes: torch.Tensor) -> tuple[Track, ...]:
    """Tracks, a key frame a frame, of one clip's boxes [S, F, 4]."""
    return tuple(
        Track(
            "abcdefgh"[number],
            tuple(
                Key(frame, x0, y0, x1 - x0, y1 - y0)
                for frame, (x0, y0, x1, y1) in enumerate(one.double().tolist())
            ),
        )
        for number, one in enumerate(boxes)
    )


def portraits(scenes: Sequence[TrajectoryScene], frame: int, size: tuple[int, int]):
    """Pictures uint8 [B, S, H, W, 3] of the sprites at a frame, and their masks [B, S, H, W].

    A sprite's picture shows its colour everywhere: the mask alone is its outline.
    """
    stills = [actor.at(frame) for scene in scenes for actor in scene.actors]
    made = render(stills, 1, size)
    shape = (len(scenes), -1, *size)
    colours = (made.foreground[:, 0].movedim(1, -1) * 255).round().to(torch.uint8)
    return colours.reshape(*shape, 3).numpy(), made.alpha.reshape(shape).numpy()
