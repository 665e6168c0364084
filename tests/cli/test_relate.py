"""simomerge relate: what it prints, what it writes, and its mistakes, each reported before long work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simomerge.cli.relate import _next

from .conftest import Story, assert_mistake, simomerge


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    dice = np.random.default_rng(0)
    for index in range(16):
        coarse = Image.fromarray(dice.integers(0, 255, (4, 5, 3), np.uint8))
        coarse.resize((40, 32), Image.Resampling.BILINEAR).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def experts(story: Story) -> list[str]:
    return [f"{task}={story / task}" for task in ("depth", "normals")]


def test_everything_on_unlabelled_pictures(story: Story, tiny_base: Path, photos: Path, experts: list[str],
                                           tmp_path: Path) -> None:  # fmt: skip
    out = tmp_path / "related"
    done = simomerge("relate", tiny_base, *experts, "--images", photos, "--merged", story / "scene", "-o", out)
    assert done.code == 0, done.err
    assert "2 encoders: every expert by itself" in done.out and "Judged by the experts' predictions" in done.out
    assert "R2 before" in done.out and f"Page: {out / 'relate.html'}" in done.out
    assert f"Next: simomerge merge {tiny_base} depth=" in done.out
    names = {"relate.html", "relate.json", "pairs.png", "sweeps.png", "norms.png", "cosines.png", "cka.png"}
    assert {path.name for path in out.iterdir()} == names
    again = simomerge("relate", tiny_base, *experts, "--images", photos, "-o", out)
    assert again.code == 2 and "exists; choose another path, or give --overwrite" in again.err


def test_as_json_with_labels(tiny_base: Path, experts: list[str]) -> None:
    words = ("--data", "rooms", "--count", "16", "--sections", "groups,cka", "--budget", "1", "--json")
    found = simomerge("relate", tiny_base, *experts, *words).json
    assert found["judged_by"] == "labels" and found["images"] == 16 and "sweeps" not in found
    assert [choice["budget"] for choice in found["groups"]["choices"]] == [1, 2]
    assert found["cka"]["names"] == ["base", "depth", "normals"] and found["cka"]["images"] == 8


def test_geometry_looks_at_no_image_and_neither_does_the_next_step(
    tiny_base: Path, experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = simomerge("relate", tiny_base, *experts, "--sections", "geometry")
    assert done.code == 0 and "Task vectors (whole encoder)" in done.out and "Judged" not in done.out
    last = done.out.splitlines()[-1]
    assert last == f"Next: simomerge merge {tiny_base} {' '.join(experts)} -o merged"
    monkeypatch.chdir(tmp_path)
    merged = simomerge(*shlex.split(last)[2:])
    assert merged.code == 0 and "Merged depth, normals by task-arithmetic" in merged.out


def curve(middle: float) -> dict[str, Any]:
    """What relate finds for two tasks, if a tree between one encoder (-4 %) and the experts has this gain."""
    rows = ((1.0, "4: depth+normals", 4, -4.0), (1.5, TREE, 2, middle), (2.0, "4: depth, normals", 0, 0.0))
    sharing = [
        {"cost": cost, "tree": tree, "gain": gain, "shared": dict.fromkeys(("depth", "normals"), shared)}
        for cost, tree, shared, gain in rows
    ]
    judged = {"judged_by": "labels", "images": 16, "judged_images": 8}
    return {"tasks": ["depth", "normals"], **judged, "sharing": sharing}


TREE = "2: depth+normals | 4: depth, normals"
SHARED = "--size 32x40 --images PHOTOS -o merged"


@pytest.mark.parametrize(
    ("gain", "ending", "spoken"),
    [
        (-0.4, f"--share '{TREE}' --scale auto {SHARED}", "take the tree of 1.50 encoders"),
        (-3.6, f"--method auto --minutes 10 {SHARED}", "keep the 2 experts apart, or distil one encoder"),
    ],
)
def test_the_next_step_is_the_recommended_tree(
    gain: float, ending: str, spoken: str, tiny_base: Path, photos: Path, experts: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("simomerge.cli.relate._measure", lambda *_: curve(gain))
    words = ("--images", photos, "--size", "32x40", "--sections", "sharing")
    done = simomerge("relate", tiny_base, *experts, *words)
    assert done.code == 0 and spoken in done.out and "Shared blocks (Delta_MTL on 8 labelled images)" in done.out
    last = done.out.splitlines()[-1]
    assert last == f"Next: simomerge merge {tiny_base} {' '.join(experts)} {ending.replace('PHOTOS', str(photos))}"


@pytest.mark.parametrize(
    ("gain", "budget", "expected"),
    [
        (-4.0, None, "--share '2: a+b+c | 3: a, b, c' --scale auto"),  # the tree
        (-4.0, 1, "a=A b=B --method auto --images"),  # one encoder is the budget: the groups decide
        (-0.4, 2, "a=A b=B c=C --method auto --images"),  # one encoder is enough
        (-1.05, 2, "a=A b=B c=C --method auto --minutes 10"),  # no tree is worth it, so the merge of all is distilled
        (-1.05, None, "a=A b=B c=C --method auto --minutes 10"),
    ],
)
def test_one_answer_decides_the_next_step(gain: float, budget: int | None, expected: str) -> None:
    trees = [("3: a+b+c", 1.0, gain), ("2: a+b+c | 3: a, b, c", 5 / 3, -1.0), ("3: a, b, c", 3.0, 0.0)]
    sharing = [{"tree": tree, "cost": cost, "gain": gained} for tree, cost, gained in trees]
    groups = {"choices": [{"groups": [["a", "b"], ["c"]]}, {"groups": [["a", "b"], ["c"]]}]}
    found = {"tasks": ["a", "b", "c"], "judged_by": "labels", "judged_images": 8, "sharing": sharing, "groups": groups}
    given = {"budget": budget, "images": "photos", "data": "", "size": None}
    assert expected in _next("base", {"a": "A", "b": "B", "c": "C"}, found, given)


def test_the_curve_of_shared_blocks(tiny_base: Path, photos: Path, experts: list[str], tmp_path: Path) -> None:
    words = ("--images", photos, "--sections", "sharing", "-o", tmp_path / "related")
    done = simomerge("relate", tiny_base, *experts, *words)
    assert done.code == 0, done.err
    assert "agreement with the experts, an estimate without labels" in done.out and "on 8 of 16 images" in done.out
    names = {"relate.html", "relate.json", "sharing.png"}
    assert {path.name for path in (tmp_path / "related").iterdir()} == names
    assert "blocks 1-4: depth + normals" in (tmp_path / "related" / "relate.html").read_text()


MISTAKES: dict[str, tuple[tuple[object, ...], str]] = {
    "nothing to look at": ((), "looks at images: give images or labelled data, or ask for 'geometry' alone"),
    "both": (("--images", "PHOTOS", "--data", "rooms"), "--images and --data exclude each other"),
    "section": (("--images", "PHOTOS", "--sections", "sweep"), "no section 'sweep': did you mean 'sweeps'"),
    "strange section": (("--images", "PHOTOS", "--sections", "xyzzy"), "no section 'xyzzy': choose from groups"),
    "section without images": (("--sections", "sweeps"), "the section 'sweeps' looks at images"),
    "section without a merge": (("--images", "PHOTOS", "--sections", "alignment"), "give the merged model"),
    "budget": (("--images", "PHOTOS", "--budget", "3"), "--budget 3: 2 experts need no more than 2 encoders"),
    "no budget": (("--images", "PHOTOS", "--budget", "0"), "0 is not in the range"),
    "budget of nothing": (("--sections", "geometry", "--budget", "1"), "--budget requires the section 'groups'"),
    "budget of a curve": (
        ("--images", "PHOTOS", "--sections", "sharing", "--budget", "1"),
        "--sections groups,sharing. Without --budget, the section 'sharing' answers every cost",
    ),
    "count": (("--images", "PHOTOS", "--count", "4"), "4 is not in the range"),
    "images": (("--images", "./nowhere"), "nowhere: no such folder of images"),
    "data": (("--data", "room"), "unknown dataset 'room'; did you mean 'rooms'"),
    "split": (("--data", "rooms", "--split", "vall"), "vall"),
    "size": (("--images", "PHOTOS", "--size", "big"), "size big: give HEIGHTxWIDTH"),
    "merged": (("--images", "PHOTOS", "--merged", "./nowhere"), "nowhere: no such folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(name: str, tiny_base: Path, photos: Path, experts: list[str]) -> None:
    words, message = MISTAKES[name]
    done = simomerge("relate", tiny_base, *experts, *(photos if word == "PHOTOS" else word for word in words))
    assert_mistake(done, message)


def test_who_is_given_as_what(story: Story, tiny_base: Path, photos: Path, experts: list[str]) -> None:
    pictures = ("--images", photos)
    assert_mistake(simomerge("relate", story / "scene", *experts, *pictures), "is a model with heads .*--merged MODEL")
    assert_mistake(simomerge("relate", tiny_base, experts[0], *pictures), "1 expert: .*at least two")
    assert_mistake(
        simomerge("relate", tiny_base, experts[0], "normals=./nowhere", *pictures), "nowhere: no such folder"
    )
    assert_mistake(simomerge("relate", tiny_base, experts[0], "normals", *pictures), "'normals': give TASK=EXPERT")
    assert_mistake(
        simomerge("relate", tiny_base, experts[0], f"normals={tiny_base}", *pictures), "'normals' has the tasks none"
    )
    missing = simomerge("relate", "./nowhere", *experts, *pictures)
    assert_mistake(missing, "nowhere: no such folder")


def test_too_few_pictures(tiny_base: Path, photos: Path, experts: list[str], tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    assert_mistake(simomerge("relate", tiny_base, *experts, "--images", tmp_path), "2 images: one half is for merging")
