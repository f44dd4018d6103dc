"""litellm and langchain against real engines: what programs use that do not call an SDK themselves."""

from __future__ import annotations

import asyncio
import os
from types import ModuleType
from typing import Any

import anthropic
import openai
import pytest

from tests.engine.fleet import Fleet
from tests.engine.test_clients import MODEL, WEATHER, YES_OR_NO

pytestmark = pytest.mark.engine
QUESTION = "What is the capital of France?"
TOO_LONG = "x" * 5000
MESSAGES = [{"role": "user", "content": QUESTION}]


# -- litellm -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    """The package, told not to fetch its price list."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm as package

    package.suppress_debug_info = True
    return package


def _at(fleet: Fleet, **more: Any) -> dict[str, Any]:
    target = {"model": f"openai/{MODEL}", "api_base": f"{fleet.url}/v1", "api_key": "unused"}
    return {**target, "temperature": 0, "max_tokens": 10, "num_retries": 0, "timeout": 60, **more}


def test_litellm_chat_whole_and_streamed(litellm: ModuleType, fleet: Fleet) -> None:
    whole = litellm.completion(messages=MESSAGES, **_at(fleet))
    text = whole.choices[0].message.content
    assert (len(text), whole.choices[0].finish_reason, whole.usage.completion_tokens) == (10, "length", 10)
    chunks = list(
        litellm.completion(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **_at(fleet)
        )
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == text
    assert chunks[-1].usage.completion_tokens == 10


def test_litellm_schema_and_tools(litellm: ModuleType, fleet: Fleet) -> None:
    answer = litellm.completion(messages=MESSAGES, response_format=YES_OR_NO, **_at(fleet, max_tokens=12))
    assert answer.choices[0].message.content in ("true", "false")
    answer = litellm.completion(messages=MESSAGES, tools=[WEATHER], **_at(fleet))
    assert len(answer.choices[0].message.content) == 10


def test_litellm_errors_have_their_classes(litellm: ModuleType, fleet: Fleet) -> None:
    with pytest.raises(litellm.BadRequestError, match="context length"):
        litellm.completion(messages=[{"role": "user", "content": TOO_LONG}], **_at(fleet))
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=[{"role": "nobody"}], **_at(fleet))
    with pytest.raises(openai.APIError, match="embeddings are not served"):
        litellm.embedding(f"openai/{MODEL}", input=["x"], api_base=f"{fleet.url}/v1", api_key="unused")


def test_litellm_speaks_anthropic_too(litellm: ModuleType, fleet: Fleet) -> None:
    target = _at(fleet, model=f"anthropic/{MODEL}", api_base=fleet.url)
    whole = litellm.completion(messages=MESSAGES, **target)
    assert whole.usage.completion_tokens == 10
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **target))
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


async def test_litellm_eight_at_once(litellm: ModuleType, fleet: Fleet) -> None:
    asked = [[{"role": "user", "content": f"Number {number}"}] for number in range(8)]
    answers = await asyncio.gather(*(litellm.acompletion(messages=each, **_at(fleet)) for each in asked))
    assert {len(answer.choices[0].message.content) for answer in answers} == {10}
    assert len({answer.id for answer in answers}) == 8


# -- langchain ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(fleet: Fleet) -> Any:
    """langchain's model over the OpenAI route."""
    os.environ["LANGSMITH_TRACING"] = "false"
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL, base_url=f"{fleet.url}/v1", api_key="unused", temperature=0, max_tokens=10,
        max_retries=0, timeout=60,
    )  # fmt: skip


def test_langchain_invokes_and_streams(chat: Any) -> None:
    whole = chat.invoke(QUESTION)
    assert (len(whole.content), whole.usage_metadata["output_tokens"]) == (10, 10)
    assert whole.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    total = sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)
    assert total == 10


def test_langchain_tools_and_schema(chat: Any) -> None:
    assert len(chat.bind_tools([WEATHER]).invoke(QUESTION).content) == 10
    answer = chat.bind(response_format=YES_OR_NO, max_tokens=12).invoke(QUESTION)
    assert answer.content in ("true", "false")


def test_langchain_batches_and_waits(chat: Any) -> None:
    answers = chat.batch([f"Number {number}" for number in range(8)])
    assert {len(answer.content) for answer in answers} == {10}
    again = asyncio.run(chat.abatch([f"Number {number}" for number in range(8)]))
    assert [answer.content for answer in again] == [answer.content for answer in answers]


def test_langchain_passes_errors_on(chat: Any, fleet: Fleet) -> None:
    from langchain_openai import OpenAIEmbeddings

    with pytest.raises(openai.BadRequestError, match="context length"):
        chat.invoke(TOO_LONG)
    embeddings = OpenAIEmbeddings(
        model=MODEL, base_url=f"{fleet.url}/v1", api_key="unused", max_retries=0,
        check_embedding_ctx_length=False,
    )  # fmt: skip
    with pytest.raises(openai.InternalServerError, match="embeddings are not served"):
        embeddings.embed_query("x")


def test_langchain_speaks_anthropic_too(fleet: Fleet) -> None:
    from langchain_anthropic import ChatAnthropic

    model = ChatAnthropic(
        model_name=MODEL, base_url=fleet.url, api_key="unused", max_tokens_to_sample=10, max_retries=0,
        temperature=0, timeout=60, stop=None,
    )  # fmt: skip
    whole = model.invoke(QUESTION)
    assert (len(whole.content), whole.usage_metadata["output_tokens"]) == (10, 10)  # type: ignore[index]
    assert "".join(str(chunk.text) for chunk in model.stream(QUESTION)) == whole.content
    with pytest.raises(anthropic.BadRequestError, match="context length"):
        model.invoke(TOO_LONG)
