"""`xerotier-xim-agent router …`: data on stdout alone, before the router ever ran and beside a running one."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fakes.agent import MODEL, FakeAgent, running

from xim_agent.cli.router import command
from xim_agent.errors import AgentError
from xim_agent.identity.join_key import JoinKey
from xim_agent.router import catalog
from xim_agent.router.store import Store, router_lock

ROW = catalog.Published("toy", "r1", "toy", f"sha256:{'0' * 64}", 1, 1, "generate", 1.0)


def router(data: Path, *args: str) -> Result:
    return CliRunner().invoke(command, [*args, "--data", str(data)])


def model(directory: Path, architecture: str = "LlamaForCausalLM") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (directory / "model.safetensors").write_bytes(b"weights" * 1000)
    (directory / "evil.py").write_text("")
    return directory


def test_from_nothing_to_a_router_that_could_serve(tmp_path: Path) -> None:
    data = tmp_path / "data"
    published = router(data, "model", "publish", str(model(tmp_path / "m")), "--name", "toy", "--revision", "v1")
    assert (published.exit_code, published.stdout) == (0, "toy@v1\n")
    assert "evil.py" in published.stderr
    assigned = router(data, "assign", "toy@v1")
    assert (assigned.exit_code, assigned.stdout) == (0, "")
    key = router(data, "join-key", "create", "--project", "Test", "--region", "eu", "--uses", "3", "--expires", "30m")
    assert JoinKey.parse(key.stdout.strip()).routers == ("http://127.0.0.1:8080",)
    assert "never ran" in key.stderr
    api_key = router(data, "api-key", "create", "--project", "Test").stdout.strip()
    with Store.open(data) as store:
        assert catalog.project_of(store.db, api_key) == "Test"
        assert catalog.project_of(store.db, api_key + "x") is None
        found = catalog.assignment(store.db, "any agent")
        assert found is not None
        assert (found.model.revision, found.model.task, found.model.size_bytes) == ("v1", "generate", 7039)
        kept = store.db.execute("SELECT project, region, uses_left, expires - created FROM join_keys").fetchone()
        assert kept == ("Test", "eu", 3, 1800.0)
        assert (data / "models" / "manifests" / f"{found.model.manifest.removeprefix('sha256:')}.json").is_file()


def test_a_link_to_the_dashboard_is_all_on_stdout(tmp_path: Path) -> None:
    first = router(tmp_path / "data", "admin-link")
    assert re.fullmatch(r"http://127\.0\.0\.1:8080/dashboard/#/login/[\w-]{43}\n", first.stdout)
    assert "never ran" in first.stderr
    assert "within 24 hours:" in first.stderr
    with Store.open(tmp_path / "data") as store:
        store.serve_at(["https://router.example/"], "http://127.0.0.1:1")
    looking = router(tmp_path / "data", "admin-link", "--read-only", "--revoke-others")
    assert looking.stdout.startswith("https://router.example/dashboard/#/login/")
    assert looking.stderr == "0 sessions ended\nsigns in once, within 24 hours, to look only:\n"


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["assign", "nope"], "model_unknown"),
        (["assign", "toy@nope"], "model_unknown"),
        (["assign", "toy", "--agent", "nobody"], "agent_unknown"),
        (["model", "publish", "/nowhere", "--name", "x"], "model_path"),
        (["join-key", "create", "--project", "a b"], "project_invalid"),
        (["join-key", "create", "--project", "a", "--region", "x" * 25], "join_key_invalid"),
        (["api-key", "create", "--project", ""], "project_invalid"),
        (["serve", "--public-url", "router.example"], "public_url_invalid"),
        (["admin-link", "--url", "router.example"], "public_url_invalid"),
        (["serve", "--public-url", "http://x:99999"], "public_url_invalid"),
        (["serve", "--listen", "8080"], "listen_invalid"),
    ],
)
def test_mistakes_have_a_name_and_a_hint(tmp_path: Path, args: list[str], code: str) -> None:
    with Store.open(tmp_path) as store:
        catalog.register(store.db, ROW)
    result = router(tmp_path, *args)
    assert result.stdout == ""
    error = result.exception
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, AgentError)
    assert (error.code, error.exit_code) == (code, 2)


@pytest.mark.parametrize(
    ("table", "args"),
    [
        ("models", ["model", "publish", "MODEL", "--name", "new"]),
        ("assignments", ["assign", "toy"]),
        ("join_keys", ["join-key", "create", "--project", "a"]),
        ("api_keys", ["api-key", "create", "--project", "a"]),
    ],
)
def test_database_that_takes_nothing(tmp_path: Path, table: str, args: list[str]) -> None:
    with Store.open(tmp_path / "data") as store:
        catalog.register(store.db, ROW)
        store.db.execute(f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    path = str(model(tmp_path / "m"))
    result = router(tmp_path / "data", *(path if arg == "MODEL" else arg for arg in args))
    assert result.stdout == ""
    assert isinstance(result.exception, AgentError)
    assert (result.exception.code, result.exception.exit_code) == ("router_data", 77)
    assert "disk is full" in result.exception.message


def test_directory_that_was_none_is_told(tmp_path: Path) -> None:
    first, second = (router(tmp_path / "typo", "api-key", "create", "--project", "a") for _ in range(2))
    assert "there was no router in" in first.stderr
    assert second.stderr == ""


def test_second_router_on_one_directory(tmp_path: Path) -> None:
    with router_lock(tmp_path):
        result = router(tmp_path, "serve", "--listen", "127.0.0.1:0")
    assert isinstance(result.exception, AgentError)
    assert (result.exception.code, result.exception.exit_code) == ("already_running", 14)


async def test_agent_that_was_removed_gets_nothing_assigned(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        agent = await bench.agent()
        assert router(tmp_path, "assign", MODEL, "--agent", agent.id).exit_code == 0
        bench.store.db.execute("UPDATE agents SET state='removed'")
        result = router(tmp_path, "assign", MODEL, "--agent", agent.id)
    assert isinstance(result.exception, AgentError)
    assert result.exception.code == "agent_unknown"


@pytest.mark.parametrize("args", [["--expires", "0h"], ["--expires", "24"], ["--expires", "soon"], ["--uses", "0"]])
def test_values_that_are_none(tmp_path: Path, args: list[str]) -> None:
    result = router(tmp_path, "join-key", "create", "--project", "a", *args)
    assert (result.exit_code, result.stdout) == (2, "")


def test_certificate_needs_its_key(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    cert.write_text("")
    assert router(tmp_path, "serve", "--tls-cert", str(cert)).exit_code == 2


async def test_beside_a_running_router(tmp_path: Path) -> None:
    """A key made by a command works at once, and leads to where the router really is."""
    async with running(tmp_path / "data") as bench:
        key = router(tmp_path / "data", "join-key", "create", "--project", "test").stdout.strip()
        assert JoinKey.parse(key).routers == (bench.url,)
        agent = FakeAgent(bench.url)
        bench.agents.append(agent)
        assert (await agent.enroll(key)).status_code == 201
        api_key = router(tmp_path / "data", "api-key", "create", "--project", "test").stdout.strip()
        async with bench.http() as http:
            reply = await http.get("/v1/models", headers={"authorization": f"Bearer {api_key}"})
        assert [found["id"] for found in reply.json()["data"]] == [MODEL]


def test_assigning_the_same_again_changes_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for number in (1, 2):
            row = catalog.Published("toy", f"r{number}", "toy", f"sha256:{number:064}", 1, 1, "generate", float(number))
            catalog.register(store.db, row)
        assert catalog.assign(store.db, "toy", "r1", None).generation == 1
        assert catalog.assign(store.db, "toy", "r1", None).generation == 1
        newest = catalog.assign(store.db, "toy", None, None)
        assert (newest.generation, newest.model.revision) == (2, "r2")


def test_other_content_under_the_same_revision_is_a_new_generation(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for content, generation in ((1, 1), (1, 1), (2, 2)):
            row = catalog.Published("toy", "r1", "toy", f"sha256:{content:064}", 1, 1, "generate", 1.0)
            catalog.register(store.db, row)
            catalog.assign(store.db, "toy", None, None)
            found = catalog.assignment(store.db, "any agent")
            assert found is not None
            assert (found.generation, found.model.manifest) == (generation, f"sha256:{content:064}")


@pytest.mark.parametrize(
    ("architectures", "files", "task"),
    [
        (["LlamaForCausalLM"], [], "generate"),
        (["Qwen2VLForConditionalGeneration"], [], "generate"),
        (["BertModel"], [], "embed"),
        (["Qwen3ForCausalLM"], ["modules.json"], "embed"),
        (["BertForSequenceClassification"], [], "score"),
        (None, [], "generate"),
    ],
)
def test_task_of_a_model(architectures: list[str] | None, files: list[str], task: str) -> None:
    assert catalog.task_of({"architectures": architectures}, files) == task
