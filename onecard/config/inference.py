"""Every option of asking, chatting and serving, declared once, as in `training.py`.

Knows types, defaults, bounds and which settings contradict one another. It does not know models, pages or sockets, and
it imports nothing heavy.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal

from onecard.config.addresses import address_problems, is_loopback, list_problems, plain_host, plain_origin
from onecard.config.base_model import ModelOptions
from onecard.config.best_of import BestOfOptions
from onecard.config.problems import Problem, too_small

API_KEY_VARIABLE = "ONECARD_API_KEY"
MOST_PARALLEL = 256
DOCUMENTS_MODEL = "documents"  # the name under which a model answers out of documents


@dataclass
class AnsweringModelOptions(ModelOptions):
    """The base model and how it lies in memory."""

    model_path: str = "auto"
    """Base model: a directory or a Hub id; auto: the one that the adapter's run was trained on."""
    bits: Literal["auto", 4, 8, 16, 32] = "auto"  # type: ignore[assignment]
    """Bits per base weight: 4 (NF4 with double quantisation), 8 (LLM.int8), 16 or 32. auto: on a card those of the run,
    or 4; on a CPU 16, which answers fastest, or fewer where they do not fit."""


@dataclass
class SamplingOptions:
    """How an answer is chosen, token by token."""

    max_new_tokens: int = 256
    """Longest answer in tokens."""
    min_new_tokens: int = 0
    """The end token cannot come before so many tokens; a stop text still ends the answer."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; higher is more varied."""
    top_p: float = 1.0
    """Sample only from the likeliest tokens that together reach this probability."""
    top_k: int = 0
    """Sample only from so many likeliest tokens; 0: from all."""
    num_beams: int = 1
    """Beams of beam search; 1: none."""
    repetition_penalty: float = 1.0
    """Above 1 words that already stand there become less likely."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens appears twice; 0: off."""
    stop: list[str] = field(default_factory=list)
    """Text that ends an answer, besides those of the template, and is not shown; \\n is a new line. May be repeated."""
    seed: int = 42
    """Seed of the sampling."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if self.max_new_tokens < 1:
            found.append(("--max_new_tokens", f"{self.max_new_tokens} leaves no room for an answer; use 1 or more"))
        if not 0 <= self.min_new_tokens <= max(self.max_new_tokens, 0):
            found.append(("--min_new_tokens", f"{self.min_new_tokens} is not between 0 and --max_new_tokens"))
        # Written so that NaN fails as well.
        if not 0 <= self.temperature <= 100:
            found.append(("--temperature", f"{self.temperature} is not between 0 (greedy) and 100; 0.7 is usual"))
        if not 0 < self.top_p <= 1:
            found.append(("--top_p", f"{self.top_p} is not a probability above 0"))
        for name in ("top_k", "no_repeat_ngram_size", "seed"):
            if getattr(self, name) < 0:
                found.append((f"--{name}", f"{getattr(self, name)} is negative; 0 turns it off"))
        if self.num_beams < 1:
            found.append(("--num_beams", f"{self.num_beams}: use 1 (no beam search) or more"))
        if not 0 < self.repetition_penalty <= 100:
            found.append(("--repetition_penalty", f"{self.repetition_penalty}: use 1 (off) or a little more"))
        if any(not text for text in self.stop):
            found.append(("--stop", "is empty; an empty text would end every answer before it begins"))
        return found


def scale_problems(scale: float) -> list[Problem]:
    """What is wrong with --adapter_scale."""
    return [] if 0 <= scale <= 10 else [("--adapter_scale", f"{scale} is not between 0 (the base) and 10")]


@dataclass
class InferenceOptions:
    """Which model talks, and in which words."""

    lora_path: str | None = None
    """Adapter: a run directory, one of its checkpoints, or a Hub id. Without it the base model answers."""
    adapter_scale: float = 1.0
    """How strongly the adapter is put on: 0 is the base, 1 what was trained; between them less of both what was learned
    and what was forgotten. For LoRA, LoHa and LoKr."""
    prompt_type: str = "auto"
    """Prompt template. auto takes the one stored with the adapter."""
    system: str = ""
    """System prompt."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers, where its prompt template has a switch for that (Qwen3). auto: as the
    template has it. API clients choose with chat_template_kwargs."""
    static_cache: bool = False
    """Reserve the key-value cache at once, at full length, which --compile needs."""
    compile: bool = False
    """Compile the decoding step (GPU only): the first answer waits for that. What it gains was not measured yet."""

    def problems(self) -> list[Problem]:
        found = scale_problems(self.adapter_scale)
        if self.compile and not self.static_cache:
            found.append(
                ("--compile", "needs --static_cache: a cache that grows would be compiled anew for each length")
            )
        return found


@dataclass
class AskOptions(BestOfOptions):
    """What is asked, and where the answers go."""

    instruction: str | None = None
    """One instruction to answer; without it and without --data_path an interactive loop begins."""
    input: str = ""
    """Text that goes with --instruction."""
    data_path: str | list[str] | None = None
    """Questions to answer: files in any shape that training reads, answers in them are ignored. One or several."""
    output_path: str | None = None
    """With --data_path: jsonl file for the answers. Run again to go on where it stopped."""
    batch_size: int = 8
    """Questions answered at once from --data_path."""
    json_schema: str | None = None
    """File with a JSON schema that every answer is held to."""
    regex: str | None = None
    """Regular expression that every answer is held to, as a whole."""
    show_beams: bool = False
    """With --num_beams: show all beams while they compete, not only the best."""
    web: bool = False
    """Open a page in the browser instead of asking here."""

    def problems(self) -> list[Problem]:
        found = [*super().problems(), *self.best_of_problems()]
        if self.batch_size < 1:
            found.append(("--batch_size", f"{self.batch_size} answers nothing; use 1 or more"))
        if self.data_path and not self.output_path:
            found.append(("--output_path", "is missing; --data_path needs a jsonl file for the answers"))
        if self.output_path and not self.data_path:
            found.append(("--data_path", "is missing; --output_path only goes with a file of questions"))
        if self.instruction is not None and self.data_path:
            found.append(("--instruction", "and --data_path contradict each other; give one of them"))
        if self.best_of > 1 and not self.data_path:
            found.append(("--best_of", "goes with a file of questions; give --data_path and --output_path"))
        if self.input and self.instruction is None:
            found.append(("--input", "goes with --instruction"))
        if self.json_schema and self.regex:
            found.append(("--json_schema", "and --regex contradict each other; give one of them"))
        if self.web and (self.json_schema or self.regex):
            found.append(("--web", "opens a page, which holds answers to nothing; leave out --json_schema and --regex"))
        if self.web and (self.instruction is not None or self.data_path):
            found.append(("--web", "opens a page to ask on; leave out --instruction and --data_path"))
        return found


@dataclass
class ChatOptions:
    """Where the chat takes place."""

    cli: bool = False
    """Chat in this terminal instead of opening a page."""
    adapters_path: str | None = None
    """A folder of adapters for the same base; the page, the terminal and API clients can switch among them."""
    show_beams: bool = False
    """With --num_beams: show all beams while they compete, not only the best."""
    load_chat: str | None = None
    """With --cli: go on with a saved chat (a JSON file)."""

    def problems(self) -> list[Problem]:
        if self.load_chat and not self.cli:
            return [("--load_chat", "goes with --cli; on the page there is a button for it")]
        return []


@dataclass
class PageOptions:
    """The page in the browser and who may see it."""

    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --auth."""
    port: int = 7860
    """Port to listen on; 0: any free one."""
    auth: str | None = None
    """USER:PASSWORD that the page asks for."""
    share: bool = False
    """Make a public link through gradio's servers. Needs --auth."""
    allowed_hosts: str = ""
    """Further names under which the page may be reached, with commas between them (a proxy's, a machine's)."""
    language: Literal["auto", "en", "zh"] = "auto"
    """Language of the page and of the messages here; auto: that of the browser, and of the system."""

    def problems(self) -> list[Problem]:
        found = address_problems(self.host, self.port) + list_problems("allowed_hosts", self.allowed_hosts, plain_host)
        if self.auth is not None and not all(self.auth.partition(":")):
            found.append(("--auth", "is not USER:PASSWORD"))
        if self.auth is None and self.host and not is_loopback(self.host):
            found.append(("--host", f"{self.host} can be reached from other machines; add --auth USER:PASSWORD"))
        if self.share and self.auth is None:
            found.append(("--share", "makes a link that anybody can open; add --auth USER:PASSWORD"))
        return found


