"""Downloads from the Hugging Face Hub, and checksums of model directories."""

from __future__ import annotations
