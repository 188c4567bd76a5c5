"""Every kind of run answers while it trains and ends as undisturbed, whatever it is doing when it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.recipes import finetune
from onecard.train import loop, memory_probe
from onecard.train.control import NotRunning, reply, send, status
from onecard.train.rundir import RunDirectory
from onecard.train.step_log import QUESTIONS_NAME, read_rows
from tests import tiny

SHORT = {"total_batch": 4, "max_steps": 3, "num_epoch": 9, "test_size": 4, "eval_steps": 2, "compare_with_base": False}
CHAT = {"prompt_type": "chatml", "cutoff_len": 96}
KINDS: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo", "lora_dropout": 0.1, **CHAT},
    "kto": {"objective": "kto", **CHAT},
    "grpo": {"objective": "grpo", "reward": "length:-30", "rollouts": 2, "rollout_max_tokens": 6, **CHAT},
    "reward": {"objective": "reward", **CHAT},
    "pretrain": {"objective": "pretrain", "cutoff_len": 64},
    "packing": {"packing": True, "cutoff_len": 128, "micro_batch": 0, "micro_tokens": 256},
    "full": {"peft_method": "full", "learning_rate": 1e-3},
    "freeze": {"peft_method": "freeze:1", "learning_rate": 1e-3},
    "prompt_tuning": {"peft_method": "prompt_tuning", "peft_option": "num_virtual_tokens=4"},
    "p_tuning": {"peft_method": "p_tuning", "peft_option": "num_virtual_tokens=4"},
    "prefix_tuning": {"peft_method": "prefix_tuning", "peft_option": "num_virtual_tokens=4"},
    "streamed": {"stream_layers": "on", "gradient_checkpointing": True, "bits": 4},
    "recomputed": {"gradient_checkpointing": True, "offload_activations": "on"},
}
OF_PAIRS, QUICK = ("dpo", "kto", "reward"), ("dpo",)


@pytest.fixture(scope="module")
def data(instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The rows that a kind of run learns from."""
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"prompt": f"Count {i}", "chosen": "one " * (1 + i % 5), "rejected": "no " * (1 + i % 3)} for i in range(20)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = pairs.with_name("texts.jsonl")
    rows = [{"text": f"Text {i}: " + "the quick brown fox, " * (1 + i % 6)} for i in range(40)]
    texts.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return lambda kind: pairs if kind in OF_PAIRS else texts if kind == "pretrain" else instructions


def assert_same_weights(one: Path, other: Path) -> None:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files and files == sorted(path.name for path in other.glob("*.safetensors"))
    assert all(tiny.same_tensors(tiny.tensors_of(one / name), tiny.tensors_of(other / name)) for name in files)
    assert tiny.losses_of(one) == tiny.losses_of(other) != []


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_run_of_any_kind_answers_and_ends_as_undisturbed(
    kind: str, data: Callable[[str], Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, rows = SHORT | KINDS[kind], data(kind)
    undisturbed = finetune(tiny.config_for(tiny_base, rows, tmp_path / "undisturbed", **options))
    sent: list[str] = []
    real = loop.take_step

    def step(*arguments: Any) -> Any:
        sent.append(send(tmp_path / "run", "ask", question="Say hello", max_new_tokens=6, temperature=len(sent) % 2))
        return real(*arguments)

    monkeypatch.setattr(loop, "take_step", step)
    run = finetune(tiny.config_for(tiny_base, rows, tmp_path / "run", **options))
    assert_same_weights(undisturbed, run)
    found = [reply(run, each) for each in sent]
    assert [(each.state, each.step) for each in found if each] == [
        ("failed" if kind == "reward" or step == 3 else "done", step) for step in (1, 2, 3)
    ]
    if kind == "reward":
        assert found[0] and found[0].error == "a reward model judges answers and writes none"


@pytest.mark.slow
def test_asked_at_odd_moments(
    instructions: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory probe, several times while a checkpoint is written, in evaluations, and behind the last step."""
    options = SHORT | {"rehearsal": True}
    undisturbed = finetune(tiny.config_for(tiny_base, instructions, tmp_path / "undisturbed", **options))
    run, sent, refused = tmp_path / "run", dict[str, str](), list[str]()

    def before(owner: Any, function: str, work: Callable[[], object]) -> None:
        real = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *given, **named: (work(), real(*given, **named))[1])

    def ask(name: str, question: str = "Say hello") -> None:
        if name not in sent:
            sent[name] = send(run, "ask", question=question, max_new_tokens=4)

    def ask_thrice() -> None:
        for name, question in (("checkpoint", "Say hello"), ("long", "word " * 20_000), ("second", "Say bye")):
            ask(name, question)

    def ask_too_late() -> None:
        with pytest.raises(NotRunning, match="takes no requests: its last step is done"):
            send(run, "ask", question="Say hello")
        refused.append("ask")

    before(memory_probe, "probe_memory", lambda: ask("probe"))
    before(loop, "save", ask_thrice)
    before(loop, "validate", lambda: ask(f"evaluation after step {status(run).step}"))
    before(RunDirectory, "publish", ask_too_late)
    assert_same_weights(undisturbed, finetune(tiny.config_for(tiny_base, instructions, run, **options)))
    found = {name: each for name, request in sent.items() if (each := reply(run, request))}
    assert {name: (each.state, each.step) for name, each in found.items()} == {
        "probe": ("done", 0), "checkpoint": ("done", 1), "long": ("failed", 1), "second": ("done", 1),
        "evaluation after step 2": ("done", 2), "evaluation after step 3": ("failed", 3),
    }  # fmt: skip
    assert "the model reads at most 512" in found["long"].error and refused == ["ask"]
    assert found["evaluation after step 3"].error == "the run has ended before this was carried out"
    assert len(list(read_rows(run / QUESTIONS_NAME))) == 4
