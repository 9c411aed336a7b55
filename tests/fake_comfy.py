"""A small server in a thread that speaks ComfyUI's protocol, for tests of its clients."""

import asyncio
import ssl
import threading
from contextlib import suppress

from aiohttp import WSCloseCode, web

# Only a hanging test waits so long.
HANGING = 60


class FakeHost:
    """ComfyUI's endpoints and messages, in a thread; `play` is what running a prompt does."""

    def __init__(self, prefix: str = "", certificate: ssl.SSLContext | None = None):
        self.prefix, self.certificate = prefix, certificate
        self.prompts: list[dict] = []  # bodies of POST /prompt
        self.calls: list[tuple[str, object]] = []  # what changed the queue
        self.uploads: dict[str, bytes] = {}
        self.running: list[str] = []
        self.pending: list[str] = []
        self.history: dict[str, dict] = {}
        self.outputs: dict[str, dict] = {}
        self.files: dict[tuple[str, str, str], bytes] = {}
        self.play = succeed
        self.check_workflow = self.before_the_end = no_wait
        self.answer: tuple[int, dict] | None = None  # instead of queueing
        self.node_errors: dict = {}
        self.cancels_jobs = True  # has /api/jobs/<id>/cancel
        self.takes_sockets = True
        self.held = False  # prompts stay in the queue
        self.gone = 0  # so many requests get no answer
        self.asked = 0  # history requests
        self.started = threading.Event()
        self.interrupted: asyncio.Event
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._tasks: set[asyncio.Task] = set()

    def __enter__(self) -> "FakeHost":
        self._thread.start()
        assert self._ready.wait(HANGING)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(HANGING)

    def _serve(self) -> None:
        self._loop.run_until_complete(self._main())
        self._loop.close()

    async def _main(self) -> None:
        self._end, self.interrupted = asyncio.Event(), asyncio.Event()
        app = web.Application(middlewares=[self._outage])
        for method, path, handler in (
            ("GET", "/system_stats", self._stats),
            ("GET", "/ws", self._socket),
            ("POST", "/upload/image", self._upload),
            ("POST", "/prompt", self._prompt),
            ("GET", "/queue", self._queue),
            ("POST", "/queue", self._change_queue),
            ("POST", "/interrupt", self._interrupt),
            ("GET", "/history/{id}", self._history),
            ("GET", "/view", self._view),
            ("POST", "/api/jobs/{id}/cancel", self._cancel_job),
        ):
            app.router.add_route(method, self.prefix + path, handler)
        app.router.add_get("/moved/system_stats", self._moved)
        app.router.add_get("/locked/system_stats", self._locked)
        app.router.add_get("/other/system_stats", self._other)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self.certificate)
        await site.start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        self.url = f"http{'s' * bool(self.certificate)}://{self.address}{self.prefix}"
        self._ready.set()
        await self._end.wait()
        for task in self._tasks:
            task.cancel()
        await self.drop_sockets()
        await runner.cleanup()

    @web.middleware
    async def _outage(self, request, handler):
        if self.gone > 0:
            self.gone -= 1
            request.transport.abort()
            return web.Response()
        return await handler(request)

    async def _stats(self, request):
        return web.json_response({"system": {"comfyui_version": "0.33.0"}, "devices": []})

    async def _moved(self, request):
        raise web.HTTPMovedPermanently(f"{self.prefix}/system_stats")

    async def _locked(self, request):
        return web.Response(status=401)

    async def _other(self, request):
        return web.Response(text="<html>")

    async def _socket(self, request):
        if not self.takes_sockets:
            return web.Response(status=502)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.sockets[request.query["clientId"]] = socket
        await socket.send_json({"type": "status", "data": self._status()})
        async for _ in socket:
            pass
        return socket

    async def _upload(self, request):
        form = await request.post()
        image = form["image"]
        assert form["type"] == "input"
        if len(self.uploads) == 2:
            return web.Response(status=413)
        self.uploads[image.filename] = image.file.read()
        folder = "" if len(self.uploads) == 1 else "sub"
        return web.json_response({"name": image.filename, "subfolder": folder, "type": "input"})

    async def _prompt(self, request):
        body = await request.json()
        self.prompts.append(body)
        if self.answer is not None:
            return web.json_response(self.answer[1], status=self.answer[0])
        await self.check_workflow()
        self.pending.append(body["prompt_id"])
        await self.say_all("status", self._status())
        if self.held:
            self.started.set()
        else:
            self.pending.remove(body["prompt_id"])
            self.running.append(body["prompt_id"])
            task = asyncio.ensure_future(self.play(self, body["prompt_id"], body["client_id"]))
            self._tasks.add(task)
        return web.json_response(
            {"prompt_id": body["prompt_id"], "number": 1, "node_errors": self.node_errors}
        )

    async def _queue(self, request):
        rows = ([[0, name, {}, {}, []] for name in names] for names in (self.running, self.pending))
        return web.json_response(dict(zip(("queue_running", "queue_pending"), rows, strict=True)))

    async def _change_queue(self, request):
        body = await request.json()
        self.calls.append(("queue", body))
        self.pending = [name for name in self.pending if name not in body["delete"]]
        return web.Response()

    async def _interrupt(self, request):
        body = await request.json()
        self.calls.append(("interrupt", body))
        if body.get("prompt_id") in self.running:
            self.interrupted.set()
        return web.Response()

    async def _cancel_job(self, request):
        if not self.cancels_jobs:
            return web.Response(status=404)
        name = request.match_info["id"]
        self.calls.append(("cancel", name))
        known = name in self.running or name in self.pending
        if name in self.running:
            self.interrupted.set()
        if name in self.pending:
            self.pending.remove(name)
        return web.json_response({"cancelled": known})

    async def _history(self, request):
        self.asked += 1
        name = request.match_info["id"]
        return web.json_response({name: self.history[name]} if name in self.history else {})

    async def _view(self, request):
        query = request.query
        key = (query["type"], query["subfolder"], query["filename"])
        if key not in self.files:
            return web.Response(status=404)
        return web.Response(body=self.files[key])

    def _status(self) -> dict:
        return {"status": {"exec_info": {"queue_remaining": len(self.running + self.pending)}}}

    async def say(self, client: str, kind: str, **data: object) -> None:
        if client in self.sockets:
            with suppress(ConnectionError):
                await self.sockets[client].send_json({"type": kind, "data": data})

    async def say_all(self, kind: str, data: dict) -> None:
        for client in list(self.sockets):
            await self.say(client, kind, **data)

    async def drop_sockets(self) -> None:
        for socket in list(self.sockets.values()):
            await socket.close(code=WSCloseCode.GOING_AWAY)
        self.sockets.clear()

    async def end(self, prompt_id: str, client: str, messages: list | None = None) -> None:
        """Move a prompt to the history, as the host does after its last message."""
        self.running.remove(prompt_id)
        bad = [kind for kind, _ in messages or [] if kind != "execution_success"]
        self.history[prompt_id] = {
            "prompt": [0, prompt_id, {}, {}, []],
            "outputs": {} if bad else self.outputs,
            "status": {
                "status_str": "error" if bad else "success",
                "completed": not bad,
                "messages": messages or [["execution_success", {"prompt_id": prompt_id}]],
            },
        }
        await self.say_all("status", self._status())
        await self.say(client, "executing", node=None, prompt_id=prompt_id)


