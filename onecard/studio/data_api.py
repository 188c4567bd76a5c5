"""Data: files brought here or named, what is in them and what would be learned of it, and better data made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from onecard.data.catalogue.entries import CatalogueEntry, entries
from onecard.data.catalogue.place import downloaded
from onecard.serve.http_error import ApiError, bad_request
from onecard.studio.context import StudioContext
from onecard.studio.folders import is_portable
from onecard.studio.http import StudioJson, in_language, json_route, language_of, route
from onecard.studio.named import NamedData, base_name, folder_entries, named_data
from onecard.studio.options import checked_options, words_of
from onecard.studio.uploads import remove_stale, save_upload
from onecard.studio.worker import Worker

READING = ("prompt_type", "dialogue", "train_on", "thinking", "columns", "txt_split")
FORMS = ("columns", "txt_split")  # what the programs that make new data read their sources by
PROGRAMS = {
    "clean": ("fix_encoding", "languages", "min_chars", "max_chars", "near_duplicates", "compare", "ngram",
              "evaluation_path", *FORMS),
    "split": ("validation_size", "near_duplicates", "seed", *FORMS),
}  # fmt: skip
RESULTS = {"clean": ("data.jsonl",), "split": ("train.jsonl", "validation.jsonl")}
# What browsers send for a foreign page without asking before. https://fetch.spec.whatwg.org/#cors-safelisted-request-header
FORM_TYPES = ("", "application/x-www-form-urlencoded", "multipart/form-data", "text/plain")
SOURCES = ("sources", "model_path")  # what a question about data must say
FOLDER = "data"  # of the output root: where they go


def routes(context: StudioContext, worker: Worker | None = None) -> list[BaseRoute]:
    """The paths of this part, all below /api/data. worker: for tests; else a process of its own."""
    view = DataView(context, worker or Worker())
    return [
        route("/api/data/files", view.files),
        route("/api/data/catalogue", view.catalogue),
        Route("/api/data/uploads/{name}", view.upload, methods=["PUT"]),
        json_route("/api/data/read", view.read, *SOURCES),
        json_route("/api/data/tokens", view.tokens, *SOURCES, "numbers"),
        json_route("/api/data/stop", view.stop),
        json_route("/api/data/make/{program}", view.make, "sources", "name", status=202),
    ]


class DataView:
    """The answers. Reading goes to a process of its own, which starts with the first question."""

    def __init__(self, context: StudioContext, worker: Worker) -> None:
        self._context, self._worker = context, worker
        remove_stale(context.upload_root)

    def files(self, request: Request) -> dict[str, Any]:
        """Folders and data files of ?folder=, or the roots."""
        context, folder = self._context, request.query_params.get("folder", "")
        if not folder:
            roots = [*context.readable, context.upload_root]
            entries = [{"name": str(root), "path": str(root), "bytes": None} for root in dict.fromkeys(roots)]
            return {"folder": "", "above": None, "entries": entries}
        path = context.safe_path(folder, [*context.readable, context.upload_root])
        if not path.is_dir():
            raise ApiError(404, f"{folder[:200]}: there is no such folder", code="no_such_path")
        try:
            listed = folder_entries(path, [*context.readable, context.upload_root])
        except OSError as reason:
            raise ApiError(403, f"{path}: {reason.strerror or reason}", code="cannot_read") from reason
        is_root = path in (*context.readable, context.upload_root)
        return {"folder": str(path), "above": "" if is_root else str(path.parent), "entries": listed}

    def catalogue(self, request: Request) -> dict[str, Any]:
        """The entries of the catalogue whose name or description holds ?q=."""
        words = request.query_params.get("q", "").lower().split()
        texts = ((each, f"{each.name} {each.about} {' '.join(each.language)}".lower()) for each in entries().values())
        return {"entries": [_entry(each) for each, text in texts if all(word in text for word in words)]}

    async def upload(self, request: Request) -> Response:
        """The body becomes a file; {path, name}."""
        context, kind = self._context, request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in FORM_TYPES:
            raise ApiError(415, "send the file as application/octet-stream", code="not_a_file")
        path = await save_upload(
            request.stream(), request.path_params["name"], context.upload_root, context.upload_max_bytes
        )
        return StudioJson({"path": str(path), "name": path.name, "bytes": path.stat().st_size}, 201)

    def read(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """What is in {sources, options, model_path}; `options` of the answer are the flags of a run on it."""
        asked = self._asked(body)
        found = self._worker.ask("read", asked.arguments, replaces=f"read {asked.page}")
        language = language_of(request)
        found["bad"] = [[*bad[:3], in_language(bad[3], language)] for bad in found["bad"]]
        found["unlearned"] = [[place, in_language(why, language)] for place, why in found["unlearned"]]
        for key in ("toy", "warnings"):
            found[key] = in_language(found[key], language)
        found["notes"] = [[in_language(text, language), count, first] for text, count, first in found["notes"]]
        return {**found, "options": asked.data.for_run, "remote": asked.data.remote}

    def tokens(self, request: Request, body: dict[str, Any]) -> Any:
        """Samples by {numbers}, token by token."""
        asked, numbers = self._asked(body), body["numbers"]
        if not isinstance(numbers, list) or not all(type(each) is int for each in numbers[:100]):
            raise bad_request("numbers must be a list of whole numbers", "numbers")
        arguments = {**asked.arguments, "numbers": numbers[:100]}
        return self._worker.ask("tokens", arguments, replaces=f"tokens {asked.page}")

    def stop(self, request: Request, body: dict[str, Any]) -> dict[str, bool]:
        """End a reading that takes too long."""
        self._worker.stop()
        return {"stopped": True}

    def make(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Start `onecard data clean` or `split` on {sources, options, name} as a job; its result is a new folder."""
        program = request.path_params["program"]
        if program not in PROGRAMS:
            raise ApiError(404, f"{program[:50]!r} is none of {', '.join(PROGRAMS)}", code="no_such_program")
        options = checked_options(body.get("options", {}), PROGRAMS[program])
        data = named_data(self._context, body["sources"], {})
        paths = data.for_run.get("data_path")
        if paths is None:
            text = f"{program} reads files as they are: name files or folders, each once and whole"
            raise bad_request(text, "sources", "not_files")
        if evaluation := options.get("evaluation_path"):
            context = self._context
            options["evaluation_path"] = str(context.safe_path(str(evaluation), context.readable))
        target = self._target(str(body["name"]))
        words = ["data", program, *words_of({"data_path": paths, "output_path": str(target), **options})]
        results = [str(target / name) for name in RESULTS[program]]
        job = self._context.jobs.start(f"data-{program}", words, title=target.name, about={"results": results})
        return {"job": job, "results": results}

    def _target(self, name: str) -> Path:
        """A new folder in the output root. Raises ApiError for a name that is none, or that is taken (409)."""
        is_plain = name.strip("._ ") == name and 0 < len(name) <= 80 and all(c.isalnum() or c in "-_." for c in name)
        if not is_plain or not is_portable(name):
            raise bad_request(f"{name[:80]!r} is no name of a folder: use letters, digits, - and _", "name", "bad_name")
        target = self._context.output_root / FOLDER / name
        if target.exists():
            raise ApiError(409, f"{target} is there already; nothing is overwritten, give another name",
                           param="name", code="name_taken")  # fmt: skip
        return target

    def _asked(self, body: dict[str, Any]) -> DataQuestion:
        reading = checked_options(body.get("options", {}), READING)
        data = named_data(self._context, body["sources"], reading)
        base = base_name(self._context, body["model_path"])
        return DataQuestion(data, {"options": data.for_page, "model_path": base}, str(body.get("page", ""))[:40])


class DataQuestion(NamedTuple):
    """A checked question about data: what it names, what the worker is asked, and the page it is from."""

    data: NamedData
    arguments: dict[str, Any]
    page: str


def _entry(entry: CatalogueEntry) -> dict[str, Any]:
    return {
        "name": entry.name, "about": entry.about, "rows": entry.rows, "language": list(entry.language),
        "licence": entry.licence, "home": entry.home, "here": downloaded(entry.name) is not None,
    }  # fmt: skip
