"""Which names folders and files may have here, so that another system can have them as well."""

from __future__ import annotations

import re

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[\d¹²³])(\..*)?", re.IGNORECASE)
MOST_NAME_BYTES = 200  # file systems take 255; programs of this kit add endings such as .partial


def is_portable(name: str) -> bool:
    """Whether every system takes this name: no reserved one, no full stop or space at its end, not too long."""
    return not RESERVED.fullmatch(name) and name[-1:] not in (".", " ") and len(name.encode()) <= MOST_NAME_BYTES
