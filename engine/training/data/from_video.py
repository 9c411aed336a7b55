"""Makes a layered sample of a video and a mask: what the mask covers, and what lies behind it.

The background behind the mask is an approximation: the median over time of what was seen at that
place in other frames, and where nothing ever was, colours spread in from around.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import LayerLoomError
from ...media import Clip, encode_webm, read_clip, require_vp9
from ...staging import StagedFolder
from .captions import FILE, read_captions
from .probes import NEARLY

MOST_FRAMES = 128
# A mask ends before the traces of its object do (soft edges, compression): the share of the
# shorter side by which what counts as hidden is grown.
_GROWN = 1 / 160
_ROWS = 16
# Sorts behind every colour.
_BEHIND = np.int16(256)
# Levels, of 255, by which a seen background may change until a note says that the fill is poor.
_RESTLESS = 6.0
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VideoLayers:
    """The layers uint8 of a video: foreground (straight), background [F, H, W, 3], alpha [F, H, W].

    hidden: share of all pixels that were filled. unseen: share of the frame's pixels that no
    frame shows, spread in from around. change: levels by which the seen background differs from
    its median. psnr: dB between the video and the layers laid over each other again.
    """

    foreground: np.ndarray
    alpha: np.ndarray
    background: np.ndarray
    hidden: float
    unseen: float
    change: float
    psnr: float

    def notes(self) -> list[str]:
        """What a person should know about the sample."""
        behind = (
            "filled with the median over time of what was seen there"
            if len(self.alpha) > 1
            else "filled"
        )
        notes = [
            f"The background is an approximation: {self.hidden:.1%} of its pixels were behind the "
            f"mask and are {behind}; {self.unseen:.1%} of the frame was never seen and is spread "
            "in from around.",
            "At soft edges the foreground's colours are what is left of the video's after the "
            "filled background.",
            f"Laid over each other again the layers match the video at {self.psnr:.1f} dB.",
        ]
        if self.change > _RESTLESS:
            notes.append(
                f"What is seen of the background changes by {self.change:.0f} of 255 levels on "
                "average; the fill suits a camera and a scene that stand still."
            )
        return notes


def split_video(
    frames: np.ndarray, alpha: np.ndarray, progress: Progress | None = None
) -> VideoLayers:
    """Take a video uint8 [F, H, W, 3] apart along a matte uint8 [F, H, W].

    Raises:
        LayerLoomError: the matte covers all or nothing.
    """
    if alpha.max() <= NEARLY:
        raise LayerLoomError(
            "The mask is black everywhere; give one that is white where the foreground is."
        )
    hidden = _grown(alpha > NEARLY)
    if hidden.all():
        raise LayerLoomError(
            "The mask covers the whole picture in every frame; give one that is black where the "
            "background is seen."
        )
    still, never, change = _still_background(frames, hidden, progress)
    # What a frame shows of its own background stays as it is.
    background = np.where(hidden[..., None], still, frames)
    foreground, error = np.empty_like(frames), 0.0
    for index in range(len(frames)):
        foreground[index] = straight_colour(frames[index], alpha[index], background[index])
        weight = alpha[index][..., None].astype(np.float32) / 255
        again = weight * foreground[index] + (1 - weight) * background[index]
        error += float(np.square(np.rint(again) - frames[index]).mean())
        if progress:
            progress("Unmixing", index + 1, len(frames))
    mean = max(error / len(frames), 1e-4)
    return VideoLayers(
        foreground=foreground,
        alpha=alpha,
        background=background,
        hidden=float(hidden.mean()),
        unseen=float(never.mean()),
        change=change,
        psnr=float(10 * np.log10(255**2 / mean)),
    )


def straight_colour(picture: np.ndarray, alpha: np.ndarray, background: np.ndarray) -> np.ndarray:
    """The foreground's own colour uint8 [H, W, 3] in ``picture = a * colour + (1 - a) * below``.

    Where the matte is too thin to tell, and where it is empty, the neighbourhood's colour.
    """
    import torch

    from ...conditioning.layers import unpremultiply

    weight = torch.from_numpy(alpha.copy()).float()[None] / 255
    seen, below = (
        torch.from_numpy(clip.copy()).float().movedim(-1, 0) / 255 for clip in (picture, background)
    )
    share = (seen - (1 - weight) * below).clamp(min=0).minimum(weight)
    # ``unpremultiply`` speaks of colours in [-1, 1], where a share s of weight a is 2 s - a.
    straight = (unpremultiply(2 * share - weight, weight) + 1) / 2
    return (straight * 255).round().clamp(0, 255).byte().movedim(0, -1).numpy()


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask bool [F, H, W] with a margin around it."""
    import torch

    reach = max(1, round(min(mask.shape[1:]) * _GROWN))
    grown = [
        torch.nn.functional.max_pool2d(
            torch.from_numpy(frame).float()[None], 2 * reach + 1, stride=1, padding=reach
        )[0]
        for frame in mask
    ]
    return torch.stack(grown).numpy() > 0


