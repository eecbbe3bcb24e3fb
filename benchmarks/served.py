"""A tool in a process of its own: it answers a line for each line that it is asked."""

from __future__ import annotations

import selectors
import subprocess
from typing import Any


class EndedError(Exception):
    """The process ended without an answer, or was ended for being late."""


class Served:
    """A process with a conversation over its pipes.

    Args:
        command: what to run.
        environment: its variables; without any, those of this process.
        directory: where it works; without one, here.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, directory: str | None = None):
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, cwd=directory, **pipes)

    def ask(self, question: object, limit: float | None = None) -> str:
        """The answer to a line; a process that needs more than `limit` seconds is killed."""
        try:
            print(question, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, as its answer will tell
        return self.answer(limit)

    def answer(self, limit: float | None = None) -> str:
        """The next line that it says."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(limit):
                self.process.kill()
                self.process.wait()
                raise EndedError(f"killed after {limit:.0f} s")
        answer = self.process.stdout.readline()
        if not answer:
            raise EndedError(f"The process of {self.process.args} ended with {self.process.wait()}.")
        return answer.strip()

    def stop(self) -> None:
        """Lets it end by itself: nothing more will be asked."""
        if self.process.poll() is None:
            self.process.communicate()
