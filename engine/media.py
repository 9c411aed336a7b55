"""Reads clips a person gives (videos, picture folders, animations) and writes layers as WebM."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import LayerLoomError

if TYPE_CHECKING:
    import av
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# Named formats only: Pillow would otherwise start outside programs for some (EPS).
_PILLOW_FORMATS = ("PNG", "GIF", "WEBP", "JPEG", "BMP", "TIFF")
_DEFAULT_FPS = 8.0
# swscale's default path truncates: one grey level darker on average, up to 7 off.
_SCALE_FLAGS = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# AVColorSpace numbers (libavutil/pixfmt.h) to the names swscale's filter takes.
_MATRICES = {
    1: "bt709",
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
    10: "bt2020",
}
BT709, LIMITED, _FULL = 1, 1, 2
# libvpx decodes the alpha plane that ffmpeg's own VP8 and VP9 decoders leave out.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
Each = Callable[[np.ndarray], np.ndarray]
_ACCEPTED = "a video, a folder of PNGs, or an animated GIF, PNG or WebP"


@dataclass(frozen=True)
class Clip:
    """Frames as a file holds them.

    frames: uint8 [F, H, W, 3], straight (not premultiplied) RGB.
    alpha: uint8 [F, H, W], or None where the clip is opaque everywhere.
    fps: frames a second.
    truncated: the file goes on after the last frame read.
    """

    frames: np.ndarray
    alpha: np.ndarray | None
    fps: float
    truncated: bool = False

    def as_alpha(self) -> np.ndarray:
        """Matte uint8 [F, H, W]: the clip's own transparency if any, else its brightness."""
        if self.alpha is not None:
            return self.alpha
        # Rec. 601 luma, what "greyscale" means for pictures; exact where R = G = B.
        luma = self.frames @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        return np.rint(luma).astype(np.uint8)

    def over(self, colour: tuple[int, int, int]) -> np.ndarray:
        """Frames uint8 [F, H, W, 3] composited over one colour (0..255)."""
        if self.alpha is None:
            return self.frames
        weight = self.alpha[..., None].astype(np.float32) / 255
        backdrop = np.array(colour, dtype=np.float32)
        return np.rint(self.frames * weight + backdrop * (1 - weight)).astype(np.uint8)


def read_clip(
    path: str | Path,
    what: str = "clip",
    *,
    min_frames: int = 2,
    max_frames: int | None = None,
    each: Each | None = None,
) -> Clip:
    """Read any video PyAV opens, a folder of pictures in natural order, or an animation.

    what: how messages name the clip ("background", say).
    min_frames: fewer are an error. max_frames: reading stops there (`Clip.truncated` says so).
    each: given every picture uint8 [H, W, 3 or 4] as it is read; what it returns is kept instead
    (a smaller one, so that long clips fit into memory).
    Errors: LayerLoomError for a path that is missing, empty, not a video, damaged or too short,
    and for a folder without pictures or with pictures of differing size.
    """
    path = Path(path)
    try:
        if path.is_dir():
            clip = _read_folder(path, what, max_frames, each or _same)
        else:
            clip = _read_file(path, what, max_frames, each or _same)
    except OSError as error:
        raise LayerLoomError(
            f"The {what} {path} cannot be read ({error.strerror or error}); give {_ACCEPTED}."
        ) from error
    if len(clip.frames) < min_frames:
        raise LayerLoomError(
            f"The {what} {path} has {_count(len(clip.frames), 'frame')}, but at least {min_frames}"
            f" are needed; give {_ACCEPTED}."
        )
    return clip


def write_webm(
    path: str | Path, frames: np.ndarray, fps: float, alpha: np.ndarray | None = None
) -> None:
    """Write a VP9 WebM file, BT.709 limited range, 4:2:0, visually lossless.

    frames: uint8 [F, H, W, 3], or [F, H, W] for grey. Odd sizes stay as they are.
    alpha: uint8 [F, H, W]; then the file carries an alpha plane (straight, full range).
    Errors: LayerLoomError when this build of PyAV has no VP9 encoder; OSError from writing.
    """
    # Encoded in memory, because the muxer does not report every failed write when it closes.
    Path(path).write_bytes(encode_webm(frames, fps, alpha))


