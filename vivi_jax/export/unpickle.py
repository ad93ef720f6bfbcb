"""Reads pickled weights (.pth, .pt, .pkl, .npy of objects) into arrays and plain containers, and builds nothing else.

A pickle says which functions to call. Here these are the few of BUILDERS, which make arrays, dicts and lists; any other
name is refused. And it runs in a process of its own, with limits on memory and time:

    python -P unpickle.py FILE OUT MEMORY_MB CPU_S

writes OUT/arrays.npz and OUT/tree.json (see `encode`), or prints one line that says why not and ends with code 1. So
that the process starts at once and has little in it, this file imports NumPy and the standard library alone.

Of PyTorch's files the zip form is read and the older one, whole tensors of the usual types on any device; TorchScript
archives, sparse and quantised tensors are not. Torch itself is not needed.
"""

import collections
import io
import json
import pathlib
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np


class Refused(Exception):
    """The file cannot be read; the message says why."""


# ---- What a pickle may call -----------------------------------------------------------------------------------------


class Fields:
    """Stands for an object that is only a record of values, such as argparse.Namespace: read as a dict of them."""


class Storage:
    """The numbers of one or more of torch's tensors; known when the whole file has been read."""

    def __init__(self, dtype: str):
        self.dtype, self.data = dtype, b""


class Tensor:
    """A view of a Storage, offset and strides in numbers."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple, *rest: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        if 0 in self.shape:
            return np.zeros(self.shape, np.float32)
        dtype = self.storage.dtype
        flat = np.frombuffer(self.storage.data, "<u2" if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<"))
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min((self.offset, *self.shape, *self.strides)) < 0 or last >= len(flat):
            raise Refused("a tensor reaches beyond its numbers: the file is damaged")
        strides = [s * flat.itemsize for s in self.strides]
        view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)
        if dtype == "bfloat16":  # the upper half of a float32
            return (view.astype(np.uint32) << 16).view(np.float32)
        return np.array(view)


def parameter(data: Any, *rest: Any) -> Any:
    return data


def latin1(text: str, encoding: str) -> bytes:
    """How pickles of Python 2 and of protocol 2 hold bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"bytes as {encoding} text")
    return text.encode(encoding)


def jax_array(function: Callable, arguments: tuple, state: tuple, *rest: Any) -> Any:
    array = function(*arguments)
    array.__setstate__(state)
    return array


STORAGES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
NUMPY_CORE = ("numpy.core", "numpy._core")  # before NumPy 2, and from then on
BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,  # torch's have attributes, which a dict cannot
    **{(builtins, t.__name__): t for builtins in ("builtins", "__builtin__") for t in (dict, list, tuple, set)},
    ("argparse", "Namespace"): Fields,
    ("_codecs", "encode"): latin1,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    **{(f"{core}.multiarray", "_reconstruct"): np.ndarray.__reduce__(np.zeros(1))[0] for core in NUMPY_CORE},
    **{(f"{core}.multiarray", "scalar"): np.float32(0).__reduce__()[0] for core in NUMPY_CORE},
    **{(f"{core}.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0] for core in NUMPY_CORE},
    ("jax._src.array", "_reconstruct_array"): jax_array,
    ("torch._utils", "_rebuild_tensor_v2"): Tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): Storage(dtype) for name, dtype in STORAGES.items()},  # never called: names of types
}


