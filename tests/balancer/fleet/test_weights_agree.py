"""Weights and adapters that were loaded at run time are the same on every worker that serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from pdserve.balancer.app import Balancer
from pdserve.balancer.fleet.weights import CannotReplay, Change, Weights, parse_change
from pdserve.scheduling.policy.pair_cost import PairCost
from pdserve.state.document import StateDocument
from pdserve.state.problems import find_problems
from pdserve.types import Role
from tests.support.balancer_client import Site, running_site
from tests.support.sglang_server import FakeSGLang, until

DISK = "/update_weights_from_disk"
TENSORS = "/update_weights_from_tensor"
NEW = {"model_path": "new-model", "weight_version": "v2"}
LORA = {"lora_name": "poet", "lora_path": "/adapters/poet"}


class Fleet:
    """A site whose fakes may be replaced and added to."""

    def __init__(self, site: Site, stack: AsyncExitStack) -> None:
        self.site = site
        self.ask = site.ask
        self._stack = stack
        self.everyone = list(site.fakes)

    async def restart(self, fake: FakeSGLang) -> FakeSGLang:
        """The fake's process is killed, noticed, and started again."""
        fake.kill()
        await self.site.generate({"text": "who is there"})
        await self.site.generate({"text": "who is there"})
        await until(lambda: self.state(fake.name) == "suspect", "it is noticed")
        return self._adopt(await fake.restart())

    async def add(self, name: str) -> FakeSGLang:
        """A decode server that an operator adds."""
        fake = FakeSGLang(Role.DECODE, name=name)
        await fake.start()
        reply = await self.ask("POST", "/workers", {"url": fake.url, "worker_type": "decode"})
        assert reply.status == 202
        return self._adopt(fake)

    def _adopt(self, fake: FakeSGLang) -> FakeSGLang:
        self._stack.push_async_callback(fake.stop)
        self.everyone.append(fake)
        return fake

    def state(self, name: str) -> str:
        return self.site.state(name)

    async def all_serve(self) -> None:
        workers = self.site.balancer.fleet.workers
        await until(lambda: all(str(worker.state) == "ready" for worker in workers()), "all ready")

    async def serve_some(self, number: int = 12) -> None:
        for index in range(number):
            assert (await self.site.generate({"text": f"request {index}"})).status == 200

    def mixed(self) -> list[str]:
        """Requests whose two legs had different weights."""
        seen: dict[str, set[str]] = {}
        for fake in self.everyone:
            for room, name in fake.weights.used.items():
                seen.setdefault(room, set()).add(name)
        return [room for room, names in seen.items() if len(names) > 1]

    async def document(self) -> StateDocument:
        body = (await self.ask("GET", "/pdserve/state")).body
        return msgspec.json.decode(body, type=StateDocument)

    async def why_out(self, name: str) -> str:
        """What an operator reads of it."""
        document = await self.document()
        entry = next(worker for worker in document.workers if worker.worker_id == name)
        told = [problem.what for problem in find_problems(document) if problem.subject == name]
        assert told == [f"kept out: {entry.mismatch}"]
        return entry.mismatch


@asynccontextmanager
async def fleet(prefill: int = 1, decode: int = 2) -> AsyncIterator[Fleet]:
    site_of = running_site(prefill, decode, policy="round_robin", load_poll_s=0.02)
    async with site_of as site, AsyncExitStack() as stack:
        yield Fleet(site, stack)


# -- who missed an update ----------------------------------------------------------------------


async def test_a_restarted_worker_is_given_the_update_before_it_serves() -> None:
    async with fleet() as f:
        assert (await f.ask("POST", DISK, NEW)).status == 200
        successor = await f.restart(f.site.decodes[1])
        await f.serve_some()
        await f.all_serve()
        await f.serve_some()
        assert successor.weights.changes == [DISK]
        assert (successor.weights.path, successor.weights.version) == ("new-model", "v2")
        assert successor.requests, "it serves"
        assert f.mixed() == []


async def test_a_worker_that_joins_later_is_given_the_update_before_it_serves() -> None:
    async with fleet(decode=1) as f:
        await f.ask("POST", DISK, NEW)
        await f.ask("POST", "/load_lora_adapter", LORA)
        newcomer = await f.add("late")
        await f.all_serve()
        await f.serve_some()
        assert newcomer.weights.changes == [DISK, "/load_lora_adapter"]
        assert newcomer.requests
        assert f.mixed() == []


