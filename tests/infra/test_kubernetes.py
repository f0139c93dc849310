"""The manifests hold against Kubernetes', KubeRay's, Serve's and Fresco's own rules, and each rule can be broken."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from tests.infra import kubernetes_checks as checks
from tests.infra.manifests import INFRA, KUBERNETES, Document, containers, load_all, of_kind, parse, texts

README = (INFRA / "README.md").read_text()


def made_secrets() -> dict[str, set[str]]:
    """Secrets that the guide's commands make: name -> keys."""
    found = {}
    for name, rest in re.findall(r"kubectl create secret generic -n fresco ([\w-]+)((?:[^\n]*\\\n)*[^\n]*)", README):
        found[name] = set(re.findall(r"--from-(?:literal|file)=([\w.]+)=", rest))
    return found


def problems(documents: list[Document], folder: Path, changed: list[Document] | None = None) -> list[str]:
    """Ask all questions, those first without which the next make no sense; of fields, only `changed` is asked."""
    found = checks.schema_problems(documents if changed is None else changed)
    if found:
        return found
    settings = checks.settings_of(documents, folder)
    found = checks.all_commands(documents, settings)
    if found:
        return found
    return [
        *checks.versions(documents),
        *checks.ports(documents),
        *checks.references(documents, made_secrets()),
        *checks.security(documents),
        *checks.room(documents, settings),
        *checks.serving(documents, settings),
    ]


def test_manifests_have_no_problem(tmp_path: Path) -> None:
    assert problems(load_all(), tmp_path) == []


BROKEN = [
    ("workspace.yaml", "accessModes", "accessMode", r"accessMode.* unexpected"),
    ("ray-cluster.yaml", "minReplicas: 2", "minReplicas: two", "is not of type 'integer'"),
    ("ray-cluster.yaml", "minReplicas: 2", "minReplicaCount: 2", "unexpected"),
    ("serving.yaml", "serviceUnhealthySecondThreshold", "serviceUnhealthyThreshold", "unexpected"),
    ("train-job.yaml", "mode: token", "mode: tokens", "is not one of"),
    ("retrain-cronjob.yaml", "concurrencyPolicy", "concurencyPolicy", "unexpected"),
    ("retrain-cronjob.yaml", "restartPolicy: Never", "restartPolicy: [Never]", "is not of type 'string'"),
    ("mlflow.yaml", "apps/v1", "apps/v2", "no such kind"),
    ("monitoring.yaml", "podMetricsEndpoints", "endpoints", "unexpected"),
    ("mlflow.yaml", "fresco:0.1.0", "fresco:latest", "image fresco:latest is not one of"),
    ("postgres.yaml", "postgres:17.6", "postgres:17.66", "image postgres:17.66"),
    ("serving.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "rayVersion 2.59.0"),
    ("train-job.yaml", "fresco train", "fresco tain", "fresco has no verb 'tain'"),
    ("train-job.yaml", "--json", "--jason", "No such option.*--jason"),
    ("train-job.yaml", "placement.workers=4", "placement.worker=4", "'placement.worker' is unknown"),
    ("retrain-loop.yaml", "placement.ray_address=", "placement.ray_adress=", "'placement.ray_adress' is unknown"),
    ("settings.yaml", "min_new_images: 200", "min_new_image: 200", "'retrain.min_new_image' is unknown"),
    ("settings.yaml", "time_zone: UTC", "time_zone: Mars", "expected an IANA time zone"),
    (
        "retrain-loop.yaml",
        "[--config, /etc/fresco/fresco.yaml",
        "[--config, /etc/fresco.yaml",
        "--config expected to be",
    ),
    ("settings.yaml", "http://fresco-mlflow:5000", "http://fresco-mlflow:5001", "fresco-mlflow:5001 is no service"),
    (
        "mlflow.yaml",
        "name: http\n              containerPort",
        "name: web\n              containerPort",
        "targetPort http",
    ),
    (
        "object-store.yaml",
        "path: /healthz\n              port: s3",
        "path: /healthz\n              port: 8334",
        "asks port 8334",
    ),
    ("serving.yaml", "      port: 8000\n    applications", "      port: 8001\n    applications", "expected one number"),
    ("serving.yaml", "      - name: fresco\n", "      - name: frisco\n", "expected to be named fresco"),
    ("serving.yaml", "flows.serve_app:app", "flows.serve_app:ap", "names nothing"),
    ("network-policy.yaml", "port: 5432", "port: 5433", "ports \\[5433\\]"),
    ("retrain-cronjob.yaml", "key: auth_token", "key: token", r"wants secret fresco-ray-token \['token'\]"),
    ("ray-cluster.yaml", "claimName: fresco-workspace", "claimName: workspace", "no claim workspace"),
    ("serving.yaml", "runAsNonRoot: true", "runAsNonRoot: false", "without runAsNonRoot"),
    ("ray-cluster.yaml", "drop: [ALL]", "drop: []", "keeps privileges"),
    ("ray-cluster.yaml", "minReplicas: 2", "minReplicas: 1", "no room for placement.workers=2"),
    ("settings.yaml", "max_replicas: 2", "max_replicas: 3", "no room for serve.max_replicas=3"),
]


@pytest.mark.parametrize(("file", "right", "wrong", "told"), BROKEN)
def test_broken_manifest_is_found(file: str, right: str, wrong: str, told: str, tmp_path: Path) -> None:
    text = (KUBERNETES / file).read_text()
    assert right in text
    changed = parse(text.replace(right, wrong, 1))
    found = problems([*load_all(file), *changed], tmp_path, changed)
    assert re.search(told, "\n".join(found)), found


def test_every_file_is_applied_by_the_kustomization_or_by_a_command_of_the_guide() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) <= files
    assert {name for name in files - set(listed) if not re.search(rf"kubectl \w+ -f \S*{name}", README)} == set()


