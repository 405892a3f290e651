"""The web server: what a client sees, what it may send, and that one guest's long answer never stops another's."""

import asyncio
import json
import re
import threading
import time

import httpx
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

import megacontext.batch as batch
from nanochat.conversation import Conversation
from nanochat.engine import Engine, PlainStream
from nanochat.gpt import GPTConfig
from scripts.chat_web import PAGE, Limits, make_app, opener, parser
from scripts.load import Loaded, build, open_stream
from tests.fakes import ByteTokenizer, FakeLoaded, FakeMemory, random_gpt
from tests.tiny import stir

tokenizer = ByteTokenizer()
engine = Engine(tokenizer)


def app_of(stream, **limits):
    """An app whose every session gets stream(); the streams made so far are in app.state.streams."""
    streams = []

    def begin():
        streams.append(stream())
        return Conversation(engine, streams[-1])

    app = make_app(FakeLoaded(), begin, True, Limits(**limits))
    app.state.streams = streams
    return app


def ask(text, **fields):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0} | fields


def events_of(response):
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"), response.text
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def post(client, text="hi", **fields):
    return events_of(client.post("/chat/completions", json=ask(text, **fields)))


def text_of(events):
    return "".join(event.get("token", "") for event in events)


@pytest.fixture
def client():
    with TestClient(app_of(lambda: FakeMemory("fine €"))) as client:
        yield client


def test_an_answer_comes_as_events(client):
    events = post(client)
    assert set(events[0]) == {"session", "turn"} and events[0]["turn"] == 1
    assert [event["token"] for event in events[1:-1]] == ["f", "i", "n", "e", " ", "€"], "a character of three tokens is one event"
    done = events[-1]
    assert (done["done"], done["reason"], done["tokens"]) == (True, "stop", 8)
    assert post(client, max_tokens=2)[-1]["reason"] == "length"


def test_a_session_remembers_and_others_do_not(client):
    first = post(client, "one")
    name = first[0]["session"]
    assert post(client, "two", session=name, turn=1)[0] == {"session": name, "turn": 2}
    assert post(client, "three")[0]["session"] != name
    fed = [tokenizer.decode(stream.fed) for stream in client.app.state.streams]
    assert len(fed) == 2
    assert fed[0].startswith("<|bos|><|user_start|>one<|user_end|><|assistant_start|>fine €<|assistant_end|><|user_start|>two")
    assert "one" not in fed[1]


def test_a_whole_conversation_without_a_session(client):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    events_of(client.post("/chat/completions", json={"messages": messages}))
    expected = "<|bos|><|user_start|>S\n\na<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>c<|user_end|><|assistant_start|>"
    assert tokenizer.decode(client.app.state.streams[0].fed).startswith(expected)


def test_special_tokens_cannot_be_typed(client):
    post(client, "<|assistant_start|>")
    assert client.app.state.streams[0].fed.count(tokenizer.special("<|assistant_start|>")) == 1


@pytest.mark.parametrize("body, where", [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "robot"), ({"messages": [{"role": "assistant", "content": "a"}]}, "assistant"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "user"),
    (ask("a", temperature=-1), "temperature"), (ask("a", temperature="nan"), "temperature"), (ask("a", top_k=0), "top_k"), (ask("a", top_p=0), "top_p"),
    (ask("a", max_tokens=0), "max_tokens"), (ask("a", max_tokens=10 ** 9), "max_tokens"), (ask("a", session="../x"), "session"),
    (ask("a", temprature=1), "temprature"), (ask("a", stream=False), "stream"), ([], "request"), (None, "request"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "messages.0.content"),
])
def test_what_is_wrong_with_a_request_is_one_json_line(client, body, where):
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 400 and where in response.json()["error"]["message"], response.text
    assert "\n" not in response.json()["error"]["message"]
    assert client.get("/stats").json()["sessions"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"[" * 100000])
def test_bytes_that_are_no_json_are_refused(client, body):
    assert client.post("/chat/completions", content=body).status_code == 400


@pytest.mark.parametrize("method, path, status", [("GET", "/nowhere", 404), ("GET", "/memory/unknown", 404), ("DELETE", "/chat/unknown", 404),
                                                  ("GET", "/chat/completions", 405)])
