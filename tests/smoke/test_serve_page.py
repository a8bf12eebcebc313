"""The server as one starts it: the page in a real browser, the endpoint over a real connection, and the end."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from PIL import Image

import miniatures
from chromium import browser, find
from tiny_detector import write_detector

#: Seconds that the server may take to start, and to answer.
PATIENCE = 240


class Server(NamedTuple):
    """A running server: its process, its port, and the folder that its temporary files are in."""

    process: subprocess.Popen[str]
    port: int
    temporary: Path
    told: list[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    write_detector(folder / "det" / "export", provenance={"dataset": "demo_x"})
    (folder / "tmp").mkdir()
    words = ("ckpt=det/export", "port=0", "frames=4", "limits.max_upload_mb=3")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-m", "fsvfm.serve", *words],
        cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        told = []
        for line in process.stdout:
            told.append(line)
            if "serving on" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)", told[-1])
        assert found, "".join(told)
        yield Server(process, int(found[1]), folder / "tmp", told)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def photo(media_dir: Path, tmp_path: Path) -> Path:
    path = tmp_path / "it's me & <you>.png"
    Image.fromarray(miniatures.faces(media_dir)[0]).save(path)
    return path


def predict(server: Server, content: bytes, name: str) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", f"/v1/predict?name={name}", content, {"content-type": "application/octet-stream"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_start_says_what_one_must_know(server: Server) -> None:
    told = "".join(server.told)
    assert "demo detector" in told
    assert "limits: up to 3 MB" in told
    assert "threshold eer" in told
    assert "other machines" not in told  # only where they are let in


def test_the_endpoint_answers_and_refuses_while_it_reads(server: Server, photo: Path) -> None:
    status, record = predict(server, photo.read_bytes(), "me.png")
    assert (status, record["source"]) == (200, "me.png")
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as link:
        link.sendall(
            b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        with suppress(OSError):  # an endless upload is cut off
            while sent < 200_000_000:
                link.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
        assert sent < 50_000_000  # the limit, and what the connection buffers
    assert predict(server, photo.read_bytes(), "me.png")[0] == 200
    (folder,) = server.temporary.glob("fsvfm-serve-*")
    assert list((folder / "uploads").iterdir()) == []


def test_the_page_in_a_browser(server: Server, photo: Path, tmp_path: Path) -> None:
    """Upload a photograph, read the verdict, ask for reasons and masks; nothing is fetched from elsewhere."""
    find()
    shots = Path(os.environ.get("FSVFM_ARTEFACTS", tmp_path / "artefacts"))
    shots.mkdir(parents=True, exist_ok=True)
    expected = predict(server, photo.read_bytes(), "me.png")[1]
    home = f"127.0.0.1:{server.port}"
    profile = Path(tempfile.mkdtemp(dir=tmp_path))
    with browser(profile) as tab:
        tab.resize(1280, 900)
        tab("Page.navigate", url=f"http://{home}/")
        tab.wait("!!document.querySelector('#drop input[type=file]')", PATIENCE)
        assert "demo detector" in tab.evaluate("document.body.innerText")
        tab.choose("#drop input[type=file]", photo)
        word = tab.wait("document.querySelector('#result .word')?.innerText", PATIENCE)
        text = tab.evaluate("document.querySelector('#result').innerText")
        assert word == str(expected["verdict"]).capitalize()
        assert f"{expected['probability']:.3f}" in text
        assert "it's me & <you>.png: photograph, 1 face" in text
        assert "demo detector" in text
        tab.screenshot(shots / "serve_verdict.png")
        tab.evaluate("document.querySelector('#explain').click()")
        tab.wait("document.querySelectorAll('#explanation figure').length >= 3", PATIENCE)
        tab.screenshot(shots / "serve_explanation.png")
        tab.evaluate("[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.match('Masks')).click()")
        tab.wait("document.querySelector('#mask')?.offsetParent !== null")
        tab.evaluate("document.querySelector('#mask').click()")
        tab.wait("document.querySelectorAll('#masks figure').length == 7", PATIENCE)
        tab.resize(390, 844)
        width = tab.wait("document.documentElement.scrollWidth")
        assert width <= 390  # nothing sticks out on a phone
        tab.screenshot(shots / "serve_masks_phone.png")
        # A bad file after a good one.
        page = photo.with_name("page.jpg")
        page.write_text("<html></html>")
        tab.choose("#drop input[type=file]", page)
        tab.wait("document.querySelector('#result .word')?.innerText == 'Not scored'", PATIENCE)
        assert "it holds an HTML page" in tab.evaluate("document.querySelector('#result').textContent")
        elsewhere = {urlsplit(url).netloc for url in tab.requested if not url.startswith(("data:", "blob:", "about:"))}
        assert elsewhere == {home}
        assert tab.problems == []
    shutil.rmtree(profile, ignore_errors=True)
    assert all((shots / f"serve_{name}.png").stat().st_size > 5000 for name in ("verdict", "explanation"))


def test_it_stops_when_told_and_leaves_nothing(server: Server) -> None:
    """The last test of this module: it ends the server."""
    (folder,) = server.temporary.glob("fsvfm-serve-*")
    server.process.send_signal(signal.SIGTERM)
    output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, output
    assert output.endswith("stopped\n"), output
    assert "Traceback" not in output
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not folder.exists()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fsvfm.serve", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "error: ckpt=… must be given" in run()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port={port} cannot be listened on" in run("ckpt=nothing", f"port={port}")
