"""verify-server against real servers of ours, each wrong in one way: it must name that way, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config.inference import LimitOptions, ServeOptions
from onecard.console import run_main
from onecard.errors import OneCardError
from onecard.programs import verify_server as program
from onecard.serve.verify import client as client_module
from onecard.serve.verify.check_file import CHECK_NAME, read_check
from onecard.serve.verify.reading import AnswerReading, distance, divergence, merged, plain_token, same_text
from tests.serve.api.serving import Running, serving
from tests.serve.verify.conftest import BASE

Found = tuple[int, dict[str, Any]]


@pytest.fixture
def verified(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[..., Found]:
    """The exit code and the JSON of a comparison."""

    def ask(url: str, *words: str, run: Path | None = None) -> Found:
        run = run or request.getfixturevalue("checked_run")
        capsys.readouterr()
        code = run_main(lambda: program.main([url, "--run", str(run), "--json", *words]), debug=False)
        said = capsys.readouterr()
        assert "{" in said.out, said.err
        return code, json.loads(said.out[said.out.index("{") :])

    return ask


def causes(found: dict[str, Any]) -> dict[str, str]:
    return {question: found[question]["cause"] for question in ("model", "template", "stop")}


class Disguised:
    """A server of ours as others are: without some paths, without log-probabilities, with messages changed."""

    def __init__(self, app: Any, *, hidden: tuple[str, ...] = (), logprobs: bool = True,
                 change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:  # fmt: skip
        self.app, self.hidden, self.logprobs, self.change = app, hidden, logprobs, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.app, name)

    def stop_answers(self) -> None:
        """The server behind it goes on."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        if scope["path"] in self.hidden or (not self.logprobs and "logprobs" in asked):
            return await JSONResponse({"error": "this is not supported"}, 500)(scope, receive, send)
        self.change(asked)
        changed = json.dumps(asked).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        given = iter([{"type": "http.request", "body": changed, "more_body": False}])

        async def changed_body() -> Any:
            return next(given, None) or await receive()

        scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
        return await self.app(scope, changed_body, send)


@pytest.fixture
def disguise(serve_run: Callable[..., Running]) -> Iterator[Callable[..., str]]:
    with ExitStack() as stack:

        def start(right: Running, **ways: Any) -> str:
            running = Running(Disguised(right.app, **ways))  # type: ignore[arg-type]
            stack.callback(running.stop)
            return running.url

        yield start


@pytest.fixture(scope="module")
def right(serve_run: Callable[..., Running]) -> Running:
    return serve_run()


def test_a_server_of_a_run_is_the_same_and_its_base_is_not(
    run_dir: Path, lively_base: Path, serve_run: Callable[..., Running], verified: Callable[..., Found], tmp_path: Path
) -> None:
    """A run from before there were checks; its adapter is a random one."""
    run = shutil.copytree(run_dir, tmp_path / "my-run")
    right = serve_run(run, model_path=lively_base)
    code, found = verified(right.url, "--device", "cpu", run=run)
    assert (code, found["model"]["same"], found["template"]["same"]) == (0, "yes", "yes")
    assert found["kl"] < 1e-3 < 0.01 < found["kl_to_base"] and found["kl_chat_to_raw"] < 1e-3
    base = serve_run(None, model_path=lively_base, prompt_type="alpaca")
    code, found = verified(base.url, run=run)
    assert (code, causes(found)["model"], causes(found)["template"]) == (2, "adapter not applied", "wrong template")
    assert "template alpaca" in found["template"]["words"]


@pytest.mark.slow
def test_the_check_of_a_run_is_small_and_of_held_out_rows(checked_run: Path) -> None:
    check = read_check(checked_run)
    assert check is not None and len(check.prompts) == 4
    assert (checked_run / CHECK_NAME).stat().st_size < 60_000
    assert check.about["template"] == "alpaca" and check.about["stop"][0] == "</s>" and check.about["bits"] == 32
    tokenizer = AutoTokenizer.from_pretrained(checked_run)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    systems = 0
    for one in check.prompts:
        systems += one.messages[0]["role"] == "system"
        assert one.messages[-1]["content"].splitlines()[0] in tokenizer.decode(one.ids)
        with torch.no_grad():
            logprobs = base(torch.tensor([one.ids])).logits[0, -1].log_softmax(-1)
        assert one.base is not None and one.base.tops
        assert max(one.base.tops[0].values()) == pytest.approx(float(logprobs.max()), abs=1e-3)
        assert one.base.text != one.answer.text
    assert systems == 1


