"""`layerloom submit` against a small server that speaks ComfyUI's protocol."""

import asyncio
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_comfy import HANGING, FakeHost, fail_with, hang

from layerloom.engine.cli import main
from layerloom.engine.errors import LayerLoomError
from layerloom.engine.submit import prepare, server_url

WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}, "_meta": {"title": "In"}},
    "2": {"class_type": "TextNode", "inputs": {"text": "a cat", "size": 4}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 1, "steps": 20, "image": ["1", 0], "text": ["2", 0]},
        "_meta": {"title": "Sampler v1.5"},
    },
    "4": {"class_type": "SaveLayers", "inputs": {"images": ["3", 0], "prefix": "x"}},
    "5": {"class_type": "SaveLayers", "inputs": {"images": ["3", 0], "mode.fps": 8}},
}
# As the host's execution.py makes it, and what a person is told.
NODE_ERROR = {
    "type": "value_smaller_than_min",
    "message": "Value 0 smaller than min of 1",
    "details": "steps",
    "extra_info": {
        "input_name": "steps",
        "input_config": ["INT", {"min": 1}],
        "received_value": 0,
    },
}
NODE_ERROR_TOLD = 'node 3 "Sampler v1.5" (KSampler), input steps: 0 is below the least, 1'
FOREIGN = "00000000-0000-4000-8000-000000000000"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def assert_one_sentence(text: str, *words: str) -> None:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("layerloom: ")
    assert lines[0].endswith(".") and ". " not in lines[0]
    for word in words:
        assert word in lines[0]


@pytest.fixture
def workflow(tmp_path) -> Path:
    path = tmp_path / "workflow_api.json"
    path.write_text(json.dumps(WORKFLOW), encoding="utf-8")
    return path


# --- a server -------------------------------------------------------------------------------


@pytest.fixture
def host():
    with FakeHost() as server:
        server.running.append(FOREIGN)  # somebody else's prompt, which nothing may touch
        yield server
        assert FOREIGN in server.running


def give(host: FakeHost, *files: tuple[str, str, str, bytes], key: str = "images") -> None:
    """Make files the results of node 4."""
    items = []
    for kind, subfolder, filename, content in files:
        host.files[kind, subfolder, filename] = content
        items.append({"filename": filename, "subfolder": subfolder, "type": kind})
    host.outputs.setdefault("4", {})[key] = items


def refusing_port() -> str:
    import socket

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{unused.getsockname()[1]}"


# --- before a server is asked -----------------------------------------------------------------


def test_files_that_are_no_workflow(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "editor.json").write_text('{"nodes": [], "links": [], "version": 0.4}')
    for path, word in (
        (tmp_path / "none.json", "does not exist"),
        (tmp_path, "cannot be read"),
        (tmp_path / "broken.json", "not valid JSON"),
        (tmp_path / "editor.json", "Export (API)"),
    ):
        assert run("submit", path, "--server", refusing_port(), "--out", tmp_path / "out") == 2
        assert_one_sentence(capsys.readouterr().err, str(path), word)
        assert not (tmp_path / "out").exists()


