"""The compose file holds against the specification's schema and Fresco's own rules, and each rule can be broken."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from flows.config import load_config
from tests.infra.manifests import IMAGES, INFRA, SETTINGS, addresses, command_problems, texts

COMPOSE = INFRA / "compose" / "compose.yaml"
CONFIG = INFRA / "compose" / "fresco.yaml"
SCHEMA: dict[str, Any] = json.loads((Path(__file__).parent / "schemas" / "compose.json").read_text())


def problems(text: str, config: Path = CONFIG) -> list[str]:
    composed = yaml.safe_load(text)
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in Draft7Validator(SCHEMA).iter_errors(composed)
    ]
    if found:
        return found
    services = composed["services"]
    settings = load_config(str(config))
    variables = set(re.findall(r"\$\{(\w+)", text))
    told = set(re.findall(r"\b[A-Z][A-Z0-9_]{4,}\b", "".join(re.findall(r"^#.*\n", text, re.M))))
    found += [f"variable {name} is not told of at the top" for name in variables - told]
    opened: dict[str, set[int]] = {"retrain": {6379}, "serve": {settings.serve.port}}
    opened |= {"mlflow": {5000}, "postgres": {5432}, "object-store": {8333}}
    for text_of_config in (*texts(composed), *texts(yaml.safe_load(config.read_text()))):
        # 127.0.0.1 is no name; an option's own address is HOST:PORT.
        for host, port in addresses(text_of_config.replace("--address=", "://")):
            if port not in opened.get(host, ()):
                found.append(f"{host}:{port} is no service that listens there")
    for name, service in services.items():
        if service["image"] not in IMAGES:
            found.append(f"{name}: image {service['image']} is not one of {sorted(IMAGES)}")
        command = service.get("command", [])
        found += [f"{name}: {problem}" for problem in command_problems(command, config)]
        for other, condition in service.get("depends_on", {}).items():
            if other not in services or "healthcheck" not in services[other]:
                found.append(f"{name}: waits for {other}, which is not there or never says that it is healthy")
            assert condition == {"condition": "service_healthy"}
        for port in service.get("ports", []):
            address, _, inside = port.rpartition(":")
            if not address.startswith("127.0.0.1:") or int(inside) not in opened[name]:
                found.append(f"{name}: port {port} expected on 127.0.0.1, and one that it listens on")
        for volume in service.get("volumes", []):
            source = volume.rpartition("}")[0] or volume.split(":")[0]
            if source not in composed["volumes"] and not source.startswith(("./", "${")):
                found.append(f"{name}: no volume {source}")
            if source.startswith("./") and not (COMPOSE.parent / source).is_file():
                found.append(f"{name}: no file {source}")
    return found


def test_compose_file_has_no_problem() -> None:
    assert problems(COMPOSE.read_text()) == []


BROKEN = [
    ("restart: unless-stopped", "restarts: unless-stopped", "'restarts' does not match|unexpected"),
    ("shm_size: 2gb", "shm_size: [2gb]", "is not of type"),
    ("postgres:17.6", "postgres:latest", "image postgres:latest"),
    ("fresco, serve, --config", "fresco, server, --config", "no verb 'server'"),
    ("placement.ray_address=auto", "placement.ray_addr=auto", "'placement.ray_addr' is unknown"),
    ("--address=retrain:6379", "--address=retrain:6380", "retrain:6380 is no service"),
    ("@postgres:5432", "@database:5432", "database:5432 is no service"),
    ("127.0.0.1:8000:8000", "8000:8000", "expected on 127.0.0.1"),
    ("127.0.0.1:8000:8000", "127.0.0.1:8000:8001", "one that it listens on"),
    ("./fresco.yaml:", "./settings.yaml:", "no file ./settings.yaml"),
    ("- objects:/data", "- object:/data", "no volume object"),
    ("postgres: {condition", "database: {condition", "waits for database"),
    ("${S3_ACCESS_KEY:?}", "${S3_KEY_ID:?}", "variable S3_KEY_ID is not told of"),
]


@pytest.mark.parametrize(("right", "wrong", "told"), BROKEN)
def test_broken_compose_file_is_found(right: str, wrong: str, told: str) -> None:
    text = COMPOSE.read_text()
    assert right in text
    found = problems(text.replace(right, wrong, 1))
    assert re.search(told, "\n".join(found)), found


def test_settings_of_another_port_are_found(tmp_path: Path) -> None:
    other = tmp_path / "fresco.yaml"
    other.write_text(CONFIG.read_text().replace("port: 8000", "port: 8001"))
    assert "one that it listens on" in "\n".join(problems(COMPOSE.read_text(), other))


def test_services_say_what_they_must() -> None:
    composed = yaml.safe_load(COMPOSE.read_text())
    services = composed["services"]
    server = services["mlflow"]
    [hosts] = [argument for argument in server["command"] if argument.startswith("--allowed-hosts=")]
    [(host, port)] = addresses(load_config(str(CONFIG)).placement.tracking_uri)
    assert {host, f"{host}:{port}"} <= set(hosts.partition("=")[2].split(","))
    assert server["environment"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    for name in ("retrain", "worker", "serve"):
        assert f"./fresco.yaml:{SETTINGS}:ro" in services[name]["volumes"]
    config = load_config(str(CONFIG))
    cpus = re.findall(r"--num-cpus=(\d+)", COMPOSE.read_text())
    # The head's third is for the driver.
    assert sum(map(int, cpus)) - 1 >= config.placement.workers * config.placement.cpus_per_worker


def test_nothing_secret_is_written_down() -> None:
    for key, value in re.findall(r"(\w*(?:PASSWORD|SECRET|TOKEN|ACCESS_KEY)\w*): (.*)", COMPOSE.read_text()):
        assert value.startswith("${"), key
