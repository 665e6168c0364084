"""The same on S3, by s3fs and a server of moto on this machine: `pip install "moto[s3,server]" s3fs`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simomerge.core.errors import InputError
from simomerge.core.remote import copy_there, local_copy, names_there, remote_files, remove_there
from simomerge.datasets.load import load_images
from simomerge.datasets.pictures import as_images
from simomerge.training.run_folder import RunFolder

s3fs = pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server without buckets."""
    started = moto.ThreadedMotoServer(port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    started.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket. The cache folder is empty too."""
    names = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("SIMOMERGE_CACHE", str(tmp_path / "cache"))
    local_copy.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    yield "s3://bucket"
    system.rm("bucket", recursive=True)


def test_folders_go_there_and_back(bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "deep").mkdir(parents=True)
    (folder / "log.json").write_text("{}")
    (folder / "deep" / "large").write_bytes(bytes(range(256)) * 30_000)
    (folder / "empty").touch()
    copy_there(folder, f"{bucket}/some/run", last="log.json")
    copied = local_copy(f"{bucket}/some/run")
    names = ["deep/large", "empty", "log.json"]
    assert sorted(names_there(f"{bucket}/some/run")) == sorted(remote_files(f"{bucket}/some/run")) == names
    assert all((copied / name).read_bytes() == (folder / name).read_bytes() for name in names)
    (folder / "deep" / "large").unlink()
    (folder / "log.json").write_text("[]")  # of the same size
    copy_there(folder, f"{bucket}/some/run", last="log.json")
    local_copy.cache_clear()
    assert (local_copy(f"{bucket}/some/run") / "log.json").read_text() == "[]" and not (copied / "deep/large").exists()
    remove_there(f"{bucket}/some/run/log.json")
    assert names_there(f"{bucket}/some/run") == ["empty"]


def test_tar_files_are_read_in_place(bucket: str, tmp_path: Path) -> None:
    rng, pictures = np.random.default_rng(0), []
    (tmp_path / "tars").mkdir()
    for index in range(4):
        pictures.append(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
        content = io.BytesIO()
        Image.fromarray(pictures[-1]).save(content, "png")
        with tarfile.open(tmp_path / "tars" / f"{index // 2}.tar", "a") as opened:
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(content.getvalue())
            opened.addfile(member, io.BytesIO(content.getvalue()))
    copy_there(tmp_path / "tars", f"{bucket}/tars")
    images = as_images(load_images(f"{bucket}/tars"))
    assert len(images) == 4 and not (tmp_path / "cache" / "urls").exists()
    for index, picture in enumerate(pictures):
        assert torch.equal(images.image(index), torch.from_numpy(picture).permute(2, 0, 1) / 255)


def test_a_missing_bucket_is_named_and_not_made(bucket: str, tmp_path: Path) -> None:
    for use in (remote_files, local_copy):
        with pytest.raises(InputError, match=r"s3://nowhere/x: there is no such file, folder or bucket"):
            use("s3://nowhere/x")
    with pytest.raises(InputError, match=r"s3://nowhere/run: there is no such file, folder or bucket"):
        RunFolder.of("s3://nowhere/run").check()
    assert s3fs.S3FileSystem().ls("") == ["bucket"]
    RunFolder.of(f"{bucket}/run").check()
    assert names_there(f"{bucket}/run") == []


def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"access is denied \(Unable to locate credentials\); check the credentials"):
        remote_files(f"{bucket}/x")