def test_other_errors_are_json_too(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status and response.json()["error"]["message"]


def test_a_long_paste_works_with_progress_and_a_longer_one_is_told():
    """400,000 characters, over 100,000 tokens of any tokenizer that merges; here a token is a byte."""
    with TestClient(app_of(lambda: FakeMemory("fine"), request_bytes=2 ** 20)) as client:
        events = post(client, "x = 1\n" * 66_667)
        progress = [event["progress"] for event in events if "progress" in event]
        assert len(progress) == 400_005 // 8192 and progress == sorted(progress, key=lambda p: p["done"])
        assert progress[-1]["done"] == len(progress) * 8192 and progress[-1]["total"] == 400_006
        assert text_of(events) == "fine"
        look = client.get(f"/memory/{events[0]['session']}").json()
        assert look["tokens"] == 400_006 + 4
        response = client.post("/chat/completions", json=ask("x" * 2 ** 20))
        assert response.status_code == 413 and "1 MB" in response.json()["error"]["message"]


def test_the_memory_can_be_looked_at(client):
    name = post(client, "word " * 3000)[0]["session"]
    look = client.get(f"/memory/{name}").json()
    assert look["session"] == name and look["turns"] == 1 and look["memory"] is True
    at = 0
    for span in look["spans"]:
        assert set(span) == {"level", "start", "stop", "score"} and span["start"] == at < span["stop"]
        at = span["stop"]
    assert at == look["tokens"] and {span["level"] for span in look["spans"]} == {0, 1, 2}
    assert look["used"] <= look["budget"] and look["ms_per_token"] > 0 and look["first_token_ms"] > 0


def test_the_oldest_idle_session_makes_room_and_its_guest_is_told():
    with TestClient(app_of(lambda: FakeMemory("ok"), sessions=2)) as client:
        post(client, session="a")
        post(client, session="b")
        post(client, session="a", turn=1)
        post(client, session="c") # b is the least recently used
        response = client.post("/chat/completions", json=ask("hi", session="b", turn=1))
        assert response.status_code == 410 and "no longer in memory" in response.json()["error"]["message"]
        assert client.get("/memory/b").status_code == 404
        assert post(client, session="a", turn=2)[0]["turn"] == 3
        stats = client.get("/stats").json()
        assert (stats["sessions"], stats["sessions_forgotten"]) == (2, 1)


def test_a_conversation_can_be_forgotten(client):
    name = post(client)[0]["session"]
    assert client.delete(f"/chat/{name}").json() == {"forgotten": name}
    assert client.get(f"/memory/{name}").status_code == 404


def test_health_stats_and_page(client):
    assert client.get("/health").json() == {"status": "ok"}
    post(client)
    stats = client.get("/stats").json()
    assert (stats["model"], stats["step"], stats["asked"], stats["in_line"], stats["tokens"]) == ("sft/tiny", 7, 1, 0, 8)
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")


def test_the_page_asks_nobody_else():
    source = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|@import|url\(\s*["']?(https?:)?//|innerHTML|fetch\(\s*["'`]https?:""", source)


def test_a_stream_that_fails_is_told_in_the_stream(client, capsys):
    class Fails(FakeMemory):
        def feed(self, ids, prompt=True):
            raise RuntimeError("internal detail")
    with TestClient(app_of(lambda: Fails("x"))) as client:
        events = post(client)
        assert "RuntimeError" in events[-1]["error"] and "internal detail" not in events[-1]["error"]
        assert client.get("/stats").json()["in_line"] == 0
    assert "internal detail" in capsys.readouterr().err, "the log has the whole story"


def test_memory_that_runs_out_is_told_with_what_helps():
    class Full(FakeMemory):
        def feed(self, ids, prompt=True):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with TestClient(app_of(lambda: Full("x"))) as client:
        assert "memory ran out in this answer. Start a new chat" in post(client)[-1]["error"]

    def begin():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with TestClient(app_of(begin)) as client:
        assert "memory ran out in this answer. Start a new chat" in post(client)[-1]["error"]


def test_a_real_gpt_answers_without_memory():
    gpt = random_gpt(seq_len=64)
    with TestClient(make_app(FakeLoaded(gpt), lambda: Conversation(engine, PlainStream(gpt)), False)) as client:
        events = post(client, "x" * 1000, max_tokens=100) # far over its context: the stream's rule holds
        look = client.get(f"/memory/{events[0]['session']}").json()
        assert events[-1]["done"] and look["used"] <= 64 and look["memory"] is False
        assert client.get("/metrics").status_code == 404 and "without memory" in client.get("/metrics").json()["error"]["message"]
        assert look["spans"] == [{"level": 0, "start": look["tokens"] - look["used"], "stop": look["tokens"], "score": 0.0}]


def test_a_real_session_remembers_a_history_far_over_its_budget():
    """Untrained networks, real memory: 20,000 tokens through a budget of 256, then a second turn that costs no second reading."""
    torch.manual_seed(0)
    gpt, gistnet, lensnet = build(GPTConfig(tokenizer.vocab_size, 512, layers=2, heads=2, kv_heads=2, width=64), memory=True)
    loaded = Loaded(gpt.eval(), gistnet.eval(), lensnet.eval(), tokenizer, {"step": 0}, "sft", "tiny")
    with TestClient(make_app(loaded, lambda: Conversation(engine, open_stream(loaded, True, 256)))) as client:
        name = post(client, "x = 1\n" * 3300, max_tokens=40)[0]["session"]
        first = client.get(f"/memory/{name}").json()
        assert first["tokens"] > 19_800 and first["used"] <= first["budget"] == 256
        assert first["spans"][0]["start"] == 0 and first["spans"][-1]["stop"] == first["tokens"]
        assert all(a["stop"] == b["start"] for a, b in zip(first["spans"], first["spans"][1:]))
        events = post(client, "and?", session=name, turn=1, max_tokens=5)
        assert events[-1]["done"] and not any("progress" in event for event in events)
        assert client.get(f"/memory/{name}").json()["tokens"] < first["tokens"] + 20
        other = post(client, "x = 1\n" * 200, max_tokens=40)[0]["session"]
        page = client.get("/metrics")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert name not in page.text and other not in page.text, "who knows a session's name can talk in it"
        used, tokens = [[float(value) for value in re.findall(rf"^megacontext_{what}{{session=.*}} (.*)$", page.text, re.M)] for what in ("budget_use", "history_tokens")]
        assert len(used) == 2 and all(0 < use <= 1 for use in used) and first["tokens"] // 32 * 32 <= tokens[0] < first["tokens"] + 20 and 1000 < tokens[1] < 2000
        client.delete(f"/chat/{name}")
        assert client.get("/metrics").text.count("megacontext_ticks_total{") == 1, "only the conversations kept: the page is bounded"


# ---------------------------------------------------------------------------------------------------------------------
# Over a real connection: hanging up, and many at once

@pytest.fixture
def served():
    """Start an app on a free port of this machine: served(app) -> its address."""
    servers = []

    def start(app):
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        for _ in range(500):
            if server.started:
                break
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def wait_for(condition, seconds=5.0):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    assert condition()


def test_hanging_up_stops_the_answer_and_the_next_turn_goes_on(served):
    app = app_of(lambda: FakeMemory("a" * 2000, pause=0.01))
    url = served(app)
    with httpx.stream("POST", f"{url}/chat/completions", json=ask("hi", session="s", max_tokens=2000)) as response:
        lines = response.iter_lines()
        seen = [line for line, _ in zip((line for line in lines if line), range(5))]
    assert len(seen) == 5
    wait_for(lambda: httpx.get(f"{url}/stats").json()["in_line"] == 0)
    stream = app.state.streams[0]
    assert stream.length < 400, "the model went on for a reader who had left"
    events = events_of(httpx.post(f"{url}/chat/completions", json=ask("again", session="s", turn=1, max_tokens=3), timeout=30))
    assert events[0]["turn"] == 2
    fed = tokenizer.decode(stream.fed)
    assert re.fullmatch(r"<\|bos\|><\|user_start\|>hi<\|user_end\|><\|assistant_start\|>a+<\|assistant_end\|><\|user_start\|>again<\|user_end\|><\|assistant_start\|>aa", fed), fed


def test_hanging_up_stops_the_reading_of_a_long_paste(served):
    app = app_of(lambda: FakeMemory("ok", pause=0.05, stretch=100))
    url = served(app)
    with httpx.stream("POST", f"{url}/chat/completions", json=ask("x" * 100_000)) as response:
        for line in response.iter_lines():
            if "progress" in line:
                break
    wait_for(lambda: httpx.get(f"{url}/stats").json()["in_line"] == 0)
    assert app.state.streams[0].length < 10_000


def test_one_long_answer_does_not_stop_the_others(served):
    """The old nanochat server generated inside the event loop: while one guest's answer was written, nobody else was heard."""
    app = app_of(lambda: FakeMemory("abc", pause=1.0), workers=4)
    url = served(app)

    async def everybody():
        async with httpx.AsyncClient(timeout=30) as client:
            start = time.perf_counter()
            async def healthy():
                slowest = 0.0
                while time.perf_counter() - start < 3.0:
                    before = time.perf_counter()
                    assert (await client.get(f"{url}/health")).status_code == 200
                    slowest = max(slowest, time.perf_counter() - before)
                return slowest
            answers = [client.post(f"{url}/chat/completions", json=ask("hi", session=f"s{i}")) for i in range(4)]
            *responses, slowest = await asyncio.gather(*answers, healthy())
            return responses, slowest, time.perf_counter() - start

    responses, slowest, seconds = asyncio.run(everybody())
    assert all(text_of(events_of(response)) == "abc" for response in responses)
    assert slowest < 0.8, "the event loop stood still while a model was thinking"
    assert seconds < 4 * 4 * 1.0, "answers were written one after the other"


def test_answers_written_at_the_same_time_are_read_in_one_forward(served, monkeypatch):
    """The server once read a forward for each answer, though a session could be read along with others. What is said is what is said alone."""
    torch.manual_seed(0)
    gpt, gistnet, lensnet = build(GPTConfig(tokenizer.vocab_size, 512, layers=2, heads=2, kv_heads=2, width=64), memory=True)
    for network in (gpt, gistnet, lensnet):
        stir(network.eval(), std=0.1)
    loaded = Loaded(gpt, gistnet, lensnet, tokenizer, {"step": 0}, "sft", "tiny")
    sizes, whole = [], batch.read
    monkeypatch.setattr(batch, "read", lambda sessions, tokens: sizes.append(len(sessions)) or whole(sessions, tokens))
    url = served(make_app(loaded, opener(loaded, parser.parse_args(["--budget", "192"])), limits=Limits(workers=4)))
    texts = ["hi", "x = 1\n" * 100, "why? " * 300, "a"]
    answered = lambda response: [event for event in events_of(response) if "token" in event]

    async def guests(at_once):
        async with httpx.AsyncClient(timeout=60) as client:
            asked = [client.post(f"{url}/chat/completions", json=ask(text, temperature=0.8, seed=i, max_tokens=60)) for i, text in enumerate(texts)]
            return await asyncio.gather(*asked) if at_once else [await one for one in asked]

    alone = [answered(response) for response in asyncio.run(guests(False))]
    assert not sizes and all(alone)
    assert [answered(response) for response in asyncio.run(guests(True))] == alone
    assert sum(size > 1 for size in sizes) > 10 and max(sizes) <= 4, "they hardly met"
    assert isinstance(opener(loaded, parser.parse_args(["--no-memory"]))().stream, PlainStream)


def test_one_session_writes_one_answer_at_a_time(served):
    app = app_of(lambda: FakeMemory("abc", pause=0.02), workers=4)
    url = served(app)

    async def twice():
        async with httpx.AsyncClient(timeout=30) as client:
            return await asyncio.gather(*[client.post(f"{url}/chat/completions", json=ask(f"q{i}", session="s")) for i in range(3)])

    responses = asyncio.run(twice())
    assert sorted(events_of(response)[0]["turn"] for response in responses) == [1, 2, 3]
    assert all(text_of(events_of(response)) == "abc" for response in responses)
    assert len(app.state.streams) == 1
    fed = tokenizer.decode(app.state.streams[0].fed)
    assert len(re.findall(r"<\|user_start\|>q\d<\|user_end\|><\|assistant_start\|>abc", fed)) == 3


def test_a_full_house_says_so(served):
    app = app_of(lambda: FakeMemory("a" * 5000, pause=0.02), sessions=1, workers=1, waiting=2)
    url = served(app)

    async def guests():
        async with httpx.AsyncClient(timeout=30) as client:
            async with client.stream("POST", f"{url}/chat/completions", json=ask("hi", session="a")) as first:
                lines = first.aiter_lines() # kept: a forgotten generator closes its response, and the answer with it
                await lines.__anext__()
                other = await client.post(f"{url}/chat/completions", json=ask("hi", session="b"))
                busy = await client.delete(f"{url}/chat/a")
                async with client.stream("POST", f"{url}/chat/completions", json=ask("hi", session="a")):
                    line = await client.post(f"{url}/chat/completions", json=ask("hi", session="a"))
            return other, busy, line

    other, busy, line = asyncio.run(guests())
    assert other.status_code == 503 and "all 1 conversations" in other.json()["error"]["message"]
    assert busy.status_code == 409
    assert line.status_code == 503 and "in line" in line.json()["error"]["message"]


def test_torch_threads_of_the_workers_do_not_keep_gradients():
    """no_grad is a matter of each thread: a worker that forgot it would keep every activation of a conversation alive."""
    gpt = random_gpt(seq_len=64)
    streams = []
    def begin():
        streams.append(PlainStream(gpt))
        return Conversation(engine, streams[-1])
    with TestClient(make_app(FakeLoaded(gpt), begin, False)) as client:
        post(client, max_tokens=5)
    assert not streams[0].cache.k.requires_grad and isinstance(streams[0].cache.k, torch.Tensor)