@pytest.mark.slow
def test_the_same(right: Running, verified: Callable[..., Found], capsys: pytest.CaptureFixture[str],
                  checked_run: Path) -> None:  # fmt: skip
    code, found = verified(right.url)
    assert (code, found["same"], found["model_name"]) == (0, "yes", "served")
    assert found["kl"] < 1e-4 and found["kl_to_base"] > 1 and found["kl_chat_to_raw"] < 1e-4
    assert set(causes(found).values()) == {""} and found["stop"]["same"] == "yes"
    program.main([f"{right.url}/v1/", "--run", str(checked_run), "--model", "served"])
    said = capsys.readouterr().out
    assert "same model: yes" in said and "same template: yes" in said and "same stop: yes" in said


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(), ("/tokenize",)], ids=["told by /tokenize", "proven by replaying"])
@pytest.mark.parametrize(
    ("template", "cause", "words"),
    [("chatml", "wrong template", "template chatml"), ("double", "double BOS", "<s> stands twice"),
     ("mine", "wrong template", "chat_template.jinja of the run")],
)  # fmt: skip
def test_a_wrong_prompt_is_named(
    template: str, cause: str, words: str, hidden: tuple[str, ...], serve_run: Callable[..., Running],
    verified: Callable[..., Found], disguise: Callable[..., str], checked_run: Path, tmp_path: Path,
) -> None:  # fmt: skip
    own = (checked_run / "chat_template.jinja").read_text(encoding="utf-8")
    changed = {"double": own.replace("{{- bos_token -}}", "{{- bos_token + bos_token -}}", 1),
               "mine": own.replace("{{- bos_token -}}", "{{- bos_token + 'Dear model! ' -}}", 1)}  # fmt: skip
    for name, jinja in changed.items():
        assert jinja != own
        (tmp_path / f"{name}.jinja").write_text(jinja, encoding="utf-8")
    wrong = serve_run(prompt_type="chatml" if template == "chatml" else str(tmp_path / f"{template}.jinja"))
    code, found = verified(disguise(wrong, hidden=hidden))
    assert (code, found["same"], found["model"]["same"]) == (2, "no", "yes")
    assert causes(found)["template"] == cause and words in found["template"]["words"]


@pytest.mark.slow
def test_a_system_text_that_is_left_out_is_named(
    right: Running, disguise: Callable[..., str], verified: Callable[..., Found]
) -> None:
    def drop(asked: dict[str, Any]) -> None:
        if "messages" in asked:
            asked["messages"] = [one for one in asked["messages"] if one["role"] != "system"]

    code, found = verified(disguise(right, hidden=("/tokenize",), change=drop))
    assert (code, causes(found)["template"], found["model"]["same"]) == (2, "missing system text", "yes")
    assert "as its chats are" in found["template"]["words"]


