"""`lmcot doctor` checks whether this machine, or each node of a cluster, is fit for a run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmcot.config import Config
from lmcot.errors import UserError, first_line
from lmcot.network import why_taken
from lmcot.storage import is_remote, remove, write_whole

if TYPE_CHECKING:
    from lmcot.storage import Place

GIB = 2**30
_LEAST_DISK, _LEAST_SHM, _LEAST_FILES = 5 * GIB, 2 * GIB, 8192
_LEAST_MEMORY, _LEAST_BESIDE_STORE = GIB, GIB // 4
_PACKAGES = ("lmcot", "ray", "torch", "transformers", "deepspeed")
_PYTHON = (3, 11)

Verdict = Literal["ok", "note", "fix"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    verdict: Verdict
    text: str
    """What was found and, if there is a problem, how to fix it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about one machine."""

    name: str
    python: tuple[int, int, int]
    versions: dict[str, str]
    """Versions of the packages that matter; empty if one is not installed."""
    temp: str
    """Folder of Ray's files."""
    temp_free: int
    shm_free: int
    """Free bytes of shared memory, where Ray keeps objects."""
    open_files: int
    gpus: int
    compiler: str
    """Path of the C++ compiler, which DeepSpeed builds its operators with; empty if there is
    none."""
    memory: int = 2**40
    """Available bytes, as Ray counts them."""
    unmet: tuple[str, ...] = field(default=())
    """Requirements of lmcot that are not met."""
    troubles: tuple[str, ...] = field(default=())
    """Reasons why Ray or lmcot would not start here, a sentence each."""
    notices: tuple[str, ...] = field(default=())
    """Replacements for what the environment names, a sentence each."""


def doctor(config: Config | None, run_dir: Place | None, *, as_json: bool = False) -> int:
    """Prints the findings for each machine.

    Args:
        as_json: a line of JSON for each.

    Returns:
        how many things are to be fixed.
    """
    count = 0
    for one in _findings(config, run_dir):
        shown = json.dumps(asdict(one)) if as_json else f"{one.verdict:5s} {one.text}"
        print(shown, flush=True)
        count += one.verdict == "fix"
    if as_json:
        return count
    print(f"{count} problem{'s' * (count != 1)} to fix" if count else "all is well")
    return count


def _findings(config: Config | None, run_dir: Place | None) -> Iterator[Finding]:
    address = _address(config)
    if address is None:
        local = list(_looked_at("this machine", lambda: examine(local_facts(), config)))
        yield from local
        yield from _looked_at("the service", lambda: _served(config, _gpus()))
        if not any(one.verdict == "fix" for one in local):
            yield from _looked_at("Ray", lambda: _started(config))
    else:
        yield from _looked_at(
            "the cluster", lambda: examine_nodes(cluster_facts(config, address), config)
        )
    if config is not None:
        yield from _looked_at("serve.host", lambda: [_port(config)])
        yield from _looked_at("the frozen LM", lambda: _frozen(config))
    if run_dir is not None:
        yield from _looked_at("the run directory", lambda: [_writable(run_dir)])


