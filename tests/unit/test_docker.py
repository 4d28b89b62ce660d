"""docker/ as it can be judged without an engine: linted, parsed, and held against the sources.

`tests/flows/test_docker_steps.py` carries the server image's steps out.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement

import dockerfiles as d
from mlflow_kdguard import __version__
from requirements import require

PROJECT = tomllib.loads((d.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((d.DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
IMAGE = re.compile(
    r"(?P<name>[a-z0-9/-]+):(?P<tag>[\w.-]*\d+\.\d+[\w.-]*|RELEASE[\w.-]+)(@sha256:[0-9a-f]{64})?"
)
SECRET = re.compile(
    r"password|secret|token|credential|private|access_key|session_key", re.IGNORECASE
)
each_image = pytest.mark.parametrize(
    ("path", "target"), d.IMAGES, ids=[target for _, target in d.IMAGES]
)
each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))


def _tool(name: str) -> str:
    program = Path(sys.executable).parent / name
    found = str(program) if program.exists() else shutil.which(name)
    require("lint", found is not None, f"{name} was not found (extra `dev`)")
    assert found is not None
    return found


# ── Dockerfiles ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", d.FILES, ids=lambda path: path.name)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run(
        [_tool("hadolint"), "--no-color", "--failure-threshold", "style", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("path", d.FILES, ids=lambda path: path.name)
def test_every_base_image_is_pinned(path: Path) -> None:
    stages = d.stages(path)
    bases = {stage.base for stage in stages.values()} - set(stages)
    assert len(bases) == 1, "one base image, so that one layer is shared"
    found = IMAGE.fullmatch(bases.pop())
    assert found
    assert found["name"] == "python"
    assert re.fullmatch(r"3\.\d+\.\d+-slim-[a-z]+", found["tag"]), "version, variant and release"
    assert f"Python :: {found['tag'].rpartition('.')[0]}" in " ".join(PROJECT["classifiers"])


@each_image
def test_it_runs_as_nobody_in_particular(path: Path, target: str) -> None:
    user = d.last(d.lineage(path, target), "USER")
    assert user is not None
    assert user.text == "10001:10001", "a number: Kubernetes can check that it is not root"


@each_image
def test_it_can_be_asked_for_its_health(path: Path, target: str) -> None:
    check = d.last(d.lineage(path, target), "HEALTHCHECK")
    assert check is not None
    assert "CMD [" in check.text


@each_image
def test_a_read_only_root_is_enough(path: Path, target: str) -> None:
    """What is written at run time goes to /tmp or to a volume; nothing is compiled at start."""
    settings = d.values(d.lineage(path, target), "ENV")
    assert settings["HOME"] == "/tmp"
    assert settings["PYTHONDONTWRITEBYTECODE"] == "1"
    made = [i.text for i in d.lineage(path, target) if i.keyword == "RUN"]
    assert all(text.startswith("install -d -o 10001 ") for text in made), "no step but folders"


@each_image
def test_only_the_environment_is_taken_from_the_build(path: Path, target: str) -> None:
    """No compiler cache, no wheel and no source reaches the image that ships."""
    copies = [i for i in d.lineage(path, target) if i.keyword == "COPY"]
    taken = [i.arguments for i in copies if "from" in i.options]
    assert taken == [["/opt/kdguard", "/opt/kdguard"]]
    assert [i.arguments[0] for i in copies if "from" not in i.options] == (
        ["docker/entrypoint.sh"] if target == "server" else []
    )


@pytest.mark.parametrize("path", d.FILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_reaches_the_builder(path: Path) -> None:
    sent = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    assert sent[1] == "*", "everything is left out but what is named"
    allowed = {line[1:] for line in sent if line.startswith("!")}
    stages = d.stages(path)
    used = set()
    for instruction in (i for stage in stages.values() for i in stage.own):
        assert instruction.keyword != "ADD"
        if instruction.keyword != "COPY":
            continue
        if "from" in instruction.options:
            assert instruction.options["from"] in stages
            continue
        for source in instruction.arguments[:-1]:
            assert (d.ROOT / source).exists(), source
            used |= {name for name in allowed if Path(source).is_relative_to(name)}
            assert any(Path(source).is_relative_to(name) for name in allowed), source
    assert used == allowed


@pytest.mark.parametrize("path", d.FILES, ids=lambda path: path.name)
def test_everything_that_pip_installs_is_pinned(path: Path) -> None:
    commands = [
        part.split("install", 1)[1]
        for stage in d.stages(path).values()
        for instruction in stage.own
        if instruction.keyword == "RUN"
        for part in instruction.text.split("&&")
        if "pip install" in part
    ]
    assert len(commands) >= 3
    for command in commands:
        assert " --no-cache-dir " in command
        named = re.findall(r"--requirement /src/docker/requirements/(\w[\w-]*)\.txt", command)
        assert named or "--no-deps /src/dist/*.whl" in command, command
        for name in named:
            assert d.pins(name)
    assert not re.search(r"\b(apt|apt-get|curl|wget|chmod 777|sudo)\b", path.read_text())


@pytest.mark.parametrize("path", d.FILES, ids=lambda path: path.name)
def test_no_secret_is_built_in(path: Path) -> None:
    for stage in d.stages(path).values():
        named = d.values(stage.own, "ENV") | d.values(stage.own, "ARG")
        assert not [name for name in named if SECRET.search(name)]


# ── Pins ────────────────────────────────────────────────────────────────────────────────────────

PIPELINE = {"cpu": ("pipeline", "torch-cpu"), "cuda": ("pipeline", "torch-cuda")}


def _asked(extra: str | None) -> list[Requirement]:
    rows = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [Requirement(row) for row in rows]


@pytest.mark.parametrize(
    ("files", "extra"),
    [(("server",), "gate"), (PIPELINE["cpu"], "all"), (PIPELINE["cuda"], "all")],
    ids=["server", "cpu", "cuda"],
)
def test_the_pins_are_what_the_project_asks_for(files: tuple[str, ...], extra: str) -> None:
    pinned = d.pins(*files)
    for asked in _asked(None) + _asked(extra):
        name = asked.name.lower()
        if name.startswith("onnxruntime"):
            name = "onnxruntime" if files[-1] == "torch-cpu" else "onnxruntime-gpu"
            assert asked.specifier.contains(pinned[name])
        elif asked.marker is None or asked.marker.evaluate():
            assert asked.specifier.contains(pinned[name]), asked
    assert {"psycopg2-binary", "boto3"} <= set(pinned), "PostgreSQL and S3"


def test_a_server_has_no_torch_and_a_cpu_has_no_cuda() -> None:
    heavy = ("torch", "onnxruntime", "triton", "nvidia-", "cuda-")
    assert not [name for name in d.pins("server") if name.startswith(heavy)]
    assert not [name for name in d.pins(*PIPELINE["cpu"]) if name.startswith(heavy[2:])]
    cpu, cuda = d.pins("torch-cpu"), d.pins("torch-cuda")
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    assert cpu["torchvision"] == f"{cuda['torchvision']}+cpu"
    assert cpu["onnxruntime"] == cuda["onnxruntime-gpu"]


def test_the_images_agree_on_what_they_share() -> None:
    server, pipeline = d.pins("server"), d.pins("pipeline")
    assert {name: server[name] for name in server.keys() & pipeline.keys()} == {
        name: pipeline[name] for name in server.keys() & pipeline.keys()
    }
    assert set(server) <= set(pipeline)


# ── The entry point ─────────────────────────────────────────────────────────────────────────────


def _enter(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", d.DOCKER / "entrypoint.sh", *command],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_secrets_come_from_files(tmp_path: Path) -> None:
    secret = tmp_path / 'it\'s a "secret" $(false)'
    secret.write_text("p a$s'w\"ord`\n")
    done = _enter("env", PGPASSWORD_FILE=str(secret), OTHER_FILE="kept")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "PGPASSWORD=p a$s'w\"ord`" in lines
    assert "OTHER_FILE=kept" in lines
    assert not [line for line in lines if line.startswith("PGPASSWORD_FILE")]


def test_the_entry_point_becomes_the_command() -> None:
    done = _enter("sh", "-c", 'echo "$1"; exit 7', "-", "two  words")
    assert (done.returncode, done.stdout) == (7, "two  words\n")


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_secret_that_is_not_there_stops_the_start(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
    done = _enter("echo", "started", MLFLOW_AUTH_ADMIN_PASSWORD_FILE=str(file))
    assert done.returncode == 2
    assert "started" not in done.stdout
    assert str(file) in done.stderr


# ── Compose ─────────────────────────────────────────────────────────────────────────────────────


def test_compose_is_what_the_specification_allows() -> None:
    done = subprocess.run(
        [
            *(_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"),
            d.DOCKER / "compose.yaml",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@each_service
def test_every_service_is_pinned_and_has_no_more_than_it_needs(service: dict[str, Any]) -> None:
    assert IMAGE.fullmatch(service["image"]), service["image"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service)
    assert "docker.sock" not in str(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@each_service
def test_no_secret_stands_in_the_file(service: dict[str, Any]) -> None:
    named = set(service.get("secrets", []))
    for key, value in service.get("environment", {}).items():
        if SECRET.search(key):
            assert key.endswith("_FILE"), key
            folder, _, name = value.rpartition("/")
            assert folder == "/run/secrets"
            named.discard(name)
    text = str(service)
    assert all(f"/run/secrets/{name}" in text for name in service.get("secrets", []))
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text), "a password in a URI"


def test_what_is_named_is_declared_and_used() -> None:
    for kind in ("secrets", "networks"):
        used = {name for service in SERVICES.values() for name in service.get(kind, [])}
        assert used == set(COMPOSE[kind]), kind
    mounts = [m for service in SERVICES.values() for m in service.get("volumes", [])]
    assert {m["source"] for m in mounts if m["type"] == "volume"} == set(COMPOSE["volumes"])
    for mount in (m for m in mounts if m["type"] == "bind"):
        assert (d.DOCKER / mount["source"]).is_dir()
        assert mount["read_only"] is True
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)


def test_only_the_server_is_reached_from_outside() -> None:
    assert COMPOSE["networks"]["back"]["internal"] is True
    outside = {name for name, service in SERVICES.items() if service["networks"] != ["back"]}
    assert outside == {name for name, service in SERVICES.items() if "ports" in service}
    assert outside == {"server"}


def test_secrets_of_this_host_are_never_committed() -> None:
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    ignored = (d.DOCKER / "secrets" / ".gitignore").read_text().splitlines()
    assert ignored[1:] == ["*", "!.gitignore"]
    if not (d.ROOT / ".git").exists():
        return
    tracked = subprocess.run(
        ["git", "ls-files", "docker"], cwd=d.ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        assert "PRIVATE KEY" not in (d.ROOT / name).read_text(), name
    assert [name for name in tracked if name.startswith("docker/secrets/")] in (
        [],  # not yet added
        ["docker/secrets/.gitignore"],
    )


def _server_options(command: list[str]) -> dict[str, Any]:
    """The options of an `mlflow server` command line, as MLflow itself reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, while it is imported
        from mlflow.cli import cli
    assert command[:2] == ["mlflow", "server"]
    server = cli.commands["server"]
    assert isinstance(server, click.Command)
    return server.make_context("server", list(command[2:])).params


