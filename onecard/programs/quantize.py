"""Quantise a model by the method that --method names, with what that costs measured: bnb (the default) or gptq.

onecard quantize --lora_path outputs/my-first-adapter --bits 4 --output_path outputs/my-model-4bit
onecard quantize --method gptq --lora_path outputs/my-first-adapter --output_path outputs/my-model-gptq

The options are those of the method: onecard quantize --method gptq --help. For awq, autoround, hqq and fp8 it says why
they are not made here, and what does.
"""

from __future__ import annotations

import sys
from importlib import import_module

from onecard.console import nearest, say
from onecard.errors import ConfigError

FLAG = "--method"
METHODS = {"bnb": "quantize_bnb", "gptq": "quantize_gptq"}
# What came of each, beside torch 2.13 and transformers 5.23 on a CPU; docs/en/exporting.md has the same.
NOT_HERE = {
    "awq": "autoawq is archived, and what has taken its place, gptqmodel 7.6, writes AWQ on a CUDA card only, so that "
           "nothing here could be tried; use gptq",
    "autoround": "auto-round 0.16 replaces functions of transformers in the process that imports it; use gptq, or run "
                 "auto-round by itself on the merged model with --format auto_gptq (not tried here)",
    "hqq": "transformers 5.23 says of it \"not available yet\", so that its files could not be loaded again; use bnb, "
           "which needs no calibration either",
    "fp8": "cards before the RTX 40 series compute nothing in fp8; use bnb with --bits 8",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the program with these words, or those of the command line. Raises ConfigError for a method not had here."""
    method, words = method_of(list(sys.argv[1:] if argv is None else argv))
    if method in NOT_HERE:
        raise ConfigError(FLAG, f"{method} is not made here: {NOT_HERE[method]}")
    if method not in METHODS:
        raise ConfigError(FLAG, f"{method!r} is unknown{nearest(method, [*METHODS, *NOT_HERE])}; use bnb or gptq")
    try:
        import_module(f"onecard.programs.{METHODS[method]}").main(words)
    finally:
        if {"-h", "--help"} & {*words}:
            say(f"\n--method {{{','.join(METHODS)}}}: these are the options of {method}")


def method_of(words: list[str]) -> tuple[str, list[str]]:
    """(the method, the words for its program). The last one counts, as with every option."""
    method, rest = "bnb", []
    while words:
        word = words.pop(0)
        if word == FLAG:
            if not words:
                raise ConfigError(FLAG, "needs a value: bnb or gptq")
            method = words.pop(0)
        elif word.startswith(f"{FLAG}="):
            method = word.removeprefix(f"{FLAG}=")
        else:
            rest.append(word)
    return method, rest
