"""What requests do to a run, between two of its steps: it answers, saves, stops, waits, leaves its card and comes back.

Only the first process reads requests; what all of several have to do (save, stop, wait) it tells the others. The time
that passes here is no training time. Knows a `Run`, and saving by a `CheckpointSaver`; files are `control_folder.py`'s.
"""

from __future__ import annotations

import time
from typing import Literal, Protocol

from accelerate.utils import broadcast_object_list

from onecard.console import first_line, say, warn
from onecard.errors import CheckpointError, ConfigError, ModelError, OneCardError
from onecard.installation import command
from onecard.model.memory_saving.card_to_ram import CardToRam
from onecard.train.asking import Questions, question_of
from onecard.train.control import Reply
from onecard.train.control_folder import ControlFolder, Request
from onecard.train.run import Run
from onecard.train.signals import Interrupts

WAIT_S = 0.2
Action = Literal["go", "wait", "save", "stop"]


class CheckpointSaver(Protocol):
    """The checkpoints of a run: the step of the newest, and one more where the present step has none."""

    step: int

    @property
    def is_current(self) -> bool:
        """Whether the present step is saved."""
        ...

    def save(self, *, final: bool) -> int:
        """Save the present step unless that is done; returns the step of the newest checkpoint."""
        ...


class RunControl:
    """Carries out the requests to one run; without a folder there are none."""

    def __init__(self, folder: ControlFolder | None = None, questions: Questions | None = None) -> None:
        self.folder = folder or ControlFolder()
        self.questions = questions
        self._is_paused = False
        self._away: CardToRam | None = None  # what was on the card, while it is given back
        self._asked: Request | None = None  # for what all processes do

    def is_requested(self) -> bool:
        """Whether something waits to be carried out."""
        self.folder.poll()
        return bool(self.folder.waiting)

    def ask_standing(self, run: Run) -> None:
        """Ask the questions of --ask and --ask_file."""
        if self.questions is not None:
            self.questions.ask_standing(run)

    def obey(self, run: Run, interrupts: Interrupts, saves: CheckpointSaver) -> bool:
        """Carry out all that is requested, and wait while the run is paused; True when it is to end now, saved.

        Call it on every process. Raises CheckpointError where a checkpoint cannot be written.
        """
        while True:
            action = self._agreed(run, interrupts, saves)
            if action == "go":
                return False
            if action == "stop" and self._stop(saves):
                return True
            if action == "save":
                self._save(saves)
            if action == "wait":
                time.sleep(WAIT_S)

    def _agreed(self, run: Run, interrupts: Interrupts, saves: CheckpointSaver) -> Action:
        """What comes next, on every process."""
        action: Action = self._next(run, interrupts, saves) if run.accelerator.is_main_process else "go"
        if run.accelerator.num_processes > 1:
            action = broadcast_object_list([action])[0]
        return action

    def _next(self, run: Run, interrupts: Interrupts, saves: CheckpointSaver) -> Action:
        self.folder.poll()
        while self.folder.waiting:
            request = self.folder.waiting.pop(0)
            if request.kind in ("stop", "save"):
                self._asked = request
                return "stop" if request.kind == "stop" else "save"
            self._carry_out(run, request, interrupts, saves)
        if not self._is_paused and self._away is None:
            return "go"
        return "wait" if interrupts.requested is None else "stop"

    def _carry_out(self, run: Run, request: Request, interrupts: Interrupts, saves: CheckpointSaver) -> None:
        """What the first process does alone, with its reply. Nothing that goes wrong with an answer ends the run."""
        try:
            if request.kind == "ask":
                text = self._answer(run, request, interrupts)
            elif request.kind == "pause":
                text = self._pause(run)
            elif request.kind == "give_back":
                text = self._give_back(run, saves)
            else:
                text = self._go_on(run, of_pause=request.kind == "continue")
        except OneCardError as reason:
            self.folder.answer(request, Reply("failed", error=str(reason)))
        except Exception as reason:
            if request.kind != "ask":  # half of the memory may be away
                raise
            error = f"{type(reason).__name__}: {first_line(reason)}"
            warn(f"a question could not be answered ({error}); training goes on")
            self.folder.answer(request, Reply("failed", error=error))
        else:
            self.folder.answer(request, Reply("done", text))

    def _answer(self, run: Run, request: Request, interrupts: Interrupts) -> str:
        if self.questions is None:
            raise ConfigError("", "this run cannot be asked")
        if self._away is not None:
            hint = f"take it back first: {self._command('take-back')}"
            raise ConfigError("", f"the run has left its card and cannot answer; {hint}")
        turns, sampling = question_of(request.given)

        def must_end() -> bool:
            self.folder.poll()
            return interrupts.requested is not None or self.folder.must_stop

        def on_text(text: str) -> None:
            self.folder.answer(request, Reply("running", text))

        on_text("")
        return self.questions.ask(run, turns, sampling, on_text, must_end)

    def _pause(self, run: Run) -> str:
        self._is_paused = True
        if self._away is None:
            self.folder.say("paused", run.state.step, run.state.total_steps)
        text = f"paused after step {run.state.step} of {run.state.total_steps}"
        say(f"{text}; to go on: {self._command('continue')}")
        return text

    def _go_on(self, run: Run, *, of_pause: bool) -> str:
        """Come back to the card; of_pause: end a pause, too. Raises ModelError where the card has no room."""
        if not self._is_paused and self._away is None:
            return "the run was not waiting"
        if self._away is not None:
            self._away.come_back()
            self._away = None
        self._is_paused = self._is_paused and not of_pause
        self.folder.say("paused" if self._is_paused else "training", run.state.step, run.state.total_steps)
        text = f"back on the card, and paused at step {run.state.step}"
        text = text if self._is_paused else f"goes on after step {run.state.step} of {run.state.total_steps}"
        say(text)
        return text

    def _give_back(self, run: Run, saves: CheckpointSaver) -> str:
        """Leave the card. Raises ConfigError for runs that cannot, ModelError where RAM has no room."""
        if run.options.deepspeed or run.accelerator.num_processes > 1:
            raise ConfigError("", "a run of several processes, or under DeepSpeed, cannot leave its cards: their "
                              "exchange holds memory there; pause it, or stop it")  # fmt: skip
        if self._away is not None:
            return "the run has left its card already"
        if not run.options.n_averaged:  # of the newest checkpoints, to which this one would be added
            saves.save(final=False)  # so that it can be stopped while something else fills the card
        away = CardToRam()
        away.leave()
        self._away = away
        self.folder.say("given_back", run.state.step, run.state.total_steps)
        text = f"{away.n_bytes / 2**30:.2f} GiB went from the card to RAM after step {run.state.step}"
        if run.accelerator.device.type == "cpu":
            text = f"there is no card to give back: the run waits after step {run.state.step}, and its memory stays"
        say(f"{text}; to go on: {self._command('take-back')}")
        return text

    def _save(self, saves: CheckpointSaver) -> None:
        request, self._asked = self._asked, None
        try:
            if self._away is not None and not saves.is_current:
                raise CheckpointError("the run has left its card, and can be saved when it is back", disk_full=True)
            step = saves.save(final=False)
            reply = Reply("done", f"checkpoint-{step} is saved" if step else "there is nothing to save yet")
            if not saves.is_current:
                reply = Reply("failed", error=f"the disk has no room for it; checkpoint-{step} is the newest")
        except CheckpointError as reason:
            self._reply(request, Reply("failed", error=str(reason)))
            if not reason.disk_full:
                raise
            return
        self._reply(request, reply)

    def _stop(self, saves: CheckpointSaver) -> bool:
        """Save and end; False where a request to stop cannot be granted now."""
        request, self._asked = self._asked, None
        try:
            if self._away is not None and not saves.is_current:
                self._away.come_back()
                self._away = None
            step = saves.save(final=True)
        except (CheckpointError, ModelError) as reason:
            self._reply(request, Reply("failed", error=str(reason)))
            if isinstance(reason, CheckpointError):
                raise
            if request is not None:
                return False
            warn(f"{reason}\n         The steps since checkpoint-{saves.step} are lost.")
            return True
        saved = f"checkpoint-{step} is saved, and the same command goes on" if step else "there was nothing to save yet"
        self._reply(request, Reply("done", f"stopped; {saved}"))
        return True

    def _command(self, verb: str) -> str:
        """What to type for another request to this run."""
        return f"{command('control')} {verb} --run {self.folder.run_dir}"

    def _reply(self, request: Request | None, reply: Reply) -> None:
        if request is not None:
            self.folder.answer(request, reply)
