"""How one attempt at one request ended: ``Relayed``, or ``LegFailed`` with the leg to blame."""

from __future__ import annotations

from typing import Self

import msgspec

from pdserve.balancer.request.transforms import ResponseSink
from pdserve.balancer.request.usage import Usage
from pdserve.errors import PdserveError, WorkerError, WorkerRejected, WorkerUnreachable
from pdserve.http.answer import Answer, Headers
from pdserve.http.client_response import ClientResponse
from pdserve.types import Role

STUMBLED = b"Internal Server Error"
"""starlette's whole body for an exception that no handler knows."""

UNABLE = 501
"""How plugin/local_prefill refuses a request."""
_NOT_RELAYED = frozenset(
    b"connection content-length date keep-alive proxy-connection server te trailer transfer-encoding upgrade"
    b" access-control-allow-credentials access-control-allow-origin access-control-expose-headers"
    b" x-request-id".split()
)


class Rejected(WorkerRejected):
    """An error status with the headers it came with, so that it can be relayed as it is."""

    def __init__(self, response: ClientResponse, body: bytes) -> None:
        super().__init__(response.url, response.status, body)
        self.headers = relayed_headers(response)


def relayed_headers(response: ClientResponse) -> Headers:
    """A worker's headers but for those that belong to its connection or that we set."""
    return tuple([header for header in response.headers if header[0].lower() not in _NOT_RELAYED])


class LegFailed(PdserveError):
    """One leg failed. ``role`` is the one that failed first, None if both were silent.

    ``is_prefill_done`` tells whether the prefill leg had ended well before, ``is_request_fault`` whether
    another worker has rejected the request too, ``is_late`` whether the worker was only silent for longer
    than a stream usually is, ``is_moved`` whether nothing failed: we have ended it, another pair goes on.
    ``is_unable``: a decode worker that was to prefill the request itself said that it cannot; a pair can.
    """

    is_request_fault = False
    is_moved = False
    is_unable = False

    def __init__(
        self, role: Role | None, error: WorkerError, *, is_prefill_done: bool = False, is_late: bool = False
    ) -> None:
        super().__init__(str(error))
        self.role = role
        self.error = error
        self.is_prefill_done = is_prefill_done
        self.is_late = is_late

    @classmethod
    def moved(cls, url: str, *, is_prefill_done: bool) -> Self:
        """The leg at ``url`` was ended on purpose."""
        leg = cls(None, WorkerError(url, "its answer goes on elsewhere"), is_prefill_done=is_prefill_done)
        leg.is_moved = True
        return leg

    @property
    def is_stale(self) -> bool:
        """True if only a kept connection had been closed: nobody's fault, and no attempt really."""
        return isinstance(self.error, WorkerUnreachable) and self.error.is_stale

    @property
    def is_refusal(self) -> bool:
        """True if the status says that the worker does no such thing."""
        return isinstance(self.error, WorkerRejected) and self.error.status == UNABLE

    @property
    def is_client_fault(self) -> bool:
        """True if the worker refused the request itself: no other pair would take it either.

        A 500 in the web framework's own words is that: its handler stumbled over the
        request (an unknown parameter of /vertex_generate), the engine never saw it.
        """
        error = self.error
        return isinstance(error, WorkerRejected) and (error.status < 500 or error.body == STUMBLED)


class Relayed(msgspec.Struct, frozen=True):
    """Decode's answer is complete and all its bytes are here: sent, or waiting in ``whole``.

    ``prefill_error`` is None if the prefill leg ended well too; ``decode_error`` is what decode's own
    answer says that decode did wrong. ``is_aborted``: prefill has dropped the request; its answer,
    which is the client's, says so, and decode is still to be told.
    """

    status: int
    usage: Usage
    whole: Answer | None
    prefill_error: WorkerError | None = None
    decode_error: WorkerError | None = None
    is_aborted: bool = False

    async def finish(self, sink: ResponseSink) -> None:
        """Send the end of the answer, unless it is out already."""
        if sink.has_finished:
            return
        if self.whole is None:
            await sink.finish()
        else:
            await sink.answer(self.whole)
