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


def test_sixteen_pixels_along_a_side_are_whitened():
    """Patches with mean zero have a singular covariance: one axis in 256 is silent and stays so."""
    raw = data.patches(side=16, n=3000)
    white = data.whiten(raw)
    check_split(raw, 2400, 600, (16, 16), -1.0, 1.0)
    values = np.linalg.eigvalsh(np.cov(white.train.double().numpy().T))
    shares = np.linalg.eigvalsh(np.cov(raw.train.double().numpy().T))
    want = shares / (shares + 1e-3 * shares.mean())
    np.testing.assert_allclose(values, np.sort(want), atol=1e-3)
    assert abs(values[0]) < 1e-6
    assert white.validation.isfinite().all()
    assert 0.3 < float(white.validation.std() / white.train.std()) < 3


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


# van Hateren's images


def intensity(column, image):
    """2^image exp(2 (column / width)^2), from which a patch's logs tell column and not image."""
    return 1000.0 * 2.0**image * np.exp(2 * (column / 1536) ** 2)


def write_images(folder, names):
    """Images that brighten to the right, of 3 MB each."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        row = intensity(np.arange(1536), k % 3).round().astype(">u2")
        (folder / name).write_bytes(np.broadcast_to(row, (1024, 1536)).tobytes())


def columns_of(x, side):
    """The left-most column of patches (N, side^2), from the slope of their logs."""
    rows = x.reshape(-1, side, side)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))  # rows and columns not exchanged
    slope = (rows[:, 0, -1] - rows[:, 0, 0]) / (side - 1)
    return slope * 1536**2 / 4 - (side - 1) / 2


@pytest.mark.parametrize("sub", [True, False])
@pytest.mark.parametrize("ending", ["iml", "imc"])
def test_van_hateren_of_few_images_holds_out_columns(sub, ending, tmp_path, monkeypatch):
    folder = tmp_path / "van_hateren" if sub else tmp_path
    write_images(folder, [f"imk0000{k}.{ending}" for k in (1, 2)])
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    found = data.DATA["van_hateren"]()
    check_split(found, 16_000, 4000, (16, 16), -16 * np.log(2), 16 * np.log(2))
    found = data.van_hateren(side=32, n=3000)
    for part, low, high in (("train", 0, 1228), ("validation", 1228, 1536)):
        x = getattr(found, part)
        torch.testing.assert_close(x.mean(1), torch.zeros(len(x)), rtol=0, atol=1e-5)
        left = columns_of(x, 32)
        # intensities are whole numbers of 1,000 and more: a column is known to 10 or so
        assert abs(float(left.min()) - low) < 20
        assert abs(float(left.max()) + 32 - high) < 20
    again, other = (data.van_hateren(side=32, n=3000, seed=s) for s in (0, 1))
    assert torch.equal(again.train, found.train)
    assert not torch.equal(other.train, found.train)


def test_van_hateren_holds_out_one_image_in_five(tmp_path, monkeypatch):
    """Image k has k + 1 as its one contrast, and steps at random columns."""
    rng = np.random.default_rng(0)
    for k in range(6):
        dark = rng.random((1024, 1536)) < 0.5
        image = np.where(dark, 100, 100 * 2 ** (k + 1)).astype(">u2")
        (tmp_path / f"imk0000{k}.iml").write_bytes(image.tobytes())
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    found = data.van_hateren(side=4, n=200)
    seen = {}
    for part in ("train", "validation"):
        x = getattr(found, part)
        seen[part] = ((x.amax(1) - x.amin(1)) / np.log(2)).round().int().unique().tolist()
    assert seen == {"train": [1, 2, 3, 4, 5], "validation": [6]}
    # fewer patches than images, as large as can be
    x = data.van_hateren(side=1024, n=3)
    assert (x.train.shape, x.validation.shape) == ((3, 1024**2), (0, 1024**2))
    with pytest.raises(BadInput, match="side: expected at most 1024"):
        data.van_hateren(side=1025)


def test_van_hateren_reads_calibrated_images_alone_where_there_are_some(tmp_path, monkeypatch):
    write_images(tmp_path, ["imk00001.imc"])
    (tmp_path / "imk00001.iml").write_bytes(b"not looked at")
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    assert len(data.van_hateren(n=10).train) == 8


@pytest.mark.parametrize("override", [True, False])
def test_van_hateren_without_files_says_where_to_put_them(override, tmp_path, monkeypatch):
    monkeypatch.delenv("NEUROGUIDE_DATA", raising=False)
    if override:
        monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match="folder 'van_hateren' and set NEUROGUIDE_DATA") as error:
        data.van_hateren()
    assert (str(tmp_path) in str(error.value)) == override


@pytest.mark.parametrize("size", [0, 3_145_727, 3_145_730])
def test_van_hateren_refuses(size, tmp_path, monkeypatch):
    (tmp_path / "imk00001.iml").write_bytes(bytes(size))
    monkeypatch.setenv("NEUROGUIDE_DATA", str(tmp_path))
    with pytest.raises(BadInput, match=rf"imk00001\.iml: .*it has {size:,} bytes"):
        data.van_hateren()
    with pytest.raises(BadInput, match="side: expected at most 308; got 309"):
        data.van_hateren(side=309)
    with pytest.raises(BadInput, match="n: expected an integer >= 1"):
        data.van_hateren(n=0)
