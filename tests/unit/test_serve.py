"""The HTTP endpoint and what lies behind it, with a real detector in a real process."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import os
import re
import signal
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import resources, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

import miniatures
from fsvfm import page, serve
from fsvfm.errors import ConfigError, DataError
from fsvfm.masking import STRATEGIES
from fsvfm.predictor import load_detector
from fsvfm.service import Limits, Scored, Service, plain_name
from json_schema import violations
from tiny_detector import write_detector

LIMITS = Limits(max_upload_mb=2, max_pixels=4_000_000, max_video_seconds=5, max_seconds=120, concurrency=1, queue=8)
SETTINGS: dict[str, Any] = {
    "encoder": None, "threshold": "eer", "frames": 2, "aggregate": "mean", "face_detector": "dlib_hog",
    "max_side": 1280, "device": "cpu", "batch_size": 8,
}  # fmt: skip
SCHEMA = json.loads((resources.files("fsvfm") / "prediction.schema.json").read_text())
DOCUMENTED = set(serve.openapi(LIMITS)["paths"]["/v1/predict"]["post"]["responses"])


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("detector") / "det" / "export", provenance={"dataset": "demo_x"})


@pytest.fixture(scope="module")
def service(export: Path) -> Iterator[Service]:
    service = Service({**SETTINGS, "ckpt": str(export)}, LIMITS)
    yield service
    service.close()
    assert not service.folder.exists()


@pytest.fixture(scope="module")
def app(service: Service) -> Any:
    return serve.create_app(service)


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)  # without its lifespan, whose end would close the service


@pytest.fixture(scope="module")
def photo(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "face.png"
    Image.fromarray(miniatures.faces(media_dir)[0]).save(path)
    return path


@pytest.fixture(scope="module")
def clip(media_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniatures.write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", miniatures.faces(media_dir)[1])


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test of the service: no upload is left, and it still takes some."""
    yield
    if "service" in request.fixturenames:
        service: Service = request.getfixturevalue("service")
        assert list((service.folder / "uploads").iterdir()) == []
        assert service.state()["uploads"] == 0


def post(client: TestClient, content: bytes, name: str = "a.jpg", **options: Any) -> tuple[int, dict[str, Any]]:
    """The status and record of a file, checked against what is documented."""
    answer = client.post("/v1/predict", files={"file": (name, content)}, **options)
    return checked(answer.status_code, answer.text)


def checked(status: int, text: str) -> tuple[int, dict[str, Any]]:
    assert str(status) in DOCUMENTED - {"500"}, text
    assert "fsvfm-serve" not in text, text  # no path of the server
    assert "/input" not in text, text
    record = json.loads(text)
    if status in (200, 422):
        assert violations(record, SCHEMA) == []
        assert (record["error"] is None) == (status == 200)
    else:
        assert list(record) == ["error"]
    return status, record


def jpeg(size: tuple[int, int] = (80, 60)) -> bytes:
    out = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A small PNG of one bit per pixel that claims, and holds, very many of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------------ results


def test_a_photograph_scores_as_in_python(client: TestClient, photo: Path, export: Path) -> None:
    status, record = post(client, photo.read_bytes(), "me & you (1).png")
    with pytest.warns(UserWarning, match="demo detector"):
        expected = load_detector(export, device="cpu").predict(photo)
    assert record["error"] is None
    assert (status, record["source"], record["kind"]) == (200, "me & you (1).png", "photo")
    assert record["verdict"] == expected.verdict
    assert record["probability"] == pytest.approx(expected.probability, abs=1e-6)
    assert [face["box"] for face in record["faces"]] == [list(map(int, face.box)) for face in expected.faces]
    assert "demo detector" in record["notes"][0]
    raw = client.post("/v1/predict?name=me.png", content=photo.read_bytes(), headers={"content-type": "image/png"})
    assert checked(raw.status_code, raw.text)[1] == {**record, "source": "me.png"}


def test_a_video_and_a_picture_without_a_face(client: TestClient, clip: Path) -> None:
    status, record = post(client, clip.read_bytes(), "clip.mp4")
    assert (status, record["kind"], len(record["frames"])) == (200, "video", 2)
    assert post(client, clip.read_bytes(), "clip")[1]["kind"] == "video"  # by what it holds
    status, record = post(client, jpeg())
    assert (status, record["verdict"], record["faces"], record["probability"]) == (200, "no face", [], None)


