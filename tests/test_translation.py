"""Messages in Chinese: every one of the way from a data file to a first answer, and a catalogue that fits the code."""

from __future__ import annotations

import ast
import bisect
import errno
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from onecard import console, translation
from onecard.config import parsing as cli
from onecard.config.inference import GenerateConfig
from onecard.config.training import FinetuneConfig
from onecard.data.formats import to_sample
from onecard.data.readers import read_file
from onecard.data.values import UnusableRecord
from onecard.errors import ConfigError, DataError
from onecard.hub_errors import MIRROR, hub_problem
from onecard.installation import SHIPPED as REPOSITORY
from onecard.programs import inspect as inspect_data
from onecard.recipes import finetune, generate
from onecard.translation import translated, use_language

CATALOGUE: dict[str, str] = yaml.safe_load((REPOSITORY / "onecard/messages_zh.yaml").read_text(encoding="utf-8"))
PROSE = re.compile(r"(?<![\w/.-])[A-Za-z]{2,} [a-z]{2,}")  # two English words in a row


@pytest.fixture(autouse=True)
def _english_again(monkeypatch: pytest.MonkeyPatch):
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "en_US.UTF-8")
    yield
    use_language("auto")


@pytest.fixture
def untranslated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of prose that stayed English, as they are said."""
    lines: list[str] = []

    def recorded(message: str, to: str = "") -> str:
        shown = translated(message, to)
        lines.extend(line for line in shown.splitlines() if PROSE.search(line))
        return shown

    for module in (console, __import__("onecard.train.trackers", fromlist=["reporting"])):
        monkeypatch.setattr(module, "translated", recorded)
    return lines


def test_every_message_from_the_data_to_an_answer_is_in_chinese(
    tiny_base: Path, tmp_path: Path, untranslated: list[str], capsys: pytest.CaptureFixture
) -> None:
    rows = [{"ask": f"问题 {i}", "reply": f"回答 {i}", "cot": "想"} for i in range(40)] + [{"ask": "无"}]
    data, run = tmp_path / "data.json", tmp_path / "run"
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    columns = ["--columns", "ask:instruction,reply:output", "--cache_path", str(tmp_path / "cache")]
    inspect_data.main(["--data_path", str(data), "--model_path", str(tiny_base), "--language", "zh", *columns])
    words = ["--data_path", str(data), "--model_path", str(tiny_base), "--language=zh", "--device", "cpu", *columns]
    for more in ([], ["--num_epoch", "4"]):  # and going on
        finetune(cli.parse(FinetuneConfig, [*words, "--output_path", str(run), "--test_size", "4", *more]))
    asked = ["--lora_path", str(run), "--model_path", str(tiny_base), "--instruction", "你好", "--max_new_tokens", "2",
             "--language", "zh", "--device", "cpu"]  # fmt: skip
    generate(cli.parse(GenerateConfig, asked))
    out, err = capsys.readouterr()
    assert "已保存到" in out and "思维链" in out and "警告:" in err
    assert not untranslated


def test_every_reason_of_a_refusal_on_the_way_is_in_chinese(tmp_path: Path, untranslated: list[str], capsys) -> None:
    def refused(*words: str) -> None:
        assert console.run_main(lambda: finetune(cli.parse(FinetuneConfig, [*words, "--language", "zh"]))) != 0

    output = ["--output_path", str(tmp_path / "run"), "--device", "cpu"]
    refused("--datapath", "x.json", "--bits", "5", "--lora_r", "two", "word")
    refused("--data_path", str(tmp_path / "none.json"), *output)
    unknown = tmp_path / "unknown.json"
    unknown.write_text('[{"ask_me": "a", "reply": "b"}, {"instruction": "a", "b": "c"}]', encoding="utf-8")
    refused("--data_path", str(unknown), *output)
    assert "错误:" in capsys.readouterr().err
    assert not untranslated


BAD_RECORDS: list[Any] = [
    {"instruction": "a", "output": ""}, {"instruction": "a", "output": None}, {"instruction": "", "output": "b"},
    {"instruction": "a", "input": None}, {"instruction": "a", "output": 5 * [{}]}, {"prompt": None, "response": None},
    {"instruction": "a", "output": {}}, {"instruction": "a", "output": "\0"}, {"text": ""}, [1], "a", 5, None, True,
    {"messages": "a"}, {"messages": [1]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": "x", "content": ""}]},
    {"messages": [{"role": "user", "content": ""}]}, {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
    {"input": ["a", "b"], "output": []}, {"input": ["a"], "output": [""]}, {"output": "b"},
    {"instruction": "a", "output": "b", "history": "c"}, {"instruction": "a", "output": "b", "history": [["c"]]},
    {"instruction": "a", "output": "b", "history": [["c", ""]]},
]  # fmt: skip


@pytest.mark.parametrize("place", ["data.json:5", "我的 数据/a b.json:1#23", "C:/我的 数据.json:7"])
def test_every_reason_why_a_record_is_not_learned_is_in_chinese(place: str) -> None:
    reasons = set()
    for record in BAD_RECORDS:
        with pytest.raises(UnusableRecord) as refused:
            to_sample(record, place)
        reasons.add(str(refused.value))
    assert len(reasons) >= 20
    english = [reason for reason in sorted(reasons) if translated(f"  {place}: {reason}", "zh").endswith(reason)]
    assert not english
    assert not [line for reason in reasons if PROSE.search(line := translated(f"{place}: {reason}", "zh"))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": 1'), ("a.jsonl", b'{"a": 1} 2'), ("a.jsonl", b'{"a": 1, "a": 2}'),
        ("a.jsonl", b'{"a": "\xff"}'), ("a.jsonl", b"[" * 100_000), ("a.json", b'[{"a": 1}, {"b"'),
        ("a.json", b'[{"a": 1}'), ("a.json", b'[{"a": 1}] 2'),
        ("a.json", b'[{"a": "\xff"}]'), ("a.json", b'[{"a": 1,}]'), ("a.csv", b"a,a\n1,2\n"), ("a.csv", b"a,b\n1\n"),
        ("a.csv", b'a,b\n1,"2\n3,4\n'), ("a.csv", b"a,b\n1,\xff\n"), ("a.txt", b"\xff\n"), ("a.parquet", b"PAR1none"),
        ("a.json", "[1]".encode("utf-16")), ("a.json", b"\x1f\x8b" + 9 * b"\0"), ("a.csv", b"PK\3\4" + 9 * b"\0"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n"),
    ],
)  # fmt: skip
def test_every_reason_why_a_file_cannot_be_read_is_in_chinese(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        reasons = [record.problem for record in read_file(tmp_path / name) if record.problem]
    except DataError as reason:
        reasons = [str(reason).removeprefix(f"{tmp_path / name}: ")]
    assert reasons
    assert not [reason for reason in reasons if translated(f"data.json:3: {reason}", "zh").endswith(reason)]


@pytest.mark.parametrize(
    "said",
    [
        "stopped by SIGTERM after step 4 of 19; checkpoint-4 is saved. The same command goes on from there.",
        "输出 目录/我的 has no finished adapter; took its newest checkpoint, checkpoint-4",
        "3 answers were cut at --max_new_tokens 8 or the model's limit",
        "3 answers, 1,024 tokens, 0.2 tokens/s; all 3 are in 回答 1.jsonl",
        "merging 1 adapter(s) into 210 layers of 我的 模型/基座, in fp16; this takes about 1.4 GiB of RAM",
        "基座 模型, 0.13 B weights, on a card of 11 GiB",
        "Largest known model that fits a card of 11 GiB at 4,096 tokens: Qwen2.5-14B.",
        "Longest context that fits with these options: 412,672 tokens in one row, more than the 8,192 positions of the "
        "model (layer inputs and layers may wait in 23.54 GiB of RAM).",
    ],
)
def test_what_a_newcomer_meets_after_training_is_in_chinese(said: str) -> None:
    assert not PROSE.search(translated(said, "zh"))


def test_the_missing_half_of_a_record_is_named_and_not_another_field_that_is_null() -> None:
    with pytest.raises(UnusableRecord, match='"output" is missing'):
        to_sample({"instruction": "a", "input": None}, "a.json:1")


def test_everything_that_the_doctor_finds_is_told_in_chinese() -> None:
    said = []
    for name in ("doctor/report", "doctor/facts", "model/nvidia_driver"):
        for node in ast.walk(_tree(REPOSITORY / f"onecard/{name}.py")):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                texts = [inner for part in node.args[2:] for inner in ast.walk(part)]
                parts = {id(one) for text in texts if isinstance(text, ast.JoinedStr) for one in text.values}
                said += [_filled(text) for text in texts if id(text) not in parts and _filled(text)]
    assert len(said) >= 40
    shown = [re.sub(r"pip (un)?install \S+", "", translated(text, "zh")) for text in said]
    assert not [text for text in shown if PROSE.search(text)]


# The API's answers stay English, as OpenAI's are; the page of --simple and the studio show theirs to a reader.
API_ANSWERS = ("serve/api/", "serve/body_limit", "serve/security", "serve/web/browsers")
# What says nothing to a reader by itself: parts of messages, help that is English, and a line with a command in it.
NOT_SAID = ("7 documents read", "Verbs, each", "its own", "\n--method", " (7 tensors differ)", " and 7 more parts",
            " (7 records are like that)", "7: 7; use a shorter --cutoff_len",
            " (7 more since the last such line)")  # fmt: skip
SPEAKERS = {"say", "warn", "note", "remark", "warn_once_a_minute", "bad_request", "UnusableRecord", "ApiError",
            "Command", "ServerFinding"}  # and all errors of a person  # fmt: skip
NOT_MET = "7 is missing"  # from a program that asks the studio without the page
# Texts that are put together of others, as they are filled here, and as they are said.
PUT_TOGETHER = (
    ("7 7: 7; what was made", "no room for 7: 7; what was made"),
    ("7 (7); use auto", "on, but the prompt template 7 has no switch for thoughts (7); use auto"),
    ("7 empty: nothing was asked", '"input" is empty: nothing was asked'),
    ("rows are too few to split7", "rows are too few to split"),
    ("in every tensor7;", "in every tensor, but for 7 of the 7, which it lacks,;"),
    ("of step 7, but 7", "of step 7, but those of 7 to 7"),
    ("7 7 (7, error", "7 q8_0 (7 MiB, error"),
    ("7; B against A", "A was chosen 7 times, B 7 times, neither 7 times; B against A"),
    ("7; all 7 are in", "7 answers, 7 tokens, 7 tokens/s; all 7 are in"),
    ("7; to go on: 7", "paused after step 7 of 7; to go on: 7"),
    ("7 of 7 saved in", "adapter of step 7 saved in"),
    ("7, in 7; the same command", "7 of 7 pairs have a vote, in 7; the same command"),
    ("7  ... and 7 more; --json", "missing  ... and 7 more; --json"),
    ("before the limit of --cutoff_len ", "before the limit of --cutoff_len 7"),
    *((f"7{text}", f"message 7{text}") for text in (" has no content", ": the role is", ": the content has")),
    ("7 is 7; an object with role", "message 7 is a text; an object with role"),
    ("7; give the server chat_template.jinja", "the template is 7; give the server chat_template.jinja"),
    ("model 7, so no answer", "model has no end token, so no answer"),
    ("answers come out of the 7", "answers come out of the documents"),
    ("all beams are 77", "all beams are shown"),
    ("(7 are not sent", "(the oldest 7 of 7 messages are not sent"),
    ("7: load the adapter", "the answers are the base's (KL 7; 7 to the run's): load the adapter"),
    ("7: serve it", "quantisation noise of KL 7 nats per token, more than --max_kl 7: serve it"),
    ("give 7 none", "give --rope_scaling none"),
    (
        "7: 7, and another",
        "7: 7 was written by another program, whose optimizer cannot go on here. To start a new run "
        "from its weights: --init_adapter 7, and another",
    ),
    ("7; run the same command", "stopped with 7 of 7 answers in 7; run the same command"),
    ("json_schema: 7 is no", "json_schema: the field json_schema of 7 is no"),
    ("7 is no 7 of", "7 is no tag of"),
    ("7 is no 7", "7 is no int"),
    ("began 7 LoRA+. Give , or", "began with LoRA+. Give 0, or"),
    ("and cannot answer; ", "and cannot answer; take it back first: 7"),
    ("7 is missing. 7", "7 is missing. To start a new run from its weights: --init_adapter 7"),
    ("7 cannot be used (7). 7", "7 cannot be used (7). To start a new run from its weights: --init_adapter 7"),
)
MODULES = sorted((REPOSITORY / "onecard").rglob("*.py"))
CONSTANTS: dict[str, str] = {}


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _trees_are_let_go():
    yield
    _tree.cache_clear()  # a million objects, which every later collection of garbage would go through


def _constants() -> dict[str, str]:
    """The texts that modules name in capitals; of a name with several, none."""
    found: dict[str, set[str]] = {}
    for file in MODULES:
        for node in _tree(file).body:
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=False))
                for name, text in pairs:
                    if isinstance(name, ast.Name) and (said := _filled(text)):
                        found.setdefault(name.id, set()).add(said)
    return {name: min(texts) for name, texts in found.items() if name.lstrip("_").isupper() and len(texts) == 1}


def _errors_of_a_person() -> set[str]:
    """The names of OneCardError and of everything that is derived from it."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for file in MODULES
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.ClassDef)
    }
    found = {"OneCardError"}
    while more := {name for name, those in bases.items() if those & found} - found:
        found |= more
    return found


