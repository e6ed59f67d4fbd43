"""LiteLLM."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for one on the net
import litellm  # noqa: E402

asked = json.loads(sys.argv[1])
where = {"api_base": asked["url"], "api_key": "none", "num_retries": 0}
options = {"model": "openai/tools", "messages": asked["messages"], "seed": 1, "temperature": 0, **where}

chat = litellm.completion(**options, max_tokens=20)
chunks = list(litellm.completion(**options, max_tokens=20, stream=True))
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": asked["schema"], "strict": True}}
structured = litellm.completion(**options, response_format=form)
tools = [{"type": "function", "function": asked["tool"]}]
called = litellm.completion(**options, tools=tools, tool_choice="required")
call = called.choices[0].message.tool_calls[0].function
embedded = litellm.embedding(model=f"openai/{asked['embedder']}", input=["one", "two"], **where)
answer = {
    "text": chat.choices[0].message.content,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    "structured": json.loads(structured.choices[0].message.content),
    "call": [call.name, json.loads(call.arguments)],
    "embeddings": [entry["embedding"] for entry in embedded.data],
}
print(json.dumps(answer))
