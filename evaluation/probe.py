"""Measures an image encoder on a labelled set: weighted k-NN or a linear probe on frozen features, or its classifier.

    python -m evaluation.probe --checkpoint=RUN_OR_FILE --data=DIR_OR_TFDS --mode=knn|linear|classifier [--out=JSON]

--checkpoint is a run directory of vivi_jax.main or a .safetensors export; --data is what
input_pipeline.images.load_labelled takes. The result is one JSON object, on stdout and in --out.

Features are the encoder's pooled output (the method's projector is left out), of the central square of each image.
--mode=classifier gives top-1 and top-5 of the classifier that supervised training or co-training learnt (VIVI's
Sup-100%: ImageNet). Its outputs are the classes in the order of the data, which for ImageNet is that of WordNet ids.
--train_share=0.01 keeps that share of each class's training images (low-shot); --cache=DIR keeps features on disk.
"""

import argparse
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from evaluation import encoders
from input_pipeline import images
from vivi_jax import checkpoint, command_line, files
from vivi_jax.config import Count
from vivi_jax.errors import ConfigError, DataError
from vivi_jax.models.base import Encoder


def cached_features(
    encoder: nn.Module,
    variables: dict,
    labelled: images.LabelledImages,
    *,
    image_size: int,
    batch_size: int,
    cache: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """extract_features of the central squares; from a file in the folder `cache`, if given and they are there.

    The file is named by the encoder, its weights, the image size, and the images' names and labels: other pixels under
    the same names go unnoticed.
    """

    def extract() -> tuple[np.ndarray, np.ndarray]:
        return encoders.extract_features(
            encoder, variables, images.eval_batches(labelled, batch_size=batch_size, image_size=image_size)
        )

    if cache is None:
        return extract()
    digest = hashlib.sha256(f"{encoder!r} {checkpoint.state_sha256(variables)} {image_size}".encode())
    for i, label in enumerate(labelled.labels):
        digest.update(f"{labelled.name(i)} {label}\n".encode())
    path = pathlib.Path(cache, f"{digest.hexdigest()}.npz")
    if path.exists():
        with np.load(path) as file:
            return file["features"], file["labels"]
    features, labels = extract()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(path) as unfinished, open(unfinished, "wb") as file:  # of a name, savez would add ".npz" to it
        np.savez(file, features=features, labels=labels)
    return features, labels


def low_shot(labelled: images.LabelledImages, share: float, *, seed: int = 0) -> images.LabelledImages:
    """The same share of every class, at least one image each, chosen by the seed.

    ImageNet's usual 1 % and 10 % are fixed lists (SimCLR's) of about as many images per class; these are others.

    Raises:
      ConfigError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a share of {share} of the training images: must be above 0 and at most 1")
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = []
    for k in np.unique(labelled.labels):
        of_class = rng.permutation(np.flatnonzero(labelled.labels == k))
        chosen.append(of_class[: max(1, round(share * len(of_class)))])
    return labelled.take(np.sort(np.concatenate(chosen)))


def knn_predict(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> np.ndarray:
    """Weighted k-nearest-neighbour classes (Wu et al. 2018, section 3.4): int32[M].

    Each of the k training features of highest cosine similarity s votes for its class with weight exp(s / temperature).
    Wu et al. use k = 200 on ImageNet and temperature 0.07; k = 20 is common for smaller banks.

    Args:
      train_features: float[N, C]; train_labels: int[N] in [0, num_classes); test_features: float[M, C].
      chunk: test features at a time; memory is chunk x N.

    Raises:
      ConfigError: fewer than k training features.
    """
    if not 1 <= k <= len(train_features):
        raise ConfigError(f"k={k} neighbours of {len(train_features)} training images: k must be between 1 and that")

    @jax.jit
    def predict(bank_NxC, labels_N, queries_MxC):
        similarity_MxN = jnp.matmul(queries_MxC, bank_NxC.T, precision=jax.lax.Precision.HIGHEST)
        nearest_Mxk, index_Mxk = jax.lax.top_k(similarity_MxN, k)
        votes_MxkxK = jax.nn.one_hot(labels_N[index_Mxk], num_classes) * jnp.exp(nearest_Mxk / temperature)[..., None]
        return votes_MxkxK.sum(axis=1).argmax(axis=-1)

    bank, queries = _unit(train_features), _unit(test_features)
    labels = np.asarray(train_labels, np.int32)
    return np.concatenate(
        [
            np.asarray(predict(bank, labels, queries[start : start + chunk]), np.int32)
            for start in range(0, len(queries), chunk)
        ]
    )


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; rows of zeros stay zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def linear_probe(train_features: np.ndarray, train_labels: np.ndarray, *, l2: float = 1e-3) -> Pipeline:
    """Fits multinomial logistic regression with L-BFGS on all training features at once, each standardised.

    Minimises mean cross-entropy + l2/2 |W|^2, biases free. `l2` is one fixed value, not tuned on anything.

    Returns:
      A fitted scikit-learn pipeline: .predict(features) -> labels, .predict_proba(features).
    """
    classifier = LogisticRegression(C=1 / (l2 * len(train_features)), max_iter=1000)
    return make_pipeline(StandardScaler(), classifier).fit(train_features, train_labels)


def load_sets(dataset: str, *, k: int, train_share: float = 1.0) -> dict[str, images.LabelledImages]:
    """{"train", "test"} of a labelled data set, with `train_share` of the training images of each class.

    Raises:
      DataError: no labelled images, fewer than two classes, or fewer than k training images.
    """
    sets = {split: images.load_labelled(dataset, split) for split in ("train", "test")}
    sets["train"] = low_shot(sets["train"], train_share)
    classes, train_size = np.unique(sets["train"].labels), len(sets["train"])
    if len(classes) < 2:
        raise DataError(
            f"all {train_size} training images of {dataset} are {sets['train'].class_names[classes[0]]!r}: "
            "an evaluation needs two classes or more"
        )
    if not 1 <= k <= train_size:
        raise DataError(
            f"{k} neighbours cannot be found among the {train_size} training images of {dataset}; "
            f"give a k between 1 and {train_size}"
        )
    return sets


def evaluate(
    encoder: nn.Module,
    variables: dict,
    sets: dict[str, images.LabelledImages],
    *,
    modes: Iterable[str],
    image_size: int,
    batch_size: int,
    k: int = 20,
    temperature: float = 0.07,
    l2: float = 1e-3,
    cache: str | None = None,
) -> dict[str, float]:
    """{"MODE_top1": share of the test images whose class is predicted, in [0, 1]} for each of `modes` (MODES)."""
    train, (test_features, test_labels) = (
        cached_features(encoder, variables, sets[split], image_size=image_size, batch_size=batch_size, cache=cache)
        for split in ("train", "test")
    )
    predict = {
        "knn": lambda: knn_predict(
            *train, test_features, num_classes=len(sets["train"].class_names), k=k, temperature=temperature
        ),
        "linear": lambda: linear_probe(*train, l2=l2).predict(test_features),
    }
    return {f"{mode}_top1": float((predict[mode]() == test_labels).mean()) for mode in modes}


def classifier_scores(
    encoder: Encoder, variables: dict, test: images.LabelledImages, *, image_size: int, batch_size: int
) -> dict[str, float]:
    """{"classifier_top1", "classifier_top5"}: share of the images whose class is the best, or among the best five.

    Raises:
      ConfigError: an encoder without a classifier, or with one of other classes.
    """
    if encoder.num_classes != len(test.class_names):
        has = "no classifier" if encoder.num_classes is None else f"a classifier of {encoder.num_classes} classes"
        raise ConfigError(
            f"the encoder has {has}, the images have {len(test.class_names)} classes: --mode=classifier takes the "
            "data set that a supervised or co-trained encoder learnt from"
        )
    batches = images.eval_batches(test, batch_size=batch_size, image_size=image_size)
    logits, labels = encoders.extract_logits(encoder, variables, batches)
    of_label = logits[np.arange(len(labels)), labels]
    better = (logits > of_label[:, None]).sum(axis=1)  # a tie is not held against the label
    return {f"classifier_top{k}": float((better < k).mean()) for k in (1, 5)}


def make_evaluator(
    encoder: nn.Module, *, dataset: str, image_size: Count, batch_size: Count, linear: bool, k: Count = 20
) -> Callable[[dict], dict[str, float]]:
    """Returns evaluate(variables {"params", "batch_stats"}) -> {"knn_top1", and "linear_top1" if linear}.

    The data set is opened here, so that errors in it appear before the training.
    """
    sets = load_sets(dataset, k=k)
    modes = ("knn", "linear") if linear else ("knn",)
    return lambda variables: evaluate(
        encoder, variables, sets, modes=modes, image_size=image_size, batch_size=batch_size, k=k
    )


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.probe", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run directory, or file of weights")
    parser.add_argument("--data", "--dataset", required=True, help="labelled images: folder, frame store, or TFDS name")
    parser.add_argument("--mode", choices=("knn", "linear", "classifier"), default="knn")
    parser.add_argument(
        "--image_size",
        type=int,
        help=f"pixels; by default what the run was trained at, or {encoders.EXPORT_IMAGE_SIZE} for a file",
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--k", type=int, default=20, help="neighbours of --mode=knn")
    parser.add_argument("--train_share", type=float, default=1.0, help="share of each class's training images to use")
    parser.add_argument("--cache", help="folder that keeps features; the next call with the same encoder reads them")
    parser.add_argument("--out", help="JSON file to write the result to")
    command_line.run_parser(run, parser, argv, remote=["checkpoint", "data"])


def run(options: argparse.Namespace) -> None:
    """Writes and prints the score."""
    encoder, variables, trained_at = encoders.load_encoder(options.checkpoint)
    image_size = options.image_size or trained_at
    sizes: dict = dict(image_size=image_size, batch_size=options.batch_size)
    if options.mode == "classifier":
        sets = {"test": images.load_labelled(options.data, "test")}
        scores = classifier_scores(encoder, variables, sets["test"], **sizes)
    else:
        k = options.k if options.mode == "knn" else 1
        sets = load_sets(options.data, k=k, train_share=options.train_share)
        scores = evaluate(encoder, variables, sets, modes=(options.mode,), k=options.k, cache=options.cache, **sizes)
    result = scores | {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "image_size": image_size,
        **{f"{split}_images": len(labelled) for split, labelled in sets.items()},
        "classes": len(sets["test"].class_names),
    }
    print(json.dumps(result))
    if options.out:
        files.write_json(options.out, result)


if __name__ == "__main__":
    main()