def test_what_every_module_says_is_in_chinese() -> None:
    CONSTANTS.update(_constants())
    speakers = SPEAKERS | _errors_of_a_person()
    said: dict[str, str] = {}
    for file in MODULES:
        module = file.relative_to(REPOSITORY / "onecard").with_suffix("").as_posix()
        is_api = module.startswith(API_ANSWERS) and module != "serve/api/simple"
        kept = {"ApiError", "bad_request"} if is_api else set()
        for node in ast.walk(_tree(file)):
            texts: list[ast.expr] = []
            if isinstance(node, ast.Call) and _name_of(node.func) in speakers - kept:
                texts = node.args
            elif isinstance(node, ast.Tuple) and (
                (len(node.elts) == 2 and _filled(node.elts[0]).startswith("--"))
                or (len(node.elts) == 3 and module == "config/training")
            ):
                # A Problem: the flag, and what is wrong; a Contradiction has the condition between.
                texts = node.elts[-1:]
            inner = [one for text in texts for one in ast.walk(text)]
            parts = {id(part) for one in inner if isinstance(one, ast.JoinedStr) for part in ast.walk(one)} - {
                id(one) for one in inner if isinstance(one, ast.JoinedStr)
            }
            said |= {text: module for one in inner if id(one) not in parts and PROSE.search(text := _filled(one))}
    assert len(said) >= 900
    heard = [(module, text) for text, module in said.items() if not text.startswith(NOT_SAID) and text != NOT_MET]
    english = [each for each in heard if _stays_english(each[1])]
    assert not english, "\n".join(map(str, english))