def test_pictures_explanations_and_masks_of_a_result(service: Service, photo: Path, clip: Path) -> None:
    def scored(file: Path, name: str) -> Scored:
        upload = service.expect()
        upload.name = name
        upload.path.write_bytes(file.read_bytes())
        return service.score(upload, pictures=True)

    result = scored(photo, "<img src=x onerror=alert(1)>.png")
    assert result.annotated is not None
    assert Image.open(io.BytesIO(result.annotated)).size == Image.open(photo).size
    html = page.result_html(result, service.facts)
    assert "<img src=x" not in html
    assert "&lt;img src=x" in html
    assert "demo detector" in html
    (explained,) = service.explain(result.token, result.faces[0])
    assert explained["probability"] == pytest.approx(result.record["faces"][0]["probability"], abs=1e-6)
    assert {"attention rollout", "integrated gradients", "occlusion by region"} <= {
        v["title"] for v in explained["views"]
    }
    assert "eyes" in page.explanation_html([explained], "forgery")
    made = service.mask(result.token, result.faces[0], 0.75, seed=0)
    assert list(made["strategies"]) == list(STRATEGIES)
    assert page.masks_html(made, 0.75).count("<figure>") == 2 + len(STRATEGIES)
    video = scored(clip, "clip.mp4")
    assert video.timeline is not None
    assert Image.open(io.BytesIO(video.timeline)).format == "PNG"
    assert len(video.faces) == 1
    assert "scores over time" in page.result_html(video, service.facts)
    for token, face in (("", 0), (result.token, 99), ("../..", 0)):
        with pytest.raises(DataError, match="no longer kept"):
            service.explain(token, face)


@pytest.mark.parametrize("task", ["forgery", "antispoof"])
def test_every_verdict_has_its_words(task: str) -> None:
    threshold = {"value": 0.4, "band": {"alpha": 0.1, "low": 0.3, "high": 0.6}}
    record: dict[str, Any] = {"error": None, "probability": 0.5, "faces": [{}], "threshold": threshold}
    said = {
        verdict: page.verdict_words({**record, "verdict": verdict}, task)
        for verdict in ("real", "fake", "uncertain", "no face")
    }
    attack = task == "antispoof"
    assert [headline for headline, _ in said.values()] == [
        "Real",
        "Attack" if attack else "Fake",
        "Uncertain",
        "No face found",
    ]
    assert "below the threshold of 0.400. That is no proof" in said["real"][1]
    assert ("being an attack" if attack else "being a forgery") in said["fake"][1]
    assert "between 0.300 and 0.600" in said["uncertain"][1].lower()
    assert "10%" in said["uncertain"][1]
    assert page.verdict_words({**record, "verdict": None, "error": "a.jpg is empty"}, task) == (
        "Not scored",
        "a.jpg is empty",
    )


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "a.jpg is not a picture: it holds an HTML page"),
        ("a.jpg", b"", "a.jpg is empty"),
        ("", b"", None),
        ("a.mp4", b"no video at all", "a.mp4 is not a video"),
        ("a", b"no video at all", "a is not a video"),
        ("a.jpg", jpeg()[:300], "a.jpg cannot be decoded"),
        ("wide.png", bomb(20_000, 1_000), "wide.png has 20000×1000 pixels; the limit here is 4,000,000"),
        ("bomb.png", bomb(20_000, 20_000), "bomb.png claims too many pixels"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a.png is not a picture"),
        ("a.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n", "a.mp4 is not a video"),
        ("a.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "a.mp4 is not a video"),
        ("../../etc/passwd", b"root", "passwd is not a video"),
        ("C:\\x\\a.jpg", b"root", "a.jpg is not a picture"),
    ],
)  # fmt: skip
def test_bad_files_are_errors_of_their_own(
    client: TestClient, service: Service, name: str, content: bytes, text: Any
) -> None:
    status, record = post(client, content, name)
    if text is None:
        assert (status, record["error"][:20]) == (400, "the form holds no fi")
    else:
        assert (status, record["verdict"]) == (422, None)
        assert record["error"].startswith(text)


