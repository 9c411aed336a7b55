"""Says things on a node: notes while it runs, and what a user can put right."""

from __future__ import annotations

import logging

from ...engine.errors import LayerLoomError

log = logging.getLogger("layerloom.nodes")


def tell(node_id: str | None, text: str) -> None:
    """Show a sentence on a node of the graph, and put it in the log."""
    log.info(text)
    if node_id is None:
        return
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def failure(node_id: str | None, error: LayerLoomError) -> str:
    """Show what is wrong on the node; returns the sentence that stops what depends on it.

    For ``io.NodeOutput(None, block_execution=...)``: without the None the host drops it.
    """
    tell(node_id, str(error))
    return str(error)
