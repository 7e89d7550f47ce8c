import hashlib
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from xim_agent import PROTOCOL, __version__

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def run(exe: Path, *arguments: str) -> str:
    """In an empty environment, as on a machine without Python."""
    done = subprocess.run([exe, *arguments], env={}, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def runtime_closure() -> set[str]:
    """Normalized names of everything that the project needs to run, as installed here."""
    todo = [Requirement(r) for r in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    found: set[str] = set()
    while todo:
        need = todo.pop()
        name = need.name.lower().replace("_", "-")
        if name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        try:
            todo += [Requirement(r) for r in requires(need.name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


def bundled_libraries(onedir: Path) -> set[str]:
    return {f.name for f in (onedir.parent / "_internal").rglob("lib*.so*")}


def test_version_needs_no_python(agent_exe: Path, agent_onedir: Path) -> None:
    said = f"xerotier-xim-agent {__version__} (XIM protocol {PROTOCOL})\n"
    assert run(agent_exe, "--version") == said
    assert run(agent_onedir, "--version") == said


def test_version_imports_nothing_but_its_own() -> None:
    """Packagers and supervisors call it often: it must not wait for the stack."""
    code = (
        "import sys; before = set(sys.modules); sys.argv[1:] = ['--version'];"
        "from xim_agent.__main__ import main; main();"
        "sys.stderr.write(' '.join(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stderr.split()) == {"xim_agent", "xim_agent.__main__"}


def test_plan_of_a_model_on_the_hardware_that_it_printed(agent_exe: Path, toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text(run(agent_exe, "plan"))
    lines = run(agent_exe, "plan", "--model", str(toy_model), "--hardware", str(tmp_path / "here.json")).splitlines()
    assert lines[0].startswith("# LlamaForCausalLM (generate) on ")
    assert lines[-1].startswith(f"vllm serve {toy_model} --uds ")


def test_licences_of_all_that_is_bundled_with_their_texts(agent_exe: Path, agent_onedir: Path) -> None:
    printed = run(agent_exe, "licenses")
    heads = [line for line in printed.splitlines() if re.match(r"## .*: \S", line)]
    bundled = {head.split()[1].lower().replace("_", "-") for head in heads}
    assert not runtime_closure() - bundled
    assert {"xerotier-xim-agent", "python", "openssl", "zstd", "pyinstaller"} <= bundled
    assert {"libcrypto.so.3", "libssl.so.3"} <= bundled_libraries(agent_onedir)
    assert any("inside of cryptography" in head and head.startswith("## openssl ") for head in heads)
    for text in (
        "Permission is hereby granted",  # texts, not names alone
        "PYTHON SOFTWARE FOUNDATION LICENSE",
        "Apache License",
        "For Zstandard software",
        "Bootloader Exception",
        "GCC RUNTIME LIBRARY EXCEPTION",
        "Jean-loup Gailly",
    ):
        assert text in printed


def test_sbom_is_valid_and_tells_what_this_very_file_holds(agent_exe: Path, agent_onedir: Path) -> None:
    text = agent_exe.with_name(f"{agent_exe.name}.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    own = document["metadata"]["component"]
    assert (own["name"], own["version"]) == ("xerotier-xim-agent", __version__)
    assert own["hashes"][0]["content"] == hashlib.sha256(agent_exe.read_bytes()).hexdigest()
    listed = {c["name"].lower().replace("_", "-"): c for c in document["components"]}
    assert not runtime_closure() - set(listed)
    pinned = dict(re.findall(r"^([\w-]+)==([^ ;]+)", (ROOT / "build/freeze.lock").read_text(), re.MULTILINE))
    for info in (agent_onedir.parent / "_internal").glob("*.dist-info"):
        name, version = info.name.removesuffix(".dist-info").rsplit("-", 1)
        component = listed[name.lower().replace("_", "-")]
        assert component["purl"] == f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
        assert pinned[name.lower().replace("_", "-")] == version
    assert all(component["licenses"] for component in document["components"])
    assert {c["name"] for c in listed["cryptography"]["components"]} >= {"openssl", "pyo3"}
    assert document["dependencies"][0]["dependsOn"] == sorted(c["bom-ref"] for c in document["components"])


def test_size(agent_exe: Path) -> None:
    assert agent_exe.stat().st_size <= 25e6