async def test_a_worker_that_joins_during_the_update_does_not_miss_it() -> None:
    async with fleet(decode=1) as f:
        gates = [fake.weights for fake in f.site.fakes]
        for weights in gates:
            weights.gate = asyncio.Event()
        asked = asyncio.create_task(f.ask("POST", DISK, NEW))
        await until(lambda: all(weights.num_waiting for weights in gates), "both are told")
        newcomer = await f.add("meanwhile")
        await f.all_serve()
        for weights in gates:
            assert weights.gate is not None
            weights.gate.set()
        assert (await asked).status == 200
        await until(lambda: newcomer.weights.changes, "brought along")
        await f.all_serve()
        await f.serve_some()
        assert f.mixed() == []


async def test_a_worker_that_fails_an_update_is_out_by_name_until_it_has_it() -> None:
    async with fleet() as f:
        failing = f.site.decodes[1]
        failing.weights.refuses = "no such folder"
        reply = await f.ask("POST", DISK, NEW)
        assert (reply.status, reply.json["success"]) == (400, False)
        assert f.state("decode-1") == "suspect"
        await f.serve_some()
        assert failing.requests == []
        await until(lambda: "no such folder" in f.site.balancer.fleet.workers()[2].mismatch, "tried again")
        assert "new-model" in await f.why_out("decode-1")
        failing.weights.refuses = ""
        await f.all_serve()
        await f.serve_some()
        assert failing.requests
        assert f.mixed() == []


async def test_what_waits_at_a_worker_that_failed_is_tried_elsewhere() -> None:
    """Its prefill may have run with the new weights."""
    async with fleet() as f:
        for fake in f.site.decodes:
            fake.behaviour.gate = asyncio.Event()
        asked = asyncio.create_task(f.site.generate({"text": "hi"}))
        await until(lambda: any(fake.requests for fake in f.site.decodes), "it waits at a decode server")
        holder = next(fake for fake in f.site.decodes if fake.requests)
        for fake in f.site.decodes:
            if fake is not holder:
                fake.behaviour.gate = None
        holder.weights.refuses = "out of memory"
        await f.ask("POST", DISK, NEW)
        assert (await asked).status == 200
        assert holder.disconnects


async def test_between_the_first_and_the_last_only_those_serve_that_have_it() -> None:
    async with fleet() as f:
        slow = f.site.decodes[1]
        slow.weights.gate = asyncio.Event()
        asked = asyncio.create_task(f.ask("POST", DISK, NEW))
        await until(lambda: f.site.prefill.weights.changes and f.site.decode.weights.changes, "two have it")
        await f.serve_some()
        assert slow.requests == []
        slow.weights.gate.set()
        assert (await asked).status == 200
        assert f.state("decode-1") == "ready", "no test of its pairs is needed"
        await f.serve_some()
        assert slow.requests
        assert f.mixed() == []


async def test_an_update_that_nobody_took_changes_nothing() -> None:
    async with fleet() as f:
        for fake in f.site.fakes:
            fake.weights.refuses = "no such folder"
        assert (await f.ask("POST", DISK, NEW)).status == 400
        await f.serve_some()
        assert {f.state(fake.name) for fake in f.site.fakes} == {"ready"}


async def test_weights_that_came_as_tensors_keep_a_newcomer_out_until_the_next_version() -> None:
    async with fleet() as f:
        await f.ask("POST", TENSORS, {"serialized_named_tensors": ["x"], "weight_version": "v2"})
        successor = await f.restart(f.site.decodes[1])
        await until(lambda: f.site.balancer.fleet.workers()[2].mismatch, "it is asked")
        await f.serve_some()
        assert successor.requests == []
        assert "cannot be sent again" in await f.why_out("decode-1")
        for _ in range(2):  # two parts of one version
            await f.ask("POST", TENSORS, {"serialized_named_tensors": ["x"], "weight_version": "v3"})
        await f.all_serve()
        await f.serve_some()
        assert successor.requests
        assert f.mixed() == []


async def test_an_adapter_that_was_unloaded_is_not_given_to_newcomers() -> None:
    async with fleet() as f:
        await f.ask("POST", "/load_lora_adapter", LORA)
        await f.ask("POST", "/unload_lora_adapter", {"lora_name": "poet"})
        successor = await f.restart(f.site.decodes[1])
        await f.all_serve()
        assert successor.weights.changes == []


