"""An engine without a model, shaped like `onecard.inference.engine.Engine`: what it says, when and how it fails is set.

For what a real model cannot be made to do on demand: a script in its answer, a full queue, no memory, a slow answer.
The words of the question choose what happens; see `Script`. Importable in a process of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from onecard.config.inference import LimitOptions
from onecard.data.messages import Turn
from onecard.inference.call import Chunk, Usage
from onecard.inference.engine import GenerationRequest, OutOfMemory
from onecard.inference.queue import QueueFull, RequestQueue

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n"
    "![beacon](http://evil.example/pixel.png) <b>bold?</b> <iframe src='http://evil.example/'></iframe>\n\n"
    "[click](javascript:window.hacked=3) &lt;entity&gt; $$x^2$$\n\n"
    "```html\n<script>window.hacked = 4</script>\n```\n"
)
FORMULAS = (
    r"It is \(x = \frac{-b \pm \sqrt{b^2}}{2a}\) and costs $5 and $6."
    "\n\n"
    r"\[ \begin{pmatrix} a<b & 0 \\[2pt] c & d \end{pmatrix} \]"
    "\n\n"
    r"$$\text{<img src=x onerror=hacked()>} \, x^2$$"
    "\n\n"
    "```\n\\(y\\)\n```\n\n"
    r"Begun: \[ \frac{1}{3"
)
TABLE = (
    "| Name | Description of the thing | Price in euros | Availability | Comment |\n|---|---|---|---|---|\n"
    "| Apple | A round red fruit | 1.20 | in stock everywhere | very tasty indeed |\n"
)


@dataclass
class Script:
    """What the fake answers. A question with one of the words below gets what stands there; else `say`, word by word.

    delay_seconds: between two words of the long answer; the others' words come three times as fast.
    hostile: HTML and images. long: 400 words. memory: OutOfMemory at the start. half: OutOfMemory in the middle.
    broken: an error nobody foresaw. code: a code block. formula: TeX. table: a wide one.
    """

    say: str = "The quick brown fox jumps over the lazy dog and then goes home to sleep. 你好，世界！"
    delay_seconds: float = 0.03


@dataclass
class FakeEngine:
    """One answer at a time, with a real queue in front. `ended` and `asked` are for the test to look at.

    gate: where it is set, each word waits for a release of it, however busy the machine is.
    """

    script: Script = field(default_factory=Script)
    limits: LimitOptions = field(default_factory=lambda: LimitOptions(max_queue=2))
    names: tuple[str, ...] = ("tiny-llama", "pirate")
    context_limit: int = 2048

    def __post_init__(self) -> None:
        self.queue = RequestQueue(self.limits.max_queue)
        self.asked: list[GenerationRequest] = []
        self.ended: list[str] = []
        self.refused: list[GenerationRequest] = []
        self.gate: threading.Semaphore | None = None

    def has(self, adapter: str) -> bool:
        return adapter == "" or adapter in self.names

    def template(self, adapter: str = "", prompt_type: str = "") -> SimpleNamespace:
        own = ("vicuna-chat", "{{ enable_thinking }}") if adapter == "pirate" else ("alpaca", "")
        name, jinja = (prompt_type, "") if prompt_type else own
        return SimpleNamespace(name=name, known_name=name, jinja=jinja)

    def count_tokens(self, turns: Sequence[Turn], adapter: str = "", prompt_type: str = "") -> int:
        return sum(4 + len(turn.content.split()) for turn in turns)

    def stream(self, request: GenerationRequest, cancel: threading.Event | None = None) -> Iterator[list[Chunk]]:
        cancel = cancel or threading.Event()
        self.asked.append(request)
        try:
            ticket = self.queue.join()
        except QueueFull:
            self.refused.append(request)
            raise
        ending = "closed"
        try:
            for place in self.queue.wait(ticket, cancel):
                yield [Chunk(place=place)]
            for chunk in self._answer(request, cancel):
                ending = chunk.finish_reason or ending
                yield [chunk]
        finally:
            self.queue.leave(ticket, 1.0)
            self.ended.append(ending)

    def _answer(self, request: GenerationRequest, cancel: threading.Event) -> Iterator[Chunk]:
        question = request.turns[-1].content.lower()
        prompt = self.count_tokens(request.turns)
        if "memory" in question:
            raise OutOfMemory("does not fit")
        if "broken" in question:
            raise ValueError("nobody foresaw this")
        text = self._text(question, request)
        delay = self.script.delay_seconds / (1 if "long" in question else 3)
        pieces = text.split(" ")[: request.sampling.max_new_tokens]
        shown = ""
        for number in range(len(pieces)):
            if cancel.is_set():
                yield Chunk(shown, self._beams(request, shown), "cancelled", Usage(prompt, number))
                return
            if "half" in question and number == 4:
                raise OutOfMemory("does not fit any more")
            shown = " ".join(pieces[: number + 1])
            yield Chunk(shown, self._beams(request, shown), None, Usage(prompt, number + 1))
            if self.gate is not None:
                self.gate.acquire()
            else:
                time.sleep(delay)
        reason = "length" if len(pieces) < len(text.split(" ")) else "stop"
        yield Chunk(shown, self._beams(request, shown), reason, Usage(prompt, len(pieces) + 1))

    def _text(self, question: str, request: GenerationRequest) -> str:
        if "hostile" in question:
            return HOSTILE
        if "code" in question:
            return "Here is code:\n\n```python\nif a < b:\n\tprint('<b>')\n```\n\nand `<i>` in a line, a < b & c."
        if "formula" in question:
            return FORMULAS
        if "table" in question:
            return TABLE
        if "long" in question:
            return " ".join(f"word{k}" for k in range(400))
        if "who" in question:
            return f"I am {request.adapter or self.names[0]}, told: {request.turns[0].content[:40]}"
        again = f" (attempt {request.number})" if request.number else ""
        return self.script.say + again

    @staticmethod
    def _beams(request: GenerationRequest, text: str) -> tuple[str, ...]:
        n = request.sampling.num_beams
        return tuple(f"{text} [{k}]" if k else text for k in range(n)) if request.show_beams and n > 1 else ()

    def close(self) -> None:
        pass
