"""Real data: digits, patches of two sorts of natural images, MNIST, Fashion-MNIST, CIFAR-10.

Every loader returns a :class:`Data` of float32 tensors, one observation per row. The last three
are downloaded once, with checksums, into the user's cache. Offline, set NEUROGUIDE_DATA to a folder
that holds the files, in a subfolder of the data set's name or directly. Van Hateren's images are
read from there alone.
"""

from __future__ import annotations

import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.errors import BadInput
from inference.guide import check_counts
from inference.table import Table

__all__ = [
    "DATA",
    "Data",
    "cifar10",
    "digits",
    "fashion_mnist",
    "mnist",
    "patches",
    "van_hateren",
    "whiten",
]

VALIDATION = 0.2  # share of rows held out where the data come without a split
VAN_HATEREN = 1024, 1536  # rows and columns of their images


@dataclass(frozen=True)
class Data:
    """A data set with its split.

    Attributes:
        name: of the data set.
        train: (N, F), float32.
        validation: (M, F), held out.
        image_shape: folds a row into a picture, (height, width) or (height, width, 3).
        range: smallest and largest possible value; infinite after whitening.
        train_labels: (N,), int64, where there are any.
        validation_labels: (M,).
    """

    name: str
    train: Tensor
    validation: Tensor
    image_shape: tuple[int, ...]
    range: tuple[float, float] = (0.0, 1.0)
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None


