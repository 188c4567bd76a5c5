"""The best of several answers: by a checker, by a file, by a reward model; pairs; what is cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onecard.config.inference import GenerateConfig
from onecard.config.parsing import parse
from onecard.data.messages import Turn
from onecard.errors import ConfigError, DataError
from onecard.inference.batch.reward_model import RewardModel
from onecard.recipes import finetune, generate
from tests import tiny
from tests.objectives.test_preference import pair_file

N, QUESTIONS = 4, 7


@pytest.fixture
def words(tiny_base: Path, tmp_path: Path) -> list[str]:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"instruction": f"Question {i}", "input": "x" * (i % 2), "output": "a", "reward": i} for i in range(QUESTIONS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ["--model_path", str(tiny_base), "--data_path", str(path), "--output_path", str(tmp_path / "best.jsonl"),
            "--bits", "32", "--device", "cpu", "--prompt_type", "chatml", "--temperature", "1", "--max_new_tokens", "5",
            "--best_of", str(N), "--batch_size", "5", "--save_pairs", str(tmp_path / "pairs.jsonl")]  # fmt: skip


def run(words: list[str]) -> None:
    generate(parse(GenerateConfig, words))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_answer_is_written_and_makes_a_pair_with_the_worst(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text("def reward(answer, row):\n    return len(answer) // 3\n", encoding="utf-8")
    run([*words, "--reward_file", str(tmp_path / "rewards.py")])
    best, samples = rows_of(tmp_path / "best.jsonl"), rows_of(tmp_path / "best.jsonl.samples.jsonl")
    assert (len(best), len(samples)) == (QUESTIONS, N * QUESTIONS)
    assert len({row["output"] for row in samples}) > QUESTIONS
    assert [row["reference_reward"] for row in best] == list(range(QUESTIONS))
    pairs, n_pairs = rows_of(tmp_path / "pairs.jsonl"), 0
    for i, row in enumerate(best):
        own = samples[i * N : i * N + N]
        assert row["rewards"] == [len(each["output"]) // 3 for each in own]
        assert row["reward"] == max(row["rewards"]) == row["rewards"][[s["output"] for s in own].index(row["output"])]
        whole = [len(each["output"]) // 3 for each in own if each["finish_reason"] != "length"]
        n_pairs += len(set(whole)) > 1
    assert len(pairs) == n_pairs
    printed = capsys.readouterr()
    assert f"{n_pairs} preference pairs are in" in printed.out
    assert f"{QUESTIONS - n_pairs} questions give no pair" in printed.err + printed.out


@pytest.mark.slow
def test_pairs_are_read_by_dpo_and_a_margin_leaves_some_out(words: list[str], tiny_base: Path, tmp_path: Path) -> None:
    text = "import zlib\ndef reward(answer):\n    return zlib.crc32(answer.encode()) % 100\n"
    (tmp_path / "rewards.py").write_text(text, encoding="utf-8")
    samples = tmp_path / "best.jsonl.samples.jsonl"
    words += ["--reward_file", str(tmp_path / "rewards.py")]
    run(words)
    rows = [{**row, "finish_reason": "stop"} for row in rows_of(samples)]  # random weights rarely end an answer
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(words)
    pairs = rows_of(tmp_path / "pairs.jsonl")
    assert len(pairs) == QUESTIONS and {"input" in pair for pair in pairs} == {True, False}
    assert all(pair["chosen_reward"] > pair["rejected_reward"] for pair in pairs)
    run([*words, "--pair_margin", "60"])
    apart = [pair["chosen_reward"] - pair["rejected_reward"] >= 60 for pair in pairs]
    assert len(rows_of(tmp_path / "pairs.jsonl")) == sum(apart) < QUESTIONS
    run(words)
    learned = finetune(tiny.config_for(tiny_base, tmp_path / "pairs.jsonl", tmp_path / "run", objective="dpo",
                                       prompt_type="chatml", max_steps=1))  # fmt: skip
    assert len(tiny.losses_of(learned)) == 1


@pytest.mark.slow
def test_a_start_that_was_cut_off_goes_on(words: list[str], tmp_path: Path) -> None:
    words += ["--reward", r"regex:\d"]
    run(words)
    files = [tmp_path / name for name in ("best.jsonl.samples.jsonl", "best.jsonl", "pairs.jsonl")]
    whole = [file.read_bytes() for file in files]
    files[0].write_bytes(whole[0][: len(whole[0]) // 2])
    for file in files[1:]:
        file.unlink()
    run(words)
    assert [file.read_bytes() for file in files] == whole
    files[1].write_bytes(whole[1][: len(whole[1]) // 2])
    run(words)
    assert [file.read_bytes() for file in files] == whole
    with pytest.raises(ConfigError, match="reward: then"):
        run([*words[:-1], "regex:x"])


def test_a_record_without_an_answer_is_named_before_anything_is_sampled(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": f"Question {i}"}) for i in range(3)), encoding="utf-8")
    with pytest.raises(DataError, match=r"questions.jsonl:1 has no recorded answer.*\(3 records are like that\)"):
        run([*words, "--reward", "exact"])
    assert not (tmp_path / "best.jsonl.samples.jsonl").exists()


@pytest.mark.slow
def test_a_reward_run_judges_as_it_was_trained_to(words: list[str], tiny_base: Path, tmp_path: Path) -> None:
    data = pair_file(tmp_path / "train.jsonl", 32)
    judge = finetune(tiny.config_for(tiny_base, data, tmp_path / "judge", objective="reward", prompt_type="chatml",
                                     max_steps=8, num_epoch=9, save_steps=8))  # fmt: skip
    run([*words, "--reward", str(judge)])
    best = rows_of(tmp_path / "best.jsonl")
    options = parse(GenerateConfig, [*words, "--reward", "exact"]).model
    model = RewardModel(str(judge), options)
    for row in best:
        turns = (Turn("user", row["instruction"], row["input"]),)
        (alone,) = model.rewards([(turns, row["output"])])
        assert alone == pytest.approx(row["reward"], abs=1e-5) and row["reward"] == max(row["rewards"])
    good, bad = model.rewards([((Turn("user", "Question 3"),), text) for text in ("thanks yes", "never no")])
    assert good is not None and bad is not None and good > bad
    with pytest.raises(ConfigError, match="was trained for sft"):
        RewardModel(str(tmp_path), options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--best_of", "0"], "--best_of: 0 is too few"),
        (["--best_of", "1", "--reward", "exact"], "--reward: goes with --best_of 2 or more"),
        ([], "--reward: is missing"),
        (["--reward", "outputs/nowhere"], "nor is it the directory of a reward run"),
        (["--reward", "length"], "length needs a range here"),
        (["--reward", "exact", "--pair_margin", "-1"], "--pair_margin: -1 is not"),
        (["--reward", "exact", "--temperature", "0"], "--temperature: 0 gives 4 equal answers"),
    ],
)
def test_what_does_not_go_together_is_said(options: list[str], text: str, words: list[str], tmp_path: Path) -> None:
    words = [word for word in words if word not in ("--save_pairs", str(tmp_path / "pairs.jsonl"))]
    with pytest.raises(ConfigError, match=text):
        parse(GenerateConfig, [*words, *options])