def encode_webm(
    frames: np.ndarray,
    fps: float,
    alpha: np.ndarray | None = None,
    *,
    lossless: bool = False,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[], None] | None = None,
) -> bytes:
    """The bytes `write_webm` writes; same arguments and errors.

    lossless: nothing is lost beyond the 4:2:0 colours: alpha comes back within one level.
    metadata: tags of the file. on_frame: called after each frame; what it raises ends the work.
    """
    import av

    require_vp9()
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=-1)
    height, width = frames.shape[1:3]
    source, target = ("rgb24", "yuv420p") if alpha is None else ("rgba", "yuva420p")
    convert = scale_converter(
        width, height, source, target, "out_color_matrix=bt709:out_range=limited"
    )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream("libvpx-vp9", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, target
        # crf 4 keeps the alpha plane within 8 levels at a hard edge (18 is 27 levels off);
        # auto-alt-ref must be off where there is alpha (libvpx refuses it).
        quality = {"lossless": "1"} if lossless else {"crf": "4", "b": "0"}
        stream.options = {**quality, "cpu-used": "4", "auto-alt-ref": "0"}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for index, picture in enumerate(frames):
            if alpha is not None:
                picture = np.dstack([picture, alpha[index]])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=source)
            frame.pts = index
            frame = convert(frame)
            frame.pts = index
            frame.time_base = 1 / context.framerate
            frame.colorspace, frame.color_range = BT709, LIMITED
            container.mux(stream.encode(frame))
            if on_frame is not None:
                on_frame()
        container.mux(stream.encode())
    return buffer.getvalue()


