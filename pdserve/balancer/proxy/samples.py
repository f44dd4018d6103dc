"""Several samples of one chat: a request each, on pairs of their own, put together for the client.

SGLang's prefill server would use one room for all samples, so ``n`` becomes n
requests. The first one goes ahead until its prompt is computed; the others find
it in that prefill server's prefix cache, as SGLang's own sampling does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import structs

from pdserve.balancer.metrics.record import RequestRecord
from pdserve.balancer.proxy.answer import LegFailed, Relayed
from pdserve.balancer.proxy.attempts import Attempts
from pdserve.balancer.proxy.retry import History
from pdserve.balancer.proxy.run import Run
from pdserve.balancer.request.request import ParsedRequest
from pdserve.balancer.request.transforms import ResponseSink
from pdserve.balancer.request.usage import Usage
from pdserve.errors import NoWorkerError
from pdserve.http.answer import Answer, Headers
from pdserve.http.sse import DONE_EVENT, EVENT_END, event_data, render_event, split_events

if TYPE_CHECKING:
    from pdserve.balancer.tracing.trace import RequestTrace


async def run_samples(
    attempts: Attempts,
    request: ParsedRequest,
    lines: bytes,
    client: ResponseSink,
    record: RequestRecord,
    runs: list[Run],
    trace: RequestTrace | None = None,
) -> Relayed:
    """Serve every sample; the client has all of a stream but its end when this returns.

    ``runs`` is filled with one entry per sample, for whoever wants to abort them.

    Raises:
        LegFailed, NoWorkerError: as soon as one sample fails for good; the others are ended.
    """
    gathering = _Gathering(client, request.num_samples)
    single = structs.replace(request, num_samples=1, client_rid=None)
    sinks = [SampleSink(gathering, index) for index in range(request.num_samples)]
    history = History(request)
    for sink in sinks:
        timeline = structs.replace(record.timeline)
        part = record if sink.index == 0 else structs.replace(record, timeline=timeline)
        runs.append(Run(single, lines, sink, part, trace=trace, history=history))
    try:
        relayed = await _run_all(attempts, runs, sinks)
    finally:
        record.num_resumes = sum(run.record.num_resumes for run in runs)
        record.num_moves = sum(run.record.num_moves for run in runs)
    usage = gathering.usage([item.usage for item in relayed])
    if not request.is_stream:
        return Relayed(200, usage, gathering.whole(relayed[0].status))
    gathering.end(single)
    return Relayed(relayed[0].status, usage, None)


async def _run_all(attempts: Attempts, runs: list[Run], sinks: list[SampleSink]) -> list[Relayed]:
    """Run the first sample until its prompt is computed, then the others beside it."""
    loop = asyncio.get_running_loop()
    computed: asyncio.Future[None] = loop.create_future()
    runs[0].on_prefilled = lambda: None if computed.done() else computed.set_result(None)
    samples = [loop.create_task(_one(attempts, runs[0], sinks[0]))]
    try:
        waiting: list[asyncio.Future[Any]] = [samples[0], computed]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not (samples[0].done() and samples[0].exception()):
            rest = zip(runs[1:], sinks[1:], strict=True)
            samples += [loop.create_task(_one(attempts, run, sink)) for run, sink in rest]
        done, _ = await asyncio.wait(samples, return_when=asyncio.FIRST_EXCEPTION)
        failures = [exc for task in done if (exc := task.exception()) is not None]
        if failures:
            raise _worst(failures)
    finally:
        for task in samples:
            task.cancel()
        await asyncio.gather(*samples, return_exceptions=True)
    return [task.result() for task in samples]


async def _one(attempts: Attempts, run: Run, sink: SampleSink) -> Relayed:
    relayed = await attempts.run(run)
    await relayed.finish(sink)
    return relayed


def _worst(failures: list[BaseException]) -> BaseException:
    """The failure to report: anything unforeseen first, a worker's before a shortage."""
    order = (LegFailed, NoWorkerError)
    return min(failures, key=lambda exc: order.index(type(exc)) if type(exc) in order else -1)


class SampleSink:
    """One sample's answer on its way into the client's: its choice gets the sample's number."""

    def __init__(self, gathering: _Gathering, index: int) -> None:
        self.index = index
        self.has_begun = False
        self.has_finished = False
        self.on_writable: Callable[[], None] | None = None
        self._gathering = gathering

    def identify(self, rid: str) -> None:
        """Called with the sample's own rid; the first sample's stands for all."""
        if self.index == 0:
            self._gathering.identify(rid)

    def begin(self, status: int, headers: Headers) -> None:
        """The first sample to begin begins the client's stream."""
        self.has_begun = True
        self._gathering.begin(self, status, headers)

    def push(self, data: bytes) -> bool:
        """Pass on whole events, renumbered; the rest of a stream that broke off is dropped."""
        out = [self._gathering.renumbered(event, self.index) for event in split_events(data)]
        return self._gathering.push(b"".join(out))

    async def finish(self, last: bytes = b"") -> None:
        """The sample's end is not the client's."""
        self.has_finished = True
        self.push(last)

    async def answer(self, answer: Answer) -> None:
        """Keep a whole answer until all are there."""
        self.has_finished = True
        self._gathering.keep(self.index, answer)


