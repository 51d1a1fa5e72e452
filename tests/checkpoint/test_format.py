"""Files are replaced whole or not at all, and no damaged one is ever read."""

import errno
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitorch_engine.checkpoint import CheckpointError, format
from bitorch_engine.checkpoint.format import dtype_named, read, read_content, write

CONTENT = {"a": [1, 2.5, None], "unit": "µ\n"}
TENSORS = {
    "float": torch.tensor([1.0, float("nan"), -0.0]),
    "empty": torch.empty(0, 3),
    "one": torch.tensor(True),
    "half": torch.arange(4, dtype=torch.bfloat16).view(2, 2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    write(path, "deployment", CONTENT, TENSORS)
    return path


def test_what_is_written_is_read(file: Path, bits_of: Callable[[Any], Any]) -> None:
    content, tensors = read(file, "deployment")
    assert content == CONTENT
    assert bits_of(dict(sorted(tensors.items()))) == bits_of(dict(sorted(TENSORS.items())))
    assert read_content(file) == ("deployment", CONTENT)


def test_any_safetensors_reader_opens_it(file: Path) -> None:
    assert set(safetensors.torch.load_file(file)) == set(TENSORS)


def test_what_was_read_is_not_tied_to_the_file(file: Path) -> None:
    _, tensors = read(file, "deployment")
    tensors["half"].zero_()
    assert read(file, "deployment")[1]["half"].equal(TENSORS["half"])


def test_equal_contents_give_equal_files(tmp_path: Path, file: Path) -> None:
    turned = dict(reversed(TENSORS.items()))
    write(tmp_path / "again", "deployment", dict(reversed(CONTENT.items())), turned)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("dtype", sorted(format._STORABLE, key=str), ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype, bits_of: Callable[[Any], Any]) -> None:
    x = torch.tensor([[0, 1, 0]]).to(dtype)
    write(tmp_path / "x", "training", {}, {"x": x, "transposed": x.t(), "part": x[0, 1:]})
    assert bits_of(read(tmp_path / "x", "training")[1]["x"]) == bits_of(x)
    assert bits_of(read(tmp_path / "x", "training")[1]["part"]) == bits_of(x[0, 1:])


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), "x is a tensor of torch.complex128"),
        (torch.zeros(2).to_sparse(), "x is a tensor of torch.float32, torch.sparse_coo"),
    ],
)
def test_a_tensor_that_has_no_form_is_named(tmp_path: Path, tensor: Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        write(tmp_path / "x", "training", {}, {"x": tensor})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_without_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is on the meta device"):
        write(tmp_path / "x", "training", {}, {"x": torch.zeros(2, device="meta")})


# -- in one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "safetensors.torch.save"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=type)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    file: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    before = file.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        write(file, "deployment", {}, {"other": torch.zeros(9)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    sync, replace = os.fsync, os.replace
    kind_of = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(kind_of[stat.S_ISDIR(os.fstat(h).st_mode)]), sync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write(file, "deployment", {}, {})
    assert done == ["file", "replace", "folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        write(tmp_path / "x", "deployment", {}, {})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_a_link_stays_a_link(tmp_path: Path, file: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    write(tmp_path / "link", "deployment", {"new": 1}, {})
    assert (tmp_path / "link").is_symlink()
    assert read_content(file) == ("deployment", {"new": 1})


def test_the_longest_file_name_works(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255), "deployment", {}, {})


def test_writing_to_a_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"):
        write(tmp_path, "deployment", {}, {})


def test_pythons_own_errors_stay(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing", "deployment")
    with pytest.raises(IsADirectoryError):
        read(tmp_path, "deployment")


def test_writing_into_a_folder_that_is_not_there_names_both(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder/x cannot be written: there is no folder .*no folder; make"):
        write(tmp_path / "no folder" / "x", "deployment", {}, {})


# -- damage -----------------------------------------------------------------------------------------------------------


def damaged(folder: Path, data: bytes) -> None:
    """Assert that a file of these bytes is refused, by the documented error."""
    (folder / "damaged").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read(folder / "damaged", "deployment")
    assert str(caught.value).endswith(".")


def test_every_flipped_bit_is_found(tmp_path: Path, file: Path) -> None:
    data = bytearray(file.read_bytes())
    tensors = len(data) - sum(tensor.nbytes for tensor in TENSORS.values())
    for place in range(len(data)):
        # Of the header's JSON, one bit a byte, for time: all of them were tried once.
        for bit in [place % 8] if 8 <= place < tensors else range(8):
            data[place] ^= 1 << bit
            damaged(tmp_path, data)
            data[place] ^= 1 << bit


def test_every_truncation_is_found(tmp_path: Path, file: Path) -> None:
    data = file.read_bytes()
    for length in range(len(data)):
        damaged(tmp_path, data[:length])
    damaged(tmp_path, data + b"\0")


@given(data=st.data())
def test_bytes_that_are_overwritten_are_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("overwritten")
    write(folder / "file", "deployment", CONTENT, TENSORS)
    whole = (folder / "file").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    changed = whole[:place] + patch + whole[place + len(patch) :]
    if changed != whole:
        damaged(folder, changed)


@given(data=st.binary(max_size=200))
def test_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    damaged(tmp_path_factory.mktemp("other"), data)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="no safetensors file at all"):
        read(tmp_path / "x", "deployment")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_refused_with_advice(tmp_path: Path, zipped: bool) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"got one of torch.save. To take its weights, .*load_state_dict\(torch.lo"
    ):
        read(tmp_path / "x.pt", "deployment")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "the file is empty; copy or save it again"),
        (lambda data: data[:-1], r"the file \(\d+ bytes\) is truncated or damaged, .*; copy it again"),
        (lambda data: data[:-3] + b"\7" + data[-2:], "damaged: its tensors are not those that were saved"),
        (lambda data: data.replace(b"2.5", b"2.6"), "damaged: its description is not the one that was saved"),
        (lambda data: data.replace(b"null", b"nulx"), "damaged: its description is no JSON"),
        (
            lambda data: data.replace(b'\\"version\\":1', b'\\"version\\":9'),
            "has format version 9, .* reads version 1;",
        ),
        (lambda data: data.replace(b'":1}', b'":1e'), "damaged: its description is no JSON"),
    ],
)
def test_the_error_says_what_is_wrong(file: Path, change: Callable[[bytes], bytes], message: str) -> None:
    data = file.read_bytes()
    file.write_bytes(change(data))
    assert change(data) != data
    with pytest.raises(CheckpointError, match=message):
        read(file, "deployment")


