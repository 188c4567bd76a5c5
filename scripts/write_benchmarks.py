"""Writes the tables of what cards did into the pages of docs, from the files that `prove_gpu.sh` leaves.

    python scripts/write_benchmarks.py            write them
    python scripts/write_benchmarks.py --check    end with status 1 where they are out of date

A step without a file, and a row that was not run, stand there as such. Rehearsals and simulated cards are left out:
their numbers are no measurements.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    # Started as a script, Python sees only the script's own folder.
    sys.path.insert(0, str(ROOT))

from benchmarks.proof_steps import STEPS  # noqa: E402

PAGES = tuple(ROOT / "docs" / name for name in ("benchmarks.md", "benchmarks_zh.md"))
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
FIRST, LAST = "<!-- cards: written by scripts/write_benchmarks.py -->\n", "<!-- end of the cards -->\n"
GIB, MIB = 2**30, 2**20


def runs(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Each run on a real card, oldest first: its machine, and its files by the name of their step."""
    for place in sorted((path for path in folder.glob("*") if path.is_dir()), key=lambda path: path.name):
        files = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(place.glob("*.json"))]
        machines = [one["machine"] for one in files if one["machine"]]
        if machines and not machines[0]["is_simulated"] and not any(one["rehearsal"] for one in files):
            yield machines[0], {one["step"]: one for one in files}


def tables(folder: Path) -> str:
    """All that stands between the two marks."""
    found = sorted(runs(folder), key=lambda run: run[0]["date"])
    if not found:
        return "No card has run it yet.\n\n" + overview({})
    return "\n".join(part for machine, files in found for part in card(machine, files))