def test_the_servers_command_is_one_that_mlflow_takes() -> None:
    options = _server_options(SERVICES["server"]["command"])
    assert options["registry_store_uri"] == f"kdguard+{options['backend_store_uri']}"
    assert options["app_name"] == "kdguard"
    assert int(options["workers"]) == 2
    cmd = d.last(d.lineage(d.DOCKER / "server.Dockerfile", "server"), "CMD")
    assert cmd is not None
    assert _server_options(cmd.words)["app_name"] == "kdguard"


def test_the_servers_image_is_the_one_that_is_built_here() -> None:
    service = SERVICES["server"]
    assert service["image"].endswith(f":{__version__}")
    assert service["build"] == {"context": "..", "dockerfile": "docker/server.Dockerfile"}
    user = d.last(d.lineage(d.DOCKER / "server.Dockerfile", "server"), "USER")
    assert user is not None
    assert service["user"] == user.text


def test_the_settings_fit_the_volumes(tmp_path: Path) -> None:
    """What compose mounts at /etc/kdguard are settings that the server reads."""
    from mlflow_kdguard.attest import signing
    from mlflow_kdguard.plugin.server.settings import Settings

    shutil.copytree(d.DOCKER / "settings", tmp_path / "s", ignore=shutil.ignore_patterns("*.pem*"))
    (tmp_path / "s" / "keys").mkdir(exist_ok=True)
    signing.keygen(tmp_path / "s" / "log.pem", owner="the server", role="builder")
    settings = Settings.load(tmp_path / "s" / "server.yaml")
    assert settings.enforcing
    mounts = {m["target"]: m for m in SERVICES["server"]["volumes"]}
    assert mounts[str(settings.head.parent)]["source"] == "heads"
    root = settings.stated.content.root.removeprefix("file://")
    assert mounts[root]["source"] == "content"
    environment = SERVICES["server"]["environment"]
    assert Path(environment["KDGUARD_SERVER"]).parent.as_posix() in mounts
    options = _server_options(SERVICES["server"]["command"])
    assert options["artifacts_destination"] in settings.stated.allow


# ── MLproject ───────────────────────────────────────────────────────────────────────────────────


def test_the_project_runs_in_the_image() -> None:
    from mlflow.projects.utils import load_project

    from mlflow_kdguard_cli.main import cli

    project = load_project(str(d.ROOT / "examples" / "docker"))
    assert project.docker_env["image"] == f"mlflow-kdguard:{__version__}-cpu"
    own = yaml.safe_load((d.ROOT / "MLproject").read_text())["entry_points"]
    assert set(project._entry_points) <= set(own)
    for name, entry in project._entry_points.items():
        given = {key: "x" for key, p in entry.parameters.items() if p.default is None}
        program, word, *rest = entry.compute_command(given, None).split()
        assert program == "kdguard"
        command = cli.get_command(click.Context(cli), word)
        assert command is not None
        command.make_context(name, [part.strip("'") for part in rest])
    assert (d.ROOT / "examples" / "docker" / "digits.yaml").is_file()


def test_the_folder_docker_does_not_hide_the_sdk() -> None:
    """MLflow imports the Docker SDK; with the root on sys.path our folder would take its name."""
    import docker

    assert hasattr(docker, "from_env")
    assert not list(d.DOCKER.glob("*.py"))
