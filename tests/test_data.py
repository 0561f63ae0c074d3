"""Loaders of real data, on real files where there are any and on small ones of the same format."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.errors import BadInput
from zoo import data

REAL = Path(__file__).parents[2] / "shared" / "data"


def check_split(found, train, validation, shape, low=0.0, high=1.0):
    features = int(np.prod(shape))
    assert (found.image_shape, found.range) == (shape, (low, high))
    assert found.train.shape == (train, features)
    assert found.validation.shape == (validation, features)
    for x in (found.train, found.validation):
        assert x.dtype == torch.float32
        assert low <= x.min()
        assert x.max() <= high


def test_digits():
    from sklearn.datasets import load_digits

    found = data.digits()
    check_split(found, 1438, 359, (8, 8))
    assert found.train.max() == 1
    labels = torch.cat([found.train_labels, found.validation_labels])
    assert labels.dtype == torch.int64
    # every row is there once, with its own label: the split is disjoint
    rows = torch.cat([found.train, found.validation])
    mine = sorted((*(16 * r).tolist(), y) for r, y in zip(rows, labels.tolist(), strict=True))
    raw = load_digits()
    theirs = sorted((*r, y) for r, y in zip(raw.data.tolist(), raw.target.tolist(), strict=True))
    assert mine == theirs
    assert torch.equal(data.digits().train, found.train)
    assert len(found.validation_labels.unique()) == 10


def test_patches():
    found = data.patches(side=5, n=101, seed=0)
    check_split(found, 81, 20, (5, 5), -1.0, 1.0)
    assert found.train_labels is None
    for x in (found.train, found.validation):
        torch.testing.assert_close(x.mean(1), torch.zeros(len(x)), rtol=0, atol=1e-6)
        assert x.std(1).max() > 0.05
    again, other = data.patches(side=5, n=101, seed=0), data.patches(side=5, n=101, seed=1)
    assert torch.equal(found.train, again.train)
    assert not torch.equal(found.train, other.train)


def test_patches_of_the_two_parts_share_no_pixel(monkeypatch):
    """On a picture whose brightness is the square of the column, the slope tells the column."""
    import sklearn.datasets

    widths = (100, 60)
    pictures = [np.broadcast_to((np.arange(w) ** 2.0)[None, :, None], (30, w, 3)) for w in widths]
    bunch = type("Bunch", (), {"images": pictures})
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: bunch)
    found = data.patches(side=4, n=2000)
    columns = {}
    for part in ("train", "validation"):
        x = getattr(found, part).reshape(-1, 4, 4) * 255
        torch.testing.assert_close(x, x[:, :1].expand_as(x))  # rows and columns not exchanged
        columns[part] = ((x[:, 0, 1] - x[:, 0, 0] - 1) / 2).round()
    first, second = columns["train"].chunk(2)  # half from either picture
    assert (first.min(), first.max() + 4) == (0, 80)
    assert (second.min(), second.max() + 4) == (0, 48)
    first, second = columns["validation"].chunk(2)
    assert (first.min(), first.max() + 4) == (80, 100)
    assert (second.min(), second.max() + 4) == (48, 60)


def test_patches_refuse():
    with pytest.raises(BadInput, match="side: expected at most 128; got 129"):
        data.patches(side=129)
    with pytest.raises(BadInput, match="n: expected an integer >= 1"):
        data.patches(n=0)


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_whiten(ridge):
    raw = data.digits()
    white = data.whiten(raw, ridge=ridge)
    torch.testing.assert_close(white.train.mean(0), torch.zeros(64), rtol=0, atol=1e-4)
    assert white.range == (-float("inf"), float("inf"))
    assert torch.equal(white.train_labels, raw.train_labels)
    # the identity, but for what the ridge takes from each axis: l / (l + ridge)
    values, vectors = np.linalg.eigh(np.cov(raw.train.double().numpy().T))
    left = values / (values + ridge * values.mean())
    covariance = np.cov(white.train.double().numpy().T)
    np.testing.assert_allclose(covariance, vectors * left @ vectors.T, atol=1e-3)
    # zero phase: a symmetric map, the same one for the rows held out
    matrix = vectors / np.sqrt(values + ridge * values.mean()) @ vectors.T
    want = (raw.validation - raw.train.mean(0)).double().numpy() @ matrix
    np.testing.assert_allclose(white.validation, want, atol=2e-3)


# files


def idx(array):
    """An unsigned-byte array in IDX format, gzipped."""
    head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def write_idx(folder, rng, n=(7, 3)):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for stem, count in zip(("train", "t10k"), n, strict=True):
        arrays[stem] = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(arrays[stem][0]))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(arrays[stem][1]))
    return arrays


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("sub", [True, False])
def test_idx_files(name, sub, tmp_path, monkeypatch):
    folder = tmp_path / name if sub else tmp_path
    arrays = write_idx(folder, np.random.default_rng(0))
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    found = data.DATA[name]()
    assert found.name == name
    check_split(found, 7, 3, (28, 28))
    for stem, part in (("train", "train"), ("t10k", "validation")):
        images, labels = arrays[stem]
        x = getattr(found, part).reshape(-1, 28, 28)
        np.testing.assert_allclose(x, images / 255, rtol=1e-6)
        assert getattr(found, f"{part}_labels").tolist() == labels.tolist()
        assert getattr(found, f"{part}_labels").dtype == torch.int64


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="no MNIST files beside the project")
def test_mnist(monkeypatch):
    monkeypatch.setenv("NEUROGUIDE_DATA", str(REAL))
    found = data.mnist()
    check_split(found, 60_000, 10_000, (28, 28))
    # class counts, mean and sd as published everywhere
    assert found.train_labels.bincount()[:3].tolist() == [5923, 6742, 5958]
    assert found.validation_labels.bincount()[:3].tolist() == [980, 1135, 1032]
    assert round(found.train.mean().item(), 4) == 0.1307
    assert round(found.train.std().item(), 4) == 0.3081


def cifar(folder, rng, n=4):
    """A small CIFAR-10 archive; pictures are returned as (N, 32, 32, 3)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, labels = rng.integers(0, 256, (6, n, 32, 32, 3)), rng.integers(0, 10, (6, n))
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin", "readme.html"]
        for k, name in enumerate(names):
            planes = pictures[k % 6].transpose(0, 3, 1, 2).reshape(n, -1)  # red, green, blue
            raw = np.concatenate([labels[k % 6][:, None], planes], 1).astype(np.uint8).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return pictures, labels


