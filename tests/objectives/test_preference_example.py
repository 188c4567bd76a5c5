"""The worked examples of preferences and of rewards do what their page says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onecard.config.base_model import ModelOptions
from onecard.data.encode import DroppedSample, EncodeSettings, encode_sample
from onecard.inference.batch.evaluate import read_cases, score
from onecard.inference.load import load_bundle
from onecard.objectives.preference import AnswerPair, DirectPreference, pair_log_probs
from onecard.train.trackers import read_log

ROOT = Path(__file__).resolve().parents[2]


def measured(run: Path, held_out: Path) -> tuple[float, float]:
    """The share of pairs whose chosen answer is the likelier one, and exact match with it."""
    bundle, _ = load_bundle(ModelOptions(str(ROOT / "sample" / "tiny-llama"), bits=32, device="cpu"), str(run), "auto")
    cases, dpo = read_cases(str(held_out), bundle), DirectPreference()
    n_right = 0
    for case in cases:
        rows = encode_sample(
            case.conversation, bundle.template, bundle.tokenizer, EncodeSettings(256), encoder=dpo.encoder
        )
        assert not isinstance(rows, DroppedSample)
        with torch.inference_mode():
            ((chosen, rejected),) = pair_log_probs(bundle.model, dpo.collate([AnswerPair(*rows)]))[0].tolist()
        n_right += chosen > rejected
    assert len(cases) == 109
    return n_right / len(cases), score(bundle, cases, batch_size=32).exact_match


def start(script: str, seed: int, folder: Path, *words: str) -> None:
    environment = {
        **os.environ, "PYTHON": sys.executable, "OUTPUT_PATH": str(folder / "run"), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        "bash",
        str(ROOT / "scripts" / script),
        "--seed",
        str(seed),
        "--cache_path",
        str(folder / "cache"),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the scripts are for bash")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_example_teaches_the_preference_and_costs_no_answer(seed: int, tmp_path: Path) -> None:
    start("finetune_preferences.sh", seed, tmp_path)
    made = tmp_path / "run"
    before, after = (measured(made / run, made / "held_out_pairs.json") for run in ("sft", "dpo"))
    assert 0.2 <= before[0] <= 0.7 and after[0] >= 0.9 and after[1] >= before[1], (before, after)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the scripts are for bash")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_example_of_rewards_learns_to_answer_and_to_stop(seed: int, tmp_path: Path) -> None:
    start("finetune_rewards.sh", seed, tmp_path, "--log_steps", "1")
    rows = read_log(tmp_path / "run")
    rewards = [row["reward"] for row in rows if "loss" in row]
    assert len(rewards) == 30
    assert np.mean(rewards[:3]) < 0.2 and np.mean(rewards[-5:]) > 0.6, rewards
    assert [row["eval_reward"] for row in rows if "eval_reward" in row][-1] > 0.6
