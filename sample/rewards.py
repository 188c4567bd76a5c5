"""A reward of one's own for `--reward_file sample/rewards.py`: the recorded answer, and nothing behind it.

The function is asked about one answer at a time; of prompt, answer, reference and row it gets those that it names.
"""

from __future__ import annotations


def reward(answer, reference):
    """1 for the recorded answer, with a full stop or without; 0 for another answer, and for one that goes on."""
    return float(answer.rstrip(" .。\n") == reference)
