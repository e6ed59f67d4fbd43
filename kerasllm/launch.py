"""Starts the workers of a training, watches them, and starts them again where one fails."""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

_COMMAND = [sys.executable, "-c", "import sys; from kerasllm.cli import main; sys.exit(main())"]
_POLL_SECONDS = 0.2
# Time for the others to notice that one is gone, and to end by themselves.
_GRACE_SECONDS = 15.0
_KUBERNETES = """\
# {workers} workers of one training, each a pod that finds the others by name; all see the same volume,
# where the checkpoints are. A pod that fails is started again, and with it the others: the training goes
# on from the last checkpoint. Put your image, volume and settings in.
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {workers}
  parallelism: {workers}
  backoffLimit: {backoff}
  template:
    spec:
      subdomain: {name}
      restartPolicy: OnFailure
      terminationGracePeriodSeconds: 120
      containers:
        - name: worker
          image: your-registry/kerasllm
          command: [/bin/sh, -c]
          args:
            - |
              export TF_CONFIG="$(kerasllm launch --print-config {addresses} --index $JOB_COMPLETION_INDEX)"
              exec kerasllm {arguments}
          ports:
            - containerPort: {port}
          securityContext:
            runAsNonRoot: true
            allowPrivilegeEscalation: false
          volumeMounts:
            - name: runs
              mountPath: /runs
      volumes:
        - name: runs
          persistentVolumeClaim:
            claimName: {name}
"""


def tf_config(addresses: Sequence[str], index: int) -> str:
    """Returns what `TF_CONFIG` must say in one worker.

    Args:
        addresses: `host:port` of each worker, the same list in all.
        index: Which of them this is.

    Returns:
        JSON.

    Raises:
        ValueError: If an address has no port, or there is no such worker.
    """
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"An address must be host:port. Received: {address!r}")
    if not 0 <= index < len(addresses):
        raise ValueError(
            f"`index` must be from 0 to {len(addresses) - 1}, one for each worker. Received: {index}"
        )
    return json.dumps({"cluster": {"worker": list(addresses)}, "task": {"type": "worker", "index": index}})


def kubernetes_manifest(
    workers: int, arguments: Sequence[str], name: str = "training", port: int = 2222
) -> str:
    """Returns a Kubernetes manifest for a training on several workers.

    Args:
        workers: Number of pods.
        arguments: Of the command `kerasllm`, such as `["train", "--config", "/runs/config.yaml"]`.
        name: Of the job and its service.
        port: On which the workers talk.

    Returns:
        YAML: a headless service and an indexed job.
    """
    import shlex

    addresses = " ".join(f"{name}-{index}.{name}:{port}" for index in range(workers))
    return _KUBERNETES.format(
        workers=workers,
        backoff=10 * workers,
        name=name,
        port=port,
        addresses=addresses,
        arguments=shlex.join(arguments),
    )


def launch(arguments: Sequence[str], workers: int, restarts: int = 3) -> int:
    """Runs a `kerasllm` command in several processes of this machine that train one model.

    If one fails or is killed, the others are ended and all are started again, and a training with
    checkpoints goes on from the last one. `SIGTERM` and Ctrl-C are passed on; a training saves then.

    Args:
        arguments: Of the command, such as `["train", "--config", "config.yaml"]`.
        workers: Number of processes.
        restarts: How often they may be started again.

    Returns:
        The exit code: 0 if all ended well, otherwise that of the first that failed.

    Raises:
        ValueError: If a number is out of range or there is no command.
    """
    if workers < 1 or restarts < 0:
        raise ValueError(
            "`workers` must be at least 1 and `restarts` at least 0. "
            f"Received: workers={workers}, restarts={restarts}"
        )
    if not arguments:
        raise ValueError("A command must follow after `--`, such as: train --config file. Received: none")
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        for attempt in range(restarts + 1):
            code = _Attempt(arguments, workers).wait(received)
            if not code or received:
                return code
            if attempt < restarts:
                _say(f"starting all again ({attempt + 1} of {restarts})")
        return code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Attempt:
    """One start of all workers."""

    def __init__(self, arguments: Sequence[str], workers: int):
        addresses = _free_addresses(workers)
        self.processes, self.last_lines, self.readers = [], [], []
        for index in range(workers):
            environment = dict(os.environ)
            environment.pop("TF_CONFIG", None)
            if workers > 1:
                environment["TF_CONFIG"] = tf_config(addresses, index)
            process = subprocess.Popen(
                [*_COMMAND, *arguments],
                env=environment,
                stdout=None if index == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C comes from here, not from the terminal
            )
            lines: collections.deque[bytes] = collections.deque(maxlen=20)
            reader = threading.Thread(target=self._read, args=(process, lines, index == 0), daemon=True)
            reader.start()
            self.processes.append(process)
            self.last_lines.append(lines)
            self.readers.append(reader)

    @staticmethod
    def _read(process: subprocess.Popen, lines: collections.deque, is_shown: bool) -> None:
        while piece := process.stderr.read1(65536):
            lines.extend(piece.splitlines())
            if is_shown:
                sys.stderr.buffer.write(piece)
                sys.stderr.flush()

    def wait(self, received: list[int]) -> int:
        """Waits for all; ends the others when one has failed. Returns an exit code."""
        passed_on, deadline, code = False, None, 0
        while running := [process for process in self.processes if process.poll() is None]:
            if received and not passed_on:
                passed_on, deadline = True, time.monotonic() + 8 * _GRACE_SECONDS
                for process in running:
                    process.send_signal(signal.SIGTERM)
            if not code and not passed_on and (code := self._report_failure()):
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                for process in running:
                    process.kill()
            time.sleep(_POLL_SECONDS)
        for reader in self.readers:
            reader.join()
        if (
            passed_on
        ):  # the first worker writes the checkpoint; the others may have lost it before they ended
            return self.processes[0].returncode
        return code or self._report_failure()

    def _report_failure(self) -> int:
        for index, process in enumerate(self.processes):
            if process.returncode:
                _say(f"worker {index} ended with {process.returncode}")
                if index:
                    time.sleep(_POLL_SECONDS)  # for its last lines
                    sys.stderr.buffer.write(b"\n".join(self.last_lines[index]) + b"\n")
                    sys.stderr.flush()
                return process.returncode
        return 0


def _free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return addresses


def _say(text: str) -> None:
    print(f"kerasllm launch: {text}", file=sys.stderr, flush=True)
