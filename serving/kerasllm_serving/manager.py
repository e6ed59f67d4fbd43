"""Which versions of which models are loaded: new ones before old ones go, none that is in use."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from google.protobuf import text_format
from tensorflow_serving.apis import get_model_status_pb2, model_pb2
from tensorflow_serving.config import model_server_config_pb2

from kerasllm_serving.errors import ServingError, StartupError, invalid_argument
from kerasllm_serving.model import Servable, find_versions

States = get_model_status_pb2.ModelVersionStatus
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which versions of a model are served.

    Args:
        name: The name by which requests ask for it.
        base_path: Folder that holds the numeric version folders.
        latest: So many versions with the highest numbers; 0: all.
        specific: These versions, whatever `latest` says; empty: as `latest` says.
        labels: Versions by their labels.
    """

    name: str
    base_path: Path
    latest: int = 1
    specific: tuple[int, ...] = ()
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def wanted(self, found: Sequence[int]) -> list[int]:
        """Chooses among the versions on disk, which are sorted."""
        if self.specific:
            return [version for version in found if version in self.specific]
        return list(found[-self.latest :]) if self.latest else list(found)


class Loaded(Protocol):
    """A loaded version."""

    servable: Servable

    def run(
        self, feeds: Mapping[str, np.ndarray], fetches: Sequence[str], timeout_in_ms: int = 0
    ) -> list[np.ndarray]:
        """Runs the graph, perhaps together with other requests; see `Servable.run`."""

    def close(self) -> None:
        """Frees it; nobody uses it any more."""


@dataclasses.dataclass
class _Version:
    """A version and what became of it."""

    state: int
    loaded: Any = None
    error: ServingError | None = None
    users: int = 0
    attempts: int = 0
    next_attempt: float = 0.0


