"""The page in a browser: no request, sort, filter, plot, one run, two runs, a phone.

Headless Chromium is asked through its debugging pipe, so nothing but the browser is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spinlab.report.page.build import page_of

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
NASTY = "<img src=x onerror=document.title=1></script><script>document.title=2</script>"


class Browser:
    """A page of a browser, and the requests that it made."""

    def __init__(self, profile: Path) -> None:
        down, self._write = os.pipe()
        self._read, up = os.pipe()
        self.requests: list[str] = []
        self._count, self._rest, self._session = 0, b"", {}
        command = f'exec "$0" "$@" 3<&{down} 4>&{up}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(down, up),
            stderr=subprocess.DEVNULL,
        )
        os.close(down)
        os.close(up)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.ask("Network.enable")
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do one command of the browser's protocol."""
        self._count += 1
        asked = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while (told := self._next()).get("id") != self._count:
            pass
        assert "error" not in told, told
        return told["result"]

    def open(self, path: Path, view: str = "") -> None:
        """Load a file anew, and wait until it is there."""
        self.ask("Page.navigate", url="about:blank")
        self.requests.clear()
        self.ask("Page.navigate", url=f"{path.as_uri()}#{view}")
        while self.value("document.readyState") != "complete":
            pass

    def value(self, expression: str) -> Any:
        """Return what JavaScript gives in the page."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        told = self.ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def texts(self, selector: str) -> list[str]:
        return self.value(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent)")

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": True}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], 60)
            piece = os.read(self._read, 2**16) if ready else b""
            assert piece, "the browser is gone, or does not answer"
            self._rest += piece
        one, _, self._rest = self._rest.partition(b"\0")
        told = json.loads(one)
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["params"]["request"]["url"])
        return told


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


def run(number: int, **parts: Any) -> dict[str, Any]:
    metrics = {"ppl/wiki/fp": 9.0, "ppl/wiki/integer": 30.0 - number, "bits/weights/integer": 4.05}
    settings = {"seed": number % 3, "model.name": "toy", "rotation.r1": "hadamard"}
    return {
        "id": f"runs/toy/{number}/record.json", "experiment": f"experiment{number}", "key": "k",
        "model": "toy", "command": f"spinlab seed={number % 3}", "settings": settings,
        "environment": {"python": "3.11"}, "metrics": metrics, "stages": [["learn", 3.5, False]],
        "curves": {"step": [0, 1, 2], "loss": [3.0, None, 2.0]}, "figures": [],
        "layers": {"outliers/before": [7.5, 8.0, 7.0]}, **parts,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path):
    """Return what writes the page of runs."""

    def write(runs: list[dict[str, Any]], left_out: dict[str, str] | None = None) -> Path:
        path = tmp_path / "index.html"
        content = {"runs": runs, "left_out": left_out or {}, "variants": ["fp", "integer"]}
        path.write_text(page_of(content, f"{len(runs)} runs"))
        return path

    return write


FIRST = "#results tbody tr td:first-child"


def test_the_page_asks_for_nothing_and_its_policy_holds(browser, page):
    dot = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
    )
    figures = [{"name": "dot", "data": base64.b64encode(dot).decode()}]
    path = page([run(0, figures=figures)])
    browser.open(path, "run=runs/toy/0/record.json")
    assert browser.value("document.images[0].decode().then(() => document.images[0].width)") == 1
    asked = [url.partition(":")[0] for url in browser.requests]
    assert (browser.requests[0].partition("#")[0], asked[0]) == (path.as_uri(), "file")
    assert set(asked[1:]) <= {"data"}
    refused = "fetch('http://127.0.0.1:9').then(() => 'sent', error => error.message)"
    assert browser.value(refused) == "Failed to fetch"
    tried = """new Promise(done => {
        addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
        document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}));
    })"""
    assert browser.value(tried) == "img-src"


def test_rows_are_sorted_and_filtered_by_the_address_and_by_hand(browser, page):
    path = page([run(number) for number in range(12)])
    browser.open(path, "filter=seed=1 ppl/wiki<28&sort=ppl/wiki")
    assert browser.texts(FIRST) == ["experiment10", "experiment7", "experiment4"]
    browser.value("document.querySelector('[aria-sort] a').click()")
    browser.value("new Promise(requestAnimationFrame)")
    assert browser.texts(FIRST) == ["experiment4", "experiment7", "experiment10"]
    typed = "const f = document.getElementById('filter'); f.value = 'experiment1'; "
    browser.value(typed + "f.dispatchEvent(new Event('input'))")
    assert browser.texts(FIRST) == ["experiment1", "experiment10", "experiment11"]
    assert "filter=experiment1" in browser.value("location.hash")
    assert browser.texts("#plot circle title")[0].startswith("experiment1 ")


def test_a_run_shows_curves_and_settings_and_two_show_their_difference(browser, page):
    other = run(1, settings={"seed": 1, "model.name": "toy", "rotation.r1": "random"})
    one = "runs/toy/0/record.json"
    browser.open(page([run(0), other]), f"run={one}&a={one}&b=runs/toy/1/record.json")
    assert browser.texts("#run h2") == ["Run experiment0"]
    drawn = "[...document.querySelectorAll('#run .curves svg')].map(e => e.ariaLabel)"
    assert browser.value(drawn) == ["loss against step", "outliers/before against layer"]
    assert len(browser.texts("#run path.curve")) == 2
    assert len(browser.texts("#difference path.curve")) == 4
    assert "rotation.r1hadamard" in browser.texts("#run details tr")
    rows = browser.texts("#difference tbody tr")
    assert "rotation.r1hadamardrandom" in rows
    assert "ppl/wiki/integer3029-1-3.33333 %" in rows
    assert not any("python" in row for row in rows)


def test_text_of_a_record_is_shown_and_never_run(browser, page):
    nasty = run(0, experiment=NASTY, settings={NASTY: NASTY, "__proto__": "x"}, metrics={NASTY: 1})
    browser.open(page([nasty], {NASTY: NASTY}), "run=runs/toy/0/record.json&columns=*")
    assert browser.texts(FIRST) == [NASTY]
    assert browser.texts("#left-out td") == [NASTY, NASTY]
    assert browser.value("document.images.length") == 0
    assert browser.value("document.title") == "1 runs"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "No records were found"), (1, ""), (500, "")], ids=["0", "1", "500"]
)
def test_the_page_works_with_any_number_of_runs(browser, page, count, said):
    browser.open(page([run(number) for number in range(count)]))
    assert len(browser.texts(FIRST)) == count
    assert browser.texts("#results h2") == [f"Results: {count} of {count} runs"]
    assert said in browser.texts("#results")[0]
    assert len(browser.texts("#plot circle title")) == count


def test_on_a_phone_tables_scroll_and_the_page_does_not(browser, page, tmp_path):
    long = run(0, experiment="a" * 90, command="spinlab " + "x" * 300)
    browser.size(360, 740)
    browser.open(page([long, run(1)]), f"run={long['id']}&a={long['id']}&b=runs/toy/1/record.json")
    assert browser.value("document.documentElement.scrollWidth") <= 360
    wide = "[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
    assert browser.value(wide)
    browser.value("scrollTo(0, 0)")
    image = browser.screenshot()
    (tmp_path / "phone.png").write_bytes(image)
    assert image.startswith(b"\x89PNG")
    assert len(image) > 5_000  # an empty page takes less
