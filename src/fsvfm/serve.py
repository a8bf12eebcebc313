"""``python -m fsvfm.serve ckpt=<detector>``: a web page and an HTTP endpoint in front of :mod:`fsvfm.service`.

One application answers both: ``POST /v1/predict``, ``/health`` and ``/openapi.json`` here, the page by Gradio. What
Gradio could do beyond this page (serve files, fetch addresses, record, run further endpoints) is closed: only the
routes and values that the page uses get through.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from importlib import metadata, resources, util
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from fsvfm import cli
from fsvfm.errors import ConfigError
from fsvfm.predict import quoted
from fsvfm.service import Busy, Limits, Service, Stopped, TooSlow, Upload, plain_name

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PREDICT, PAGE_UPLOAD, JOIN = "/v1/predict", "/gradio_api/upload", "/gradio_api/queue/join"

#: What is answered at all; everything else of Gradio's routes is not there.
_OPEN = re.compile(
    r"/|/v1/predict|/health|/openapi\.json|/(theme\.css|favicon\.ico|robots\.txt|manifest\.json)|/(assets|static)/.*"
    r"|/gradio_api/(upload|queue/join|queue/data|heartbeat/\w+|theme\.css)"
)

#: Bytes of a request that is no upload.
_SMALL = 65_536

#: Browsers are told to fetch nothing from elsewhere and to show the page in no frame of another site.
_HEADERS = {
    "content-security-policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

#: Seconds that running requests get to end after the signal to stop.
_GRACE = 5


# --------------------------------------------------------------------------------------------------------------- door


class Door:
    """What every request passes first: known routes only, bodies within their limit, headers that keep browsers home.

    Bodies are counted as they come, so that a request is refused at its limit whatever length it claims.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # nothing here speaks over web sockets
        path = scope["path"]
        if not _OPEN.fullmatch(path) or ".." in path:
            await _refusal(404, "there is nothing here")(scope, receive, send)
            return
        upload = path in (PREDICT, PAGE_UPLOAD)
        most = self.limits.max_bytes if upload else _SMALL
        told = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if told.isdigit() and int(told) > most:
            await _too_large(most)(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in added if pair[0] not in known)]
            await send(message)

        if scope["method"] == "POST" and not upload:
            body = await _whole(receive, most)
            if body is None:
                await _too_large(most)(scope, receive, guarded)
                return
            if path == JOIN and not _is_plain(body):
                await _refusal(400, "the page sends texts and numbers only")(scope, receive, guarded)
                return
            receive = _again(body, receive)
        elif upload:
            receive = _counted(receive, most)
        await self.app(scope, receive, guarded)


def _refusal(status: int, text: str, **headers: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"error": text}, status, headers)


def _too_large(most: int) -> Response:
    return _refusal(413, _larger(most), connection="close")


def _larger(most: int) -> str:
    return f"the request is larger than the limit of {most / 1e6:g} MB"


