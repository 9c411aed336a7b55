"""Queues an API-format workflow on a running ComfyUI, follows it and fetches its results."""

from __future__ import annotations

import asyncio
import json
import math
import re
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from .api_workflow import (
    Note,
    Progress,
    ResultFile,
    Tracker,
    Workflow,
    failure,
    find_input,
    listing,
    local_names,
    one_line,
    read_workflow,
    refusal,
    result_files,
    safe_name,
    set_input,
)
from .errors import LayerLoomError
from .staging import StagedFolder

try:
    import aiohttp
except ModuleNotFoundError as missing:
    raise LayerLoomError(
        "Talking to a ComfyUI needs the package aiohttp; pip install 'layerloom[standalone]'."
    ) from missing

_T = TypeVar("_T")

_CONNECT_SECONDS = 10
# A host that loads a model answers nothing for many seconds.
_ANSWER_SECONDS = 120
_CANCEL_SECONDS = 10
# Nothing heard for so long: look whether the prompt still is in the queue.
_SILENT_SECONDS = 10


class Unreachable(LayerLoomError):
    """The server gave no answer; the next try may get one."""


# --- the server -----------------------------------------------------------------------------


def server_url(text: str) -> str:
    """The address without a slash at its end; http where no scheme is given."""
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # what looking it up will do
    except ValueError:
        good = False
    if not good or re.search(r"\s", url):
        raise LayerLoomError(
            f"--server {text} is not the address of a server; give http://127.0.0.1:8188, say."
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


class Host:
    """One ComfyUI, asked over HTTP and its websocket.

    base: its address as `server_url` gives it. pause, tries: seconds between two tries to reach
    a server that went away, and how many.
    """

    def __init__(self, base: str, session: aiohttp.ClientSession, pause: float, tries: int):
        self.base, self.session = base, session
        self.pause, self.tries = pause, tries
        self.client_id = uuid.uuid4().hex
        self.socket: aiohttp.ClientWebSocketResponse | None = None

    def __str__(self) -> str:
        parts = urlsplit(self.base)  # a password in the address is nobody's to read
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @asynccontextmanager
    async def _ask(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self.session.request(method, self.base + path, **options) as response:
                yield response
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            raise Unreachable(
                f"{self} does not answer ({_reason(error)}); see that ComfyUI runs there and that"
                " --server is its address."
            ) from error

    async def _json(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and JSON; None for an answer that is no JSON."""
        async with self._ask(method, path, **options) as response:
            text = await response.text(errors="replace")
        try:
            return response.status, json.loads(text)
        except (ValueError, RecursionError):
            return response.status, None

    async def _get(self, path: str) -> dict[str, Any]:
        status, answer = await self._json("GET", path)
        if status != 200 or not isinstance(answer, dict):
            raise Unreachable(f"{self} answers {path} with HTTP {status} and no JSON; try again.")
        return answer

    async def check(self) -> None:
        """LayerLoomError unless a ComfyUI answers; follows a move to another address."""
        async with self._ask("GET", "/system_stats") as response:
            status, text = response.status, await response.text(errors="replace")
            if response.history:  # http to https, say; a redirected POST would lose its body
                self.base = str(response.url).removesuffix("/system_stats")
        if status in (401, 403, 407):
            raise LayerLoomError(
                f"{self} refuses access (HTTP {status}); give a name and password in --server as"
                " http://NAME:PASSWORD@HOST, or ask who runs it."
            )
        try:
            known = isinstance(json.loads(text)["system"], dict)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if status != 200 or not known:
            raise LayerLoomError(
                f"{self} answers (HTTP {status}), but not as a ComfyUI does; give the address its"
                " editor has in the browser as --server."
            )

    async def upload(self, file: Path) -> str:
        """Put a file into the server's input folder; returns its name there."""
        form = aiohttp.FormData(quote_fields=False)
        with file.open("rb") as source:
            form.add_field("image", source, filename=safe_name(file.name))
            form.add_field("type", "input")
            status, answer = await self._json("POST", "/upload/image", data=form)
        if status == 413:
            raise LayerLoomError(
                f"{file} is larger than {self} takes; start ComfyUI with a greater"
                " --max-upload-size or give a smaller file."
            )
        if status != 200 or not isinstance(answer, dict) or "name" not in answer:
            raise LayerLoomError(f"{self} does not take the file {file} (HTTP {status}).")
        folder = answer.get("subfolder")
        return f"{folder}/{answer['name']}" if folder else str(answer["name"])

    async def queue(self, workflow: Workflow, prompt_id: str) -> tuple[str, str]:
        """Queue it; returns the prompt's id and in words what the host left out, if anything.

        Errors: LayerLoomError with the host's validation errors.
        """
        body = {"prompt": workflow, "client_id": self.client_id, "prompt_id": prompt_id}
        status, answer = await self._json("POST", "/prompt", json=body)
        reasons = refusal(answer, workflow)
        if status == 200 and isinstance(answer, dict) and "prompt_id" in answer:
            return str(answer["prompt_id"]), reasons
        if not reasons:
            reasons = f"it answers with HTTP {status} and no reason; its log may tell"
        raise LayerLoomError(f"{self} refuses the workflow: {reasons}.")

    async def _queued(self) -> tuple[set[str], set[str]]:
        """Ids of the prompts that run, and of those that wait."""
        queue = await self._get("/queue")
        running, waiting = (
            {item[1] for item in queue.get(key, [])} for key in ("queue_running", "queue_pending")
        )
        return running, waiting

    async def lookup(self, prompt_id: str) -> dict[str, Any] | None:
        """The history of a finished prompt; None while it waits or runs.

        Errors: LayerLoomError if the server does not know it; Unreachable.
        """
        # It may finish between two questions, so the history is asked again at the end.
        for _ in range(2):
            entry = (await self._get(f"/history/{prompt_id}")).get(prompt_id)
            if entry is not None:
                return entry
            if prompt_id in set.union(*await self._queued()):
                return None
        raise LayerLoomError(
            f"{self} no longer knows the prompt, because it was taken out of the queue or the"
            " server was started anew; submit it again."
        )

    async def connect(self) -> bool:
        """Open the websocket; False if that cannot be."""
        try:
            self.socket = await self.session.ws_connect(
                f"{self.base}/ws", params={"clientId": self.client_id}, max_msg_size=0
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError):
            self.socket = None
        return self.socket is not None

    async def follow(self, prompt_id: str, take: Callable[[Any], bool]) -> dict[str, Any]:
        """Wait for the end of a prompt; returns its history.

        take: given each message; True from it asks to look whether the prompt ended. Without a
        websocket the history is asked every `pause` seconds.
        Errors: LayerLoomError if the server stays away or forgets the prompt.
        """
        failed = 0
        while True:
            try:
                entry = await self.lookup(prompt_id)
                if entry is not None:
                    return entry
                failed = 0
            except Unreachable as error:
                failed += 1
                if failed >= self.tries:
                    raise LayerLoomError(
                        f"The connection to {self} was lost and did not come back; the prompt"
                        f" {prompt_id} may still run there and leave its results in the server's"
                        " output folder."
                    ) from error
            if self.socket is None:
                await asyncio.sleep(self.pause)
                await self.connect()
            if self.socket is not None:
                await self._listen(take)

    async def _listen(self, take: Callable[[Any], bool]) -> None:
        """Hand on messages until `take` returns True, silence, or the end of the connection."""
        while True:
            try:
                message = await self.socket.receive(timeout=_SILENT_SECONDS)
            except asyncio.TimeoutError:
                return
            if message.type == aiohttp.WSMsgType.TEXT:
                try:
                    content = json.loads(message.data)
                except (ValueError, RecursionError):
                    continue
                if take(content):
                    return
            elif message.type != aiohttp.WSMsgType.BINARY:  # binary ones are previews
                self.socket = None
                return

    async def cancel(self, prompt_id: str) -> None:
        """Take the prompt out of the queue or interrupt it, and no other one.

        It may be on its way into the queue still: it is looked for a few times.
        """
        deleted = False
        for _ in range(10):
            # Atomic on the server: it cannot hit a prompt that starts meanwhile.
            status, answer = await self._json("POST", f"/api/jobs/{prompt_id}/cancel")
            if status == 200 and isinstance(answer, dict) and answer.get("cancelled"):
                return
            # Servers before that endpoint.
            running, waiting = await self._queued()
            if prompt_id in running:
                await self._json("POST", "/interrupt", json={"prompt_id": prompt_id})
                return
            if prompt_id in waiting:
                # Looked for once more, since it may have started before this arrives.
                await self._json("POST", "/queue", json={"delete": [prompt_id]})
                deleted = True
            elif deleted or prompt_id in await self._get(f"/history/{prompt_id}"):
                return
            else:
                await asyncio.sleep(self.pause / 10)

    async def download(self, file: ResultFile, target: Path) -> None:
        """Fetch one result. Errors: LayerLoomError; OSError where it cannot be written."""
        query = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        try:
            async with self._ask("GET", "/view", params=query) as response:
                if response.status != 200:
                    raise LayerLoomError(
                        f"{self} does not hand out its result {file.filename} (HTTP"
                        f" {response.status}); look for it in the server's {file.type} folder."
                    )
                with target.open("wb") as sink:
                    async for part in response.content.iter_chunked(2**20):
                        sink.write(part)
        except Unreachable as error:
            raise LayerLoomError(
                f"The connection to {self} was lost while fetching {file.filename}; look for it in"
                f" the server's {file.type} folder."
            ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not trusted; SSL_CERT_FILE names a file of more to trust"
    if isinstance(error, asyncio.TimeoutError):
        return "nothing came in time"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    said = getattr(cause, "strerror", None) or str(cause) or type(error).__name__
    return one_line(re.sub(r"^\[.*?\]\s*", "", said), 200)


# --- one submission -------------------------------------------------------------------------


@dataclass(frozen=True)
class SubmitReport:
    """What a submission brought: paths, and the names of those that replaced earlier files."""

    files: list[Path]
    replaced: list[str]
    prompt_id: str

    def summary(self) -> str:
        """One line for a person."""
        if not self.files:
            return "The prompt is done; its output nodes made no files."
        names = listing(path.name for path in self.files)
        note = f", replacing earlier {listing(self.replaced)}" if self.replaced else ""
        return f"Wrote {names} to {self.files[0].parent}{note}"


@dataclass(frozen=True)
class Submission:
    """A checked workflow with its settings, ready to run.

    uploads: (node id, input, file), sent before the workflow. timeout: seconds to wait for the
    end. pause, tries: see Host.
    """

    workflow: Workflow
    server: str
    out: Path
    uploads: Sequence[tuple[str, str, Path]] = ()
    timeout: float | None = None
    pause: float = 1.0
    tries: int = 60

    def run(self, note: Note, progress: Progress) -> SubmitReport:
        """Do it all; files arrive in `out` together or not at all.

        note: told what the host left out. progress: called with (done, total, title).
        Stopped by an interrupt or the timeout, it cancels its own prompt on the server.
        Errors: LayerLoomError.
        """
        with StagedFolder(self.out) as staged:
            try:
                prompt_id, names = asyncio.run(_stoppable(self._run(staged, note, progress)))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            replaced = [name for name in names if (self.out / name).exists()]
        return SubmitReport([self.out / name for name in names], replaced, prompt_id)

    async def _run(
        self, staged: StagedFolder, note: Note, progress: Progress
    ) -> tuple[str, list[str]]:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS
        )
        # A proxy for the way out has no way to this machine's own servers.
        local = urlsplit(self.server).hostname in ("localhost", "127.0.0.1", "::1")
        async with aiohttp.ClientSession(timeout=timeout, trust_env=not local) as session:
            host = Host(self.server, session, self.pause, self.tries)
            progress(0, len(self.workflow), "Connecting")
            await host.check()
            # Before queueing, so that no message is missed.
            if not await host.connect():
                note("The server has no websocket; its progress cannot be shown.")
            for number, (node_id, slot, file) in enumerate(self.uploads):
                progress(number, len(self.uploads), f"Sending {file.name}")
                self.workflow[node_id]["inputs"][slot] = await host.upload(file)
            prompt_id, entry = await self._execute(host, note, progress)
            wrong = failure(entry, self.workflow)
            if wrong:
                raise LayerLoomError(wrong)
            files = result_files(entry)
            names = local_names(files, self.out)
            for number, (file, name) in enumerate(zip(files, names, strict=True)):
                progress(number, len(files), f"Fetching {name}")
                await host.download(file, staged.path(name))
            return prompt_id, names

    async def _execute(
        self, host: Host, note: Note, progress: Progress
    ) -> tuple[str, dict[str, Any]]:
        """Queue and wait; returns the prompt's id and its history."""
        # The id is ours: an interrupt while the answer is on its way has one to cancel.
        prompt_id = str(uuid.uuid4())
        try:
            prompt_id, left_out = await host.queue(self.workflow, prompt_id)
            if left_out:
                note(f"Left out by the server: {left_out}.")
            tracker = Tracker(self.workflow, prompt_id, progress, note)
            entry = await asyncio.wait_for(host.follow(prompt_id, tracker.take), self.timeout)
            if tracker.blocked and not result_files(entry):
                raise LayerLoomError(tracker.blocked)
            return prompt_id, entry
        except asyncio.TimeoutError:
            await self._cancel(host, prompt_id, note)
            raise LayerLoomError(
                f"The prompt was not done after {self.timeout:g} seconds and was stopped; give a"
                " greater --timeout or none."
            ) from None
        except LayerLoomError:
            raise
        except BaseException:  # an interrupt, above all
            await self._cancel(host, prompt_id, note)
            raise

    async def _cancel(self, host: Host, prompt_id: str, note: Note) -> None:
        try:
            await asyncio.wait_for(host.cancel(prompt_id), _CANCEL_SECONDS)
        except (LayerLoomError, asyncio.TimeoutError):
            note(f"{host} could not be told to stop the prompt {prompt_id}; it may still run.")


async def _stoppable(work: Coroutine[Any, Any, _T]) -> _T:
    """Cancel `work` on Ctrl-C and SIGTERM, so that it can still talk to the server.

    An exception out of a signal handler would hit whatever the event loop is at.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            earlier[number] = signal.signal(
                number, lambda *_: loop.call_soon_threadsafe(task.cancel)
            )
    try:
        return await work
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def prepare(
    workflow: Path,
    server: str,
    out: Path,
    settings: Sequence[str] = (),
    uploads: Sequence[str] = (),
    timeout: float | None = None,
) -> Submission:
    """Check everything that shows before a server is asked.

    settings: NODE.INPUT=VALUE; uploads: NODE.INPUT=FILE.
    Errors: LayerLoomError.
    """
    url = server_url(server)
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
        raise LayerLoomError(f"--timeout is {timeout:g}; give a number of seconds above 0.")
    nodes = read_workflow(workflow)
    for setting in settings:
        set_input(nodes, setting)
    sent = []
    for upload in uploads:
        target, equals, name = upload.partition("=")
        if not equals:
            raise LayerLoomError(f"--upload {upload} has no '='; write --upload NODE.INPUT=FILE.")
        file = Path(name)
        try:
            file.open("rb").close()
        except OSError as error:
            raise LayerLoomError(
                f"--upload {upload}: {file} cannot be read ({error.strerror}); check the path."
            ) from error
        sent.append((*find_input(nodes, target, "--upload"), file))
    return Submission(nodes, url, out, sent, timeout)
