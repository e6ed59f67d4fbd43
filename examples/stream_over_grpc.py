"""Streams a text from a running server over gRPC, with the messages of tensorflow-serving-api.

python examples/stream_over_grpc.py localhost:8500 my_model "Once upon a time"
"""

import sys

import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

address, model, prompt = sys.argv[1:]
request = predict_pb2.PredictRequest()
request.model_spec.name = model
for name, value in {"prompt": prompt, "max_new_tokens": 8, "temperature": 0.0}.items():
    request.inputs[name].CopyFrom(tf.make_tensor_proto(value))

with grpc.insecure_channel(address) as channel:
    stream = channel.unary_stream(
        "/kerasllm.serving.GenerationService/PredictStreamed",
        request_serializer=predict_pb2.PredictRequest.SerializeToString,
        response_deserializer=predict_pb2.PredictResponse.FromString,
    )
    for response in stream(request, timeout=60):  # `cancel()` of what this returns ends it before
        print(response.outputs["text"].string_val[0].decode(), end="", flush=True)
print()
