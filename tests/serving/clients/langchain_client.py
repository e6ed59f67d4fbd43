"""LangChain's package for OpenAI's API."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings

asked = json.loads(sys.argv[1])
where = {"base_url": asked["url"], "api_key": "none", "max_retries": 0}
messages = [(message["role"], message["content"]) for message in asked["messages"]]
model = ChatOpenAI(model="tools", temperature=0, seed=1, **where)
short = ChatOpenAI(model="tools", temperature=0, seed=1, max_tokens=20, **where)
schema = {"title": "answer", "description": "An answer.", **asked["schema"]}
tools = [{"type": "function", "function": asked["tool"]}]
called = model.bind_tools(tools, tool_choice="required").invoke(messages)
response = ChatOpenAI(model="tools", temperature=0, max_tokens=20, use_responses_api=True, **where)
# It would send ids of OpenAI's own vocabulary.
embedder = OpenAIEmbeddings(model=asked["embedder"], check_embedding_ctx_length=False, **where)
answer = {
    "text": short.invoke(messages).content,
    "streamed": "".join(chunk.content for chunk in short.stream(messages)),
    "structured": model.with_structured_output(schema, method="json_schema").invoke(messages),
    "call": [called.tool_calls[0]["name"], called.tool_calls[0]["args"]],
    "response": response.invoke(messages).text,
    "embeddings": embedder.embed_documents(["one", "two"]),
}
print(json.dumps(answer))
