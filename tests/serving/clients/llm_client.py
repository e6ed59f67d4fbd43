"""Simon Willison's `llm`, which takes other servers from a file of its own."""

import json
import os
import pathlib
import sys
import tempfile

asked = json.loads(sys.argv[1])
folder = tempfile.mkdtemp()
os.environ["LLM_USER_PATH"] = folder
entry = {
    "model_id": "here", "model_name": "tools", "api_base": asked["url"], "api_key_name": "here",
    "supports_schema": True, "supports_tools": True,
}  # fmt: skip
pathlib.Path(folder, "extra-openai-models.yaml").write_text(json.dumps([entry]))
pathlib.Path(folder, "keys.json").write_text(json.dumps({"here": "none"}))

import llm  # noqa: E402

model = llm.get_model("here")
(message,) = asked["messages"]
options = {"temperature": 0, "seed": 1}
structured = model.prompt(message["content"], schema=asked["schema"], **options, max_tokens=300)
answer = {
    "text": model.prompt(message["content"], **options, max_tokens=20, stream=False).text(),
    "streamed": "".join(model.prompt(message["content"], **options, max_tokens=20)),
    "structured": json.loads(structured.text()),
}
print(json.dumps(answer))