@pytest.mark.slow
def test_the_base_without_its_adapter_is_named(serve_run: Callable[..., Running], verified: Callable[..., Found],
                                               disguise: Callable[..., str], checked_run: Path) -> None:  # fmt: skip
    base = serve_run(None, prompt_type=str(checked_run / "chat_template.jinja"))
    for url in (base.url, disguise(base, hidden=("/tokenize", "/v1/completions")), disguise(base, logprobs=False)):
        code, found = verified(url)
        assert (code, causes(found)["model"]) == (2, "adapter not applied")
        assert found["template"]["same"] != "no" and found["stop"]["same"] == "unknown"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "cause"), [(127, ""), (7, ""), (3, "quantisation noise"), (0, "different model")]
)  # fmt: skip
def test_what_quantising_has_lost_is_told_from_another_model(
    levels: int, cause: str, serve_run: Callable[..., Running], verified: Callable[..., Found], tmp_path: Path
) -> None:
    """Weights of the base rounded in groups of 32, to 8, 4 and 3 bits, and weights that are other ones."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "head" not in name:
                groups = weight.reshape(-1, 32)
                step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / max(levels, 1)
                rounded = (groups / step).round() * step if levels else groups.flip(0, 1)
                weight.copy_(rounded.reshape(weight.shape))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    code, found = verified(serve_run(model_path=tmp_path).url)
    assert (code, causes(found)["model"]) == (2 if cause else 0, cause)
    assert found["template"]["same"] == "yes"


@pytest.mark.slow
def test_a_server_that_writes_on_is_named(right: Running, disguise: Callable[..., str], verified: Callable[..., Found],
                                          ) -> None:  # fmt: skip
    def no_end(asked: dict[str, Any]) -> None:
        if "messages" in asked and "max_tokens" in asked:
            asked["min_tokens"] = asked["max_tokens"]

    code, found = verified(disguise(right, change=no_end))
    assert (code, found["model"]["same"], causes(found)["stop"]) == (2, "yes", "stop missing")


@pytest.mark.slow
def test_servers_that_tell_less(right: Running, disguise: Callable[..., str], verified: Callable[..., Found]) -> None:
    code, found = verified(disguise(right, hidden=("/tokenize",), logprobs=False))
    assert (code, found["same"]) == (0, "yes") and "no log-probabilities" in found["notes"][0]
    code, found = verified(disguise(right, hidden=("/tokenize", "/v1/completions")))
    assert (code, found["same"]) == (0, "yes")
    code, found = verified(disguise(right, hidden=("/tokenize", "/v1/chat/completions")))
    assert (code, found["model"]["same"], found["template"]["same"]) == (3, "yes", "unknown")

    def texts_only(asked: dict[str, Any]) -> None:
        if isinstance(asked.get("prompt"), list):
            asked["prompt"] = {"token ids": "are not taken"}

    code, found = verified(disguise(right, hidden=("/tokenize",), change=texts_only))
    assert (code, found["same"]) == (0, "yes") and found["kl_chat_to_raw"] is not None


@pytest.mark.slow
def test_a_run_without_a_check_gets_one(right: Running, verified: Callable[..., Found], checked_run: Path,
                                        tmp_path: Path) -> None:  # fmt: skip

    run = shutil.copytree(checked_run, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*", CHECK_NAME))
    code, found = verified(right.url, "--device", "cpu", run=run)
    assert (code, found["same"]) == (0, "yes")
    assert read_check(run) is not None
    (run / CHECK_NAME).write_text("{", encoding="utf-8")
    with pytest.raises(OneCardError, match="delete it"):
        read_check(run)
    (run / CHECK_NAME).write_text('{"version": 99}', encoding="utf-8")
    assert read_check(run) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response", "says"),
    [(HTMLResponse("<!doctype html><p>Hi"), "web page"), (JSONResponse({"error": "no"}, 401), "--api_key"),
     (Response("", 307, {"location": "/elsewhere"}), "/elsewhere"), (Response("x{"), "no JSON"),
     (JSONResponse({"data": []}), "names no model"), (JSONResponse({"error": "warming up"}, 503), "warming up"),
     (JSONResponse({"error": "no"}, 404), "OpenAI API")],
)  # fmt: skip
def test_what_is_no_such_server_is_said(
    response: Response, says: str, checked_run: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(client_module, "WAIT_S", 0.0)
    app: Any = Starlette()
    app.add_route("/{path:path}", lambda request: response, methods=["GET", "POST"])
    app.stop_answers, app.engine = (lambda: None), None
    running = Running(app)
    try:
        code = run_main(lambda: program.main([running.url, "--run", str(checked_run)]), debug=False)
    finally:
        running.stop()
    said = capsys.readouterr().err
    assert says in said and code == (3 if "names no" in says else 1)


@pytest.mark.slow
def test_keys_dead_servers_and_bad_words(right: Running, checked_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(right.engine, LimitOptions(), ServeOptions(api_key="secret")) as locked:
        words = [locked.url, "--run", str(checked_run)]
        assert run_main(lambda: program.main([*words, "--api_key", "secret"]), debug=False) == 0
        assert run_main(lambda: program.main([*words, "--api_key", "wrong"]), debug=False) == 1
        url = locked.url
    assert "another key" in capsys.readouterr().err
    for words, code, says in (
        ([url, "--run", str(checked_run)], 1, "nothing answers"),
        ([url, "--run", "nowhere"], 2, "not a directory"),
        (["ftp://x", "--run", str(checked_run)], 2, "is no address"),
        ([url], 2, "--run"),
        ([right.url, "--run", str(checked_run), "--model", "other"], 3, "shows not"),
        ([right.url, "--run", str(checked_run), "--max_kl", "0"], 2, "--max_kl"),
    ):
        assert run_main(lambda words=words: program.main(words), debug=False) == code, words  # type: ignore[misc]
        assert says in capsys.readouterr().err


def test_divergences() -> None:
    wanted = merged([(" yes", -0.1), ("▁no", -3.0)])
    assert set(wanted) == {"yes", "no"}
    assert divergence(wanted, wanted) == 0
    assert divergence(wanted, merged([("yes", -0.1)])) < 0.02  # fewer alternatives are no difference
    assert divergence(wanted, merged([("maybe", -0.05)])) > 2
    assert plain_token("<0xE4>") == plain_token("bytes:\\xe4") == plain_token("�") and plain_token("  ") == "  "
    half, whole = AnswerReading("The an", "length"), AnswerReading("The answer", "stop")
    assert same_text(half, whole) and same_text(whole, half) and not same_text(AnswerReading("The an", "stop"), whole)
    assert distance([half], [whole]) == 0 and distance([whole], [AnswerReading("No", "stop")]) > 1
