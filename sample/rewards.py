"""A reward of one's own for `--reward_file sample/rewards.py`: the recorded answer, and nothing behind it.

The function is asked about one answer at a time; of prompt, answer, reference and row it gets those that it names.
"""

from __future__ import annotations


def reward(answer, reference):
    """1 for the recorded answer, 1/2, 1/3, ... with one, two, ... more characters behind it, 0 for another answer."""
    if not answer.startswith(reference):
        return 0.0
    return 1 / (1 + len(answer) - len(reference))
