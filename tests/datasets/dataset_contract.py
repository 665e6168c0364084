"""What every dataset promises, as tests to inherit: a subclass says where its samples are."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import nothing_to_fix
from torch import Tensor

from simomerge.core.errors import InputError
from simomerge.datasets import DenseDataset, load_data
from simomerge.datasets.check import check
from simomerge.datasets.load import find_manifest
from simomerge.datasets.tasks import KINDS


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[k].nan_to_num(-9), other[k].nan_to_num(-9)) for k in one)


def in_range(values: Tensor, low: float, high: float) -> bool:
    return bool(((values >= low) & (values <= high)).all())


class DatasetContract:
    """Tests of the fixture `data`: at least three images of one size, with two tasks or more."""

    # Samples

    def test_samples_have_the_documented_types_and_shapes(self, data: DenseDataset) -> None:
        size = data[0]["image"].shape[1:]
        assert len(data) >= 3 and len(data.tasks) >= 2
        for index in range(len(data)):
            sample = data[index]
            assert list(sample) == ["image", *data.tasks]
            assert sample["image"].dtype == torch.float32 and sample["image"].shape == (3, *size)
            for name, task in data.tasks.items():
                labels = task.kind == "segmentation"
                assert sample[name].dtype == (torch.int64 if labels else torch.float32)
                assert sample[name].shape == (size if labels else (task.channels, *size))

    def test_values_are_in_the_ranges_of_their_kinds(self, data: DenseDataset) -> None:
        for index in range(len(data)):
            sample = data[index]
            assert in_range(sample["image"], 0, 1) and sample["image"].max() > 0.5  # not fractions of 255
            for name, task in data.tasks.items():
                valid = task.valid(sample[name][None])[0]
                assert valid.float().mean() > 0.1, name
                values = sample[name][..., valid]
                if task.kind == "segmentation":
                    assert in_range(values, 0, len(task.classes) - 1)
                elif task.kind == "normals":
                    torch.testing.assert_close(values.norm(dim=0), torch.ones(values.shape[1]), atol=1e-5, rtol=0)
                elif task.kind == "depth":
                    assert in_range(values, 0.05, 50)
                elif task.kind != "disparity":
                    assert in_range(values, 0, 1), name

    def test_targets_are_read_without_the_image(self, data: DenseDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        sample = data[2]
        monkeypatch.setattr(type(data), "image", lambda self, index: pytest.fail("decoded an image"))
        names = [name for name, task in data.tasks.items() if task.kind != "autoencoder"][::-1]
        assert same(data.targets(2, names), {name: sample[name] for name in names})

    def test_a_sample_may_be_changed_without_changing_the_dataset(self, data: DenseDataset) -> None:
        first = data[1]
        kept = {name: value.clone() for name, value in first.items()}
        for value in first.values():
            value.zero_()
        assert same(data[1], kept)

    def test_an_index_outside_ends_an_iteration(self, data: DenseDataset) -> None:
        for index in (len(data), len(data) + 100, -1):
            with pytest.raises(IndexError):
                data[index]

    # Subsets

    def test_select_keeps_the_images_and_the_order_asked_for(self, data: DenseDataset) -> None:
        names = list(data.tasks)
        for asked in (names[::-1], names[1:2], []):
            chosen = data.select(asked)
            assert same(chosen[2], {name: data[2][name] for name in ["image", *asked]}) and len(chosen) == len(data)
        assert list(data.select(",".join(names)).tasks) == list(data.select("all").tasks) == list(data.tasks) == names

    def test_select_refuses_unknown_and_repeated_names(self, data: DenseDataset) -> None:
        name = next(iter(data.tasks))
        for names, message in (
            ([name[:-2] + name[-1]], f"did you mean {name!r}"),
            ([name, name], "given twice"),
            (["optical flow"], f"There are: {', '.join(data.tasks)}"),
        ):
            with pytest.raises(InputError, match=message):
                data.select(names)

    def test_take_and_skip_share_out_the_images_in_their_order(self, data: DenseDataset) -> None:
        images = [data.image(index) for index in range(len(data))]

        def places(subset: DenseDataset) -> list[int]:
            found = [[torch.equal(subset.image(i), image) for image in images] for i in range(len(subset))]
            assert all(sum(equal) == 1 for equal in found)
            return [equal.index(True) for equal in found]

        before: set[int] = set()
        for count in range(1, len(data)):
            taken, rest = data.take(count), data.skip(count)
            both = places(taken), places(rest)
            assert all(one == sorted(one) for one in both) and sorted([*both[0], *both[1]]) == list(range(len(data)))
            assert len(taken) == count and before < set(both[0])  # more images are the same and others
            before = set(both[0])
            assert same(taken[0], data[both[0][0]]) and same(rest[0], data[both[1][0]])
            with pytest.raises(IndexError):
                taken[count]
        assert len(data.take(len(data))) == len(data) and data.skip(0) is data
        name = list(data.tasks)[1]
        assert same(data.skip(1).select([name]).take(1)[0], {n: data.skip(1).take(1)[0][n] for n in ("image", name)})

    def test_take_and_skip_refuse_what_is_not_there(self, data: DenseDataset) -> None:
        with pytest.raises(InputError, match=rf"{len(data) + 1} images asked for; the split has {len(data)}"):
            data.take(len(data) + 1)
        for count in (len(data), len(data) + 1):
            with pytest.raises(InputError, match=rf"{count} images asked for; the split has {len(data)}"):
                data.skip(count)
        for count in (0, -1, 1.5, True, "2"):
            for method in (data.take, data.up_to):
                with pytest.raises(InputError, match=rf"count is {count!r}; give a whole number of 1 or more"):
                    method(count)
        for count in (-1, 0.5):
            with pytest.raises(InputError, match=rf"skip is {count}; give a whole number of 0 or more"):
                data.skip(count)

    def test_up_to_a_number_are_all_if_there_are_fewer(self, data: DenseDataset) -> None:
        assert data.up_to(None) is data and len(data.up_to(10**6)) == len(data)
        assert len(data.up_to(np.int64(2))) == 2 and same(data.up_to(2)[1], data.take(2)[1])

    # Other processes and other days

    def test_a_pickle_gives_the_same_samples(self, data: DenseDataset) -> None:
        view = data.take(2).select(list(data.tasks)[:2])
        pickled = pickle.dumps(view)
        again = pickle.loads(pickled)
        assert len(pickled) < 20_000 and len(again) == 2 and again.tasks == view.tasks
        assert same(again[1], view[1]) and again.fingerprint() == view.fingerprint()

    def test_its_files_are_there(self, data: DenseDataset) -> None:
        for part in (data, data.skip(1), data.take(1)):
            part.check_files()
            part.check_files(deeply=True)


class FilesContract(DatasetContract):
    """Tests of a dataset on disk, in the folder of the fixture `root`.

    Attributes:
        name: the dataset's name, or empty for a manifest in `root`.
        split: a split with at least three images.
        size: the size to test, (H, W).
        stored_size: the size of the files, if it is another.
    """

    name = ""
    split = "train"
    size: tuple[int, int]
    stored_size: tuple[int, int] | None = None

    @pytest.fixture
    def spec(self, root: Path) -> str:
        return f"{self.name}:{root}" if self.name else str(root)

    @pytest.fixture
    def data(self, spec: str) -> DenseDataset:
        return load_data(spec, self.split, size=self.size)

    def test_it_is_resized(self, spec: str, data: DenseDataset) -> None:
        height, width = self.size[0] // 2, self.size[1] // 2
        small = load_data(spec, self.split, size=(height, width))[0]
        full = load_data(spec, self.split, size=self.stored_size or self.size)[0]
        assert all(value.shape[-2:] == (height, width) for value in small.values())
        for name, task in data.tasks.items():  # targets take the nearest pixel, no mixture
            if task.kind in ("segmentation", "depth", "log_depth"):
                values = (set(one[name].nan_to_num(9).flatten().tolist()) for one in (small, full))
                assert next(values) <= next(values)
        with pytest.raises(InputError, match=r"size \[0, 5\]; give \[height, width\]"):
            load_data(spec, self.split, size=[0, 5])

    def test_load_data_counts_and_skips_as_take_and_skip_do(self, spec: str, data: DenseDataset) -> None:
        last = len(data) - 1
        assert same(load_data(spec, self.split, 2, size=self.size)[1], data.take(2)[1])
        assert same(load_data(spec, self.split, 1, skip=last, size=self.size)[0], data.skip(last)[0])
        assert len(load_data(spec, self.split, 99)) == len(load_data(spec, self.split)) == len(data)
        with pytest.raises(InputError, match="count is 0; give a whole number of 1 or more"):
            load_data(spec, self.split, 0)

    def test_an_unknown_split_says_which_there_are(self, spec: str) -> None:
        with pytest.raises(InputError, match=r"no split 'trainval'; it has train, val"):
            load_data(spec, "trainval")

    def test_the_check_finds_nothing_to_fix(self, spec: str) -> None:
        nothing_to_fix(spec)

    def test_kinds_are_known(self, data: DenseDataset) -> None:
        assert all(task.kind in KINDS and task.name == name for name, task in data.tasks.items())


class FilePerTargetContract(FilesContract):
    """Tests of a dataset with a file for each image and target, in a `root` that may be spoilt.

    Attributes:
        files: by task or "image", a file of the split's first image.
    """

    files: Mapping[str, str]

    def test_broken_and_missing_files_are_named(self, spec: str, root: Path) -> None:
        """By reading, by `check_files` and by the check.

        But an image that is missing from a tree is not one of its images, and only who has counted them knows.
        """
        for task, name in self.files.items():
            complete = (root / name).read_bytes()
            self._is_named(spec, task, root / name)
            (root / name).write_bytes(complete)

    def _is_named(self, spec: str, task: str, path: Path) -> None:
        data = load_data(spec, self.split)
        path.write_bytes(path.read_bytes()[:60])
        if path.suffix != ".tif":  # the deep check reads only their first bytes
            with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
                data.check_files(deeply=True)
        for message in (f"{path.name}: cannot be read", f"{path.name}: no such"):
            with pytest.raises(InputError, match=message):
                data.targets(0, [task]) if task != "image" else data.image(0)
            is_counted = task != "image" or path.suffix == ".npy" or path.is_file() or not self.name
            problems = "\n".join(check(find_manifest(spec)).problems)
            assert (path.name in problems) == is_counted, problems
            path.unlink(missing_ok=True)
        with pytest.raises(InputError, match=rf"1 of \d+ files are not there: .*{path.name}"):
            data.check_files()
