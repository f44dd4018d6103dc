"""``pdserve chat``: a small terminal conversation with a running service.

Reads lines, prints pieces, shows one dim line of timings after each answer. What is
said over the wire is ``chat_session``'s business. Ctrl-C stops the answer that is
being written, Ctrl-D leaves. With a prompt it answers once: the answer alone goes to
standard output, timings and errors to standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress

from rich.console import Console
from rich.text import Text

from pdserve.errors import PdserveError, WorkerError
from pdserve.monitor.chat_session import ChatOptions, ChatSession

HELP = "/reset forgets the conversation · /quit or Ctrl-D leaves · Ctrl-C stops an answer"
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_chat(
    url: str,
    *,
    system: str = "",
    max_tokens: int = 512,
    temperature: float = 0.0,
    prompt: str = "",
    api_key: str = "",
) -> int:
    """Chat with the service at ``url`` until the user leaves; with ``prompt``, answer it and return.

    Returns the process's exit status: 0, 1 after an error that was printed as one line, 130 if Ctrl-C
    ended it. ``max_tokens`` bounds each answer; ``temperature`` 0 is greedy.
    """
    console, notes = Console(), Console(stderr=True)
    try:
        session = ChatSession(url, ChatOptions(system, max_tokens, temperature, api_key))
        if prompt:
            return _answer_once(session, prompt, console, notes)
        session.model()
        return _converse(session, console, _prompt_reader())
    except PdserveError as exc:
        _print_error(notes, exc)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def print_answer(session: ChatSession, question: str, console: Console) -> bool:
    """Ask and print the text while it comes; False if Ctrl-C stopped it. Errors are raised."""
    try:
        with closing(session.ask(question)) as pieces:
            for piece in pieces:
                console.out(_printable(piece, console), end="", highlight=False)
                console.file.flush()
    except KeyboardInterrupt:
        console.print()
        return False
    console.print()
    return True


def _answer_once(session: ChatSession, prompt: str, console: Console, notes: Console) -> int:
    if not print_answer(session, prompt, console):
        return _INTERRUPTED
    _print_stats(session, notes)
    return 0


def _converse(session: ChatSession, console: Console, read: Callable[[], str]) -> int:
    console.print(Text(f"{session.model()} at {session.url}", style="bold"))
    console.print(Text(HELP, style="dim"))
    while True:
        try:
            line = read().strip()
        except EOFError:
            console.print()
            return 0
        except KeyboardInterrupt:
            console.print(Text(f"\n{HELP}", style="dim"))
            continue
        match line:
            case "":
                continue
            case "/quit" | "/exit":
                return 0
            case "/reset":
                session.reset()
                console.print(Text("forgotten", style="dim"))
            case "/help":
                console.print(Text(HELP, style="dim"))
            case _:
                _take_turn(session, line, console)


def _take_turn(session: ChatSession, question: str, console: Console) -> None:
    try:
        if not print_answer(session, question, console):
            console.print(Text("stopped", style="dim"))
            return
    except WorkerError as exc:
        _print_error(console, exc)
        return
    _print_stats(session, console)


def _print_stats(session: ChatSession, console: Console) -> None:
    if session.last:
        console.print(Text(session.last.line(), style="dim"))


def _print_error(console: Console, exc: PdserveError) -> None:
    console.print(Text(f"error: {exc}", style="red"), soft_wrap=True)


def _printable(piece: str, console: Console) -> str:
    """A model must not steer the terminal: escape characters are shown, not sent."""
    return piece.replace("\x1b", "␛") if console.is_terminal else piece


def _prompt_reader() -> Callable[[], str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    return lambda: input("> ")
