"""gRPC's own protocol for health checks, `grpc.health.v1`: what Kubernetes and load balancers ask.

Its package would tie grpcio and protobuf to each other's versions, for two messages of one field. On the
wire they are wrappers of protobuf: the request, the name of a service, a `StringValue`, and the answer an
`Int32Value`. `Watch` is not offered, which clients take for health.
"""

import grpc
from google.protobuf import wrappers_pb2

SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING = 1, 2
# "" is the whole server; the others as TensorFlow Serving names them.
_SERVICES = ("", "ModelService", "PredictionService")


class HealthCheck:
    """Says that the server serves, until it is stopped."""

    def __init__(self) -> None:
        self._status = SERVING

    def stop(self) -> None:
        """Says from now on that it does not."""
        self._status = NOT_SERVING

    def handler(self) -> grpc.GenericRpcHandler:
        """Returns what is added to a gRPC server."""
        check = grpc.unary_unary_rpc_method_handler(
            self._check, wrappers_pb2.StringValue.FromString, wrappers_pb2.Int32Value.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check})

    def _check(
        self, request: wrappers_pb2.StringValue, context: grpc.ServicerContext
    ) -> wrappers_pb2.Int32Value:
        if request.value not in _SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.value}")
        return wrappers_pb2.Int32Value(value=self._status)