BAD_OPTIONS = {
    "no equals": (["--set", "3.seed"], ["--set 3.seed", "'='"]),
    "no dot": (["--set", "seed=3"], ["no dot in 'seed'", "node 1"]),
    "unknown node": (["--set", "9.seed=1"], ["no node '9'", 'node 3 "Sampler v1.5" (KSampler)']),
    "unknown input": (["--set", "3.sed=1"], ["no input 'sed'", "seed, steps"]),
    "a link": (["--set", "3.text=1"], ["linked to node 2 (TextNode)"]),
    "two nodes": (["--set", "SaveLayers.images=1"], ["node 4", "node 5", "id"]),
    "upload without file": (["--upload", "1.image"], ["'='", "NODE.INPUT=FILE"]),
    "upload of nothing": (["--upload", "1.image=none.png"], ["none.png cannot be read"]),
    "upload of a folder": (["--upload", "1.image=/"], ["/ cannot be read", "directory"]),
    "upload to a link": (["--upload", "3.image={file}"], ["--upload 3.image", "linked"]),
    "timeout": (["--timeout", "0"], ["--timeout is 0"]),
    "endless timeout": (["--timeout", "nan"], ["--timeout is nan"]),
    "scheme": (["--server", "ftp://127.0.0.1"], ["--server ftp://127.0.0.1", "http://"]),
    "port": (["--server", "127.0.0.1:port"], ["127.0.0.1:port is not the address"]),
    "no host": (["--server", "http://"], ["is not the address"]),
    "words": (["--server", "my server"], ["my server is not the address"]),
    "odd host": (["--server", "http://a..b:80"], ["a..b"]),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(tmp_path, workflow, capsys, case):
    options, words = BAD_OPTIONS[case]
    options = [option.format(file=workflow) for option in options]
    base = ["submit", workflow, "--server", refusing_port(), "--out", tmp_path / "out", "-q"]
    assert run(*base, *options) == 2
    assert_one_sentence(capsys.readouterr().err, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8188", "http://localhost:8188"),
        (" 10.0.0.1 ", "http://10.0.0.1"),
        ("https://example.org/comfy/", "https://example.org/comfy"),
        ("http://127.0.0.1:8188/?token=a#workflow", "http://127.0.0.1:8188"),
        ("[::1]:8188", "http://[::1]:8188"),
        ("http://me:secret@host/", "http://me:secret@host"),
    ],
)
def test_addresses(given, url):
    assert server_url(given) == url


def test_without_aiohttp(workflow, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "layerloom.engine.submit")
    assert run("submit", workflow, "--server", "x", "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "aiohttp", "pip install 'layerloom[standalone]'")


# --- whole runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/some/prefix"])
def test_a_run(tmp_path, workflow, capsys, prefix):
    out = tmp_path / "new" / "out"
    with FakeHost(prefix) as host:
        give(
            host, ("output", "layers", "a b&c_00001_.png", b"one"), ("output", "", "t.png", b"two")
        )
        give(host, ("output", "x", "t.png", b"three" * 10**6), key="gifs")
        give(host, ("temp", "", "preview.png", b"four"), key="previews")
        server = f"{host.address}{prefix}/"
        assert run("submit", workflow, "--server", server, "--out", out, "--set", "3.seed=5") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "a b&c_00001_.png": b"one",
        "t.png": b"two",
        "t_2.png": b"three" * 10**6,
    }
    captured = capsys.readouterr()
    assert captured.out == f"Wrote a b&c_00001_.png, t.png, t_2.png to {out}\n"
    assert "replacing" not in captured.out
    (body,) = host.prompts
    assert body["prompt"]["3"]["inputs"]["seed"] == 5
    body["prompt"]["3"]["inputs"]["seed"] = 1
    assert body["prompt"] == WORKFLOW
    assert host.calls == []


def test_live_progress(tmp_path, workflow, host):
    shown, seen = [], threading.Event()

    def progress(*step: object) -> None:
        shown.append(step)
        if step == (4, 20, "Sampler v1.5"):
            seen.set()

    async def when_seen() -> None:
        await asyncio.to_thread(seen.wait, HANGING)

    host.before_the_end = when_seen
    give(host, ("output", "", "a.png", b"one"))
    report = prepare(workflow, host.url, tmp_path / "out").run(pytest.fail, progress)
    assert [path.name for path in report.files] == ["a.png"]
    assert report.prompt_id == host.prompts[0]["prompt_id"]
    order = [(0, 5, "Connecting"), (1, 5, "TextNode"), (2, 5, "Sampler v1.5")]
    order += [(3, 20, "Sampler v1.5"), (4, 20, "Sampler v1.5"), (0, 1, "Fetching a.png")]
    assert [step for step in shown if step in order] == order


