"""Encryption of both ports."""

import dataclasses
import ssl
from pathlib import Path
from typing import Any

import grpc

from kerasllm_serving.config_files import read_config
from kerasllm_serving.errors import StartupError

_FLAG = "--ssl_config_file"


def read_grpc_credentials(path: Path) -> grpc.ServerCredentials:
    """Reads an `SSLConfig`, which holds keys and certificates themselves, as PEM.

    Args:
        path: The file, in text format.

    Returns:
        What a gRPC server listens with.

    Raises:
        StartupError: If it is no such file, or says too little.
    """
    config = read_config(path, "SSLConfig", _FLAG)
    if not (config.server_key and config.server_cert):
        raise StartupError(f"`{_FLAG}` must have `server_key` and `server_cert`. Received: {path}")
    if config.client_verify and not config.custom_ca:
        raise StartupError(
            f"`{_FLAG}` with `client_verify` must have `custom_ca`, whose certificates clients bring. "
            f"Received: {path}"
        )
    for name in ("server_key", "server_cert", "custom_ca"):
        # gRPC says of a broken one that the port cannot be bound.
        if getattr(config, name) and "-----BEGIN " not in getattr(config, name):
            raise StartupError(f"`{name}` in `{_FLAG}` must be PEM. Received: {path}")
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        config.custom_ca.encode() or None,
        config.client_verify,
    )


@dataclasses.dataclass(frozen=True)
class RestTls:
    """Files of keys and certificates, as PEM.

    Args:
        certificate: The server's certificate, and those that it was signed with.
        key: Its key; None: it is in the file of the certificate.
        client_authority: Clients must bring a certificate signed with one of these; None: they need none.
    """

    certificate: Path
    key: Path | None = None
    client_authority: Path | None = None

    def uvicorn_options(self) -> dict[str, Any]:
        """Returns the arguments of `uvicorn.Config`.

        Raises:
            StartupError: If a file cannot be read, or key and certificate are no pair.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
            if self.client_authority:
                context.load_verify_locations(self.client_authority)
        except OSError as error:  # those of ssl are
            files = (self.certificate, self.key, self.client_authority)
            raise StartupError(
                "`--rest_api_ssl_certfile`, `--rest_api_ssl_keyfile` and `--rest_api_ssl_ca_certs` must "
                "be PEM files of a certificate, its key and authorities. "
                f"Received: {', '.join(str(file) for file in files if file)}: {error}"
            ) from error
        return {
            "ssl_certfile": self.certificate,
            "ssl_keyfile": self.key,
            "ssl_ca_certs": self.client_authority,
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.client_authority else ssl.CERT_NONE,
        }
