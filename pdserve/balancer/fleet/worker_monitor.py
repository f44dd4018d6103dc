"""The background loop of one worker: polls its load, pings it, detects a hang or a stall.

While the worker is not believed to answer it is pinged until it does. The monitor decides nothing:
it reports to the HealthTracker (fleet/health.py). Pairs have probers (fleet/probe.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TypeVar

import msgspec

from pdserve.balancer.fleet.health import HealthTracker
from pdserve.balancer.fleet.liveness import HangDetector, StallDetector, patience_s
from pdserve.balancer.fleet.probe import WorkerKeys
from pdserve.balancer.fleet.transfer_poll import INSTANCE_PATH
from pdserve.balancer.fleet.updates import FleetUpdates
from pdserve.balancer.fleet.worker import Backoff, Worker
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ProtocolMismatch, WorkerError, WorkerUnreachable
from pdserve.http.client import FetchedResponse, HttpClient
from pdserve.scheduling.load_sample import LOADS_PATH, Sample, parse_loads
from pdserve.types import PriorityFlags, WorkerLoad

logger = logging.getLogger(__name__)

PING_S = 5.0
HEALTH_S = 25.0
"""SGLang's ``/health`` generates a token: at least 1 s, gives up after 20 s."""
INFO_S = 10.0
"""``/server_info`` asks the scheduler, which may be in a long step."""
LOADS_S = 2.0
UNREACHABLE_POLLS = 2
"""Polls in a row without a connection that make a worker suspect; one may be a closing keep-alive."""
SILENT_POLLS = 2
"""Polls in a row that timed out and make a ping decide."""
IDLE_FACTOR = 4
"""An idle worker is polled this many times more slowly; a dispatch ends the pause."""
POLL_BACKOFF_S = 2.0
REVIVE_BACKOFF_S = (0.2, 5.0)
FLAP_WINDOW_S = 120.0
FREE_REVIVALS = 3
MAX_REVIVALS = 16
MAX_CALM_S = 30.0
"""Each return to service beyond FREE_REVIVALS within FLAP_WINDOW_S takes twice as long, up to this."""


_Info = TypeVar("_Info", bound=msgspec.Struct)


