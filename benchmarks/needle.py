#!/usr/bin/env python
"""Whether a model finds a number in a long text, with and without --rope_scaling, before and after a short training.

    python benchmarks/needle.py --model_path MODEL [--scalings none,yarn:4] [--steps 6]

A text out of this project's pages names numbers of persons; each is asked for, and counts where every token of it is
the likeliest one. lengths: texts of so many tokens. distances: a text of --text_tokens whose question stands so many
positions further on: a minute of a CPU instead of an hour, but without the tokens that would stand between, so that
it is a harder question than a text of that length. Training is the recipe, with rows of other
persons and numbers in texts of at most --cutoff_len tokens: none of its rows is long.

MODEL is one that can find a number at all, such as SmolLM2-135M-Instruct, made for 8,192 positions, which
tests/real/conftest.py unpacks from requirements-real.txt; sample/tiny-llama finds none. Writes
benchmarks/results/needle.json.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, machine, say_table, write_result  # noqa: E402
from onecard.config.base_model import ModelOptions  # noqa: E402
from onecard.config.parsing import comma_list, missing, parse  # noqa: E402
from onecard.config.problems import Problem  # noqa: E402
from onecard.console import run_main, say  # noqa: E402

ASKED = ["Ada", "Ben", "Clara", "Dan", "Eva", "Finn", "Greta", "Hugo", "Iris", "Jonas", "Kara", "Leo"]
LEARNED = ["Mira", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uwe", "Vera", "Wim", "Xenia", "Yann", "Zoe"]
N_NEEDLES = 10  # in each text, so that a number can be mistaken for another one
N_ROWS = 24  # to train on


@dataclass
class NeedleOptions:
    """What is asked, and how."""

    model_path: str = ""
    """The model: a directory."""
    name: str = ""
    """What the result calls it; empty: the directory's name."""
    scalings: str = "none,yarn:4"
    """Values of --rope_scaling, with commas between them; the first and the last are trained, too."""
    lengths: str = "1000,2000"
    """Tokens of the texts that are read whole."""
    distances: str = "0,4000,7000,9000,12000,16000,24000"
    """Positions between a short text and its question."""
    text_tokens: int = 800
    """Tokens of that short text."""
    texts: int = 1
    """Texts for each number; each has ten persons."""
    steps: int = 6
    """Steps of training; 0 leaves it out."""
    cutoff_len: int = 384
    """Tokens of a row that is trained on."""
    output: str = str(RESULTS / "needle.json")
    """Where the result is written."""
    debug: bool = False
    """Show tracebacks."""

    def problems(self) -> list[Problem]:
        return missing(self, "model_path")


class Haystack(NamedTuple):
    """A text, and the persons and numbers that it names."""

    text: str
    numbers: dict[str, str]


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the result."""
    options = parse(NeedleOptions, argv, description=__doc__ or "")
    scalings = comma_list(options.scalings)
    found: dict[str, dict[str, Any]] = {}
    told = {
        name: value for name, value in asdict(options).items() if name not in ("output", "debug", "model_path", "name")
    }
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        # What is trained, the last scaling and then the first one, which says what training alone gives.
        runs = dict.fromkeys((scalings[-1], scalings[0])) if options.steps else {}
        for number, scaling in enumerate([*scalings, *runs]):
            is_trained = number >= len(scalings)
            run = str(trained(options, scaling, Path(folder) / scaling.replace(":", "-"))) if is_trained else None
            found[f"{scaling}, trained" if is_trained else scaling] = measured(options, scaling, run)
            # Each time: on a small machine the whole takes an hour.
            result = {"model": options.name or Path(options.model_path).name, "options": told, "found": found}
            write_result(options.output, result | {"machine": machine("cpu")})
    first = next(iter(found.values()))
    for kind in ("lengths", "distances"):
        rows = [[each, *values[kind].values()] for each, values in found.items()]
        say_table([f"of {first['asked']}, by {kind}", *map(str, first[kind])], rows)


@cache
def paragraphs() -> tuple[str, ...]:
    """Plain paragraphs of this project's pages."""
    found = []
    for page in sorted((ROOT / "docs" / "en").glob("*.md")):
        for part in page.read_text(encoding="utf-8").split("\n\n"):
            text = " ".join(part.split())
            if len(text) > 80 and re.fullmatch(r"[A-Z][^|`]*", text):
                found.append(text)
    return tuple(found)