def require_vp9() -> None:
    """Raise LayerLoomError where this build of PyAV cannot write VP9."""
    import av

    try:
        av.codec.Codec("libvpx-vp9", "w")
    except ValueError as error:
        raise LayerLoomError(
            "This build of PyAV has no VP9 encoder (libvpx-vp9), which the layers are written"
            " with; install the wheel from PyPI with `pip install --force-reinstall av`."
        ) from error


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts frame2.png before frame10.png."""
    pieces = re.findall(r"(\d+)|(\D+)", name)
    return [(0, int(digits), "") if digits else (1, 0, text.lower()) for digits, text in pieces]


def _count(number: int, noun: str) -> str:
    return f"only one {noun}" if number == 1 else f"{number} {noun}s"


def _same(picture: np.ndarray) -> np.ndarray:
    return picture


def _read_folder(path: Path, what: str, max_frames: int | None, each: Each) -> Clip:
    from PIL import Image

    names = [
        entry
        for entry in path.iterdir()
        if entry.suffix.lower() in PICTURE_SUFFIXES and not entry.name.startswith(".")
    ]
    if not names:
        raise LayerLoomError(
            f"The {what} folder {path} has no pictures in it; put one PNG a frame there."
        )
    names.sort(key=lambda entry: natural_key(entry.name))
    pictures: list[np.ndarray] = []
    first: np.ndarray | None = None
    for name in names[:max_frames]:
        try:
            with Image.open(name, formats=_PILLOW_FORMATS) as image:
                picture = _rgba(image)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise LayerLoomError(
                f"The picture {name} of the {what} cannot be read; replace it or remove it."
            ) from error
        first = picture if first is None else first
        if picture.shape != first.shape:
            raise LayerLoomError(
                f"The pictures of the {what} in {path} differ in size: {names[0].name} is"
                f" {_size(first)} and {name.name} is {_size(picture)}; make them all alike."
            )
        pictures.append(each(picture))
    return _clip(pictures, _DEFAULT_FPS, truncated=len(pictures) < len(names))


def _read_file(path: Path, what: str, max_frames: int | None, each: Each) -> Clip:
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise LayerLoomError(f"The {what} {path} does not exist; give {_ACCEPTED}.")
    if not path.is_file():
        raise LayerLoomError(f"The {what} {path} is not a file; give {_ACCEPTED}.")
    if path.stat().st_size == 0:
        raise LayerLoomError(f"The {what} {path} is empty; give {_ACCEPTED}.")
    try:
        image = Image.open(path, formats=_PILLOW_FORMATS)
    except UnidentifiedImageError:
        return _read_video(path, what, max_frames, each)
    except Image.DecompressionBombError as error:
        raise LayerLoomError(f"The {what} {path} is too large; give {_ACCEPTED}.") from error
    with image:
        try:
            return _read_animation(image, max_frames, each)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise LayerLoomError(
                f"The {what} {path} is damaged ({error}); give {_ACCEPTED}."
            ) from error


def _read_animation(image: Image.Image, max_frames: int | None, each: Each) -> Clip:
    total = getattr(image, "n_frames", 1)
    pictures, durations = [], []
    for index in range(total if max_frames is None else min(total, max_frames)):
        image.seek(index)
        pictures.append(each(_rgba(image)))
        duration = float(image.info.get("duration", 0) or 0)
        # Browsers show frames that ask for 10 ms or less for 100 ms.
        durations.append(duration if duration > 10 else 100.0)
    fps = 1000 * len(durations) / sum(durations)
    return _clip(pictures, fps, truncated=len(pictures) < total)


def _rgba(image: Image.Image) -> np.ndarray:
    """Picture uint8 [H, W, 4]; 16-bit grey loses its lower byte instead of clipping."""
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    return np.asarray(image.convert("RGBA"))


def _clip(pictures: list[np.ndarray], fps: float, truncated: bool) -> Clip:
    stack = np.stack(pictures)
    if stack.shape[-1] == 3 or (stack[..., 3] == 255).all():
        return Clip(np.ascontiguousarray(stack[..., :3]), None, fps, truncated)
    return Clip(
        np.ascontiguousarray(stack[..., :3]), np.ascontiguousarray(stack[..., 3]), fps, truncated
    )


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"


def _read_video(path: Path, what: str, max_frames: int | None, each: Each) -> Clip:
    import av

    refusal = f"The {what} {path} is not a video that can be opened; give {_ACCEPTED}."
    try:
        # Only files: a playlist must not make ffmpeg open anything on a network.
        container = av.open(str(path.resolve()), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, ValueError) as error:
        raise LayerLoomError(refusal) from error
    with container:
        # "tty" draws any text file as terminal pictures.
        if not container.streams.video or container.format.name == "tty":
            raise LayerLoomError(refusal)
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise LayerLoomError(
                f"The {what} {path} uses a codec that this build of PyAV does not have;"
                " convert it to H.264 or VP9."
            )
        fps = float(stream.average_rate or stream.guessed_rate or _DEFAULT_FPS)
        pictures: list[np.ndarray] = []
        shape, truncated = None, False
        try:
            for picture in _decode(container, stream):
                if max_frames is not None and len(pictures) == max_frames:
                    truncated = True
                    break
                if shape not in (None, picture.shape):
                    raise LayerLoomError(
                        f"The {what} {path} changes its size after {len(pictures)} frames;"
                        " give one of a single size."
                    )
                shape = picture.shape
                pictures.append(each(picture))
        except (av.FFmpegError, ValueError) as error:
            raise LayerLoomError(
                f"The {what} {path} is damaged after {_count(len(pictures), 'frame')}; {_ACCEPTED}"
                " that plays to the end is needed."
            ) from error
    if not pictures:
        raise LayerLoomError(refusal)
    return _clip(pictures, fps, truncated)


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[np.ndarray]:
    """Pictures uint8 [H, W, 3 or 4] in showing order, upright."""
    import av

    decoder = stream.codec_context
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if tags.get("alpha_mode") == "1" and decoder.name in _ALPHA_DECODERS:
        decoder = av.CodecContext.create(_ALPHA_DECODERS[decoder.name], "r")
    else:
        stream.thread_type = "AUTO"
    layout, convert = None, None
    for packet in container.demux(stream):
        for frame in decoder.decode(packet if packet.size else None):
            if layout != (frame.width, frame.height, frame.format.name):
                layout = (frame.width, frame.height, frame.format.name)
                target = "rgba" if _has_alpha(frame.format) else "rgb24"
                convert = scale_converter(*layout, target, _source_colours(frame))
            # The frame's display matrix, counter-clockwise (a phone held upright: -90).
            turns = round(getattr(frame, "rotation", 0) / 90) % 4
            yield np.ascontiguousarray(np.rot90(convert(frame).to_ndarray(), turns))


def _has_alpha(layout: av.VideoFormat) -> bool:
    return layout.has_palette or any(component.is_alpha for component in layout.components)


def _source_colours(frame: av.VideoFrame) -> str:
    # Unmarked video: players take BT.709 for high definition and BT.601 below it.
    matrix = _MATRICES.get(int(frame.colorspace), "bt709" if frame.height >= 720 else "bt601")
    full = int(frame.color_range) == _FULL or frame.format.name.startswith("yuvj")
    return f"in_color_matrix={matrix}:in_range={'full' if full else 'limited'}"


def scale_converter(
    width: int, height: int, source: str, target: str, colours: str
) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """A function that turns frames of one layout into another, rounding properly.

    Through the `scale` filter: its flags and colour names are the same in every PyAV version,
    which `VideoFrame.reformat` is not.
    """
    import av

    graph = av.filter.Graph()
    nodes = [
        graph.add("buffer", f"video_size={width}x{height}:pix_fmt={source}:time_base=1/1000"),
        graph.add("scale", f"{colours}:flags={_SCALE_FLAGS}"),
        graph.add("format", f"pix_fmts={target}"),
        graph.add("buffersink"),
    ]
    for left, right in zip(nodes, nodes[1:], strict=False):
        left.link_to(right)
    graph.configure()

    # The default argument keeps the graph alive: its filters do not.
    def convert(frame: av.VideoFrame, graph: av.filter.Graph = graph) -> av.VideoFrame:
        nodes[0].push(frame)
        return nodes[-1].pull()

    return convert