def digits() -> Data:
    """Scikit-learn's 1,797 handwritten digits: 8 x 8 pixels in [0, 1], one in five held out."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.as_tensor(bunch.data / 16.0, dtype=torch.float32)
    y = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[int(VALIDATION * len(x)) :], order[: int(VALIDATION * len(x))]
    return Data("digits", x[train], x[held], (8, 8), (0.0, 1.0), y[train], y[held])


def patches(*, side: int = 12, n: int = 20_000, seed: int = 0) -> Data:
    """Grey patches of scikit-learn's two photographs, each patch with mean zero.

    Pixels were in [0, 1] before the mean was taken off, so values are in [-1, 1]. Held-out patches
    come from the right-most fifth of each photograph, and share no pixel with the others.

    Args:
        side: pixels along a side.
        n: patches in all, one in five of them held out.
        seed: of their places.

    Raises:
        BadInput: patches larger than the held-out part of a photograph, or counts below 1.
    """
    from sklearn.datasets import load_sample_images

    check_counts(side=side, n=n)
    luminance = np.array([0.299, 0.587, 0.114]) / 255.0  # ITU-R BT.601
    images = [image @ luminance for image in load_sample_images().images]
    _check_side(side, min(int(VALIDATION * image.shape[1]) for image in images))
    cuts = [int((1 - VALIDATION) * image.shape[1]) for image in images]
    held = int(VALIDATION * n)
    left = [image[:, :cut] for image, cut in zip(images, cuts, strict=True)]
    right = [image[:, cut:] for image, cut in zip(images, cuts, strict=True)]
    rng = np.random.default_rng(seed)
    train, validation = _cut(left, n - held, side, rng), _cut(right, held, side, rng)
    return Data("patches", _centred(train), _centred(validation), (side, side), (-1.0, 1.0))


def van_hateren(*, side: int = 16, n: int = 20_000, seed: int = 0) -> Data:
    """Patches of van Hateren's natural images: log intensity, each patch with mean zero.

    Reads the calibrated images (*.imc) or, where there are none, the linear ones (*.iml) in
    NEUROGUIDE_DATA; there is no download, for their site is gone. Held-out patches come from the
    last fifth of the images, for neighbours may show one scene; with fewer than five images, from
    the right-most fifth of each.

    Args:
        side: pixels along a side.
        n: patches in all, one in five of them held out.
        seed: of their places.

    Raises:
        BadInput: no files, one of the wrong size, patches too large, or counts below 1.

    References:
        Independent component filters of natural images compared with simple cells in primary
        visual cortex (van Hateren & van der Schaaf, 1998) https://doi.org/10.1098/rspb.1998.0303
    """
    check_counts(side=side, n=n)
    paths = _van_hateren_files()
    height, width = VAN_HATEREN
    held, cut = int(VALIDATION * len(paths)), int((1 - VALIDATION) * width)
    images, others = (paths[:-held], paths[-held:]) if held else (paths, paths)
    end, start = (width, 0) if held else (cut, cut)
    _check_side(side, min(height, width - start))
    rng, few = np.random.default_rng(seed), int(VALIDATION * n)
    train = _cut(images, n - few, side, rng, lambda path: _van_hateren_image(path)[:, :end])
    validation = _cut(others, few, side, rng, lambda path: _van_hateren_image(path)[:, start:])
    shades = 16 * math.log(2)  # log(1 + the largest of 16 bits)
    logs = _centred(train.log1p()), _centred(validation.log1p())
    return Data("van_hateren", *logs, (side, side), (-shades, shades))


def _van_hateren_files() -> list[Path]:
    """Images of one kind only, for the same image may be there as both."""
    override = os.environ.get("NEUROGUIDE_DATA")
    folders = [Path(override) / "van_hateren", Path(override)] if override else []
    for folder in folders:
        for pattern in ("*.imc", "*.iml"):
            if found := sorted(folder.glob(pattern)):
                return found
    raise BadInput(
        "data 'van_hateren'",
        expected="files imk00001.iml, ... or .imc in NEUROGUIDE_DATA",
        got=f"none in {override!r}",
        fix="There is no download. Put the files into a folder 'van_hateren' and set "
        "NEUROGUIDE_DATA to the folder around it.",
    )


def _van_hateren_image(path: Path) -> Any:
    """Intensities (1024, 1536), read where they are looked at."""
    with _intact(path, "an image of 1,024 rows of 1,536 big-endian 16-bit numbers"):
        if path.stat().st_size != 2 * math.prod(VAN_HATEREN):
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        return np.memmap(path, ">u2", "r", shape=VAN_HATEREN)


def _check_side(side: int, largest: int) -> None:
    if side > largest:
        raise BadInput("side", expected=f"at most {largest}", got=str(side), fix="side=12.")


def _cut(
    images: Sequence[Any],
    n: int,
    side: int,
    rng: np.random.Generator,
    read: Callable[[Any], Any] = np.asarray,
) -> Tensor:
    """n patches at random places, (n, side^2); images are read one at a time."""
    pieces = []
    for k, image in enumerate(images):
        windows = np.lib.stride_tricks.sliding_window_view(read(image), (side, side))
        count = n // len(images) + (k < n % len(images))
        rows, columns = (rng.integers(0, size, count) for size in windows.shape[:2])
        pieces.append(windows[rows, columns].reshape(count, side**2))
    return torch.as_tensor(np.concatenate(pieces).astype(np.float32))


def _centred(patches: Tensor) -> Tensor:
    return patches - patches.mean(1, keepdim=True)


def whiten(data: Data, *, ridge: float = 1e-3, components: int | None = None) -> Data:
    """Zero-phase (ZCA) whitening with the training rows' mean and covariance.

    Args:
        data: to whiten.
        ridge: added to the covariance, as a share of the mean variance; keeps noise in its place.
        components: only so many of the strongest principal components are kept, which in natural
            images are those of low frequency; all by default.

    References:
        The "independent components" of natural scenes are edge filters (Bell & Sejnowski, 1997)
        https://doi.org/10.1016/S0042-6989(97)00121-1
    """
    mean = data.train.mean(0)
    covariance = torch.cov(data.train.T.double())
    values, vectors = torch.linalg.eigh(covariance)
    scale = (values + ridge * values.mean()).rsqrt()
    scale[: len(scale) - (components or len(scale))] = 0
    matrix = (vectors * scale @ vectors.T).to(data.train.dtype)
    train, validation = ((t - mean) @ matrix for t in (data.train, data.validation))
    unbounded = (-float("inf"), float("inf"))
    return replace(data, train=train, validation=validation, range=unbounded)


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_MD5 = {
    "mnist": (
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion_mnist": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "cifar10": ("c32a1d4ab5d03f1284b67883e8d87530",),
}


def mnist() -> Data:
    """MNIST: 60,000 and 10,000 digits of 28 x 28 pixels in [0, 1]."""
    return _idx("mnist", _MNIST)


def fashion_mnist() -> Data:
    """Fashion-MNIST: 60,000 and 10,000 garments of 28 x 28 pixels in [0, 1]."""
    return _idx("fashion_mnist", _FASHION)


def cifar10() -> Data:
    """CIFAR-10, binary version: 50,000 and 10,000 colour pictures of 32 x 32 x 3 in [0, 1]."""
    path = _file("cifar10", _CIFAR, "cifar-10-binary.tar.gz", _MD5["cifar10"][0])
    with _intact(path, "a CIFAR-10 archive, binary version"), tarfile.open(path) as tar:
        names = sorted(m.name for m in tar.getmembers() if m.name.endswith(".bin"))
        rows = {n: np.frombuffer(_member(tar, n), np.uint8).reshape(-1, 3073) for n in names}
        parts = [[r for n, r in rows.items() if kind in n] for kind in ("data_batch", "test_batch")]
        split = [np.concatenate(part) for part in parts]
    xs = [s[:, 1:].reshape(-1, 3, 1024).transpose(0, 2, 1).reshape(-1, 3072) for s in split]
    ys = [torch.as_tensor(s[:, 0].astype(np.int64)) for s in split]
    return Data("cifar10", _unit(xs[0]), _unit(xs[1]), (32, 32, 3), (0.0, 1.0), *ys)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None  # names come from the archive itself
    return file.read()


def _unit(pixels: Any) -> Tensor:
    return torch.as_tensor(pixels.astype(np.float32) / 255.0)


def _idx(name: str, base: str) -> Data:
    files = [
        _file(name, base, f"{stem}-ubyte.gz", md5)
        for stem, md5 in zip(_IDX, _MD5[name], strict=True)
    ]
    train, y, held, y_held = (_read_idx(path) for path in files)
    shape = train.shape[1:]
    pixels, held_pixels = (_unit(a.reshape(len(a), -1)) for a in (train, held))
    labels = (torch.as_tensor(a.astype(np.int64)) for a in (y, y_held))
    return Data(name, pixels, held_pixels, shape, (0.0, 1.0), *labels)


def _read_idx(path: Path) -> Any:
    """An IDX file: two zero bytes, type 8 (unsigned byte), number of dims, sizes, data."""
    with _intact(path, "an IDX file of bytes, gzipped"):
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {raw[:4]!r}")
        dims = raw[3]
        shape = np.frombuffer(raw, ">u4", dims, 4).astype(int)
        return np.frombuffer(raw, np.uint8, -1, 4 + 4 * dims).reshape(shape)


@contextmanager
def _intact(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes one clear error."""
    try:
        yield
    except (OSError, EOFError, ValueError, IndexError, zlib.error, tarfile.TarError) as error:
        raise BadInput(
            str(path),
            expected=what,
            got=f"{type(error).__name__}: {error}",
            fix="The file is cut short or is another one; delete it and fetch it again.",
        ) from error


def _file(name: str, base: str, filename: str, md5: str) -> Path:
    """The file in NEUROGUIDE_DATA, or in the cache, or downloaded into it."""
    override = os.environ.get("NEUROGUIDE_DATA")
    if override:
        for path in (Path(override) / name / filename, Path(override) / filename):
            if path.is_file():
                return path
    import pooch

    try:
        cache = pooch.os_cache("neuroguide") / name
        return Path(pooch.retrieve(base + filename, f"md5:{md5}", filename, cache))
    except Exception as error:  # pooch passes on whatever its downloader raises
        raise BadInput(
            f"data {name!r}",
            expected=f"{filename} in NEUROGUIDE_DATA, in the cache or at {base}",
            got=f"{type(error).__name__}: {error}",
            fix=f"Offline, put the file into a folder and set NEUROGUIDE_DATA to it "
            f"(now {override!r}).",
        ) from error


DATA: Table[Callable[[], Data]] = Table(
    "data set",
    {
        "digits": digits,
        "patches": patches,
        "van_hateren": van_hateren,
        "mnist": mnist,
        "fashion_mnist": fashion_mnist,
        "cifar10": cifar10,
    },
)
