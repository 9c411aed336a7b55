"""The click editor's route: POST /layerloom/segment, clicks on a picture to a mask, no queueing."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ...engine.errors import LayerLoomError

if TYPE_CHECKING:
    from .click_masks import ClickMasks

PATH = "/layerloom/segment"
# A request holds a file name and at most some hundred points.
MOST_BYTES = 64 * 1024
# Editors wait for their answers one by one; more than this is no editor.
MOST_WAITING = 8
log = logging.getLogger("layerloom.nodes")


def add_route() -> None:
    """Add the route to the running host; it loads nothing until it is asked something."""
    from aiohttp import web
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    answering = Answering()

    @server.routes.post(PATH)
    async def segment(request: web.Request) -> web.Response:
        status, answer = await answering.answer(request)
        return web.json_response(answer, status=status)


class Answering:
    """Requests one after the other, off the host's event loop."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layerloom-clicks")
        self._masks: ClickMasks | None = None
        self._waiting = 0

    async def answer(self, request) -> tuple[int, dict[str, Any]]:
        """The HTTP status of a request and what it is told: a mask, or {"error": a sentence}."""
        if (request.content_length or 0) > MOST_BYTES:
            return 413, _error(f"The request is larger than {MOST_BYTES // 1024} KiB.")
        # One byte more tells that there is more; not all bodies say how long they are.
        body = await request.content.read(MOST_BYTES + 1)
        while not request.content.at_eof() and len(body) <= MOST_BYTES:
            body += await request.content.read(MOST_BYTES + 1 - len(body))
        if len(body) > MOST_BYTES:
            return 413, _error(f"The request is larger than {MOST_BYTES // 1024} KiB.")
        try:
            wish = json.loads(body)
        except (ValueError, RecursionError):
            return 400, _error(
                "The request is not JSON; send an object with picture, segmenter and clicks."
            )
        if self._waiting >= MOST_WAITING:
            return 503, _error("Too many clicks wait for their masks; try again in a moment.")
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return 200, await loop.run_in_executor(self._thread, self._answer, wish)
        except LayerLoomError as error:
            return 400, _error(str(error))
        except Exception:
            log.exception("A click could not be answered")
            return 500, _error("The mask could not be made; ComfyUI's log says why.")
        finally:
            self._waiting -= 1

    def _answer(self, wish: Any) -> dict[str, Any]:
        if self._masks is None:
            # Here and not earlier: torch's friends take a moment to import.
            import folder_paths

            from .click_masks import ClickMasks
            from .segmenter import find_segmenter

            self._masks = ClickMasks(folder_paths.get_directory_by_type, find_segmenter)
        return self._masks.answer(wish)


def _error(sentence: str) -> dict[str, str]:
    return {"error": sentence}
