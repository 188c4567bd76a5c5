"""What `onecard gguf` does: a model, with adapters merged in, becomes a directory for llama.cpp and Ollama.

Knows the order of things and what to tell. The format is writer.py's, the tokens tokenizer.py's, the Modelfile
ollama.py's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from onecard.console import say, warn
from onecard.data.built_in_templates import built_in_name
from onecard.data.chat_template import PromptRenderer, Template, load_template, own_chat_template
from onecard.data.special_tokens import single_token, special_tokens
from onecard.errors import DataError
from onecard.export.gguf import ollama
from onecard.export.gguf import writer as gguf
from onecard.export.gguf.layout import GgufLayout, check_tensors, read_layout, with_own_head
from onecard.export.gguf.options import ExportOptions, OllamaOptions
from onecard.export.gguf.tokenizer import Vocabulary, read_vocabulary
from onecard.export.io import output
from onecard.export.io.weights import Weights, open_weights
from onecard.export.merge.options import MergeSettings
from onecard.model.files import locate
from onecard.model.load import load_tokenizer
from onecard.model.lora.formats import scaling_of_adapters

MERGED = ".merged"
# By the type of the file; fp32 for all others.
MERGED_DTYPES: dict[str, Literal["fp16", "bf16"]] = {"f16": "fp16", "bf16": "bf16"}
MIB = 2**20
PIECES_BYTES = 96 * MIB  # the fp32 pieces in which a tensor is rounded, and what gguf makes of them on the way


@dataclass(frozen=True)
class GgufSource:
    """An opened model: where it lies, its parts, and what is planned of it."""

    directory: Path
    layout: GgufLayout
    vocabulary: Vocabulary
    weights: Weights
    planned: list[gguf.PlannedTensor]
    tokenizer: Any
    template: Template | None

    @property
    def model(self) -> tuple[GgufLayout, Vocabulary, Weights]:
        return self.layout, self.vocabulary, self.weights


def export_gguf(options: ExportOptions, for_ollama: OllamaOptions, also: Callable[[Path], None] | None = None) -> Path:
    """Write DIRECTORY/model-TYPE.gguf and a Modelfile, reopen and compare, and say what was done; returns the file.

    also: writes more into the directory before it takes its name.
    Raises ModelError and ConfigError: another family, parts missing, damaged or of other sizes, no room, and an
    existing directory without `overwrite`.
    """
    base = locate(options.model_path)
    name = options.target.expanduser().absolute().name
    inputs = [base, *(Path(adapter) for adapter in options.adapters)]
    # Checked before the merge, which takes longest; and with an adapter again afterwards, on what was merged.
    source = open_source(base, options, rope_scaling=scaling_of_adapters(options.adapters))
    needed = gguf.file_bytes(source.planned, source.vocabulary)
    if options.adapters:
        itemsize = 2 if options.gguf_type in MERGED_DTYPES else 4
        needed += sum(entry.n_bytes // entry.dtype.itemsize * itemsize for entry in source.weights.entries.values())
    with output.new_directory(
        options.target, overwrite=options.overwrite, inputs=inputs, needed_bytes=needed
    ) as partial:
        if options.adapters:
            source = open_source(_merge(partial / MERGED, options), options)
        for note in source.layout.notes:
            warn(note)
        file = partial / f"model-{options.gguf_type}.gguf"
        _say_plan(source, options)
        gguf.write(
            file, source.model, source.planned, name=name, gguf_type=options.gguf_type,
            chat_template=chat_template_for(source.template, source.tokenizer),
        )  # fmt: skip
        reports = gguf.verify(file, source.model, source.planned)
        note = _template_note(source, for_ollama)
        if for_ollama.modelfile:
            text = modelfile_for(file.name, source, for_ollama)
            (partial / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
        n_bytes = file.stat().st_size
        if also is not None:
            also(partial)
        shutil.rmtree(partial / MERGED, ignore_errors=True)
    _say_done(options.target, file.name, n_bytes, reports, note)
    if for_ollama.modelfile:
        say(f"for Ollama: ollama create NAME -f {options.target / 'Modelfile'}")
    return options.target / file.name


def open_source(
    directory: Path, options: ExportOptions, tokenizer_from: Path | None = None, rope_scaling: str = "none"
) -> GgufSource:
    """Look at everything that an export needs, without reading a weight. Raises as `export_gguf` does.

    tokenizer_from: where the tokenizer and its template are, if not in the directory. rope_scaling: of an adapter that
    is not merged yet.
    """
    layout = read_layout(directory, rope_scaling)
    weights = open_weights(directory)
    layout = with_own_head(layout, weights)
    names, left_out = check_tensors(directory, layout, weights)
    layout = replace(layout, notes=(*layout.notes, *left_out))
    tokenizer = load_tokenizer(str(tokenizer_from or directory))
    template = _template(options.prompt_type, tokenizer)
    end_id = single_token(template.end_text(tokenizer), tokenizer) if template else None
    vocabulary = read_vocabulary(
        tokenizer, directory, layout.vocab_size, beginning=_beginning(template, tokenizer), end_id=end_id
    )
    planned = gguf.plan(layout, names, options.gguf_type)
    return GgufSource(directory, layout, vocabulary, weights, planned, tokenizer, template)


def chat_template_for(template: Template | None, tokenizer: Any) -> str | None:
    """The Jinja text for the GGUF: as stored, but a BOS that the tokenizer does not have stays away.

    llama.cpp hands a template the text of some token as bos_token in any case; Hugging Face hands it nothing.
    """
    if template is None:
        return None
    jinja = template.jinja
    if tokenizer.bos_token or "bos_token" not in jinja:
        return jinja
    first, separator, rest = jinja.partition("#}\n") if jinja.startswith("{#- onecard:") else ("", "", jinja)
    return f"{first}{separator}{{%- set bos_token = '' -%}}\n{rest}"


def _template(prompt_type: str, tokenizer: Any) -> Template | None:
    if prompt_type == "auto" and own_chat_template(tokenizer) is None:
        return None
    return load_template(prompt_type, tokenizer)


def _beginning(template: Template | None, tokenizer: Any) -> str:
    """The text of BOS where the template writes it in front, else nothing."""
    bos = str(tokenizer.bos_token or "")
    if template is None or not bos:
        return ""
    try:
        question = [{"role": "user", "content": "a"}]
        text = template.render(question, special_tokens=special_tokens(tokenizer), add_generation_prompt=True)
    except DataError:  # a template that wants other messages; then its beginning stays unknown
        return ""
    return bos if text.startswith(bos) else ""


def _merge(directory: Path, options: ExportOptions) -> Path:
    from onecard.export.merge.merge import merge_into  # peft takes seconds, and only adapters need it

    directory.mkdir()
    # Learned sums are rounded once: here to the file's own 16 bits, which gguf then stores as they are, or there.
    dtype: Literal["fp16", "bf16", "fp32"] = MERGED_DTYPES.get(options.gguf_type, "fp32")
    report = merge_into(
        directory, options.model_path, options.adapters,
        MergeSettings(dtype=dtype, accept_other_base=options.accept_other_base, adapter_scale=options.adapter_scale),
    )  # fmt: skip
    for note in report.notes:
        warn(note)
    say(
        f"merged {len(report.adapters)} adapter(s) into {options.model_path}" + f": {report.proof}" * bool(report.proof)
    )
    return directory


def modelfile_for(file_name: str, source: GgufSource, options: OllamaOptions, adapter: str = "") -> str:
    """The Modelfile of an opened model, with what its template and tokenizer ask for."""
    template, tokenizer = source.template, source.tokenizer
    go, stops = None, []
    if template is not None:
        bos = "" if source.vocabulary.adds_bos else _beginning(template, tokenizer)
        built_in = built_in_name(template.jinja)
        if built_in:
            lead = PromptRenderer(template, tokenizer).lead
            go = ollama.go_template(built_in, bos=bos, eos=str(tokenizer.eos_token), lead=lead)
        stops = [template.end_text(tokenizer), *template.stop]
    return ollama.modelfile(file_name, go, stops, options, adapter)


def _template_note(source: GgufSource, for_ollama: OllamaOptions) -> str:
    if source.template is None:
        return "no chat template: none is stored with the model (give one with --prompt_type)"
    built_in = built_in_name(source.template.jinja)
    note = f"chat template: {built_in or 'the model’s own'}, in the GGUF"
    if not for_ollama.modelfile:
        return note
    if built_in:
        return f"{note} and, as a Go template, in the Modelfile"
    return (
        f"{note}; none in the Modelfile, because only built-in ones are known as Go templates: Ollama recognises "
        "well-known ones in the GGUF, else add a TEMPLATE line"
    )


def _say_plan(source: GgufSource, options: ExportOptions) -> None:
    largest = max(source.weights.entries[tensor.source].n_bytes for tensor in source.planned if tensor.source)
    ram = 2 * largest + 2 * max(tensor.n_bytes for tensor in source.planned) + PIECES_BYTES
    vocabulary = source.vocabulary
    words = {"llama": "SentencePiece", "gpt2": f"byte-level BPE, cut as {vocabulary.pre}"}[vocabulary.model]
    unused = f", {vocabulary.n_unused} of them in no text" if vocabulary.n_unused else ""
    say(
        f"{source.layout.family} model, {len(source.planned)} tensors as {options.gguf_type}, "
        f"{len(vocabulary.tokens)} tokens ({words}{unused}); takes about {ram // MIB} MiB of RAM beside the program"
    )


def _say_done(target: Path, file_name: str, n_bytes: int, reports: list[gguf.KindReport], note: str) -> None:
    say(f"wrote {target / file_name}: {n_bytes / MIB:.1f} MiB")
    for report in reports:
        size = f"{report.n_bytes / MIB:.1f} MiB"
        say(f"reopened and compared with the source: {report.n_tensors} {report.kind} ({size}, error at most "
            f"{report.error:.2%})")  # fmt: skip
    say(note)