def card(machine: dict[str, Any], files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """One run: its machine, how each step ended, and the tables of those with numbers."""
    any_file = next(iter(files.values()))
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    turing = ", held to what a Turing card can" if any_file["pretend_turing"] else ""
    yield (
        f"### {machine['gpu']}, {machine['date']}\n\n"
        f"{machine['gpu_gib']} GiB, driver {machine['driver']}, {machine['cores']} cores, "
        f"{machine['ram_gib']} GiB of RAM, {packages}; {any_file['minutes']:g} minutes{turing}; "
        f"revision {any_file['git_revision'][:10] or 'unknown'}.\n"
    )
    yield overview(files)
    for step in STEPS:
        numbers = files.get(step.name, {}).get("numbers")
        if numbers and step.name in TABLES:
            yield f"{step.title[0].upper()}{step.title[1:]}:\n"
            yield TABLES[step.name](numbers)


def overview(files: dict[str, dict[str, Any]]) -> str:
    """How each step ended."""
    rows = []
    for step in STEPS:
        one = files.get(step.name, {"status": "not run", "reason": "", "seconds": None})
        status = f"**{one['status']}**" + (f": {one['reason']}" if one["reason"] else "")
        rows.append([step.title, status, one["seconds"]])
    return table(["step", "how it ended", "seconds"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; what was not measured is empty."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell(each) for each in line) + " |\n" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def doctor_table(numbers: dict[str, Any]) -> str:
    """Only what is not well."""
    bad = [[one["name"], one["state"], one["value"]] for one in numbers["findings"] if one["state"] != "ok"]
    return table(["found", "state", "what"], bad or [["everything", "ok", f"{numbers['ok']} checks"]])


def tests_table(numbers: dict[str, Any]) -> str:
    counts = ["passed", "failed", "error", "skipped"]
    return table([*counts, "notes"], [[*(numbers[name] for name in counts), "; ".join(numbers["notes"])]])


def plan_table(numbers: dict[str, Any]) -> str:
    header = ["model", "bits", "rows x length", "planned, GiB", "measured", "ratio", "reserved", "ratio", "not run"]
    rows = [
        [row["model"], row["setup"]["bits"], f"{row['setup']['rows']} x {row['setup']['length']:,}",
         gib(row.get("planned_bytes")), gib(row.get("training_bytes")), row.get("ratio"),
         gib(row.get("reserved_bytes")), row.get("reserved_ratio"), row.get("not_run") or row.get("failed")]
        for row in numbers["rows"]
    ]  # fmt: skip
    more = numbers["asked"] - len(rows)
    if more:
        rows.append([f"{more} more", *[None] * 7, "the time was used up"])
    constants = {**numbers["constants"]}
    measured = [f"CUDA context {gib(constants.pop('context_bytes'))} GiB"]
    measured += [f"{name.replace('_', ' ')} {value}" for name, value in constants.items()]
    return f"{table(header, rows)}\nMeasured beside the tensors: {', '.join(measured)}.\n"


def context_table(numbers: dict[str, Any]) -> str:
    header = ["card, GiB", "planned tokens", "measured", "reserved, GiB", "tokens/s", "Unsloth, published",
              "plain Hugging Face, published", "not run"]  # fmt: skip
    names = ("gib", "planned", "measured", "reserved_gib", "tokens_per_s", "unsloth", "plain", "not_run")
    return table(header, [[row[name] for name in names] for row in numbers["rows"]])


def ladder_table(numbers: dict[str, Any]) -> str:
    given = numbers["options"]
    rows = [
        [row["technique"], "out of memory" if row["out_of_memory"] else mib(row["measured"]), mib(row["difference"]),
         mib(row["planned"]), mib(row["reserved"])]
        for row in numbers["rows"]
    ]  # fmt: skip
    told = f"{given['model_path']}, {given['rows']} x {given['length']:,} tokens, {given['bits']} bits, MiB:\n\n"
    return told + table(["technique", "peak", "difference", "planned", "reserved"], rows)


def speed_table(numbers: dict[str, Any]) -> str:
    names = ("name", "tokens_per_s", "ratio", "padding", "share")
    header = ["", "tokens/s", "ratio", "tokens with padding", "share of matrix products' rate"]
    rows = [[row[name] for name in names] for row in numbers["rows"]]
    return f"{numbers['options']['model_path']}, {numbers['dtype']}:\n\n" + table(header, rows)


def trl_table(numbers: dict[str, Any]) -> str:
    told = f"{numbers['options']['model_path']}, TRL {numbers['trl']}:\n\n"
    return told + table(
        ["tokens/s", "tokens", "seconds"], [[numbers["tokens_per_s"], numbers["tokens"], numbers["seconds"]]]
    )


def serving_table(numbers: dict[str, Any]) -> str:
    names = ("clients", "tokens_per_s", "first_token_median", "first_token_worst", "not_run")
    header = ["clients", "tokens/s", "first token, s, median", "worst", "not run"]
    told = f"{numbers['options']['model_path']}, {numbers['options']['bits']} bits:\n\n"
    return told + table(header, [[row.get(name) for name in names] for row in numbers["rows"]])


def gptq_table(numbers: dict[str, Any]) -> str:
    names = ("kernels", "relative_difference", "same_token", "tokens_per_s")
    return table([name.replace("_", " ") for name in names], [[numbers[name] for name in names]])


def kill_table(numbers: dict[str, Any]) -> str:
    names = ("steps", "killed_after", "is_bitwise", "largest_difference")
    return table(["steps", "killed after", "the same bit for bit", "largest difference"], [[numbers[n] for n in names]])


def gib(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else f"{n_bytes / GIB:.2f}"


def mib(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else f"{n_bytes / MIB:,.1f}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "doctor": doctor_table, "gpu_tests": tests_table, "plan": plan_table, "context": context_table,
    "ladder": ladder_table, "speed": speed_table, "trl": trl_table, "serving": serving_table, "gptq": gptq_table,
    "kill_and_resume": kill_table,
}  # fmt: skip


def written(page: Path) -> str:
    """The whole page with the tables as they are now. Raises ValueError where it has lost its two marks."""
    before, rest = page.read_text(encoding="utf-8").split(FIRST)
    after = rest.split(LAST)[1]
    return f"{before}{FIRST}\n{tables(RESULTS)}\n{LAST}{after}"


def main() -> int:
    texts = {page: written(page) for page in PAGES}
    if "--check" in sys.argv[1:]:
        return int(any(text != page.read_text(encoding="utf-8") for page, text in texts.items()))
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
