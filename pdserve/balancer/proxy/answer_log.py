"""What is kept of a streamed answer so that another server can go on with it. Pure.

    frames from decode ── AnswerLog.take ──► the same without their comments, for the client
                               └──► the log, and how many frames went out: ``resume_field``

The wire is docs/resume.md; what the words of a log mean is the workers' matter.
"""

from __future__ import annotations

import re

from pdserve.http.sse import EVENT_END

MARK = b": ids "
"""How the first line of a frame begins if it is for us."""
_SKIP = len(MARK)
_ABORTED, _NOT_RESUMABLE = b"~", b"!"
"""How the words begin that are for us; no other word has these characters in it."""
_COMMENT = re.compile(rb"^: ids [^\r\n]*(?:\r\n|\r|\n)", re.MULTILINE)


def without_comments(frames: bytes) -> bytes:
    """``frames`` as they would be if nobody had asked for tokens, whichever line ends they have."""
    return _COMMENT.sub(b"", frames)


class AnswerLog:
    """The log of one answer, over all its legs.

    ``frames`` counts what was handed on. ``aborted`` is the status with which a server gave the
    answer up, ``obstacle`` the reason why it cannot be resumed; both None if there is none.
    """

    __slots__ = ("_held", "_log", "aborted", "frames", "obstacle")

    def __init__(self) -> None:
        self._log = bytearray()
        self._held = bytearray()
        self.frames = 0
        self.aborted: int | None = None
        self.obstacle: str | None = None

    @property
    def is_resumable(self) -> bool:
        """True if a server has told its tokens, and none has said that they are not enough."""
        return bool(self._log) and self.obstacle is None

    def begin_leg(self) -> None:
        """Another server goes on: what the former one said of its own end is over."""
        self.aborted = None
        self._held.clear()

    def give_in(self) -> bytes:
        """Return the frames of the error, which the client is to have: no other server will go on."""
        held = bytes(self._held)
        self.begin_leg()
        self.frames += held.count(EVENT_END)
        self.obstacle = self.obstacle or "given up"
        return held

    def take(self, frames: bytes) -> bytes:
        """Return ``frames``, whole ones, without their comments; those of an error are left out.

        Once ``aborted`` is set nothing is returned any more. What has changed the ends of lines on the way
        may have changed more: such an answer is not resumed.
        """
        end = frames.index(b"\n") + 1 if frames.startswith(MARK) else 0
        # One byte is found much sooner than two, and frames of /generate bear the whole text.
        if end and (frames.find(b"\n", end) == len(frames) - 2 or frames.find(EVENT_END) == len(frames) - 2):
            # One frame, as nearly always: _take_one, but for the rare words. Its line's end parts the words.
            words = frames[_SKIP:end]
            if _ABORTED in words or _NOT_RESUMABLE in words or self.aborted is not None:
                return self._take_one(frames)
            self._log += words
            self.frames += 1
            return frames[end:]
        if MARK not in frames and self.aborted is None:
            self.frames += frames.count(EVENT_END)
            return frames
        if b"\r" in frames:
            self.obstacle = "line ends"
            return without_comments(frames)
        parts = frames.split(EVENT_END)[:-1]
        return b"".join([self._take_one(part + EVENT_END) for part in parts])

    def _take_one(self, frame: bytes) -> bytes:
        if frame.startswith(MARK):
            end = frame.index(b"\n")
            words, frame = frame[len(MARK) : end], frame[end + 1 :]
            if _ABORTED in words or _NOT_RESUMABLE in words:
                words = self._read(words)
            if words:
                self._log += words
                self._log += b"\n"
        if self.aborted is not None:
            self._held += frame
            return b""
        self.frames += 1
        return frame

    def _read(self, words: bytes) -> bytes:
        kept = []
        for word in words.split(b" "):
            if word.startswith(_ABORTED):
                self.aborted = int(word[1:])
            elif word.startswith(_NOT_RESUMABLE):
                self.obstacle = word[1:].decode()
            else:
                kept.append(word)
        return b" ".join(kept)

    def resume_field(self) -> bytes:
        """Return what is spliced into the body of a resumed leg, before its last brace."""
        log = bytes(self._log[:-1]).replace(b"\n", b" ")
        return b',"pdserve_resume":{"log":"%b","frames":%d}' % (log, self.frames)
