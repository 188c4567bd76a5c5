"""Blind comparison while chatting: one question, two models, their answers in an order that tells nothing, one vote.

The votes lie as `onecard evaluate blind` keeps them (votes.json, preferences.jsonl, result.json), with the pairs beside
them, because here questions come one by one. Knows folders and votes. It does not know models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onecard.data.messages import Turn, turns_to_messages
from onecard.errors import CheckpointError, ConfigError
from onecard.serve.web.votes import PREFERENCES_FILE, BlindVotes, VotedPair
from onecard.storage import write_whole

PAIRS_FILE = "pairs.jsonl"


def votes_folder(root: Path, names: Sequence[str]) -> Path:
    """Where the votes on two models lie; the same whichever is named first."""
    return root / " ".join(re.sub(r"[^\w.-]", "_", name) for name in sorted(names))


def open_votes(root: Path, names: Sequence[str]) -> BlindVotes:
    """The votes on two models so far. Raises ConfigError for files that are none."""
    folder, (a, b) = votes_folder(root, names), sorted(names)
    pairs = _read_pairs(folder / PAIRS_FILE)
    try:
        return BlindVotes(folder, pairs, (a, b))
    except ConfigError:
        if not pairs:
            raise
    votes = BlindVotes(folder, pairs[:-1], (a, b))  # ended between the two files that `add_pair` writes
    votes.add(pairs[-1])
    return votes


def add_pair(root: Path, turns: Sequence[Turn], answers: dict[str, str]) -> BlindVotes:
    """Keep the answers of two models, by their names, and ask about them. Raises CheckpointError and ConfigError."""
    votes, folder = open_votes(root, [*answers]), votes_folder(root, [*answers])
    pairs = _read_pairs(folder / PAIRS_FILE)
    a, b = (answers[name] for name in votes.names)
    pair = VotedPair(str(len(pairs) + 1), tuple(turns), a, b)
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in (*pairs, pair)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PAIRS_FILE, "".join(lines))
    except OSError as reason:
        raise CheckpointError(f"{folder / PAIRS_FILE} cannot be written ({reason.strerror or reason})") from None
    votes.add(pair)
    return votes


def view_of(votes: BlindVotes, *, with_result: bool = False) -> dict[str, Any]:
    """What a page may know: nothing that tells whose an answer is, until the result is asked for.

    The result is written beside the votes, with the preference pairs that `--objective dpo` reads.
    """
    pair = votes.current
    shown = None
    if pair is not None:
        first, second = votes.in_order(pair)
        shown = {"key": pair.key, "messages": turns_to_messages(pair.turns), "first": first, "second": second}
    view: dict[str, Any] = {"pair": shown, "n_votes": len(votes.votes), "n_pairs": len(votes.pairs) + votes.n_same}
    if with_result and votes.pairs:
        view |= {"result": votes.export(), "file": str(votes.folder / PREFERENCES_FILE)}
    return view


def _read_pairs(path: Path) -> list[VotedPair]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [VotedPair(row["key"], tuple(Turn(**turn) for turn in row["turns"]), row["a"], row["b"]) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as reason:
        raise ConfigError(
            "", f"{path} is no file of answers to vote on: {reason}; move it away to begin anew"
        ) from None