def test_cifar10(tmp_path, monkeypatch):
    pictures, labels = cifar(tmp_path / "cifar10", np.random.default_rng(1))
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    found = data.cifar10()
    check_split(found, 20, 4, (32, 32, 3))
    for x, want in ((found.train, pictures[:5]), (found.validation, pictures[5:])):
        folded = x.reshape(-1, *found.image_shape)
        np.testing.assert_allclose(folded, want.reshape(-1, 32, 32, 3) / 255, rtol=1e-6)
    assert found.train_labels.tolist() == labels[:5].ravel().tolist()
    assert found.validation_labels.tolist() == labels[5].tolist()


def test_files_come_with_checksums_and_stay_in_the_cache(tmp_path, monkeypatch):
    """Without files of one's own pooch fetches them: name, checksum and folder reach it."""
    import pooch

    write_idx(tmp_path / "made", np.random.default_rng(0))
    monkeypatch.delenv("NEUROGUIDE_DATA", raising=False)
    asked = []

    def retrieve(url, known_hash, fname, path, **knobs):
        asked.append((url, known_hash, Path(path).name))
        return str(tmp_path / "made" / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(data.mnist().train) == 7
    assert len({known for _, known, _ in asked}) == 4
    for url, known, folder in asked:
        assert url.endswith("-ubyte.gz")
        assert known.startswith("md5:")
        assert len(known) == 36
        assert folder == "mnist"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
@pytest.mark.parametrize("override", [True, False])
def test_offline_without_files(name, override, tmp_path, monkeypatch):
    import pooch

    def offline(*args, **knobs):
        raise ConnectionError("no network")

    monkeypatch.setattr(pooch, "retrieve", offline)
    monkeypatch.delenv("NEUROGUIDE_DATA", raising=False)
    if override:
        monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="NEUROGUIDE_DATA") as error:
        data.DATA[name]()
    assert "no network" in str(error.value)
    assert (str(tmp_path) in str(error.value)) == override


def corrupt(kind):
    whole = idx(np.arange(10))
    if kind == "cut gzip":
        return whole[:-6]
    if kind == "not gzip":
        return b"<html>404</html>"
    raw = bytearray(gzip.decompress(whole))
    if kind == "wrong magic":
        raw[2] = 0x0D  # floats
    if kind == "short":
        raw = raw[:-3]
    if kind == "empty":
        raw = bytearray()
    return gzip.compress(bytes(raw))


@pytest.mark.parametrize("kind", ["cut gzip", "not gzip", "wrong magic", "short", "empty"])
def test_corrupt_idx(kind, tmp_path, monkeypatch):
    write_idx(tmp_path, np.random.default_rng(0))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(corrupt(kind))
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=r"train-labels-idx1-ubyte\.gz"):
        data.mnist()


@pytest.mark.parametrize("kind", ["cut", "not an archive", "odd size"])
def test_corrupt_cifar10(kind, tmp_path, monkeypatch):
    cifar(tmp_path, np.random.default_rng(1))
    path = tmp_path / "cifar-10-binary.tar.gz"
    if kind == "odd size":
        with tarfile.open(path, "w:gz") as tar:
            info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if kind == "cut" else b"<html>404</html>")
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=r"cifar-10-binary\.tar\.gz"):
        data.cifar10()
