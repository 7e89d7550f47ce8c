"""The executable's software bill of materials: CycloneDX 1.6 as JSON, the same bytes for the same executable."""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

NAME = "xerotier-xim-agent"


def _licences(licence: str) -> list[dict[str, Any]]:
    if not licence:
        return []
    # An SPDX expression has no spaces but around its operators; else it is what a package says in its own words.
    words = licence.replace("(", " ").replace(")", " ").split()
    spdx = all((w in ("AND", "OR", "WITH")) == bool(i % 2) for i, w in enumerate(words)) and "," not in licence
    return [{"expression": licence}] if spdx else [{"license": {"name": licence}}]


def _component(entry: dict[str, str], inside: list[dict[str, str]]) -> dict[str, Any]:
    registry = {"distribution": "pypi", "npm": "npm"}.get(entry["kind"])
    where = f"{entry['part_of']}/" if entry["part_of"] else ""
    made: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"{where}{entry['name']}@{entry['version'] or 'unknown'}{'' if registry else '#library'}",
        "name": entry["name"],
    }
    if entry["version"]:
        made["version"] = entry["version"]
    if licences := _licences(entry["licence"]):
        made["licenses"] = licences
    if registry:
        made["purl"] = f"pkg:{registry}/{entry['name'].lower().replace('_', '-')}@{entry['version']}"
    if parts := [_component(p, []) for p in inside]:
        made["components"] = parts
    return made


def _text(document: dict[str, Any], executable: Path) -> str:
    """With what tells which file it is about."""
    digest = hashlib.sha256(executable.read_bytes()).hexdigest()
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}"
    document["metadata"]["component"]["hashes"] = [{"alg": "SHA-256", "content": digest}]
    return json.dumps(document, indent=1) + "\n"


def sbom_of(executable: Path, other_form: Path) -> str:
    """That of the same program in another form: `other_form` is the SBOM of the one file."""
    return _text(json.loads(other_form.read_text()), executable)


def sbom(found: list[dict[str, str]], executable: Path) -> str:
    """`found`: what components.py wrote."""
    (own,) = [c for c in found if c["name"] == NAME]
    top = [c for c in found if not c["part_of"] and c is not own]
    made = [_component(c, [p for p in found if p["part_of"] == c["name"]]) for c in top]
    root = {
        "type": "application",
        "bom-ref": f"{NAME}@{own['version']}",
        "name": NAME,
        "version": own["version"],
        "licenses": _licences(own["licence"]),
    }
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": root},
        "components": made,
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": sorted(c["bom-ref"] for c in made)}],
    }
    return _text(document, executable)
