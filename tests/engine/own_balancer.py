"""A second balancer over a real fleet's servers, in a thread of the test, with limits of seconds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

from pdserve.balancer.app import Balancer
from pdserve.config.balancer import BalancerConfig
from tests.engine.fleet import Fleet, call, wait_for

T = TypeVar("T")


class OwnBalancer:
    """``with OwnBalancer(fleet, wedge_s=3.0) as balancer:`` all pairs ready inside."""

    def __init__(self, fleet: Fleet, **settings: Any) -> None:
        self.fleet = fleet
        self._config = BalancerConfig(port=0, bootstrap_url=fleet.bootstrap_url, **settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="own-balancer", daemon=True)
        self._balancer: Balancer | None = None

    @property
    def balancer(self) -> Balancer:
        """To be touched in its own thread only: ``ask``."""
        assert self._balancer is not None
        return self._balancer

    @property
    def url(self) -> str:
        """Where clients send."""
        return self.balancer.url

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._start())
        wait_for(lambda: len(self.ready_pairs()) == len(self.state()["pairs"]) > 0, "its pairs ready")
        return self

    def __exit__(self, *exc: object) -> None:
        self._do(self.balancer.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def ask(self, question: Callable[[Balancer], T]) -> T:
        """Something of the balancer, looked at in its thread."""

        async def answer() -> T:
            return question(self.balancer)

        return self._do(answer())

    def state(self) -> dict[str, Any]:
        """Its state document."""
        status, document = call(self.url, "GET", "/pdserve/state", timeout_s=10)
        assert status == 200, document
        return dict(document)

    def counts(self) -> dict[str, int]:
        """``requests`` of the state document."""
        return dict(self.state()["requests"])

    def worker(self, worker_id: str) -> dict[str, Any]:
        """Its row of the state document; of one that has left the fleet what matters here."""
        rows = {w["worker_id"]: dict(w) for w in self.state()["workers"]}
        return rows.get(worker_id, {"state": "gone", "inflight": 0})

    def ready_pairs(self) -> set[tuple[str, str]]:
        """Names of the pairs that take traffic."""
        return {(p["prefill"], p["decode"]) for p in self.state()["pairs"] if p["state"] == "ready"}

    def rids_of(self, name: str) -> list[str]:
        """The servers' rids of a live request by the ``X-Request-Id`` of its client."""
        return self.ask(lambda balancer: balancer.dispatcher.rids_of(name))

    def drain(self, worker_id: str, draining: bool = True) -> None:
        """``PUT /workers/{id}``."""
        status, answer = call(self.url, "PUT", f"/workers/{worker_id}", {"draining": draining})
        assert status == 202, answer

    def check_nothing_left(self) -> None:
        """No request, room or reservation here; no queue and no KV in use on any server."""
        wait_for(lambda: self.counts()["inflight"] == 0, "no request in flight")
        wait_for(lambda: self.ask(lambda balancer: balancer.dispatcher.num_rooms) == 0, "no room in use")
        wait_for(lambda: not any(w["inflight"] for w in self.state()["workers"]), "no reservation")
        self.fleet.wait_empty()

    async def _start(self) -> None:
        self._balancer = Balancer(self._config)
        await self._balancer.start()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