def test_the_other_kind_is_named_with_its_reader(tmp_path: Path) -> None:
    write(tmp_path / "x", "training", {}, {})
    with pytest.raises(CheckpointError, match="a training checkpoint, wanted a deployment one; .*load_training"):
        read(tmp_path / "x", "deployment")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_peoples_safetensors_are_refused_with_advice(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "x", metadata)
    with pytest.raises(
        CheckpointError, match="not written by bitorch_engine. To take its float weights, .*load_state_dict"
    ):
        read(tmp_path / "x", "deployment")


def forged(path: Path, document: Any, *, sign: bool = True) -> None:
    """A file with any document, with the right digests."""
    if sign:
        document |= {"tensors": format._digest_of_tensors({})}
        document |= {"digest": format._digest_of_document(document)}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    path.write_bytes(safetensors.torch.save({}, {"bitorch_engine": text}))


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "other", "version": 1, "content": {}},
        {"kind": [], "version": 1, "content": {}},
        {"kind": "deployment", "version": 1, "content": []},
        {"kind": "deployment", "version": 1},
        {"kind": "deployment", "version": "1", "content": {}},
        {"kind": "deployment", "content": {}},
        {"kind": "deployment", "version": None, "content": {}},
    ],
    ids=str,
)
def test_a_wrong_document_with_right_digests_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    forged(tmp_path / "x", document)
    with pytest.raises(CheckpointError):
        read(tmp_path / "x", "deployment")


@pytest.mark.parametrize(
    "document", [[], 3, "deployment", None, {"version": 1, "kind": 1, "digest": float("nan")}], ids=str
)
def test_a_document_that_is_no_object_is_refused(tmp_path: Path, document: Any) -> None:
    forged(tmp_path / "x", document, sign=False)
    with pytest.raises(CheckpointError, match="its description is no JSON"):
        read(tmp_path / "x", "deployment")


def test_a_document_of_any_depth_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(safetensors.torch.save({}, {"bitorch_engine": "[" * 100_000}))
    with pytest.raises(CheckpointError, match="its description is no JSON"):
        read(tmp_path / "x", "deployment")


def test_a_training_file_with_the_old_8_bit_moments_is_refused(tmp_path: Path) -> None:
    forged(tmp_path / "x", {"kind": "training", "version": 1, "content": {}})
    with pytest.raises(
        CheckpointError, match="the training file has format version 1, .* reads version 2; use the version"
    ):
        read(tmp_path / "x", "training")


def test_names_of_dtypes() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    with pytest.raises(ValueError, match="'load' is no dtype"):
        dtype_named("load")
