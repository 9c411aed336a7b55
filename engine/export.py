"""Writes layers as files that other programs open: WebM, ProRes, PNG pictures or WebP."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from .errors import LayerLoomError
from .media import BT709, LIMITED, encode_webm, require_vp9, scale_converter
from .staging import StagedFolder

# VP9 with an alpha plane, ProRes 4444, a folder of PNGs a layer, lossless animated WebP.
FORMATS = ("webm", "mov", "png", "webp")
MIME = {"webm": "video/webm", "mov": "video/quicktime", "png": "image/png", "webp": "image/webp"}
_WEBP_LIMIT = 16383
# EXIF tags that ComfyUI reads a workflow from: Model for the prompt, Make and below for the rest.
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F


def require_format(kind: str, size: tuple[int, int] | None = None) -> None:
    """Raise LayerLoomError where this machine cannot write a format, or not at that size.

    size: height and width in pixels.
    """
    if kind not in FORMATS:
        raise LayerLoomError(f"Unknown format {kind!r}; use one of {', '.join(FORMATS)}.")
    if kind == "webm":
        require_vp9()
    elif kind == "mov":
        _require_prores()
    elif kind == "webp":
        _require_webp(size)


def check_layers(shapes: Mapping[str, tuple[int, int, int]]) -> None:
    """Raise LayerLoomError unless all layers have one number of frames and one size.

    shapes: name -> frames, height, width.
    """
    if not shapes:
        raise LayerLoomError(
            "No layer is connected; connect at least one of foreground, background and blended."
        )
    for what, part in (("number of frames", slice(0, 1)), ("size", slice(1, 3))):
        if len({tuple(shape[part]) for shape in shapes.values()}) > 1:
            listed = ", ".join(
                f"{name} {shape[0] if what != 'size' else f'{shape[2]}x{shape[1]}'}"
                for name, shape in shapes.items()
            )
            raise LayerLoomError(
                f"The layers differ in their {what} ({listed}); give layers of one {what}, such as"
                " all from one Decode Layers node."
            )
    if 0 in next(iter(shapes.values())):
        raise LayerLoomError("The layers are empty; give at least one frame.")


def export_layers(
    folder: str | Path,
    stem: str,
    layers: Mapping[str, np.ndarray],
    kind: str,
    fps: float,
    *,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[], None] | None = None,
    advice: str = "choose another folder",
) -> dict[str, list[Path]]:
    """Write each layer to `<stem>_<layer>.<kind>` in a folder; all appear at once or none.

    layers: foreground, background and blended uint8 [F, H, W, 3], alpha uint8 [F, H, W]. The
    foreground's file carries the alpha as its transparency; the alpha itself is written as grey.
    kind: one of `FORMATS`; "png" makes a folder of numbered pictures a layer.
    fps: frames a second. metadata: texts the files carry (a workflow, say).
    on_frame: called after each written frame; what it raises ends the work without a trace.
    Returns the files of each layer. Errors: LayerLoomError for layers that differ in length or
    size, for a format that cannot be written here, and for a folder that cannot be written to.
    """
    shapes = {name: frames.shape[:3] for name, frames in layers.items()}
    check_layers(shapes)
    require_format(kind, next(iter(shapes.values()))[1:])
    metadata = dict(metadata or {})
    files: dict[str, list[Path]] = {}
    with StagedFolder(folder, advice=advice) as staged:
        for name, frames in layers.items():
            alpha = layers.get("alpha") if name == "foreground" else None
            title = f"{stem}_{name}"
            if kind == "png":
                staged.path(title).mkdir()
                written = _write_pngs(staged.path(title), title, frames, alpha, metadata, on_frame)
                files[name] = [staged.folder / title / picture for picture in written]
                continue
            encode = {"webm": _webm, "mov": encode_prores, "webp": encode_webp}[kind]
            file = f"{title}.{kind}"
            # Encoded in memory, because muxers do not report every failed write.
            staged.path(file).write_bytes(
                encode(frames, fps, alpha, metadata=metadata, on_frame=on_frame)
            )
            files[name] = [staged.folder / file]
    return files


def encode_prores(
    frames: np.ndarray,
    fps: float,
    alpha: np.ndarray | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[], None] | None = None,
) -> bytes:
    """A ProRes 4444 MOV file, 10 bits a colour; straight alpha, back within one level.

    frames: uint8 [F, H, W, 3], or [F, H, W] for grey. alpha: uint8 [F, H, W] or None.
    metadata: tags of the file. on_frame: called after each frame.
    Errors: LayerLoomError when this build of PyAV has no ProRes encoder.
    """
    import av

    _require_prores()
    height, width = frames.shape[1:3]
    source, target = ("rgb24", "yuv444p10le") if alpha is None else ("rgba", "yuva444p10le")
    colours = "out_color_matrix=bt709:out_range=limited"
    convert = scale_converter(width, height, source, target, colours)
    buffer = io.BytesIO()
    # Without the flag the muxer drops tags of names it does not know.
    with av.open(buffer, "w", format="mov", options={"movflags": "use_metadata_tags"}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream("prores_ks", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, target
        # 8 bits of alpha would do, but some programs only read 16.
        stream.options = {
            "profile": "4444",
            "vendor": "apl0",
            "alpha_bits": "0" if alpha is None else "16",
        }
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for index in range(len(frames)):
            frame = av.VideoFrame.from_ndarray(_picture(frames, alpha, index), format=source)
            frame.pts = index
            frame = convert(frame)
            frame.pts, frame.time_base = index, 1 / context.framerate
            frame.colorspace, frame.color_range = BT709, LIMITED
            container.mux(stream.encode(frame))
            if on_frame is not None:
                on_frame()
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_webp(
    frames: np.ndarray,
    fps: float,
    alpha: np.ndarray | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    on_frame: Callable[[], None] | None = None,
) -> bytes:
    """An endless, lossless animated WebP; colours under transparent pixels are kept, too.

    Arguments and errors as for `encode_prores`. The frames are encoded one by one and put
    together here: libwebp's own animation encoder merges equal frames, and a layer that stands
    still would lose its length.
    """
    from PIL import Image

    height, width = frames.shape[1:3]
    _require_webp((height, width))
    chunks = []
    for index in range(len(frames)):
        buffer = io.BytesIO()
        picture = Image.fromarray(_picture(frames, alpha, index))
        picture.save(buffer, "WEBP", lossless=True, exact=True, method=4)
        # Whole milliseconds, rounded so that they add up to the clip's length.
        duration = round((index + 1) * 1000 / fps) - round(index * 1000 / fps)
        place = _u24(0) + _u24(0) + _u24(width - 1) + _u24(height - 1) + _u24(max(1, duration))
        # 2: the frame replaces what is below instead of blending with it.
        chunks.append(_chunk(b"ANMF", place + b"\x02" + _image_chunks(buffer.getvalue())))
        if on_frame is not None:
            on_frame()
    exif = _exif(metadata or {})
    flags = 0x02 | (0x10 if alpha is not None else 0) | (0x08 if exif else 0)
    head = _chunk(b"VP8X", bytes([flags, 0, 0, 0]) + _u24(width - 1) + _u24(height - 1))
    body = b"WEBP" + head + _chunk(b"ANIM", bytes(6)) + b"".join(chunks)
    return _chunk(b"RIFF", body + (_chunk(b"EXIF", exif) if exif else b""))


def _webm(frames: np.ndarray, fps: float, alpha: np.ndarray | None, **options) -> bytes:
    return encode_webm(frames, fps, alpha, lossless=True, **options)


def _write_pngs(
    folder: Path,
    title: str,
    frames: np.ndarray,
    alpha: np.ndarray | None,
    metadata: Mapping[str, str],
    on_frame: Callable[[], None] | None,
) -> list[str]:
    from PIL import Image, PngImagePlugin

    texts = PngImagePlugin.PngInfo()
    for key, text in metadata.items():
        texts.add_text(key, text)
    names = []
    for index in range(len(frames)):
        grey = frames.ndim == 3
        picture = frames[index] if grey else _picture(frames, alpha, index)
        names.append(f"{title}_{index + 1:04}.png")
        Image.fromarray(picture).save(folder / names[-1], pnginfo=texts, compress_level=4)
        if on_frame is not None:
            on_frame()
    return names


def _picture(frames: np.ndarray, alpha: np.ndarray | None, index: int) -> np.ndarray:
    """One picture uint8 [H, W, 3 or 4]."""
    picture = frames[index]
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=-1)
    if alpha is not None:
        picture = np.dstack([picture, alpha[index]])
    return np.ascontiguousarray(picture)


def _require_prores() -> None:
    import av

    try:
        av.codec.Codec("prores_ks", "w")
    except ValueError as error:
        raise LayerLoomError(
            "This build of PyAV has no ProRes encoder (prores_ks); choose another format, or"
            " install the wheel from PyPI with `pip install --force-reinstall av`."
        ) from error


def _require_webp(size: tuple[int, int] | None) -> None:
    from PIL import features

    if not features.check("webp"):
        raise LayerLoomError(
            "This build of Pillow cannot write WebP; choose another format, or install the wheel"
            " from PyPI with `pip install --force-reinstall pillow`."
        )
    if size is not None and max(size) > _WEBP_LIMIT:
        raise LayerLoomError(
            f"WebP holds at most {_WEBP_LIMIT} pixels a side and the layers are"
            f" {size[1]}x{size[0]}; choose another format."
        )


def _exif(metadata: Mapping[str, str]) -> bytes:
    from PIL import Image

    if not metadata:
        return b""
    exif = Image.Exif()
    tag = _EXIF_MAKE
    for key, text in metadata.items():
        if key == "prompt":
            exif[_EXIF_MODEL] = f"{key}:{text}"
        else:
            exif[tag] = f"{key}:{text}"
            tag -= 1
    return exif.tobytes()


def _u24(number: int) -> bytes:
    return struct.pack("<I", number)[:3]


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def _image_chunks(file: bytes) -> bytes:
    """The picture's own chunks of a still WebP file, without its header."""
    start, chunks = 12, b""
    while start < len(file):
        name, (length,) = file[start : start + 4], struct.unpack_from("<I", file, start + 4)
        stop = start + 8 + length + length % 2
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            chunks += file[start:stop]
        start = stop
    return chunks
