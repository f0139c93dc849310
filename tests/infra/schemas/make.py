"""How the files beside this one were made: `python make.py FOLDER`, with the sources listed in README.md in FOLDER.

Descriptions and rules that JSON Schema cannot say are dropped; an object takes no field that its schema does not name
(an API server drops such a field without a word); what occurs more than once is kept once, under a hash of its content.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

CORE = (
    "apps.v1.Deployment",
    "apps.v1.StatefulSet",
    "batch.v1.CronJob",
    "core.v1.ConfigMap",
    "core.v1.Namespace",
    "core.v1.PersistentVolumeClaim",
    "core.v1.Service",
    "core.v1.ServiceAccount",
    "networking.v1.NetworkPolicy",
    "policy.v1.PodDisruptionBudget",
)
CRDS = ("rayclusters", "rayjobs", "rayservices", "podmonitors", "prometheusrules")
DROPPED = ("description", "default", "example", "title", "format")
INT_OR_STRING = {"type": ["integer", "string"]}
QUANTITY = {"type": ["number", "string"]}
WORTH_SHARING = 200
"""Characters from which a repeated part is kept apart."""


def strict(node: Any, named: bool = False) -> Any:
    """Turn a part of an OpenAPI schema into JSON Schema; `named`: its keys are names of fields, not of the language."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if named:
        return {name: strict(value) for name, value in node.items()}
    if node.get("x-kubernetes-int-or-string") or node.get("format") == "int-or-string":
        return INT_OR_STRING
    kept = {
        key: strict(value, named=key in ("properties", "definitions", "patternProperties"))
        for key, value in node.items()
        if key not in DROPPED and not key.startswith("x-")
    }
    open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if "properties" in kept and not open_ended:
        kept["additionalProperties"] = False
    return kept


def reachable(definitions: dict[str, Any], names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for item in node:
                visit(item)
        elif isinstance(node, dict):
            target = node.get("$ref")
            if isinstance(target, str) and (name := target.rpartition("/")[2]) not in found:
                found[name] = definitions[name]
                visit(definitions[name])
            for value in node.values():
                visit(value)

    for name in names:
        visit({"$ref": name})
    return found


def share(kinds: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Put what occurs more than once below `definitions`, the largest parts first met."""
    times: dict[str, int] = {}

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            if len(text) > WORTH_SHARING and isinstance(node.get("type"), str):
                times[text] = times.get(text, 0) + 1
        for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            count(value)

    def replace(node: Any) -> Any:
        if isinstance(node, list):
            return [replace(item) for item in node]
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if times.get(text, 0) > 1:
            name = "shared." + hashlib.sha256(text.encode()).hexdigest()[:10]
            if name not in definitions:
                definitions[name] = None
                definitions[name] = {key: replace(value) for key, value in node.items()}
            return {"$ref": f"#/definitions/{name}"}
        return {key: replace(value) for key, value in node.items()}

    count(kinds)
    for kind in list(kinds):
        kinds[kind] = replace(kinds[kind])


def kubernetes(folder: Path) -> dict[str, Any]:
    swagger = json.loads((folder / "swagger.json").read_text())["definitions"]
    names = [f"io.k8s.api.{name}" for name in CORE]
    definitions = {name: strict(part) for name, part in reachable(swagger, names).items()}
    definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = QUANTITY
    kinds: dict[str, Any] = {}
    for name in names:
        kind = swagger[name]["x-kubernetes-group-version-kind"][0]
        group = f"{kind['group']}/" if kind["group"] else ""
        kinds[f"{group}{kind['version']} {kind['kind']}"] = {"$ref": f"#/definitions/{name}"}
    meta = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
    extra: dict[str, Any] = {}
    for plural in CRDS:
        crd = yaml.load((folder / f"{plural}.yaml").read_text(), Loader=yaml.CSafeLoader)["spec"]
        version = next(version for version in crd["versions"] if version["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = meta
        extra[f"{crd['group']}/v1 {crd['names']['kind']}"] = schema
    share(extra, definitions)
    return {"kinds": kinds | extra, "definitions": definitions}


def main(folder: Path) -> None:
    here = Path(__file__).parent
    compose = strict(json.loads((folder / "compose.json").read_text()))
    written = {"kubernetes.json": kubernetes(folder), "compose.json": compose}
    for name, schema in written.items():
        (here / name).write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