def test_nothing_secret_is_written_down() -> None:
    """Passwords, keys and tokens come from Secrets by name."""
    names = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")
    for document in load_all():
        assert document["kind"] != "Secret"
        for container in containers(document):
            values = [v["name"] for v in container.get("env", []) if "value" in v and names.search(v["name"])]
            assert values == [] or values == ["RAY_AUTH_MODE"], values
        assert not [text for text in texts(document) if re.search(r"://[^/\s@]*:[^$/\s@]+@", text)]


def test_one_look_at_a_time() -> None:
    [cron] = of_kind(load_all(), "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid" and len(cron["spec"]["schedule"].split()) == 5
    command = next(containers(cron))
    assert [*command["command"], *command["args"]][-5:] == [
        "retrain",
        "--once",
        "--config",
        "/etc/fresco/fresco.yaml",
        "--json",
    ]
    [loop] = [d for d in of_kind(load_all(), "Deployment") if d["metadata"]["name"] == "fresco-retrain"]
    assert loop["spec"]["replicas"] == 1


def options_of_the_tracking_server() -> set[str]:
    """Names of options in MLflow's own source; importing its command line takes many seconds."""
    found = importlib.util.find_spec("mlflow")
    assert found is not None and found.origin is not None
    package = Path(found.origin).parent
    source = (package / "cli" / "__init__.py").read_text() + (package / "utils" / "cli_args.py").read_text()
    return set(re.findall(r'"(--[a-z-]+)', source)) | set(re.findall(r"/(--[a-z-]+)", source))


def test_tracking_server_takes_its_options_and_its_clients_names(tmp_path: Path) -> None:
    documents = load_all()
    [container] = [c for d in documents for c in containers(d) if c["name"] == "mlflow"]
    assert container["command"] == ["mlflow", "server"]
    options = dict(argument.partition("=")[::2] for argument in container["args"])
    assert set(options) <= options_of_the_tracking_server()
    [(host, port)] = [
        (host, port)
        for text in checks.settings_of(documents, tmp_path).read_text().splitlines()
        if "tracking_uri" in text
        for host, port in checks.addresses(text)
    ]
    assert {host, f"{host}:{port}"} <= set(options["--allowed-hosts"].split(",")) and options["--port"] == str(port)
    assert options["--backend-store-uri"].startswith("postgresql+psycopg2://")
    assert options["--artifacts-destination"].startswith("s3://fresco-mlflow/")
    buckets = [text for d in documents for text in texts(d) if text.startswith("-bucket=")]
    assert buckets == ["-bucket=fresco-data,fresco-mlflow"]
    assert {"name": "MLFLOW_DISABLE_TELEMETRY", "value": "true"} in container["env"]
