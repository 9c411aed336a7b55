"""Reads what `layerloom trajectory` wrote, or others in the same form, to be measured.

A result is a folder with ``run.json`` (``{"prompt", "fps", "subjects": [{"image", "mask", "boxes":
[[x0, y0, x1, y1], ...]}, ...]}``, boxes in pixels, one a frame) and the clip: ``video.npz`` or
``video.*``. What a detector or tracker found in the clip may be beside it: ``found.json``, for each
subject a list of a box or null a frame; or masks of it, ``found_1.*`` for the first subject.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..conditioning.subjects import WHITE, on_white
from ..errors import LayerLoomError
from ..media import read_clip
from ..subject_pictures import SubjectReader
from .animate import mean_scores
from .subject_clips import Found, SubjectClip

RECORD, ARRAYS, VIDEO, FOUND = "run.json", "video.npz", "video", "found"
# What a clip is shown with if nothing says otherwise: the paper's.
_FPS = 8.0
_SHAPE = "[x0, y0, x1, y1] in pixels, one a frame"


def find_results(folder: Path) -> list[Path]:
    """Folders of results in a folder, itself and those inside of it at any depth, sorted.

    Raises:
        LayerLoomError: there is none.
    """
    found = sorted(path.parent for path in folder.rglob(RECORD)) if folder.is_dir() else []
    if not found:
        raise LayerLoomError(
            f"{folder} holds no results; give a folder in which `layerloom trajectory` wrote "
            f"{RECORD}, or one with many such folders."
        )
    return found


def read_result(folder: Path) -> SubjectClip:
    """One result.

    Raises:
        LayerLoomError: the record, the clip or a subject's picture is missing or not what it
            should be.
    """
    record = _json(folder / RECORD)
    subjects = record.get("subjects") if isinstance(record, Mapping) else None
    prompt = record.get("prompt") if isinstance(record, Mapping) else None
    if not isinstance(subjects, Sequence) or isinstance(subjects, str) or not subjects:
        subjects = None
    if subjects is None or not all(isinstance(s, Mapping) for s in subjects) or not prompt:
        raise LayerLoomError(
            f"{folder / RECORD} is of no clip of subjects along boxes; give results of `layerloom "
            "trajectory`."
        )
    frames, kept = _frames(folder)
    count, height, width = frames.shape[:3]
    boxes = [
        _asked(subject.get("boxes"), count, (height, width), folder / RECORD)
        for subject in subjects
    ]
    if kept is not None and len(kept) == len(subjects):
        pictures = list(kept)
    else:
        pictures = [_picture(subject, (height, width), folder) for subject in subjects]
    fps = record.get("fps", _FPS)
    return SubjectClip(
        frames=frames,
        subjects=[_squared(picture) for picture in pictures],
        boxes=np.stack(boxes),
        prompt=str(prompt),
        fps=float(fps) if _is_number(fps) and fps > 0 else _FPS,
        found=_found(folder, len(subjects), count),
    )


def evaluate_results(
    folder: Path,
    score: Callable[[SubjectClip], Mapping[str, float]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures of all results of a folder, one read after the other; JSON can hold it.

    "clips": how many. "mean": of all that have the measure. "each": by the result's folder.
    """
    places = find_results(folder)
    each: dict[str, dict[str, float]] = {}
    for number, place in enumerate(places, 1):
        name = place.relative_to(folder).as_posix()
        scores = score(read_result(place))
        each[name] = {key: round(float(value), 4) for key, value in scores.items()}
        if progress is not None:
            progress(number, len(places))
    return {"clips": len(places), "mean": mean_scores(list(each.values())), "each": each}


