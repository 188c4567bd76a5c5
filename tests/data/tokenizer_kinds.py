"""Small tokenizers of the kinds that public models use, trained in the process on a bilingual text.

They differ in what they put in front of a text and of what follows an added token, in how they cut words, in the
flags of their added tokens, and in whether they write the BOS that they name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny

CONTROL = (
    "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]",
    "[/INST]", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|im_sep|>", "<|start_of_role|>",
    "<|end_of_role|>", "<|end_of_turn|>", "<｜User｜>", "<｜Assistant｜>", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
)  # fmt: skip
# As Phi-3: these take the blanks behind them with them.
STRIPPING = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THOUGHT_MARKS = ("<think>", "</think>")  # added, and not special, as with Qwen3
TEXTS = [*tiny.CORPUS, *(f"{text}\n\n{text} <think>\n" for text in tiny.CORPUS)]


def sentencepiece(*, normalizer: Any = None, pre_tokenizer: Any = None, control: tuple[str, ...] = CONTROL) -> Any:
    """SentencePiece BPE with byte fallback; what puts the space in front is up to the two parts."""
    from tokenizers import Tokenizer, decoders, models, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False))
    # The trainer makes added tokens of the byte tokens; in real models they are ordinary ones.
    core = Tokenizer.from_str(json.dumps(json.loads(core.to_str()) | {"added_tokens": []}))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return with_control(core, control)


def unigram(pre_tokenizer: Any) -> Any:
    """SentencePiece Unigram with the normal form that most such models have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    core = Tokenizer(models.Unigram())
    core.normalizer, core.pre_tokenizer, core.decoder = normalizers.NFKC(), pre_tokenizer, decoders.Metaspace()
    characters = sorted(set("".join(TEXTS)) | set("\nHello 🙂,北京And"))
    trainer = trainers.UnigramTrainer(
        vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False,
        initial_alphabet=characters,
    )  # fmt: skip
    core.train_from_iterator([*TEXTS, *characters], trainer)
    return with_control(core, CONTROL)


def byte_level(words: str, *, normalizer: Any = None, prefix_space: bool = False, ignore_merges: bool = False) -> Any:
    """Byte-level BPE that cuts words as `words` says."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    core.normalizer, core.decoder = normalizer, decoders.ByteLevel()
    if words == GPT2:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        split = pre_tokenizers.Split(Regex(words), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                split,
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return with_control(core, CONTROL)


def with_control(core: Any, control: tuple[str, ...], stripping: tuple[str, ...] = ()) -> Any:
    from tokenizers import AddedToken

    core.add_special_tokens([AddedToken(text, normalized=False, rstrip=text in stripping) for text in control])
    core.add_tokens([AddedToken(text, normalized=False) for text in THOUGHT_MARKS])
    return core


def loaded(core: Any, *, bos: str | None = "<s>", eos: str = "</s>", writes_bos: bool = True) -> Any:
    """As transformers holds it; `writes_bos`: tokenizer("x") begins with BOS."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if writes_bos and bos:
        special = [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)


def metaspace(scheme: str, *, split: bool = False) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def _prepend() -> Any:
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _gemma() -> Any:
    from tokenizers import normalizers, pre_tokenizers

    return sentencepiece(
        normalizer=normalizers.Replace(" ", "▁"), pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous")
    )


def _phi_3() -> Any:
    core = sentencepiece(normalizer=_prepend(), control=("<unk>", "<s>", "</s>"))
    return loaded(with_control(core, CONTROL, STRIPPING), eos="<|endoftext|>", writes_bos=False)


def _words() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace("always", split=True)])


def _nfc() -> Any:
    from tokenizers import normalizers

    return normalizers.NFC()


def _slow(folder: Path) -> Any:
    """A tokenizer that works in Python around a SentencePiece model, which puts a space in front of every piece."""
    from transformers import GPTSw3Tokenizer

    model = tiny.save_sentencepiece_tokenizer(folder) / "tokenizer.model"
    return GPTSw3Tokenizer(str(model), bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


KINDS: dict[str, Callable[[Path], Any]] = {
    "sp-prepend": lambda _: loaded(sentencepiece(normalizer=_prepend())),  # Llama 1 and 2, Mistral v1 as stored
    "sp-prepend-few-tokens": lambda _: loaded(sentencepiece(normalizer=_prepend(), control=("<s>", "</s>"))),
    "sp-prepend-stripping": lambda _: _phi_3(),  # Phi-3
    "sp-first": lambda _: loaded(sentencepiece(pre_tokenizer=metaspace("first"))),  # Llama 2 without `legacy`
    "sp-always": lambda _: loaded(sentencepiece(pre_tokenizer=metaspace("always")), writes_bos=False),
    "sp-never": lambda _: loaded(_gemma()),  # Gemma
    "unigram": lambda _: loaded(unigram(metaspace("always", split=True)), writes_bos=False),
    "unigram-words": lambda _: loaded(unigram(_words())),  # XGLM
    "gpt2": lambda _: loaded(byte_level(GPT2), bos="<|endoftext|>", eos="<|endoftext|>", writes_bos=False),
    "gpt2-prefix-space": lambda _: loaded(byte_level(GPT2, prefix_space=True)),
    "llama3": lambda _: loaded(byte_level(LLAMA3, ignore_merges=True), eos="<|eot_id|>"),
    "qwen": lambda _: loaded(byte_level(QWEN, normalizer=_nfc()), bos=None, eos="<|im_end|>"),
    "o200k": lambda _: loaded(byte_level(O200K), eos="<|return|>", writes_bos=False),  # gpt-oss, Phi-4
    "python": _slow,
}