class Unpickler(pickle.Unpickler):
    """Calls nothing but BUILDERS."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in BUILDERS:
            raise Refused(
                f"it holds {module}.{name}, and weights need arrays and plain containers only; save just the weights, "
                "for example with safetensors"
            )
        return BUILDERS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage of torch's: ("storage", type, key, device, numbers, ...)."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Storage):
            raise Refused("it refers to something other than the storage of a tensor")
        if len(pid) > 5 and pid[5] is not None:
            raise Refused("it has storages that are parts of others, as very old PyTorch wrote them")
        return self.storages.setdefault(str(pid[2]), Storage(pid[1].dtype))


# ---- Forms of files -------------------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> Any:
    """What the file holds, whatever its name.

    Raises:
      Refused: in one line, why not.
    """
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"PK"):
            return read_torch_zip(path)
        if start.startswith(b"\x93NUMPY"):
            return read_npy(file)
        first = Unpickler(file).load()
        return read_old_torch(file) if first == OLD_TORCH else first


def read_torch_zip(path: pathlib.Path) -> Any:
    """PyTorch's form since 1.6: NAME/data.pkl, and the storages as NAME/data/KEY."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
        if root is None or f"{root}constants.pkl" in names:
            raise Refused("it is a zip file, but not of weights that torch.save wrote")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        unpickler = Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        tree = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.data = archive.read(f"{root}data/{key}")
        return tree


OLD_TORCH = 0x1950A86A20F9469CFC6C  # the first of the pickles that such a file is made of


def read_old_torch(file: Any) -> Any:
    """PyTorch's form before 1.6: pickles of a version, the machine, the tree and the keys; then the storages."""
    Unpickler(file).load()
    machine = Unpickler(file).load()
    if not machine.get("little_endian", True):
        raise Refused("its numbers are big-endian")
    unpickler = Unpickler(file)
    tree = unpickler.load()
    for key in Unpickler(file).load():
        numbers = int.from_bytes(file.read(8), "little")
        storage = unpickler.storages[str(key)]
        size = 2 if storage.dtype == "bfloat16" else np.dtype(storage.dtype).itemsize
        storage.data = file.read(numbers * size)
        if len(storage.data) != numbers * size:
            raise Refused("it ends too early: the file is damaged")
    return tree


def read_npy(file: Any) -> Any:
    """An array; of one of objects, the object or a list of them."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = header(file)
    if not dtype.hasobject:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    found = Unpickler(file).load()
    return found.item() if isinstance(found, np.ndarray) and found.shape == () else found


# ---- The answer -----------------------------------------------------------------------------------------------------


def encode(tree: Any, arrays: list[np.ndarray]) -> Any:
    """A tree as JSON: {"dict": [[key, tree], ...]}, {"list": [tree, ...]}, {"array": its number} or {"value": value}.

    Numbers of arrays count those put into `arrays`; values that JSON has not are their text.
    """
    if isinstance(tree, Fields):
        tree = vars(tree)
    if isinstance(tree, dict):
        return {"dict": [[key if isinstance(key, str) else repr(key), encode(x, arrays)] for key, x in tree.items()]}
    if isinstance(tree, (list, tuple, set)):
        return {"list": [encode(x, arrays) for x in tree]}
    if isinstance(tree, Tensor):
        tree = tree.array()
    if isinstance(tree, (np.ndarray, np.generic)):
        if tree.dtype.hasobject:
            return {"list": [encode(x, arrays) for x in np.asarray(tree).ravel().tolist()]}
        arrays.append(np.asarray(tree))
        return {"array": len(arrays) - 1}
    return {"value": tree if tree is None or isinstance(tree, (str, int, float, bool)) else repr(tree)[:100]}


def main(path: str, out: str, memory_mb: str, cpu_s: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory, time = int(memory_mb) << 20, int(cpu_s)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (time, time))
    arrays: list[np.ndarray] = []
    try:
        tree = encode(read(pathlib.Path(path)), arrays)
        np.savez(pathlib.Path(out, "arrays.npz"), *arrays)
        pathlib.Path(out, "tree.json").write_text(json.dumps(tree))
    except Refused as error:
        sys.exit(str(error))
    except MemoryError:
        sys.exit(f"it needs more than {memory_mb} MiB of memory")
    except RecursionError:
        sys.exit("it is nested too deeply")
    except Exception as error:  # a damaged pickle can end in anything
        sys.exit(
            f"it is damaged, or no pickle of weights: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
