"""
Talk to a trained model in the browser, with its memory on; then open http://127.0.0.1:8000 :
python -m scripts.chat_web

The plain model of another checkpoint, for everybody in the house:
python -m scripts.chat_web --stage mid --tag d12 --no-memory --host 0.0.0.0

What it answers to (errors are JSON, {"error": {"message": ...}}, and one line for people):
    POST /chat/completions   {"messages": [{"role", "content"}], "session", "turn", "temperature", "top_k", "top_p", "max_tokens", "seed"}
                             -> server-sent events, one JSON object each:
                             {"session", "turn"} it is your turn   {"progress": {"done", "total"}} a long message is read
                             {"token", "kind"} text, python or output   {"done": true, "reason", ...} or {"error": ...} the last one
    GET  /memory/{session}   the working context: spans with level, start, stop, score; tokens in the tree, budget used, ms per token
    GET  /metrics            what the memories of the conversations kept do, in Prometheus' text format; 404 without memory
    DELETE /chat/{session}   forget a conversation     GET /health   GET /stats   GET /   the page (ui.html)

A session is one conversation: `messages` are what is new in it. Without "session" the messages are the whole conversation.
The idea: the event loop only moves bytes. Models run in a few worker threads, a lock keeps a session to one answer at a time, and
the least recently used session makes room for a new one. Who hangs up stops their answer at the next token. With memory, answers
that are written at the same time read their tokens in one forward (megacontext/batch.py); without, each has its own.
"""

import argparse
import asyncio
import json
import os
import socket
import threading
import time
import traceback
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from nanochat import hardware
from nanochat.common import UserError, run_main, setup
from nanochat.conversation import Conversation, Progress
from nanochat.engine import Engine
from nanochat.tokenizer import turns
from scripts.load import add_flags, load_stage, open_stream, telemetry_maker

VIEW_EVERY = 16    # tokens between two snapshots of the memory
KEEP_ALIVE_S = 15  # proxies cut connections that are silent for longer
PAGE = Path(__file__).with_name("ui.html")

