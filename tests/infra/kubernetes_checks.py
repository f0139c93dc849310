"""Questions to the Kubernetes manifests; each takes all documents and returns problems, one line each."""

import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from cluster.serving import APPLICATION
from flows.config import load_config
from flows.serve_app import AppArguments
from tests.infra.manifests import (
    PINS,
    SETTINGS,
    Document,
    addresses,
    command_problems,
    containers,
    image_problems,
    name_of,
    of_kind,
    pods,
    texts,
)

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parent / "schemas" / "kubernetes.json").read_text())
DASHBOARD_PORT = 8265
KEPT_BY_OPERATOR = {"app.kubernetes.io/component": ("training", "endpoint")}


def schema_problems(documents: list[Document]) -> list[str]:
    """Fields, types and required values, by Kubernetes' and KubeRay's own schemas."""
    problems = []
    for document in documents:
        schema = SCHEMAS["kinds"].get(f"{document['apiVersion']} {document['kind']}")
        if schema is None:
            problems.append(f"{document['apiVersion']} {document['kind']}: no such kind")
            continue
        validator = Draft202012Validator({**schema, "definitions": SCHEMAS["definitions"]})
        for error in validator.iter_errors(document):
            problems.append(f"{name_of(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message[:200]}")
    return problems


def settings_of(documents: list[Document], folder: Path) -> Path:
    """Write down what the pods see at SETTINGS."""
    settings = next(d for d in of_kind(documents, "ConfigMap") if d["metadata"]["name"] == "fresco-settings")
    path = folder / Path(SETTINGS).name
    path.write_text(settings["data"][path.name])
    return path


def all_commands(documents: list[Document], settings: Path) -> list[str]:
    problems = []
    for document in documents:
        commands = [[*c.get("command", []), *c.get("args", [])] for c in containers(document)]
        if document["kind"] == "RayJob":
            commands.append([document["spec"]["entrypoint"]])
        for command in commands:
            problems += [f"{name_of(document)}: {problem}" for problem in command_problems(command, settings)]
    return problems


def versions(documents: list[Document]) -> list[str]:
    problems = image_problems(documents)
    for document in documents:
        for cluster in ray_clusters(document):
            if cluster["rayVersion"] != PINS["ray"]:
                problems.append(f"{name_of(document)}: rayVersion {cluster['rayVersion']}, constraints: {PINS['ray']}")
    return problems


def ray_clusters(document: Document) -> list[Document]:
    spec = document["spec"] if document["kind"].startswith("Ray") else {}
    found = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    return [found[document["kind"]]] if found.get(document["kind"]) else []


def services(documents: list[Document]) -> dict[str, set[int]]:
    """Name -> ports of every service that there is, KubeRay's own included."""
    found = {
        d["metadata"]["name"]: {port["port"] for port in d["spec"]["ports"]} for d in of_kind(documents, "Service")
    }
    for document in (*of_kind(documents, "RayCluster"), *of_kind(documents, "RayService")):
        found[f"{document['metadata']['name']}-head-svc"] = {DASHBOARD_PORT}
    for document in of_kind(documents, "RayService"):
        service = document["spec"]["serveService"]
        found[service["metadata"]["name"]] = {port["port"] for port in service["spec"]["ports"]}
    return found


def ports(documents: list[Document]) -> list[str]:
    """Addresses, services, probes and policies meet ports that containers open."""
    problems = []
    known = services(documents)
    every_pod = [pod for document in documents for pod in pods(document)]
    for document in documents:
        for text in texts(document):
            for host, port in addresses(text):
                if host.startswith("fresco-") and port not in known.get(host.partition(".")[0], ()):
                    problems.append(f"{name_of(document)}: {host}:{port} is no service of these: {known}")
        for container in containers(document):
            opened = {port.get("name"): port["containerPort"] for port in container.get("ports", [])}
            for kind in ("readinessProbe", "livenessProbe", "startupProbe"):
                port = container.get(kind, {}).get("httpGet", {}).get("port")
                if port is not None and port not in opened and port not in opened.values():
                    problems.append(f"{name_of(document)}: {kind} of {container['name']} asks port {port}: {opened}")
    for service in of_kind(documents, "Service"):
        selected = [spec for labels, spec in every_pod if service["spec"]["selector"].items() <= labels.items()]
        for port in service["spec"]["ports"]:
            if not any(port["targetPort"] in names_and_ports(spec) for spec in selected):
                problems.append(f"{name_of(service)}: targetPort {port['targetPort']} is opened by no pod of it")
    for policy in of_kind(documents, "NetworkPolicy"):
        wanted = {port["port"] for rule in policy["spec"].get("ingress", []) for port in rule.get("ports", [])}
        chosen = policy["spec"]["podSelector"]
        selected = [spec for labels, spec in every_pod if selects(chosen, labels)]
        opened = set().union(*(names_and_ports(spec) for spec in selected), {DASHBOARD_PORT})
        if not selected or not wanted <= opened:
            problems.append(f"{name_of(policy)}: ports {sorted(wanted)} of {len(selected)} pods that open {opened}")
    return problems


