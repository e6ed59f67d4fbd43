"""Pydantic AI."""

import asyncio
import json
import sys

from pydantic_ai import Agent, NativeOutput, StructuredDict
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

asked = json.loads(sys.argv[1])
provider = OpenAIProvider(base_url=asked["url"], api_key="none")
model = OpenAIChatModel("tools", provider=provider)
(message,) = asked["messages"]
short = {"temperature": 0, "max_tokens": 20, "seed": 1}


async def main():
    agent = Agent(model, model_settings=short)
    text = (await agent.run(message["content"])).output
    async with agent.run_stream(message["content"]) as run:
        streamed = "".join([part async for part in run.stream_text(delta=True)])
    output = StructuredDict(asked["schema"], name="answer")
    settings = {"temperature": 0, "seed": 1, "max_tokens": 300}
    structured = await Agent(model, output_type=NativeOutput(output), model_settings=settings).run(
        message["content"]
    )
    # Its other way to structures: the answer is the call of a tool, which must be called.
    called = await Agent(
        model,
        output_type=StructuredDict(asked["tool"]["parameters"], name=asked["tool"]["name"]),
        model_settings=settings | {"parallel_tool_calls": False},
    ).run(message["content"])
    responses = OpenAIResponsesModel("tools", provider=provider)
    response = await Agent(responses, model_settings={"temperature": 0, "max_tokens": 20}).run(
        message["content"]
    )
    answer = {
        "text": text,
        "streamed": streamed,
        "structured": structured.output,
        "call": [asked["tool"]["name"], called.output],
        "response": response.output,
    }
    print(json.dumps(answer))


asyncio.run(main())
