"""The manifests: strictly valid, and meaning what they should."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from pipeline.cli.app import commands
from pipeline.config import load_run_file
from steering_service.core.address import loopback

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
SCHEMAS = Path(os.environ.get("STEERAGE_SHARED", ROOT.parent / "shared")) / "schemas"
FOLDERS = sorted(
    str(file.parent.relative_to(K8S))
    for file in K8S.rglob("kustomization.yaml")
    if "kind: Kustomization" in file.read_text()
)
BATCH = [folder for folder in FOLDERS if folder.endswith("batch")]
SERVICE = [folder for folder in FOLDERS if folder.endswith("service")]
# The oldest that the manifests need (sidecars, on by default) and the newest that is known.
KUBERNETES = ("1.29", "1.37")
# Made by hand or by cert-manager, as docs/kubernetes.md tells.
DOCUMENTED = {"steerage-bucket", "steerage-trust", "steerage-service-tls", "steerage-node-tls"}


# Schemas


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON schema in which an unknown field is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    is_object = schema.get("type") == "object"
    if (
        is_object
        and not schema.get("x-kubernetes-preserve-unknown-fields")
        and "additionalProperties" not in schema
    ):
        result["additionalProperties"] = False
    return result


@cache
def ray_validator(kind: str, version: str) -> Any:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no KubeRay schema at {path}: {kind} is NOT validated; set STEERAGE_SHARED")
    crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = (v for v in crd["spec"]["versions"] if v["name"] == version)
    schema = strict(found["schema"]["openAPIV3Schema"])
    # The API server checks the metadata of the object itself; a CRD says only that there is some.
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {key: {} for key in ("name", "namespace", "labels", "annotations")},
        "additionalProperties": False,
    }
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def validate(item: dict[str, Any]) -> None:
    group, _, version = item["apiVersion"].rpartition("/")
    if group == "ray.io":
        ray_validator(item["kind"], version).validate(item)
        return
    for kubernetes in KUBERNETES:
        kubernetes_validate.validate(item, kubernetes, strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_is_valid(build, folder):
    objects = build(folder).objects
    assert objects
    for item in sorted(objects, key=lambda item: item["kind"] == "RayJob"):
        validate(item)


def places(value: Any) -> list[dict[str, Any]]:
    """Every object within an object whose fields a schema names."""
    if isinstance(value, list):
        return [place for item in value for place in places(item)]
    if not isinstance(value, dict):
        return []
    maps = ("labels", "matchLabels", "selector", "data", "requests", "limits", "rayStartParams")
    return [value] + [p for k, v in value.items() if k not in maps for p in places(v)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_unknown_field_anywhere_is_an_error(build, folder):
    for item in sorted(build(folder).objects, key=lambda item: item["kind"] == "RayJob"):
        # Each place of each kind once; a RayJob's are too many for a check that takes a second.
        count = len(places(item))
        for index in range(0, count, 1 + count // 12):
            spoiled = copy.deepcopy(item)
            places(spoiled)[index]["colour"] = "red"
            with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
                validate(spoiled)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_stand_in_builds_what_kustomize_builds(build_both, folder):
    real, ours = build_both(folder)

    def plain(objects: list[dict[str, Any]]) -> list[str]:
        texts = [json.dumps(item, sort_keys=True) for item in objects]
        for name in [item["metadata"]["name"] for item in real.of("ConfigMap")]:
            texts = [text.replace(name, re.sub(r"-[a-z0-9]{10}$", "", name)) for text in texts]
        return sorted(texts)

    assert plain(ours.objects) == plain(real.objects)


# References


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_pods_mount_is_declared_or_documented(build, folder):
    built = build(folder)
    declared = {item["metadata"]["name"] for item in built.of("ConfigMap")}
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    accounts = {item["metadata"]["name"] for item in built.of("ServiceAccount")}
    used = set()
    for spec in built.pod_specs:
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            used.add(volume.get("configMap", {}).get("name"))
            used.add(volume.get("secret", {}).get("secretName"))
        assert spec.get("serviceAccountName", "default") in accounts | {"default"}
        for container in spec.get("initContainers", []) + spec["containers"]:
            assert {m["name"] for m in container.get("volumeMounts", [])} <= volumes.keys()
            for source in container.get("envFrom", []):
                used |= {reference["name"] for reference in source.values()}
    used.discard(None)
    assert used - declared <= DOCUMENTED
    assert declared <= used, "a generated ConfigMap that no pod uses"
    for name in used - declared:
        assert name in guide, f"docs/kubernetes.md does not say how {name} is made"


@pytest.mark.parametrize("folder", SERVICE)
def test_selectors_and_ports_agree(build, folder):
    built = build(folder)
    deployment, service = built.one("Deployment"), built.one("Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    budget, policy = built.one("PodDisruptionBudget"), built.one("NetworkPolicy")
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        budget["spec"]["selector"]["matchLabels"],
        policy["spec"]["podSelector"]["matchLabels"],
    ]
    for spread in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        selectors.append(spread["labelSelector"]["matchLabels"])
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    target = built.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]

    envoy = yaml.safe_load((K8S / "base/service/envoy.yaml").read_text())
    ports = {port["name"]: port["containerPort"] for c in built.containers for port in
             c.get("ports", [])}  # fmt: skip
    (port,) = service["spec"]["ports"]
    assert service["spec"]["clusterIP"] == "None"
    assert port["targetPort"] == "grpc"
    assert port["port"] == ports["grpc"] == listener_port(envoy, "nodes")
    assert ports["health"] == listener_port(envoy, "health")
    assert {"Ingress", "Egress"} == set(policy["spec"]["policyTypes"])
    (ingress,) = policy["spec"]["ingress"]
    assert [p["port"] for p in ingress["ports"]] == [ports["grpc"]]
    for source in ingress["from"]:
        assert source["podSelector"]["matchLabels"] == {"steerage-client": "true"}
    for rule in policy["spec"]["egress"]:
        assert {p["port"] for p in rule["ports"]} <= {53, 443}
    paths = ("/alive", "/ready")
    for container in built.containers:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                get = container[probe]["httpGet"]
                assert get["port"] == ports["health"]
                assert get["path"] in paths
    # Envoy's own start must not wait for the service, which starts after it.
    (sidecar,) = deployment["spec"]["template"]["spec"]["initContainers"]
    assert sidecar["startupProbe"]["httpGet"]["path"] == "/alive"
    assert sidecar["restartPolicy"] == "Always"


@pytest.mark.parametrize("folder", BATCH)
def test_the_batch_policy_covers_every_pod_of_the_job(build, folder):
    built = build(folder)
    spec = built.one("RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    templates = [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"]]
    templates += [group["template"] for group in cluster["workerGroupSpecs"]]
    policy = built.one("NetworkPolicy")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    for template in templates:
        assert selector.items() <= template["metadata"]["labels"].items()
    within, operator = policy["ingress"]
    assert within == {"from": [{"podSelector": {"matchLabels": selector}}]}
    assert [p["port"] for p in operator["ports"]] == [8265]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pins
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]


def test_the_example_gives_job_and_service_the_same_bucket(build):
    stores = [
        next(
            item["data"]
            for item in build(f"overlays/example/{part}").of("ConfigMap")
            if item["metadata"]["name"].startswith("steerage-store")
        )
        for part in ("batch", "service")
    ]
    assert stores[0] == stores[1]


# Pods


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_keep_to_the_restricted_profile(build, folder):
    built = build(folder)
    assert built.pod_specs
    for spec in built.pod_specs:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in built.containers:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context.get("runAsUser", 1) > 0
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert tag, f"{container['image']}: expected a tag"
        assert tag != "latest"


# Commands


def parse(words: list[str]) -> dict[str, Any]:
    """Parse a command line of ours as the program would, without running it."""
    assert words[0] == "steerage", words
    group: Any = typer.main.get_command(commands())
    values: dict[str, Any] = group.commands[words[1]].make_context(words[1], words[2:]).params
    return values


@pytest.mark.parametrize("folder", BATCH)
def test_the_job_runs_commands_that_exist(build, folder):
    job = build(folder).one("RayJob")["spec"]
    shell, flag, script = shlex.split(job["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    # Ray puts the words together with double quotes, which these would end or expand.
    assert not set(script) & set('"\\$`')
    extract, reduce = (shlex.split(command) for command in script.split("&&"))
    for name, words in (("extract", extract), ("reduce", reduce)):
        assert words[1] == name
        values = parse(words)
        assert values["run_file"] == Path("/etc/steerage/run.toml")
        assert values["ray"] == "auto"
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    workers = parse(extract)["workers"]
    spare = group["replicas"] * int(container["resources"]["requests"]["cpu"]) - workers
    assert spare >= 1, "Ray Data needs a CPU beside the workers"
    gpus = group["replicas"] * container["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert (parse(extract)["device"] == "cuda") == (gpus > 0)
    if gpus:
        assert workers == gpus
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts["run"] == "/etc/steerage"


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f not in BATCH])
def test_other_containers_run_commands_that_exist(build, folder):
    ours = [c for c in build(folder).containers if "steerage:" in c["image"]]
    assert ours
    for container in ours:
        values = parse(container["command"] + container.get("args", []))
        assert loopback(values["address"]) == "127.0.0.1:7433"
        if container["name"] == "service":
            assert values["trust"] == [Path("/etc/steerage/trust")]


@pytest.mark.parametrize("path", sorted(K8S.rglob("run.toml")), ids=lambda path: path.parent.name)
def test_run_files_load(path):
    run = load_run_file(path)
    for used in (run.model.path, *run.prompts.files):
        assert used.is_relative_to("/models")


def test_the_guide_names_commands_and_folders_that_exist():
    guide = (ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in guide.splitlines() if line.startswith("    ")]
    ours = [line for line in lines if line.startswith("steerage ")]
    assert ours
    for line in ours:
        parse(shlex.split(line))
    for path in re.findall(r"k8s/[\w/.-]*\w", guide):
        assert (ROOT / path).exists(), path
    applied = re.findall(r"(?:apply -k|kustomize) k8s/(\S+)", guide)
    assert applied
    assert set(applied) <= set(FOLDERS)


def listener_port(envoy: dict[str, Any], name: str) -> int:
    (found,) = (l for l in envoy["static_resources"]["listeners"] if l["name"] == name)  # noqa: E741
    port: int = found["address"]["socket_address"]["port_value"]
    return port
