"""Says whether this ComfyUI is new enough for the pack's nodes."""

from __future__ import annotations

OLDEST = (0, 30)


def too_old() -> str | None:
    """A sentence for a host older than the nodes need, or None."""
    from comfyui_version import __version__ as version

    parts = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if tuple(parts) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return (
        f"LayerLoom needs ComfyUI {oldest} or newer and this is {version}: its nodes are left out. "
        "Update ComfyUI."
    )
