"""A Ray cluster gives the results of one machine, whatever happens to its nodes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simomerge.core.caution import Caution, warn
from simomerge.core.errors import InputError
from simomerge.core.progress import show_progress
from simomerge.core.remote import copy_there, names_there
from simomerge.recipes.file import read_recipe
from simomerge.recipes.graph import Output
from simomerge.recipes.run import held_out_delta, run_recipe
from simomerge.recipes.search import search_recipe
from simomerge.training import nodes
from simomerge.training.cluster import RayPool
from simomerge.training.pool import WorkerPool
from simomerge.training.run_folder import RunFolder

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the processes of Ray cannot import this file
pytestmark = pytest.mark.slow
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its own, 15, takes minutes where others use the machine
os.environ["RAY_raylet_start_wait_time_s"] = "600"  # noqa: SIM112 - and so may the start of a node

RECIPE = """
base: {base}
tasks: [depth, normals]
train_images: 32
val_images: 16
test_images: 8
scale_images: 8
choose_images: 8
probe: {{steps: 20, batch_size: 8}}
tune: {{steps: 200, batch_size: 8, validate_every: 50}}
joint: {{steps: 20, batch_size: 8, validate_every: 20}}
realign:
  fold: {{count: 8}}
merges: [average]
realigned: [average+fold]
gallery: [experts, average]
"""

SEARCH = """
base: {base}
tasks: [depth, normals]
train_images: 16
val_images: 12
test_images: 4
probe: {{steps: 4, batch_size: 4}}
tune: {{steps: 4, batch_size: 4}}
joint: {{steps: 4, batch_size: 4}}
realign: {{heads: {{steps: 4, batch_size: 4}}}}
merges: [average]
realigned: [average+heads]
search:
  row: average+heads
  images: 4
  trials: 3
  space:
    realign.heads.lr: {{low: 1e-5, high: 1e-2, log: true}}
"""


class Clustered:
    """A head without work, and two nodes with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # On a busy machine, Ray's own limits take slow nodes for dead ones.
        patience = {"period_ms": 3000, "timeout_ms": 20000, "failure_threshold": 10}
        patience = {f"health_check_{key}": value for key, value in patience.items()}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": patience}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)


@pytest.fixture
def clustered() -> Iterator[Clustered]:
    made = Clustered()
    yield made
    ray.shutdown()
    made.cluster.shutdown()