async def _whole(receive: Receive, most: int) -> bytes | None:
    """A request's body, or None if it is larger than the limit."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, and then what else comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


def _counted(receive: Receive, most: int) -> Receive:
    """A body that ends with status 413 where it passes the limit."""
    from starlette.exceptions import HTTPException

    read = 0

    async def next_message() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(
                413, f"the request is larger than the limit of {most / 1e6:g} MB", {"connection": "close"}
            )
        return message

    return next_message


def _is_plain(body: bytes) -> bool:
    """Whether an event of the page holds no objects: Gradio would open or fetch files that they name."""
    try:
        data = json.loads(body)["data"]
        return isinstance(data, list) and not any(isinstance(value, dict | list) for value in data)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


# ------------------------------------------------------------------------------------------------------- application


def create_app(service: Service) -> FastAPI:
    """The application; it closes the service when it shuts down.

    Raises:
        ConfigError: Gradio is not installed.
    """
    _require_gradio()
    os.environ["GRADIO_TEMP_DIR"] = str(service.folder / "work")
    import gradio as gr
    from fastapi import FastAPI
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    from fsvfm import page

    async def predict(request: Request) -> Response:
        upload = await _received(request, service)
        scored = await run_in_threadpool(service.score, upload)
        return JSONResponse(scored.record, 200 if scored.record["error"] is None else 422)

    async def page_upload(request: Request) -> Response:
        return JSONResponse([(await _received(request, service)).token])

    async def health(request: Request) -> Response:
        state = service.state()
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    async def description(request: Request) -> Response:
        return JSONResponse(openapi(service.limits))

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _refusal(error.status_code, str(error.detail), **dict(error.headers or {}))
        status = 429 if isinstance(error, Busy) else 503 if isinstance(error, Stopped) else 504
        return _refusal(status, str(error), **({"retry-after": "30"} if status != 504 else {}))

    async def broken(request: Request, error: Exception) -> Response:
        return _refusal(500, "something went wrong here; the server's log says more")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        import asyncio

        async def tidy() -> None:
            while True:
                await asyncio.sleep(60)
                service.forget()

        task = asyncio.create_task(tidy())
        try:
            yield
        finally:
            task.cancel()
            await run_in_threadpool(service.close)

    handlers: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
        HTTPException: refused, Busy: refused, Stopped: refused, TooSlow: refused, Exception: broken,
    }  # fmt: skip
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(Door, limits=service.limits)
    app.add_route(PREDICT, predict, methods=["POST"])
    app.add_route(PAGE_UPLOAD, page_upload, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/openapi.json", description, methods=["GET"])
    return gr.mount_gradio_app(
        app,
        page.build(service),
        path="/",
        theme=page.theme(),
        css=page.CSS,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=service.limits.max_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
    )


async def _received(request: Request, service: Service) -> Upload:
    """Write what a request sends to a file; nothing of it stays if it cannot be completed."""
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    upload = service.expect()
    try:
        if media == "multipart/form-data":
            async with request.form(max_files=1, max_fields=8) as form:
                file = next((value for value in form.values() if isinstance(value, UploadFile)), None)
                if file is None:
                    raise HTTPException(400, "the form holds no file; send it as: curl -F file=@photo.jpg …")
                upload.name = plain_name(file.filename)
                with upload.path.open("wb") as out:
                    await run_in_threadpool(shutil.copyfileobj, file.file, out)
        elif media in ("", "application/octet-stream") or media.startswith(("image/", "video/")):
            upload.name = plain_name(request.query_params.get("name"))
            with upload.path.open("wb") as out:
                async for chunk in request.stream():
                    out.write(chunk)
        else:
            raise HTTPException(
                415,
                f"the content type {plain_name(media)} is not taken; send multipart/form-data with one file, or the "
                "file itself as application/octet-stream, image/… or video/…",
            )
    except ClientDisconnect:
        service.remove(upload)
        raise HTTPException(400, "the connection ended before the file was complete") from None
    except BaseException:
        service.remove(upload)
        raise
    return upload


# ---------------------------------------------------------------------------------------------------------- description


def openapi(limits: Limits) -> dict[str, Any]:
    """OpenAPI 3.1 description of the endpoint."""
    text = (resources.files("fsvfm") / "prediction.schema.json").read_text(encoding="utf-8")
    record = json.loads(text.replace("#/$defs/", "#/components/schemas/"))
    schemas = {
        "prediction": {key: value for key, value in record.items() if key not in ("$schema", "$defs")},
        **record["$defs"],
        "problem": {
            "type": "object",
            "required": ["error"],
            "properties": {"error": {"type": "string", "description": "What is wrong and what to do about it."}},
        },
        "health": {
            "type": "object",
            "required": ["status", "version", "task", "members", "uploads"],
            "properties": {
                "status": {"enum": ["ok", "stopping"]},
                "version": {"type": "string"},
                "task": {"enum": ["forgery", "antispoof"]},
                "members": {"type": "array", "items": {"type": "string"}, "description": "The detectors' names."},
                "uploads": {"type": "integer", "minimum": 0, "description": "Being scored or waiting."},
            },
        },
    }

    def answer(text: str, schema: str = "problem", *, retry: bool = False) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        headers = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}} if retry else {}
        return {"description": text, "content": content, **({"headers": headers} if headers else {})}

    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "string", "format": "binary", "description": "The photograph or video."}},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fsvfm",
            "version": metadata.version("fsvfm"),
            "description": f"Scores the faces of a photograph or video. Limits: {limits.text()}.",
        },
        "paths": {
            PREDICT: {
                "post": {
                    "operationId": "predict",
                    "summary": "Score a photograph or a video",
                    "parameters": [
                        {
                            "name": "name",
                            "in": "query",
                            "required": False,
                            "schema": {"type": "string"},
                            "description": "The file's name where the body is the file itself; it becomes `source`.",
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "description": f"One file; at most {limits.max_upload_mb:g} MB with everything around it.",
                        "content": {
                            "multipart/form-data": {"schema": form},
                            "application/octet-stream": binary,
                            "image/*": binary,
                            "video/*": binary,
                        },
                    },
                    "responses": {
                        "200": answer("The result; without a face its verdict is `no face`.", "prediction"),
                        "400": answer("No file, more than one, or a broken form."),
                        "413": answer(f"Larger than {limits.max_upload_mb:g} MB."),
                        "415": answer("A content type that is not taken."),
                        "422": answer(
                            "The file cannot be scored, and `error` says why: no picture or video, damaged, too many "
                            "pixels, too long.",
                            "prediction",
                        ),
                        "429": answer("Too many uploads are waiting.", retry=True),
                        "500": answer("A mistake of the server."),
                        "503": answer("The server is stopping.", retry=True),
                        "504": answer(f"It took longer than {limits.max_seconds:g} s."),
                    },
                }
            },
            "/health": {
                "get": {
                    "operationId": "health",
                    "summary": "Whether uploads are taken",
                    "responses": {
                        "200": answer("They are.", "health"),
                        "503": answer("The server is stopping.", "health"),
                    },
                }
            },
        },
        "components": {"schemas": schemas},
    }


# -------------------------------------------------------------------------------------------------------- the command


def serve(cfg: DictConfig) -> None:
    """Serve until a signal to stop.

    Raises:
        ConfigError: a value is missing or impossible, Gradio is not installed, or the address cannot be listened on.
    """
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise ConfigError("ckpt=… must be given: python -m fsvfm.serve ckpt=<detector>")
    _require_gradio()
    settings: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    limits = Limits(**settings.pop("limits"))
    host, port = str(settings.pop("host")), settings.pop("port")
    listener = _listen(host, port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # before uvicorn takes over and after it gives back
    cli.say("loading the detector …")
    service = None
    try:
        service = Service(settings, limits)
        _run(service, listener, host)
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        if service is not None:
            service.close()
            cli.say("stopped")


def _run(service: Service, listener: socket.socket, host: str) -> None:
    import uvicorn

    shown = f"[{host}]" if ":" in host else host
    for note in service.facts["notes"]:
        cli.say(f"warning: {note}")
    cli.say(service.facts["threshold"])
    limits = service.limits
    cli.say(f"limits: {limits.text()}; {limits.concurrency} at a time, {limits.queue} waiting")
    if not host.startswith("127.") and host not in ("localhost", "::1"):
        cli.say(
            f"warning: {host} lets other machines in, and nobody is asked for a password; put a server with "
            "authentication and TLS in front (docs/serving.md)"
        )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            cli.say(f"serving on http://{shown}:{listener.getsockname()[1]} (Ctrl-C stops)")

    config = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE,
        limit_concurrency=256, server_header=False,
    )  # fmt: skip
    with suppress(KeyboardInterrupt):
        Server(config).run(sockets=[listener])


def _listen(host: str, port: Any) -> socket.socket:
    """A socket at the address, before anything takes time."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"host={host} port={port} cannot be listened on ({error}); choose another port") from None
    return listener


def _require_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it reads this when it is imported
    if util.find_spec("gradio") is None:
        raise ConfigError("the web page needs Gradio, which is not installed: pip install 'fsvfm[serve]'")


@cli.command("serve")
def _main(cfg: DictConfig) -> None:
    serve(cfg)


def main() -> None:
    """Serve as the command line says."""
    sys.argv[1:] = quoted(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
