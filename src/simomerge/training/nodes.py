"""The nodes of a Ray cluster: what they have room for, and whether they can work on a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simomerge.core.environment import versions
from simomerge.core.errors import InputError
from simomerge.core.text import first_line
from simomerge.training.run_folder import RunFolder

_PATIENCE = 300
"""Seconds in which a node must answer. The first task on a node starts a process there."""


@dataclass(frozen=True)
class Nodes:
    """What the nodes of a cluster have room for.

    Args:
        own: The Ray id of the node where this process runs.
        cpus, gpus: What each job takes.
        slots: How many jobs have room at the same time.
        tasks_per_node: How many of them on one node.
        memory: Bytes of memory of the largest node.
    """

    own: str
    cpus: int
    gpus: int
    slots: int
    tasks_per_node: int
    memory: int

    def here(self) -> dict[str, Any]:
        """Options of a task or actor that runs on this machine."""
        return _on(self.own)

    def check_memory(self, name: str, needed: int) -> None:
        """Raise InputError if no node has the memory for a job, which would never start."""
        if needed > self.memory:
            raise InputError(
                f"{name}: needs about {needed / 1e9:.1f} GB of memory, and the largest node of the cluster has"
                f" {self.memory / 1e9:.1f} GB. Add a node with more memory, or use a smaller base."
            )


def check_nodes(ray: Any, folder: RunFolder) -> Nodes:
    """Check that every node sees the run folder and has the versions of this machine.

    Raises:
        InputError: The message names the node and what differs.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    working = [node for node in alive if node["Resources"].get("CPU", 0) >= 1]
    if not working:
        raise InputError("--ray: no node of the cluster has a free CPU; start a node with `ray start --address=...`.")
    try:
        with folder.token() as token:
            probe = ray.remote(num_cpus=0, max_retries=0)(_look)
            answers = {node["NodeID"]: probe.options(**_on(node["NodeID"])).remote(folder, token) for node in working}
            found = {key: ray.get(answer, timeout=_PATIENCE) for key, answer in answers.items()}
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), InputError):
            raise InputError(f"--ray: a node of the cluster cannot use the run folder: {cause}") from error
        raise InputError(
            f"--ray: a node of the cluster cannot run simomerge ({first_line(error)}). Install the same"
            " `simomerge[ray,torch]` on every node."
        ) from error
    here = versions()
    for node in working:
        sees, there = found[node["NodeID"]]
        name = node.get("NodeManagerAddress", node["NodeID"])
        others = [
            f"{key} {there.get(key)} instead of {value}" for key, value in here.items() if there.get(key) != value
        ]
        if others:
            raise InputError(f"node {name} has {', '.join(others)}; install the same versions on every node.")
        if not sees:
            raise InputError(
                f"node {name} does not see the run folder {folder.shown()}; choose a folder that all nodes share (-o)."
            )
    return _room(ray, working)


def _room(ray: Any, nodes: list[Any]) -> Nodes:
    resources = [node["Resources"] for node in nodes]
    with_gpu = [each for each in resources if each.get("GPU", 0) >= 1]
    if with_gpu:
        cpus = max(1, min(int(each["CPU"] // each["GPU"]) for each in with_gpu))
        tasks = [int(min(each["GPU"], each["CPU"] // cpus)) for each in with_gpu]
    else:
        cpus, tasks = 1, [int(each["CPU"]) for each in resources]
    memory = int(max(each.get("memory", 0) for each in with_gpu or resources))
    own = ray.get_runtime_context().get_node_id()
    return Nodes(own, cpus, int(bool(with_gpu)), sum(tasks), max(tasks), memory)


def _look(folder: RunFolder, token: str) -> tuple[bool, dict[str, str]]:
    """What a node sees: whether a token is in the run folder, and its versions."""
    return folder.sees(token), versions()


def _on(node: str) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
