"""The objectives of a training run by what they have in common."""

from __future__ import annotations

OF_PAIRS = ("dpo", "ipo", "simpo", "orpo")
PREFERENCE_OBJECTIVES = (*OF_PAIRS, "kto")
NEEDS_PAIRS = (*OF_PAIRS, "reward")
WITH_REFERENCE = ("dpo", "ipo", "kto")  # which compare with the base without adapter
CACHES_REFERENCE = ("dpo", "ipo")