def _name_of(function: ast.expr) -> str:
    return getattr(function, "id", "") or getattr(function, "attr", "")


def _stays_english(text: str) -> bool:
    for filled, meant in PUT_TOGETHER:
        text = text.replace(filled, meant)
    shown = re.sub(
        r"(pip|apt) install (-r )?\S+|ollama create|onecard verify-server|--instruction \".*\"",
        "",
        translated(text, "zh"),
    )
    return PROSE.search(shown) is not None


def _filled(node: ast.AST) -> str:
    """A text of the code with values in it; nothing for what is no text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_filled(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        name = _name_of(getattr(node.value, "func", node.value))
        # (did you mean ...?), which may be there, is not.
        return "" if name in ("nearest", "meant") else CONSTANTS.get(name, "7")
    if isinstance(node, ast.Name):
        return CONSTANTS.get(node.id, "")
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_the_language_is_the_one_typed_else_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "adapter of step 4 saved in out"
    assert translated(said) == said
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert translated(said) == "第 4 步的适配器已保存到 out"
    cli.parse(FinetuneConfig, ["--language", "en"])
    assert translated(said) == said
    cli.parse(FinetuneConfig, [])
    assert translated(said) != said
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    assert translated(said) == said
    with pytest.raises(ConfigError, match="'fr' is not one of auto, en, zh"):
        cli.parse(FinetuneConfig, ["--language", "fr"])


def test_what_an_export_proves_is_in_chinese() -> None:
    proof = (
        "merged 1 adapter(s) into a/b, in fp16: proven on the reopened files: 28 of 28 target layers changed, 38 "
        "tensors finite and as merged, names as in the base; on 6 probe prompts 98.9% of what the adapters change in "
        "the predictions is kept (KL divergence of base + adapters 2.2e-06 from the result, 1.6e-04 from the base), "
        "and the likeliest token is the same at 236 of 236 places; the rest is lost to the rounding to fp16 "
        "(merge_lora.py --dtype fp32 loses nothing) (computed in float32, layer by layer while merging)"
    )
    taken = "--output_path: /a/b exists already; give another place, or add --overwrite"
    for said in (proof, taken, "chat template: alpaca, in the GGUF and, as a Go template, in the Modelfile"):
        shown = translated(said, "zh")
        assert shown != said and not PROSE.search(shown), shown


def test_a_flag_stands_before_a_message_and_not_in_it() -> None:
    shown = translated("--method: awq is not made here: cards before the RTX 40 series compute nothing in fp8; use bnb "
                       "with --bits 8", "zh")  # fmt: skip
    assert shown == "--method: 这里不做 awq：RTX 40 系列之前的显卡不能用 fp8 计算；请用 bnb 加 --bits 8"
    shown = translated("  --objective grpo: does not go with virtual tokens (--peft_method p_tuning): use lora", "zh")
    assert shown == "  --objective grpo: 不能和虚拟 token（--peft_method p_tuning）一起用：请用 lora"


def test_what_is_no_message_stays_as_it_is() -> None:
    use_language("zh")
    for text in ('{"left": "peak"}', "lora_r: 8", "这是中文。", "An English answer that nobody translated."):
        assert translated(text) == text
    row = translated("  peak                                               0.32 100.0 %")
    assert row.startswith("  峰值") and row.endswith("0.32 100.0 %")
    assert translated("Qwen2.5-7B, 7.62 B weights, on a card (11.00 GiB)").startswith("Qwen2.5-7B，7.62 B 个权重，")
    assert translated("a.json:3: is missing") == "a.json:3: 没有给出"


def test_what_a_person_named_stays_as_it_was_named() -> None:
    """A folder, an adapter or a question may be a word that is a message, or a part of one, elsewhere."""
    assert translated("training", "zh") == "训练中" and translated("ok", "zh") == "正常"
    for said, named in (
        ("--model_path: there is no directory training (did you mean text?)", ("training", "text")),
        ("there is already a run called training; choose another name", ("training",)),
        ("tools: there is no such file or folder", ("tools",)),
    ):
        shown = translated(said, "zh")
        assert shown != said and all(name in shown for name in named), shown
    shown = translated("in 3 (first: a.json:1): trailing turns without an answer were cut", "zh")
    assert shown == "3 条（首见于 a.json:1）：末尾没有回答的轮次已去掉"


def test_the_catalogue_fits_the_code() -> None:
    """Each entry has the values of its key, and each text of a key stands in the code."""
    texts = "\n".join(_texts_of(file) for file in MODULES)
    texts += "\n".join(os.strerror(number) for number in errno.errorcode)
    for key, value in CATALOGUE.items():
        names, shown = (re.findall(r"\{(\w+)\}", text) for text in (key, value))
        assert set(shown) <= set(names), key
        assert len(names) == len(set(names)), key
        for part in re.split(r"\{\w+\}(?:\?\))?", key):  # nearest() adds (did you mean ...?)
            assert _is_said(part, texts), f"{part!r} of {key!r} is said nowhere"


def _is_said(part: str, texts: str) -> bool:
    """Whether a text is made of pieces of the code, each as long as can be: some messages are put together."""
    while part:
        n = bisect.bisect_left(range(1, len(part) + 1), True, key=lambda size: part[:size] not in texts)
        if n < min(4, len(part)):
            return False
        part = part[n:]
    return True


def _texts_of(file: Path) -> str:
    """Every text of a module, with nothing in place of the values in it."""
    found = []
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_every_template_of_the_catalogue_is_found_by_what_it_says() -> None:
    use_language("zh")
    for key in CATALOGUE:
        said = re.sub(r"\{(\w+)\}", lambda name: "7" if name[1] in translation._NUMBERS else "x1", key)
        assert translation.in_catalogue(said, "zh") is not None, key


def test_torchrun_is_told_the_error_so_that_it_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def main() -> None:
        raise ConfigError("--bits", "is missing")

    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert console.run_main(main) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert ChildFailedError("finetune.py", {0: failure}).args[0].splitlines()[-2].endswith("--bits: is missing")


KEPT = (
    f"name a mirror by --endpoint {MIRROR} or HF_ENDPOINT. What is there already is kept, and the same command goes on "
    "from it"
)
HUB_CALLS: list[dict[str, Any]] = [  # as models, data sets and downloads ask
    {"what": "the model a/b", "elsewhere": "a directory here"},
    {"what": "a/b", "elsewhere": "a directory here, a known model,"},
    {"what": "model a/b", "address": "https://mirror.example", "remedy": KEPT},
    {"what": "dataset a/b", "kind": "dataset", "address": "https://mirror.example", "remedy": KEPT},
    {
        "what": "the collection (a/b)",
        "kind": "dataset",
        "remedy": f"bring it here first: onecard data get a --endpoint {MIRROR}",
    },
    {"what": "there is no such file or folder, and the `train` split of the data set on the Hub", "kind": "dataset"},
]


@pytest.mark.parametrize("call", HUB_CALLS)
@pytest.mark.parametrize(
    "error", ["GatedRepoError", "RepositoryNotFoundError", "LocalEntryNotFoundError", "HfHubHTTPError", "OSError"]
)
@pytest.mark.parametrize("asked", ["", "https://asked.example"])
def test_what_the_hub_answers_is_in_chinese(
    monkeypatch: pytest.MonkeyPatch, asked: str, error: str, call: dict[str, Any]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", asked)
    problem = hub_problem(type(error, (Exception,), {})("503"), repository="a/b", **call)
    shown = translated(f"--model_path: {problem}", "zh")
    names = re.compile(r"`hf auth login`|(python|onecard) \S+ (get a|--repo_id) .*|(model|dataset) a/b")
    assert not PROSE.search(names.sub("", shown)), shown
