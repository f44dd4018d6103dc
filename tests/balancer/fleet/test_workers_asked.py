"""What the fleet asks its workers by itself: with which key, over which scheme, and their load channel."""

from __future__ import annotations

import json

import pytest

from pdserve.balancer.fleet.roster import static_workers
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from tests.balancer.fleet.test_load_channel import Publisher, stat
from tests.support.fleet_network import D0, P0, SHAPE, Answer, Network, all_ready, loads, running_fleet, until

QUESTIONS = ("/ping", "/v1/loads", "/generate", "/model_info", "/server_info")


@pytest.mark.parametrize(
    ("keys", "plain", "control"),
    [
        ({}, b"", b""),
        ({"api_key": "a"}, b"Bearer a", b"Bearer a"),
        ({"api_key": "a", "admin_api_key": "b"}, b"Bearer a", b"Bearer b"),
        ({"api_key": "a", "admin_api_key": "b", "worker_api_key": "c"}, b"Bearer c", b"Bearer c"),
    ],
)
async def test_every_question_carries_the_key_that_sglang_asks_for(
    keys: dict[str, str], plain: bytes, control: bytes
) -> None:
    network = Network()
    network[D0].generate = Answer(500)
    async with running_fleet(
        network, prefill=(("http://prefill-0", 8998),), decode=("http://decode-0",), **keys
    ):
        asked = network[D0].authorizations
        await until(lambda: asked.keys() >= {*QUESTIONS, "/abort_request"})
    assert {path: asked[path] for path in QUESTIONS} == dict.fromkeys(QUESTIONS, plain)
    assert asked["/abort_request"] == control


def test_static_workers_may_speak_tls() -> None:
    config = BalancerConfig(prefill=(("https://a:1", 8998),), decode=("https://b", "c:3"))
    assert [info.url for info in static_workers(config)] == ["https://a:1", "https://b", "http://c:3"]
    assert static_workers(config)[0].bootstrap_host == "a"


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        static_workers(BalancerConfig(decode=("http://user:s3cret@host:1",)))
    assert "s3cret" not in str(caught.value)


async def test_load_told_between_polls_makes_room() -> None:
    publisher, network = Publisher(), Network()
    section = {"dp_size": 1, "load_endpoint_port_base": publisher.port, "load_topic": "load"}
    network[D0].server_info = Answer(200, json.dumps({"kv_events": section}).encode())
    network[D0].loads = loads(max_running_requests=2, num_running_reqs=2)
    here = D0.url.replace("decode-0", "127.0.0.1")
    network.servers[here] = network[D0]
    info = type(D0)(**{name: getattr(D0, name) for name in D0.__struct_fields__} | {"url": here})
    try:
        async with running_fleet(network, load_poll_s=60.0) as fleet:
            fleet.apply([P0, info])
            await all_ready(fleet)
            await until(lambda: fleet.table.load(D0.instance_id))
            await fleet.reserve(SHAPE, timeout_s=1)
            decode = fleet.workers()[1]
            assert decode.view.num_reqs == 3

            def is_heard() -> bool:
                publisher.say(*stat(1))
                return decode.view.num_reqs < 3

            await until(is_heard)
            await fleet.reserve(SHAPE, timeout_s=1)
    finally:
        publisher.close()


async def test_without_the_load_channel_workers_are_not_asked_for_one() -> None:
    network = Network()
    async with running_fleet(network, load_channel=False, kv_events=False) as fleet:
        fleet.apply([P0, D0])
        await all_ready(fleet)
        await until(lambda: network[D0].calls["/v1/loads"] > 3)
    assert network[D0].calls["/server_info"] == 0