class WorkerMonitor:
    """Polls one worker's load; pings it while it is suspect or, if static, not up yet; reports a hang."""

    def __init__(
        self,
        worker: Worker,
        config: BalancerConfig,
        pool: HttpClient,
        health: HealthTracker,
        updates: FleetUpdates,
    ) -> None:
        self._worker = worker
        self._config = config
        self._pool = pool
        self._health = health
        self._updates = updates
        self._headers = WorkerKeys.of(config).plain
        self._progress = StallDetector(worker.role)
        self._silence = HangDetector(config.wedge_s)
        self._revivals: deque[float] = deque(maxlen=MAX_REVIVALS)
        self._unreachable_polls = 0
        self._silent_polls = 0
        self._has_no_figures = False
        self._heard = -1
        self._has_met = False
        self._counted = (0, 0.0)
        self._backoff = Backoff(config.load_poll_s, max(config.load_poll_s, POLL_BACKOFF_S))

    async def run(self) -> None:
        """Until cancelled, or the worker has left and nothing of ours is in flight there any more.

        A worker whose lease ran out may hang, and nobody else would end its requests.
        """
        worker = self._worker
        while not worker.is_over:
            worker.wake.clear()
            if not worker.answers.is_set():
                await self._revive()
            elif worker.needs_ping:
                worker.needs_ping = False
                if why := await self._ping():
                    self._health.worker_silent(worker, why)
            elif self._updates.is_behind(worker):
                self._health.suspect(worker, "it has missed an update of the fleet's weights")
            else:
                await self._rest(await self._poll())

    async def _ask(self, path: str, timeout_s: float) -> FetchedResponse:
        """Any answer is a sign of life; a worker that gives none for too long is reported as hung.

        Raises:
            WorkerError: if there was none.
        """
        worker, asked_s = self._worker, time.monotonic()
        heard = self._pool.num_heard(worker.url)
        try:
            answer = await self._pool.fetch(
                worker.url, "GET", path, headers=self._headers, timeout_s=timeout_s
            )
        except WorkerError as exc:
            self._silence.unanswered(asked_s, heard)
            now_s, heard = time.monotonic(), self._pool.num_heard(worker.url)
            if self._silence.is_over(exc, now_s, heard) and worker.num_inflight:
                why = str(exc).removeprefix(f"{worker.url}: ")
                self._health.worker_hung(worker, f"{why}; silent for {self._silence.restart(now_s):.0f} s")
            raise
        self._silence.answered()
        return answer

    async def _revive(self) -> None:
        backoff = Backoff(*REVIVE_BACKOFF_S)
        while why := await self._ping() or await self._introduce() or await self._catch_up():
            if self._worker.is_over:
                return
            self._worker.last_error = why
            await asyncio.sleep(backoff.next_s())
        await asyncio.sleep(self._calm_s())
        self._unreachable_polls = self._silent_polls = 0
        self._progress.reset()
        self._worker.needs_ping = False
        self._health.worker_answers(self._worker)

    def _calm_s(self) -> float:
        """A worker that passes its probe and fails its first requests, again and again, is given more and
        more time: each round costs clients a failed attempt."""
        now_s = time.monotonic()
        self._revivals.append(now_s)
        recent = sum(now_s - each < FLAP_WINDOW_S for each in self._revivals)
        return min(MAX_CALM_S, 2.0 ** (recent - FREE_REVIVALS)) if recent > FREE_REVIVALS else 0.0

    async def _ping(self) -> str:
        """Why the worker does not answer, or an empty string."""
        for path, timeout_s in (("/ping", PING_S), ("/health", HEALTH_S)):
            try:
                answer = await self._ask(path, timeout_s)
            except WorkerError as exc:
                return str(exc)
            if answer.status == 200:
                return ""
            if answer.status not in (404, 405):
                return f"{self._worker.url}{path}: HTTP {answer.status}"
        return f"{self._worker.url} has neither /ping nor /health"

    async def _introduce(self) -> str:
        """Learn what answers at a static worker's address, which may be another server than before.

        Returns why it cannot serve there, or an empty string.
        """
        worker = self._worker
        if not worker.is_static:
            return ""
        try:
            about = _decoded((await self._ask("/model_info", PING_S)).body, _ModelInfo())
            server = _decoded((await self._ask("/server_info", INFO_S)).body, _ServerInfo())
            instance = await self._ask(INSTANCE_PATH, PING_S)
        except WorkerError as exc:
            return str(exc)
        start = server.text
        if self._has_met and (not start or start != worker.start):
            self._health.worker_restarted(worker)
        worker.start, self._has_met = start, True
        worker.mismatch = self._why_another(about)
        if not worker.mismatch and about.model_path and not worker.weights.model_path:
            name = about.served_model_name or about.model_path
            info = msgspec.structs.replace(
                worker.info, model=about.model_path, served_model_name=name,
                low_priority_first=server.low_priority_first, default_priority=server.default_priority,
            )  # fmt: skip
            self._health.worker_learned(worker, info)
        told = _decoded(instance.body, _Instance()) if instance.status == 200 else _Instance()
        info = msgspec.structs.replace(
            worker.info, resume_id=told.resume_id, prefills_locally=told.prefills_locally
        )
        if info != worker.info:
            self._health.worker_learned(worker, info)
        return worker.mismatch

    def _why_another(self, about: _ModelInfo) -> str:
        """Why this is not the server that was named, or an empty string."""
        worker, model = self._worker, self._worker.info.model
        if about.disaggregation_mode not in (None, worker.role):
            return (
                f"{worker.url} runs with --disaggregation-mode {about.disaggregation_mode}; "
                f"a {worker.role} server was expected there"
            )
        if not model or about.model_path in ("", model, worker.weights.model_path):
            return ""
        other = self._health.still_serving(model, worker)
        if other is None:
            return ""  # the whole fleet was restarted with another one
        return (
            f"{worker.url} serves {about.model_path} now; {model} was there, and {other.worker_id} still has "
            f"it: start it with that, or DELETE /workers/{worker.worker_id} and add it anew"
        )

    async def _catch_up(self) -> str:
        """Have a worker do what it missed; why it cannot serve with the others, or an empty string."""
        if self._worker.num_updates:
            return "an update of its weights is under way"
        self._worker.mismatch = await self._updates.bring(self._worker)
        return self._worker.mismatch

    async def _poll(self) -> float:
        """One load sample; the seconds to wait before the next."""
        sent_s = time.monotonic()
        try:
            answer = await self._ask(LOADS_PATH, LOADS_S)
        except WorkerError as exc:
            return await self._missed(exc)
        self._unreachable_polls = self._silent_polls = 0
        await self._see_whether_paused()
        if answer.status != 200:
            return self._unusable(f"/v1/loads: HTTP {answer.status}")
        try:
            sample = parse_loads(answer.body, sent_s=sent_s, received_s=time.monotonic())
        except ProtocolMismatch as exc:
            return self._unusable(str(exc))
        self._has_no_figures = False
        self._backoff.reset()
        if self._began_anew(sample.load):
            self._health.suspect(self._worker, "its counters began anew: it was restarted")
            return 0.0
        self._health.worker_sampled(self._worker, sample)
        self._watch_progress(sample)
        return self._config.load_poll_s

    def _began_anew(self, load: WorkerLoad) -> bool:
        """True if what only grows has fallen at a static address: another process answers there, which came
        up between two polls."""
        before = self._counted
        steps = load.decode_moments[0] if load.decode_moments else 0.0
        self._counted = load.total_prefill_uncached_tokens, steps
        has_fallen = self._counted[0] < before[0] or steps < before[1]
        return has_fallen and self._worker.is_static

    async def _see_whether_paused(self) -> None:
        """Ask, unless bytes have come since the last poll. SGLang's ``/ready`` is 503 while the engine is
        paused, whoever paused it, or unwell, and ``/ping`` only if it is unwell."""
        worker, heard = self._worker, self._pool.num_heard(self._worker.url)
        has_moved, self._heard = heard != self._heard, heard
        if has_moved and not worker.is_paused:
            return
        try:
            status = (await self._ask("/ready", LOADS_S)).status
            if status == 200:
                self._health.worker_paused(worker, False)
            elif status == 503 and (await self._ask("/ping", PING_S)).status == 200:
                self._health.worker_paused(worker, True)
        except WorkerError:
            return  # the next poll says more

    async def _missed(self, exc: WorkerError) -> float:
        worker = self._worker
        if isinstance(exc, WorkerUnreachable):
            self._unreachable_polls += 1
            if self._unreachable_polls >= UNREACHABLE_POLLS:
                self._health.worker_silent(worker, str(exc))
        else:
            self._silent_polls += 1
            if self._silent_polls >= SILENT_POLLS and (why := await self._ping()):
                self._health.worker_silent(worker, why)
        return self._backoff.next_s()

    def _watch_progress(self, sample: Sample) -> None:
        worker, wedge_s = self._worker, self._config.wedge_s
        if worker.is_paused:
            worker.stalled_s = 0.0
            self._progress.reset()
            return
        heard = self._pool.num_heard(worker.url)
        stalled_s = self._progress.see(sample.load, sample.covered_s, heard, worker.num_inflight)
        worker.stalled_s = stalled_s
        if wedge_s <= 0 or stalled_s < patience_s(worker.view, wedge_s):
            return
        self._progress.reset()
        self._health.worker_stalled(worker, f"answers, but has not moved for {stalled_s:.0f} s")

    def _unusable(self, why: str) -> float:
        """A worker without usable load figures still serves; balanced by in-flight requests alone."""
        if not self._has_no_figures:
            logger.warning("no load figures worker=%s: %s", self._worker.worker_id, why)
        self._has_no_figures = True
        return self._backoff.next_s()

    async def _rest(self, delay_s: float) -> None:
        worker = self._worker
        if not worker.answers.is_set() or await _woken(worker, delay_s) or worker.num_inflight:
            return
        self._health.dozing.add(worker)
        try:
            await _woken(worker, delay_s * (IDLE_FACTOR - 1))
        finally:
            self._health.dozing.discard(worker)


class _ModelInfo(msgspec.Struct):
    model_path: str = ""
    served_model_name: str | None = None
    disaggregation_mode: str | None = None


class _Instance(msgspec.Struct):
    """What a pdserve worker says of itself; a stock server says nothing."""

    instance_id: str = ""
    resumes: bool = False
    prefills_locally: bool = False

    @property
    def resume_id(self) -> str:
        """As ``WorkerInfo.resume_id``."""
        return self.instance_id if self.resumes else ""


class _ServerInfo(PriorityFlags, frozen=True):
    """``startup_time`` is how long each part of its start took: no two starts are alike."""

    startup_time: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def text(self) -> str:
        """What tells this start from others; empty if the server does not say."""
        return "" if bytes(self.startup_time) == b"null" else bytes(self.startup_time).decode()


def _decoded(body: bytes, default: _Info) -> _Info:
    """The server's description of itself; the default if it gives none."""
    try:
        return msgspec.json.decode(body, type=type(default))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return default


async def _woken(worker: Worker, delay_s: float) -> bool:
    """Wait; True if the monitor was woken before the time was up."""
    try:
        async with asyncio.timeout(delay_s):
            await worker.wake.wait()
    except TimeoutError:
        return False
    return True