async def no_wait() -> None:
    pass


async def succeed(host: FakeHost, prompt_id: str, client: str) -> None:
    ours = {"prompt_id": prompt_id}
    await host.say(client, "execution_start", **ours)
    await host.say(client, "execution_cached", nodes=["1"], **ours)
    await host.say(client, "executing", node="2", display_node="2", **ours)
    await host.say(client, "executing", node="3", display_node="3", **ours)
    if client in host.sockets:
        await host.sockets[client].send_bytes(b"\0\0\0\1\0\0\0\1preview")
        await host.sockets[client].send_str("no json")
    state = {"value": 3, "max": 20, "state": "running", "node_id": "3", "display_node_id": "3"}
    await host.say(client, "progress_state", nodes={"3": state}, **ours)
    await host.say(client, "progress", value=4, max=20, node="3", **ours)
    await host.say(client, "executed", node="4", display_node="4", output={}, **ours)
    await host.before_the_end()
    await host.say(client, "execution_success", **ours)
    await host.end(prompt_id, client)


def fail_with(kind: str, **data: object):
    async def play(host: FakeHost, prompt_id: str, client: str) -> None:
        told = {"prompt_id": prompt_id, "node_id": "3", "node_type": "KSampler", **data}
        await host.say(client, kind, **told)
        await host.end(prompt_id, client, [[kind, told]])

    return play


async def hang(host: FakeHost, prompt_id: str, client: str) -> None:
    """Run until interrupted, as a long sampling does."""
    await host.say(client, "executing", node="3", display_node="3", prompt_id=prompt_id)
    host.started.set()
    await host.interrupted.wait()
    told = {"prompt_id": prompt_id, "node_id": "3", "node_type": "KSampler", "executed": []}
    await host.say_all("execution_interrupted", told)
    await host.end(prompt_id, client, [["execution_interrupted", told]])
