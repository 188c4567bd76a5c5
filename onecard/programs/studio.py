"""Open the studio, a page to look at data and to start, watch and export runs.

onecard studio --data_root my-data --output_root outputs
Runs are processes of their own: the studio may be closed and started again at any time.
"""

from __future__ import annotations

import os
import sys
import threading
import webbrowser

from onecard.config.parsing import parse
from onecard.config.studio import StudioOptions
from onecard.console import say


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line."""
    options = parse(StudioOptions, argv, description=__doc__ or "")

    from onecard.serve.listen import run_server
    from onecard.studio.app import studio_app

    app = studio_app(options)
    context = app.state.context
    say(f"runs are in {context.output_root}; data are read in {', '.join(map(str, context.data_roots))}")
    when_open = None if options.no_browser or not has_screen() else open_browser
    run_server(app, options.host, options.port, before_shutdown=context.events.close, when_open=when_open)


def has_screen() -> bool:
    """Whether a browser would open a window; elsewhere webbrowser starts one that takes over the terminal."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_browser(url: str) -> None:
    """Open the page in a thread: some systems wait there until the browser has been closed."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