def test_videos_that_are_cut_off_or_too_long(client: TestClient, service: Service, clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    assert post(client, whole[: len(whole) // 2], "cut.mp4")[0] == 422
    photo = np.zeros((64, 64, 3), np.uint8)
    long = miniatures.write_clip(tmp_path / "long.mp4", photo, frames=7, rate=1)
    status, record = post(client, long.read_bytes(), "long.mp4")
    assert (status, record["error"]) == (
        422, "long.mp4 is 7 s long; the limit here is 5 s. Cut out the part in question",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "headers", "status", "text"),
    [
        (b"{}", {"content-type": "application/json"}, 415, "content type"),
        (b"x=1", {"content-type": "application/x-www-form-urlencoded"}, 415, "application/octet-stream"),
        (b"abc", {"content-type": "multipart/form-data"}, 400, ""),
        (b"abc", {"content-type": "multipart/form-data; boundary=x"}, 400, ""),
        (b"--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nb\r\n--x--\r\n",
         {"content-type": "multipart/form-data; boundary=x"}, 400, "holds no file"),
        (bytes(2_000_001), {"content-type": "image/jpeg"}, 413, "2 MB"),
    ],
)  # fmt: skip
def test_requests_that_are_wrong(
    client: TestClient, service: Service, content: bytes, headers: dict[str, str], status: int, text: str
) -> None:
    answer = client.post("/v1/predict", content=content, headers=headers)
    found, record = checked(answer.status_code, answer.text)
    assert found == status
    assert text in record["error"]


def test_two_files_are_refused(client: TestClient, service: Service) -> None:
    answer = client.post("/v1/predict", files=[("file", ("a.jpg", jpeg())), ("file", ("b.jpg", jpeg()))])
    assert checked(answer.status_code, answer.text)[0] == 400


@pytest.mark.parametrize("path", ["/v1/predict", "/gradio_api/upload", "/gradio_api/queue/join"])
def test_a_body_is_refused_while_it_is_read(app: Any, service: Service, path: str) -> None:
    """Whatever its length claims: an endless body is cut off at the limit, and nothing of it stays."""
    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 100_000
        assert read < 10_000_000, "it is read without end"
        return {"type": "http.request", "body": bytes(100_000), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"10")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": headers, "scheme": "http",
        "server": ("localhost", 80), "client": ("127.0.0.1", 9), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert read <= LIMITS.max_bytes + 100_000


def test_a_connection_that_ends_leaves_nothing(app: Any, service: Service) -> None:
    messages = [{"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/predict",
        "raw_path": b"/v1/predict", "query_string": b"", "headers": [], "scheme": "http",
        "server": ("localhost", 80), "client": ("127.0.0.1", 9), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400


# ------------------------------------------------------------------------------------------------------- file names


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300) | st.from_regex(r"(\.\./|/|\\|\x00)+\w+")
)
def test_names_are_plain(name: str) -> None:
    plain = plain_name(name)
    assert plain
    assert len(plain) <= 120
    assert plain.isprintable()
    assert not set(plain) & {"/", "\\"}
    assert plain_name(plain) == plain


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        ["../", "/etc/", "..\\", "C:\\", "\x00", "%2e%2e/", "~/", "$(id)", "file:", "http://x/", "ü", "\u202e", ""]
    ),
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
    st.sampled_from(["", ".jpg", ".mp4", ".eps", ".txt", ".JPG\x00.exe"]),
)
def test_names_name_nothing_on_the_disk(
    client: TestClient, service: Service, start: str, middle: str, end: str
) -> None:
    before = sorted(service.folder.rglob("*"))
    answer = client.post("/v1/predict", params={"name": start + middle + end}, content=b"nothing")
    status, record = checked(answer.status_code, answer.text)
    assert status == 422
    assert record["source"] == plain_name(start + middle + end)
    assert sorted(service.folder.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------- doors


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://x/",
        "/gradio_api/stream/x/y/z/playlist.m3u8", "/gradio_api/info", "/config", "/monitoring",
        "/gradio_api/deep_link", "/gradio_api/runs", "/gradio_api/vibe-code", "/gradio_api/upload_progress",
        "/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py", "/static/..%2f..%2froutes.py", "/docs",
        "/gradio_api/custom_component/1/client/component/..%2f..%2fx", "/svelte/../routes.py", "//etc/passwd",
    ],
)  # fmt: skip
def test_nothing_else_is_open(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (400, 403, 404), answer.text[:200]
    assert "root:" not in answer.text
    for method in ("post", "put", "delete"):
        assert getattr(client, method)(path).status_code in (400, 403, 404, 405)


@pytest.mark.parametrize("path", ["/etc/passwd", "http://127.0.0.1:9/", "../x"])
def test_an_event_names_no_file(client: TestClient, path: str) -> None:
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in ([file, None], [None, [file]], {"a": file}, "x"):
        body = {"data": data, "fn_index": 0, "session_hash": "abc", "event_data": None, "trigger_id": 1}
        assert client.post("/gradio_api/queue/join", json=body).status_code == 400


def test_an_upload_of_the_page_is_answered_with_a_token(client: TestClient, service: Service) -> None:
    answer = client.post("/gradio_api/upload", files={"files": ("../../a.jpg", jpeg())})
    (token,) = answer.json()
    assert re.fullmatch(r"[0-9a-f]{32}", token)
    upload = service.find(token)
    assert upload is not None
    assert upload.name == "a.jpg"
    assert service.score(upload).record["verdict"] == "no face"
    assert service.find(token) is None
    assert service.find("/etc/passwd") is None


def test_the_page_stays_at_home(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert page.TITLE in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "fonts.googleapis" not in answer.text + client.get("/theme.css").text
    assert "fsvfm-serve" not in answer.text


def test_the_description_is_complete(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= DOCUMENTED
    names = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert names <= set(described["components"]["schemas"])
    assert "$defs" not in json.dumps(described)
    health = client.get("/health").json()
    assert violations(health, described["components"]["schemas"]["health"]) == []
    assert health["status"] == "ok"


# -------------------------------------------------------------------------------------------------- many and broken


def test_mutated_files_never_take_it_down(client: TestClient, service: Service, clip: Path) -> None:
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg())).save(out, "PNG")
    seeds = {"a.jpg": jpeg(), "a.png": out.getvalue(), "a.mp4": clip.read_bytes(), "a": jpeg()}
    statuses = set()
    for number in range(300):
        name = list(seeds)[number % len(seeds)]
        data = bytearray(seeds[name])
        head = len(data) if rng.random() < 0.5 else 200
        for _ in range(int(rng.integers(1, 12))):
            data[int(rng.integers(head))] = int(rng.integers(256))
        if rng.random() < 0.3:
            del data[int(rng.integers(len(data))) :]
        status, _ = post(client, bytes(data), name)
        statuses.add(status)
    assert statuses == {200, 422}
    assert client.get("/health").status_code == 200


def test_several_at_once_and_too_many(client: TestClient, service: Service, photo: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda n: post(client, photo.read_bytes(), f"{n}.png"), range(6)))
    assert [(status, record["source"]) for status, record in results] == [(200, f"{n}.png") for n in range(6)]
    assert len({record["probability"] for _, record in results}) == 1
    with ExitStack() as places:
        for _ in range(LIMITS.queue + LIMITS.concurrency):
            places.enter_context(service._place())
        answer = client.post("/v1/predict", files={"file": ("a.jpg", jpeg())})
        assert checked(answer.status_code, answer.text)[0] == 429
        assert int(answer.headers["retry-after"]) > 0
    assert post(client, jpeg())[0] == 200
    uploads = []
    while len(uploads) < 100 and client.post("/gradio_api/upload", files={"f": ("a.jpg", jpeg())}).status_code == 200:
        uploads = list(service._uploads.values())  # uploads that nobody asks to score do not fill the disk
    assert len(uploads) == LIMITS.queue + 2 * LIMITS.concurrency
    for upload in uploads:
        upload.arrived -= 1e6
    assert post(client, jpeg())[0] == 200  # forgotten ones make room


