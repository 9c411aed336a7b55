"""LayerLoom: layered, animated, clickable and steerable video; imports nothing heavy."""

__version__ = "0.1.0"

# Browser files of the pack: the viewer, the editors and the nodes' help.
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's door: the extension whose nodes it registers."""
    import logging

    try:
        from .nodes import LayerLoomExtension
    except Exception:
        logging.getLogger("layerloom").exception("LayerLoom's nodes could not be loaded")
        raise
    return LayerLoomExtension()