def haystack(tokenizer: Any, n_tokens: int, seed: int, names: Sequence[str], n_needles: int) -> Haystack:
    """Paragraphs in another order for each seed, with as many needles between them, of so many tokens at most."""
    draw = random.Random(f"{seed} {n_tokens}")
    numbers = {name: str(draw.randint(1000, 9999)) for name in draw.sample(list(names), n_needles)}
    needles = [needle(name, number) for name, number in numbers.items()]
    room = n_tokens - sum(len(tokenizer(f"{each}\n\n")["input_ids"]) for each in needles)
    parts: list[str] = []
    while room > 0:
        pool = [*paragraphs()]
        draw.shuffle(pool)
        for text in pool:
            room -= len(tokenizer(f"{text}\n\n")["input_ids"])
            if room <= 0:
                break
            parts.append(text)
    for number in range(n_needles - 1, -1, -1):
        parts.insert(round(len(parts) * (number + 0.5) / n_needles), needles[number])
    return Haystack("\n\n".join(parts), numbers)


def needle(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def question(name: str) -> str:
    return f"What is the secret number of {name}?"


def measured(options: NeedleOptions, scaling: str, run: str | None) -> dict[str, Any]:
    """Numbers that are found, by length and by distance."""
    from onecard.inference.load import load_bundle

    began = time.process_time()
    model_options = ModelOptions(
        options.model_path, bits=32, device="cpu", dtype="fp32", rope_scaling=scaling, gradient_checkpointing=False
    )
    bundle, _ = load_bundle(model_options, run, "auto")
    lengths = [int(text) for text in comma_list(options.lengths)]
    distances = [int(text) for text in comma_list(options.distances)]
    by_length = {n: sum(right(bundle, haystack(bundle.tokenizer, n, seed, ASKED, N_NEEDLES), [0])[0]
                        for seed in range(options.texts)) for n in lengths}  # fmt: skip
    by_distance = dict.fromkeys(distances, 0)
    for seed in range(options.texts):
        text = haystack(bundle.tokenizer, options.text_tokens, seed, ASKED, N_NEEDLES)
        for distance, n_right in right(bundle, text, distances).items():
            by_distance[distance] += n_right
    found = {"asked": options.texts * N_NEEDLES, "lengths": by_length, "distances": by_distance,
             "cpu_s": round(time.process_time() - began)}  # fmt: skip
    say(f"{scaling}{', trained' if run else ''}: {found}")
    return found


def right(bundle: Any, hay: Haystack, distances: Sequence[int]) -> dict[int, int]:
    """How many numbers are found, for each distance between the text, which is read once, and the question."""
    import torch

    tokenizer, model, mark = bundle.tokenizer, bundle.model, "\0"
    turns = [{"role": "user", "content": f"{hay.text}\n\n{mark}"}]
    before, after = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).split(mark)
    text_ids = tokenizer(before, add_special_tokens=False, return_tensors="pt")["input_ids"]
    n_read, found = text_ids.shape[1], dict.fromkeys(distances, 0)
    with torch.inference_mode():
        cache = model(text_ids, use_cache=True, logits_to_keep=1).past_key_values
        for name, number in hay.numbers.items():
            whole = f"{question(name)}{after}{needle(name, number)}"
            begun = whole.removesuffix(f" {number}.")
            n_known = len(tokenizer(begun, add_special_tokens=False)["input_ids"])
            ids = tokenizer(whole.removesuffix("."), add_special_tokens=False, return_tensors="pt")["input_ids"]
            for distance in distances:
                positions = torch.arange(n_read + distance, n_read + distance + ids.shape[1])[None]
                logits = model(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits[0]
                cache.crop(-ids.shape[1])
                found[distance] += bool((logits[n_known - 1 : -1].argmax(-1) == ids[0, n_known:]).all())
    return found


def trained(options: NeedleOptions, scaling: str, folder: Path) -> Path:
    """A run on short texts with other names, under a scaling."""
    from onecard.model.load import load_tokenizer
    from onecard.programs import finetune

    tokenizer, rows = load_tokenizer(options.model_path), []
    for number in range(N_ROWS):
        hay = haystack(tokenizer, options.cutoff_len - 100, 1000 + number, LEARNED, 3)
        name = next(iter(hay.numbers))
        rows.append({"instruction": f"{hay.text}\n\n{question(name)}", "output": needle(name, hay.numbers[name])})
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    finetune.main([
        "--model_path", options.model_path, "--rope_scaling", scaling, "--data_path", str(folder / "rows.json"),
        "--output_path", str(folder / "run"), "--cache_path", str(folder / "cache"), "--bits", "32", "--dtype", "fp32",
        "--device", "cpu", "--max_steps", str(options.steps), "--total_batch", "4", "--cutoff_len",
        str(options.cutoff_len), "--test_size", "0", "--learning_rate", "5e-4", "--server_check", "false",
        "--measure_forgetting", "false", "--compare_with_base", "false",
    ])  # fmt: skip
    return folder / "run"


if __name__ == "__main__":
    sys.exit(run_main(main))
