"""Strict measures for sprite world clips: analytic template fits that refuse what is garbled.

Clips are numpy arrays or tensors, uint8 0..255 or floats 0..1: colour [F, H, W, 3], alpha
[F, H, W]. Every classifier answers None rather than guess, so a broken layer counts as wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..training.sprite_prompts import COLOURS, SHAPES
from ..training.sprite_world import SPRITE_RGB, shape_distance, wave

Clip = np.ndarray | torch.Tensor

PSNR_CAP = 60.0  # dB; what equal clips score, so that means stay finite

# Shapes: mean and worst overlap over the frames, and the lead over the second-best shape. A
# circle and a square of equal area overlap by 0.83, so 0.85 alone would not separate them.
SHAPE_IOU, SHAPE_WORST_IOU, SHAPE_LEAD = 0.85, 0.75, 0.05
SHAPE_AGREEING_FRAMES = 0.85
HAZE = 0.1  # alpha this close to empty or full counts as such: a haze nobody sees
# Directions: path over the clip in shorter sides (slow sprites travel 0.18), and how far the
# centres may stray from a straight, even path.
STILL_PATH, PATH_STRAY = 0.09, 0.04
SMALLEST_AREA = 0.01  # of the frame; the smallest sprite covers 0.03
SEEN_AREA = 0.1  # of a background, to say anything of it
# Colours: hues are 50 degrees apart or more.
HUE_TOLERANCE, SATURATION, BRIGHTNESS, AGREEING_PIXELS = 25.0, 0.3, 0.12, 0.75
# Backgrounds: explained variance is what sees flipped or missing cells at any contrast.
PLAIN_PSNR, PATTERN_PSNR, PATTERN_EXPLAINED, PATTERN_LEAD = 28.0, 22.0, 0.8, 0.1
TONE_RATIO = (0.2, 0.75)  # dark over main tone; rendered patterns have 0.45
TONE_STRAY = 0.15
GRADIENT_COARSE = 0.92  # variance a gradient explains once noise is averaged out: no kinks
FAINT_RATIO = 0.85  # tones closer than this are not told apart by eye: still plain
_PERIODS = {"stripes": (0.19, 0.37, 19), "checker": (0.27, 0.47, 17)}
_PHASES = {"stripes": 16, "checker": 10}
_COARSE = 32


def as_float(clip: Clip) -> torch.Tensor:
    """Return the clip as a float tensor 0..1 on the CPU."""
    if isinstance(clip, np.ndarray):
        values = torch.from_numpy(clip.astype(np.float32))
        return values if np.issubdtype(clip.dtype, np.floating) else values / 255
    values = clip.detach().cpu().float()
    return values if clip.is_floating_point() else values / 255


def psnr(first: Clip, second: Clip) -> float:
    """Peak signal-to-noise ratio of two clips of one shape, in dB, at most ``PSNR_CAP``."""
    error = float((as_float(first) - as_float(second)).square().mean())
    return min(PSNR_CAP, -10 * math.log10(max(error, 1e-12)))


def alpha_iou(first: Clip, second: Clip) -> float:
    """Intersection over union of two alpha clips cut at one half; 1 where both are empty."""
    a, b = as_float(first) > 0.5, as_float(second) > 0.5
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def recompose(foreground: Clip, alpha: Clip, background: Clip) -> torch.Tensor:
    """Composite straight colour over a background: float 0..1 [F, H, W, 3]."""
    foreground, alpha, background = map(as_float, (foreground, alpha, background))
    return background + alpha[..., None] * (foreground - background)


def _template(shape: str, x, y, poses: torch.Tensor) -> torch.Tensor:
    """Antialiased masks [K, H, W] for poses [K, 4] = centre x, centre y, circumradius, angle."""
    centre_x, centre_y, radius, angle = poses.T[:, :, None, None]
    dx, dy = x - centre_x, y - centre_y
    cos, sin = torch.cos(angle), torch.sin(angle)
    distance = shape_distance(shape, dx * cos + dy * sin, dy * cos - dx * sin, radius)
    return (0.5 - distance).clamp_(0, 1)


# Area over squared circumradius, and the angle after which the shape repeats.
_SHAPE_FACTS = {
    "circle": (math.pi, 0.0),
    "square": (2.0, math.pi / 2),
    "triangle": (0.75 * math.sqrt(3), 2 * math.pi / 3),
    "star": (5 * 0.46 * math.sin(math.pi / 5), 2 * math.pi / 5),
}


def _shape_overlaps(frame: torch.Tensor) -> torch.Tensor:
    """Best soft overlap (sum of minima over sum of maxima) [4] of one alpha [H, W] by shape."""
    height, width = frame.shape
    total = float(frame.sum())
    seen = torch.where(frame > 0.5, frame, 0.0)
    mass = float(seen.sum())
    if mass < SMALLEST_AREA * height * width:
        return torch.zeros(len(SHAPES))
    xs, ys = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    centre_x = float((seen.sum(0) * xs).sum()) / mass
    centre_y = float((seen.sum(1) * ys).sum()) / mass
    # No template reaches farther than this from the centre; mass outside still counts as a miss.
    reach = 1.9 * math.sqrt(mass / 1.3) + 4
    columns = (xs - centre_x).abs() < reach
    rows = (ys - centre_y).abs() < reach
    crop = frame[rows][:, columns]
    x, y = xs[columns][None, :], ys[rows][:, None]

    def overlaps(shape: str, poses: torch.Tensor) -> torch.Tensor:
        masks = _template(shape, x, y, poses)
        common = torch.minimum(masks, crop).sum((1, 2))
        return common / (masks.sum((1, 2)) + total - common)

    best = []
    for shape in SHAPES:
        area, turn = _SHAPE_FACTS[shape]
        radius = math.sqrt(mass / area)
        angles = torch.arange(12) / 12 * turn if turn else torch.zeros(1)
        poses = torch.tensor([[centre_x, centre_y, radius, 0.0]]).repeat(len(angles), 1)
        poses[:, 3] = angles
        scores = overlaps(shape, poses)
        pose, score = poses[scores.argmax()], scores.max()
        steps = torch.tensor([0.5, 0.5, 0.04 * radius, turn / 24])
        axes = torch.eye(4)[: 4 if turn else 3]
        moves = torch.cat((axes, -axes)) * steps
        for _ in range(8):
            poses = pose + moves
            scores = overlaps(shape, poses)
            if scores.max() > score:
                pose, score = poses[scores.argmax()], scores.max()
            else:
                moves = moves / 2
        best.append(score)
    return torch.stack(best)


def classify_shape(alpha: Clip) -> tuple[str | None, float]:
    """Return the sprite's shape and its mean overlap with the best-fitting template.

    Fitted in every frame over place, size and angle. None where the overlap is below
    ``SHAPE_IOU``, a frame falls apart, frames disagree, or another shape fits nearly as well.
    """
    clear = ((as_float(alpha) - HAZE) / (1 - 2 * HAZE)).clamp(0, 1)
    overlaps = torch.stack([_shape_overlaps(frame) for frame in clear])
    mean = overlaps.mean(0)
    order = mean.argsort(descending=True)
    label, score = int(order[0]), float(mean[order[0]])
    agreeing = (overlaps.argmax(1) == label).float().mean()
    right = (
        score >= SHAPE_IOU
        and float(overlaps[:, label].min()) >= SHAPE_WORST_IOU
        and score - float(mean[order[1]]) >= SHAPE_LEAD
        and float(agreeing) >= SHAPE_AGREEING_FRAMES
    )
    return (SHAPES[label] if right else None), score


def classify_direction(alpha: Clip) -> str | None:
    """Return the sprite's direction (nine classes) from the path of its centre of mass.

    None where a frame holds too little of it or the path is neither still nor straight and even.
    """
    alpha = as_float(alpha)
    frames, height, width = alpha.shape
    seen = torch.where(alpha > 0.3, alpha, 0.0)
    mass = seen.sum((1, 2))
    if frames < 2 or float(mass.min()) < SMALLEST_AREA * height * width:
        return None
    x = (seen.sum(1) * (torch.arange(width) + 0.5)).sum(1) / mass
    y = (seen.sum(2) * (torch.arange(height) + 0.5)).sum(1) / mass
    centres = torch.stack((x, y), 1) / min(height, width)
    time = torch.linspace(-0.5, 0.5, frames)[:, None]
    path = (time * centres).sum(0) / time.square().sum()
    stray = (centres - centres.mean(0) - time * path).square().sum(1).mean().sqrt()
    if float(stray) > PATH_STRAY:
        return None
    if float(path.norm()) < STILL_PATH:
        return "still"
    octant = round(math.atan2(float(path[1]), float(path[0])) / (math.pi / 4)) % 8
    names = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
    return names[octant]


def _hue(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hue (degrees), saturation and value (0..1) of colours [..., 3]."""
    red, green, blue = rgb.unbind(-1)
    value, least = rgb.amax(-1), rgb.amin(-1)
    # Hue as the angle in the plane across the grey axis, as in HSI.
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue))
    return hue % 360, (value - least) / value.clamp(min=1e-6), value


