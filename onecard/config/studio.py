"""Options of the studio: where it listens, and which folders it may read and write. Docstrings are help texts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from onecard.config.addresses import address_problems, is_loopback, list_problems, plain_host
from onecard.config.inference import API_KEY_VARIABLE
from onecard.config.problems import Problem


@dataclass
class StudioOptions:
    """The page and its folders."""

    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --api_key."""
    port: int = 7861
    """Port to listen on; 0: any free one."""
    api_key: str | None = None
    """Key that the page asks for (any user name, the key as password); better in the environment variable
    ONECARD_API_KEY, which `ps` does not show."""
    allowed_hosts: str = ""
    """Further names under which the page may be reached, with commas between them (a proxy's, a machine's)."""
    data_root: list[str] = field(default_factory=list)
    """Folder of data and models that the page may read; may be given several times. The samples that come along, what
    is uploaded and what runs make can always be read."""
    output_root: str = "outputs"
    """Folder of runs: those in it are shown, new ones are put there, and nothing is written elsewhere."""
    upload_max_mb: int = 2048
    """Largest file that may be uploaded, in MB."""
    no_browser: bool = False
    """Print the address and open no browser."""
    language: Literal["auto", "en", "zh"] = "auto"
    """Language of the messages here; the page has its own switch."""

    @property
    def key(self) -> str | None:
        """The key that was typed, else the environment's, else None."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    def problems(self) -> list[Problem]:
        found = address_problems(self.host, self.port) + list_problems("allowed_hosts", self.allowed_hosts, plain_host)
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            found.append(("--api_key", "must be plain ASCII letters, digits and signs, and not empty"))
        if self.key is None and self.host and not is_loopback(self.host):
            found.append(("--host", f"{self.host} can be reached from other machines; set {API_KEY_VARIABLE}"))
        output = Path(self.output_root).expanduser()
        if not self.output_root.strip() or (output.exists() and not output.is_dir()):
            found.append(("--output_root", f"{self.output_root!r} is no folder"))
        if self.upload_max_mb < 1:
            found.append(("--upload_max_mb", f"{self.upload_max_mb} is less than 1"))
        return found
