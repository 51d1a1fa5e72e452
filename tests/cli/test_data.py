"""Digits, folders of images and .npz files give the same kind of data; what does not fit is said in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitorch_engine.cli.augment import Augmentation
from bitorch_engine.cli.data import as_float, load_data, stratified_split
from bitorch_engine.cli.errors import UsageError


def picture(path: Path, value: int = 100, size: tuple[int, int] = (6, 5), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 0, 255)).save(path)


def test_digits_are_the_1797_of_scikit_learn_with_each_class_in_both_parts() -> None:
    data = load_data("digits")
    assert data.input_shape == (1, 8, 8)
    assert len(data.train_labels) == 1437
    assert len(data.test_labels) == 360
    assert data.train_images.dtype == torch.float32
    assert data.train_images.max() == 1
    assert torch.bincount(data.test_labels).min() >= 33
    assert torch.equal(data.test_images, load_data("digits").test_images)


def test_a_split_holds_out_a_fifth_of_each_class_and_repeats_itself() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2)
    train, test = stratified_split(labels)
    assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(62))
    assert torch.bincount(labels[test]).tolist() == [10, 2, 1]
    assert torch.equal(test, stratified_split(labels)[1])


def test_a_folder_without_split_is_split_and_keeps_pixels_and_classes(tmp_path: Path) -> None:
    for index in range(5):
        picture(tmp_path / "cat" / f"{index}.png", value=10)
        picture(tmp_path / "dog" / f"{index}.png", value=20)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = load_data(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (1, 5, 6)
    assert data.train_images.dtype == torch.uint8
    assert len(data.train_labels) == 8
    assert len(data.test_labels) == 2
    assert torch.equal(data.train_images[:, 0, 0, 0], torch.tensor([10, 20], dtype=torch.uint8)[data.train_labels])


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_with_its_own_split_keeps_it(tmp_path: Path, held_out: str) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "train" / name / "0.png")
        picture(tmp_path / "train" / name / "1.png")
    picture(tmp_path / held_out / "b" / "0.png")
    data = load_data(str(tmp_path))
    assert len(data.train_labels) == 4
    assert data.test_labels.tolist() == [1]


def test_one_colour_image_makes_all_of_them_rgb(tmp_path: Path) -> None:
    for name, mode in (("a", "L"), ("b", "RGB")):
        picture(tmp_path / name / "0.png", mode=mode)
        picture(tmp_path / name / "1.png", mode=mode)
    assert load_data(str(tmp_path)).input_shape == (3, 5, 6)


def test_images_of_different_sizes_are_cut_and_scaled_to_the_size_asked_for(tmp_path: Path) -> None:
    for name, size in (("a", (6, 5)), ("b", (20, 9))):
        picture(tmp_path / name / "0.png", size=size)
        picture(tmp_path / name / "1.png", size=size)
    with pytest.raises(UsageError, match=r"images must have one size.*--image-size"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), image_size=4).input_shape == (1, 4, 4)


def test_an_image_is_turned_upright_as_its_exif_data_says(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            image = Image.new("L", (8, 4))
            exif = image.getexif()
            exif[0x0112] = 6  # rotated by a quarter
            image.save(tmp_path / name / f"{index}.jpg", exif=exif)
    assert load_data(str(tmp_path)).input_shape == (1, 8, 4)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least two; found none"):
        load_data(str(tmp_path))
    picture(tmp_path / "a" / "0.png")
    with pytest.raises(UsageError, match="at least two; found a"):
        load_data(str(tmp_path))
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="b holds no images"):
        load_data(str(tmp_path))
    picture(tmp_path / "b" / "0.png")
    with pytest.raises(UsageError, match="has one image"):
        load_data(str(tmp_path))
    (tmp_path / "b" / "1.png").write_bytes((tmp_path / "b" / "0.png").read_bytes()[:50])
    with pytest.raises(UsageError, match=r"1\.png cannot be read as an image"):
        load_data(str(tmp_path))
    Image.new("I;16", (6, 5)).save(tmp_path / "b" / "1.png")
    with pytest.raises(UsageError, match="more than 8 bits"):
        load_data(str(tmp_path))


def test_a_class_that_is_only_tested_is_refused(tmp_path: Path) -> None:
    for folder in ("train/a", "train/b", "val/c"):
        picture(tmp_path / folder / "0.png")
    with pytest.raises(UsageError, match="has the class c"):
        load_data(str(tmp_path))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((10, 4, 6), (1, 4, 6)), ((10, 3, 4, 6), (3, 4, 6)), ((10, 4, 6, 3), (3, 4, 6)), ((10, 5, 4, 6), (5, 4, 6))],
)
def test_npz_images_of_every_layout_come_out_channels_first(
    tmp_path: Path, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape) % 256
    np.savez(tmp_path / "x.npz", x=values, y=np.arange(10) % 2)
    data = load_data(str(tmp_path / "x.npz"))
    assert data.input_shape == wanted
    assert data.train_images.dtype == torch.uint8
    assert data.classes == ("0", "1")
    assert as_float(data.train_images).max() <= 1


def test_npz_with_its_own_split_keeps_it(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((6, 4, 4))
    np.savez(tmp_path / "x.npz", x_train=x, y_train=np.arange(6) % 3, x_test=x[:2], y_test=np.array([2, 0]))
    data = load_data(str(tmp_path / "x.npz"))
    assert len(data.train_labels) == 6
    assert data.test_labels.tolist() == [2, 0]
    assert torch.equal(data.test_images[:, 0], torch.tensor(x[:2], dtype=torch.float32))


X, Y = np.zeros((4, 3, 3)), np.array([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "must hold x_train.*found x"),
        ({"x": X, "y": Y[:3]}, r"y must be integers of shape \(4,\)"),
        ({"x": X, "y": Y / 2}, "y must be integers"),
        ({"x": X, "y": Y - 1}, "labels from 0; got -1"),
        ({"x": X[:0], "y": Y[:0]}, "labels from 0; got none"),
        ({"x": X[:, 0], "y": Y}, "must be of shape"),
        ({"x": X.astype(int) + 300, "y": Y}, r"must be 0\.\.255; got 300"),
        ({"x": X + np.nan, "y": Y}, "finite floats"),
        ({"x": X.astype(str), "y": Y}, "finite floats; got <U"),
        ({"x": X.astype(object), "y": Y}, "cannot be read as an .npz file of plain arrays"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, "y_test has the label 2"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, 1:], "y_test": Y}, "they must agree"),
    ],
)
def test_bad_npz_files_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        load_data(str(tmp_path / "x.npz"))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got nowhere, which does not exist"):
        load_data("nowhere")
    (tmp_path / "x.npz").write_text("no zip")
    with pytest.raises(UsageError, match="cannot be read as an"):
        load_data(str(tmp_path / "x.npz"))
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UsageError, match="neither a folder nor"):
        load_data(str(tmp_path / "x.csv"))
    with pytest.raises(UsageError, match="leave --image-size out"):
        load_data("digits", image_size=16)


def test_augmentation_repeats_itself_for_a_seed_and_keeps_the_mean_image() -> None:
    images = load_data("digits").train_images[:500]
    changed = Augmentation()(images, torch.Generator().manual_seed(3))
    assert torch.equal(changed, Augmentation()(images, torch.Generator().manual_seed(3)))
    assert changed.shape == images.shape
    assert (changed - images).abs().mean() > 0.05
    assert abs(float(changed.mean() - images.mean())) < 0.03


def test_augmentation_of_nothing_is_the_identity() -> None:
    images = load_data("digits").train_images[:5]
    still = Augmentation(degrees=0, scale=0, shear=0, shift=0, contrast=0, noise=0)
    torch.testing.assert_close(still(images, torch.Generator()), images, atol=1e-5, rtol=0)
