"""Image classification data, in memory: the bundled digits, a folder of images per class, or an .npz file."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitorch_engine.cli.errors import UsageError, optional

TEST_SHARE = 0.2
SPLIT_SEED = 12345
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class ImageData:
    """Labelled images of a training and a test part.

    images: (N, C, H, W), uint8 of 0..255 or float32.  labels: (N,) int64, an index into ``classes``.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def load_data(source: str, image_size: int | None = None) -> ImageData:
    """The data that ``--data`` names: ``digits``, a folder, or an .npz file.

    image_size: side of the square to which a folder's images are cut and scaled; None keeps their common size.
    Raises UsageError where the source is none of these or its content does not fit.
    """
    path = Path(source).expanduser()
    if source != "digits" and path.is_dir():
        return load_folder(path, image_size)
    if image_size is not None:
        raise UsageError(f"an image size applies to a folder of images, not to {source}; leave --image-size out.")
    if source == "digits":
        return load_digits()
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path)
    found = "which does not exist" if not path.exists() else "which is neither a folder nor an .npz file"
    raise UsageError(
        f"data must be 'digits', a folder with a subfolder of images per class, or an .npz file; got {source}, {found}."
    )


def as_float(images: Tensor) -> Tensor:
    """The images as a network takes them: float32, bytes scaled to 0..1."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def stratified_split(labels: Tensor, test_share: float = TEST_SHARE, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Sorted indices of a training and a test part with the same mix of classes; the same for the same seed.

    Of each class, ``test_share`` of the images, at least one, go to the test part.
    Raises UsageError where a class has a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise UsageError(
                f"class {label} has one image, and a split into training and test part needs two; add images."
            )
        shuffled = members[torch.randperm(len(members), generator=generator)]
        cut = max(1, round(test_share * len(members)))
        test.append(shuffled[:cut])
        train.append(shuffled[cut:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


# ------------------------------------------------------------------------------------------------ digits


def load_digits() -> ImageData:
    """scikit-learn's bundled 1797 handwritten digits, 8x8, scaled to 0..1: 1437 to train on, 360 to test on."""
    pixels, labels = optional("sklearn.datasets").load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = optional("sklearn.model_selection").train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    train_images, test_images, train_labels, test_labels = map(torch.as_tensor, parts)
    classes = tuple("0123456789")
    return ImageData("digits", classes, train_images, train_labels.long(), test_images, test_labels.long())


# ------------------------------------------------------------------------------------------------ a folder of images


def load_folder(root: Path, image_size: int | None = None) -> ImageData:
    """Images below ``root/<class>/``, or below ``root/train/<class>/`` and ``root/val/<class>/`` (or ``test``).

    Without a split of its own, a fifth of each class is held out, always the same fifth.
    Grey where every image is grey, else RGB; uint8.
    """
    test_root = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        train_files, test_files = _files_by_class(root / "train"), _files_by_class(test_root)
        if unknown := sorted(test_files.keys() - train_files.keys()):
            raise UsageError(f"{test_root} has the class {unknown[0]}, which {root / 'train'} has not.")
    else:
        train_files, test_files = _files_by_class(root), {}
    classes = tuple(train_files)
    if len(classes) < 2:
        raise UsageError(
            f"{root} must have one subfolder of images per class, at least two; found {', '.join(classes) or 'none'}."
        )
    train = [(path, classes.index(name)) for name, paths in train_files.items() for path in paths]
    test = [(path, classes.index(name)) for name, paths in test_files.items() for path in paths]
    images = _read_images([path for path, _ in train + test], image_size)
    labels = torch.tensor([label for _, label in train + test])
    if test:
        train_index, test_index = torch.arange(len(train)), torch.arange(len(train), len(labels))
    else:
        train_index, test_index = stratified_split(labels)
    return ImageData(
        str(root), classes, images[train_index], labels[train_index], images[test_index], labels[test_index]
    )


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    """The image files of every class folder of ``root``, both in alphabetical order."""
    suffixes = optional("PIL.Image").registered_extensions()
    found = {}
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        found[folder.name] = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
        if not found[folder.name]:
            raise UsageError(f"the class folder {folder} holds no images; fill it or remove it.")
    return found