@dataclass
class ServeOptions:
    """The OpenAI API and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own needs --api_key."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key: str | None = None
    """Key that clients must send; better in the environment variable ONECARD_API_KEY, which `ps` does not show."""
    allowed_hosts: str = ""
    """Further names under which the server may be reached, with commas between them (a proxy's, a machine's)."""
    allowed_origins: str = ""
    """Web pages that may call the API from a browser: scheme and host, with commas, such as https://example.org."""
    adapters_path: str | None = None
    """A folder of adapters for the same base; a request chooses one by its folder's name in `model`."""
    allow_adapter_loading: bool = False
    """Let clients add and take away adapters of --adapters_path: POST /v1/load_lora_adapter and unload_lora_adapter."""
    model_name: str | None = None
    """Name of the model in the API; by default the adapter's or the base's folder."""
    web: bool = False
    """Serve the chat page at / on the same port."""
    simple: bool = False
    """Answer GET /query/TEXT and POST / as well, {"text": ...} or {"instruction": ..., "input": ...}: for curl."""
    language: Literal["auto", "en", "zh"] = "auto"
    """Language of the page and of the messages here; auto: that of the browser, and of the system."""
    log_prompts: bool = False
    """Print prompts and answers. Off: only times, clients, sizes and outcomes are printed."""
    request_log: str | None = None
    """File for a JSON line per request: time, client, key's name, path, status, seconds, tokens; texts only with
    --log_prompts."""
    api_keys: str | None = None
    """File of keys, one NAME SHA256 a line: each client has its own, and is known by its name in log and /metrics."""
    new_key: str | None = None
    """Make a key under this name, add its hash to --api_keys, print the key once, and end."""

    @property
    def key(self) -> str | None:
        """The key that was typed, else the environment's, else None."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    def problems(self) -> list[Problem]:
        found = address_problems(self.host, self.port) + list_problems("allowed_hosts", self.allowed_hosts, plain_host)
        found += list_problems("allowed_origins", self.allowed_origins, plain_origin)
        if self.allow_adapter_loading and self.adapters_path is None:
            found.append(("--allow_adapter_loading", "needs --adapters_path, the folder that adapters are taken from"))
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isascii()):
            found.append(("--api_key", "must be plain ASCII letters, digits and signs, and not empty"))
        if self.new_key is not None and self.api_keys is None:
            found.append(("--api_keys", "is missing; --new_key adds to that file"))
        if self.key is None and self.api_keys is None and self.host and not is_loopback(self.host):
            found.append(("--host", f"{self.host} can be reached from other machines; set {API_KEY_VARIABLE}"))
        return found


@dataclass
class ServedDocumentsOptions:
    """Documents that the model may answer from."""

    documents: str | None = None
    """Folder of an index that `onecard documents add` made. Answers come from it under the model name `documents` of
    the API, by a switch on the page, and after /documents on in the terminal."""


@dataclass
class LimitOptions:
    """What one request may ask for."""

    max_queue: int = 64
    """Requests that may wait for their turn; more are sent away at once."""
    rate_limit: int = 0
    """Requests a minute that one key may send to the API, or one address where no key is asked for; 0: no limit."""
    max_request_seconds: float = 600.0
    """Longest time for one answer; it is then cut, as at --max_new_tokens. 0: no limit."""
    max_answer_tokens: int = 4096
    """Most new tokens that a request may ask for."""
    max_prompt_tokens: int = 0
    """Longest prompt in tokens; 0: what the model can read."""
    max_beams: int = 8
    """Most beams that a request may ask for."""
    max_choices: int = 8
    """Most answers (`n`) or prompts in one request."""
    max_embedding_inputs: int = 2048
    """Most texts in one request for embeddings."""
    max_body_bytes: int = 8_000_000
    """Largest request body in bytes; 2,048 texts of 1,000 Chinese characters fit."""
    prefix_cache_gib: float = 2.0
    """Memory in GiB for keys and values of the last conversations, so that a next turn reads only what is new; let go
    when memory runs out. 0: each turn reads its conversation from the beginning."""

    def problems(self) -> list[Problem]:
        return too_small(
            self, max_queue=0, rate_limit=0, max_request_seconds=0, max_prompt_tokens=0, prefix_cache_gib=0,
            max_answer_tokens=1, max_beams=1, max_choices=1, max_embedding_inputs=1, max_body_bytes=1000,
        )  # fmt: skip


@dataclass
class ParallelOptions:
    """How many answers are written at once."""

    max_parallel: int = 1
    """Most answers that are computed in one batch, which requests join and leave at any time; 1: one request after
    another. Requests with beams still take turns. In 16 bits and fewer a batch changes the last digits of the scores,
    and on a near-tie a token."""
    kv_cache_gib: float = 0.0
    """With --max_parallel: memory in GiB for the keys and values of the batch. 0: enough for 4,096 tokens of each
    answer, or half of what is free."""

    def problems(self) -> list[Problem]:
        found: list[Problem] = []
        if not 1 <= self.max_parallel <= MOST_PARALLEL:
            found.append(
                ("--max_parallel", f"{self.max_parallel} is not between 1 (one after another) and {MOST_PARALLEL}")
            )
        if not 0 <= self.kv_cache_gib < math.inf:
            found.append(("--kv_cache_gib", f"{self.kv_cache_gib} is no size; use 0 (as needed) or more"))
        if self.kv_cache_gib and self.max_parallel == 1:
            found.append(("--kv_cache_gib", "goes with --max_parallel 2 or more"))
        return found


@dataclass
class GenerateConfig:
    """Everything `onecard generate` needs; see the classes of its fields."""

    ask: AskOptions = field(default_factory=AskOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    page: PageOptions = field(default_factory=PageOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)

    def problems(self) -> list[Problem]:
        if self.ask.best_of > 1 and self.sampling.temperature == 0:
            return [("--temperature", f"0 gives {self.ask.best_of} equal answers for --best_of; use 0.8, for example")]
        return []


@dataclass
class ChatConfig:
    """Everything `onecard chat` needs; see the classes of its fields."""

    chat: ChatOptions = field(default_factory=ChatOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(
        default_factory=lambda: SamplingOptions(max_new_tokens=512, temperature=0.7, top_p=0.9)
    )
    page: PageOptions = field(default_factory=PageOptions)
    documents: ServedDocumentsOptions = field(default_factory=ServedDocumentsOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)


@dataclass
class ServeConfig:
    """Everything `onecard serve` needs. `sampling` holds for what a request leaves open; OpenAI's default is 1.0."""

    serve: ServeOptions = field(default_factory=ServeOptions)
    inference: InferenceOptions = field(default_factory=InferenceOptions)
    model: ModelOptions = field(default_factory=AnsweringModelOptions)
    sampling: SamplingOptions = field(default_factory=lambda: SamplingOptions(max_new_tokens=512, temperature=1.0))
    documents: ServedDocumentsOptions = field(default_factory=ServedDocumentsOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
