"""The files in deploy/ name what exists: settings, extras, options, files, services, secrets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
import yaml

from tegula import folders
from tegula.cli.program import PROGRAM
from tegula.server.settings import ServerSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
VARIABLES = {
    *(f"TEGULA_{name.upper()}" for name in ServerSettings.model_fields),
    folders.CACHE_VARIABLE,
    folders.MODELS_VARIABLE,
}


def documents(name):
    return [each for each in yaml.safe_load_all((DEPLOY / name).read_text()) if each]


def instructions():
    """Return the words of the Dockerfile's instructions, continued lines put together."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [line.split(None, 1) for line in lines.splitlines() if line.strip()]


def values(found, key):
    """Yield what stands under a key, at any depth."""
    if isinstance(found, dict):
        for name, value in found.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(found, list):
        for value in found:
            yield from values(value, key)


def check(words):
    """Check a command of tegula by reading it as the command line does, without running it."""
    command, context = PROGRAM, click.Context(PROGRAM)
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(context, name)
        assert command is not None, name
        context = click.Context(command, parent=context, info_name=name)
    command.parse_args(context, list(words))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_is_a_setting(path):
    named = set(re.findall(r"TEGULA_[A-Z_]+", path.read_text()))
    assert named <= VARIABLES, named - VARIABLES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_has_its_options(path):
    text = re.sub(r"\\\n#?", " ", path.read_text())
    commands = re.findall(r"(?<![\w-])tegula (serve|tokens create)\b([^\n&]*)", text)
    for name, rest in commands:
        check([*name.split(), *shlex.split(rest.strip().rstrip("\"'"))])
    assert commands or path.name in ("Dockerfile", "compose.gpu.yaml")


def test_the_image_serves_when_nothing_else_is_said():
    words = dict(each for each in instructions() if each[0] in ("ENTRYPOINT", "CMD"))
    assert json.loads(words["ENTRYPOINT"]) == ["tegula"]
    check(json.loads(words["CMD"]))
    probe = next(rest for word, rest in instructions() if word == "HEALTHCHECK")
    assert "127.0.0.1:8000/readyz" in probe
    (user,) = (rest for word, rest in instructions() if word == "USER")
    assert user == "tegula"


def test_what_the_image_copies_is_there_and_not_left_out_of_its_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    stages = {
        line.split()[-1] for word, line in instructions() if word == "FROM" and " AS " in line
    }
    for word, rest in instructions():
        if word == "COPY":
            *sources, _target = rest.split()
            if sources[0].startswith("--from="):
                assert sources[0].partition("=")[2] in stages
                continue
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.rstrip('/')}" in ignored, source


def test_extras_and_pythons_exist():
    extras = re.findall(r"--extra (\S+)", DOCKERFILE)
    texts = [path.read_text() for path in (*FILES, ROOT / "docs" / "scaling.md")]
    for text in texts:
        for some in re.findall(r"tegula\[([\w,]+)\]", text):
            extras += some.split(",")
    assert {"server", "postgres", "objects", "ray"} <= set(extras)
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    (python,) = re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    locked = (ROOT / "requirements" / f"dev-{python}.txt").read_text()
    assert f"ray=={documents('kuberay.yaml')[0]['spec']['rayVersion']} " in locked


def test_images_are_ours_or_have_a_version():
    found = [
        *values(documents("compose.yaml"), "image"),
        *values(documents("kuberay.yaml"), "image"),
    ]
    for image in found:
        name, _, tag = image.partition(":")
        assert image == "tegula:latest" or re.search(r"\d", tag), image
        assert "." not in name, image  # of Docker Hub


def test_services_wait_for_services_that_are_there_and_say_when_they_are_ready():
    (compose,) = documents("compose.yaml")
    services, wants = compose["services"], {}
    for service in services.values():
        wants |= service.get("depends_on", {})
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or source[0] in ".$", source
    for name, how in wants.items():
        assert how["condition"] != "service_healthy" or "test" in services[name]["healthcheck"]
    environment = services["api"]["environment"]
    for variable, service in (("AWS_ENDPOINT_URL", "store"), ("RAY_ADDRESS", "ray-head")):
        host = re.sub("^http://", "", environment[variable]).partition(":")[0]
        assert host == service
    assert re.search(r"@(\w+)/", environment["TEGULA_DATABASE_URL"])[1] in services
    (gpu,) = documents("compose.gpu.yaml")
    assert set(gpu["services"]) <= set(services)


