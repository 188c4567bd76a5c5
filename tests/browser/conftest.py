"""A real Chromium, and pages to open in it: one browser and one server per module, whose tests take over the tabs.

`open_page` opens pages to chat and ask; `open_view` those of the studio that a module's fixture `studio` serves.

Skipped, with the reason printed, where there is no Chromium or no playwright. ONECARD_SCREENSHOTS=<run
directory> writes what the README shows into docs/screenshots/.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin

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


class Tabs:
    """One context for each set of options, and the tab that the test before has left in it.

    A new context fetches all scripts anew, and a new tab is a process that compiles them anew.
    """

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._contexts: dict[str, Any] = {}

    def take(self, taken: Sequence[Any], options: dict[str, Any]) -> Any:
        """A tab that is none of these."""
        key = repr(sorted(options.items()))
        if key not in self._contexts:
            self._contexts[key] = self._browser.new_context(**options)
        free = [page for page in self._contexts[key].pages if page not in taken]
        return free[0] if free else self._contexts[key].new_page()


@pytest.fixture(scope="module")
def tabs(browser: Any) -> Tabs:
    return Tabs(browser)


class Opener:
    """Opens pages, remembers what went wrong in them, and leaves no trace of them.

    errors: of scripts, and addresses of foreign hosts. questions: of dialogs, which are answered by `agree`.
    """

    def __init__(self, tabs: Tabs, **options: Any) -> None:
        self._tabs, self._options = tabs, {"locale": "en-US", **options}
        self._pages: list[Any] = []
        self._urls: set[str] = set()
        self.agree = False
        self.errors: list[str] = []
        self.questions: list[str] = []
        self._listeners = {"request": self._requested, "pageerror": self._failed, "dialog": self._asked}

    def open(self, url: str, ready: str, options: dict[str, Any]) -> Any:
        """A tab of the context of these options, when `ready` is in it."""
        options = self._options | options
        page = self._tabs.take(self._pages, options)
        page.set_viewport_size(options["viewport"])
        page.set_default_timeout(60_000)  # the machine may be busy
        for event, listener in self._listeners.items():
            page.on(event, listener)
        self._pages.append(page)
        self._urls.add(url)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    def close(self) -> None:
        """Leave the pages, and forget what they stored: the next test would take up a chat of this one."""
        from playwright.sync_api import Error

        for context in {page.context for page in self._pages}:
            kept, *others = context.pages or [context.new_page()]
            for event, listener in self._listeners.items() if kept in self._pages else ():
                kept.remove_listener(event, listener)
            for page in others:
                page.close()
            context.clear_permissions()
            kept.unroute_all(behavior="ignoreErrors")
            for url in self._urls:
                with suppress(Error):  # of a server that has ended
                    kept.goto(urljoin(url, "/gradio_api/info"))  # refused by the chat, and unknown to the studio
                    kept.evaluate("localStorage.clear(); sessionStorage.clear()")
            kept.mouse.move(0, 0)

    def _requested(self, request: Any) -> None:
        if is_foreign(request.url):
            self.errors.append(request.url)

    def _failed(self, error: Any) -> None:
        self.errors.append(str(error))

    def _asked(self, dialog: Any) -> None:
        self.questions.append(dialog.message)
        dialog.accept() if self.agree else dialog.dismiss()


class PageOpener(Opener):
    """open_page(url) -> a page to chat, ask or vote, ready."""

    def __call__(self, url: str, *, ready: str = "#oc-submit", **options: Any) -> Any:
        page = self.open(url, ready, {"viewport": {"width": 1280, "height": 800}} | options)
        page.wait_for_function("window.onecard && onecard.is_ready()")
        return page


class ViewOpener(Opener):
    """open_view("runs") -> a view of the studio."""

    def __init__(self, tabs: Tabs, address: str) -> None:
        super().__init__(tabs, viewport={"width": 1366, "height": 768})
        self._address = address
        self._listeners["console"] = self._told

    def __call__(self, view: str, *, with_policy: bool = False, **options: Any) -> Any:
        # The page's own policy forbids `eval`, by which playwright waits for conditions and axe-core is brought in.
        return self.open(f"{self._address}#{view}", "body[data-ready]", options | {"bypass_csp": not with_policy})

    def _told(self, message: Any) -> None:
        # That a question was refused (4xx) is told on the page, and by the browser as well.
        if message.type in ("error", "warning") and "with a status of 4" not in message.text:
            self.errors.append(message.text)


@pytest.fixture
def open_page(tabs: Tabs) -> Iterator[PageOpener]:
    """Opens pages; foreign requests and errors in them fail the test."""
    opener = PageOpener(tabs)
    yield opener
    opener.close()
    assert opener.errors == []


@pytest.fixture
def open_view(tabs: Tabs, studio: Studio) -> Iterator[ViewOpener]:
    """Opens views; foreign requests and errors in them fail the test."""
    opener = ViewOpener(tabs, studio.address)
    yield opener
    opener.close()
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

    server = uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=0.1))
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


def held_back(page: Any, pattern: str) -> Callable[[], None]:
    """Keep back the answers to these requests, which the server makes at once; what is given lets them come."""
    held: list[tuple[Any, Any]] = []
    is_open = False

    def keep(route: Any) -> None:
        answer = route.fetch()
        if is_open:  # by now: while the server was asked, earlier ones may have been let through
            route.fulfill(response=answer)
        else:
            held.append((route, answer))

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
