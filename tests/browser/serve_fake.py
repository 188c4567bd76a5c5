"""Serves the chat page over the fake engine, in processes that a test can kill: one line of input starts one more.

    python -m tests.browser.serve_fake PORT

The parent has everything imported and forks, so that a server that was killed is back in a moment. It prints the
child's process id; an empty input ends it.
"""

from __future__ import annotations

import os
import signal
import sys

from onecard.config.inference import PageOptions, SamplingOptions
from onecard.serve.web import app as web
from tests.fake_engine import FakeEngine


def main() -> None:
    """Fork a server for each line of input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(int(sys.argv[1]))
            return
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


def serve(port: int) -> None:
    """Serve until killed."""
    page = PageOptions(port=port)
    sampling = SamplingOptions(max_new_tokens=512, temperature=0.7, top_p=0.9)
    web.launch(web.chat_page(FakeEngine(), sampling, page), page)


if __name__ == "__main__":
    main()
