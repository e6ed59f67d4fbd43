"""OpenVINO Model Server's client, whose API is TensorFlow Serving's, over gRPC and REST."""

import json
import sys

import ovmsclient

asked = json.loads(sys.argv[1])
# Without a version it asks for the version 0, which only its own server takes for the newest.
which = {"model_name": asked["model"], "model_version": asked["version"]}
answer = {}
for name, client in (
    ("grpc", ovmsclient.make_grpc_client(asked["grpc"])),
    ("rest", ovmsclient.make_http_client(asked["rest"])),
):
    texts = client.predict({"prompt": asked["texts"]}, **which)
    try:
        client.predict({"prompt": asked["texts"]}, "nowhere", 1)
    except ovmsclient.ModelNotFoundError as caught:
        error = str(caught)
    metadata = client.get_model_metadata(**which)
    if name == "rest":  # it knows only its own server's, and gives what came
        inputs = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]
    else:
        inputs = metadata["inputs"]
    answer[name] = {
        "texts": [text.decode() if isinstance(text, bytes) else text for text in texts.tolist()],
        "error": error,
        "state": client.get_model_status(**which)[asked["version"]]["state"],
        "dtype": inputs["prompt"]["dtype"],
    }
print(json.dumps(answer))
