"""``pdserve monitor``: live on a terminal, one frame, or the document itself.

A dumb terminal gets plain frames one after another. Errors are one line on standard error.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from pdserve.errors import ConfigError, PdserveError, WorkerError
from pdserve.monitor.screen import Watch
from pdserve.monitor.view import render
from pdserve.monitor.view_state import ViewState
from pdserve.state.client import StateClient, clean

ONCE_SIZE = (100, 50)
"""Columns and rows of a frame that goes to no terminal, unless COLUMNS and LINES say otherwise."""
INTERVAL_S = (0.1, 60.0)
DUMB_INTERVAL_S = 5.0
"""Frames that scroll by are readable only if they come seldom."""
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_monitor(
    url: str, *, once: bool = False, as_json: bool = False, interval_s: float = 0.5, api_key: str = ""
) -> int:
    """Show the fleet behind the balancer at ``url`` until the user leaves.

    ``once`` prints one frame, ``as_json`` the state document; both return 0, or 1 after an error
    that was printed. ``interval_s`` is the time between two documents, 0.1 to 60 s. ``api_key`` is the
    balancer's admin key, where it has one. Live, it returns 0, or 128 + the signal that ended it.

    Raises:
        ConfigError: a wrong address or interval, both ``once`` and ``as_json``, or no terminal.
    """
    if once and as_json:
        raise ConfigError("--once and --json exclude each other: a frame, or the document")
    if not INTERVAL_S[0] <= interval_s <= INTERVAL_S[1]:
        low, high = INTERVAL_S
        raise ConfigError(f"--interval must be {low:g} to {high:g} seconds, got {interval_s:g}")
    client = StateClient(url, api_key)
    if as_json or once:
        return _guarded(client, _print_json if as_json else _print_frame)
    console = Console()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("the live monitor needs a terminal; use --once for one frame or --json")
    if console.is_dumb_terminal:
        return _scroll(client, interval_s)
    return watch(url, api_key=api_key, interval_s=interval_s)


def watch(url: str, *, api_key: str = "", interval_s: float = 0.5) -> int:
    """The live screen alone: returns 0 when the user leaves, or 128 + the signal that ended it."""
    return Watch(url, api_key=api_key, interval_s=interval_s).run()


def _guarded(client: StateClient, show: Callable[[StateClient], None]) -> int:
    try:
        show(client)
    except WorkerError as exc:
        _print_error(exc)
        return 1
    finally:
        client.close()
    return 0


def _print_json(client: StateClient) -> None:
    # Escaped to ASCII: a worker's text could hold control characters that JSON allows.
    print(json.dumps(client.fetch_json(), indent=2, ensure_ascii=True))


def _print_frame(client: StateClient) -> None:
    state = client.fetch()
    size = shutil.get_terminal_size(ONCE_SIZE)
    console = Console(width=size.columns)
    now_s = time.time()
    is_ascii = (console.encoding or "").lower().replace("-", "") != "utf8" or console.is_dumb_terminal
    view = ViewState(url=client.url, now_s=now_s, received_s=now_s, is_ascii=is_ascii, is_interactive=False)
    console.print(render(state, view, (size.columns, size.lines)), end="")


def _scroll(client: StateClient, interval_s: float) -> int:
    """For a terminal that can only print: a frame now and then, until Ctrl-C."""
    try:
        while True:
            _guarded(client, _print_frame)
            print()
            time.sleep(max(interval_s, DUMB_INTERVAL_S))
    except KeyboardInterrupt:
        return _INTERRUPTED


def _print_error(exc: PdserveError) -> None:
    Console(stderr=True).print(Text(f"error: {clean(str(exc))}", style="bold magenta"), soft_wrap=True)
