"""The file that save and save_training write. This docstring is the specification of the format.

It is a safetensors file, which any safetensors reader opens, and which holds tensors and text, no code:

    | length of header, 8 bytes | header: JSON, names, dtypes and shapes | bytes of the tensors |

One entry of the header's metadata, "bitorch_engine", is a JSON document of ASCII, keys sorted, without spaces.

    kind      "deployment" or "training"
    version   of a deployment file 1, of a training file 2 (1 had 8-bit moments of another form)
    content   what the tensors are: an object; ``deployment`` and ``training`` say what is in it
    tensors   SHA-256 over all tensors in order of name: of each, JSON of [name, dtype, shape], a newline, its bytes
    digest    SHA-256 of this document without the key "digest"

So a changed bit is found wherever it is: in the framing by safetensors, in this document by ``digest``, in a name,
dtype, shape or value by ``tensors``. Equal contents give equal files. Digests find damage; they do not prove who wrote
a file.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

VERSIONS = {"deployment": 1, "training": 2}
"""Of the format of each kind. A reader refuses all others."""

_KEY = "bitorch_engine"
_READER = {"deployment": "bitorch_engine.load", "training": "bitorch_engine.checkpoint.load_training"}
_STORABLE = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}

_TORCH_SAVES = (b"PK\x03\x04", b"\x80\x02\x8a\n")
"""The first bytes of what torch.save writes: a zip file, or until torch 1.6 a pickled magic number."""

StrPath = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A file that is damaged, of another format, or not of this model. Nothing has been changed."""


@contextmanager
def naming(path: StrPath, consequence: str = "") -> Iterator[None]:
    """Put the file's name before what is said about it, and the consequence behind."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error} {consequence}".rstrip()) from error.__cause__


def write(path: StrPath, kind: str, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file in one step: at ``path`` there is the old file or the new one, whole, whatever happens meanwhile.

    content: JSON-able, without NaN.  tensors: dense, on any device.
    Raises TypeError for a tensor that the format cannot hold, OSError where the file cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in _STORABLE:
            raise TypeError(f"{name} is a tensor of {tensor.dtype}, {tensor.layout}, which a checkpoint cannot hold.")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to save.")
    # Clones, as safetensors takes no two tensors that share memory.
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    document = {"kind": kind, "version": VERSIONS[kind], "content": content, "tensors": _digest_of_tensors(stored)}
    document["digest"] = _digest_of_document(document)
    _replace_file(Path(path), safetensors.torch.save(stored, {_KEY: _canonical(document)}))


def read(path: StrPath, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content, tensors on the CPU) of a file, every bit of it checked. Raises CheckpointError, OSError."""
    with _opened(path) as file:
        document = _document(file)
        if document["kind"] != kind:
            raise CheckpointError(
                f"this is a {document['kind']} checkpoint, wanted a {kind} one; "
                f"read it with {_READER[document['kind']]}."
            )
        with explained("its tensors cannot be read", "save it again with this library"):
            views = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            intact = _digest_of_tensors(views) == document["tensors"]
        if not intact:
            raise CheckpointError("the file is damaged: its tensors are not those that were saved; copy it again.")
        return document["content"], {name: view.clone() for name, view in views.items()}


def read_content(path: StrPath) -> tuple[str, dict[str, Any]]:
    """(kind, content) of a file, of which no tensor is read or checked. Raises CheckpointError, OSError."""
    with _opened(path) as file:
        document = _document(file)
    return document["kind"], document["content"]


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn what goes wrong with contents whose digests are right into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise CheckpointError(f"{what} ({reason}); {advice}.") from error


@contextmanager
def _opened(path: StrPath) -> Iterator[Any]:
    """The file under safetensors' reader, whose errors become CheckpointErrors."""
    with open(path, "rb") as probe:  # a file that is missing or forbidden is told by Python's own error
        size, start = os.fstat(probe.fileno()).st_size, probe.read(4)
    if size == 0:
        raise CheckpointError("the file is empty; copy or save it again.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        if start in _TORCH_SAVES:
            raise CheckpointError(
                "wanted a safetensors file that bitorch_engine wrote, got one of torch.save. To take its weights, call "
                "model.load_state_dict(torch.load(path)), which quantizes those that are float."
            ) from None
        raise CheckpointError(
            f"the file ({size} bytes) is truncated or damaged, or no safetensors file at all ({error}); copy it again."
        ) from error


def _document(file: Any) -> dict[str, Any]:
    """The checked document of an opened file."""
    text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise CheckpointError(
            "this safetensors file was not written by bitorch_engine. To take its float weights, call "
            "model.load_state_dict(safetensors.torch.load_file(path)), which quantizes them."
        )
    try:
        document = json.loads(text)
        version, kind, digest = document["version"], document["kind"], document["digest"]
        intact = _canonical(document) == text and _digest_of_document(document) == digest
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"the file is damaged: its description is no JSON ({error}); copy it again.") from error
    wanted = VERSIONS.get(kind) if isinstance(kind, str) else None
    if wanted is not None and version != wanted:
        raise CheckpointError(
            f"the {kind} file has format version {version!r}, this library reads version {wanted}; "
            "use the version of bitorch_engine that wrote it, or a newer one."
        )
    if not intact:
        raise CheckpointError("the file is damaged: its description is not the one that was saved; copy it again.")
    if kind not in list(_READER) or not isinstance(document.get("content"), dict) or "tensors" not in document:
        raise CheckpointError(f"the file is of an unknown kind, {kind!r}; wanted {' or '.join(_READER)}.")
    return document


def _canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest_of_document(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(_canonical(rest).encode()).hexdigest()


def _digest_of_tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(_canonical([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in files: ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name. Raises ValueError where there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _replace_file(path: Path, data: bytes) -> None:
    """Replace a file's content in one step, which a crash or a power cut cannot split."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")
    # Not from tempfile, whose files nobody else may read: the mode is that of any new file.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
