"""A terminal in our hands: keys as bytes in, frames out; put back as it was whatever happens.

    with Terminal():     cbreak mode, alternate screen, cursor hidden, no line wrap
        paint(frame)     only rows that changed are written, all in one go
    left                 attributes, screen, cursor and wrap as before

Ctrl-C stays a signal. Not for a dumb terminal.
"""

from __future__ import annotations

import os
import termios
from types import TracebackType
from typing import Self

from rich.color import ColorSystem
from rich.console import Console
from rich.segment import Segment

from pdserve.monitor.lines import Frame

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""Nothing is erased while it runs: every row is written over in full, so that nothing flickers."""
_LEAVE = "\x1b[0m\x1b[H\x1b[J\x1b[?7h\x1b[?25h\x1b[?1049l"
"""Erased at the end: after a resize tmux 3.3 brings rows of the alternate screen back to the shell's."""
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"
"""Synchronised output: terminals that know it show the rows between all at once, others ignore it."""
_COLORS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
}
FALLBACK_SIZE = (80, 24)


class Terminal:
    """The terminal behind two descriptors. ``can_suspend``: Ctrl-Z stays a signal too."""

    def __init__(
        self, console: Console, input_fd: int = 0, output_fd: int = 1, *, can_suspend: bool = True
    ) -> None:
        self.input_fd, self.output_fd = input_fd, output_fd
        self._can_suspend = can_suspend
        self._is_colored = not console.no_color
        self._colors = _COLORS.get(console.color_system or "")
        self._before: list[int | list[bytes | int]] | None = None
        self._painted: list[str] = []
        self._size = (0, 0)

    def __enter__(self) -> Self:
        """Take the terminal."""
        self._before = termios.tcgetattr(self.input_fd)
        try:
            self._take()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back; safe to call more than once, and if the terminal is gone."""
        before, self._before = self._before, None
        if before is None:
            return
        try:
            self._write(_LEAVE)
        except OSError:
            pass  # hung up; there is nobody to see it
        try:
            termios.tcsetattr(self.input_fd, termios.TCSAFLUSH, before)
        except termios.error:
            pass  # likewise

    def _take(self) -> None:
        mode = termios.tcgetattr(self.input_fd)
        # NOFLSH: at Ctrl-C the kernel would else drop what is not yet read, in the middle of a sequence
        mode[3] = mode[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        if not self._can_suspend:
            mode[6][termios.VSUSP] = bytes([os.fpathconf(self.input_fd, "PC_VDISABLE") & 0xFF])
        termios.tcsetattr(self.input_fd, termios.TCSADRAIN, mode)
        self._write(_ENTER)
        self._painted = []

    def size(self) -> tuple[int, int]:
        """(columns, rows) now."""
        try:
            size = os.get_terminal_size(self.output_fd)
        except OSError:
            return FALLBACK_SIZE
        return (size.columns, size.lines) if size.columns and size.lines else FALLBACK_SIZE

    def read(self) -> bytes:
        """What was typed; empty at the end of the input."""
        try:
            return os.read(self.input_fd, 1024)
        except OSError:
            return b""

    def paint(self, frame: Frame, size: tuple[int, int]) -> None:
        """Show ``frame``, which was made for ``size``."""
        rows = [self._encoded(row) for row in frame.rows()]
        rows += [" " * frame.columns] * (size[1] - len(rows))
        parts = []
        if size != self._size:
            self._size, self._painted = size, []
        for i, row in enumerate(rows):
            if i >= len(self._painted) or self._painted[i] != row:
                parts.append(f"\x1b[{i + 1};1H{row}")
        if parts:
            self._write("".join([_BEGIN, *parts, _END]))
        self._painted = rows

    def forget(self) -> None:
        """The next frame is written whole: what is on the screen is not what was painted."""
        self._size = (0, 0)

    def _encoded(self, row: list[Segment]) -> str:
        parts = []
        for text, style, _ in row:
            if style is None or self._colors is None:
                parts.append(text)
            else:
                shown = style if self._is_colored else style.without_color
                parts.append(shown.render(text, color_system=self._colors))
        return "".join(parts)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode(errors="replace"))
        while data:
            data = data[os.write(self.output_fd, data) :]
