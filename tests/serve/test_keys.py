"""Keys in a file, by name and hash, and how often each may ask."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from onecard.config.inference import ServeOptions
from onecard.errors import ConfigError
from onecard.programs import serve
from onecard.serve.keys import MOST_CLIENTS, RequestRates, add_key, name_of, read_keys
from onecard.serve.security import NetworkRules, Protection
from tests.serve.bare_server import inside
from tests.serve.test_security import HERE, ask, status


def test_a_new_key_is_known_by_its_name_and_stored_as_a_hash_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    for name in ("alice", "bob.2"):
        serve.main(["--api_keys", str(file), "--new_key", name])
    keys = re.findall(r"^(sk-\S{43})$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(keys)) == 2
    text = file.read_text(encoding="utf-8")
    assert not any(key in text for key in keys)
    assert f"alice {hashlib.sha256(keys[0].encode()).hexdigest()}\n" in text
    known = read_keys(file)
    assert [name_of(key.encode(), known) for key in [*keys, "sk-other", ""]] == ["alice", "bob.2", None, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alice secret\n", "line 1 is not NAME SHA256"),
        (f"# one\n\nalice {'0' * 64}\nalice {'1' * 64}\n", "line 4: alice stands there twice"),
        ("# nobody\n", "holds no key, so nobody could come in"),
        (None, "cannot be read"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        read_keys(file)


def test_names_that_cannot_be_and_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "alice")
    before = file.read_bytes()
    for name, words in (("alice", "already"), ("a b", "use letters"), ("", "use letters"), ("x" * 65, "at most 64")):
        with pytest.raises(ConfigError, match=words):
            add_key(file, name)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot be written"):
        add_key(tmp_path / "absent" / "keys", "alice")
    with pytest.raises(ConfigError, match="cannot be read"):
        add_key(tmp_path, "alice")


def test_other_machines_may_come_in_where_there_is_a_file_of_keys() -> None:
    assert ServeOptions(host="0.0.0.0").problems()
    assert not ServeOptions(host="0.0.0.0", api_keys="keys").problems()
    assert [flag for flag, _ in ServeOptions(new_key="alice").problems()] == ["--api_keys"]


def test_each_key_and_the_one_without_a_name_opens(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice = add_key(file, "alice")
    app = Protection(inside, NetworkRules(key="sesame", keys=read_keys(file)))
    for key, expected in ((alice, 200), ("sesame", 200), ("sk-other", 401), (read_keys(file)["alice"].hex(), 401)):
        assert status(app, HERE, ("authorization", f"Bearer {key}")) == expected


def test_a_bucket_fills_evenly_and_is_each_clients_own() -> None:
    now = 100.0
    rates = RequestRates(30, clock=lambda: now)
    assert [rates.seconds_to_wait("a") for _ in range(30)] == [0] * 30
    assert rates.seconds_to_wait("a") == pytest.approx(2)
    assert rates.seconds_to_wait("b") == 0
    now += 1.5
    assert rates.seconds_to_wait("a") == pytest.approx(0.5)  # a refused one costs nothing
    now += 0.51
    assert rates.seconds_to_wait("a") == 0
    now += 1e6
    assert [bool(rates.seconds_to_wait("a")) for _ in range(31)] == [False] * 30 + [True]
    for number in range(MOST_CLIENTS + 5):
        rates.seconds_to_wait(str(number))
    assert len(rates._left) == MOST_CLIENTS


def test_requests_beyond_the_rate_are_sent_away_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    app = Protection(inside, NetworkRules(keys=read_keys(file), requests_per_minute=2))

    def post(key: str, path: str = "/v1/completions", method: str = "POST") -> list[dict]:
        return ask(app, HERE, ("authorization", f"Bearer {key}"), path=path, method=method)

    assert [post(alice)[0]["status"] for _ in range(3)] == [200, 200, 429]
    start, body = post(alice)
    assert 1 <= int(dict(start["headers"])[b"retry-after"]) <= 30
    assert b"rate_limit_exceeded" in body["body"]
    assert post(bob)[0]["status"] == 200
    for path, method in (("/v1/models", "GET"), ("/static", "POST"), ("/health", "GET")):
        assert post(alice, path, method)[0]["status"] == 200
    assert post("sk-guessed")[0]["status"] == 401
