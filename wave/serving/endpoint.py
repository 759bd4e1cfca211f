"""The OpenAI API in front of a service: chat, completions, models; streaming; errors in its format. Also `/metrics`, `/health` and `/version`.

A request is checked whole before it is handed in. A client that goes away takes its request with it. What the server does not do is refused by name rather
than ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from waveos.errors import WaveError
from waveos.serving.metrics import Metrics
from waveos.serving.service import Ask, Service
from waveos.serving.text import VOCABULARY, decode, encode, encode_chat

MOST_BYTES = 8 << 20
"""Of a request's body."""
MOST_PROMPTS = 128
"""Of one request: others are heard in between."""
MOST_ERRORS = 1_000
"""Of a body's, that are looked at to tell the one that matters: a million take seconds."""
LONGEST_NAME = 200
"""Of a wrong argument, as far as it is said: it may be as long as the body."""
_Item = TypeVar("_Item")
Items = Annotated[list[_Item], Field(fail_fast=True)]
"""A list of which the first wrong item is told: to tell a million would keep others waiting."""
DEFAULT_TOKENS = {"completion": 16, "chat": 256}


class ApiError(Exception):
    """An answer in the API's error format."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """What else a stream brings."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """Parameters of both kinds of requests. Those with one allowed value are there for clients that always send them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # none: the likeliest token
    seed: int | None = None
    user: str | None = None
    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None


