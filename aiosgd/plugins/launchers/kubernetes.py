"""The launcher that writes manifests for Kubernetes; `kubectl` starts what they say."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiosgd.errors import ConfigError
from aiosgd.plugins.launchers.base import Launched, Launcher, Printed, Wanted, ignore

PORT = 9000
"""Where each node listens: a pod has an address of its own."""
OWN, KEPT = "/run/aiosgd", "/var/lib/aiosgd"
"""Folders of a node: in memory, with its secret, and for data and its copies of jobs."""
USER = 10001
"""Who nodes run as: nobody that the host or the image knows."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_PLAIN = re.compile(r"[A-Za-z/][\w./-]*")
# what YAML 1.1 takes for something else than text
_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})


class Kubernetes(Launcher):
    """Manifests for nodes in a Kubernetes cluster: it writes files, and says what to do with them.

    A headless Service gives each node a name of its own, a StatefulSet for the workers and one for
    the servers keep them; each node has the secret from a Kubernetes Secret that `kubectl` makes of
    the secret file: no manifest has it. A node that dies comes back under its name, with the
    checkpoints that it had where `storage` is given.
    """

    @dataclass(frozen=True)
    class Params:
        """What the manifests say.

        Attributes:
            image: a container image with aiosgd; deploy/Dockerfile makes one.
            folder: the folder to write; it must not be there.
            name, namespace: of all objects.
            domain: the cluster's own.
            cpus, memory: what each node asks for, as Kubernetes writes it; memory is a limit, too.
            gpus: devices of each node.
            gpu_resource: what the devices are called.
            storage: a volume for each node's copies of jobs, which outlives the node: `5Gi`; empty:
                none.
            storage_class: of these volumes; empty: the cluster's default.
            labels: of the machines to run on (`nodeSelector`).
        """

        image: str = "aiosgd:latest"
        folder: str = "kubernetes"
        name: str = "aiosgd"
        namespace: str = "default"
        domain: str = "cluster.local"
        cpus: str = "1"
        memory: str = "1Gi"
        gpus: int = 0
        gpu_resource: str = "nvidia.com/gpu"
        storage: str = ""
        storage_class: str = ""
        labels: dict[str, str] = field(default_factory=dict)

        def __post_init__(self) -> None:
            for name in (self.name, self.namespace):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{name!r} is no name; expected up to 40 small letters, digits and '-'"
                    )
            if self.gpus < 0:
                raise ValueError(f"gpus is {self.gpus}; expected 0 or more")

    def __init__(self, params: Params) -> None:
        self._params = params

    @contextlib.asynccontextmanager
    async def launch(self, wanted: Wanted, printed: Printed = ignore) -> AsyncIterator[Launched]:
        """Write the manifests, once; they stay."""
        if wanted.secret_file is None:
            raise ConfigError("the launcher 'kubernetes' needs a secret file that stays")
        self._write(wanted)
        roles = {"worker": wanted.workers, "server": wanted.servers}
        workers, servers = (
            tuple(self._address(role, i) for i in range(n)) for role, n in roles.items()
        )
        yield Launched(
            workers, servers, wanted.secret_file, next_steps=self._steps(wanted.secret_file)
        )

    def _write(self, wanted: Wanted) -> None:
        folder = Path(self._params.folder)
        if folder.exists():
            raise ConfigError(f"{folder} exists already; name another with launcher.folder")
        try:
            folder.mkdir(parents=True)
            for name, manifest in self.manifests(wanted).items():
                (folder / f"{name}.yaml").write_text(yaml_text(manifest))
        except OSError as error:
            raise ConfigError(f"launcher.folder {folder}: {error.strerror}") from error

    def _address(self, role: str, number: int) -> str:
        params = self._params
        host = f"{params.name}-{role}-{number}.{params.name}.{params.namespace}.svc.{params.domain}"
        return f"{host}:{PORT}"

    def _steps(self, secret_file: Path) -> tuple[str, ...]:
        params = self._params
        kubectl = f"kubectl --namespace {params.namespace}"
        secret, folder = shlex.quote(str(secret_file)), shlex.quote(params.folder)
        cluster = secret_file.with_suffix(".toml")
        there, runs = shlex.quote(f"{OWN}/{cluster.name}"), f"{KEPT}/runs"
        pod = f"{params.name}-worker-0"
        submit = f"{kubectl} exec -it {pod} -- aiosgd submit {there} --output {runs}"
        return (
            f"wrote {params.folder}/; nothing is started yet, and these manifests were checked",
            "against the schemas of Kubernetes, never run on a cluster; next:",
            f"  {kubectl} create secret generic {params.name} --from-file=secret={secret}",
            f"  {kubectl} apply -f {folder}",
            f"  {kubectl} rollout status statefulset/{params.name}-worker",
            "the addresses are names within the cluster: submit from a pod, such as the first worker",
            f"  {kubectl} cp {shlex.quote(str(cluster))} {pod}:{there}",
            f"  {submit} --epochs 5",
            f"  {kubectl} cp {pod}:{runs} runs",
            "and at the end",
            f"  {kubectl} delete -f {folder} && {kubectl} delete secret {params.name}",
        )

    def manifests(self, wanted: Wanted) -> dict[str, dict[str, Any]]:
        """Return the objects by name."""
        sets = {"worker": wanted.workers, "server": wanted.servers}
        return {"service": self._service()} | {
            role: self._stateful_set(role, count, wanted) for role, count in sets.items() if count
        }

    def _meta(self, name: str, **labels: str) -> dict[str, Any]:
        labels = {"app.kubernetes.io/name": self._params.name, **labels}
        return {"name": name, "namespace": self._params.namespace, "labels": labels}

    def _service(self) -> dict[str, Any]:
        """A name for each pod, from its first moment on: nodes that start find each other."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._meta(self._params.name),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"app.kubernetes.io/name": self._params.name},
                "ports": [{"name": "aiosgd", "port": PORT}],
            },
        }

    def _stateful_set(self, role: str, count: int, wanted: Wanted) -> dict[str, Any]:
        params = self._params
        label = {"app.kubernetes.io/component": role}
        meta = self._meta(f"{params.name}-{role}", **label)
        template = {"metadata": {"labels": meta["labels"]}, "spec": self._pod(wanted)}
        return {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": meta,
            "spec": {
                "serviceName": params.name,
                "replicas": count,
                "podManagementPolicy": "Parallel",
                "selector": {"matchLabels": meta["labels"]},
                "template": template,
                **({"volumeClaimTemplates": [self._claim()]} if params.storage else {}),
            },
        }

    def _pod(self, wanted: Wanted) -> dict[str, Any]:
        secret_file = f"{OWN}/{wanted.secret_file.name if wanted.secret_file else 'secret'}"
        volumes = [
            # readable for the container that copies it, and mounted nowhere else
            {"name": "secret", "secret": {"secretName": self._params.name, "defaultMode": 0o444}},
            {"name": "own", "emptyDir": {"medium": "Memory"}},
            *([] if self._params.storage else [{"name": "jobs", "emptyDir": {}}]),
        ]
        return {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [self._secret_container(secret_file)],
            "containers": [self._node_container(secret_file, wanted.allow_code)],
            "volumes": volumes,
            **({"nodeSelector": self._params.labels} if self._params.labels else {}),
        }

    def _secret_container(self, secret_file: str) -> dict[str, Any]:
        """Copies the secret: a node refuses a file that a group can read, as fsGroup makes it."""
        return self._container(
            "secret",
            ["sh", "-c", 'umask 077 && cat /run/given/secret >"$1"', "sh", secret_file],
            {"secret": "/run/given", "own": OWN},
            {"cpu": "50m", "memory": "32Mi"},
        )

    def _node_container(self, secret_file: str, allow_code: bool) -> dict[str, Any]:
        params = self._params
        words = ["aiosgd", "node", "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104
        words += ["--secret-file", secret_file]
        words += ["--run-dir", f"{KEPT}/jobs", "--data-dir", f"{KEPT}/data"]
        words += ["--allow-code"] if allow_code else []
        resources = {"cpu": params.cpus, "memory": params.memory}
        container = self._container("node", words, {"own": OWN, "jobs": KEPT}, resources)
        if params.gpus:
            for kind in ("requests", "limits"):
                container["resources"][kind][params.gpu_resource] = str(params.gpus)
        return container | {
            "env": [{"name": "HOME", "value": OWN}],
            "ports": [{"name": "aiosgd", "containerPort": PORT}],
            "readinessProbe": {"tcpSocket": {"port": "aiosgd"}, "periodSeconds": 5},
        }

    def _container(
        self, name: str, words: list[str], mounts: Mapping[str, str], resources: dict[str, str]
    ) -> dict[str, Any]:
        return {
            "name": name,
            "image": self._params.image,
            "command": words,
            "resources": {"requests": dict(resources), "limits": {"memory": resources["memory"]}},
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [{"name": k, "mountPath": path} for k, path in mounts.items()],
        }

    def _claim(self) -> dict[str, Any]:
        params = self._params
        named = {"storageClassName": params.storage_class} if params.storage_class else {}
        return {
            "metadata": {"name": "jobs"},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": params.storage}},
                **named,
            },
        }


# YAML -------------------------------------------------------------------------------------------


def yaml_text(value: Mapping[str, Any]) -> str:
    """Return plain values as YAML: dictionaries, lists, texts, numbers, booleans."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [line for key, item in value.items() for line in _entry(f"{_scalar(key)}:", item)]
    if isinstance(value, list) and value:
        return [line for item in value for line in _item(_lines(item))]
    return [_scalar(value)]


def _entry(head: str, value: Any) -> list[str]:
    if isinstance(value, Mapping | list) and value:
        return [head, *(f"  {line}" for line in _lines(value))]
    return [f"{head} {_scalar(value)}"]


def _item(lines: list[str]) -> list[str]:
    return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]


def _scalar(value: Any) -> str:
    """Return a value on one line; what JSON writes is YAML, too."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return str(value) if plain else json.dumps(value)