async def test_workers_that_are_told_one_by_one_serve_again_when_all_have_it() -> None:
    async with fleet() as f:
        await f.ask("POST", f"{DISK}?worker=decode-1", NEW)
        await f.serve_some()
        assert f.site.decodes[1].requests == []
        assert "was told other weights" in await f.why_out("decode-1")
        pairs = {pair.label: pair.state for pair in (await f.document()).pairs}
        assert pairs == {"prefill-0>decode-0": "ready", "prefill-0>decode-1": "untested"}
        await f.ask("POST", f"{DISK}?worker=decode-0", NEW)
        assert (await f.ask("GET", "/health")).status == 503
        await f.ask("POST", f"{DISK}?worker=prefill-0", NEW)
        await f.serve_some()
        assert f.site.decodes[1].requests
        assert f.mixed() == []
        assert [fake.weights.changes for fake in f.site.fakes] == [[DISK]] * 3, "nobody else repeats it"


async def test_a_worker_that_was_told_by_itself_once_is_brought_along_later() -> None:
    async with fleet() as f:
        for fake in f.site.fakes:
            await f.ask("POST", f"{DISK}?worker={fake.name}", NEW)
        failing = f.site.decodes[1]
        failing.weights.refuses = "busy"
        assert (await f.ask("POST", DISK, {**NEW, "weight_version": "v3"})).status == 400
        assert f.state("decode-1") == "suspect"
        failing.weights.refuses = ""
        await f.all_serve()
        assert failing.weights.version == "v3"


# -- the prompt tree ---------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "is_kept"), [(NEW, False), ({**NEW, "flush_cache": False}, True)])
async def test_the_prompt_tree_forgets_what_an_update_flushes(body: dict[str, Any], is_kept: bool) -> None:
    async with running_site() as site:
        await site.generate({"text": "a long prompt " * 100})
        policy = site.balancer.fleet.scheduler.policy
        assert isinstance(policy, PairCost)
        prefill = site.balancer.fleet.workers()[0].instance_id
        assert policy.tree.size_bytes(prefill) > 0
        await site.ask("POST", DISK, body)
        assert (policy.tree.size_bytes(prefill) > 0) is is_kept


# -- a balancer that did not see the update ------------------------------------------------------


async def test_servers_that_tell_different_versions_are_no_pair_even_to_a_new_balancer() -> None:
    async with fleet() as f:
        for fake in (f.site.prefill, f.site.decode):
            await fake.weights.change(DISK, msgspec.json.encode(NEW))  # by another balancer
        second = Balancer(f.site.balancer.config)
        await second.start()
        try:

            def states() -> list[str]:
                return [str(record.state) for record in second.fleet.pairs()]

            await until(lambda: states() == ["ready", "failed"], "one pair agrees")
            error = second.fleet.pairs()[1].error
            assert "prefill-0 has v2, decode-1 has default" in error
        finally:
            await second.stop()


# -- the values ----------------------------------------------------------------------------------


def change(path: str, **fields: object) -> Change:
    parsed = parse_change(path, msgspec.json.encode(fields))
    assert parsed is not None
    return parsed


def after(*changes: Change) -> Weights:
    weights = Weights()
    for each in changes:
        weights = weights.after(each)
    return weights


A, B = change(DISK, model_path="a"), change(DISK, model_path="b", weight_version="2")
POET = change("/load_lora_adapter", **LORA)
PART = change(TENSORS, weight_version="3")


def test_only_equal_histories_are_equal() -> None:
    assert after(A, B) == after(B)
    assert after(B, B) != after(B), "a checkpoint that was written anew in its place"
    assert after(A, POET, B) == after(B, POET), "adapters stay"
    assert after(PART, PART) != after(PART), "the first part is missing"
    assert after(A, PART) == after(PART)


def test_steps_repeat_what_can_be_repeated() -> None:
    renamed = change("/update_weight_version", new_version="9")
    assert [step.path for step in after(A, B, POET, renamed).steps_from(Weights())] == [
        *(DISK, "/update_weight_version", "/load_lora_adapter")
    ]
    assert after(B).steps_from(after(B, POET)) == [Change("/unload_lora_adapter", "poet")]
    assert after(POET).steps_from(after(POET)) == []
    sent = change("/load_lora_adapter_from_tensors", lora_name="x")
    for goal in (after(PART), after(A, change(TENSORS)), after(sent)):
        with pytest.raises(CannotReplay):
            goal.steps_from(Weights())


def test_a_body_that_is_no_object_changes_nothing() -> None:
    assert parse_change(DISK, b"[1") is None
