"""tools/plan_memory.py as a person types it: answers, files and one clear line for each bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.config.parsing import options_of, to_yaml
from onecard.config.training import FinetuneConfig
from onecard.console import run_main
from onecard.model.hardware import Hardware
from onecard.model.memory.architecture import known_models
from onecard.model.memory.estimate import GIB
from onecard.programs.plan import PlanOptions, main
from tests.tiny import save_tiny_llama

REPOSITORY = Path(__file__).resolve().parents[1]
LLAMA = "Llama-3.1-8B"


@pytest.fixture
def plan(capsys, monkeypatch, tmp_path):
    """Run the tool in this process, in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = run_main(lambda: main(list(words)), debug=False)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def plan_json(plan, *words: str) -> dict:
    code, out, err = plan(*words, "--json")
    assert code == 0 and err == "", err
    return json.loads(out)


def bytes_of(found: dict, word: str) -> int:
    return sum(part["n_bytes"] for part in found["plans"][0]["parts"] if word in part["name"])


# --- answers


def check_lines(printed: str) -> None:
    lines = printed.splitlines()
    assert lines[0] == f"{LLAMA}, 8.03 B weights, on a card of 11 GiB"
    assert all(len(line) <= 80 for line in lines)
    for start in ("  base: MLP, 4 bits", "  peak", "It fits", "Longest context", "Largest known model", "Time:"):
        assert sum(line.startswith(start) for line in lines) == 1, start


@pytest.mark.slow
def test_started_as_a_program_without_network_or_card() -> None:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, "tools/plan_memory.py", "--model_path", LLAMA, "--vram", "11"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    check_lines(done.stdout)


@pytest.mark.usefixtures("peaks_by_formula")
def test_the_answer_has_each_of_its_parts_once(plan) -> None:
    code, out, err = plan("--model_path", LLAMA, "--vram", "11")
    assert code == 0 and err == "", err
    check_lines(out)