def test_what_compose_needs_from_the_environment_is_said_on_top():
    text = (DEPLOY / "compose.yaml").read_text()
    head = text.partition("\nname:")[0]
    for name in re.findall(r"\$\{(\w+):\?", text):
        assert name in head


def test_the_manifest_hangs_together():
    ray, deployment, service, policy = documents("kuberay.yaml")
    kinds = [each["kind"] for each in documents("kuberay.yaml")]
    assert kinds == ["RayCluster", "Deployment", "Service", "NetworkPolicy"]
    (group,) = ray["spec"]["workerGroupSpecs"]
    assert ray["spec"]["enableInTreeAutoscaling"] is True
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    template = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    (api,) = template["spec"]["containers"]
    environment = {each["name"]: each.get("value") for each in api["env"]}
    # The operator names the service of a head after its cluster.
    assert environment["RAY_ADDRESS"] == f"{ray['metadata']['name']}-head-svc:6379"
    # It labels the pods of a cluster with its name, and these and the servers may reach them.
    ours = {"ray.io/cluster": ray["metadata"]["name"]}
    assert policy["spec"]["podSelector"]["matchLabels"] == ours
    allowed = [each["podSelector"]["matchLabels"] for each in policy["spec"]["ingress"][0]["from"]]
    assert allowed == [ours, template["metadata"]["labels"]]
    actors = int(environment["TEGULA_RAY_MAX_ACTORS"]) * deployment["spec"]["replicas"]
    assert actors <= group["maxReplicas"]
    assert service["spec"]["ports"][0]["targetPort"] in [port["name"] for port in api["ports"]]
    assert (api["readinessProbe"]["httpGet"]["path"], api["livenessProbe"]["httpGet"]["path"]) == (
        "/readyz", "/healthz"
    )  # fmt: skip
    uid = re.search(r"--uid (\d+)", DOCKERFILE)[1]
    assert str(template["spec"]["securityContext"]["runAsUser"]) == uid


def test_secrets_are_referred_to_and_said_how_to_make():
    text = (DEPLOY / "kuberay.yaml").read_text()
    wanted = {
        (each["name"], each["key"]) for each in values(documents("kuberay.yaml"), "secretKeyRef")
    }
    (name,) = re.findall(r"create secret generic (\w+)", text)
    assert wanted == {(name, key) for key in re.findall(r"--from-literal=([\w-]+)=", text)}


@pytest.mark.skipif(find_spec("ray") is None, reason="needs tegula[ray]")
def test_ray_is_started_with_options_that_it_has():
    known = (Path(find_spec("ray").origin).parent / "scripts" / "scripts.py").read_text()
    text = (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "kuberay.yaml").read_text()
    used = set(re.findall(r"(?:ray start.*| - )(--[a-z-]+)", text))
    for line in re.findall(r"ray start (.*)", text):
        used |= set(re.findall(r"--[a-z-]+", line))
    for parameters in values(documents("kuberay.yaml"), "rayStartParams"):
        used |= {f"--{name}" for name in parameters}
    assert {"--num-cpus", "--address", "--block"} <= used
    assert [name for name in used if f'"{name}"' not in known] == []


def unit():
    return (DEPLOY / "tegula.service").read_text()


def test_the_unit_keeps_its_data_where_systemd_makes_the_folder():
    (folder,) = re.findall(r"^StateDirectory=(\S+)", unit(), re.MULTILINE)
    assert f"TEGULA_FOLDER=%S/{folder} " in unit()
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"):
        assert f"\n{line}\n" in unit()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    path = tmp_path / "tegula.service"
    path.write_text(unit().replace("/opt/tegula/bin/tegula", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    assert [line for line in done.stderr.splitlines() if "tegula.service" in line] == []