class _Gathering:
    """What the samples of one request come to."""

    def __init__(self, client: ResponseSink, size: int) -> None:
        self._client = client
        self._answers: list[Answer | None] = [None] * size
        self._sinks: list[SampleSink] = []
        self._rid = ""
        self._created: int | None = None
        self._last_usage: dict[str, Any] | None = None
        self._usages: list[dict[str, Any]] = []
        self._extras: dict[int, dict[str, Any]] = {}

    def identify(self, rid: str) -> None:
        self._rid = rid
        self._client.identify(rid)

    def begin(self, sink: SampleSink, status: int, headers: Headers) -> None:
        self._sinks.append(sink)
        if not self._client.has_begun:
            self._client.begin(status, headers)
            self._client.on_writable = self._resume

    def push(self, data: bytes) -> bool:
        return self._client.push(data)

    def keep(self, index: int, answer: Answer) -> None:
        self._answers[index] = answer

    def renumbered(self, event: bytes, index: int) -> bytes:
        """One event of sample ``index`` as the client sees it; empty for the ends that come once for all."""
        payload = event_data(event)
        if payload == b"[DONE]":
            return b""
        if not payload.startswith(b"{"):
            return event + EVENT_END if event else b""
        document = msgspec.json.decode(payload)
        if not document.get("choices") and document.get("usage"):
            self._last_usage = document
            self._usages.append(document["usage"])
            return b""
        if not document.get("choices") and document.get("sglext"):
            self._extras[index] = document
            return b""
        for choice in document.get("choices") or ():
            choice["index"] = index
        return self._event(document)

    def _event(self, document: dict[str, Any]) -> bytes:
        """Id and time are one for all, as in a stream of one server."""
        if "id" in document:
            document["id"] = self._rid
        if "created" in document:
            if self._created is None:
                self._created = document["created"]
            document["created"] = self._created
        return render_event(msgspec.json.encode(document))

    def end(self, request: ParsedRequest) -> None:
        """The stream's end but for the connection's: the usage of all, and the mark."""
        if self._extras:
            extras = [self._extras[index]["sglext"] for index in sorted(self._extras)]
            document = {**self._extras[min(self._extras)], "sglext": join_extras(extras)}
            self._client.push(self._event(document))
        if self._last_usage is not None:
            self._client.push(self._event({**self._last_usage, "usage": sum_usage(self._usages)}))
        self._client.push(DONE_EVENT)
        self._client.on_writable = None

    def whole(self, status: int) -> Answer:
        """One answer with every sample's choice."""
        answers = [answer for answer in self._answers if answer is not None]
        documents = [msgspec.json.decode(answer.body) for answer in answers]
        choices = [choice for document in documents for choice in document.get("choices") or ()]
        for index, choice in enumerate(choices):
            choice["index"] = index
        usages = [document["usage"] for document in documents if document.get("usage")]
        whole = {**documents[0], "choices": choices}
        extras = [document["sglext"] for document in documents if isinstance(document.get("sglext"), dict)]
        if extras:
            whole["sglext"] = join_extras(extras)
        if usages:
            whole["usage"] = sum_usage(usages)
        return Answer(status, msgspec.json.encode(whole), answers[0].headers)

    def usage(self, usages: list[Usage]) -> Usage:
        """For our own books."""
        total = sum(usage.completion_tokens for usage in usages)
        finish = "abort" if any(usage.finish == "abort" for usage in usages) else usages[0].finish
        failure = next((usage.failure for usage in usages if usage.failure is not None), None)
        return Usage(finish, usages[0].prompt_tokens, total, failure)

    def _resume(self) -> None:
        for sink in self._sinks:
            if sink.on_writable is not None:
                sink.on_writable()


def join_extras(extras: list[dict[str, Any]]) -> dict[str, Any]:
    """SGLang's own additions for samples of one prompt: output ids of each, the rest once."""
    whole = dict(extras[0])
    if isinstance(whole.get("output_ids"), list):
        whole["output_ids"] = [ids for extra in extras for ids in extra.get("output_ids") or ()]
    return whole


def sum_usage(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """Usage of samples of one prompt: the prompt counts once, completions add up."""
    whole = dict(usages[0])
    for name in ("completion_tokens", "reasoning_tokens"):
        if isinstance(whole.get(name), int):
            whole[name] = sum(usage.get(name) or 0 for usage in usages)
    if isinstance(whole.get("total_tokens"), int):
        whole["total_tokens"] = (whole.get("prompt_tokens") or 0) + (whole.get("completion_tokens") or 0)
    return whole
