"""The votes of a blind comparison: pairs of answers, which of them stands first, what was chosen, and what that says.

A folder holds votes.json, written whole after each vote, and at the end or on request preferences.jsonl (pairs that
`--objective dpo` reads) and result.json. Does not know pages.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from onecard.data.messages import Turn
from onecard.errors import CheckpointError, ConfigError
from onecard.statistics import RESULTS, paired_test, wilson_interval
from onecard.storage import write_whole

VOTES_FILE, PREFERENCES_FILE, RESULT_FILE = "votes.json", "preferences.jsonl", "result.json"
Choice = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class VotedPair:
    """A question (turns that end with the user's) and the answers of A and B."""

    key: str
    turns: tuple[Turn, ...]
    a: str
    b: str

    @property
    def is_same(self) -> bool:
        return self.a.strip() == self.b.strip()


class BlindVotes:
    """The votes in a folder. Pairs with the same answer count as ties and are not asked about.

    Raises ConfigError where the folder holds votes on other answers, or what is no file of votes.
    """

    def __init__(self, folder: Path, pairs: Sequence[VotedPair], names: tuple[str, str], *, seed: int = 42) -> None:
        self.folder, self.names = folder, names
        self._seed, self._lock = seed, threading.Lock()
        self._take(pairs)
        self.votes: dict[str, Choice] = self._read()

    def _take(self, pairs: Sequence[VotedPair]) -> None:
        self._all = tuple(pairs)
        self.pairs = {pair.key: pair for pair in pairs if not pair.is_same}
        self.n_same = len(pairs) - len(self.pairs)
        whole = json.dumps([asdict(pair) for pair in pairs], ensure_ascii=True)
        self._about = {"pairs": hashlib.sha256(whole.encode()).hexdigest(), "seed": self._seed}

    def add(self, pair: VotedPair) -> None:
        """Ask about one more pair, where questions come one by one; the votes so far stay.

        Raises CheckpointError where it cannot be written.
        """
        with self._lock:
            self._take((*self._all, pair))
            self._write(self.votes)

    def _read(self) -> dict[str, Choice]:
        path = self.folder / VOTES_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            about, votes = stored["about"], dict(stored["votes"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise ConfigError("--output_path", f"{path} is no file of votes: {reason}") from None
        if about != self._about:
            raise ConfigError(
                "--output_path", f"{path} holds {len(votes)} votes on other answers or with another --seed; give "
                "another folder, or the same files and seed to go on"
            )  # fmt: skip
        return votes

    @property
    def current(self) -> VotedPair | None:
        """The first pair without a vote; None when all have one."""
        return next((pair for key, pair in self.pairs.items() if key not in self.votes), None)

    def b_is_first(self, key: str) -> bool:
        """Whether B's answer stands first in this pair: drawn by the seed."""
        return random.Random(f"{self._seed} {key}").random() < 0.5

    def in_order(self, pair: VotedPair) -> tuple[str, str]:
        """The answers as they are shown."""
        return (pair.b, pair.a) if self.b_is_first(pair.key) else (pair.a, pair.b)

    def vote(self, key: str, place: int) -> None:
        """Choose the answer that stands first (1), second (2) or neither (0) in the current pair; nothing happens
        where another pair is the current one by now. Raises CheckpointError where it cannot be written."""
        with self._lock:
            if self.current is None or self.current.key != key:
                return
            sides: tuple[Choice, Choice] = ("b", "a") if self.b_is_first(key) else ("a", "b")
            self._write({**self.votes, key: sides[place - 1] if place else "tie"})

    def undo(self) -> None:
        """Take the last vote back. Raises CheckpointError where that cannot be written."""
        with self._lock:
            if self.votes:
                self._write(dict([*self.votes.items()][:-1]))

    def _write(self, votes: dict[str, Choice]) -> None:
        content = {"about": self._about, "votes": [*votes.items()]}
        self._put(VOTES_FILE, json.dumps(content, indent=1) + "\n")
        self.votes = votes

    def _put(self, name: str, text: str) -> None:
        try:
            write_whole(self.folder / name, text)
        except OSError as reason:
            words = reason.strerror or str(reason)
            raise CheckpointError(f"{self.folder / name} cannot be written ({words}); earlier votes are safe") from None

    def result(self) -> dict[str, Any]:
        """What the votes so far say: how often each was chosen, B's share of what was decided, and whether B is better.

        The test is of wins, paired: 1 for the one that was chosen, 0 for both in a tie.
        """
        choices: list[str] = [*self.votes.values(), *["tie"] * self.n_same]
        wins = {side: choices.count(side) for side in ("a", "b")}
        test = paired_test([float(c == "a") for c in choices], [float(c == "b") for c in choices]) if choices else None
        return {
            "a": self.names[0], "b": self.names[1], "wins_a": wins["a"], "wins_b": wins["b"],
            "ties": choices.count("tie"), "same": self.n_same, "left": len(self.pairs) - len(self.votes),
            "share_b": [round(part, 6) for part in wilson_interval(wins["b"], wins["a"] + wins["b"])]
            if wins["a"] + wins["b"] else None,
            "result": RESULTS[test.direction if test else 0],
        }  # fmt: skip

    def preferences(self) -> list[dict[str, Any]]:
        """The decided pairs as records that `--objective dpo` reads."""
        rows = []
        for key, choice in self.votes.items():
            if choice == "tie":
                continue
            pair = self.pairs[key]
            better, worse = (pair.a, pair.b) if choice == "a" else (pair.b, pair.a)
            messages = [{"role": turn.role, "content": turn.one_text()} for turn in pair.turns]
            question = {"instruction": pair.turns[0].content, "input": pair.turns[0].input}
            asked = question if len(pair.turns) == 1 else {"messages": messages}
            rows.append({**asked, "chosen": better, "rejected": worse})
        return rows

    def export(self) -> dict[str, Any]:
        """Write the preference pairs and the result, which is returned. Raises CheckpointError."""
        result = self.result()
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.preferences()]
        self._put(PREFERENCES_FILE, "".join(rows))
        self._put(RESULT_FILE, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        return result
