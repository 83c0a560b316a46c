"""The manifests for Kubernetes and the recipe of the container agree with the code, and with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from ovserve.api.routes import match_route
from ovserve.settings.options import ModelSettings, Settings, options_of
from ovserve.settings.placement import parse_placement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "deploy" / "kubernetes"
WORKERS_EXIT_S = 15
SIZES = {"Mi": 1 << 20, "Gi": 1 << 30}
KNOWN = {*options_of(Settings), *options_of(ModelSettings)}


def manifests() -> dict[str, Any]:
    """Return the documents of ovserve.yaml by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "ovserve.yaml").read_text("utf-8"))}


MANIFESTS = manifests()
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SETTINGS = tomllib.loads(MANIFESTS["ConfigMap"]["data"]["ovserve.toml"])


def in_bytes(text: str) -> int:
    return int(text[:-2]) * SIZES[text[-2:]]


def test_settings_are_options_and_fit_the_pod() -> None:
    assert set(SETTINGS) <= KNOWN
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": SETTINGS["port"]}]
    needed = SETTINGS["shutdown_delay_s"] + SETTINGS["grace_period_s"] + WORKERS_EXIT_S
    assert POD["terminationGracePeriodSeconds"] >= needed
    volumes = {each["name"]: each for each in POD["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in CONTAINER["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    spool = volumes[mounts[SETTINGS["spool_dir"]]]["emptyDir"]
    assert spool["medium"] == "Memory"
    assert SETTINGS["spool_bytes"] <= in_bytes(spool["sizeLimit"])
    assert in_bytes(spool["sizeLimit"]) < in_bytes(CONTAINER["resources"]["requests"]["memory"])
    for name in ("store_dir", "named_keys_file"):
        assert any(SETTINGS[name].startswith(f"{mount}/") for mount in mounts)
    assert CONTAINER["args"][-1] in [f"{mount}/ovserve.toml" for mount in mounts]
    assert volumes["config"]["configMap"]["name"] == MANIFESTS["ConfigMap"]["metadata"]["name"]
    assert volumes["keys"]["secret"]["secretName"] == MANIFESTS["Secret"]["metadata"]["name"]


def test_probes_ask_for_health_routes() -> None:
    paths = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/v2/health/startup", "readiness": "/v2/health/ready", "liveness": "/v2/health/live",
    }  # fmt: skip
    for probe in paths.values():
        assert probe["port"] == "http"
        assert match_route("GET", probe["path"]).is_health
    startup = CONTAINER["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= Settings().load_timeout_s
    interval = CONTAINER["readinessProbe"]["periodSeconds"]
    assert SETTINGS["shutdown_delay_s"] >= 2 * interval


def test_pod_has_no_privileges_and_can_write_only_its_volumes() -> None:
    context = CONTAINER["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert POD["securityContext"]["runAsNonRoot"] is True
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert f"--uid {POD['securityContext']['runAsUser']} " in dockerfile
    assert POD["automountServiceAccountToken"] is False


def test_selectors_find_the_pods() -> None:
    labels = MANIFESTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"],
        MANIFESTS["Service"]["spec"]["selector"],
        MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["minAvailable"] < MANIFESTS["Deployment"]["spec"]["replicas"]


def test_patch_for_a_gpu_changes_this_deployment() -> None:
    patch = yaml.safe_load((FOLDER / "gpu.yaml").read_text("utf-8"))
    assert (patch["kind"], patch["metadata"]["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])
    (container,) = patch["spec"]["template"]["spec"]["containers"]
    assert container["name"] == CONTAINER["name"]
    for variable in container["env"]:
        assert variable["name"].removeprefix("OVSERVE_").lower() in KNOWN
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text("utf-8"))
    assert all((FOLDER / name).is_file() for name in kustomization["resources"])


def test_container_has_an_unprivileged_user_and_its_files_and_health_check_exist() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    instructions = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    assert instructions[0][0] == "FROM"
    user = next(rest for name, rest in instructions if name == "USER")
    assert user != "root"
    assert [name for name, _ in instructions].index("USER") < [name for name, _ in instructions].index("ENTRYPOINT")
    for rest in (rest for name, rest in instructions if name == "COPY"):
        assert all((ROOT / source).exists() for source in rest.split()[:-1])
    for name in re.findall(r"OVSERVE_([A-Z_]+)=", text):
        assert name.lower() in KNOWN
    path = re.search(r"http://127\.0\.0\.1:8000(/[\w/]+)", text)
    assert path
    assert match_route("GET", path[1]).is_health


def test_compose_file_is_as_strict_as_the_pod() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]["ovserve"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_example_for_kuberay_names_options_and_says_that_it_was_never_run() -> None:
    text = (FOLDER / "kuberay.yaml").read_text("utf-8")
    assert "never run" in text
    group = yaml.safe_load(text)["spec"]["headGroupSpec"]
    (front_end,) = [each for each in group["template"]["spec"]["containers"] if each["name"] == "ovserve"]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in front_end["args"][1:])
    assert set(given) <= KNOWN
    assert parse_placement(given["placement"]).cpus == 4
    for probe in ("readinessProbe", "livenessProbe"):
        assert match_route("GET", front_end[probe]["httpGet"]["path"]).is_health
