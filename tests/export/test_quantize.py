"""`onecard quantize --method`: one verb before the quantisers, and a reason for what is not made here."""

from __future__ import annotations

import pytest

from onecard import __main__ as program
from onecard.errors import ConfigError
from onecard.programs import quantize, quantize_bnb, quantize_gptq


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["--bits", "4"], quantize_bnb), (["--method", "bnb", "--bits", "4"], quantize_bnb),
        (["--bits", "4", "--method=gptq"], quantize_gptq),
        (["--method", "bnb", "--bits", "4", "--method", "gptq"], quantize_gptq),
    ],
)  # fmt: skip
def test_the_method_gets_all_other_words(words: list[str], module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(module, "main", got.append)
    program.run(["quantize", *words])
    assert got == [["--bits", "4"]]


@pytest.mark.parametrize("method", quantize.NOT_HERE)
def test_what_is_not_made_here_says_why_and_what_is(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"--method: {method} is not made here: .*use (bnb|gptq)"):
        quantize.main(["--method", method])


def test_a_slip_is_mended_and_a_value_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"'gptg' is unknown \(did you mean gptq\?\)"):
        quantize.main(["--method", "gptg"])
    with pytest.raises(ConfigError, match="needs a value"):
        quantize.main(["--method"])
    with pytest.raises(SystemExit):
        quantize.main(["--help"])
    out = capsys.readouterr().out
    assert "--method {bnb,gptq}" in out and "--eval_path" in out
