"""gRPC's own protocol for health checks, `grpc.health.v1`: what Kubernetes and load balancers ask.

Its package would tie grpcio and protobuf to each other's versions, for two messages of one field. On the
wire they are wrappers of protobuf: the request, the name of a service, a `StringValue`, and the answer an
`Int32Value`. `Watch` is not offered, which clients take for health.
"""

import grpc
from google.protobuf import wrappers_pb2

SERVICE = "grpc.health.v1.Health"
_SERVING = wrappers_pb2.Int32Value(value=1)
# "" is the whole server; the others as TensorFlow Serving names them.
_NAMES = ("", "ModelService", "PredictionService")


def health_handler() -> grpc.GenericRpcHandler:
    """Returns what makes a gRPC server say that it serves; one that stops takes no more questions."""

    def check(request: wrappers_pb2.StringValue, context: grpc.ServicerContext) -> wrappers_pb2.Int32Value:
        if request.value not in _NAMES:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.value}")
        return _SERVING

    handler = grpc.unary_unary_rpc_method_handler(
        check, wrappers_pb2.StringValue.FromString, wrappers_pb2.Int32Value.SerializeToString
    )
    return grpc.method_handlers_generic_handler(SERVICE, {"Check": handler})