def _looked_at(what: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; a check that fails becomes a finding, and the others still run."""
    try:
        yield from look()
    except UserError as error:
        yield Finding("fix", f"{what}: {error}")
    except Exception as error:
        reason = f"{first_line(error)} ({type(error).__name__})"
        yield Finding("fix", f"{what} cannot be checked: {reason}")


def examine(facts: Facts, config: Config | None) -> list[Finding]:
    """The findings from one machine's facts."""
    where = f"{facts.name}: "
    found = [
        _found(
            facts.python[:2] >= _PYTHON,
            f"{where}Python {'.'.join(map(str, facts.python))}",
            "lmcot needs 3.11 or newer",
        ),
        _found(
            not facts.unmet and bool(facts.versions.get("lmcot")),
            where + ", ".join(f"{k} {v or 'missing'}" for k, v in facts.versions.items()),
            f"install {', '.join(facts.unmet) or 'lmcot'} (pip install -c constraints.txt)",
        ),
        _found(
            facts.temp_free >= _LEAST_DISK,
            f"{where}{_gib(facts.temp_free)} free in {facts.temp}, where Ray puts its files",
            "free some, or set RAY_TMPDIR to a larger disk (a short path)",
        ),
        _found(
            facts.shm_free >= _LEAST_SHM,
            f"{where}{_gib(facts.shm_free)} of shared memory free",
            "objects spill to the disk: give a container --shm-size=4g or more",
            worse="note",
        ),
        _found(
            facts.memory >= _LEAST_MEMORY,
            f"{where}{_gib(facts.memory)} of memory available",
            "too little for Ray and models: free some, or raise the container's limit",
        ),
        *_object_store(facts, config),
        _found(
            facts.open_files >= _LEAST_FILES,
            f"{where}open-file limit {facts.open_files}",
            "raise it (ulimit -n 65536) before `ray start`: each actor takes some hundred",
            worse="note",
        ),
        _found(
            bool(facts.compiler),
            f"{where}C++ compiler {facts.compiler or 'missing'}",
            "install one (g++): DeepSpeed builds its operators with it",
        ),
    ]
    found += [Finding("fix", where + trouble) for trouble in facts.troubles]
    found += [Finding("note", where + notice) for notice in facts.notices]
    wanted = _gpus_wanted(config)
    enough = facts.gpus > 0 or not wanted
    remedy = (
        "the settings ask for GPUs: drivers, or a CUDA build of torch, are missing, or "
        "CUDA_VISIBLE_DEVICES hides them"
    )
    # A node of a cluster may have no GPU.
    worse: Literal["note", "fix"] = "fix" if _address(config) is None else "note"
    found.append(_found(enough, f"{where}{facts.gpus} GPUs", remedy, worse=worse))
    return found


def examine_nodes(nodes: Sequence[Facts], config: Config | None) -> list[Finding]:
    """The findings for all machines of a cluster, and whether they agree."""
    found = [one for facts in nodes for one in examine(facts, config)]
    for package in _PACKAGES:
        versions = {facts.versions.get(package, "") for facts in nodes}
        if len(versions) > 1:
            told = ", ".join(
                f"{facts.name} has {facts.versions.get(package) or 'none'}" for facts in nodes
            )
            found.append(Finding("fix", f"{package} differs between nodes ({told}): install one"))
    return found


def local_facts(name: str = "this machine") -> Facts:
    """The facts about the machine that this runs on."""
    from lmcot.actors.resources.surroundings import available_memory, look_around

    temp, troubles, notices = look_around()
    return Facts(
        name=name,
        python=sys.version_info[:3],
        versions={one: _version(one) for one in _PACKAGES},
        temp=temp,
        temp_free=shutil.disk_usage(_existing(temp)).free,
        shm_free=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=_gpus(),
        compiler=shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "",
        memory=available_memory(),
        unmet=tuple(_unmet()),
        troubles=tuple(troubles),
        notices=tuple(notices),
    )


def cluster_facts(config: Config | None, address: str) -> list[Facts]:
    """The facts about every node that is alive.

    Raises:
        UserError: if the cluster cannot be joined, or a node does not answer in time.
    """
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from lmcot.actors.resources.cluster import ray_cluster
    from lmcot.config import ActorsSettings

    settings = config.actors if config is not None else ActorsSettings(address=address)
    with ray_cluster(settings):
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                placed = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(local_facts).options(num_cpus=0, scheduling_strategy=placed)
                name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
                asked[name] = task.remote(name)
        try:
            return list(ray.get(list(asked.values()), timeout=settings.start_timeout_s))
        except GetTimeoutError:
            raise UserError(
                f"waited {settings.start_timeout_s:.0f} s for the {len(asked)} nodes of the "
                "cluster to report their facts: is lmcot installed on each of them?"
            ) from None


def _address(config: Config | None) -> str | None:
    from lmcot.actors.resources.cluster import joined_address
    from lmcot.config import ActorsSettings

    return joined_address(config.actors if config is not None else ActorsSettings())


def _existing(path: str | Path) -> Path:
    """The path, or the nearest existing one above it."""
    whole = Path(path).absolute()
    return next(one for one in (whole, *whole.parents) if os.path.exists(one))


def _object_store(facts: Facts, config: Config | None) -> Iterable[Finding]:
    """Checks that the object store of the settings fits; if unset, it is made to fit."""
    if config is None or config.actors.object_store_gib is None or _address(config):
        return
    asked = int(config.actors.object_store_gib * GIB)
    where = f"{facts.name}: actors.object_store_gib {config.actors.object_store_gib:g}"
    if asked > facts.memory - _LEAST_BESIDE_STORE:
        text = f"{where}, but {_gib(facts.memory)} of memory are available"
        yield Finding("fix", f"{text}: lower it, or free some")
    elif asked > facts.shm_free:
        text = f"{where}, but {_gib(facts.shm_free)} of shared memory are free"
        yield Finding("note", f"{text}: Ray maps files in its folder instead, which is slow")


def _started(config: Config | None) -> Iterable[Finding]:
    """Checks that Ray starts on this machine as a run would start it."""
    from lmcot.actors.resources.cluster import ray_cluster
    from lmcot.config import ActorsSettings

    with ray_cluster(config.actors if config is not None else ActorsSettings()):
        yield Finding("ok", "Ray starts on this machine")


def _found(well: bool, text: str, remedy: str, *, worse: Literal["note", "fix"] = "fix") -> Finding:
    return Finding("ok", text) if well else Finding(worse, f"{text}: {remedy}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _unmet() -> Iterable[str]:
    """Requirements, without extras, of which no matching version is installed."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires("lmcot") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in required:
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        installed = _version(one.name)
        if not installed or not one.specifier.contains(installed, prereleases=True):
            yield re.sub(r"\s*;.*", "", text)


def _gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return int(torch.cuda.device_count())


def _gpus_wanted(config: Config | None) -> bool:
    if config is None:
        return False
    actors = config.actors
    return any(role.gpus for role in (actors.rollout, actors.reward, actors.learner, actors.frozen))


def _served(config: Config | None, gpus: int) -> Iterable[Finding]:
    """Checks that the service's replicas have room on this machine; `lmcot plan` checks
    clusters."""
    if config is None or config.frozen is None:
        return
    from ray._private.utils import get_num_cpus

    from lmcot.actors.resources.packing import Node
    from lmcot.actors.resources.served import find_served_plan

    machine = Node("this machine", {"CPU": float(get_num_cpus()), "GPU": float(gpus)})
    plan = find_served_plan(config, [machine])
    if plan.short:
        yield Finding("fix", plan.refusal)
    else:
        yield Finding("ok", f"there is room for the replicas of `lmcot serve` ({plan.summary})")


def _port(config: Config) -> Finding:
    host, port = config.serve.host, config.serve.port
    if reason := why_taken(host, port):
        text = f"{host}:{port}, where `lmcot serve` would listen, is not free ({reason})"
        return Finding("note", f"{text}: set serve.port")
    return Finding("ok", f"{host}:{port} is free for `lmcot serve`")


def _frozen(config: Config) -> Iterable[Finding]:
    from lmcot.data.prompts import templates_for
    from lmcot.frozen.needs import cost_in_words
    from lmcot.rewards.first_check import check_frozen

    if config.frozen is None:
        return
    try:
        checked = check_frozen(config, templates_for(config.prompts))
    except UserError as error:
        yield Finding("fix", f"the frozen LM: {error}")
        return
    asked = f" (asked: {cost_in_words(checked.usage)})" if checked.usage.sent else ""
    yield Finding("ok", f"the frozen LM is there{asked}")
    for notice in checked.notices:
        yield Finding("note", f"the frozen LM: {notice.removeprefix('frozen: ')}")


def _writable(run_dir: Place) -> Finding:
    if is_remote(run_dir):
        probe = run_dir / ".lmcot-doctor"
        try:
            write_whole(probe, "written to see whether it can be")
            remove(probe)
        except UserError as error:
            return Finding("fix", f"the run directory: {error}")
        return Finding("ok", f"the run directory {run_dir} can be written")
    there = _existing(run_dir)
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        text = f"the run directory {run_dir} cannot be written ({error.strerror})"
        return Finding("fix", f"{text}: choose another")
    return _found(
        free >= _LEAST_DISK, f"{_gib(free)} free for the run directory {run_dir}", "free some"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
