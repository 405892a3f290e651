"""
The chat page in a real browser, against a server with a made-up model. Slow, and only where playwright and a Chromium are:
    pip install playwright;  CHROMIUM=/usr/bin/chromium python -m pytest -m slow tests/test_browser.py
With SCREENSHOTS=folder it leaves pictures there, for eyes.
"""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import uvicorn

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: set CHROMIUM to its path")]

from nanochat.conversation import Conversation
from nanochat.engine import Engine
from scripts.chat_web import Limits, make_app
from tests.fakes import ByteTokenizer, FakeLoaded, FakeMemory

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ANSWER = "The calculator first: <|python|>12*34<|/python|> so it is 408. Größe, €, 日本語.\n\n```python\ndef f(x):\n    return x < 3 and '<b>not bold</b>'\n```\nThat is all."


class Speaks(FakeMemory):
    """Says ANSWER, with the calculator's tokens in it."""

    def __init__(self, pause=0.004):
        super().__init__("", pause)
        tokenizer = ByteTokenizer()
        before, _, rest = ANSWER.partition("<|python|>")
        asked, _, after = rest.partition("<|/python|>")
        special = tokenizer.special
        self.answer = [*tokenizer.encode(before), special("<|python_start|>"), *tokenizer.encode(asked), special("<|python_end|>")]
        forced = [special("<|output_start|>"), *tokenizer.encode("408"), special("<|output_end|>")]
        self.answer += forced + tokenizer.encode(after) + [special("<|assistant_end|>")]

    def feed(self, ids, prompt=True):
        self.said += len(ids) - 1 if ids[-1] != self.start else 0 # forced tokens come several at once
        return super().feed(ids)


@pytest.fixture(scope="module")
def url():
    engine = Engine(ByteTokenizer())
    app = make_app(FakeLoaded(), lambda: Conversation(engine, Speaks()), True, Limits(sessions=2))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url, request):
    """A fresh tab of the asked size and colours; fails on any error in the page's console, and on any request to others."""
    options = getattr(request, "param", {})
    context = browser.new_context(viewport=dict(width=options.get("width", 1100), height=options.get("height", 800)), color_scheme=options.get("scheme", "light"))
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" and "status of 4" not in message.text else None)
    page.on("request", lambda r: wrong.append(f"asked {r.url}") if not r.url.startswith((url, "data:")) else None)
    page.goto(url)
    until(page, "document.getElementById('model').textContent.includes('sft/tiny')")
    yield page
    context.close()
    assert not wrong


def picture(page, name):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


def ask(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def until(page, condition, seconds=60):
    """Playwright's own waiting evaluates strings inside the page, which the page's policy forbids."""
    end = time.time() + seconds
    while not page.evaluate(condition):
        assert time.time() < end, f"never came true: {condition}"
        time.sleep(0.05)


def wait_for_answer(page, n=1):
    until(page, f"document.querySelectorAll('.model:not(.waiting)').length >= {n} && document.getElementById('send').textContent === 'Send'")


def paste(page, text):
    page.evaluate("""text => { const data = new DataTransfer(); data.setData("text", text);
        document.getElementById("text").dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })); }""", text)


def test_an_answer_streams_in_and_is_shown_as_text(page):
    picture(page, "empty")
    ask(page, "What is <i>12*34</i>?")
    page.wait_for_selector(".waiting .body:has-text('The calc')")
    picture(page, "streaming")
    wait_for_answer(page)
    page.wait_for_timeout(200)
    assert page.locator(".user .body").inner_text() == "What is <i>12*34</i>?"
    assert page.locator(".model .python").inner_text() == "12*34" and page.locator(".model .output").inner_text() == "408"
    assert page.locator(".model pre").inner_text() == "def f(x):\n    return x < 3 and '<b>not bold</b>'"
    assert "Größe, €, 日本語." in page.locator(".model .body").inner_text()
    assert page.locator(".model b, .user i").count() == 0
    picture(page, "answer")


@pytest.mark.parametrize("page", [dict(), dict(scheme="dark"), dict(width=390, height=780), dict(width=390, height=780, scheme="dark")],
                         indirect=True, ids=["light", "dark", "phone", "phone-dark"])
def test_a_long_paste_and_the_strip(page, request):
    paste(page, "def function_%d(x):\n    return x\n" % 7 * 12_000)
    assert "characters" in page.locator(".chip").inner_text()
    ask(page, "Which arguments does function_7 take?")
    page.wait_for_selector("progress")
    picture(page, f"reading-{request.node.callspec.id}")
    wait_for_answer(page)
    until(page, "document.getElementById('numbers').textContent.includes('tokens in the tree')")
    assert "budget used" in page.locator("#numbers").inner_text() and "ms per token" in page.locator("#numbers").inner_text()
    assert page.evaluate("document.querySelector('.paste').textContent.length") < 2000, "a huge text is shown in part"
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 10)
    page.wait_for_selector("#tip:not([hidden])")
    assert "LensNet's score" in page.locator("#tip").inner_text() and "tokens " in page.locator("#tip").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the screen"
    picture(page, f"long-{request.node.callspec.id}")
    page.click(".more")
    assert page.evaluate("document.querySelector('.paste').textContent.length") > 300_000
    colours = page.evaluate("""() => { const c = document.getElementById('canvas'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, s = new Set();
        for (let i = 0; i < d.length; i += 4) s.add(d[i] + ',' + d[i+1] + ',' + d[i+2]); return s.size; }""")
    assert colours > 5, "the strip is empty"


def test_stop_then_ask_again_and_reload(page, url):
    ask(page, "one")
    page.wait_for_selector(".waiting .body:has-text('The')")
    page.click("#send")
    page.wait_for_selector(".note:has-text('stopped')")
    ask(page, "two")
    wait_for_answer(page, 2)
    assert page.evaluate("turn") == 2
    page.reload()
    page.wait_for_selector(".user .body:has-text('two')")
    assert page.locator(".message.model").count() == 2 and page.locator(".note:has-text('stopped')").count() == 1
    until(page, "!document.getElementById('memory').hidden")
    page.click("#new")
    assert page.locator(".message").count() == 0 and page.locator("#empty").count() == 1
    assert page.evaluate("session") is None


def test_a_forgotten_conversation_and_a_wrong_setting_are_told(page):
    ask(page, "one")
    wait_for_answer(page)
    page.evaluate("""async () => { for (const session of ["x", "y"]) await (await fetch("chat/completions", { method: "POST",
        body: JSON.stringify({ session, max_tokens: 1, messages: [{ role: "user", content: "a" }] }) })).text(); }""")
    ask(page, "two")
    page.wait_for_selector(".error:has-text('no longer in memory')")
    picture(page, "forgotten")
    page.click("#new")
    page.click("#tune")
    page.fill("#temperature", "9")
    ask(page, "three")
    page.wait_for_selector(".error:has-text('temperature')")
    picture(page, "settings")
    page.fill("#temperature", "0.5")
    page.fill("#max_tokens", "5")
    ask(page, "four")
    page.wait_for_selector(".note:has-text('cut at 5 tokens')")


def test_too_long_is_told_and_nothing_is_lost(page):
    paste(page, "x" * 5_000_000)
    page.click("#send")
    page.wait_for_selector(".error:has-text('longer than the 4.0 MB')")
    assert page.locator(".chip").count() == 1
