"""Models on the hub, through a local stand-in for its HTTP interface: found by id, published, or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from PIL import Image

import simomerge as sm
from cli.conftest import TINY, simomerge
from local_hub import READS, WRITES, LocalHub, local_hub
from simomerge.checkpoints.publishing import push_folder
from simomerge.core.errors import InputError
from simomerge.core.hub import local_source
from simomerge.datasets.tasks import Task
from simomerge.merging.disk.sources import open_source
from simomerge.merging.tree import Tree
from simomerge.models.encoders import TreeEncoder
from simomerge.models.fingerprints import fingerprint_of
from simomerge.models.model import load
from simomerge.training.evaluate import evaluation_record

TASKS = [Task("parts", "segmentation", classes=("head", "arm", "leg")), Task("depth")]
PROVENANCE = {
    "base": {"source": "facebook/dinov2-small", "fingerprint": "0" * 64, "license": "apache-2.0"},
    "experts": {"depth": {"source": "depth", "fingerprint": "1" * 64, "license": "mit"}},
    "merge": {"method": "ties", "scale": 0.4},
    "realign": {"method": "distill", "after": {"method": "fold"}},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with local_hub(tmp_path / "cache") as found:
        yield found


@pytest.fixture
def scene(make_model, tmp_path: Path) -> Path:
    model = make_model(TASKS)
    model.provenance = PROVENANCE
    scores = {"parts": {"miou": 42.0}, "depth": {"abs_err": 0.5}}
    about = {"data": "rooms", "split": "test", "images": 8}
    model.evaluation = evaluation_record(model, scores, about, {"parts": {"miou": 40.0}, "depth": {"abs_err": 0.4}})
    return model.save_pretrained(tmp_path / "scene")


# Reading ------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_by_its_id_and_later_from_the_cache(hub: LocalHub, scene: Path) -> None:
    hub.add("someone/scene", scene)
    image = np.zeros((16, 16, 3), np.uint8)
    model, expected = sm.load("someone/scene"), load(scene).predict(image)
    assert all(np.array_equal(model.predict(image)[task], expected[task]) for task in expected)
    assert model.origin()["source"] == "someone/scene"
    asked = len(hub.requests)
    assert list(sm.load("someone/scene").tasks) == ["parts", "depth"] and len(hub.requests) == asked
    assert open_source("someone/scene").origin() == load("someone/scene").origin()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: LocalHub, scene: Path, make_model, tmp_path: Path) -> None:
    found = hub.add("someone/scene", make_model(TASKS, seed=5).save_pretrained(tmp_path / "newer"))
    hub.add("someone/scene", scene, revision="v1")
    old, new = load("someone/scene@v1"), load("someone/scene")
    assert fingerprint_of(old) == fingerprint_of(load(scene)) != fingerprint_of(new)
    assert fingerprint_of(load(f"someone/scene@{found.commit_of('v1')}")) == fingerprint_of(old)
    assert load("someone/scene@v1").source == "someone/scene@v1"


def test_no_file_is_fetched_that_a_model_does_not_need(hub: LocalHub, scene: Path) -> None:
    for name in ("evil.py", "encoder/modeling.py", "weights.pkl", "heads/other.bin", "encoder/private/notes.json"):
        (scene / name).parent.mkdir(exist_ok=True)
        (scene / name).write_text("import os")
    hub.add("someone/scene", scene)
    folder = Path(local_source("someone/scene"))
    assert not [path for path in folder.rglob("*") if path.suffix in (".py", ".pkl", ".bin") or "private" in path.parts]
    assert load("someone/scene").tasks and (folder / "README.md").is_file()


def test_an_interrupted_download_is_completed(hub: LocalHub, scene: Path) -> None:
    hub.add("someone/scene", scene)
    head = Path(local_source("someone/scene")) / "heads" / "depth.safetensors"
    head.unlink()
    assert Path(local_source("someone/scene"), "heads", "depth.safetensors").is_file()


def test_an_interrupted_download_of_a_tree_is_completed(hub: LocalHub, make_model, tmp_path: Path) -> None:
    model = make_model([Task(name) for name in ("depth", "edges")])
    model.encoder = TreeEncoder(Tree.of(2, ["depth", "edges"], blocks=4), model.encoder)
    hub.add("someone/tree", model.save_pretrained(tmp_path / "tree"))
    for name in ("branches/edges.safetensors", "stitches.safetensors"):
        (Path(local_source("someone/tree")) / name).unlink()
        assert Path(local_source("someone/tree"), name).is_file()


def test_an_encoder_is_loaded_by_its_id_with_its_licence(hub: LocalHub, tiny_base: Path) -> None:
    hub.add("someone/encoder", tiny_base).files["README.md"] = b"---\nlicense: mit\n---\nAn encoder."
    assert load("someone/encoder").origin()["license"] == "mit"
    assert open_source("someone/encoder").origin() == load("someone/encoder").origin()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/nothing", "the hub has no such model, or it is private. Check the name; for a private model, log in"),
        ("someone/hidden", "the hub has no such model, or it is private"),
        ("someone/gated", r"its owner asks you to accept terms first, at http://127.*/someone/gated; then log in"),
        ("someone/scene@v9", "it has no revision 'v9'; it has main, v1"),
        ("someone/empty", "it holds no model: neither simo.json, nor config.json"),
        ("some one/scene", "cannot load it"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(
    source: str, message: str, hub: LocalHub, scene: Path, tmp_path: Path
) -> None:
    hub.add("someone/scene", scene)
    hub.add("someone/scene", scene, revision="v1")
    hub.add("someone/hidden", scene, private=True)
    hub.add("someone/gated", scene, gated=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("Nothing yet.")
    hub.add("someone/empty", tmp_path / "empty")
    with pytest.raises(InputError, match=f"{source}: no such folder, and as a hub id: {message}"):
        load(source)


def test_a_private_model_is_loaded_with_a_token(hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("someone/hidden", scene, private=True)
    monkeypatch.setenv("HF_TOKEN", READS)
    assert load("someone/hidden").tasks


def test_offline_the_cache_serves_and_the_rest_is_refused_at_once(
    hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("someone/scene", scene)
    load("someone/scene")
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("someone/scene").tasks
    with pytest.raises(InputError, match=r"someone/other: .* HF_HUB_OFFLINE is set, and .*cache does not hold it"):
        load("someone/other")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        load("someone/scene@v1")
    assert len(hub.requests) == asked


def test_code_that_a_model_asks_for_is_refused_unless_it_is_trusted(hub: LocalHub, scene: Path) -> None:
    description = json.loads((scene / "simo.json").read_text())
    description["heads"]["depth"]["kind"] = "stranger:Head"
    (scene / "simo.json").write_text(json.dumps(description))
    (scene / "stranger.py").write_text("raise SystemExit('it ran')")
    hub.add("someone/scene", scene)
    with pytest.raises(InputError, match="stranger:Head"):
        load("someone/scene")
    with pytest.raises(InputError, match="stranger"):  # its code does not travel with the model
        load("someone/scene", trust_code=True)


def test_every_command_takes_ids_of_models(
    hub: LocalHub, make_model, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub.add("me/base", tiny_base)
    for number, task in enumerate(("depth", "edges")):
        hub.add(f"me/{task}", make_model([Task(task)], seed=number).save_pretrained(tmp_path / task))
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((16, 24, 3), np.uint8)).save(photo)
    experts, images = ("depth=me/depth", "edges=me/edges"), ("--images", photo.parent, "--count", 1)
    for command in (
        ("merge", "me/base", *experts, "-o", "one"),
        ("merge", "me/base", *experts, "--scale", "0.3", "--branch", 2, *images, "-o", "tree"),
        ("realign", "one", *experts, *images, "--ridge", "none", "-o", "folded"),
        ("edit", "one", "--base", "me/base", "--remove", "edges=me/edges", "-o", "edited"),
        ("compress", "me/base", *experts, "-o", "small"),
        ("diff", "me/depth", "me/edges", "--base", "me/base"),
        ("inspect", "me/depth@main"),
        ("relate", "me/base", *experts, "--sections", "geometry"),
        ("predict", "me/depth", photo, "-o", "maps"),
        ("train", "--base", "me/base", "--task", "depth", *TINY, "-o", "expert"),
        ("evaluate", "me/depth", "depth=me/depth", "--count", 2),
    ):
        done = simomerge(*command)
        assert done.code == 0, (command, done.err)
    hub.add("me/scene", Path("folded"))
    assert load("me/scene").provenance["experts"]["edges"]["source"] == "me/edges"


# Publishing ---------------------------------------------------------------------------------------------


def test_a_model_is_published_privately_and_comes_back(
    hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    model = load(scene)
    url = model.push_to_hub("me/scene", license="mit", picture=torch.rand(3, 16, 24), message="The first one")
    found = hub.repositories["me/scene"]
    assert url == f"{hub.address}/me/scene" and found.private and found.messages == ["The first one"]
    assert set(found.files) == {
        *(".gitattributes", "README.md", "picture.png", "simo.json", "encoder/config.json"),
        *("encoder/preprocessor_config.json", "encoder/model.safetensors"),
        *("heads/parts.safetensors", "heads/depth.safetensors"),
    }
    again = load("me/scene")
    assert again.encoder_fingerprint() == model.encoder_fingerprint() and again.evaluation == model.evaluation


def test_the_card_has_what_the_hub_understands(hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import ModelCard

    monkeypatch.setenv("HF_TOKEN", WRITES)
    load(scene).push_to_hub("me/scene")
    card = ModelCard(hub.repositories["me/scene"].files["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "simomerge" and data["pipeline_tag"] == "image-segmentation"
    assert data["base_model"] == ["facebook/dinov2-small"] and data["base_model_relation"] == "merge"
    assert "license" not in data  # the parents have two licences, so a person has to choose
    assert {"model-merging", "dense-prediction", "depth"} <= set(data["tags"])
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"miou": 42.0, "abs_err": 0.5}
    for text in (
        'sm.load("me/scene")',
        "| parts | miou in %, higher is better | 42 | 40 |".replace("_", "\\_"),
        "Measured on 8 images of rooms, split test. On average it is 10.0 % worse than its experts (Delta",
        "the merge of 1 expert by ties, repaired afterwards by fold, then distill",
        "- the base (facebook/dinov2-small): apache-2.0",
        "- depth (depth): mit",
        "## Intended use and limits",
    ):
        assert text in card.text, text


def test_figures_of_other_weights_do_not_stay(scene: Path, tmp_path: Path) -> None:
    model = load(scene)
    assert "## Measured" in (scene / "README.md").read_text()
    with torch.no_grad():
        next(model.heads["depth"].parameters()).add_(0.1)
    changed = model.save_pretrained(tmp_path / "changed")
    assert "evaluation" not in json.loads((changed / "simo.json").read_text())
    assert "## Measured" not in (changed / "README.md").read_text()


def test_a_new_model_replaces_all_files_of_the_old_one(
    hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    load(scene).push_to_hub("me/scene", private=False)
    others = ("notes/demo.ipynb", "LICENSE", "scene.onnx", ".gitignore", "encoder/private/notes.json")
    hub.repositories["me/scene"].files.update(dict.fromkeys(others, b"kept"))
    hub.repositories["me/scene"].files["README.md"] = b"replaced"
    load(scene).select("depth").push_to_hub("me/scene")
    found = hub.repositories["me/scene"]
    assert [found.files[name] for name in others] == [b"kept"] * len(others)
    assert found.files["README.md"].startswith(b"---")
    assert "heads/parts.safetensors" not in found.files and "heads/depth.safetensors" in found.files
    assert not found.private  # what exists keeps its visibility


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/scene", "", "me/scene: sending a model needs a token of the hub that may write; log in"),
        ("me/scene", READS, "me/scene: your token may not write there; log in .* with one that may"),
        ("me/other", WRITES, "me/other holds something else, such as model.bin; give the name of a new repository"),
        ("scene", WRITES, "'scene' cannot be the name of a repository; give OWNER/NAME"),
        ("me/a/b", WRITES, "'me/a/b' cannot be the name of a repository"),
        ("", WRITES, "'' cannot be the name of a repository"),
    ],
)
def test_nothing_is_sent_that_must_not_be(
    name: str, token: str, message: str, hub: LocalHub, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(b"x")
    before = hub.add("me/other", tmp_path / "other").files.copy()
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message):
        load(scene).push_to_hub(name)
    assert hub.repositories["me/other"].files == before and not hub.repositories.get("me/scene")


def test_a_connection_that_is_lost_is_said_truly(hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)

    def lost(*arguments: object, **settings: object) -> None:
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", lost)
        with pytest.raises(InputError, match=r"\(the line is dead\)\. The repository was created before that"):
            push_folder(scene, "me/scene")
        with pytest.raises(InputError, match=r"\(the line is dead\)\.$"):
            push_folder(scene, "me/scene")
    commit = HfApi.create_commit

    def commit_and_lose(*arguments: object, **settings: object) -> None:
        commit(*arguments, **settings)
        monkeypatch.setattr(HfApi, "model_info", lost)

    monkeypatch.setattr(HfApi, "create_commit", commit_and_lose)
    assert push_folder(scene, "me/scene").private and "simo.json" in hub.repositories["me/scene"].files


# The command line, in a process of its own --------------------------------------------------------------


def run(hub: LocalHub, tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-m", "simomerge", *map(str, arguments)]
    env = {**os.environ, "HF_HUB_DISABLE_XET": "1", **given}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_push_sends_only_the_files_of_the_model(hub: LocalHub, scene: Path, tmp_path: Path) -> None:
    (scene / "notes.txt").write_text("my secret")
    (scene / "heads" / "backup.pt").write_text("an old one")
    done = run(hub, tmp_path, "push", "me/scene", scene, HF_TOKEN=WRITES)
    assert done.returncode == 0, done.stderr
    found = hub.repositories["me/scene"]
    assert found.private and not {"notes.txt", "heads/backup.pt"} & set(found.files)
    assert "left out: heads/backup.pt, notes.txt" in done.stdout and "(private)" in done.stdout
    shown = run(hub, tmp_path, "inspect", "me/scene", HF_TOKEN=WRITES)
    assert shown.returncode == 0 and "task depth" in shown.stdout, shown.stderr


def test_push_without_a_repository_or_with_a_link_sends_nothing(hub: LocalHub, scene: Path, tmp_path: Path) -> None:
    assert simomerge("push").code == 2 and simomerge("push", scene).code == 2
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((scene / "heads" / "depth.safetensors").read_bytes())
    (scene / "heads" / "depth.safetensors").unlink()
    (scene / "heads" / "depth.safetensors").symlink_to(secret)
    done = simomerge("push", "me/scene", scene)
    assert done.code == 2 and "is a link to a file outside the folder" in done.err
    assert hub.repositories == {}


@pytest.mark.parametrize("gone", ["encoder", "heads", "heads/depth.safetensors", "encoder/config.json"])
def test_an_incomplete_model_is_not_pushed_over_a_complete_one(
    gone: str, hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    before = hub.add("me/scene", scene).files.copy()
    (scene / gone).rename(scene.parent / "elsewhere")
    with pytest.raises(InputError, match=rf"scene.{gone}.*: missing, so the model is not complete"):
        push_folder(scene, "me/scene")
    assert hub.repositories["me/scene"].files == before


def test_a_linked_folder_is_not_pushed(hub: LocalHub, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITES)
    before = hub.add("me/scene", scene).files.copy()
    (scene / "encoder").rename(scene.parent / "elsewhere")
    (scene / "encoder").symlink_to(scene.parent / "elsewhere")
    with pytest.raises(InputError, match="encoder is a link to a folder; copy the folder"):
        push_folder(scene, "me/scene")
    assert hub.repositories["me/scene"].files == before


def test_a_dry_run_shows_the_card_and_asks_nobody(hub: LocalHub, scene: Path) -> None:
    done = simomerge("push", "me/scene", scene, "--license", "mit", "--dry-run", "--json")
    assert done.code == 0 and hub.requests == []
    header = yaml.safe_load(done.json["card"].split("---")[1])
    assert header["license"] == "mit" and header["model-index"][0]["name"] == "me/scene"
    assert "simo.json" in done.json["files"] and done.json["left_out"] == []
