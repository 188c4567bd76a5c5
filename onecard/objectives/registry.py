"""The objectives by name: the one table that a new objective is entered in."""

from __future__ import annotations

from onecard.errors import ModelError
from onecard.objectives.base import Objective
from onecard.objectives.grpo import GroupRelative
from onecard.objectives.kto import KahnemanTversky
from onecard.objectives.next_token import PlainDocuments, SupervisedFineTuning
from onecard.objectives.preference import DirectPreference, IdentityPreference, OddsRatioPreference, SimplePreference
from onecard.objectives.pretrain import Pretraining
from onecard.objectives.reward import RewardModelling

OBJECTIVES: dict[str, Objective] = {
    each.name: each
    for each in (
        SupervisedFineTuning(), PlainDocuments(), DirectPreference(), IdentityPreference(), SimplePreference(),
        OddsRatioPreference(), KahnemanTversky(), GroupRelative(), Pretraining(), RewardModelling(),
    )
}  # fmt: skip


def objective_named(name: str) -> Objective:
    """The objective of this name. Raises ModelError where there is none, such as for a run of a later version."""
    if name not in OBJECTIVES:
        raise ModelError(f"the objective {name} is none of {', '.join(OBJECTIVES)}; a later version may know it")
    return OBJECTIVES[name]


def of_answers(name: str) -> Objective:
    """The objective by which single answers are scored of a model that was trained with the one of this name."""
    return known if isinstance(known := objective_named(name), PlainDocuments) else SupervisedFineTuning()
