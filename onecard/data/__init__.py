"""From a file of records to token ids: readers, formats, chat templates, tokenization, cached data sets, batches."""

from __future__ import annotations
