"""Find a dataset by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from simomerge.core.assets import expanded
from simomerge.core.errors import InputError
from simomerge.core.registry import check_known
from simomerge.core.remote import RemoteFile, is_url, last_name, local_copy, remote_files, shown_url
from simomerge.core.schema import check_whole, nearest
from simomerge.datasets.base import DenseDataset, Joined
from simomerge.datasets.manifest import MANIFESTS, read_manifest
from simomerge.datasets.pictures import SUFFIXES, Images
from simomerge.datasets.published.cityscapes import cityscapes
from simomerge.datasets.published.nyuv2 import nyuv2
from simomerge.datasets.published.taskonomy import taskonomy
from simomerge.datasets.rows import Manifest, Rows
from simomerge.datasets.tars import SUFFIX as TAR
from simomerge.datasets.tars import TarPictures

PUBLISHED: dict[str, Callable[..., Manifest]] = {"nyuv2": nyuv2, "cityscapes": cityscapes, "taskonomy": taskonomy}
"""Datasets given as NAME:FOLDER."""


def load_data(
    spec: str | Path,
    split: str | Mapping[str, int] = "test",
    count: int | None = None,
    tasks: str | Iterable[str] = "all",
    skip: int = 0,
    **options: Any,
) -> DenseDataset:
    """A dataset: ``"rooms"``, a published one by its name and folder, or one of your own by its manifest.

    Args:
        spec: ``rooms``; ``nyuv2:FOLDER``, ``cityscapes:FOLDER`` or ``taskonomy:FOLDER``; or the path of a manifest
            (``*.yaml``, ``*.csv``) or of the folder that holds ``data.yaml`` or ``data.csv``. docs/data.md describes
            them. Folders and files may be URLs such as ``s3://bucket/robot``, of which a local copy is made.
        split: "train", "val" or "test", or another split that the manifest names. "train+val" joins splits; a mapping
            such as ``{"train": 800, "val": 640}`` also limits the number of images of each.
        count: number of images, evenly over the split. By default all, or all if there are fewer; rooms have a
            default count per split.
        tasks: the tasks whose targets the samples hold; all by default.
        skip: leave out the images that ``count=skip`` would give; ``count`` then counts other images.
        **options: ``size``, the (height, width) to resize images and targets to; ``seed`` of rooms; ``buildings`` of
            Taskonomy.

    Raises:
        InputError: the name, split, a task or an option is unknown, ``count`` or ``skip`` is out of range, the folder
            does not hold the dataset, or the manifest is not valid (the message names the key, row or file).

    Example:
        >>> len(load_data("rooms", split="val", count=8))
        8
        >>> load_data("nyuv2:/data/nyuv2", "train")[0]["normals"].shape                              # doctest: +SKIP
        torch.Size([3, 280, 378])
    """
    check_whole("skip", skip, 0)
    if count is not None:
        check_whole("count", count)
    if isinstance(split, Mapping) or "+" in split:
        if skip:
            raise InputError("skip works with one split; leave it out, or name one split.")
        limits = split if isinstance(split, Mapping) else dict.fromkeys(split.split("+"))
        joined = Joined([load_data(spec, name.strip(), limit, tasks, **options) for name, limit in limits.items()])
        return joined.up_to(count)
    if spec == "rooms":
        from simomerge.datasets.rooms.dataset import Rooms

        check_known("rooms", options, _options_of(Rooms), "option")
        count = {"train": 1000}.get(split, 256) if count is None else count
        return Rooms(split, skip + count, **options).skip(skip).select(tasks)
    manifest = find_manifest(spec, **options)
    if not skip:
        return Rows(manifest, split, count).select(tasks)
    return Rows(manifest, split).skip(skip).up_to(count).select(tasks)


def load_images(spec: str | Path, split: str | None = None) -> Any:
    """Images without labels: a folder of pictures, or a dataset as `load_data` takes it, whose labels are not read.

    Args:
        spec: A folder or file of pictures; or ``rooms``, ``NAME:FOLDER``, a manifest, or the folder of a manifest; or
            the URL of one of these. Tar files at a URL are read there, of everything else a local copy is made.
        split: The split or splits of a dataset; all but the test split by default.

    Raises:
        InputError: There is no such folder or dataset, or ``split`` is given for a folder of pictures.

    Example:
        >>> len(load_images("rooms", "val"))
        256
    """
    if is_url(spec) and (tars := _tars_only(str(spec))):
        _check_no_split(spec, split)
        return Images(TarPictures(tars, SUFFIXES))
    path = _local(spec)
    if not _is_dataset(spec, path):
        _check_no_split(spec, split)
        return path
    if split is None:
        names = ("train", "val") if spec == "rooms" else tuple(find_manifest(spec).rows)
        split = "+".join(name for name in names if name != "test")
        if not split:
            raise InputError(
                f"{spec} has a test split only, which is for reported figures; name it as the split to use it."
            )
    return load_data(spec, split, tasks=[])


def is_dataset(spec: str | Path) -> bool:
    """Whether a spec on this machine names a dataset, which may have labels, and not pictures.

    Example:
        >>> is_dataset("rooms"), is_dataset("nyuv2:/data/nyuv2"), is_dataset("mine/data.yaml")
        (True, True, True)
    """
    return _is_dataset(spec, expanded(spec))


def _is_dataset(spec: str | Path, path: Path) -> bool:
    published = str(spec).partition(":")[0] in ("rooms", *PUBLISHED) and not path.exists()
    return published or path.suffix in MANIFESTS or any((path / f"data{suffix}").is_file() for suffix in MANIFESTS)


def _tars_only(url: str) -> list[RemoteFile]:
    """The tar files at a URL, unless there are pictures or a manifest too."""
    files = {name or last_name(url): file for name, file in remote_files(url).items()}
    manifests = {f"data{suffix}" for suffix in MANIFESTS}
    if any(name.lower().endswith(SUFFIXES) or name in manifests for name in files):
        return []
    return [file for name, file in sorted(files.items()) if name.lower().endswith(TAR)]


def _check_no_split(spec: str | Path, split: str | None) -> None:
    if split is not None:
        raise InputError(f"{spec} is a folder of pictures and has no splits; leave the split out.")


def _local(place: str | Path) -> Path:
    """A path, or that of the local copy of a URL. With the manifest at a URL, its folder is copied."""
    if not is_url(place):
        return expanded(place)
    folder, _, name = str(place).rstrip("/").rpartition("/")
    return local_copy(folder) / name if name.endswith(MANIFESTS) else local_copy(str(place))


def find_manifest(spec: str | Path, **options: Any) -> Manifest:
    """All splits of a dataset on disk, by its manifest or as NAME:FOLDER. Raises InputError."""
    if spec == "rooms":
        raise InputError("rooms are rendered and have no files to check; give a dataset on disk (docs/data.md).")
    name, _, folder = str(spec).partition(":")
    if name in PUBLISHED:
        if not folder:
            raise InputError(f"{name!r} needs its folder: {name}:FOLDER (docs/data.md).")
        check_known(name, options, _options_of(PUBLISHED[name]), "option")
        return PUBLISHED[name](_local(folder), **options)
    path = _local(spec)
    if path.suffix in MANIFESTS or path.is_dir():
        check_known(str(spec), options, _options_of(read_manifest), "option")
        return read_manifest(path, **options)
    near = nearest(name, ["rooms", *PUBLISHED])
    hint = f"; did you mean {near!r}?" if near else ";"
    known = ", ".join(f"{name}:FOLDER" for name in PUBLISHED)
    raise InputError(f"unknown dataset {str(spec)!r}{hint} give rooms, {known}, or a manifest's path (docs/data.md).")


def _options_of(reader: Callable[..., Any]) -> list[str]:
    """The parameters of a reader of datasets that have a default."""
    return [each.name for each in signature(reader).parameters.values() if each.default is not each.empty]


def data_record(spec: str) -> dict[str, Any]:
    """What the provenance of a trained model records about its dataset: its name and, of rooms, the renderer's version.

    Example:
        >>> data_record("rooms"), data_record("/home/me/rooms")
        ({'data': 'rooms', 'renderer': 1}, {'data': 'rooms'})
    """
    from simomerge.datasets.rooms import RENDER_VERSION

    return {"data": data_name(spec), **({"renderer": RENDER_VERSION} if spec == "rooms" else {})}


def data_name(spec: str) -> str:
    """What a model folder calls a dataset: its name, without the place on this machine.

    Example:
        >>> data_name("rooms"), data_name("nyuv2:/data/nyuv2"), data_name("/home/me/robot/data.yaml")
        ('rooms', 'nyuv2', 'robot')
        >>> data_name("s3://bucket/robot")
        'robot'
        >>> data_name("https://me:word@host:8080/robot/data.yaml?token=secret")
        'robot'
    """
    name, colon, _ = ("", "", "") if is_url(spec) else spec.partition(":")
    path = Path(shown_url(spec).partition("://")[2] if is_url(spec) else spec)
    return name if colon or spec == "rooms" else (path.parent.name if path.suffix else path.name) or "own data"