def same(results: dict[str, Any]) -> dict[str, Any]:
    """Results without times."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if "second" not in key and key != "created"}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(json.loads(json.dumps({k: v for k, v in results.items() if k != "gallery"}, default=str)))


def test_two_nodes_of_which_one_dies_give_the_results_of_one_machine(
    clustered: Clustered, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(base=tiny_base))
    recipe = read_recipe(file)
    alone = run_recipe(recipe, tmp_path / "alone", workers=1)
    seen: list[str] = []

    def watch(label: str, done: int, total: int, note: str) -> None:
        seen.append(f"{label} {note}")
        if label.startswith("expert") and done >= 50 and len(clustered.nodes) == 2:
            clustered.cluster.remove_node(clustered.nodes.pop(), allow_graceful=False)

    with show_progress(watch):
        shared = run_recipe(recipe, tmp_path / "shared", ray=clustered.address)
    assert len(clustered.nodes) == 1 and any("attempt 2" in each for each in seen)
    assert same(shared) == same(alone)
    names = [sorted(path.name for path in (tmp_path / run / "stages").iterdir()) for run in ("alone", "shared")]
    assert names[0] == names[1]  # the same keys, and no log, lock or state is left


def test_trials_at_the_same_time_score_as_on_one_machine(clustered: Clustered, tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(SEARCH.format(base=tiny_base))
    labels: list[str] = []
    with show_progress(lambda label, *_: labels.append(label)):
        found = search_recipe(file, tmp_path / "shared", seed=0, ray=clustered.address)
    assert found == json.loads((tmp_path / "shared" / "search.json").read_text())
    trials = found["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 3 and labels.count("search") == 4
    assert len({trial["values"]["realign.heads.lr"] for trial in trials}) == 3
    kept = list((tmp_path / "shared" / "stages").iterdir())
    assert len([path for path in kept if path.name.startswith("expert-")]) == 2  # the trials share the experts
    assert len([path for path in kept if path.name.startswith("average+heads")]) == 3
    with WorkerPool(1) as pool:
        for trial in trials:
            recipe = read_recipe(file, values=trial["values"])
            alone = held_out_delta(recipe, "average+heads", 4, tmp_path / "alone", pool)
            assert alone == pytest.approx(trial["per_seed"], abs=1e-9)


def die() -> None:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(output: Output, folder: RunFolder) -> None:
    print("what the stage printed", flush=True)
    raise RuntimeError("no such kernel")


def kill(output: Output, folder: RunFolder) -> None:
    die()


def big(output: Output, folder: RunFolder) -> None:
    raise AssertionError("it must not start")


def test_what_cannot_work_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.of(tmp_path)
    with RayPool("", folder) as pool:
        with pytest.raises(InputError, match=r"(?s)RuntimeError: no such kernel\. Its log .*what the stage printed"):
            pool.run([(fail, {"output": Output("stage"), "folder": folder})])
        with pytest.raises(InputError, match=r"(?s)its process ended 4 times, most often.*about to die"):
            pool.run([(kill, {"output": Output("other"), "folder": folder})])
        with pytest.raises(InputError, match=r"needs about 1000000.0 GB of memory, and the largest node"):
            pool.run([(big, {"output": Output("big"), "folder": folder})], memory=[10**15])
    with pytest.raises(InputError, match=r"--workers 500: the cluster has room"), RayPool("", tmp_path, 500):
        pass
    monkeypatch.setattr(nodes, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(InputError, match=r"node .* has torch .* instead of 0.1; install"), RayPool("", tmp_path):
        pass


def test_warnings_of_the_cluster_become_warnings_of_this_process(tmp_path: Path) -> None:
    with pytest.warns(Caution, match="8 images are few"), RayPool("", tmp_path) as pool:
        assert pool.run([(cautious, {"count": 8})]) == [9]
    failing = pytest.raises(InputError, match="KeyError")
    with pytest.warns(Caution, match="0 images are few"), RayPool("", tmp_path) as pool, failing:
        pool.run([(cautious, {"count": 0})])


def cautious(count: int) -> int:
    warn(f"{count} images are few.")
    if not count:
        raise KeyError(count)
    return count + 1


def test_no_cluster_at_the_address_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no cluster answers at 127.0.0.1:1 .*`ray"), RayPool("127.0.0.1:1", tmp_path):
        pass


def test_a_pool_of_this_machine_needs_locks(tmp_path: Path) -> None:
    assert WorkerPool(1).needs_locks and not RayPool("", tmp_path).needs_locks


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty bucket of a server for S3 on this machine; the processes of Ray inherit how to reach it."""
    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    started = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    address = "http://{}:{}".format(*started.get_host_and_port())
    names = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    started.stop()


def test_nodes_share_a_bucket(bucket: str, clustered: Clustered, tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(SEARCH.format(base=tiny_base))
    copy_there(tiny_base, f"{bucket}/base")
    alone = run_recipe(read_recipe(file), tmp_path / "alone", workers=1)
    shared = run_recipe(read_recipe(file, [f"base={bucket}/base"]), f"{bucket}/run", ray=clustered.address)
    assert same(shared) == same(alone)
    names = {name.split("/")[0] for name in names_there(f"{bucket}/run/stages")}
    assert names == {path.name for path in (tmp_path / "alone" / "stages").iterdir()}
    assert {"results.json", "model/simo.json"} <= set(names_there(f"{bucket}/run"))
