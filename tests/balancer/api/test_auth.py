"""Keys: who may ask what, and that no key shows anywhere."""

from __future__ import annotations

import logging

import pytest

from pdserve.balancer.api.auth import Access, KeyRing
from pdserve.config.balancer import BalancerConfig
from tests.support.balancer_client import running_site

PLAIN = {"text": "a"}


@pytest.mark.parametrize(
    ("api_key", "admin_key", "given", "client_may", "admin_may"),
    [
        ("", "", b"", True, True),
        ("k", "", b"", False, False),
        ("k", "", b"Bearer k", True, True),
        ("k", "", b"bearer k", True, True),
        ("k", "", b"Bearer  k", False, False),
        ("k", "", b"Basic k", False, False),
        ("k", "", b"k", False, False),
        ("k", "", b"Bearer \xff", False, False),
        ("k", "a", b"Bearer k", True, False),
        ("k", "a", b"Bearer a", False, True),
        ("", "a", b"", True, False),
        ("", "a", b"Bearer a", True, True),
    ],
)
def test_keys_open_what_sglang_says_they_open(
    api_key: str, admin_key: str, given: bytes, client_may: bool, admin_may: bool
) -> None:
    config = BalancerConfig(api_key=api_key, admin_api_key=admin_key)
    ring = KeyRing(config.api_key, config.control_key)
    headers = {b"authorization": given} if given else {}
    assert (ring.refuse(Access.CLIENT, headers) is None) is client_may
    assert (ring.refuse(Access.ADMIN, headers) is None) is admin_may
    assert ring.refuse(Access.PUBLIC, headers) is None


def test_anthropics_header_opens_client_routes_only() -> None:
    ring = KeyRing("k", "k")
    assert ring.refuse(Access.CLIENT, {b"x-api-key": b"k"}) is None
    assert ring.refuse(Access.ADMIN, {b"x-api-key": b"k"}) is not None


async def test_without_its_key_nobody_is_served_and_no_worker_is_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    keys = {"api_key": "client-secret", "admin_api_key": "admin-secret", "worker_api_key": "worker-secret"}
    async with running_site(**keys) as site:
        refused = await site.generate(PLAIN)
        assert (refused.status, refused.json) == (401, {"error": "Unauthorized"})
        assert site.decode.requests == site.prefill.requests == []
        assert (await site.ask("GET", "/health")).status == 200
        assert (await site.ask("GET", "/pdserve/state")).status == 401
        assert (await site.ask("POST", "/flush_cache", authorization="Bearer client-secret")).status == 401
        served = await site.generate(PLAIN, authorization="Bearer client-secret")
        assert served.status == 200
        assert site.decode.headers[-1]["authorization"] == "Bearer worker-secret"
        state = await site.ask("GET", "/pdserve/state", authorization="Bearer admin-secret")
        assert state.status == 200
        shown = state.body.decode() + caplog.text
    assert not [key for key in keys.values() if key in shown]


async def test_a_clients_key_goes_on_to_workers_that_share_it() -> None:
    async with running_site(api_key="k") as site:
        assert (await site.generate(PLAIN, authorization="Bearer k")).status == 200
        assert (
            site.decode.headers[-1]["authorization"]
            == site.prefill.headers[-1]["authorization"]
            == "Bearer k"
        )


async def test_only_harmless_headers_reach_the_workers() -> None:
    async with running_site() as site:
        sent = {
            "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "x_smg_routing_key": "user-1",
            "x_request_id": "mine",
            "x_override_bootstrap_room": "1",
            "x_forwarded_for": "1.2.3.4",
            "cookie": "secret",
        }
        reply = await site.generate(PLAIN, **sent)
        for fake in (site.prefill, site.decode):
            got = fake.headers[-1]
            assert got["traceparent"] == sent["traceparent"]
            assert (got["x-smg-routing-key"], got["x-request-id"]) == ("user-1", "mine")
            assert not {"x-override-bootstrap-room", "x-forwarded-for", "cookie"} & set(got)
        assert reply.headers["x-request-id"] == "mine"