def _colour_of(pixels: torch.Tensor) -> str | None:
    """Return the one of six colours that pixels [N, 3] mostly are, or None."""
    if len(pixels) == 0:
        return None
    hue, saturation, value = _hue(pixels)
    centres, _, _ = _hue(torch.tensor([SPRITE_RGB[name] for name in COLOURS]))
    apart = ((hue[:, None] - centres + 180) % 360 - 180).abs()
    near, index = apart.min(1)
    clear = (near <= HUE_TOLERANCE) & (saturation >= SATURATION) & (value >= BRIGHTNESS)
    votes = torch.bincount(index[clear], minlength=len(COLOURS))
    best = int(votes.argmax())
    return COLOURS[best] if int(votes[best]) >= AGREEING_PIXELS * len(pixels) else None


def classify_colour(frames: Clip, alpha: Clip) -> str | None:
    """Return the colour of the pixels [F, H, W, 3] where alpha is above one half.

    None where fewer than three quarters of them are clearly one of the six, or there are too few.
    """
    frames, alpha = as_float(frames), as_float(alpha)
    mask = alpha > 0.5
    if float(mask.float().mean()) < SMALLEST_AREA:
        return None
    return _colour_of(frames[mask])


def _pattern(pattern: str, height: int, width: int, poses: torch.Tensor) -> torch.Tensor:
    """Share of the main tone [K, H*W] for poses [K, 4] = period, phase, phase across, angle."""
    side = min(height, width)
    x = (torch.arange(width) + 0.5)[None, :]
    y = (torch.arange(height) + 0.5)[:, None]
    period, phase, phase_across, angle = poses.T[:, :, None, None]
    cos, sin = torch.cos(angle), torch.sin(angle)
    if pattern == "gradient":
        share = (x / width - 0.5) * cos + (y / height - 0.5) * sin
    else:
        period = period * side
        share = wave((x * cos + y * sin) / period + phase, period)
        if pattern == "checker":
            across = wave((y * cos - x * sin) / period + phase_across, period)
            share = share * across + (1 - share) * (1 - across)
    return share.flatten(1)


