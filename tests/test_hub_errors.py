"""One text for each way in which the Hub fails, wherever it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from onecard.data.sources import data_fingerprint
from onecard.errors import DataError, OneCardError
from onecard.export.hub.files import Repository, explained
from onecard.model.files import locate
from onecard.model.memory.architecture import architecture_of

ANSWER = httpx.Response(403, request=httpx.Request("GET", "https://hub.example/x"))
FAULTS = {
    "gated": (errors.GatedRepoError("gated", response=ANSWER), "accept its terms at .*, then set HF_TOKEN or run `hf"),
    "missing": (errors.RepositoryNotFoundError("404", response=ANSWER), r"\(or it is private: set HF_TOKEN or run `hf"),
    "no network": (errors.LocalEntryNotFoundError("no answer"), "HF_ENDPOINT"),
    "refused": (errors.HfHubHTTPError("403 Forbidden", response=ANSWER), "cannot be downloaded: 403 Forbidden; try ag"),
}


def from_tool(name: str) -> Any:
    with explained(Repository(name)):
        huggingface_hub.HfApi().dataset_info(name)


WAYS = {"model": locate, "plan": architecture_of, "data": data_fingerprint, "download": from_tool}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", WAYS)
def test_each_place_says_the_same(way: str, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    error, message = FAULTS[fault]

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(OneCardError, match=message) as raised:
        WAYS[way]("some-org/some-thing")
    assert isinstance(raised.value, DataError) == (way == "data")
    assert "some-org/some-thing" in str(raised.value) or "https://huggingface.co does not answer" in str(raised.value)