def test_earlier_files_are_replaced_and_named(tmp_path, workflow, host, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.png", "mine.txt"):
        (out / name).write_bytes(b"earlier")
    give(host, ("output", "", "a.png", b"new"), ("output", "", "b.png", b"new"))
    assert run("submit", workflow, "--server", host.url, "--out", out, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == f"Wrote a.png, b.png to {out}, replacing earlier a.png\n"
    assert captured.err == ""
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "a.png": b"new",
        "b.png": b"new",
        "mine.txt": b"earlier",
    }


def test_no_files(tmp_path, workflow, host, capsys):
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 0
    assert "made no files" in capsys.readouterr().out


def test_titles_are_no_markup(tmp_path, workflow, host, capsys):
    nodes = json.loads(json.dumps(WORKFLOW))
    nodes["3"]["_meta"]["title"] = "[/red] sampler"
    workflow.write_text(json.dumps(nodes))
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 0


def test_uploads(tmp_path, workflow, host, capsys):
    names = ["my clip \u00e9 'x'.png", "two.png", "three.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    base = ["submit", workflow, "--server", host.url, "--out", tmp_path / "out", "--quiet"]
    first, second, third = ("--upload=" + f"In.image={tmp_path / name}" for name in names)
    assert run(*base, first) == 0
    assert run(*base, second.replace("In.image", "2.text")) == 0
    assert host.uploads == {name: name.encode() for name in names[:2]}
    assert host.prompts[0]["prompt"]["1"]["inputs"]["image"] == names[0]
    assert host.prompts[1]["prompt"]["2"]["inputs"]["text"] == "sub/two.png"
    assert run(*base, third) == 2
    assert_one_sentence(capsys.readouterr().err, "three.png", "--max-upload-size")
    assert len(host.prompts) == 2


def test_following_a_redirect(tmp_path, workflow, host):
    give(host, ("output", "", "a.png", b"one"))
    server = f"{host.address}/moved"
    assert run("submit", workflow, "--server", server, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == b"one"


def test_https(tmp_path, workflow):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = "-subj /CN=x -addext subjectAltName=IP:127.0.0.1 -keyout key -out certificate"
    subprocess.run(
        [openssl, *f"{made} {names}".split()], cwd=tmp_path, check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with FakeHost("/p", context) as host:
        give(host, ("output", "", "a.png", b"one"))
        command = [sys.executable, "-m", "layerloom.engine.cli", "submit", workflow, "--quiet"]
        command += ["--server", host.url, "--out", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert_one_sentence(done.stderr, "certificate is not trusted", host.url)
        trusting = {**os.environ, "SSL_CERT_FILE": str(tmp_path / "certificate")}
        assert subprocess.run(command, env=trusting).returncode == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == b"one"


# --- what goes wrong ------------------------------------------------------------------------


def test_servers_that_are_none(tmp_path, workflow, host, capsys):
    address = refusing_port()
    for server, words in (
        (address, [f"http://{address} does not answer", "--server"]),
        (f"https://{host.address}", ["does not answer"]),
        (f"http://me:secret@{address}", [f"http://{address} does not answer"]),
        (f"{host.address}/nothing", ["not as a ComfyUI does", "HTTP 404"]),
        (f"{host.address}/other", ["not as a ComfyUI does"]),
        (f"{host.address}/locked", ["refuses access (HTTP 401)"]),
    ):
        assert run("submit", workflow, "--server", server, "--out", tmp_path / "out", "-q") == 2
        told = capsys.readouterr().err
        assert_one_sentence(told, *words)
        assert "secret" not in told
        assert not (tmp_path / "out").exists()


def test_a_refused_workflow(tmp_path, workflow, host, capsys):
    host.answer = (400, {"error": {}, "node_errors": {"3": {"errors": [NODE_ERROR]}}})
    base = ["submit", workflow, "--server", host.url, "--out", tmp_path / "out"]
    assert run(*base) == 2
    assert_one_sentence(capsys.readouterr().err, NODE_ERROR_TOLD)
    host.answer = (500, {})
    assert run(*base) == 2
    assert_one_sentence(capsys.readouterr().err, "HTTP 500", "log")
    assert not (tmp_path / "out").exists()


def test_outputs_the_host_leaves_out_are_told(tmp_path, workflow, host, capsys):
    host.node_errors = {"3": {"errors": [NODE_ERROR]}}
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 0
    assert f"Left out by the server: {NODE_ERROR_TOLD}." in capsys.readouterr().err


def test_a_node_that_fails(tmp_path, workflow, host, capsys):
    host.play = fail_with("execution_error", exception_message="three frames\nfor sixteen.")
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert_one_sentence(told, 'Node 3 "Sampler v1.5" (KSampler)', "three frames for sixteen.")
    assert not (tmp_path / "out").exists()
    assert host.calls == []


def test_a_prompt_that_somebody_else_stops(tmp_path, workflow, host, capsys):
    base = ["submit", workflow, "--server", host.url, "--out", tmp_path / "out"]
    host.play = fail_with("execution_interrupted")
    assert run(*base) == 2
    assert_one_sentence(capsys.readouterr().err, "interrupted on the server")

    async def forget(host: FakeHost, prompt_id: str, client: str) -> None:
        host.running.remove(prompt_id)
        await host.say_all("status", host._status())

    host.play = forget
    assert run(*base) == 2
    assert_one_sentence(capsys.readouterr().err, "no longer knows the prompt")
    assert host.calls == []


def test_a_result_that_is_not_there(tmp_path, workflow, host, capsys):
    give(host, ("output", "", "a.png", b"one"), ("output", "", "b.png", b"two"))
    host.files.popitem()
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "b.png", "HTTP 404", "output folder")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path, workflow, host, capsys):
    """A real write past a limit of the system, which behaves as a full disk does."""
    give(host, ("output", "", "a.png", b"one"), ("output", "", "b.png", bytes(10_000)))
    base = ["submit", workflow, "--server", host.url, "--out", tmp_path / "out", "--quiet"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        status = run(*base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert_one_sentence(capsys.readouterr().err, "no room left", "--out")
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path, workflow, host, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("submit", workflow, "--server", host.url, "--out", tmp_path / "out") == 2
    assert_one_sentence(capsys.readouterr().err, "file is in the way")
    assert host.prompts == []


# --- a connection that breaks ---------------------------------------------------------------


async def lose_sockets(host: FakeHost, prompt_id: str, client: str) -> None:
    """The websocket breaks for good; the prompt ends when the history was asked for a while."""
    host.takes_sockets = False
    await host.drop_sockets()
    asked = host.asked
    while host.asked < asked + 3:
        await asyncio.sleep(0)
    await host.end(prompt_id, client)


@pytest.mark.parametrize("ever", [True, False])
def test_without_a_websocket_the_history_is_asked(tmp_path, workflow, host, ever):
    host.play, host.takes_sockets = lose_sockets, ever
    give(host, ("output", "", "a.png", b"one"))
    submission = prepare(workflow, host.url, tmp_path / "out")
    notes = []
    report = dataclasses.replace(submission, pause=0).run(notes.append, lambda *_: None)
    assert report.files[0].read_bytes() == b"one"
    assert [("websocket" in note) for note in notes] == ([] if ever else [True])


def test_an_outage_is_outlived(tmp_path, workflow, host):
    async def blink(host: FakeHost, prompt_id: str, client: str) -> None:
        host.gone = 4
        await host.drop_sockets()
        while host.gone:
            await asyncio.sleep(0)
        await host.end(prompt_id, client)

    host.play = blink
    give(host, ("output", "", "a.png", b"one"))
    submission = prepare(workflow, host.url, tmp_path / "out")
    report = dataclasses.replace(submission, pause=0).run(pytest.fail, lambda *_: None)
    assert report.files[0].read_bytes() == b"one"


def test_a_server_that_dies(tmp_path, workflow, host):
    async def die(host: FakeHost, prompt_id: str, client: str) -> None:
        host.gone = 10**9
        await host.drop_sockets()

    host.play = die
    submission = prepare(workflow, host.url, tmp_path / "out")
    with pytest.raises(LayerLoomError, match="was lost and did not come back"):
        dataclasses.replace(submission, pause=0, tries=3).run(pytest.fail, lambda *_: None)
    assert not (tmp_path / "out").exists()
    assert 10**9 - host.gone <= 10


# --- stopping -------------------------------------------------------------------------------


def assert_stopped(host: FakeHost) -> None:
    """Our prompt was cancelled and nothing else was touched."""
    ours = host.prompts[0]["prompt_id"]
    assert ours not in host.pending
    if host.held:
        assert not host.interrupted.is_set()
    else:
        assert host.interrupted.is_set()
    named = [body if kind == "cancel" else list(body.values()) for kind, body in host.calls]
    assert named and all(name in (ours, [ours], [[ours]]) for name in named)


def interrupted_command(host: FakeHost, workflow: Path, out: Path, stop: int) -> tuple[int, str]:
    """Status and stderr of the real command, sent a signal when the server has got its prompt."""
    command = [sys.executable, "-m", "layerloom.engine.cli", "submit", str(workflow)]
    command += ["--server", host.url, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert host.started.wait(HANGING)
        process.send_signal(stop)
        _, told = process.communicate(timeout=HANGING)
    finally:
        process.kill()
    return process.returncode, told


@pytest.mark.parametrize("held", [False, True], ids=["running", "waiting"])
@pytest.mark.parametrize("modern", [True, False], ids=["modern", "older"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_our_prompt_alone(tmp_path, workflow, host, held, modern, stop):
    """The real command; the prompt would never end."""
    host.play, host.held, host.cancels_jobs = hang, held, modern
    host.pending.append("another")
    status, told = interrupted_command(host, workflow, tmp_path / "out", stop)
    assert status == 130
    assert told.strip().splitlines()[-1] == "layerloom: interrupted"
    assert "Traceback" not in told
    assert_stopped(host)
    assert "another" in host.pending
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_the_server_still_checks_the_workflow(tmp_path, workflow, host):
    """The prompt gets into the queue only after the interrupt, and is found there."""

    async def wait_for_a_cancel() -> None:
        host.started.set()
        while not host.calls:
            await asyncio.sleep(0)

    host.play, host.check_workflow = hang, wait_for_a_cancel
    status, _ = interrupted_command(host, workflow, tmp_path / "out", signal.SIGINT)
    assert status == 130
    assert_stopped(host)


def test_a_timeout_stops_the_prompt(tmp_path, workflow, host, capsys):
    host.play = hang
    base = ["submit", workflow, "--server", host.url, "--out", tmp_path / "out", "--quiet"]
    assert run(*base, "--timeout", "0.01") == 2
    assert_one_sentence(capsys.readouterr().err.replace("0.01", "N"), "after N seconds", "stopped")
    assert_stopped(host)


def test_a_stop_that_cannot_be_told(tmp_path, workflow, host):
    async def vanish(host: FakeHost, prompt_id: str, client: str) -> None:
        host.gone = 10**9
        await host.say(client, "executing", node="3", prompt_id=prompt_id)

    def interrupt(done: int, total: int, title: str) -> None:
        if title == "Sampler v1.5":
            raise KeyboardInterrupt

    host.play = vanish
    notes = []
    with pytest.raises(KeyboardInterrupt):
        prepare(workflow, host.url, tmp_path / "out").run(notes.append, interrupt)
    assert re.search("could not be told to stop", notes[0])
