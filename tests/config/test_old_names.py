"""Who comes from another kit is told, at once, what an option is called here, and what is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onecard.config import parsing as cli
from onecard.config.data import BUILT_IN_TEMPLATES
from onecard.config.given_paths import DATA_SUFFIXES, path_problems
from onecard.config.inference import ChatConfig, GenerateConfig, ServeConfig
from onecard.config.old_names import BY_NAME, KITS, OLD_NAMES, flags_in, hint
from onecard.config.training import FinetuneConfig
from onecard.data.chat_template import load_template
from onecard.data.readers import SUFFIXES
from onecard.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = (FinetuneConfig, GenerateConfig, ChatConfig, ServeConfig)


def refusal(config_class: type, *words: str) -> str:
    with pytest.raises(ConfigError) as refused:
        cli.parse(config_class, list(words))
    return str(refused.value)


@pytest.mark.parametrize(("config_class", "typed", "said"), [
    (FinetuneConfig, "--base_model", "here it is --model_path"),
    (GenerateConfig, "--lora_model", "here it is --lora_path"), (FinetuneConfig, "--lora_model", "--init_adapter"),
    (GenerateConfig, "--lora_weights", "here it is --lora_path"), (ChatConfig, "--lora_weights", "--lora_path"),
    (GenerateConfig, "--data_file", "here it is --data_path"), (FinetuneConfig, "--load_in_8bit", "--bits 8"),
    (ServeConfig, "--int8", "here it is --bits 8"), (GenerateConfig, "--use_typewriter", "word by word"),
    (FinetuneConfig, "--ignore_data_skip", "here it is --from_data_beginning"),
    (FinetuneConfig, "--gradient_accumulation_steps", "here it is --total_batch"),
    (FinetuneConfig, "--batch_size", "here it is --total_batch"), (GenerateConfig, "--do_sample", "--temperature"),
    (ChatConfig, "--tokenizer_path", "the tokenizer is that of the model"),
    (ChatConfig, "--num_train_epochs", "in this program; training (python finetune.py)"),
])  # fmt: skip
def test_an_old_name_is_answered_with_the_one_it_has_here(config_class: type, typed: str, said: str) -> None:
    message = refusal(config_class, typed, "3")
    assert message.startswith(f"{typed}: no such option") and said in message and "did you mean" not in message


@pytest.mark.parametrize("config_class", PROGRAMS)
def test_a_hint_names_only_options_that_the_program_has(config_class: type) -> None:
    known = cli.options_of(config_class)
    for name in BY_NAME:
        assert flags_in(hint(name, known, cli.options_of(FinetuneConfig))) <= set(known), name


def test_every_option_in_the_table_is_one_of_a_program_and_no_old_name_is() -> None:
    trained = set(cli.options_of(FinetuneConfig))
    every = trained.union(*(cli.options_of(program) for program in PROGRAMS))
    for entry in OLD_NAMES:
        assert set(entry.kits) <= set(KITS) and entry.kits
        assert flags_in(" ".join([*entry.here, entry.note])) <= every, entry.old
        assert entry.here or entry.note, entry.old
        assert entry.old not in trained
    assert len(BY_NAME) == len(OLD_NAMES)


@pytest.mark.parametrize("page", ["coming-from.md", "coming-from_zh.md"])
def test_the_pages_hold_the_table_of_the_code(page: str) -> None:
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    here = [" / ".join(f"`{one}`" for one in entry.here) for entry in OLD_NAMES]
    assert [row[:3] for row in rows] == [
        [f"`--{entry.old}`", entry.kits, shown] for entry, shown in zip(OLD_NAMES, here, strict=True)
    ]
    if page == "coming-from.md":
        assert [row[3] for row in rows] == [entry.note for entry in OLD_NAMES]
    for row, entry in zip(rows, OLD_NAMES, strict=True):
        assert bool(row[3]) == bool(entry.note) and flags_in(row[3]) == flags_in(entry.note)
    assert all(f"{letter} {kit}" in text for letter, kit in KITS.items())
    options = set().union(*(cli.options_of(program) for program in PROGRAMS)) | {"config"}
    prose = text.partition("\n| ")[0]
    assert flags_in(prose) <= options


def test_a_file_of_another_kit_gets_one_answer_for_all_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "llama3_lora_sft.yaml"
    path.write_text("model_name_or_path: x\nlora_rank: 8\ntemplate: llama3\nplot_loss: true\n", encoding="utf-8")
    lines = refusal(FinetuneConfig, "--config", str(path)).splitlines()
    assert lines[0] == "4 settings cannot work:"
    for line, said in zip(lines[1:], ("--model_path", "--lora_r", "--prompt_type", "loss.png"), strict=True):
        assert str(path) in line and said in line


def test_lists_as_other_kits_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("lora_target_modules: [q_proj, v_proj]\n", encoding="utf-8")
    ways = (["q_proj", "v_proj"], ["q_proj,v_proj"], ["['q_proj', 'v_proj']"], ["[q_proj,v_proj]"])
    for words in (["--config", str(path)], *(["--lora_target_modules", *way] for way in ways)):
        config = cli.parse(FinetuneConfig, [*words, "--lora_r", "4"])
        assert (config.lora.lora_target_modules, config.lora.lora_r) == ("q_proj,v_proj", 4)
    assert "v_proj: is not an option" in refusal(FinetuneConfig, "--lora_r", "4", "v_proj")


def test_old_names_of_templates(sp_tokenizer) -> None:
    assert load_template("chat", sp_tokenizer) == load_template("vicuna-chat", sp_tokenizer)
    assert load_template("instruct", sp_tokenizer) == load_template("alpaca", sp_tokenizer)
    cli.parse(FinetuneConfig, ["--prompt_type", "chat"])


# --- what is not there -----------------------------------------------------------------------------------------------


def test_everything_that_is_not_there_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "no-adapter").mkdir()
    message = refusal(
        FinetuneConfig, "--data_path", str(tmp_path / "dat.json"), "--prompt_type", "vicunna-chat", "--init_adapter",
        str(tmp_path / "no-adapter"), "--model_path", str(tmp_path / "base"), "--lora_rank", "3", "--bits", "5",
        "--deepspeed", "no.json", "--resume_from_checkpoint", str(tmp_path / "gone"),
    )  # fmt: skip
    assert message.startswith("8 settings cannot work:")
    for said in (
        "--lora_rank: no such option", "--bits: '5'", r"--data_path: .*dat.json \(did you mean data.json",
        r"--prompt_type: no template is called 'vicunna-chat' \(did you mean vicuna-chat", "--deepspeed: there is no",
        "--init_adapter: .*holds no adapter", "--model_path: there is no directory",
        "--resume_from_checkpoint: there is no",
    ):  # fmt: skip
        assert re.search(said, message), said


@pytest.mark.parametrize("values", [
    {"model_path": "Qwen/Qwen3-0.6B", "data_path": "someone/dataset", "lora_path": "someone/adapter"},
    {"model_path": "gpt2", "resume_from_checkpoint": "auto", "init_adapter": None, "prompt_type": "auto"},
    {"resume_from_checkpoint": "none", "data_path": ["someone/one", "someone/two"]},
    *({"prompt_type": name} for name in (*BUILT_IN_TEMPLATES, "chat", "instruct")),
])  # fmt: skip
def test_what_may_be_on_the_hub_is_left_to_it(values: dict) -> None:
    assert path_problems(values) == []


def test_a_slip_in_the_name_of_a_file_is_no_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data.json").write_text("[]")
    ((flag, text),) = path_problems({"data_path": "my_data.jsn"})
    assert flag == "--data_path" and "there is no file or folder my_data.jsn (did you mean my_data.json?)" in text
    assert path_problems({"data_path": ["owner/my_data.jsn", "other.v2", "my_data"]}) == []


def test_what_is_there_is_no_problem_in_any_form(tmp_path: Path) -> None:
    for name in ("a,b.json", "c.json", "t.jinja"):
        (tmp_path / name).write_text("{}")
    run = tmp_path / "run" / "checkpoint-5"
    run.mkdir(parents=True)
    (run / "pytorch_model.bin").write_bytes(b"")
    values = {
        "data_path": str(tmp_path / "a,b.json"), "lora_path": f"{run},{tmp_path / 'run'}",
        "adapters_path": str(tmp_path), "prompt_type": str(tmp_path / "t.jinja"), "model_path": str(tmp_path),
    }  # fmt: skip
    assert path_problems(values) == []
    missing = path_problems({"data_path": f"{tmp_path / 'c.json'},x.json", "lora_path": "outputs/x"})
    assert [flag for flag, _ in missing] == ["--data_path", "--lora_path"]
    assert DATA_SUFFIXES == SUFFIXES