class ModelManager:
    """Loads, finds and drops versions.

    A version that does not load leaves those that are there in place. One that is in use goes when its last
    request has ended.

    Args:
        load: From a model's name, a version's number and its path to what is loaded.
        configs: The models.
        allow_labels_for_unavailable: Whether a new label may name a version that is not loaded.
        max_num_load_retries: How often a version is tried again.
        retry_seconds: How long it is left alone before.
    """

    def __init__(
        self,
        load: Callable[[str, int, Path], Loaded],
        configs: Sequence[ModelConfig],
        allow_labels_for_unavailable: bool = False,
        max_num_load_retries: int = 5,
        retry_seconds: float = 60,
    ) -> None:
        self._load = load
        self._retry_seconds = retry_seconds
        self._configs = {config.name: config for config in configs}
        self._allow_labels = allow_labels_for_unavailable
        self._most_attempts = 1 + max_num_load_retries
        self._versions: dict[str, dict[int, _Version]] = {config.name: {} for config in configs}
        self._labels: dict[str, Mapping[str, int]] = {}
        self._changed = threading.Condition()
        self._one_change = threading.Lock()

    # Changes

    def start(self) -> None:
        """Loads all that is wanted.

        Raises:
            StartupError: If a model has no version that loads.
        """
        for config in self._configs.values():
            find_versions(config.base_path)  # which says what is wrong with the folder
        self.poll()
        for config in self._configs.values():
            versions = self._versions[config.name]
            if not any(version.state == States.AVAILABLE for version in versions.values()):
                errors = [str(version.error) for version in versions.values() if version.error]
                raise StartupError(
                    errors[-1]
                    if errors
                    else f"Model {config.name} must have one of the versions {config.specific}."
                )
            self._set_labels(config)

    def poll(self) -> None:
        """Looks at the folders, loads what is new, and then drops what is not wanted any more."""
        with self._one_change:
            for config in list(self._configs.values()):
                try:
                    found = list(find_versions(config.base_path))
                except StartupError as error:
                    # As when a disk is gone for a moment: what is loaded stays.
                    _logger.warning("%s", error)
                    continue
                self._change(config, config.wanted(found))

    def reload(self, configs: Sequence[ModelConfig]) -> None:
        """Serves exactly these models.

        Args:
            configs: The models.

        Raises:
            ServingError: If a folder is missing, a version does not load, or a label names none.
        """
        for config in configs:
            try:
                find_versions(config.base_path)
            except StartupError as error:
                raise invalid_argument(
                    f"Could not find base path {config.base_path} for servable {config.name}: {error}"
                ) from error
        with self._one_change:
            kept = {config.name for config in configs}
            gone = [name for name in self._configs if name not in kept]
            self._configs = {config.name: config for config in configs}
            for config in configs:
                self._versions.setdefault(config.name, {})
                found = list(find_versions(config.base_path))
                self._change(config, config.wanted(found), retry=True)
            for name in gone:
                for number in list(self._versions[name]):
                    self._drop(name, number)
                del self._versions[name]
                self._labels.pop(name, None)
        for config in configs:
            self._set_labels(config)
            for version in self._versions[config.name].values():
                if version.error:
                    raise version.error

    def _change(self, config: ModelConfig, wanted: Sequence[int], retry: bool = False) -> None:
        versions = self._versions[config.name]
        for number in wanted:
            version = versions.get(number)
            if version is None:
                version = versions[number] = _Version(States.START)
            elif not version.error or not (retry or self._may_retry(version)):
                continue
            self._try_to_load(config, number, version)
        is_available = any(versions[number].state == States.AVAILABLE for number in wanted)
        for number in list(versions):
            # Where nothing that is wanted has loaded, what is there goes on.
            if number not in wanted and (is_available or versions[number].state != States.AVAILABLE):
                self._drop(config.name, number)

    def _may_retry(self, version: _Version) -> bool:
        return version.attempts < self._most_attempts and time.monotonic() >= version.next_attempt

    def _try_to_load(self, config: ModelConfig, number: int, version: _Version) -> None:
        version.state = States.LOADING
        version.attempts += 1
        try:
            version.loaded = self._load(config.name, number, find_versions(config.base_path)[number])
        except (StartupError, ServingError) as error:
            _logger.error("Model %s version %d did not load: %s", config.name, number, error)
            version.error = (
                error
                if isinstance(error, ServingError)
                else ServingError(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            )
            version.state = States.END
            version.next_attempt = time.monotonic() + self._retry_seconds
            return
        version.error = None
        with self._changed:
            version.state = States.AVAILABLE

    def _drop(self, name: str, number: int) -> None:
        version = self._versions[name][number]
        with self._changed:
            version.state = States.UNLOADING
            self._changed.wait_for(lambda: not version.users)
        if version.loaded is not None:
            version.loaded.close()
        del self._versions[name][number]

    def _set_labels(self, config: ModelConfig) -> None:
        versions = self._versions[config.name]
        old = self._labels.get(config.name, {})
        for label, number in config.labels.items():
            version = versions.get(number)
            is_available = version is not None and version.state == States.AVAILABLE
            if not is_available and not (self._allow_labels and label not in old):
                raise ServingError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"Request to assign label to version {number} of model {config.name}, which is not "
                    "currently available for inference",
                )
        self._labels[config.name] = dict(config.labels)

    def close(self) -> None:
        """Drops all."""
        with self._one_change:
            for versions in self._versions.values():
                for version in versions.values():
                    if version.loaded is not None:
                        version.loaded.close()
                versions.clear()

    # Questions

    @contextlib.contextmanager
    def use(self, spec: model_pb2.ModelSpec) -> Iterator[Loaded]:
        """Gives the version that a request asks for, which does not go meanwhile.

        Args:
            spec: Name, and version or label; neither: the one with the highest number.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        with self._changed:
            version = self._find(spec)
            version.users += 1
        try:
            yield version.loaded
        finally:
            with self._changed:
                version.users -= 1
                self._changed.notify_all()

    def _find(self, spec: model_pb2.ModelSpec) -> _Version:
        if not spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        number, asked = None, f"Latest({spec.name})"
        if spec.HasField("version_label"):
            number = self._labels.get(spec.name, {}).get(spec.version_label)
            if number is None:
                raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
        elif spec.HasField("version"):
            number = spec.version.value
        if number is not None:
            asked = f"Specific({spec.name}, {number})"
        available = self._available(spec.name)
        if number is None and available:
            number = max(available)
        if number not in available:
            raise ServingError(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {asked}")
        return available[number]

    def _available(self, name: str) -> dict[int, _Version]:
        versions = dict(self._versions.get(name, {}))
        return {number: v for number, v in versions.items() if v.state == States.AVAILABLE}

    def has(self, name: str) -> bool:
        """Tells whether a model has this name."""
        return name in self._versions

    def latest(self) -> dict[str, Loaded]:
        """Returns the version with the highest number of each model."""
        found = {}
        for name in list(self._versions):
            available = self._available(name)
            if available:
                found[name] = available[max(available)].loaded
        return found

    def numbers(self) -> list[tuple[str, int]]:
        """Returns all that is available: names and versions."""
        return [(name, number) for name in list(self._versions) for number in sorted(self._available(name))]

    def statuses(self, spec: model_pb2.ModelSpec) -> list[States]:
        """Tells what became of a model's versions, the newest first; a label is ignored.

        Args:
            spec: Name and perhaps version.

        Raises:
            ServingError: NOT_FOUND if there is none.
        """
        versions = dict(self._versions.get(spec.name, {}))
        if spec.HasField("version"):
            versions = {number: v for number, v in versions.items() if number == spec.version.value}
            if not versions:
                raise ServingError(
                    grpc.StatusCode.NOT_FOUND,
                    f"Could not find version {spec.version.value} of model {spec.name}",
                )
        elif not versions:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {spec.name}"
            )
        statuses = []
        for number, version in sorted(versions.items(), reverse=True):
            # An explicit OK: an unset status would be left out of the JSON.
            status = {"error_code": 0, "error_message": ""}
            if version.error:
                status = {
                    "error_code": version.error.code.value[0],
                    "error_message": version.error.message,
                }
            statuses.append(States(version=number, state=version.state, status=status))
        return statuses


def read_config_file(path: Path) -> list[ModelConfig]:
    """Reads a `ModelServerConfig` in protobuf's text format.

    Args:
        path: The file.

    Returns:
        The models.

    Raises:
        StartupError: If it is no such file.
    """
    try:
        config = text_format.Parse(
            path.read_text(encoding="utf-8"), model_server_config_pb2.ModelServerConfig()
        )
        return models_of(config)
    except (OSError, UnicodeDecodeError, text_format.ParseError, ServingError) as error:
        raise StartupError(
            f"`--model_config_file` must be a ModelServerConfig in text format. Received: {path}: {error}"
        ) from error


def models_of(config: model_server_config_pb2.ModelServerConfig) -> list[ModelConfig]:
    """Returns the models of a configuration.

    Args:
        config: The configuration.

    Raises:
        ServingError: INVALID_ARGUMENT with TensorFlow Serving's message.
    """
    if config.WhichOneof("config") != "model_config_list":
        raise invalid_argument(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
            "currently supported"
        )
    models = {}
    for entry in config.model_config_list.config:
        if entry.name in models:
            raise invalid_argument(f"Illegal to list model {entry.name} multiple times in config list")
        if entry.model_platform not in ("", "tensorflow"):
            raise invalid_argument(
                f"Model {entry.name} must be of the platform tensorflow. Received: {entry.model_platform}"
            )
        if not Path(entry.base_path).is_absolute():
            raise invalid_argument(
                f"Expected model {entry.name} to have an absolute path or URI; "
                f"got base_path()={entry.base_path}"
            )
        if entry.HasField("logging_config"):
            # As upstream, whose server has nothing to log with either.
            raise invalid_argument("No request-logger-creator provided.")
        policy = entry.model_version_policy
        choice = policy.WhichOneof("policy_choice")
        if choice == "specific" and not policy.specific.versions:
            raise invalid_argument(
                f"Model {entry.name} must have versions where its policy is specific. Received: none"
            )
        models[entry.name] = ModelConfig(
            entry.name,
            Path(entry.base_path),
            {"all": 0, "latest": policy.latest.num_versions or 1}.get(choice, 1),
            tuple(policy.specific.versions) if choice == "specific" else (),
            dict(entry.version_labels),
        )
    return list(models.values())
