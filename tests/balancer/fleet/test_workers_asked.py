"""What the fleet asks its workers by itself: with which key, and over which scheme."""

from __future__ import annotations

import pytest

from pdserve.balancer.fleet.roster import static_workers
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from tests.support.fleet_network import D0, Answer, Network, running_fleet, until

QUESTIONS = ("/ping", "/v1/loads", "/generate", "/model_info")


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
