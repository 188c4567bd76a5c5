"""A page that serves itself: its application, the layers that guard it, and the public link where one is wanted.

Knows addresses and FastAPI. It does not know what the page shows; app.py brings that along.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from fastapi import FastAPI

from onecard.config.inference import PageOptions
from onecard.console import say, warn
from onecard.serve.listen import open_socket, run_server
from onecard.serve.security import NetworkRules, Protection

Mount = Callable[[FastAPI], None]
PublicLink = Callable[[str, int, str], str]  # (host, port, token) -> address


def serve_page(mount: Mount, page: PageOptions, *, max_body_bytes: int, public_link: PublicLink) -> None:
    """Serve until Ctrl-C. `mount` puts the page into an application, `public_link` gives a tunnel's address.

    Raises ConfigError when the address cannot be listened on.
    """
    port = page.port
    if page.share and port == 0:
        with open_socket(page.host, 0) as listening:  # the tunnel has to know the port before the server has one
            port = int(listening.getsockname()[1])
    shared = shared_host(public_link, port) if page.share else ""
    run_server(page_application(mount, page, max_body_bytes=max_body_bytes, also_called=shared), page.host, port)


def page_application(mount: Mount, page: PageOptions, *, max_body_bytes: int, also_called: str = "") -> FastAPI:
    """The page behind its guards. `also_called` is a host name that counts as the server's own."""
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount(application)
    names = ",".join(filter(None, (page.allowed_hosts, also_called)))
    rules = NetworkRules(page.host, names, max_body_bytes=max_body_bytes)
    application.add_middleware(Protection, rules=rules)
    return application


def shared_host(public_link: PublicLink, port: int) -> str:
    """The host of the public link, which is told to the person; empty where there is none to be had."""
    try:
        link = public_link("127.0.0.1", port, secrets.token_urlsafe(32))
    except Exception as reason:
        # gradio raises what its network library and its downloaded helper raise; the page itself works all the same.
        warn(f"there is no public link: {type(reason).__name__}: {reason}")
        return ""
    say(f"Everybody who knows the password can open {link}")
    return urlsplit(link).hostname or ""
