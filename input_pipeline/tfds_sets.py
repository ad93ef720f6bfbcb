"""Data sets of TensorFlow Datasets (TFDS): prepared with a line of Python, read in whatever format they were prepared.

TFDS takes seconds to import, so it is imported where it is needed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vivi_jax.errors import DataError

# Sets whose parts TFDS draws at random while it prepares them, and the fields that together name one of their images.
_DRAWN = {"caltech101": ("label", "image/file_name")}


def builder(name: str, data_dir: str | None = None) -> Any:
    """TFDS's builder of a data set. Raises what TFDS raises."""
    # First: caltech101's builder seeds NumPy and then, where TensorFlow is not there yet, imports it, which moves
    # NumPy's state where JAX is installed too. Train and test are then drawn differently, and share images.
    import tensorflow  # noqa: F401
    import tensorflow_datasets as tfds

    return tfds.builder(name, data_dir=data_dir)


def command(name: str, data_dir: str | None = None) -> str:
    """The line of a shell that prepares a data set. TFDS's own command needs packages that it does not bring."""
    folder = f", data_dir={data_dir!r}" if data_dir else ""
    code = f"import tensorflow, tensorflow_datasets as tfds; tfds.builder({name!r}{folder}).download_and_prepare()"
    return 'python -c "' + "".join(f"\\{c}" if c in '\\"$`' else c for c in code) + '"'


def examples(
    made: Any, split: str, fields: Mapping[str, Any] | None = None, *, encoded: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """The examples of a split, in the order on disk.

    Args:
      made: a builder whose data set is prepared.
      split: as TFDS writes splits, such as "train[:800]+test".
      fields: those to decode, {"label": True, "objects": {"size": True}}; None: all.
      encoded: images that are given as the bytes of their files.
    """
    import tensorflow_datasets as tfds

    skipped: dict[str, Any] = {name: tfds.decode.SkipDecoding() for name in encoded}
    if made.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        decoders = tfds.decode.PartialDecoding(dict(fields), decoders=skipped) if fields else skipped
        return made.as_dataset(split=split, shuffle_files=False, decoders=decoders or None).as_numpy_iterator()
    source = made.as_data_source(split=split, decoders=skipped)  # knows no PartialDecoding
    forms = made.info.features.get_tensor_info()
    return (
        {name: _arrays(example[name], forms[name]) for name in fields or example}
        for example in (source[i] for i in range(len(source)))
    )


def _arrays(value: Any, form: Any) -> Any:
    """What as_data_source gives as lists, as the arrays that as_dataset gives."""
    if isinstance(value, dict):
        return {name: _arrays(inner, form[name]) for name, inner in value.items()}
    if isinstance(value, list):
        return np.asarray(value, form.np_dtype).reshape(len(value), *form.shape[1:])
    return value


def check_disjoint(made: Any) -> None:
    """Raises DataError if the parts of a prepared set that TFDS draws at random share images."""
    if made.name not in _DRAWN:
        return
    fields, part_of, shared = _DRAWN[made.name], {}, []
    for part in made.info.splits:
        for example in examples(made, part, dict.fromkeys(fields, True)):
            key = tuple(example[field] for field in fields)
            if part_of.setdefault(key, part) != part:
                shared.append((key, part_of[key], part))
    if shared:
        (*_, name), one, other = shared[0]
        raise DataError(
            f"{made.data_dir}: {len(shared)} images are in two parts, such as {name.decode(errors='replace')} in {one} "
            f"and in {other}: TFDS drew the parts differently; delete this folder and run: "
            f"{command(made.name, str(made.data_dir_root))}"
        )
