"""The page in a real browser: Debian's chromium, headless, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets.asyncio.client as websockets

from tests.support.browser_service import serving

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]


class Browser:
    """One page of a headless chromium."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    async def command(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        self._number += 1
        await self._socket.send(
            json.dumps({"id": self._number, "method": method, "params": params})
        )
        while True:
            message = json.loads(await asyncio.wait_for(self._socket.recv(), 60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    async def value(self, expression: str) -> Any:
        """What an expression comes to on the page."""
        found = await self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until it is true."""
        for _ in range(600):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        pytest.fail(f"waited 60 s for {expression}; {await self.value('document.body.innerText')}")

    async def keys(self, text: str) -> None:
        """Types."""
        await self.command("Input.insertText", text=text)

    async def press(self, key: str, code: int) -> None:
        """Presses a key of its own."""
        for kind in ("keyDown", "keyUp"):
            await self.command(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, text="\r" if key == "Enter" else "",
            )  # fmt: skip

    async def picture(self, path: Path) -> None:
        """A picture of the whole page."""
        size = await self.command("Page.getLayoutMetrics")
        height = int(size["cssContentSize"]["height"])
        await self.command(
            "Emulation.setDeviceMetricsOverride",
            width=1100, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        found = await self.command("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as found:
        yield found


@pytest.fixture
def debugger(tmp_path: Path) -> Iterator[str]:
    """Where a chromium of its own listens; its profile goes with it."""
    folder = tempfile.mkdtemp(prefix="chromium-")
    process = subprocess.Popen(
        [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port = Path(folder) / "DevToolsActivePort"
        for _ in range(600):
            if port.exists() and port.read_text().strip():
                break
            assert process.poll() is None, "chromium ended"
            asyncio.run(asyncio.sleep(0.1))
        number = port.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/json/list", timeout=30) as reply:
            pages = [one for one in json.load(reply) if one["type"] == "page"]
        yield pages[0]["webSocketDebuggerUrl"]
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def visit(debugger: str, url: str, work: Callable[[Browser], Any]) -> None:
    async def whole() -> None:
        async with websockets.connect(debugger, max_size=2**26) as socket:
            browser = Browser(socket)
            await browser.command("Page.enable")
            await browser.command("Page.navigate", url=url)
            await browser.until("document.readyState === 'complete' && examples.length === 6")
            await work(browser)

    asyncio.run(whole())


def test_asking_by_keyboard_alone(debugger: str, url: str, tmp_path: Path) -> None:
    """An example is chosen, votes come, the sentences that the rationale rests on are marked."""

    async def work(browser: Browser) -> None:
        await browser.value("document.getElementById('example').focus()")
        await browser.press("ArrowDown", 40)
        await browser.until("document.getElementById('question').value.length > 10")
        assert "\n\n" in await browser.value("document.getElementById('context').value")
        await browser.value("document.getElementById('samples').select()")
        await browser.keys("3")
        await browser.press("Enter", 13)
        await browser.until("document.getElementById('rationale').textContent.length > 5")
        assert await browser.value("document.getElementById('ask').disabled")
        await browser.until("document.getElementById('answer').textContent === 'the answer'")
        assert await browser.value("document.querySelectorAll('#votes li').length") == 3
        assert await browser.value("document.getElementById('confidence').textContent") == (
            "100% of 3 votes"
        )
        unguided = await browser.value("document.getElementById('unguided').textContent")
        assert unguided == "a guess"
        assert await browser.value("document.querySelectorAll('#shown mark').length") == 1
        assert not await browser.value("document.getElementById('ask').disabled")
        await browser.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

    visit(debugger, url, work)


def test_every_field_has_a_label_and_text_is_legible(debugger: str, url: str) -> None:
    """WCAG's contrast of 4.5 for every text on its background."""

    async def work(browser: Browser) -> None:
        unlabelled = await browser.value(
            "[...document.querySelectorAll('input, textarea, select')]"
            ".filter((one) => !one.labels.length).length"
        )
        assert unlabelled == 0
        await browser.value("document.getElementById('result').hidden = false")
        assert await browser.value(CONTRAST) >= 4.5

    visit(debugger, url, work)


CONTRAST = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => { const [r, g, b] = channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (one) => { for (let at = one; at; at = at.parentElement) {
    const found = getComputedStyle(at).backgroundColor;
    if (channels(found).length < 4 || channels(found)[3] > 0) return found; }
    return 'rgb(255, 255, 255)'; };
  let least = 21;
  const texts = 'h1, h2, p, label, span, button, textarea, input, select';
  for (const one of document.querySelectorAll(texts)) {
    if (one.disabled) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
})()"""


SHOWN_CARDS = (
    "[...document.querySelectorAll('#result section')].filter((one) => one.offsetHeight).length"
)
LOOK = (
    "(() => { const {backgroundColor, color} = getComputedStyle(document.getElementById('NAME'));"
    " return backgroundColor + ' ' + color; })()"
)


def test_a_button_that_is_off_looks_so(debugger: str, url: str) -> None:
    """Each of the two as the other one when it is off, and otherwise when it is on."""

    async def work(browser: Browser) -> None:
        ask, stop = LOOK.replace("NAME", "ask"), LOOK.replace("NAME", "stop")
        ask_on, stop_off = await browser.value(ask), await browser.value(stop)
        await browser.value("document.getElementById('question').value = 'take your time'")
        await browser.value("document.getElementById('ask').click()")
        await browser.until("!document.getElementById('stop').disabled")
        ask_off, stop_on = await browser.value(ask), await browser.value(stop)
        await browser.value("document.getElementById('stop').click()")
        assert ask_off == stop_off
        assert len({ask_on, stop_on, stop_off}) == 3

    visit(debugger, url, work)


def test_what_was_cut_is_marked(debugger: str, url: str) -> None:
    """Beside the rationale that led to the answer, and at each vote."""

    async def work(browser: Browser) -> None:
        await browser.value("document.getElementById('question').value = 'all is cut'")
        await browser.value("document.getElementById('samples').value = 3")
        await browser.value("document.getElementById('ask').click()")
        await browser.until("document.getElementById('answer').textContent === 'the answer'")
        assert await browser.value("document.getElementById('cut').offsetHeight") > 0
        said = await browser.value("document.getElementById('cut').textContent")
        assert said.startswith("Cut at its longest: the rationale.")
        marks = "[...document.querySelectorAll('#votes .note')].map((one) => one.textContent)"
        assert await browser.value(marks) == [" (rationale cut)"] * 3
        await browser.value("document.getElementById('question').value = 'nothing amiss'")
        await browser.value("document.getElementById('ask').click()")
        await browser.until("document.getElementById('answer').textContent === 'the answer'")
        assert await browser.value("document.getElementById('cut').offsetHeight") == 0
        assert await browser.value(marks) == []

    visit(debugger, url, work)


def test_the_document_of_the_api_is_drawn_without_the_internet(debugger: str, url: str) -> None:
    """Every operation, by scripts that come from the service itself."""

    async def work(browser: Browser) -> None:
        await browser.command("Page.navigate", url=f"{url}/docs")
        await browser.until("document.querySelectorAll('.opblock').length >= 9")
        hosts = (
            "new Set(performance.getEntriesByType('resource').map((one) => new URL(one.name).host))"
        )
        assert await browser.value(f"[...{hosts}]") == [url.removeprefix("http://")]
        assert await browser.value("!!document.querySelector('.authorize')"), "its bearer token"

    visit(debugger, url, work)


def test_below_a_path_the_page_and_the_document_ask_there(debugger: str) -> None:
    """As ``--prefix`` and Serve's ``route_prefix`` have it; the address may lack its last slash."""

    async def work(browser: Browser) -> None:
        assert await browser.value("location.pathname") == "/guided/lm/"
        await browser.value("document.getElementById('question').value = 'Where is it?'")
        await browser.value("document.getElementById('ask').click()")
        await browser.until("document.getElementById('answer').textContent === 'the answer'")
        await browser.command("Page.navigate", url=f"{below}/docs")
        await browser.until("document.querySelectorAll('.opblock').length >= 9")
        assert await browser.value("document.querySelector('.servers select').value") == (
            "/guided/lm"
        )

    with serving("/guided/lm") as below:
        visit(debugger, below, work)


def test_refusals_and_stopping_are_told(debugger: str, url: str) -> None:
    async def work(browser: Browser) -> None:
        await browser.value("document.getElementById('question').value = 'refuse this'")
        await browser.value("document.getElementById('ask').click()")
        await browser.until(
            "document.getElementById('error').textContent.includes('cannot read this')"
        )
        assert await browser.value(SHOWN_CARDS) == 0, "nothing came that they could show"
        await browser.value("document.getElementById('question').value = 'take your time'")
        await browser.value("document.getElementById('ask').click()")
        await browser.until("document.getElementById('rationale').textContent.length > 5")
        await browser.value("document.getElementById('stop').click()")
        await browser.until("document.getElementById('error').textContent === 'Stopped.'")
        assert await browser.value(SHOWN_CARDS) == 1, "the rationale as far as it came"
        assert not await browser.value("document.getElementById('ask').disabled")

    visit(debugger, url, work)
