"""The base model: loading, quantisation, attention, the loss, the device."""

from __future__ import annotations