def _frames(folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The clip uint8 [T, H, W, 3], and the subjects [S, h, w, 3] where they are kept with it."""
    arrays = folder / ARRAYS
    if arrays.exists():
        try:
            with np.load(arrays) as stored:
                frames = stored["video"]
                kept = stored["subjects"] if "subjects" in stored else None
        except (OSError, ValueError, KeyError) as error:
            raise LayerLoomError(
                f"{arrays} is damaged or holds no video; make the clip again with --arrays."
            ) from error
        if frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8:
            return frames, kept
        raise LayerLoomError(f"{arrays} holds no frames uint8 [T, H, W, 3]; make the clip again.")
    clips = [path for path in sorted(folder.glob(f"{VIDEO}.*")) if path.suffix != ".json"]
    if not clips and (folder / VIDEO).is_dir():
        clips = [folder / VIDEO]
    if not clips:
        raise LayerLoomError(f"{folder} holds no clip; put {ARRAYS} or {VIDEO}.webm there.")
    return read_clip(clips[0], "clip", min_frames=1).frames, None


def _picture(subject: Mapping[str, Any], size: tuple[int, int], folder: Path) -> np.ndarray:
    """The subject cut out, on white, as the network was shown it."""
    image, mask = (_path(subject.get(name), folder) for name in ("image", "mask"))
    if image is None or not image.exists() or (mask is not None and not mask.exists()):
        missing = mask if image is not None and image.exists() else image
        raise LayerLoomError(
            f"The subject's picture {missing} of {folder / RECORD} is not there; give it back, or "
            "make the clip with --arrays, which keeps it."
        )
    points = [str(point) for point in subject.get("points") or ()]
    read = SubjectReader(None, None, []).read(image, mask, points)
    return on_white(read.image, read.mask, size)


def _path(value: Any, folder: Path) -> Path | None:
    """A path of a record: as it is, or seen from the result's folder."""
    if not isinstance(value, str):
        return None
    path = Path(value)
    return path if path.exists() else folder / path


def _squared(picture: np.ndarray) -> np.ndarray:
    """On a white square: the encoders look at a picture's middle, and would cut wide ones."""
    height, width = picture.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), WHITE, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = picture
    return canvas


def _asked(boxes: Any, count: int, size: tuple[int, int], where: Path) -> np.ndarray:
    """Boxes int64 [T, 4] that were asked for, cut to the frame, each at least a pixel large."""
    listed = isinstance(boxes, Sequence) and not isinstance(boxes, str)
    if not listed or len(boxes) != count or not all(map(_is_box, boxes)):
        raise LayerLoomError(
            f"A subject's boxes in {where} do not fit its clip of {count} frames; give {_SHAPE}."
        )
    made = np.array(boxes, dtype=np.float64).round().astype(np.int64)
    for low, high, side in ((0, 2, size[1]), (1, 3, size[0])):
        made[:, low] = made[:, low].clip(0, side - 1)
        made[:, high] = np.maximum(made[:, high].clip(1, side), made[:, low] + 1)
    return made


def _found(folder: Path, subjects: int, count: int) -> Found | None:
    listed = folder / f"{FOUND}.json"
    if listed.exists():
        boxes = _json(listed)
        fits = isinstance(boxes, Sequence) and len(boxes) == subjects
        if not fits or not all(
            isinstance(track, Sequence)
            and len(track) == count
            and all(box is None or _is_box(box) for box in track)
            for track in boxes
        ):
            raise LayerLoomError(
                f"{listed} does not fit {subjects} subjects in {count} frames; give for each "
                f"subject a list of {_SHAPE}, null where it was not seen."
            )
        return boxes
    stems = {path.stem: path for path in sorted(folder.glob(f"{FOUND}_*"))}
    masks = [stems.get(f"{FOUND}_{number}") for number in range(1, subjects + 1)]
    if not all(masks):
        return None
    return [_seen(file, count) for file in masks]


def _seen(path: Path, count: int) -> list[tuple[float, ...] | None]:
    """Boxes of a clip of masks, None where one is empty."""
    from .trajectory import found_boxes

    masks = read_clip(path, "mask", min_frames=1).as_alpha()
    if len(masks) != count:
        raise LayerLoomError(f"{path} has {len(masks)} frames and the clip {count}; give as many.")
    import torch

    height, width = masks.shape[1:]
    boxes = found_boxes(torch.from_numpy(masks).float() / 255)
    scale = (width, height, width, height)
    return [None if box is None else tuple(np.multiply(box, scale).tolist()) for box in boxes]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LayerLoomError(f"{path} is no JSON that can be read; make it again.") from error


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, Sequence)
        and not isinstance(box, str)
        and len(box) == 4
        and all(map(_is_number, box))
        and box[0] < box[2]
        and box[1] < box[3]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