def _explained(shares: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Share of the variance of image [P, 3] that two tones mixed by shares [K, P] explain."""
    image = image - image.mean(0)
    shares = shares - shares.mean(1, keepdim=True)
    shares = shares / shares.norm(dim=1, keepdim=True).clamp(min=1e-6)
    return (shares @ image).square().sum(1) / image.square().sum().clamp(min=1e-9)


@lru_cache(maxsize=8)
def _coarse_grid(pattern: str, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses over the whole range of a pattern and their shares, for one small image size."""
    quarter = math.pi / 4
    if pattern == "gradient":
        poses = torch.tensor([[0.0, 0.0, 0.0, i * quarter] for i in range(4)])
    else:
        phases = torch.arange(_PHASES[pattern]) / _PHASES[pattern]
        periods = torch.linspace(*_PERIODS[pattern])
        if pattern == "stripes":
            grid = (periods, phases, torch.zeros(1), torch.arange(4) * quarter)
        else:
            # Half a period on both axes is the same checker: half of one axis is enough.
            grid = (periods, phases, phases[: len(phases) // 2], torch.zeros(1))
        poses = torch.cartesian_prod(*grid)
    return poses, _pattern(pattern, height, width, poses)


@dataclass(frozen=True)
class _Still:
    """A background's mean image [H, W, 3], a small one, and which of their places are seen."""

    image: torch.Tensor
    small: torch.Tensor
    seen: torch.Tensor
    small_seen: torch.Tensor

    @classmethod
    def of(cls, frames: torch.Tensor, seen: torch.Tensor | None) -> _Still:
        """From a clip [F, H, W, 3]; ``seen`` bool [H, W] or None for all."""
        height, width = frames.shape[1:3]
        seen = torch.ones(height, width, dtype=torch.bool) if seen is None else seen
        size = (_COARSE, max(1, round(_COARSE * width / height)))
        image = frames.mean(0)
        both = torch.cat([torch.where(seen[..., None], image, 0.0), seen[..., None].float()], -1)
        small = torch.nn.functional.interpolate(
            both.permute(2, 0, 1)[None], size=size, mode="area"
        )[0].permute(1, 2, 0)
        share = small[..., 3]
        small = small[..., :3] / share.clamp(min=1e-6)[..., None]
        return cls(image, small, seen.flatten(), (share > 0.5).flatten())

    @property
    def pixels(self) -> torch.Tensor:
        """Those that are seen, [P, 3]."""
        return self.image.flatten(0, 1)[self.seen]

    @property
    def small_pixels(self) -> torch.Tensor:
        return self.small.flatten(0, 1)[self.small_seen]


def _fit_pattern(pattern: str, still: _Still) -> torch.Tensor:
    """Return the best-fitting share [H*W] of a pattern."""
    height, width, _ = still.image.shape
    flat, seen = still.pixels, still.seen
    poses, shares = _coarse_grid(pattern, *still.small.shape[:2])
    pose = poses[_explained(shares[:, still.small_seen], still.small_pixels).argmax()]
    score = _explained(_pattern(pattern, height, width, pose[None])[:, seen], flat)[0]
    if pattern != "gradient":
        axes = torch.eye(4)[: 2 if pattern == "stripes" else 3]
        # A longer period about the frame's middle also shifts the phase: try it that way too.
        pairs = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * len(axes))
        moves = pairs @ axes * torch.tensor([0.006, 0.05, 0.05, 0.0])
        for _ in range(6):
            candidates = pose + moves
            scores = _explained(_pattern(pattern, height, width, candidates)[:, seen], flat)
            if scores.max() > score + 1e-6:
                pose, score = candidates[scores.argmax()], scores.max()
            else:
                moves = moves / 2
    return _pattern(pattern, height, width, pose[None])[0]


@dataclass(frozen=True)
class _Fit:
    """How well a pattern reproduces a clip, and what its two tones are like.

    explained: share of the clip's variance. db: PSNR. ratio: dark over main tone. stray: how far
    the dark tone is from being the main one darkened, over the main one. coarse: as explained,
    of the small mean image.
    """

    pattern: str
    explained: float
    db: float
    ratio: float
    stray: float
    coarse: float


def _judge(pattern: str, frames: torch.Tensor, still: _Still) -> _Fit:
    """How ``pattern`` fits; ``frames`` are the seen pixels of each, [F, P, 3]."""
    height, width, _ = still.image.shape
    flat = still.pixels
    whole = _fit_pattern(pattern, still)
    share = whole[still.seen]
    tones = torch.linalg.lstsq(torch.stack((1 - share, share), 1), flat).solution
    # A gradient's tones are those its ends reach, not those at share 0 and 1.
    first, second = (tones[0] + end * (tones[1] - tones[0]) for end in (share.min(), share.max()))
    dark, main = (first, second) if first.sum() < second.sum() else (second, first)
    brightness = main.square().sum().clamp(min=1e-6)
    ratio = (dark * main).sum() / brightness
    stray = (dark - ratio * main).norm() / brightness.sqrt()
    fit = tones[0] + share[:, None] * (tones[1] - tones[0])
    error = (frames - fit).square().mean()
    variance = (frames - flat.mean(0)).square().mean().clamp(min=1e-9)
    db = -10 * math.log10(max(float(error), 1e-12))
    averaged = torch.nn.functional.interpolate(
        whole.view(1, 1, height, width), size=still.small.shape[:2], mode="area"
    )
    coarse = _explained(averaged.view(1, -1)[:, still.small_seen], still.small_pixels)[0]
    explained = float(1 - error / variance)
    return _Fit(pattern, explained, db, float(ratio), float(stray), float(coarse))


def classify_background(
    frames: Clip, seen: torch.Tensor | None = None
) -> tuple[str | None, str | None]:
    """Return (pattern, colour) of a static background clip [F, H, W, 3].

    Each pattern's formula is fitted (place, period, orientation, two tones). A pattern is named
    where its fit reproduces every frame, explains the variance, mixes a tone with its darker
    variant and beats the other patterns; else None. The colour is judged on its own. ``seen``, bool
    [H, W], leaves out what is always hidden; both are None where that is nearly all.
    """
    frames = as_float(frames)
    still = _Still.of(frames, seen)
    if float(still.seen.float().mean()) < SEEN_AREA:
        return None, None
    frames = frames.flatten(1, 2)[:, still.seen]
    colour = _colour_of(frames[:: max(1, len(frames) // 4)].reshape(-1, 3))
    fits = [_judge(pattern, frames, still) for pattern in ("stripes", "checker", "gradient")]
    best, second = sorted(fits, key=lambda fit: -fit.explained)[:2]
    if (
        TONE_RATIO[0] <= best.ratio <= TONE_RATIO[1]
        and best.stray <= TONE_STRAY
        and best.explained >= PATTERN_EXPLAINED
        and best.db >= PATTERN_PSNR
        and (best.pattern != "gradient" or best.coarse >= GRADIENT_COARSE)
    ):
        lead = best.explained - second.explained
        return (best.pattern if lead >= PATTERN_LEAD else None), colour
    even = psnr(frames, still.pixels.mean(0).expand_as(frames)) >= PLAIN_PSNR
    faint = any(fit.explained > 0.5 and fit.ratio < FAINT_RATIO for fit in fits)
    return ("plain" if even and not faint else None), colour