def test_help_says_what_the_flags_mean(plan, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "Memory of the card in GiB; several with commas between them" in text and "--offload_activations" in text


@pytest.mark.slow
def test_not_fitting_is_an_answer_and_no_error(plan) -> None:
    code, out, err = plan("--model_path", "Qwen2.5-32B", "--vram", "8", "--stream_layers", "off")
    assert code == 0 and err == "" and "It does not fit: the card's 8.00 GiB are" in out
    assert "Not even one token fits" in out and "Largest known model that fits a card of 8 GiB" in out


@pytest.mark.usefixtures("only_the_plan")
def test_a_directory_is_read_from_its_config_alone(plan, tmp_path) -> None:
    save_tiny_llama(tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        if file.name != "config.json":
            file.unlink()
    code, out, _ = plan("--model_path", "base", "--vram", "2")
    assert code == 0 and out.startswith("base, ") and "It fits" in out


def test_known_models_are_listed(plan) -> None:
    code, out, _ = plan("--known")
    assert code == 0 and len(out.splitlines()) == len(known_models()) + 1 and "Qwen/Qwen2.5-7B" in out


@pytest.mark.slow
def test_several_cards_and_lengths_make_a_matrix(plan) -> None:
    code, out, _ = plan("--models", f"Qwen3-1.7B,{LLAMA}", "--vram", "4, 11,24", "--lengths", "512,8192")
    assert code == 0
    assert out.count("4 GiB    11 GiB    24 GiB") == 2 and out.count("     8,192") == 2 and "!" in out
    assert out.count("Largest known model that fits") == 3 and "at 512 tokens" in out and "settings" not in out


@pytest.mark.slow
def test_more_memory_is_never_worse(plan) -> None:
    found = plan_json(plan, "--model_path", LLAMA, "--vram", "6,8,11,24", "--lengths", "4096,65536",
                      "--stream_layers", "off")  # fmt: skip
    assert len(found["plans"]) == 8
    longest = [one["longest_context_tokens"] for one in found["plans"][::2]]
    assert longest == sorted(longest) and longest[0] < longest[-1]
    assert [one["longest_row_tokens"] for one in found["plans"]] == [4096, 65536] * 4
    sizes = [known_models()[name].n_parameters for name in found["largest_known_model"].values()]
    assert len(sizes) == 4 and sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.slow
def test_the_largest_known_model_fits_and_the_next_larger_one_does_not(plan) -> None:
    words = ("--vram", "11", "--stream_layers", "off")
    largest = plan_json(plan, *words)["largest_known_model"]["a card of 11 GiB"]
    names = list(known_models())
    next_one = names[names.index(largest) + 1]
    assert plan_json(plan, *words, "--model_path", largest)["plans"][0]["fits"]
    assert not plan_json(plan, *words, "--model_path", next_one)["plans"][0]["fits"]


# --- training options count


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_training_options_change_the_plan(plan) -> None:
    plain = plan_json(plan, "--model_path", LLAMA, "--vram", "80")
    eight = plan_json(plan, "--model_path", LLAMA, "--vram", "80", "--bits", "8")
    wide = plan_json(plan, "--model_path", LLAMA, "--vram", "80", "--lora_r", "64")
    few = plan_json(plan, "--model_path", LLAMA, "--vram", "80", "--lora_target_modules", "q_proj,v_proj")
    rows = plan_json(plan, "--model_path", LLAMA, "--vram", "80", "--micro_batch", "2", "--cutoff_len", "512")
    small = plan_json(plan, "--model_path", LLAMA, "--vram", "80", "--optimizer", "paged_adamw_8bit")
    assert 1.8 < bytes_of(eight, "base: MLP") / bytes_of(plain, "base: MLP") < 2
    assert bytes_of(wide, "adapter") == 8 * bytes_of(plain, "adapter") > 4 * bytes_of(few, "adapter") > 0
    assert (rows["plans"][0]["setup"]["rows"], rows["plans"][0]["setup"]["length"]) == (2, 512)
    assert bytes_of(small, "optimizer") < bytes_of(plain, "optimizer") / 3
    assert plain["plans"][0]["card"]["total_bytes"] == 80 * GIB and plain["plans"][0]["fits"]


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_memory_options_set_by_hand_stay(plan) -> None:
    words = ("--model_path", LLAMA, "--vram", "24", "--loss_chunk", "128", "--offload_activations", "on")
    found = plan_json(plan, *words, "--head_bits", "8", "--mlp_tile", "2048", "--offload_embeddings", "on")
    setup = found["plans"][0]["setup"]
    assert (setup["loss_chunk"], setup["head_bits"], setup["mlp_tile"]) == (128, 8, 2048)
    assert setup["offload_activations"] and setup["offload_embeddings"]
    assert sum(choice["by_hand"] for choice in found["plans"][0]["choices"]) == 5


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_an_old_card_computes_gemma_in_fp32(plan) -> None:
    new, old = (
        plan_json(plan, "--model_path", "Gemma-2-2B", "--vram", "24", "--pretend_turing", value)["plans"][0]["setup"]
        for value in ("false", "true")
    )
    assert (new["element_bytes"], old["element_bytes"]) == (2, 4)


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_a_yaml_of_training_serves_the_plan(plan, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("lora_r: 32\ncutoff_len: 300\nvram: 11\n", encoding="utf-8")
    found = plan_json(plan, "--config", "run.yaml", "--model_path", LLAMA)["plans"][0]
    assert (found["setup"]["rank"], found["longest_row_tokens"]) == (32, 300)
    assert found["card"]["total_bytes"] == 11 * GIB


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_the_options_stored_with_a_run_serve_the_plan(plan, tmp_path) -> None:
    (tmp_path / "onecard.yaml").write_text(to_yaml(FinetuneConfig()), encoding="utf-8")
    found = plan_json(plan, "--config", "onecard.yaml", "--vram", "8,11")
    assert [one["card"]["total_bytes"] for one in found["plans"]] == [8 * GIB, 11 * GIB]


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
@pytest.mark.parametrize(("old", "repeats_kv", "element_bytes"), [("false", False, 2), ("true", True, 4)])
def test_without_vram_the_card_found_is_taken(plan, monkeypatch, old, repeats_kv, element_bytes) -> None:
    import torch

    import onecard.model.lora.method_size  # noqa: F401  (bitsandbytes looks for a card where it is imported)

    card = Hardware(torch.device("cuda", 0), "A Card", 11 * GIB, True, (8, 6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("onecard.model.hardware._gpu", lambda _index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (10 * GIB, 11 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    found = plan_json(plan, "--model_path", "Gemma-2-2B", "--pretend_turing", old)["plans"][0]
    # What is free on it, and the half of the context that is there already.
    assert (found["card"]["name"], found["card"]["total_bytes"]) == ("A Card", 10 * GIB + GIB // 4)
    assert (found["card"]["repeats_kv"], found["setup"]["element_bytes"]) == (repeats_kv, element_bytes)
    assert "on A Card (10.25 GiB)" in plan("--model_path", "Gemma-2-2B")[1]


# --- the settings that come with the project

SETTINGS = sorted((REPOSITORY / "config-sample").glob("*gb.yaml"))
QUICK = ("llama-7b_qlora_11gb", "mistral-7b_lora-8bit_24gb")  # one of 4 bits, one of 8: each traces a model


@pytest.mark.usefixtures("only_the_plan")
@pytest.mark.parametrize(
    "settings",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK)) for path in SETTINGS],
)
def test_sample_settings_name_the_planned_peak(plan, settings: Path) -> None:
    """The peak at the top of the file is what the tool says, on the card that the file's name says."""
    card_gib = settings.stem.rsplit("_", 1)[1].removesuffix("gb")
    found = plan_json(plan, "--config", str(settings), "--vram", card_gib)["plans"][0]
    assert found["fits"]
    planned = f"Expected peak: {found['peak_bytes'] / GIB:.1f} GiB (planned by tools/plan_memory.py, not measured)."
    assert planned in settings.read_text(encoding="utf-8")


def test_every_sample_setting_was_planned() -> None:
    assert len(SETTINGS) == 6


# --- time


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_time_from_a_given_speed(plan) -> None:
    words = ("--vram", "8", "--tokens_per_s", "1000", "--n_tokens", "1200000", "--num_epoch", "3")
    assert "about 1 h 00 min for 3,600,000 tokens at 1,000 tokens/s (given)" in " ".join(plan(*words)[1].split())
    found = plan_json(plan, *words)
    assert (found["seconds"], found["n_tokens"], found["tokens_per_s"]) == (3600, 3_600_000, 1000)


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_time_from_the_log_of_a_run(plan, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    rows = [{"step": 1, "tokens_per_s": 10.0}, {"step": 2, "tokens_per_s": 500.0}, {"step": 2, "eval_loss": 1.0},
            {"step": 3, "tokens_per_s": 520.0}]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tok'
    (tmp_path / "run" / "log.jsonl").write_text(text, encoding="utf-8")
    words = ("--vram", "8", "--output_path", "run", "--n_tokens", "1000")
    assert plan_json(plan, *words)["tokens_per_s"] == 500
    assert "500 tokens/s (median of run)" in " ".join(plan(*words)[1].split())
    assert plan_json(plan, *words, "--tokens_per_s", "7")["tokens_per_s"] == 7


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
def test_without_a_speed_it_is_said(plan) -> None:
    assert "no throughput known" in plan("--vram", "8", "--n_tokens", "1000")[1]
    assert plan_json(plan, "--vram", "8", "--n_tokens", "1000")["seconds"] is None


# --- the picture


@pytest.mark.usefixtures("only_the_plan", "peaks_by_formula")
@pytest.mark.parametrize("models", [LLAMA, pytest.param(f"Qwen3-1.7B,{LLAMA}", marks=pytest.mark.slow)])
def test_a_picture_is_drawn(plan, tmp_path, models) -> None:
    code, out, err = plan("--models", models, "--vram", "8,24", "--plot", "memory.png")
    assert code == 0 and "Drawn: memory.png" in out, err
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --- bad inputs


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--vram", "8,x"], "--vram: '8,x' is no list of numbers"),
        (["--vram", "-1"], "--vram: -1 GiB is no size of a card"),
        (["--vram", "8,0"], "--vram: 0 GiB"),
        (["--vram", "nan"], "--vram: nan GiB"),
        (["--vram", "8", "--lengths", "4,512"], "--lengths: 4 tokens"),
        (["--vram", "8", "--lengths", "1k"], "--lengths: '1k' is no list of numbers"),
        (["--vram", "8", "--plot", "memory.pdf"], "--plot: memory.pdf is no name of a PNG"),
        pytest.param(
            ["--vram", "8", "--plot", "no/such/memory.png"], "--plot: no/such/memory.png cannot be written",
            marks=pytest.mark.slow,
        ),
        (["--vram", "8", "--tokens_per_s", "-3"], "--tokens_per_s: -3"),
        (["--vram", "8", "--n_tokens", "-3"], "--n_tokens: -3"),
        (["--vram", "8", "--lora_r", "0"], "--lora_r: 0 would train nothing"),
        (["--vram", "8", "--loss_chunk", "-2"], "--loss_chunk: -2"),
        (["--vrm", "8"], "--vrm: no such option (did you mean --vram?)"),
        (["--vram", "8", "--model_path", LLAMA, "--lora_target_modules", "q_proj,k_prj"], "has no layer k_prj (did"),
        (["--vram", "8", "--model_path", "Gemma-2-2B", "--bits", "16", "--pretend_turing", "true"], "--bits: 16 can"),
        (["--vram", "8", "--model_path", LLAMA, "--dtype", "bf16", "--pretend_turing", "true"], "--dtype: bf16"),
        (["--device", "cpu"], "--vram: no card is found here; give its memory in GiB, such as --vram 11"),
    ],
)  # fmt: skip
def test_bad_options_are_one_clear_line_and_exit_2(plan, words, expected) -> None:
    code, out, err = plan(*words)
    assert code == 2 and out == "" and expected in err, err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen3-8C", "did you mean Qwen3-8B"),
        ("some-org/some-model", "the Hub cannot be reached"),
        ("empty", "config.json"),
    ],
)
def test_unknown_models_are_one_clear_line(plan, tmp_path, name, expected) -> None:
    (tmp_path / "empty").mkdir()
    code, out, err = plan("--vram", "8", "--models", f"{LLAMA},{name}")
    assert code == 1 and out == "" and expected in err and len(err.splitlines()) == 1


def test_all_bad_options_are_told_at_once(plan) -> None:
    _, _, err = plan("--vram", "x", "--lengths", "y", "--lora_r", "0")
    assert all(flag in err for flag in ("--vram", "--lengths", "--lora_r")) and "3 settings" in err


def test_every_training_option_is_an_option_of_the_plan() -> None:
    training, planning = set(options_of(FinetuneConfig)), set(options_of(PlanOptions))
    assert training <= planning and len(training) > 50
