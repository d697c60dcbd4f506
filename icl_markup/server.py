"""The HTTP server around a classifier: ``/classify``, ``/intents``, ``/prompt``, ``/healthz``, ``/metrics``, a page."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.staticfiles import StaticFiles

from icl_markup.classifier import MarkupClassifier
from icl_markup.classifier_input import checked_texts
from icl_markup.errors import ConfigError, MarkupError
from icl_markup.inspection import prompt_pieces
from icl_markup.intents import Intents, NotSavedError, UnknownLabelError
from icl_markup.microbatch import BusyError, MicroBatcher
from icl_markup.predict import Answer, ask_classifier, largest
from icl_markup.server_bodies import (
    ClassifyAnswer,
    ClassifyAnswers,
    ClassifyBody,
    ComposedPrompt,
    Health,
    Intent,
    IntentBody,
    IntentList,
    Problem,
    PromptBody,
    PromptPiece,
    Removed,
)
from icl_markup.server_guard import Guard
from icl_markup.server_metrics import ServerMetrics

_LOG = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
WARM_UP = "hello"
"""The text that is asked before requests are taken: the first one of all has stored texts embedded."""

_HELD = 64
"""The bodies of all requests together take at most so many times the bytes of the largest one."""

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": what}
    for code, what in {
        401: "an API key is set, and the request has none or another",
        413: "the body is too large",
        422: "the input is at fault; the answer says what",
        503: "the queue is full, or the server is shutting down; see Retry-After",
    }.items()
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "there is no such label"}}


def create_app(
    classifier: MarkupClassifier,
    *,
    api_key: str | None = None,
    save: str | Path | None = None,
    hosts: Collection[str] = (),
    most_bytes: int = 2**20,
    body_seconds: float = 30.0,
    most_batch: int = 64,
    batch_wait_ms: float = 3.0,
    most_waiting: int = 1024,
) -> FastAPI:
    """Return the application that serves a fitted classifier; it starts and ends its worker with its lifespan.

    Its lifespan begins with a text that is asked, so that the first request does not wait for what is computed once; a
    `MarkupError` of that text is raised. `app.state.batcher` is the `MicroBatcher`.

    Args:
        classifier: the classifier; from then on only the application's worker may use it.
        api_key: what requests must bring along as `X-API-Key` or `Authorization: Bearer`; None: nothing.
        save: a folder that the classifier is written to after each change of its intents; None: none.
        hosts: the names that requests may address the server by; empty: any.
        most_bytes: the most bytes of a request's body.
        body_seconds: seconds within which a body must have arrived.
        most_batch: the most texts that are answered together.
        batch_wait_ms: milliseconds that a text waits for others.
        most_waiting: the most texts that wait; requests beyond are answered with 503.

    Raises:
        ConfigError: a number is out of range, or the key has other characters than printable ASCII.
        NotFittedError: the classifier has no labels yet.
    """
    if most_bytes < 1 or body_seconds <= 0:
        raise ConfigError(f"bodies of {most_bytes} bytes within {body_seconds} seconds: give positive numbers")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ConfigError("the API key is empty or has other characters than printable ASCII without spaces")
    model = classifier.fitted_model()
    metrics = ServerMetrics(lambda: batcher.waiting, lambda: len(classifier.labels()), model.prefixes)

    def answer(texts: list[str]) -> list[Answer]:
        return ask_classifier(classifier)(texts)  # the labels are those of the moment

    batcher = MicroBatcher(
        answer,
        most_batch=most_batch,
        wait_ms=batch_wait_ms,
        most_waiting=most_waiting,
        on_batch=metrics.batch,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await batcher.start()
        try:
            await batcher.call(lambda: answer([WARM_UP]))
            yield
        except BaseException:
            batcher.give_up()
            raise
        finally:
            await batcher.close()

    app = FastAPI(
        title="icl-markup",
        description="Classifies texts with a frozen language model, label names and a few examples.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # the framework's own page loads its scripts from another site
        redoc_url=None,
    )
    keys = [Security(APIKeyHeader(name="X-API-Key", auto_error=False)), Security(HTTPBearer(auto_error=False))]
    for router in (_answers(classifier, batcher, metrics), _intents(classifier, batcher, Intents(classifier, save))):
        app.include_router(router, dependencies=keys if api_key is not None else None)

    @app.get("/healthz", responses={503: _PROBLEMS[503]})
    async def healthz() -> Health:
        """Say whether requests are taken; needs no key."""
        if not batcher.running:
            raise BusyError("the server is shutting down")
        return Health(status="ok", labels=len(classifier.labels()), backbone=model.backbone.name)

    for path, file in (("/", "index.html"), ("/docs", "docs.html")):
        app.add_api_route(path, _file(PAGE / file), include_in_schema=False)
    app.mount("/static", StaticFiles(directory=PAGE))
    _add_errors(app)
    app.state.batcher = batcher
    app.add_middleware(
        Guard,
        api_key=api_key,
        hosts=hosts,
        most_bytes=most_bytes,
        most_held=_HELD * most_bytes,
        body_seconds=body_seconds,
        most_inside=most_waiting + most_batch,
        is_full=lambda: batcher.full,
        is_ending=lambda: not batcher.running,
        on_request=metrics.request,
    )
    return app


def _answers(classifier: MarkupClassifier, batcher: MicroBatcher, metrics: ServerMetrics) -> APIRouter:
    router = APIRouter(responses=_PROBLEMS)

    @router.post("/classify")
    async def classify(body: ClassifyBody) -> ClassifyAnswers:
        """Classify texts; those of concurrent requests are answered together."""
        texts = checked_texts(body.all(), "texts")
        found: list[Answer] = await batcher.answers(texts)
        metrics.classified(len(texts))
        return ClassifyAnswers(
            answers=[
                ClassifyAnswer(label=str(one["label"]), probabilities=largest(one["probabilities"], body.top))
                for one in found
            ]
        )

    @router.post("/prompt")
    async def prompt(body: PromptBody) -> ComposedPrompt:
        """Compose the prompt that a text is asked with, piece by piece."""
        [text] = checked_texts([body.text], "text")
        return await batcher.call(lambda: _composed(classifier, text))

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Count and time requests, texts and batches, in Prometheus's text format."""
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def _intents(classifier: MarkupClassifier, batcher: MicroBatcher, intents: Intents) -> APIRouter:
    router = APIRouter(prefix="/intents", responses=_PROBLEMS)

    @router.get("")
    async def list_intents() -> IntentList:
        """List labels with their examples."""
        rows = await batcher.call(intents.rows)
        return IntentList(intents=[Intent(**row) for row in rows], none_of_the_above=classifier.none_of_the_above)

    @router.post("")
    async def add_intent(body: IntentBody) -> Intent:
        """Add a label, or examples to a label that is there; examples that it has are passed over."""
        return Intent(**await batcher.call(lambda: intents.put(body.label, body.examples, body.description)))

    @router.put("")
    async def replace_intent(body: IntentBody) -> Intent:
        """Add a label, or replace the examples of a label that is there."""
        change = lambda: intents.put(body.label, body.examples, body.description, replace=True)  # noqa: E731
        return Intent(**await batcher.call(change))

    @router.delete("", responses=_UNKNOWN)
    async def remove_named_intent(label: str = Query(description="the label; a path cannot hold . or ..")) -> Removed:
        """Remove a label with its examples."""
        await batcher.call(lambda: intents.remove(label))
        return Removed(removed=label)

    @router.delete("/{label:path}", responses=_UNKNOWN)
    async def remove_intent(label: str) -> Removed:
        """Remove a label with its examples; the label may hold slashes."""
        await batcher.call(lambda: intents.remove(label))
        return Removed(removed=label)

    return router


