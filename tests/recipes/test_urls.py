"""A run whose folder is at a URL: stages and results go there, and another machine goes on from there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.core.remote import local_copy, names_there
from simomerge.recipes import graph, search
from simomerge.recipes.graph import Graph, Stage, do_stage
from simomerge.recipes.run import run_recipe
from simomerge.training.pool import WorkerPool
from simomerge.training.run_folder import RunFolder

from .conftest import MICRO, SHORT, Finished, on
from .test_search import RECIPE as SEARCH

URL = "memory://bucket/run"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    """An empty memory://bucket. The cache folder of a machine is empty too, but for the rooms."""
    machine(tmp_path / "first", monkeypatch)
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)
    local_copy.cache_clear()


def machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as on another machine, which has nothing but rendered rooms."""
    import os

    cache.mkdir(parents=True)
    rooms = Path(os.environ["SIMOMERGE_CACHE"]) / "rooms"
    if rooms.exists():
        (cache / "rooms").symlink_to(rooms.resolve(), target_is_directory=True)
    monkeypatch.setenv("SIMOMERGE_CACHE", str(cache))
    local_copy.cache_clear()


@dataclass(frozen=True, eq=False, kw_only=True)
class Add(Stage):
    """A number: one more than the sum of those of the stages that it needs."""

    inputs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, output: Path) -> None:
        found = [json.loads((folder / "log.json").read_text())["value"] for folder in self.inputs.values()]
        output.mkdir(parents=True)
        (output / "log.json").write_text(json.dumps({"value": 1 + sum(found)}))


def test_each_stage_may_be_done_on_another_machine(
    bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Add(name="first")
    second = Add(name="second", inputs={"a": first})
    third = Add(name="third", inputs={"a": first, "b": second})
    seen: list[set[str]] = []

    def elsewhere(**arguments: Any) -> None:
        """Do a stage on a machine whose cache folder is another, and which was never used before."""
        sent = pickle.dumps(arguments)
        with monkeypatch.context() as there:
            machine(tmp_path / f"machine{len(seen)}", there)
            arguments = pickle.loads(sent)
            do_stage(**arguments)
            seen.append({path.name.split("-")[0] for path in arguments["folder"].stage("").iterdir()})
        assert not here.exists()

    monkeypatch.setattr(graph, "_do_once", elsewhere)
    here = RunFolder.of(URL).path
    made = Graph(RunFolder.of(URL), "/base", "s", lambda data: "")
    with WorkerPool(1) as pool:
        made.build([third], pool)
    assert seen == [{"first"}, {"first", "second"}, {"first", "second", "third"}]
    assert [made.log(stage)["value"] for stage in (first, second, third)] == [1, 2, 4]
    assert not made.output(first).exists() and made.fetched(first).is_dir()
    kept = sorted(name.split("-")[0] for name in names_there(f"{URL}/stages"))
    assert kept == ["first", "second", "third"]


def test_a_stage_without_its_log_is_done_again(bucket: MemoryFileSystem) -> None:
    stage = Add(name="only")
    made = Graph(RunFolder.of(URL), "/base", "s", lambda data: "")
    path = f"/bucket/run/stages/{made.output(stage).name}"
    bucket.pipe_file(f"{path}/model/weights", b"half")  # of a machine that died while it copied
    assert made.run_folder.done([made.output(stage)]) == set()
    with WorkerPool(1) as pool:
        made.build([stage], pool)
    assert bucket.find(path) == [f"{path}/log.json"]


def test_another_machine_goes_on(
    finished: Finished,
    tiny_base: Path,
    bucket: MemoryFileSystem,
    done: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket.put(str(finished.folder / "stages"), "/bucket/run/stages", recursive=True)
    score = next(
        name for name in bucket.ls("/bucket/run/stages", detail=False) if "score-task-arithmetic+heads" in name
    )
    bucket.rm(score, recursive=True)
    results = run_recipe(on(MICRO, tiny_base), URL, workers=1)
    assert done == ["score task-arithmetic+heads seed 0"]
    assert [row["metrics"] for row in results["rows"]] == [row["metrics"] for row in finished.results["rows"]]
    there = json.loads(bucket.cat_file("/bucket/run/results.json"))
    assert there == json.loads(json.dumps({key: value for key, value in results.items() if key != "gallery"}))
    here = RunFolder.of(URL).path / "model"
    files = sorted(path.relative_to(here).as_posix() for path in here.rglob("*") if path.is_file())
    assert sorted(names_there(f"{URL}/model")) == files and "simo.json" in files
    dates = {name: bucket.modified(f"/bucket/run/model/{name}") for name in files}
    assert max(dates, key=dates.__getitem__) == "simo.json", "it is written last, so that a model is complete"
    assert bucket.exists(f"{score}/log.json")

    machine(tmp_path / "second", monkeypatch)
    recipe = tmp_path / "mine.yaml"
    keys = ("tasks", "train_images", "val_images", "test_images", "merges", "realigned", "gallery", "realign")
    given = {key: getattr(MICRO, key) for key in keys} | {"base": str(tiny_base)}
    given |= {key: {**asdict(SHORT), "seed": 0} for key in ("probe", "tune", "joint")}
    recipe.write_text(json.dumps(given))  # JSON is YAML
    cli(["run", str(recipe), "-o", URL, "--workers", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert len(done) == 1 and f"Report:  {URL}/report.html" in shown and f"simomerge inspect {URL}/model" in shown
    assert f"{URL}/model".encode() in bucket.cat_file("/bucket/run/report.html")
    cli(["inspect", f"{URL}/model"], standalone_mode=False)


def test_a_search_goes_on_on_another_machine(
    tiny_base: Path, bucket: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(search, "held_out_delta", lambda recipe, *_: asked.append(recipe) or [float(len(asked))])
    file = tmp_path / "mine.yaml"
    file.write_text(SEARCH.format(base=tiny_base))
    search.search_recipe(file, URL, ["search.trials=2"], workers=1)
    machine(tmp_path / "second", monkeypatch)
    found = search.search_recipe(file, URL, workers=1)
    assert len(asked) == 3 and [trial["delta_mtl"] for trial in found["trials"]] == [3.0, 2.0, 1.0]
    assert json.loads(bucket.cat_file("/bucket/run/search.json")) == found


def test_the_longer_of_two_studies_is_kept(bucket: MemoryFileSystem) -> None:
    folder = RunFolder.of(URL)
    folder.path.mkdir(parents=True)
    for there, here, expected in (
        (b"1\n", b"", b"1\n"),
        (b"1\n", b"1\n2\n", b"1\n2\n"),
        (b"1\n3\n", b"1\n2\n", b"1\n3\n"),
    ):
        bucket.pipe_file("/bucket/run/search.log", there)
        (folder.path / "search.log").write_bytes(here)
        assert folder.restored("search.log").read_bytes() == expected


def test_a_url_that_cannot_be_written_is_named_before_any_work(
    tiny_base: Path, bucket: MemoryFileSystem, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "put_file", denied)
    with pytest.raises(InputError, match=r"memory://bucket/run: access is denied \(Access Denied\)"):
        run_recipe(on(MICRO, tiny_base), URL, workers=1)
    assert not done


@pytest.mark.parametrize("file", ["simo.json", "config.json", "model/notes.txt"])
def test_files_of_others_at_a_url_are_not_replaced(file: str, bucket: MemoryFileSystem, tiny_base: Path) -> None:
    bucket.pipe_file(f"/bucket/run/{file}", b"mine")
    wanted = "which simomerge did not write and would delete" if "/" in file else "is the folder of a model"
    with pytest.raises(InputError, match=wanted):
        run_recipe(on(MICRO, tiny_base), URL, workers=1)
    assert bucket.find("/bucket/run") == [f"/bucket/run/{file}"]


def test_other_commands_write_to_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"-o s3://bucket/model: only run and search write to a URL"):
        cli(["merge", f"depth={tmp_path}", "-o", "s3://bucket/model"], standalone_mode=False)