def _read_images(paths: Sequence[Path], image_size: int | None) -> Tensor:
    """(N, C, H, W) uint8 of the images, upright as their EXIF data says."""
    pillow, operations = optional("PIL.Image"), optional("PIL.ImageOps")
    pictures: list[Any] = []
    for path in paths:
        try:
            with pillow.open(path) as file:
                picture = operations.exif_transpose(file)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise UsageError(f"{path} cannot be read as an image ({error}); repair or remove it.") from None
        if picture.mode.startswith(("I", "F")):
            raise UsageError(f"{path} has pixels of more than 8 bits (mode {picture.mode}); convert it to 8 bits.")
        if image_size is not None:
            picture = operations.fit(picture.convert("RGB" if _has_colour(picture) else "L"), (image_size, image_size))
        elif pictures and picture.size != pictures[0].size:
            raise UsageError(
                f"images must have one size, got {pictures[0].size} ({paths[0]}) and {picture.size} ({path}); "
                "choose one with --image-size."
            )
        pictures.append(picture)
    mode = "RGB" if any(_has_colour(picture) for picture in pictures) else "L"
    arrays = [np.atleast_3d(np.asarray(picture.convert(mode))) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _has_colour(picture: Any) -> bool:
    return picture.mode not in ("1", "L", "LA")


# ------------------------------------------------------------------------------------------------ .npz


def load_npz(path: Path) -> ImageData:
    """The arrays x_train, y_train, x_test, y_test of an .npz file, or x, y, of which a fifth is held out.

    x: (N, H, W), (N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels; integers of 0..255, or finite floats.
    y: (N,) integers from 0.  Pickled objects are never loaded.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        train_images, train_labels = _npz_part(path, arrays, "x_train", "y_train")
        test_images, test_labels = _npz_part(path, arrays, "x_test", "y_test")
        if test_images.shape[1:] != train_images.shape[1:]:
            raise UsageError(
                f"{path}: x_train has images of shape {tuple(train_images.shape[1:])} and x_test of shape "
                f"{tuple(test_images.shape[1:])}; they must agree."
            )
    elif {"x", "y"} <= arrays.keys():
        images, labels = _npz_part(path, arrays, "x", "y")
        train, test = stratified_split(labels)
        train_images, train_labels, test_images, test_labels = images[train], labels[train], images[test], labels[test]
    else:
        found = ", ".join(sorted(arrays)) or "none"
        raise UsageError(f"{path} must hold x_train, y_train, x_test and y_test, or x and y; found {found}.")
    count = int(train_labels.max()) + 1
    if int(test_labels.max()) >= count:
        raise UsageError(f"{path}: y_test has the label {int(test_labels.max())}, but y_train ends at {count - 1}.")
    return ImageData(str(path), tuple(map(str, range(count))), train_images, train_labels, test_images, test_labels)


def _npz_part(path: Path, arrays: Mapping[str, NDArray[Any]], x: str, y: str) -> tuple[Tensor, Tensor]:
    """Images and labels of two checked arrays."""
    images, labels = arrays[x], arrays[y]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{path}: {y} must be integers of shape ({len(images)},), one per image of {x}; "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    if not len(labels) or labels.min() < 0:
        raise UsageError(f"{path}: {y} must hold labels from 0; got {labels.min() if len(labels) else 'none'}.")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4:
        raise UsageError(f"{path}: {x} must be of shape (N, H, W), (N, C, H, W) or (N, H, W, C); got {images.shape}.")
    integer = images.dtype.kind in "iu"
    if integer and (images.min() < 0 or images.max() > 255):
        raise UsageError(f"{path}: integers of {x} must be 0..255; got {images.min()}..{images.max()}.")
    if not integer and (images.dtype.kind != "f" or not np.isfinite(images).all()):
        raise UsageError(f"{path}: {x} must hold integers of 0..255 or finite floats; got {images.dtype}.")
    array = np.ascontiguousarray(images, dtype=np.uint8 if integer else np.float32)
    return torch.from_numpy(array), torch.from_numpy(labels.astype(np.int64))