class Completion(Common):
    """POST /v1/completions."""

    prompt: str | Items[int] | Items[str]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart]
    name: str | None = None
    refusal: None = None  # these are in an answer as the openai client gives it back
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Common):
    """POST /v1/chat/completions."""

    messages: Annotated[Items[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


@dataclass
class Answer:
    """One choice in the making. Text that may turn out to be the beginning of a stop sequence is held back."""

    ask: Ask
    stops: list[str]
    text: str = ""
    told: int = 0
    reason: str | None = None

    def grow(self, token: int) -> str:
        """Take a token; the text that can be told now."""
        self.text += decode([token])
        held = max((len(each) - (not self.text.endswith(each)) for each in self.stops), default=0)
        return self._until(len(self.text) - held)

    def end(self, reason: str) -> str:
        """Take the end; the text that is left, without the stop sequence."""
        self.reason = reason
        cut = next((len(self.text) - len(each) for each in self.stops if self.text.endswith(each)), len(self.text)) if reason == "stop" else None
        self.text = self.text[:cut]
        return self._until(len(self.text))

    def _until(self, end: int) -> str:
        new = self.text[self.told : max(self.told, end)]
        self.told += len(new)
        return new


class Endpoint:
    """The routes over one service."""

    def __init__(self, service: Service, model: str) -> None:
        self.service, self.model, self.metrics = service, model, Metrics(service, model)
        self.began = int(time.time())

    def app(self) -> Starlette:
        """The application, for any ASGI server."""
        made = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.one_model),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/health", self.health),
                Route("/version", self.version),
                Route("/metrics", self.tell_metrics),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _no_route, ClientDisconnect: _nobody, Exception: _own_fault},
        )
        made.router.redirect_slashes = False  # a redirect is no answer of the API
        return made

    # ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────

    async def models(self, _request: HttpRequest) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def one_model(self, request: HttpRequest) -> Response:
        """The model of that name."""
        self._check_model(request.path_params["model"])
        return JSONResponse(self._about())

    async def health(self, _request: HttpRequest) -> Response:
        """200 while requests can be served."""
        why = self.service.failed or self.service.agent.away
        return Response(status_code=200) if why is None else JSONResponse({"status": why}, 503)

    async def version(self, _request: HttpRequest) -> Response:
        """Of Wave."""
        from importlib.metadata import version

        return JSONResponse({"version": version("waveos")})

    async def tell_metrics(self, _request: HttpRequest) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def completions(self, request: HttpRequest) -> Response:
        """Text that follows a prompt, or each of several."""
        asked = await _read(request, Completion)
        self._check_model(asked.model)
        if isinstance(asked.prompt, str):
            prompts = [encode(asked.prompt)]
        elif not asked.prompt:
            raise ApiError(400, "prompt is empty", param="prompt")
        elif isinstance(asked.prompt[0], str):
            if len(asked.prompt) > MOST_PROMPTS:
                raise ApiError(
                    400, f"prompt has {len(asked.prompt)} texts; {MOST_PROMPTS} at most in one request", param="prompt", code="invalid_value"
                )
            prompts = [encode(str(each)) for each in asked.prompt]
        else:
            prompts = [[int(each) for each in asked.prompt]]
            if not all(0 <= each < VOCABULARY for each in prompts[0]):
                raise ApiError(400, f"prompt has tokens beyond 0 to {VOCABULARY - 1}", param="prompt")
        return await self._answer(request, asked, prompts, asked.max_tokens or DEFAULT_TOKENS["completion"], "text_completion")

    async def chat(self, request: HttpRequest) -> Response:
        """What the assistant says next."""
        asked = await _read(request, Chat)
        self._check_model(asked.model)
        tokens = encode_chat([(each.role, each.text) for each in asked.messages])
        wanted = asked.max_completion_tokens or asked.max_tokens
        most = wanted or max(1, min(DEFAULT_TOKENS["chat"], self.service.room - len(tokens)))
        return await self._answer(request, asked, [tokens], most, "chat.completion")

    def _about(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.began, "owned_by": "wave", "max_model_len": self.service.room}

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(404, f"The model `{name}` does not exist; there is `{self.model}`.", param="model", code="model_not_found")

    # ── how it is answered ───────────────────────────────────────────────────────────────────────────────────────────

    async def _answer(self, request: HttpRequest, asked: Common, prompts: list[list[int]], most: int, kind: str) -> Response:
        longest, room = max(len(each) for each in prompts), self.service.room
        if longest + most > room:
            raise ApiError(
                400,
                f"This model's maximum context length is {room} tokens. However, you requested {longest + most} tokens ({longest} in the "
                f"{'messages' if kind.startswith('chat') else 'prompt'}, {most} in the completion). Please reduce their length.",
                param="messages" if kind.startswith("chat") else "prompt",
                code="context_length_exceeded",
            )
        stops = [each for each in ([asked.stop] if isinstance(asked.stop, str) else asked.stop or []) if each]
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, str, Any]]()

        def tell(at: int, what: str, value: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (at, what, value))

        def stopped(generated: list[int]) -> bool:
            return any(decode(generated[-len(each) :]).endswith(each) for each in stops)

        answers = []
        try:
            for at, prompt in enumerate(prompts):
                ask = Ask(prompt, most, lambda what, value, at=at: tell(at, what, value), stopped, asked.temperature or 0.0, asked.seed or 0)  # type: ignore[misc]
                self.service.submit(ask)
                answers.append(Answer(ask, stops))
        except WaveError as error:
            raise ApiError(503, str(error)) from error
        about = {"id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        if not asked.stream:
            return await self._whole(request, answers, events, {**about, "object": kind})
        first = await self._first(request, answers, events)
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        name = kind + (".chunk" if kind.startswith("chat") else "")
        return _Stream(self._stream(answers, events, {**about, "object": name}, usage, first), lambda: self._leave(answers))

    def _leave(self, answers: list[Answer]) -> None:
        """Who asked has gone, or has all."""
        for answer in answers:
            self.service.leave(answer.ask.number)

    async def _first(self, request: HttpRequest, answers: list[Answer], events: Any) -> tuple[int, str, Any]:
        """The first event, before the stream begins: what fails until then is an error of the API with its status."""
        async with self._kept(answers):
            event: tuple[int, str, Any] = await _unless_gone(request, events.get())
            if event[1] == "failed":
                raise ApiError(503, str(event[2]))
        return event

    @contextlib.asynccontextmanager
    async def _kept(self, answers: list[Answer]) -> AsyncIterator[None]:
        """Whatever ends this early takes the requests with it."""
        try:
            yield
        except BaseException:
            self._leave(answers)
            raise

    async def _whole(self, request: HttpRequest, answers: list[Answer], events: Any, about: dict[str, Any]) -> Response:
        async with self._kept(answers):
            while any(each.reason is None for each in answers):
                at, what, value = await _unless_gone(request, events.get())
                if what == "failed":
                    raise ApiError(503, str(value))
                _ = answers[at].grow(value) if what == "token" else answers[at].end(value)
        chat = about["object"].startswith("chat")
        choices = []
        for index, each in enumerate(answers):
            said = {"message": {"role": "assistant", "content": each.text, "refusal": None}} if chat else {"text": each.text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": each.reason})
        return JSONResponse({**about, "choices": choices, "usage": _usage(answers)})

    async def _stream(
        self, answers: list[Answer], events: Any, about: dict[str, Any], usage: bool, first: tuple[int, str, Any]
    ) -> AsyncIterator[str]:
        chat = about["object"].startswith("chat")

        def chunk(index: int, text: str, reason: str | None, role: bool = False) -> str:
            delta = {"delta": ({"role": "assistant"} if role else {}) | ({"content": text} if text or role else {})} if chat else {"text": text}
            choice = {"index": index, **delta, "logprobs": None, "finish_reason": reason}
            return _event({**about, "choices": [choice], **({"usage": None} if usage else {})})

        if chat:
            yield chunk(0, "", None, role=True)
        event: tuple[int, str, Any] | None = first
        while any(each.reason is None for each in answers):
            at, what, value = event or await events.get()
            event = None
            if what == "failed":
                yield _event(ApiError(503, str(value)).body)
                return
            text = answers[at].grow(value) if what == "token" else answers[at].end(value)
            if text:
                yield chunk(at, text, None)
            if what == "done":
                yield chunk(at, "", answers[at].reason)
        if usage:
            yield _event({**about, "choices": [], "usage": _usage(answers)})
        yield "data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A stream that tells when it has ended, however: a client may go away before its first byte."""

    def __init__(self, content: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _read(request: HttpRequest, kind: Any) -> Any:
    """The body, checked."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(413, f"The request is larger than {MOST_BYTES >> 20} MiB.", code="request_too_large")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        if (wrong := error.error_count()) > MOST_ERRORS:
            raise ApiError(400, f"{wrong:,} arguments are wrong or unknown.", code="invalid_value") from None
        # Of the branches of a union the one that got furthest is what was meant.
        first = max(error.errors(), key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
        where = ".".join(str(part) for part in first["loc"] if not (isinstance(part, str) and ("[" in part or part in ("str", "int", "none"))))
        where = where[:LONGEST_NAME]
        if first["type"] == "extra_forbidden":
            message, code = f"Unrecognized request argument supplied: {where}", "unknown_parameter"
        elif first["type"] == "json_invalid":
            message, code = f"The body is not JSON: {first['msg']}", "invalid_json"
        elif first["type"] == "literal_error":
            message, code = f"{where}: {first['input']!r:.60} is not supported. {first['msg']}", "invalid_value"
        else:
            message, code = f"{where or 'the body'}: {first['msg']}", "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise ApiError(400, message, param=where or None, code=code) from None


async def _unless_gone(request: HttpRequest, wanted: Any) -> Any:
    """What is awaited, unless the client goes away first: then ClientDisconnect."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _usage(answers: list[Answer]) -> dict[str, Any]:
    prompt, said = sum(len(each.ask.tokens) for each in answers), sum(each.ask.said for each in answers)
    hit = sum(each.ask.request.hit for each in answers if each.ask.request is not None)
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said, "prompt_tokens_details": {"cached_tokens": hit}}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _refuse(_request: HttpRequest, error: Any) -> Response:
    return JSONResponse(error.body, error.status)


async def _no_route(request: HttpRequest, error: Any) -> Response:
    what = "Not allowed method" if error.status_code == 405 else "Invalid URL"
    return JSONResponse(ApiError(error.status_code, f"{what} ({request.method} {request.url.path})").body, error.status_code)


async def _nobody(_request: HttpRequest, _error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's code for it is what logs know


async def _own_fault(_request: HttpRequest, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"a bug in Wave: {type(error).__name__}: {error}").body, 500)