def selects(selector: Document, labels: dict[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    return all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def names_and_ports(spec: Document) -> set[Any]:
    opened = [port for container in spec["containers"] for port in container.get("ports", [])]
    return {port["containerPort"] for port in opened} | {port.get("name") for port in opened}


def references(documents: list[Document], secrets: dict[str, set[str]]) -> list[str]:
    """Volumes, config maps and secrets that pods name exist; `secrets`: name -> keys that the guide makes."""
    problems = []
    claims = {d["metadata"]["name"] for d in of_kind(documents, "PersistentVolumeClaim")}
    maps = {d["metadata"]["name"]: set(d["data"]) for d in of_kind(documents, "ConfigMap")}
    for document in documents:
        wanted: list[tuple[str, str, set[str]]] = []
        for _, spec in pods(document):
            for volume in spec.get("volumes", []):
                if "persistentVolumeClaim" in volume and volume["persistentVolumeClaim"]["claimName"] not in claims:
                    problems.append(f"{name_of(document)}: no claim {volume['persistentVolumeClaim']['claimName']}")
                if "configMap" in volume and volume["configMap"]["name"] not in maps:
                    problems.append(f"{name_of(document)}: no ConfigMap {volume['configMap']['name']}")
                if "secret" in volume:
                    wanted.append(("volume", volume["secret"]["secretName"], set()))
        for container in containers(document):
            wanted += [("envFrom", source["secretRef"]["name"], set()) for source in container.get("envFrom", [])]
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference:
                    wanted.append((variable["name"], reference["name"], {reference["key"]}))
        for cluster in ray_clusters(document):
            wanted.append(("authOptions", cluster["authOptions"]["secretName"], {"auth_token"}))
        for where, name, keys in wanted:
            if not keys <= secrets.get(name, set()) or name not in secrets:
                problems.append(f"{name_of(document)}: {where} wants secret {name} {sorted(keys)}; made: {secrets}")
    return problems


def security(documents: list[Document]) -> list[str]:
    """What the namespace's level `restricted` asks for, and what a scheduler needs to know."""
    problems = []
    for document in documents:
        for _, spec in pods(document):
            context = spec.get("securityContext", {})
            if not context.get("runAsNonRoot") or context.get("seccompProfile") != {"type": "RuntimeDefault"}:
                problems.append(f"{name_of(document)}: a pod without runAsNonRoot and seccompProfile RuntimeDefault")
            if "automountServiceAccountToken" not in spec:
                problems.append(f"{name_of(document)}: a pod that does not say whether it needs the API server")
            for container in spec["containers"]:
                rights = container.get("securityContext", {})
                resources = container.get("resources", {})
                if rights.get("allowPrivilegeEscalation") is not False or rights["capabilities"] != {"drop": ["ALL"]}:
                    problems.append(f"{name_of(document)}: container {container['name']} keeps privileges")
                if not {"cpu", "memory"} <= set(resources["requests"]) or "memory" not in resources["limits"]:
                    problems.append(f"{name_of(document)}: container {container['name']} asks for no resources")
        for cluster in ray_clusters(document):
            autoscaler = cluster.get("autoscalerOptions", {}).get("securityContext", {})
            if cluster.get("enableInTreeAutoscaling") and autoscaler.get("allowPrivilegeEscalation") is not False:
                problems.append(f"{name_of(document)}: the autoscaler keeps privileges")
    return problems


def room(documents: list[Document], settings: Path) -> list[str]:
    """A Ray that is there has room for what the settings ask of it: Fresco refuses at once what can never be placed."""
    problems = []
    for document in documents:
        overrides = []
        if document["kind"] == "RayJob":
            words = document["spec"]["entrypoint"].split()
            overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
        config = load_config(str(settings), None, overrides)
        for cluster in ray_clusters(document):
            each, most, gpus = [], 0, 0
            for group in cluster["workerGroupSpecs"]:
                resources = group["template"]["spec"]["containers"][0]["resources"]
                cpus = float(resources["requests"]["cpu"])
                each += [cpus] * group["minReplicas"]
                gpus += resources["limits"].get("nvidia.com/gpu", 0) * group["minReplicas"]
                most += int(cpus / config.serve.cpus_per_replica) * group["maxReplicas"]
            placement = config.placement
            if document["kind"] == "RayService":
                if most < config.serve.max_replicas or max(each) < config.serve.cpus_per_replica:
                    problems.append(f"{name_of(document)}: no room for serve.max_replicas={config.serve.max_replicas}")
                continue
            fitting = sum(int(cpus / placement.cpus_per_worker) for cpus in each)
            if fitting < placement.workers or gpus < placement.workers * placement.gpus_per_worker:
                problems.append(f"{name_of(document)}: no room for placement.workers={placement.workers}")
    return problems


def serving(documents: list[Document], settings: Path) -> list[str]:
    """What Ray Serve is told, by its own schema, and that it fits the settings and the pods."""
    import importlib

    from ray.serve.schema import ServeDeploySchema

    problems = []
    config = load_config(str(settings))
    for document in of_kind(documents, "RayService"):
        told = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
        [application] = told.applications
        if application.name != APPLICATION:
            problems.append(f"the application expected to be named {APPLICATION}, found {application.name}")
        module, _, function = application.import_path.partition(":")
        if not hasattr(importlib.import_module(module), function):
            problems.append(f"import_path {application.import_path} names nothing")
        if AppArguments.model_validate(application.args).config != SETTINGS:
            problems.append(f"args.config expected to be {SETTINGS}")
        opened = {
            port["containerPort"]
            for container in containers(document)
            for port in container.get("ports", [])
            if port["name"] == "serve"
        }
        service = {port["targetPort"] for port in document["spec"]["serveService"]["spec"]["ports"]}
        if not opened == service == {told.http_options.port} == {config.serve.port}:
            problems.append(
                f"serve.port {config.serve.port}, http_options.port {told.http_options.port}, containers {opened}, the"
                f" service's targetPort {service}: expected one number"
            )
        if told.proxy_location.value != "EveryNode":
            problems.append("proxies expected on every node: what follows the champion asks its own")
    return problems
