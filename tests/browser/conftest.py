"""A real Chromium, and pages to open in it: one browser and one server per module, a context of its own per test.

`open_page` opens pages to chat and ask; `open_view` those of the studio that a module's fixture `studio` serves.

Skipped, with the reason printed, where there is no Chromium or no playwright. ONECARD_SCREENSHOTS=<run
directory> writes what the README shows into docs/screenshots/.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from onecard.studio.context import StudioContext

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
SCREENSHOTS = Path(__file__).resolve().parents[2] / "docs" / "screenshots"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with a user-data folder of its own."""
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shared_context(browser: Any) -> Any:
    """One context for all tests that need no other, so that the page's scripts are fetched and compiled once."""
    return browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")


class Opener:
    """Opens pages, and remembers what they asked of foreign hosts and what went wrong in them."""

    def __init__(self, browser: Any, shared: Any) -> None:
        self._browser, self._shared = browser, shared
        self._pages: list[Any] = []
        self._urls: set[str] = set()
        self.foreign: list[str] = []
        self.errors: list[str] = []

    def __call__(self, url: str, *, ready: str = "#oc-submit", **options: Any) -> Any:
        """A page that is ready; with options for a context of its own, else a tab of the shared one."""
        viewport = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
        context = self._browser.new_context(**(viewport | options)) if options else self._shared
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: self.foreign.append(request.url) if is_foreign(request.url) else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._pages.append(page)
        self._urls.add(url)
        page.goto(url)
        page.wait_for_selector(ready)
        page.wait_for_function("window.onecard && onecard.is_ready()")
        return page

    def close(self) -> None:
        """Close everything and forget what was stored; a tab of the next test would take up a chat of this one."""
        for page in [*self._shared.pages, *self._pages]:
            page.close()
            if page.context is not self._shared:
                page.context.close()
        for url in self._urls:
            page = self._shared.new_page()
            page.route("**/*", lambda route: route.fulfill(body="", content_type="text/html"))
            page.goto(url)
            page.evaluate("localStorage.clear()")
            page.close()


@pytest.fixture
def open_page(browser: Any, shared_context: Any) -> Iterator[Opener]:
    """open_page(url) -> a page; foreign requests and errors in it fail the test."""
    opener = Opener(browser, shared_context)
    yield opener
    opener.close()
    assert opener.foreign == []
    assert opener.errors == []


def is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:"))


@contextmanager
def serving(web_page: Any, **options: Any) -> Iterator[str]:
    """The address of a page that is served from a thread of this process."""
    from onecard.config.inference import PageOptions
    from onecard.serve.web import app as web
    from onecard.serve.web.server import page_application

    page = PageOptions(**options)
    application = page_application(lambda app: web.mount(app, web_page, auth=page.auth), page, max_body_bytes=2_000_000)
    with served(application) as address:
        yield address


@contextmanager
def served(application: Any, end: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of an application that is served from a thread of this process; `end` ends its open streams."""
    import uvicorn

    from onecard.serve.listen import open_socket

    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=1))
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        end()
        server.should_exit = True
        thread.join(30)


def set_option(page: Any, name: str, value: str) -> None:
    """Bring an option into the view Train by its name, and give it a value."""
    page.fill("#more-options", name)
    page.press("#more-options", "Enter")
    page.fill(f"#opt-{name}", value)
    page.press(f"#opt-{name}", "Tab")  # a value counts when its field is left


class Studio(NamedTuple):
    """A studio that is served: where, and its folders."""

    address: str
    context: StudioContext


@contextmanager
def serving_studio(folder: Path, *, program: Sequence[str] = (), **options: Any) -> Iterator[Studio]:
    """A studio whose output root is `folder`/out; with a program that takes the place of `onecard`, if any."""
    from onecard.config.studio import StudioOptions
    from onecard.studio.app import studio_app
    from onecard.studio.context import open_context
    from onecard.studio.jobs import ALIVE

    asked = StudioOptions(output_root=str(folder / "out"), **options)
    context = open_context(asked)
    if program:
        context.jobs.program = tuple(program)
    with served(studio_app(asked, context), context.events.close) as address:
        yield Studio(address, context)
    for job in context.jobs.all():  # of a test that failed
        if job["state"] in ALIVE:
            context.jobs.cancel(job["id"])


@pytest.fixture
def open_view(browser: Any, studio: Studio) -> Iterator[Any]:
    """open_view("runs") -> a page; foreign requests and errors in it fail the test."""
    contexts: list[Any] = []
    errors: list[str] = []

    def told(said: Any) -> None:
        # That a question was refused (4xx) is told on the page, and by the browser as well.
        if said.type in ("error", "warning") and "with a status of 4" not in said.text:
            errors.append(said.text)

    def opened(view: str, *, with_policy: bool = False, **options: Any) -> Any:
        # The page's own policy forbids `eval`, by which playwright waits for conditions and axe-core is brought in.
        viewport = {"viewport": {"width": 1366, "height": 768}, "locale": "en-US"}
        context = browser.new_context(**(viewport | options), bypass_csp=not with_policy)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", told)
        page.on("request", lambda asked: errors.append(asked.url) if is_foreign(asked.url) else None)
        page.goto(f"{studio.address}#{view}")
        page.wait_for_selector("body[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def held_back(page: Any, pattern: str) -> Callable[[], None]:
    """Keep back the answers to these requests, which the server makes at once; what is given lets them come."""
    held: list[tuple[Any, Any]] = []
    is_open = False

    def keep(route: Any) -> None:
        if is_open:
            route.continue_()
        else:
            held.append((route, route.fetch()))

    def let_come() -> None:
        nonlocal is_open
        wait_until(lambda: held or page.wait_for_timeout(20), what=pattern)
        is_open = True
        for route, answer in held:
            route.fulfill(response=answer)

    page.route(pattern, keep)

    return let_come


def press_until(page: Any, selector: str, key: str = "Tab") -> None:
    """Go on with the keyboard until this part has the focus."""
    for _ in range(80):
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{selector} is not reached by {key}")


def wait_until(condition: Callable[[], Any], seconds: float = 10.0, what: str = "") -> Any:
    """The first true value of `condition`, which is asked again and again for so long."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"not within {seconds} s: {what or condition}"
        time.sleep(0.02)


def shot(page: Any, name: str) -> None:
    """A picture for the documents."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.mouse.move(2, 2)
    page.evaluate("scrollTo(0, 0); document.querySelector('#oc-side').scrollTop = 0; document.activeElement.blur()")
    page.wait_for_timeout(400)
    page.screenshot(path=str(SCREENSHOTS / name))
