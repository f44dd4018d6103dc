"""``pdserve balance`` in place of sglang_router.launch_router: every flag, the same defaults; and keys."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pdserve.cli.app import main
from pdserve.cli.router_flags import (
    IGNORED,
    REFUSED,
    ROUTER_DEFAULTS,
    SETTINGS,
    TRACE_ENDPOINT,
    number_of_values,
    take_router_flags,
)
from pdserve.cluster.ready import get_json
from pdserve.config.balancer import BalancerConfig
from pdserve.config.file import load_file
from pdserve.errors import ConfigError
from tests.support.balancer_client import Exchange
from tests.support.control_worker import ControlWorker
from tests.support.router_arguments import ARGUMENTS, parsed

OURS = {
    *("--host", "--port", "--policy", "--prefill-policy", "--decode-policy", "--cache-threshold", "--decode"),
    *(
        "--balance-abs-threshold",
        "--balance-rel-threshold",
        "--pd-disaggregation",
        "--prefill",
        "--log-level",
    ),
    *("--queue-size", "--api-key", "--tls-cert-path", "--tls-key-path"),
}
"""Options of ``pdserve balance`` under the same name."""

NOTE = "note: accepted without effect, see docs/balancer.md"
PAIR = ("--prefill", "http://a:1", "8998", "--decode", "http://b:2")
Balance = Callable[..., tuple[BalancerConfig | None, int, str]]


@pytest.fixture
def balance(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Balance:
    """Run ``pdserve balance`` up to where it becomes the service: its settings, exit code and stderr."""
    for name in ("PDSERVE_API_KEY", "PDSERVE_ADMIN_API_KEY", "PDSERVE_WORKER_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def call(*args: str) -> tuple[BalancerConfig | None, int, str]:
        became: list[BalancerConfig] = []

        def become(config: BalancerConfig) -> NoReturn:
            became.append(config)
            sys.exit(0)

        monkeypatch.setattr("pdserve.process.service.become_service", become)
        with pytest.raises(SystemExit) as ended:
            main(["balance", *args])
        assert isinstance(ended.value.code, int)
        return (became[0] if became else None), ended.value.code, capsys.readouterr().err

    return call


# -- the table ---------------------------------------------------------------------------------


def test_every_flag_of_the_router_is_known_with_its_number_of_values() -> None:
    theirs = parsed()
    assert len(theirs) == ARGUMENTS.count("--")
    assert set(theirs) > OURS
    expected = {name: nargs for name, nargs in theirs.items() if name not in OURS}
    names = [*SETTINGS, *REFUSED, *IGNORED]
    assert len(names) == len(set(names)), "a flag is in two tables"
    assert {name: number_of_values(name) for name in names} == expected
    fields = set(BalancerConfig.__dataclass_fields__)
    assert {flag.setting for flag in SETTINGS.values()} | set(ROUTER_DEFAULTS) <= fields


SAMPLES = {
    "--request-id-headers": ["X-A", "x-b"],
    "--max-concurrent-requests": ["-1"],
    "--retry-jitter-factor": ["0.2"],
    "--prometheus-duration-buckets": ["0.1", "0.2"],
}


@pytest.mark.slow
def test_every_flag_is_taken_or_refused_by_name(balance: Balance) -> None:
    wrong = []
    for name, nargs in parsed().items():
        if name in OURS:
            continue
        values = [] if nargs == "0" else SAMPLES.get(name, ["7"])
        for args in [[name, *values]] + ([[f"{name}={values[0]}"]] if values else []):
            config, code, err = balance("--pd-disaggregation", *args, *PAIR, "--api-key", "k")
            if name in REFUSED:
                expected = (2, f"error: {name} is not supported: {REFUSED[name][1]}\n")
            elif name in IGNORED:
                expected = (0, f"{NOTE}: {name}\n")
            else:
                expected = (0, f"{NOTE}: {name} without --enable-trace\n" if name == TRACE_ENDPOINT else "")
            pair = config and (config.prefill, config.decode)
            is_served = pair == ((("http://a:1", 8998),), ("http://b:2",))
            if (code, err) != expected or is_served == (name in REFUSED):
                wrong.append((args, code, err))
    assert not wrong


# -- settings ----------------------------------------------------------------------------------


def test_the_routers_defaults_come_with_its_mode_only(balance: Balance) -> None:
    theirs, _, _ = balance("--pd-disaggregation", *PAIR)
    assert theirs is not None
    assert (theirs.host, theirs.port, theirs.policy) == ("0.0.0.0", 30000, "cache_aware")
    assert (theirs.max_retries, theirs.queue_size, theirs.queue_timeout_s) == (5, 100, 60.0)
    assert (theirs.max_body_bytes, theirs.request_s, theirs.drain_s) == (512 * 2**20, 1800.0, 180.0)
    assert theirs.request_id_headers[:2] == ("x-request-id", "x-correlation-id")
    ours, _, _ = balance(*PAIR)
    default = BalancerConfig()
    assert ours is not None
    assert (ours.host, ours.policy, ours.queue_size) == (default.host, default.policy, default.queue_size)


def test_what_a_real_command_line_comes_to(balance: Balance) -> None:
    line = (
        "--pd-disaggregation --prefill http://a:1 8998 --prefill http://b:2 none --decode http://c:3 "
        "--host 127.0.0.1 --port 8000 --policy round_robin --prefill-policy cache_aware "
        "--cache-threshold 0.5 --balance-abs-threshold 3 --balance-rel-threshold 1.1 --max-tree-size 1000 "
        "--max-payload-size 1024 --request-timeout-secs 10 "
        "--shutdown-grace-period-secs 1 --queue-size 7 --max-concurrent-requests 64 "
        "--queue-timeout-secs 3 --retry-max-retries 4 --cb-failure-threshold 2 "
        "--request-id-headers X-Mine x-yours --log-level warn --tls-cert-path c.pem --tls-key-path k.pem"
    )
    config, _, err = balance(*line.split())
    assert err == ""
    assert config == BalancerConfig(
        host="127.0.0.1",
        port=8000,
        prefill=(("http://a:1", 8998), ("http://b:2", None)),
        decode=("http://c:3",),
        policy="round_robin",
        prefill_policy="cache_aware",
        cache_threshold=0.5,
        balance_abs_threshold=3,
        balance_rel_threshold=1.1,
        max_tree_size=1000,
        max_body_bytes=1024,
        request_s=10.0,
        drain_s=1.0,
        queue_size=7,
        max_concurrent_requests=64,
        queue_timeout_s=3.0,
        max_retries=4,
        breaker_failures=2,
        request_id_headers=("x-mine", "x-yours"),
        log_level="warning",
        tls_cert_path="c.pem",
        tls_key_path="k.pem",
    )


def test_switches_with_a_meaning(balance: Balance) -> None:
    config, _, _ = balance("--disable-retries", "--max-concurrent-requests", "-1", *PAIR)
    assert config is not None
    assert (config.max_retries, config.max_concurrent_requests) == (0, 0)


def test_our_own_options(balance: Balance) -> None:
    config, _, err = balance(
        *(
            "--worker-hosts",
            "10.0.0.0/8",
            "--worker-hosts",
            "node-1",
            "--queue-timeout",
            "2.5",
            "--max-retries",
            "1",
        ),
        *("--max-body-bytes", "9", "--log-requests", "--decode-policy", "random", "--bootstrap", "h:1"),
    )
    assert (config, err) == (
        BalancerConfig(
            worker_hosts=("10.0.0.0/8", "node-1"),
            queue_timeout_s=2.5,
            max_retries=1,
            max_body_bytes=9,
            log_requests=True,
            decode_policy="random",
            bootstrap_url="http://h:1",
        ),
        "",
    )


# -- notes and mistakes ------------------------------------------------------------------------


def test_all_flags_without_effect_are_one_line_and_no_value_is_shown(balance: Balance) -> None:
    secret = "postgres://user:secret@db"
    args = ("--postgres-db-url", secret, "--health-check-interval-secs", "5", "--disable-health-check")
    _, code, err = balance(*args, *args, *PAIR)
    assert (code, err.count("\n")) == (0, 1)
    assert "secret" not in err
    assert err == f"{NOTE}: --postgres-db-url, --health-check-interval-secs, --disable-health-check\n"


def test_a_mistake_is_one_line(balance: Balance) -> None:
    mistakes = [
        (["--queue-timeout-secs", "soon"], "--queue-timeout-secs takes a number, got 'soon'"),
        (["--max-tree-size"], "--max-tree-size needs a value"),
        (["--prefill-selector", "--queue-size", "1"], "--prefill-selector needs a value"),
        (["--service-discovery"], "POST /workers"),
        (["--worker-urls", "http://a:1", "http://b:1"], "give --prefill and --decode"),
        (["--policy", "manual"], "unknown policy 'manual'"),
        (["--decode-policy", "best"], "unknown policy 'best'"),
        (["--worker-hosts", "10.0.0.0/40"], "worker_hosts takes names, addresses and networks"),
        (["--tls-cert-path", "c.pem"], "--tls-key-path"),
        (["--nonsense"], "No such option: --nonsense"),
        (["--prefill", "http://a:1", "0"], "1..65535 or none"),
        (["--control-plane-api-keys", "id:name:admin:hush"], "PDSERVE_ADMIN_API_KEY"),
        (["--log-level", "loud"], "log_level must be one of debug, info, warning, error, got 'loud'"),
    ]
    wrong = []
    for args, said in mistakes:
        config, code, err = balance(*PAIR, *args)
        is_one_line = (config, code, err.count("\n")) == (None, 2, 1) and err.startswith("error: ")
        if not is_one_line or said not in err or "hush" in err:
            wrong.append((args, config, code, err))
    assert not wrong


def test_what_asks_for_nothing_is_neither_noted_nor_refused(balance: Balance) -> None:
    _, code, err = balance("--worker-urls", "--backend", "sglang", *PAIR)
    assert (code, err) == (0, "")


def test_values_end_where_argparse_ends_them() -> None:
    rest, options = take_router_flags(
        ["balance", "--request-id-headers", "a", "b", "--port", "1", "--selector", "a=b", "c=d", "--mini-lb"]
    )
    assert rest == ["balance", "--port", "1"]
    assert options.settings == {"request_id_headers": ("a", "b")}
    assert options.ignored == ["--selector", "--mini-lb"]
    with pytest.raises(ConfigError, match="needs a value"):
        take_router_flags(["--log-dir", "--mini-lb"])


def test_traces_go_where_the_routers_flags_say_by_http(balance: Balance) -> None:
    cases = [
        (["--enable-trace"], "http://localhost:4318"),
        (["--otlp-traces-endpoint", "otel:4317", "--enable-trace"], "http://otel:4318"),
        (["--enable-trace", "--otlp-traces-endpoint=otel:4400"], "http://otel:4400"),
        (["--enable-trace", "--otlp-traces-endpoint", "https://otel:4317/"], "https://otel:4318"),
        (["--otlp-traces-endpoint", "otel:4317"], ""),
        (["--otlp-endpoint", "http://b:4318", "--otlp-sample", "0.1"], "http://b:4318"),
    ]
    wrong = []
    for args, endpoint in cases:
        config, code, _ = balance(*PAIR, *args)
        assert config is not None and code == 0
        expected = (endpoint, 0.1 if "--otlp-sample" in args else 1.0)
        if (config.otlp_endpoint, config.otlp_sample) != expected:
            wrong.append((args, config.otlp_endpoint, config.otlp_sample))
    assert not wrong


def test_it_starts_without_workers_and_says_how_they_come(balance: Balance) -> None:
    for args in ((), ("--pd-disaggregation", "--host", "127.0.0.1")):
        config, code, err = balance(*args)
        assert (config is not None, code, err.count("\n")) == (True, 0, 1)
        assert "POST /workers" in err


def test_control_routes_open_to_a_network_are_pointed_out(balance: Balance) -> None:
    assert "PDSERVE_ADMIN_API_KEY" in balance("--host", "0.0.0.0", *PAIR)[2]
    assert balance("--host", "0.0.0.0", "--admin-api-key", "k", *PAIR)[2] == ""
    assert balance("--host", "127.0.0.1", *PAIR)[2] == ""


# -- keys --------------------------------------------------------------------------------------


def test_keys_come_from_file_environment_and_options_in_that_order(
    balance: Balance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "b.toml"
    file.write_text('[balancer]\napi_key = "f1"\nadmin_api_key = "f2"\nworker_api_key = "f3"\n')
    assert load_file(file).balancer["api_key"] == "f1"
    monkeypatch.setenv("PDSERVE_ADMIN_API_KEY", "e2")
    monkeypatch.setenv("PDSERVE_WORKER_API_KEY", "e3")
    config, _, err = balance("--config", str(file), "--worker-api-key", "o3", *PAIR)
    assert config is not None
    assert (config.api_key, config.admin_api_key, config.worker_api_key) == ("f1", "e2", "o3")
    assert err == ""


@pytest.mark.process
def test_launch_gives_its_children_keys_by_environment_only(tmp_path: Path) -> None:
    """The plan that is printed has every command line; the keys are in none of them."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    code = (
        "import atexit, os, sys\n"
        "from pdserve.cli.app import main\n"
        "names = ('PDSERVE_API_KEY', 'PDSERVE_ADMIN_API_KEY')\n"
        "atexit.register(lambda: print([os.environ.get(name) for name in names], file=sys.stderr))\n"
        "main(sys.argv[1:])"
    )
    keys = ("--api-key", "hush-1", "--admin-api-key", "hush-2")
    args = ("launch", str(model), "--dry-run", "--device", "cpu", "--port", "0", *keys)
    environ: dict[str, Any] = {k: v for k, v in os.environ.items() if not k.startswith("PDSERVE_")}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert "hush" not in done.stdout
    assert json.loads(done.stderr.splitlines()[-1].replace("'", '"')) == ["hush-1", "hush-2"]