def _composed(classifier: MarkupClassifier, text: str) -> ComposedPrompt:
    prompt, options = classifier.compose(text)
    pieces = [
        PromptPiece.model_validate(
            {"kind": piece.kind, "text": shown, "tokens": len(piece.ids), "segment": piece.segment}
        )
        for piece, shown in prompt_pieces(classifier.fitted_model(), prompt)
    ]
    return ComposedPrompt(
        pieces=pieces,
        options=options,
        tokens=len(prompt.ids),
        slots=sum(slot.is_query for slot in prompt.slots),
        shortened=prompt.shortened,
        dropped=prompt.dropped,
    )


def _file(path: Path) -> Any:
    async def file() -> FileResponse:
        return FileResponse(path, media_type="text/html; charset=utf-8")

    return file


def _add_errors(app: FastAPI) -> None:
    """Answer every error with one sentence, and none with what the request held: that may be no JSON (NaN)."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, "; ".join(_told(one) for one in error.errors()[:3]))

    @app.exception_handler(MarkupError)
    async def refused(_request: Request, error: MarkupError) -> JSONResponse:
        return _problem(404 if isinstance(error, UnknownLabelError) else 422, str(error))

    @app.exception_handler(BusyError)
    async def busy(_request: Request, error: BusyError) -> JSONResponse:
        return _problem(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(NotSavedError)
    async def unsaved(_request: Request, error: NotSavedError) -> JSONResponse:
        return _problem(500, str(error))

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return _problem(500, "the server failed at this request; its log says why")


def _told(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"][1:]) or "body"
    return f"{place[:120]}: {error['msg']}"


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
