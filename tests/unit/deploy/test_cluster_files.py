"""cluster.yaml and its variants, as Ray itself checks and prepares them for `ray up`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import BundleSelector, GangResourceRequest

from lmcot.actors.resources.packing import bundle
from lmcot.config import ActorsSettings, RoleSettings
from tests.support.documented import placement

ROOT = Path(__file__).parents[3]
CLOUDS = [ROOT / "cluster.yaml", ROOT / "deploy" / "gcp.yaml"]
LOCAL = ROOT / "deploy" / "local.yaml"
KUBERAY = ROOT / "deploy" / "kuberay.yaml"
ROLES = {"learner", "rollout", "reward", "frozen"}
INSTALL = "pip install -q -c constraints.txt -e '.[aspects,openai,serve,"


def prepared(path: Path) -> dict[str, Any]:
    """As `ray up` has it before it asks the provider for anything."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text(encoding="utf-8")))
    validate_config(config)
    return config


def ray_version() -> str:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^ray==(\S+)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("path", [*CLOUDS, LOCAL], ids=lambda path: path.name)
def test_ray_takes_it_and_installs_lmcot_on_every_node(path: Path) -> None:
    """Not on the head alone: the workers' actors import it."""
    config = prepared(path)
    for kind in ("head", "worker"):
        assert any(INSTALL in command for command in config[f"{kind}_setup_commands"]), kind
        start = config[f"{kind}_start_ray_commands"]
        assert "ray stop" in start[0]
        assert "RAY_AUTH_MODE=token" in start[1], "`ray start` alone runs without"
    mounted = config["file_mounts"]
    assert any(target.endswith(".ray/auth_token") for target in mounted)
    for name, one in config["available_node_types"].items():
        own = one.get("worker_setup_commands")
        assert own is None or any(INSTALL in command for command in own), name


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_every_role_has_a_node_type_of_its_own(path: Path) -> None:
    config = prepared(path)
    types = config["available_node_types"]
    assert types.keys() >= ROLES
    for role in ROLES:
        assert types[role]["resources"][role] >= 1
        assert types[role]["max_workers"] >= 1
    head = types[config["head_node_type"]]
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert sum(one["max_workers"] for one in types.values()) <= config["max_workers"]
    for role in ROLES - {"reward"}:
        assert types[role]["resources"]["GPU"] == 1
    spot = {"InstanceMarketOptions", "scheduling"}
    for role, may_vanish in (("rollout", True), ("reward", True), ("head", False)):
        node = types[role]["node_config"]
        assert bool(spot & node.keys()) == may_vanish, role


def room_for(role: RoleSettings) -> GangResourceRequest:
    """What a role's placement group asks the autoscaler for."""
    bundles = [ResourceRequestUtil.make(bundle(role)) for _ in range(role.count)]
    return GangResourceRequest(
        requests=bundles, bundle_selectors=[BundleSelector(resource_requests=bundles)]
    )


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_the_documented_actors_are_within_the_bounds(path: Path) -> None:
    """And not far within: of a role with one actor too many, none gets a node."""

    def launched(actors: ActorsSettings) -> dict[str, int]:
        config = AutoscalingConfig(prepared(path), skip_content_hash=True)
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[room_for(getattr(actors, role)) for role in ROLES],
        )
        launches = ResourceDemandScheduler(None).schedule(request).to_launch
        return {one.instance_type: one.count for one in launches}

    actors = ActorsSettings.model_validate(placement())
    wanted = {"learner": 1, "rollout": 8, "reward": 1, "frozen": 2}
    assert launched(actors) == wanted
    crowded = actors.rollout.model_copy(update={"count": 9})
    del wanted["rollout"]
    assert launched(actors.model_copy(update={"rollout": crowded})) == wanted


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.name)
def test_images_are_of_the_tested_ray(path: Path) -> None:
    images = re.findall(r"rayproject/ray:(\S+?)-py311", path.read_text(encoding="utf-8"))
    assert set(images) == {ray_version()}


def test_kubernetes_has_the_same_roles() -> None:
    cluster = yaml.safe_load(KUBERAY.read_text(encoding="utf-8"))
    assert cluster["spec"]["rayVersion"] == ray_version()
    groups = {one["groupName"]: one for one in cluster["spec"]["workerGroupSpecs"]}
    assert groups.keys() == ROLES
    for name, one in groups.items():
        assert f'\\"{name}\\"' in one["rayStartParams"]["resources"]
        (container,) = one["template"]["spec"]["containers"]
        variables = {each["name"] for each in container["env"]}
        assert variables == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_slurm_script_is_sound() -> None:
    script = ROOT / "deploy" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the settings, a YAML file" in done.stderr


def test_the_image_runs_as_nobody_in_particular_and_pins_what_it_installs() -> None:
    """No engine is at hand to build it with: this looks at what it says."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000"]
    assert not any(
        line.startswith("FROM ") and line.endswith((":latest", "python")) for line in lines
    )
    installs = [line for line in lines if "pip install" in line and not line.startswith("#")]
    assert len(installs) == 2
    assert all("-c constraints.txt" in line and "--no-cache-dir" in line for line in installs)
    copied = {
        line.split()[2] for line in lines if line.startswith("COPY") and len(line.split()) == 4
    }
    assert all((ROOT / name).exists() for name in copied)