async def test_the_launcher_asks_its_balancer_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ControlWorker() as worker:
        worker.tell("/pdserve/state", {"pairs": []})
        for name, value in (("PDSERVE_API_KEY", "one"), ("PDSERVE_ADMIN_API_KEY", "two")):
            monkeypatch.setenv(name, value)
            assert await get_json(worker.url + "/pdserve/state") == {"pairs": []}
            assert worker.seen[-1].headers["authorization"] == f"Bearer {value}"


@pytest.mark.process
async def test_a_running_balancer_shows_its_key_to_nobody() -> None:
    """Started without workers, by its key's option: after a moment no command line holds the key any more."""
    args = ("balance", "--pd-disaggregation", "--host", "127.0.0.1", "--port", "0", "--admin-api-key", "hush")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pdserve", *args), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        said = b""
        async with asyncio.timeout(60):
            while b"listening on" not in said:
                said = await process.stderr.readline()
                assert b"hush" not in said
        url = said.decode().split(" on ")[1].strip()
        assert b"hush" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        async with ControlWorker() as worker:
            body = {"url": worker.url, "worker_type": "decode"}
            for headers, status in (({}, 401), ({"authorization": "Bearer hush"}, 202)):
                async with Exchange(url, "POST", "/workers", body, **headers) as exchange:
                    assert (await exchange.reply()).status == status
            async with Exchange(url, "GET", "/pdserve/state", authorization="Bearer hush") as exchange:
                reply = await exchange.reply()
        assert (reply.status, b"hush" in reply.body) == (200, False)
        assert [row["url"] for row in reply.json["workers"]] == [worker.url]
    finally:
        process.send_signal(signal.SIGINT)
        await process.communicate()
    assert process.returncode == 0