@pytest.mark.slow  # each new process loads everything anew
def test_what_hangs_or_crashes_its_reader_is_given_up(client: TestClient, service: Service, photo: Path) -> None:
    """A process that stops answering is replaced after the time limit, one that dies at once; others are not harmed."""
    (worker,) = service._workers
    before = service.limits
    os.kill(worker._process.pid or 0, signal.SIGSTOP)
    service.limits = dataclasses.replace(before, max_seconds=0.5)
    try:
        status, record = post(client, photo.read_bytes())
    finally:
        service.limits = before
    assert (status, record["error"]) == (504, "it took longer than the limit of 0.5 s")
    assert post(client, photo.read_bytes())[0] == 200
    process = worker._process
    os.kill(process.pid or 0, signal.SIGSTOP)
    killer = threading.Timer(0.5, process.kill)
    killer.start()
    status, record = post(client, photo.read_bytes())
    assert (status, record["error"]) in ((422, "a.jpg: the file made its reader crash; it is damaged"),)
    assert post(client, photo.read_bytes())[0] == 200


# --------------------------------------------------------------------------------------------------------- starting


def test_mistakes_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="max_pixels=0"):
        Limits(max_pixels=0)
    with pytest.raises(ConfigError, match="32 together"):
        Limits(queue=40)
    with pytest.raises(ConfigError, match="port=-1 cannot be listened on"):
        serve._listen("127.0.0.1", -1)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'fsvfm[serve]'")):
        serve._require_gradio()
