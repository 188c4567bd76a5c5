"""What the Hugging Face Hub's library raises, as one line that says what to do next. Knows addresses; asks nothing."""

from __future__ import annotations

import os
from typing import Literal

from onecard.console import first_line
from onecard.installation import command

MIRROR = "https://hf-mirror.com"
LOG_IN = "set HF_TOKEN or run `hf auth login`"


def hub_problem(
    reason: Exception, what: str, repository: str, *, elsewhere: str = "", address: str = "",
    kind: Literal["model", "dataset"] = "model", remedy: str = "",
) -> str:  # fmt: skip
    """One sentence for an error of huggingface_hub, and what to do.

    Args:
        what: begins the sentence: what was asked for.
        elsewhere: where else it was looked for, such as "a directory here".
        address: the Hub or mirror that was asked, where that was chosen.
        remedy: for a Hub that does not answer or refuses; empty: a directory or a mirror.
    """
    kinds = {cls.__name__ for cls in type(reason).__mro__}  # by name: the library is not needed for what it raised
    remedy = remedy or f"give a directory; {mirror_hint(repository, kind=kind)}"
    negation = f"neither {elsewhere} nor" if elsewhere else "not"
    if "GatedRepoError" in kinds:
        page = f"{address}/{repository}" if address else "its Hub page"
        return f"{what} asks for your consent: accept its terms at {page}, then {LOG_IN}"
    if "RepositoryNotFoundError" in kinds:
        nowhere = f"{what} is {negation} a {kind} on the Hub"
        return f"{f'{address} has no {what}' if address else nowhere} (or it is private: {LOG_IN})"
    if address and "HfHubHTTPError" not in kinds:
        return f"{address} does not answer ({first_line(reason)}); check the network, or {remedy}"
    if "LocalEntryNotFoundError" in kinds:
        return f"{what} is {negation} in the Hub cache, and the Hub cannot be reached; go online, or {remedy}"
    return f"{what} cannot be downloaded: {first_line(reason)}; try again, or {remedy}"


def mirror_hint(repository: str, *, kind: Literal["model", "dataset"] = "model") -> str:
    """What to do where the Hub cannot be reached: the two ways to a mirror, or the mirror that is asked already."""
    if asked := os.environ.get("HF_ENDPOINT"):
        return f"HF_ENDPOINT={asked} was asked; check that address"
    return (
        f"where huggingface.co cannot be reached, set HF_ENDPOINT to a mirror, such as {MIRROR}, or download first: "
        f"{command('download')} --repo_id {repository} --repo_type {kind} --endpoint {MIRROR}"
    )
