"""Tokenizers of the kinds that differ in how they treat segments."""

from __future__ import annotations

import copy

import pytest

from tests import tiny
from tests.data.plain_tokenizer import PlainTokenizer

APPEND_ONLY = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# As Qwen3: the thinking of earlier answers is dropped from the history.
REWRITES_HISTORY = (
    "{%- for message in messages -%}{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and not loop.last -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# As Phi-3: eos closes the text only when nothing follows.
CLOSES_AT_THE_END = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"
)
# As Llama 2: a space before and after each answer, which SentencePiece writes by itself.
SPACED = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{{- ' ' + message['content'] + ' ' + eos_token -}}{%- else -%}"
    "{{- '[INST] ' + message['content'] + ' [/INST]' -}}{%- endif -%}{%- endfor -%}"
)


@pytest.fixture(scope="session")
def bytelevel_bos_tokenizer():
    """A byte-level BPE tokenizer in the manner of Llama 3: a BOS, header tokens, <|eot_id|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        tiny.CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], additional_special_tokens=special[2:]
    )


@pytest.fixture(scope="session")
def sp_legacy_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The SentencePiece tokenizer as models of the first Llama load it."""
    from transformers import AutoTokenizer

    directory = tiny.save_sentencepiece_tokenizer(tmp_path_factory.mktemp("sp-legacy"))
    (directory / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(directory, legacy=True)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PlainTokenizer:
    return PlainTokenizer()


@pytest.fixture(scope="session")
def with_template():
    """A copy of a tokenizer that has a chat template of its own."""

    def make(tokenizer, jinja: str):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = jinja
        return changed

    return make