parser = argparse.ArgumentParser(description="Talk to a trained model in the browser", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
add_flags(parser)
# serving
parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all of this machine's")
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--sessions", type=int, default=16, help="conversations kept; the least recently used one makes room for a new one")
parser.add_argument("--workers", type=int, default=-1, help="answers written at the same time; more wait in line (-1 = 8 with memory, 2 without)")
parser.add_argument("--message-mb", type=float, default=4.0, help="longest request")


@dataclass(frozen=True)
class Limits:
    sessions: int = 16
    workers: int = 2
    waiting: int = 32                # answers in line; the next one is told to come back
    request_bytes: int = 4 * 2**20
    messages: int = 1000             # in one request
    max_tokens: int = 4096


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: str
    content: str


class Ask(BaseModel):
    """The body of POST /chat/completions."""
    model_config = ConfigDict(extra="forbid")
    messages: list[Message] = Field(min_length=1)
    session: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$")
    turn: int | None = None           # answers the client has had in this session, to notice when the server does not know them
    temperature: float = Field(0.8, ge=0, le=2)
    top_k: int | None = Field(50, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    seed: int | None = None
    model: str | None = None          # what other clients send along: there is one model here, and it always streams
    stream: bool = True


class Chat:
    """
    One conversation: its memory, its lock, and the last snapshot of what it looks like. Only the worker that holds the
    lock touches `conversation`; everybody else reads the snapshot, so nobody looks at a memory that is being written.
    """

    def __init__(self, name, memory):
        self.name, self.memory, self.conversation, self.lock = name, memory, None, threading.Lock()
        self.asked = 0 # answers running or in line; event loop only
        self.turns, self.ms_per_token, self.first_token_ms = 0, None, None
        self.view = dict(spans=[], tokens=0, budget=0, used=0)
        self.metrics = None # of its telemetry

    def snapshot(self):
        self.view = self.conversation.stream.view()
        if self.memory:
            self.metrics = self.conversation.stream.telemetry.metrics()


class Chats:
    """The conversations kept, least recently used first. Event loop only, so no lock of its own."""

    def __init__(self, limit, memory):
        self.limit, self.memory, self.kept, self.forgotten = limit, memory, OrderedDict(), 0

    def get(self, name):
        if name not in self.kept:
            raise HTTPException(404, f"no session {name} here: the server keeps the {self.limit} latest, and none when it restarts")
        return self.kept[name]

    def open(self, name, turn):
        """The conversation of that name, or a new one."""
        name = name or uuid.uuid4().hex
        chat = self.kept.get(name)
        if turn and (chat is None or chat.turns < turn):
            raise HTTPException(410, f"this conversation is no longer in memory: the server keeps the {self.limit} latest, and none "
                                     f"when it restarts. Start a new chat")
        if chat is None:
            while len(self.kept) >= self.limit:
                idle = next((old for old in self.kept.values() if not old.asked), None)
                if idle is None:
                    raise HTTPException(503, f"all {self.limit} conversations are being answered: try again soon")
                del self.kept[idle.name]
                self.forgotten += 1
            chat = self.kept[name] = Chat(name, self.memory)
        self.kept.move_to_end(name)
        return chat

    def metrics(self):
        """A Prometheus page about the conversations kept, as they were at their last snapshot. It does not tell their names."""
        if not self.memory:
            raise HTTPException(404, "this server runs without memory, so there is nothing to measure: start it without --no-memory")
        from megacontext.telemetry import page
        return page([chat.metrics for chat in self.kept.values() if chat.metrics])


def make_app(loaded, begin, memory=True, limits=Limits()):
    """
    loaded  what load_stage returned; only its names are shown here
    begin   () -> a Conversation for a new session; called by a worker, so it may take its time
    memory  whether those conversations have the long memory; for people to see
    """
    app = FastAPI(title="chat", docs_url=None, redoc_url=None, openapi_url=None)
    chats, pool = Chats(limits.sessions, memory), ThreadPoolExecutor(limits.workers, thread_name_prefix="answer")
    counts, started = dict(asked=0, in_line=0, tokens=0), time.time()
    app.state.chats, app.state.pool = chats, pool

    @app.exception_handler(HTTPException)
    async def told(request, error):
        return JSONResponse({"error": {"message": error.detail}}, error.status_code, headers=error.headers)

    @app.get("/")
    def page():
        # the page is one file that asks nobody but this server
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})

    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.get("/stats")
    async def stats():
        return dict(model=f"{loaded.stage}/{loaded.tag}", step=loaded.meta["step"], uptime_s=round(time.time() - started, 1),
                    sessions=len(chats.kept), sessions_limit=limits.sessions, sessions_forgotten=chats.forgotten, max_tokens=limits.max_tokens,
                    request_bytes=limits.request_bytes, memory=memory, **counts)

    @app.get("/memory/{session}")
    async def look(session: str):
        chat = chats.get(session)
        return dict(session=chat.name, turns=chat.turns, ms_per_token=chat.ms_per_token, first_token_ms=chat.first_token_ms,
                    memory=memory, **chat.view)

    @app.get("/metrics")
    async def measured():
        return PlainTextResponse(chats.metrics(), media_type="text/plain; version=0.0.4")

    @app.delete("/chat/{session}")
    async def forget(session: str):
        if chats.get(session).asked:
            raise HTTPException(409, "this conversation is being answered: stop it first")
        del chats.kept[session]
        return {"forgotten": session}

    @app.post("/chat/completions")
    async def completions(request: Request):
        ask = await read_ask(request, limits)
        if counts["in_line"] >= limits.waiting:
            raise HTTPException(503, f"{limits.waiting} answers are in line already: try again soon")
        chat = chats.open(ask.session, ask.turn)
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()
        counts["asked"] += 1
        counts["in_line"] += 1
        chat.asked += 1

        def work(): # in a worker thread
            try:
                for event in answer(chat, begin, ask, stop):
                    loop.call_soon_threadsafe(tell, event)
            finally:
                loop.call_soon_threadsafe(finished)

        def tell(event): # in the event loop, as finished()
            counts["tokens"] += event.get("tokens", 0) # the last event says how many there were
            events.put_nowait(event)

        def finished():
            counts["in_line"] -= 1
            chat.asked -= 1
            events.put_nowait(None)

        pool.submit(work)
        return StreamingResponse(server_sent(events, stop), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    return app


async def read_ask(request, limits):
    """The body of a request, checked; what is wrong with it is one line."""
    body = bytearray()
    async for part in request.stream(): # a length that is only claimed is not believed
        body += part
        if len(body) > limits.request_bytes:
            raise HTTPException(413, f"the message is longer than {limits.request_bytes / 2**20:g} MB: send less at once, or start the server with a larger --message-mb")
    try:
        ask = Ask.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HTTPException(400, f"{where or 'the request'}: {first['msg']}") from None
    if not ask.stream:
        raise HTTPException(400, "stream: answers always come as a stream here, leave it out or say true")
    if ask.max_tokens > limits.max_tokens:
        raise HTTPException(400, f"max_tokens: expected at most {limits.max_tokens}, got {ask.max_tokens}")
    if len(ask.messages) > limits.messages:
        raise HTTPException(400, f"messages: expected at most {limits.messages}, got {len(ask.messages)}")
    try:
        if turns({"messages": [message.model_dump() for message in ask.messages]})[-1]["role"] != "user":
            raise ValueError("the last one must be the user's, which is to be answered")
    except ValueError as error:
        raise HTTPException(400, f"messages: {error}") from None
    return ask


def answer(chat, begin, ask, stop):
    """Runs in a worker thread: yields the events of one answer. Ends early when `stop` is set."""
    while not chat.lock.acquire(timeout=0.1): # an answer to the same session that was stopped may be in its last forward
        if stop.is_set():
            return
    try:
        if not stop.is_set():
            with hardware.out_of_memory_told("in this answer", "Start a new chat and say less at once; whoever runs the server can lower its --budget or --sessions"):
                chat.conversation = chat.conversation or begin()
                yield from write(chat, ask, stop)
    except (UserError, ValueError) as error:
        yield {"error": str(error)}
    except Exception as error: # whoever asked must hear of it, whatever it is; the log has the whole story
        traceback.print_exc()
        yield {"error": f"the server failed at this answer ({type(error).__name__}); its log says more"}
    finally:
        chat.lock.release()


def write(chat, ask, stop):
    conversation, start, first, count = chat.conversation, time.perf_counter(), None, 0
    pieces = conversation.reply([message.model_dump() for message in ask.messages], ask.max_tokens, temperature=ask.temperature,
                                top_k=ask.top_k, top_p=ask.top_p, seed=ask.seed)
    chat.turns = conversation.turns
    yield {"session": chat.name, "turn": chat.turns}
    for piece in pieces:
        if isinstance(piece, Progress): # the working context is still the old one
            yield {"progress": piece._asdict()}
        else:
            now = time.perf_counter()
            first = first or now
            count += 1
            if count % VIEW_EVERY == 1:
                chat.snapshot()
            chat.first_token_ms = round(1000 * (first - start), 2)
            if count > 1:
                chat.ms_per_token = round(1000 * (now - first) / (count - 1), 3)
            if piece.text:
                yield {"token": piece.text, "kind": piece.kind}
        if stop.is_set():
            break
    pieces.close() # what was said and not fed waits for the next turn
    chat.snapshot()
    yield {"done": True, "reason": conversation.ended, "tokens": count, "ms_per_token": chat.ms_per_token, "first_token_ms": chat.first_token_ms}


async def server_sent(events, stop):
    """Events from a worker as text/event-stream, until None. When the reader is gone the answer is stopped."""
    try:
        while True:
            try:
                event = await asyncio.wait_for(events.get(), KEEP_ALIVE_S)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
                continue
            if event is None:
                return
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
    finally:
        stop.set()


def opener(loaded, args):
    """() -> a Conversation for a new session. The memories of one server read together."""
    engine, telemetry, joined = Engine(loaded.tokenizer), telemetry_maker(args), lambda stream: stream
    if not args.no_memory:
        from megacontext.batch import Together
        joined = Together().stream
    return lambda: Conversation(engine, joined(open_stream(loaded, not args.no_memory, args.budget, telemetry=telemetry())))


def main():
    args = parser.parse_args()
    workers = (2 if args.no_memory else 8) if args.workers == -1 else args.workers
    if args.sessions < 1 or workers < 1 or args.message_mb <= 0:
        raise UserError("--sessions and --workers must be at least 1, --message-mb more than 0")
    try:
        listener = socket.create_server((args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"cannot listen on {args.host}, port {args.port} ({reason}): choose another --port or --host") from None
    device, _ = setup(args.device)
    dtype, _ = hardware.pick_dtype(hardware.describe(device), args.dtype)
    loaded = load_stage(args.stage, args.tag, args.step, device, dtype)
    begin = opener(loaded, args)
    begin() # what is wrong with memory or budget is told now, and not to the first guest
    limits = Limits(args.sessions, workers, request_bytes=int(args.message_mb * 2**20))
    app = make_app(loaded, begin, not args.no_memory, limits)
    print(f"{loaded.stage}/{loaded.tag}, step {loaded.meta['step']}, {'no memory' if args.no_memory else 'with memory'}: "
          f"http://{'127.0.0.1' if args.host == '0.0.0.0' else args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
