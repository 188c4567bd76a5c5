"""The base model: loading, quantisation, attention, the loss, the device."""

from __future__ import annotations

from onecard.model.late_compilation import compile_late

compile_late()  # before any module of this package imports peft or bitsandbytes
