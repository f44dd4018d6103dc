"""Clients that know nothing of us, unchanged, against real engines: openai, anthropic, SGLang's own.

litellm and langchain, which are built on the first two, are in test_client_frameworks.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import anthropic
import openai
import pytest

from tests.engine.fleet import Fleet, call

pytestmark = pytest.mark.engine
MODEL = "any-name"
"""SGLang looks at the name on /v1/responses only."""
BENCH_S = 240.0
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
YES_OR_NO = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def _ask(client: openai.OpenAI, text: str, **fields: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(  # type: ignore[call-overload,no-any-return]
        model=MODEL, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=10, **fields
    )


# -- openai ------------------------------------------------------------------------------------


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = _ask(client, "What is the capital of France?")
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.content or "") == 10
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 10


def test_openai_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = _ask(client, "Tell me a story.")
    chunks = list(_ask(client, "Tell me a story.", stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 2
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"


def test_openai_three_samples_count_their_prompt_once(client: openai.OpenAI) -> None:
    one, three = _ask(client, "Three times"), _ask(client, "Three times", n=3)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert {choice.message.content for choice in three.choices} == {one.choices[0].message.content}
    assert one.usage is not None
    assert three.usage is not None
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 30


def test_openai_three_samples_streamed(client: openai.OpenAI) -> None:
    chunks = list(_ask(client, "Three more", n=3, stream=True, stream_options={"include_usage": True}))
    texts = ["", "", ""]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
    assert texts == [_ask(client, "Three more").choices[0].message.content] * 3
    assert chunks[-1].usage.completion_tokens == 30


def test_openai_samples_differ_when_they_may(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Be creative"}],
        temperature=2.0,
        max_tokens=20,
        n=3,
    )
    assert len({choice.message.content for choice in answer.choices}) == 3


def test_openai_logprobs(client: openai.OpenAI) -> None:
    choice = _ask(client, "Logprobs, please", logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert "".join(token.token for token in tokens) == choice.message.content
    assert all(
        len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in tokens
    )


def test_openai_completions_of_many_prompts(client: openai.OpenAI) -> None:
    prompts = ["Once upon", "a time there was", "nothing at all to tell"]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=5, n=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text[:-5] for choice in answer.choices] == [prompt for prompt in prompts for _ in range(2)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))  # a token is a letter


def test_openai_completion_echoes_the_prompts_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="How likely is this?", temperature=0, max_tokens=4, echo=True, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == answer.choices[0].text
    assert len(logprobs.token_logprobs or []) == len("How likely is this?") + 4


def test_openai_responses(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    fields = {"model": model, "input": "Respond!", "temperature": 0, "max_output_tokens": 8}
    whole = client.responses.create(**fields)  # type: ignore[call-overload]
    assert len(whole.output_text) == whole.usage.output_tokens > 2
    events = list(client.responses.create(**fields, stream=True))  # type: ignore[call-overload]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert events[-1].type in ("response.completed", "response.incomplete")
    with pytest.raises(openai.BadRequestError, match="storage is unavailable in PD mode"):
        client.responses.retrieve(whole.id)


def test_openai_lists_models(client: openai.OpenAI) -> None:
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name


def test_openai_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context length"):
        _ask(client, "x" * 5000)
    with pytest.raises(openai.BadRequestError, match=r"[Mm]essages"):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.BadRequestError, match="context length"):
        list(_ask(client, "x" * 5000, stream=True))
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")
    with pytest.raises(openai.InternalServerError, match="embedding") as failure:
        client.embeddings.create(model=MODEL, input="embed me")
    assert failure.value.status_code == 501


def test_openai_many_at_once(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda index: _ask(client, f"Number {index}"), range(32)))
    assert len({answer.id for answer in answers}) == 32
    assert all(len(answer.choices[0].message.content or "") == 10 for answer in answers)


def test_openai_answer_follows_its_schema(client: openai.OpenAI) -> None:
    fields = {"response_format": YES_OR_NO, "max_tokens": 12}
    messages = [{"role": "user", "content": "Is it raining?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **fields)  # type: ignore[call-overload]
    assert whole.choices[0].message.content in ("true", "false")
    assert whole.choices[0].finish_reason == "stop"


def test_openai_tools_are_taken_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = _ask(client, "What is the weather in Paris?", tools=[WEATHER])
    assert len(whole.choices[0].message.content or "") == 10
    bare = _ask(client, "What is the weather in Paris?", tools=[WEATHER], tool_choice="none")
    assert bare.usage is not None
    chunks = list(_ask(client, "What is the weather in Paris?", tools=[WEATHER], stream=True))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError):
        _ask(client, "x", tools=[{"type": "function", "function": {"name": 5}}])


def test_openai_stream_as_a_string_is_a_stream(client: openai.OpenAI) -> None:
    """As programs in other languages spell it; the SDK itself sends a boolean."""
    response = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=3, extra_body={"stream": "true"}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


def test_openai_stream_that_is_closed_leaves_nothing_running(client: openai.OpenAI, fleet: Fleet) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a long story"}], max_tokens=3000, stream=True
    )
    next(iter(stream))
    assert fleet.state()["requests"]["inflight"] >= 1
    stream.close()
    fleet.wait_empty(60)
    assert fleet.state()["requests"]["inflight"] == 0


def test_openai_aborted_by_the_id_of_its_answer(client: openai.OpenAI, fleet: Fleet) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a long story"}], max_tokens=3000, stream=True
    )
    chunks = iter(stream)
    assert call(fleet.url, "POST", "/abort_request", {"rid": next(chunks).id})[0] == 200
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons[-1] == "abort"
    fleet.wait_empty(60)


async def test_async_openai_eight_at_once(fleet: Fleet) -> None:
    async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0) as client:

        async def ask(number: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"Number {number}"}], max_tokens=12,
                temperature=0, stream=True,
            )  # fmt: skip
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

        texts = await asyncio.gather(*(ask(number) for number in range(8)))
        again = await asyncio.gather(*(ask(number) for number in range(8)))
    assert {len(text) for text in texts} == {12}
    assert texts == again


# -- anthropic ---------------------------------------------------------------------------------


def test_anthropic_messages(fleet: Fleet) -> None:
    with anthropic.Anthropic(base_url=fleet.url, api_key="unused", max_retries=0, timeout=60) as client:
        messages = [{"role": "user", "content": "Hello, you"}]
        fields = {"model": MODEL, "max_tokens": 8, "messages": messages, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**fields)  # type: ignore[call-overload]
        assert len(whole.content[0].text) == 8
        assert whole.stop_reason == "max_tokens"
        with client.messages.stream(**fields) as stream:  # type: ignore[arg-type]
            assert "".join(stream.text_stream) == whole.content[0].text
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(**{**fields, "max_tokens": 0})  # type: ignore[call-overload]


def test_anthropic_tools_usage_and_the_end_of_a_stream(fleet: Fleet) -> None:
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}  # type: ignore[index]
    with anthropic.Anthropic(base_url=fleet.url, api_key="unused", max_retries=0, timeout=60) as client:
        fields = {"model": MODEL, "max_tokens": 8, "system": "Be brief.", "tools": [tool]}
        fields["messages"] = [{"role": "user", "content": "Hello, you"}]
        whole = client.messages.create(**fields)  # type: ignore[call-overload]
        assert (whole.usage.output_tokens, whole.stop_reason) == (8, "max_tokens")
        assert whole.usage.input_tokens > len("Be brief.Hello, you")
        with client.messages.stream(**fields) as stream:  # type: ignore[arg-type]
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        assert (final.usage.output_tokens, final.stop_reason) == (8, "max_tokens")
        with pytest.raises(anthropic.BadRequestError, match="context length"):
            client.messages.create(**{**fields, "messages": [{"role": "user", "content": "x" * 5000}]})  # type: ignore[call-overload]
        with pytest.raises(anthropic.NotFoundError):
            client.post("/v1/complete", cast_to=object, body={})


def test_anthropic_stream_that_is_closed_leaves_nothing_running(fleet: Fleet) -> None:
    with anthropic.Anthropic(base_url=fleet.url, api_key="unused", max_retries=0, timeout=60) as client:
        messages = [{"role": "user", "content": "a long story"}]
        with client.messages.stream(model=MODEL, max_tokens=3000, messages=messages) as stream:  # type: ignore[arg-type]
            next(stream.text_stream)
    fleet.wait_empty(60)
    assert fleet.state()["requests"]["inflight"] == 0


# -- SGLang's own ------------------------------------------------------------------------------


def _bench(fleet: Fleet, model: Path, backend: str, output: Path, *flags: str) -> subprocess.Popen[str]:
    address = urlsplit(fleet.url)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", backend]
    command += ["--host", str(address.hostname), "--port", str(address.port), "--model", str(model)]
    command += ["--num-prompts", "24", "--max-concurrency", "8", "--disable-tqdm"]
    command += ["--output-file", str(output), "--output-details", *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_bench_serving_has_no_failed_request(fleet: Fleet, tiny_model: Path, tmp_path: Path) -> None:
    lengths = ["--random-input-len", "40", "--random-output-len", "12", "--random-range-ratio", "0.5"]
    groups = ["--gsp-num-groups", "4", "--gsp-prompts-per-group", "6", "--gsp-system-prompt-len", "64"]
    groups += ["--gsp-question-len", "16", "--gsp-output-len", "8"]
    runs = {
        "sglang": ["--dataset-name", "random-ids", *lengths],
        "sglang-oai-chat": ["--dataset-name", "generated-shared-prefix", *groups],
    }
    started = {name: _bench(fleet, tiny_model, name, tmp_path / name, *flags) for name, flags in runs.items()}
    try:
        for name, process in started.items():
            log, _ = process.communicate(timeout=BENCH_S)
            assert process.returncode == 0, log[-3000:]
            result = json.loads((tmp_path / name).read_text().splitlines()[-1])
            assert result["completed"] == 24, (name, result["errors"], log[-3000:])
            assert not any(result["errors"]), name
            assert all(result["output_lens"]), name
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_runtime_endpoint_generates_selects_and_streams(fleet: Fleet) -> None:
    import sglang as sgl

    backend = sgl.RuntimeEndpoint(fleet.url)

    @sgl.function
    def story(s, start):  # type: ignore[no-untyped-def]
        s += start + sgl.gen("first", max_tokens=6, temperature=0)
        s += " and " + sgl.gen(
            "second", max_tokens=4, temperature=0, return_logprob=True, logprob_start_len=0
        )
        s += " so " + sgl.select("choice", ["never", "always", "now and then"], temperature=0)

    state = story.run(start="Once upon a time", backend=backend)
    assert len(state["first"]) == 6
    assert len(state["second"]) == 4
    prompt = f"Once upon a time{state['first']} and "
    logprobs = state.get_meta_info("second")["input_token_logprobs"]
    assert [entry[1] for entry in logprobs] == list(prompt.encode())
    scores = state.get_meta_info("choice")["normalized_prompt_logprobs"]
    choices = ["never", "always", "now and then"]
    assert state["choice"] == choices[scores.index(max(scores))]
    assert len(set(scores)) == 3

    streamed = story.run(start="Once upon a time", backend=backend, stream=True)
    assert "".join(streamed.text_iter()).endswith(state["choice"])
    assert streamed["second"] == state["second"]
    several = story.run_batch([{"start": "a"}, {"start": "b"}], backend=backend, num_threads=2)
    assert [len(one["first"]) for one in several] == [6, 6]
    backend.flush_cache()
    assert backend.get_server_info()