def _still_background(
    frames: np.ndarray, hidden: np.ndarray, progress: Progress | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The median of what is seen [H, W, 3], where nothing is [H, W], and how far frames differ."""
    height = frames.shape[1]
    still = np.zeros(frames.shape[1:], np.float32)
    distance, seen_pixels = 0.0, 0
    for top in range(0, height, _ROWS):
        rows = slice(top, min(height, top + _ROWS))
        seen = ~hidden[:, rows]
        values = np.where(seen[..., None], frames[:, rows].astype(np.int16), _BEHIND)
        ordered, count = np.sort(values, axis=0), seen.sum(0)
        low, high = (
            np.take_along_axis(ordered, np.clip(middle, 0, None)[None, ..., None], 0)[0]
            for middle in ((count - 1) // 2, np.minimum(count // 2, len(frames) - 1))
        )
        still[rows] = np.where(count[..., None] > 0, (low + high) / 2, 0)
        distance += float((np.abs(values - still[rows]) * seen[..., None]).sum())
        seen_pixels += int(seen.sum()) * 3
        if progress:
            progress("Looking behind the mask", rows.stop, height)
    never = hidden.all(0)
    filled = np.rint(_spread(still, ~never)).astype(np.uint8)
    return filled, never, distance / max(1, seen_pixels)


def _spread(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The picture float [H, W, 3] with unknown pixels filled smoothly from around.

    Averages of known pixels on ever coarser grids, the finest that knows something used (the
    push-pull of Gortler et al., "The Lumigraph", 1996, section 3.4).
    """
    import torch
    from torch.nn.functional import avg_pool2d, interpolate

    def fill(colour: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if bool((weight > 0).all()):
            return colour
        share = avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
        sums = avg_pool2d(colour * weight, 2, ceil_mode=True, count_include_pad=False)
        coarse = fill(sums / share.clamp(min=1e-6), (share > 0).float())
        smooth = interpolate(coarse, colour.shape[-2:], mode="bilinear", align_corners=False)
        return torch.where(weight > 0, colour, smooth)

    colour = torch.from_numpy(picture).movedim(-1, 0)[None]
    weight = torch.from_numpy(known).float()[None, None]
    return fill(colour, weight)[0].movedim(0, -1).numpy()


@dataclass(frozen=True)
class VideoJob:
    """`layerloom data from-video`: its options by the same names.

    video, mask: any clip, the mask also a single picture for all frames, white is foreground.
    out: the data folder. name: the sample's; default: the file's. frames: at most so many are
    read. foreground, background, blended: what the layers show, for captions.jsonl.
    """

    video: Path
    mask: Path
    out: Path
    name: str | None = None
    frames: int = MOST_FRAMES
    foreground: str | None = None
    background: str | None = None
    blended: str | None = None

    def check(self) -> None:
        """Raise LayerLoomError for what shows before a file is read."""
        if self.frames < 1:
            raise LayerLoomError(f"--frames is {self.frames}; at least 1 is needed.")
        if self.name is not None and (not self.name.strip() or set(self.name) & set('/\\:*?"<>|')):
            raise LayerLoomError(f"--name {self.name!r} is no name for a folder; use letters.")
        for option in ("foreground", "background", "blended"):
            text = getattr(self, option)
            if text is not None and not text.strip():
                raise LayerLoomError(f"--{option} is empty; say in words what the layer shows.")
        if (self.foreground is None) != (self.background is None):
            missing = "background" if self.background is None else "foreground"
            raise LayerLoomError(
                f"--{missing} is missing; a caption needs both layers' texts, or give neither."
            )
        if self.blended is not None and self.foreground is None:
            raise LayerLoomError("--blended needs --foreground and --background; add them.")

    def run(self, progress: Progress | None = None) -> list[str]:
        """Write the sample, all of it or nothing; returns lines for a person.

        Raises:
            LayerLoomError: a clip cannot be read, mask and video do not fit, the sample is there
                already, or the disk is full.
        """
        require_vp9()
        video, alpha = self._read()
        kind = "images" if len(alpha) == 1 else "clips"
        name = self.name or self.video.stem
        sample = f"{kind}/{name}"
        if (self.out / sample).exists():
            raise LayerLoomError(f"{self.out / sample} exists; choose another --name.")
        written, _ = read_captions(self.out)
        taken = next((key for key in (sample, name) if key in written), None)
        if self.foreground is not None and taken:
            raise LayerLoomError(
                f"{self.out / FILE} has a line for {taken} already; remove it or choose another "
                "--name."
            )
        frames = video.over((0, 0, 0))
        # Of both folders the inner one is put in place first: a caption never lacks its sample.
        with StagedFolder(self.out) as lines, StagedFolder(self.out / sample) as staged:
            layers = split_video(frames, alpha, progress)
            self._write(staged, layers, frames, video.fps)
            if self.foreground is not None:
                lines.path(FILE).write_bytes(self._captions(sample))
        height, width = alpha.shape[1:]
        size = (
            f"{len(alpha)} frames of {width}x{height}" if kind == "clips" else f"{width}x{height}"
        )
        told = [f"Wrote {self.out / sample}: {size}.", *layers.notes()]
        if video.truncated:
            told.append(f"Only the first {len(alpha)} frames were used; --frames takes more.")
        if self.foreground is None:
            told.append(f'Add a line with "sample": "{sample}" to {self.out / FILE}.')
        return told

    def _read(self) -> tuple[Clip, np.ndarray]:
        video = read_clip(self.video, "video", min_frames=1, max_frames=self.frames)
        mask = read_clip(self.mask, "mask", min_frames=1, max_frames=self.frames)
        (count, *size), (masks, *mask_size) = video.frames.shape[:3], mask.frames.shape[:3]
        if mask_size != size:
            raise LayerLoomError(
                f"The mask {self.mask} is {mask_size[1]}x{mask_size[0]} and the video "
                f"{size[1]}x{size[0]}; give a mask of the video's size."
            )
        alpha = mask.as_alpha()
        if masks == 1 and not mask.truncated:
            return video, np.repeat(alpha, count, axis=0)
        if masks != count or mask.truncated != video.truncated:
            more = "more than " if mask.truncated else ""
            raise LayerLoomError(
                f"The mask {self.mask} has {more}{masks} frames and the video {count}; give a mask "
                "with a frame for each of the video's, or one picture for all."
            )
        return video, alpha

    def _write(
        self, staged: StagedFolder, layers: VideoLayers, frames: np.ndarray, fps: float
    ) -> None:
        rgba = np.concatenate([layers.foreground, layers.alpha[..., None]], axis=-1)
        if len(frames) == 1:
            from PIL import Image

            pictures = {"foreground": rgba, "background": layers.background, "blended": frames}
            for name, clip in pictures.items():
                Image.fromarray(clip[0]).save(staged.path(f"{name}.png"))
            return
        clip = encode_webm(layers.foreground, fps, layers.alpha, lossless=True)
        staged.path("foreground.webm").write_bytes(clip)
        staged.path("background.webm").write_bytes(encode_webm(layers.background, fps))
        staged.path("blended.webm").write_bytes(encode_webm(frames, fps))

    def _captions(self, sample: str) -> bytes:
        """The captions file with a line more."""
        path = self.out / FILE
        before = path.read_bytes() if path.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        entry = {"sample": sample, "foreground": self.foreground, "background": self.background}
        if self.blended is not None:
            entry["blended"] = self.blended
        return before + json.dumps(entry, ensure_ascii=False).encode() + b"\n"
