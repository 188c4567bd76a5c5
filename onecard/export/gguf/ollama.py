"""An Ollama Modelfile: which file, how a dialogue is written down, where an answer ends, and how to sample.

Ollama writes prompts with Go templates, not Jinja, so each built-in template is written here a second time; the tests
hold both to the same bytes. Ollama adds the BOS token itself where the GGUF says so, and keeps a last assistant
message open, to go on with it. Knows Modelfiles. Does not know GGUF or models.
https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx, .../docs/template.mdx
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from onecard.errors import ConfigError
from onecard.export.gguf.options import OllamaOptions

QUOTES = '"""'
_START = "{{- range $i, $_ := .Messages }}\n{{- $last := eq (len (slice $.Messages $i)) 1 }}\n"
_END = "{{- end }}\n{{- end }}"
_CLOSED = "{{ if not $last }}{{ EOS }}{{ end }}\n"
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_VICUNA = (
    "The following is a conversation between an AI assistant called Assistant and a human user called User. The "
    "assistant is intelligent, knowledgeable and polite to answer questions of user."
)
_INST = (
    "{{- $system := .System }}\n"
    + _START
    + '{{- if eq .Role "user" }}{{ "[INST] " }}{{ if $system }}BEFORE{{ $system }}AFTER{{ end }}{{ .Content }}'
    '{{ " [/INST]" }}{{ $system = "" }}\n'
    '{{- else if eq .Role "assistant" }}{{ LEAD }}{{ .Content }}' + _CLOSED + _END
)
# BOS and EOS stand for the tokenizer's own, LEAD for what the template writes before an answer.
GO_TEMPLATES = {
    "alpaca": "{{- BOS }}{{ if .System }}{{ .System }}{{ else }}" + _ALPACA + "{{ end }}\n" + _START
    + r'{{- if eq .Role "user" }}{{ "\n\n### Instruction:\n" }}{{ .Content }}{{ "\n\n### Response:\n" }}' + "\n"
    + '{{- else if eq .Role "assistant" }}{{ LEAD }}{{ .Content }}' + _CLOSED + _END,
    "vicuna-chat": "{{- BOS }}{{ if .System }}{{ .System }}{{ else }}" + _VICUNA + "{{ end }}\n" + _START
    + r'{{- if eq .Role "user" }}{{ "\n\nUser:" }}{{ .Content }}{{ if $last }}{{ "\n\nAssistant:" }}{{ end }}' + "\n"
    + r'{{- else if eq .Role "assistant" }}{{ "\n\nAssistant:" }}{{ .Content }}' + _CLOSED + _END,
    "chatml": "{{- BOS }}\n" + _START
    + r'{{- "<|im_start|>" }}{{ .Role }}{{ "\n" }}{{ .Content }}' + "\n"
    + r'{{- if or (not $last) (ne .Role "assistant") }}{{ "<|im_end|>\n" }}{{ end }}' + "\n"
    + r'{{- if and $last (ne .Role "assistant") }}{{ "<|im_start|>assistant\n" }}' + "\n" + _END,
    "llama-3": "{{- BOS }}\n" + _START
    + r'{{- "<|start_header_id|>" }}{{ .Role }}{{ "<|end_header_id|>\n\n" }}{{ .Content }}' + "\n"
    + r'{{- if or (not $last) (ne .Role "assistant") }}{{ "<|eot_id|>" }}{{ end }}' + "\n"
    + r'{{- if and $last (ne .Role "assistant") }}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}' + "\n"
    + _END,
    "llama-2": "{{- BOS }}\n"
    + _INST.replace("BEFORE", r'{{ "<<SYS>>\n" }}').replace("AFTER", r'{{ "\n<</SYS>>\n\n" }}'),
    "mistral": "{{- BOS }}\n" + _INST.replace("BEFORE", "").replace("AFTER", r'{{ "\n\n" }}'),
    "none": "{{- BOS }}\n" + _START + '{{- .Content }}{{ if eq .Role "assistant" }}' + _CLOSED + _END,
}  # fmt: skip


def go_template(name: str, *, bos: str, eos: str, lead: str = "") -> str | None:
    """The Go template that writes what our Jinja template of this name writes; None for one that is not built in.

    Args:
        bos: text of the BOS token where Ollama does not add it by itself; empty otherwise.
        eos: text of the tokenizer's eos token.
        lead: what a file of this template's text writes before an answer, such as a space.
    """
    template = GO_TEMPLATES.get(name)
    if template is None:
        return None
    template = template.replace("{{- BOS }}", f"{{{{- {_go(bos)} }}}}" if bos else "")
    template = template.replace("{{ LEAD }}", f"{{{{ {_go(lead)} }}}}" if lead else "")
    return template.replace("{{ EOS }}", f"{{{{ {_go(eos)} }}}}").strip()


def modelfile(
    file_name: str, template: str | None, stops: Sequence[str], options: OllamaOptions, adapter: str = ""
) -> str:  # fmt: skip
    """The text of a Modelfile beside `file_name`, and beside `adapter`, if that is put on it.

    Raises ConfigError for a system prompt that cannot be quoted.
    """
    lines = [f"FROM ./{file_name}", *([f"ADAPTER ./{adapter}"] if adapter else [])]
    if template is not None:
        lines.append(f"TEMPLATE {quoted(template, '--prompt_type')}")
    lines += [f"PARAMETER stop {quoted(stop, '--prompt_type')}" for stop in dict.fromkeys(stops)]
    lines += [f"PARAMETER {name} {value}" for name, value in options.parameters().items() if value is not None]
    if options.system:
        lines.append(f"SYSTEM {quoted(options.system, '--system')}")
    return "\n".join(lines) + "\n"


def quoted(text: str, flag: str) -> str:
    """A text between triple quotes, where everything is taken as it stands: Modelfiles have no escapes.

    Raises ConfigError for what would not arrive: three quotes in a row, and characters that Ollama's reader drops.
    """
    if QUOTES in text:
        raise ConfigError(flag, 'three quotes (""") in a row cannot stand in a Modelfile; write it without')
    dropped = sorted({character for character in text if not character.isprintable() and character not in "\n\t"})
    if dropped:
        names = ", ".join(f"U+{ord(character):04X}" for character in dropped[:5])
        raise ConfigError(flag, f"Ollama drops these characters from a Modelfile: {names}; write it without them")
    return f"{QUOTES}{text}{QUOTES}"


def _go(text: str) -> str:
    """A Go string literal."""
    return json.dumps(text, ensure_ascii=False)
