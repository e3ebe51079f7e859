"""The HTTP interface: POST /v1/images/generations, GET /healthz, GET / (a page to try it).

The model runs in one worker thread, so the event loop stays free; waiting requests are limited.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fewstep.errors import UserError
from fewstep.runtime import images
from fewstep.runtime.student import Student
from fewstep.serve import prompts, schema
from fewstep.serve.page import page

try:
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.exceptions import HTTPException as StarletteHTTPException
except ImportError as error:
    raise UserError("the server needs two packages: pip install fastapi uvicorn.") from error

LARGEST_BODY = 64 * 1024  # bytes
MOST_WAITING = 32  # requests
MOST_STEPS = 256

logger = logging.getLogger("fewstep.serve")


@dataclass(frozen=True)
class _Order:
    """A validated request."""

    label: int | None
    seeds: list[int]
    steps: int
    guidance: float | None
    size: tuple[int, int] | None


def create_app(student: Student, name: str = "fewstep") -> FastAPI:
    """The application around one artefact, known to clients as model `name`.

    Raises UserError where its images are not pictures (1 or 3 channels).
    """
    if len(student.image_shape) != 3 or student.image_shape[0] not in {1, 3}:
        raise UserError(f"images of shape {list(student.image_shape)} cannot be served; 1 or 3 channels are needed.")
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fewstep-model")
    waiting = 0

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shutdown(wait=True, cancel_futures=True)

    app = FastAPI(title="fewstep", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    async def drawn(order: _Order, as_sheet: bool) -> list[bytes]:
        nonlocal waiting
        if waiting >= MOST_WAITING:
            raise HTTPException(503, f"{MOST_WAITING} requests are waiting already; try again in a moment.")
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(worker, _draw, student, order, as_sheet)
        finally:
            waiting -= 1

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        order = _order(student, name, schema.parse(await _body(request)))
        as_sheet = "image/png" in request.headers.get("accept", "")
        begun = time.perf_counter()
        pictures = await drawn(order, as_sheet)
        seconds = time.perf_counter() - begun
        if as_sheet:
            headers = {"x-fewstep-seeds": ",".join(map(str, order.seeds)), "x-fewstep-seconds": f"{seconds:.4f}"}
            return Response(pictures[0], media_type="image/png", headers=headers)
        data = [
            {"b64_json": base64.b64encode(content).decode(), "seed": seed}
            for content, seed in zip(pictures, order.seeds)
        ]
        return JSONResponse({"created": int(time.time()), "data": data, "steps": order.steps, "seconds": seconds})

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {
            "status": "ok",
            "model": name,
            "kind": student.kind,
            "steps": list(student.steps_offered),
            "classes": student.classes,
            "image_shape": list(student.image_shape),
        }

    @app.get("/", response_class=HTMLResponse)
    async def home() -> str:
        return page(student, name)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        return _failure(400, str(error), "invalid_request_error")

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        detail = error.detail
        if error.status_code in {404, 405}:
            detail = f"there is no {request.method} {request.url.path[:80]}; use POST /v1/images/generations."
        return _failure(error.status_code, detail, kind)

    @app.exception_handler(Exception)
    async def server_error(request: Request, error: Exception) -> JSONResponse:
        logger.error("a request failed", exc_info=error)
        return _failure(500, "the server failed on this request; its log says why.", "server_error")

    return app


def _draw(student: Student, order: _Order, as_sheet: bool) -> list[bytes]:
    """The PNG of each image, or one of all: encoding 64 large pictures takes a second, so it is the worker's too."""
    drawn = student.sample(len(order.seeds), order.label, order.steps, order.seeds, order.guidance)
    if as_sheet and len(drawn) > 1:
        return [images.png(images.side_by_side([images.picture(image, order.size) for image in drawn]))]
    return [images.png(images.picture(image, order.size)) for image in drawn]


def _order(student: Student, name: str, request: schema.GenerationRequest) -> _Order:
    """Everything that can be refused is refused here, before the model runs."""
    if request.model is not None and request.model != name:
        raise UserError(f"model {request.model!r} is not served here; leave it out or ask for {name!r}.")
    label = request.label
    if request.prompt is not None:
        if label is not None:
            raise UserError("both prompt and class are given; give one of them.")
        label = prompts.parse(request.prompt, student.classes)
    if student.classes is not None:
        if label is None:
            raise UserError('neither prompt nor class is given; send a prompt such as "7" or a class.')
        if not 0 <= label < student.classes:
            raise UserError(f"class {label} is out of range; choose a whole number from 0 to {student.classes - 1}.")
    elif label is not None:
        raise UserError("this model knows no classes; leave class out.")
    if request.seeds is not None:
        if request.seed is not None:
            raise UserError("both seed and seeds are given; give one of them.")
        if "n" in request.model_fields_set and request.n != len(request.seeds):
            raise UserError(f"n is {request.n} but there are {len(request.seeds)} seeds; leave n out.")
        if any(not 0 <= seed <= schema.LARGEST_SEED for seed in request.seeds):
            raise UserError("a seed is out of range; seeds are whole numbers from 0 to 2^63 - 1.")
        seeds = request.seeds
    else:
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        seeds = list(range(first, first + request.n))
    steps = request.steps if request.steps is not None else (max(student.steps_offered, default=None))
    if steps is not None and steps > MOST_STEPS:
        raise UserError(f"steps is {steps}, at most {MOST_STEPS} are served.")
    student.plan(steps, request.guidance)
    _, height, width = student.image_shape
    return _Order(label, seeds, int(steps or 0), request.guidance, schema.size(request.size, (width, height)))


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is larger than LARGEST_BODY."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise HTTPException(413, f"the body is larger than {LARGEST_BODY} bytes; a request needs a few hundred.")
    return bytes(content)


def _failure(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)
