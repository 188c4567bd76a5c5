"""Hosts, ports and origins as a person types them: what is wrong with them, and how requests write them."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from onecard.config.problems import Problem
from onecard.errors import ConfigError


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def address_problems(host: str, port: int) -> list[Problem]:
    """What is wrong with an address to listen on, whoever may use it."""
    found: list[Problem] = []
    if not host.strip():
        found.append(("--host", "is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network"))
    if not 0 <= port <= 65535:
        found.append(("--port", f"{port} is not between 0 and 65535"))
    return found


def split_list(text: str) -> list[str]:
    """The names in a text with commas: "a, b" -> ["a", "b"]."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def plain_origin(text: str) -> str:
    """An origin as browsers send it. Raises ValueError that says the right form.

    "HTTPS://Page.Example:443/" -> "https://page.example"
    """
    scheme, separator, _ = text.partition("://")
    if text in ("*", "null"):
        raise ValueError(f"{text} would let foreign pages use the card; name each page, such as https://example.org")
    if not separator:
        raise ValueError(f"{text} has no scheme; write https://{text} or http://{text}")
    place, more = host_and_port(text.removeprefix(scheme + separator))
    own_port = {"http": ":80", "https": ":443"}.get(scheme.lower(), "/")
    origin = f"{scheme.lower()}://{place.removesuffix(own_port)}"
    if more:
        raise ValueError(f"{text} is more than an origin, which has no path; write {origin}")
    return origin


def plain_host(text: str) -> str:
    """A name as it stands in a Host header, without the port, which does not matter. Raises ValueError.

    "http://Box.lan:8000/" -> "box.lan"
    """
    if is_address(text):
        return text
    place, more = host_and_port(text.rpartition("://")[2])
    host = urlsplit(f"//{place}").hostname or ""
    if more:
        raise ValueError(f"{text} is more than a name, which has no path; write {host}")
    return host


def host_and_port(text: str) -> tuple[str, str]:
    """Split "Box.lan:8000/x" into "box.lan:8000" and "x". Raises ValueError for what names no single host."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError:
        host, port = "", None
    if not host or "*" in host or "@" in text or any(sign.isspace() for sign in text):
        raise ValueError(f"{text or 'nothing'} names no single host; write each name in full, with commas between them")
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}", text[len(parts.netloc) :].strip("/")


def list_problems(name: str, text: str, plain: Callable[[str], str]) -> list[Problem]:
    """What is wrong with the entries of an option that takes a list."""
    found: list[Problem] = []
    for entry in split_list(text):
        try:
            plain(entry)
        except ValueError as reason:
            found.append((f"--{name}", str(reason)))
    return found


def endpoint_address(flag: str, given: str, *endings: str) -> str:
    """The address of an OpenAI-compatible endpoint without what is said to end it. Raises ConfigError.

    http://localhost:8000/v1/models, "/models" -> http://localhost:8000/v1
    """
    import httpx

    address = given.strip().rstrip("/")
    for ending in endings:
        address = address.removesuffix(ending)
    try:
        url = httpx.URL(address)
    except httpx.InvalidURL as reason:
        raise ConfigError(flag, f"{given!r} is no address: {reason}") from reason
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(flag, f"{given!r} is no address; write it like http://localhost:8000/v1")
    return address


def is_address(name: str) -> bool:
    """True for a literal IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
