"""A run that was merged and quantised by GPTQ: what 3 bits have lost is named, 8 bits are the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.console import run_main
from onecard.programs import quantize_gptq
from onecard.programs import verify_server as program
from tests.serve.api.serving import Running

pytestmark = [pytest.mark.slow, pytest.mark.gptq]
LITTLE = ["--calibration_samples", "48", "--calibration_len", "64", "--eval_samples", "4", "--group_size", "32",
          "--device", "cpu"]  # fmt: skip


@pytest.mark.parametrize(("bits", "cause"), [(3, "quantisation noise"), (8, "")])
def test_what_gptq_has_lost_is_named(
    bits: int, cause: str, checked_run: Path, serve_run: Callable[..., Running], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # gptqmodel leaves its logs there
    words = [
        "--lora_path",
        str(checked_run),
        "--output_path",
        str(tmp_path / "quantised"),
        "--bits",
        str(bits),
        *LITTLE,
    ]
    quantize_gptq.main(words)
    server = serve_run(None, model_path=tmp_path / "quantised", bits="auto")
    capsys.readouterr()
    code = run_main(lambda: program.main([server.url, "--run", str(checked_run), "--json"]), debug=False)
    said = capsys.readouterr()
    found = json.loads(said.out[said.out.index("{") :])
    print(bits, found["model"], found["kl"], found["kl_to_base"])
    assert (code, found["model"]["cause"]) == (2 if cause else 0, cause), said.err
    assert found["template"]["same"] == "yes"
