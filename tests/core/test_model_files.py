"""Which names belong to a model folder, and which files its description needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simomerge.core.model_files import file_and_key, is_model_file, is_weight_file, needed_files
from simomerge.merging.tree import Tree


@pytest.mark.parametrize(
    "name", ["simo.json", "README.md", "encoder/model-00001-of-00002.safetensors", "heads/depth.safetensors"]
)
def test_files_of_a_model(name: str) -> None:
    assert is_model_file(name)


@pytest.mark.parametrize(
    "name",
    [
        *("encoder/private/notes.json", "heads/a/b.safetensors", "old/simo.json", "encoder", "encoder/modeling.py"),
        *("scene.onnx", "LICENSE", ".gitignore", "notes/demo.ipynb", "simo.json/simo.json"),
    ],
)
def test_files_of_no_model(name: str) -> None:
    assert not is_model_file(name)


@pytest.mark.parametrize(
    "given",
    ["4: all", "2: all | each", "each", "1: all | 3: b, a+c | each", "2: a+c, b | each", "2: a+b, c | 4: a+b, c"],
)
def test_a_tree_needs_a_branch_for_each_leaf_but_the_first(given: str) -> None:
    tree = Tree.of(given, ["a", "b", "c"], blocks=4)
    found = needed_files({"tasks": {}, "encoder": {"tree": str(tree)}}, Path("nowhere"))
    branches = [f"branches/{tree.nodes[leaf].tasks[0]}.safetensors" for leaf in tree.leaves[1:]]
    stitches = ["stitches.safetensors"] if any(node.parent is not None for node in tree.nodes) else []
    assert found == ["simo.json", "encoder/config.json", "encoder/model.safetensors", *branches, *stitches]


def test_a_selection_needs_the_files_of_the_tasks_that_were_kept() -> None:
    def found(tree: str, kept: list[str]) -> list[str]:
        encoder = {"tree": str(Tree.of(tree, ["a", "b", "c"], blocks=4)), "kept": kept}
        return needed_files({"tasks": {}, "encoder": encoder}, Path("nowhere"))[3:]

    assert found("1: a+b, c | each", ["b"]) == ["stitches.safetensors"]
    assert found("1: a+b, c | each", ["c", "b"]) == ["branches/c.safetensors", "stitches.safetensors"]
    assert found("1: a+b, c | each", ["c"]) == []


def test_shards_replace_the_one_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = needed_files({"tasks": {"depth": {}}, "adapters": {"rank": 4}}, tmp_path)
    assert found[2:] == [
        *("encoder/model-1-of-2.safetensors", "encoder/model-2-of-2.safetensors"),
        *("heads/depth.safetensors", "adapters.safetensors"),
    ]


@pytest.mark.parametrize(
    ("source", "file", "key"),
    [
        ("runs/last.ckpt::ema", "runs/last.ckpt", "ema"),
        ("last.pth.tar::ema::module", "last.pth.tar", "ema::module"),
        (r"C:\runs\a.pt::model", r"C:\runs\a.pt", "model"),
        ("s3://bucket/a.ckpt::ema", "s3://bucket/a.ckpt", "ema"),
        ("simplecache::s3://bucket/a.ckpt::ema", "simplecache::s3://bucket/a.ckpt", "ema"),
        ("zip://a.pt::s3://bucket/a.zip", "zip://a.pt::s3://bucket/a.zip", ""),
        ("folder::ema", "folder::ema", ""),
        ("a.safetensors", "a.safetensors", ""),
    ],
)
def test_keys_in_training_files(source: str, file: str, key: str) -> None:
    assert file_and_key(source) == (file, key)
    assert is_weight_file(source) == file.endswith((".pt", ".ckpt", ".pth.tar", ".safetensors"))
