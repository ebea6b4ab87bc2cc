"""What the deployment's files say of ports, paths, users and settings is one story, and that of the code."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from coterie.bundle import Bundle
from coterie_cli.serve import SERVICE
from serving.access import PROBES
from serving.keys import create_key
from serving.limits import RequestLimits
from serving.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 120.0


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's, each as its word and the rest."""
    lines = (ROOT / "Containerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(word, re.sub(r"\s+", " ", rest.strip())) for word, _, rest in found]


def said(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


ENV = dict(part.split("=", 1) for part in shlex.split(" ".join(said("ENV"))))
(PORT,), (STATE,), (USER,) = said("EXPOSE"), said("VOLUME"), said("USER")
HEALTH = json.loads(said("HEALTHCHECK")[0].partition("CMD ")[2])
COMMAND = json.loads(said("CMD")[0])
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text("utf-8"))
CLAIM, DEPLOYMENT, SERVED_AS = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8"))
POD = DEPLOYMENT["spec"]["template"]["spec"]
GUIDE = (ROOT / "docs" / "deployment.md").read_text("utf-8")


class Watched(dict[str, str]):
    """An environment that keeps which variables were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


# --- the image -------------------------------------------------------------------------------------------------------


def test_variables_are_those_that_the_service_reads() -> None:
    watched = Watched()
    Settings.from_environment(watched)
    named = set(ENV) | set(COMPOSE["services"]["coterie"]["environment"]) | {one["name"] for one in container()["env"]}
    ours = {name for name in named if name.startswith("COTERIE_")}
    assert {"COTERIE_BUNDLE", "COTERIE_STATE", "COTERIE_KEYS"} < ours <= watched.asked


def test_the_image_runs_one_worker_of_the_service_as_nobody_in_particular() -> None:
    assert COMMAND == ["bentoml", "serve", SERVICE]
    assert ENV["COTERIE_WORKERS"] == "1" and ENV["BENTOML_HOST"] == "0.0.0.0"
    uid, gid = USER.split(":")
    assert uid == gid != "0"
    (made,) = [rest for rest in said("RUN") if "useradd" in rest]
    assert f"--uid {uid} " in made and made.endswith(STATE)
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(row for row, word in enumerate(words) if word == "RUN")


def test_one_port_and_one_path_for_each_thing() -> None:
    service = COMPOSE["services"]["coterie"]
    assert ENV["BENTOML_PORT"] == PORT and f", {PORT}," in HEALTH[2] and "'/readyz'" in HEALTH[2]
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert container()["ports"] == [{"name": "http", "containerPort": int(PORT)}]
    mounts = {one["target"]: one for one in service["volumes"]}
    assert mounts.keys() == {ENV["COTERIE_BUNDLE"], ENV["COTERIE_STATE"]}
    assert mounts[ENV["COTERIE_BUNDLE"]]["read_only"] is True
    assert ENV["COTERIE_STATE"] == STATE
    inside = {one["mountPath"] for one in container()["volumeMounts"]}
    assert {STATE, "/tmp"} < inside and ENV["BENTOML_HOME"].startswith("/tmp/") and service["tmpfs"] == ["/tmp"]
    assert said("COPY")[-1] == f"--chown={USER} bundle {ENV['COTERIE_BUNDLE']}"
    assert said("FROM")[-2:] == ["service AS with-bundle", "service"] and "--target with-bundle" in GUIDE


def test_only_what_is_installed_gets_into_the_image() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    named = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert named == {*packages, *files, "bundle"}
    assert all((ROOT / name).exists() for name in named - {"bundle"})


@contextmanager
def running(command: list[str], environment: dict[str, str], home: Path) -> Iterator[None]:
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_the_image(bundle: Bundle, image: bytes, binaries: Path, home: Path) -> None:
    """Start what the image starts, with its environment, and be answered; its paths and port are of this machine."""
    port, key_file = free_port(), home / "keys.json"
    token = create_key(key_file, "change")[1]
    moved = {
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_PORT": str(port),
        "COTERIE_BUNDLE": str(bundle.path),
        "COTERIE_STATE": str(home / "state"),
        "COTERIE_KEYS": str(key_file),
    }
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COTERIE_", "BENTOML_", "PYTHON", "VIRTUAL_ENV"))
    }
    environment = inherited | ENV | moved
    health = [str(binaries / HEALTH[0]), HEALTH[1], HEALTH[2].replace(f", {PORT},", f", {port},")]

    def healthy() -> bool:
        return not subprocess.run(health, cwd=home, env=environment, capture_output=True).returncode

    assert not healthy()
    with running([str(binaries / COMMAND[0]), *COMMAND[1:]], environment, home):
        end = time.monotonic() + DEADLINE
        while not healthy():
            assert time.monotonic() < end, (home / "log").read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            answer = client.post("/v1/classify", content=image, headers={"Authorization": f"Bearer {token}"})
            assert answer.json()["data"][0]["label"] == bundle.classify([image])[0].label
            assert client.post("/v1/classify", content=image).status_code == 401
            assert client.get("/", headers={"Accept": "text/html"}).status_code == 200
    assert not healthy()


def test_what_the_image_starts_answers_from_any_folder(tiny_bundle: Bundle, digit_images, tmp_path: Path) -> None:
    run_the_image(tiny_bundle, digit_images.images[0], Path(sys.executable).parent, tmp_path)


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_the_images_own_commands_install_what_it_starts(tiny_bundle: Bundle, digit_images, tmp_path: Path) -> None:
    """Needs a package index: `uv run pytest -m acceptance tests/test_deployment.py`."""
    source = tmp_path / "source"
    source.mkdir()
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        there = ROOT / line[1:]
        if line.startswith("!") and there.is_dir():
            shutil.copytree(there, source / there.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif line.startswith("!") and there.exists():
            shutil.copy(there, source)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    install = said("RUN")[0].replace("/opt/coterie", str(tmp_path / "coterie")).replace("python ", f"{sys.executable} ")
    subprocess.run(["sh", "-c", install], cwd=source, env=environment, check=True)
    shutil.rmtree(source)
    run_the_image(tiny_bundle, digit_images.images[0], tmp_path / "coterie" / "bin", tmp_path)


# --- compose and Kubernetes ------------------------------------------------------------------------------------------


def container() -> dict[str, Any]:
    (one,) = POD["containers"]
    return dict(one)


def test_compose_hands_over_the_key_file_as_a_secret_and_nothing_else() -> None:
    service = COMPOSE["services"]["coterie"]
    (secret,) = service["secrets"]
    assert service["environment"] == {"COTERIE_KEYS": f"/run/secrets/{secret}"}
    assert COMPOSE["secrets"].keys() == {secret}
    assert {one["source"] for one in service["volumes"] if one["type"] == "volume"} == COMPOSE["volumes"].keys()
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().exists()
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}


def test_kubernetes_parts_find_each_other() -> None:
    spec, labels = DEPLOYMENT["spec"], DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == SERVED_AS["spec"]["selector"] == labels
    assert [port["targetPort"] for port in SERVED_AS["spec"]["ports"]] == [container()["ports"][0]["name"]]
    volumes = {one["name"]: one for one in POD["volumes"]}
    assert {one["name"] for one in container()["volumeMounts"]} == volumes.keys()
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    mounts = {one["name"]: one for one in container()["volumeMounts"]}
    (keys,) = container()["env"]
    head = (ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8")
    assert keys == {"name": "COTERIE_KEYS", "value": f"{mounts['keys']['mountPath']}/keys.json"}
    assert mounts["keys"]["readOnly"] and "--from-file=keys.json" in head
    assert f"secret generic {volumes['keys']['secret']['secretName']} " in head


def test_kubernetes_never_runs_two_pods_on_one_state_and_asks_the_right_probes() -> None:
    assert (DEPLOYMENT["spec"]["replicas"], DEPLOYMENT["spec"]["strategy"]["type"]) == (1, "Recreate")
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteOnce"]
    asked = {name: container()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in asked.values()} == {"http"}
    paths = {name: probe["path"] for name, probe in asked.items()}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(paths.values()) <= PROBES


def test_kubernetes_pod_may_do_no_more_than_it_must() -> None:
    """As the restricted Pod Security Standard asks: kubernetes.io/docs/concepts/security/pod-security-standards."""
    whole, own = POD["securityContext"], container()["securityContext"]
    uid = int(USER.partition(":")[0])
    assert whole["runAsNonRoot"] is True and whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert whole["runAsUser"] == whole["runAsGroup"] == whole["fsGroup"] == uid
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False and POD["enableServiceLinks"] is False
    assert container()["resources"].keys() == {"requests", "limits"}


# --- the guide -------------------------------------------------------------------------------------------------------


def test_the_guides_proxies_go_with_the_services_limits() -> None:
    usual = RequestLimits()
    assert re.findall(r"client_max_body_size (\d+)m;", GUIDE) == [str(usual.max_body // 2**20)]
    assert re.findall(r"max_size (\d+)MiB", GUIDE) == [str(usual.max_body // 2**20)]
    (patience,) = re.findall(r"proxy_read_timeout (\d+)s;", GUIDE)
    assert int(patience) > usual.seconds
    for language, block in re.findall(r"```(nginx|caddyfile)\n(.*?)```", GUIDE, re.DOTALL):
        assert block.count("{") == block.count("}") > 0, language
        assert f"127.0.0.1:{PORT}" in block


def test_the_guides_files_are_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)", GUIDE):
        assert (ROOT / "docs" / link).resolve().exists(), link
