"""One page about a run: WORKDIR/report.html, which needs no network and no other file to be read.

    python -m evaluation.report --checkpoint=RUN

Accuracy before and after, curves of metrics.jsonl, nearest neighbours, attention, and what was run. A part whose input
is missing is replaced by a sentence that says so.
"""

import argparse
import base64
import html
import importlib.metadata
import io
import os
import pathlib
import platform
from collections.abc import Callable, Iterator

import jax
import numpy as np
import safetensors
from matplotlib.figure import Figure

from evaluation import attention, encoders, probe
from input_pipeline import images
from input_pipeline.folders import files_in
from vivi_jax import checkpoint, command_line, files
from vivi_jax import metrics as metrics_lib
from vivi_jax.buckets.client import ADDRESSES, Folder
from vivi_jax.errors import CheckpointError, ConfigError, DataError
from vivi_jax.export.formats.hub import SUMS, commit
from vivi_jax.export.safetensors_files import SOURCE

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "opencv-python-headless", "av")
# One chart each: title, and the names in metrics.jsonl with their labels.
CHARTS = (
    ("Loss", {"loss": ""}),
    ("Accuracy on held-out images", {"knn_top1": "k-NN", "linear_top1": "linear probe"}),
    ("Learning rate", {"learning_rate": ""}),
    ("Spread of the embeddings (standard deviation)", {"embedding_std": ""}),
    ("Directions in use (effective rank)", {"embedding_effective_rank": ""}),
    ("Examples per second", {"examples_per_second": ""}),
    ("Share of time waiting for data", {"data_wait_share": ""}),
)
EXPORTED = (".safetensors", ".onnx", ".npz")
INK, ACCENT, SECOND, RIGHT, WRONG = "#1d2733", "#0b6e99", "#d9822b", "#2e8b57", "#c8553d"
BANK, QUERIES, NEIGHBOURS, ATTENTION_FRAMES = 1000, 6, 7, 8

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1d2733; background: #f6f7f9; margin: 0; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0; }} h2 {{ font-size: 1.15rem; margin: 0 0 .6rem; }}
.lead, .note {{ color: #5b6875; }} .note {{ font-size: .9rem; }}
section, .tile {{ background: #fff; border: 1px solid #e3e7eb; border-radius: 10px; padding: 1rem 1.2rem; }}
section, .tiles {{ margin-top: 1.1rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(11.5rem, 1fr)); gap: .8rem; }}
.tile b {{ display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.tile span {{ color: #5b6875; font-size: .9rem; }}
img {{ width: 100%; height: auto; display: block; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 1.5rem; }}
.wide {{ overflow-x: auto; }} .wide img {{ min-width: 52rem; }}
@media (max-width: 57rem) {{ .wide::before {{ content: "Scroll sideways to see all of it."; position: sticky; left: 0;
  color: #5b6875; font-size: .9rem; }} }}
table {{ border-collapse: collapse; font-size: .9rem; }} td {{ padding: .15rem 1.2rem .15rem 0; vertical-align: top; }}
td:first-child {{ color: #5b6875; }} td, code {{ overflow-wrap: anywhere; }} summary {{ cursor: pointer; }}
</style></head><body><main>
<h1>{title}</h1><p class="lead">{lead}</p>
{body}
</main></body></html>
"""


def write_report(workdir: str | os.PathLike, *, called: str = "") -> pathlib.Path:
    """Writes WORKDIR/report.html about the run in WORKDIR, finished or not, and returns its path.

    Args:
      called: where the run is, for the page, if not there.

    Raises:
      CheckpointError: WORKDIR is not a run directory, or its config is damaged.
      DataError: its metrics are damaged.
    """
    run = pathlib.Path(workdir)
    config, metrics = checkpoint.load_config(str(run)), metrics_lib.read(run)
    sections = (
        ("Training", lambda: curves_section(metrics)),
        ("Nearest neighbours", lambda: neighbours_section(run, config)),
        ("Attention", lambda: attention_section(run, config)),
        ("What was run", lambda: set_up(run, config)),
    )
    body = tiles(metrics) + "".join(f"<section><h2>{name}</h2>{or_sentence(part)}</section>" for name, part in sections)
    finished = (run / "summary.json").is_file()
    step = metrics[-1]["step"] if metrics else 0
    lead = f"{called or run.resolve()}, step {step}{'' if finished else ' (not finished)'}"
    path = run / "report.html"
    page = PAGE.format(title=html.escape(config["name"]), lead=html.escape(lead), body=body)
    try:
        files.write_text(path, page)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return path


def or_sentence(part: Callable[[], str]) -> str:
    """A part of the page, or the reason why it is not there."""
    try:
        return part()
    except (CheckpointError, ConfigError, DataError, OSError) as e:  # OSError: a live run removes old checkpoints
        return f'<p class="note">Left out: {html.escape(str(e))}.</p>'


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that have `name`."""
    lines = [line for line in metrics if isinstance(line.get(name), int | float)]
    return [line["step"] for line in lines], [line[name] for line in lines]


def tiles(metrics: list[dict]) -> str:
    """The figures to see first."""
    shown = []
    for name, label in CHARTS[1][1].items():
        steps, values = series(metrics, name)
        if len(values) > 1 and steps[0] == 0:
            shown.append((f"{values[0]:.1%} &rarr; {values[-1]:.1%}", f"{label} top-1, untrained &rarr; now"))
        elif values:
            shown.append((f"{values[-1]:.1%}", f"{label} top-1 at step {steps[-1]}"))
    for name, label, form in (
        ("loss", "loss", "{:.3f}"),
        ("embedding_std", "embedding std", "{:.3f}"),
        ("embedding_effective_rank", "effective rank", "{:.1f}"),
        ("examples_per_second", "examples per second", "{:.0f}"),
    ):
        if values := series(metrics, name)[1]:
            shown.append((form.format(values[-1]), label))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in shown)
        + "</div>"
    )


def curves_section(metrics: list[dict]) -> str:
    """The charts in as many columns as the window has room for."""
    return f'<div class="charts">{"".join(image(figure, title) for title, figure in curves(metrics).items())}</div>'


def curves(metrics: list[dict]) -> dict[str, Figure]:
    """Title -> chart, of each of CHARTS that has values; made for a width of 300 to 450 pixels."""
    charts = [
        (title, {label: series(metrics, name) for name, label in names.items() if series(metrics, name)[0]})
        for title, names in CHARTS
    ]
    charts = [(title, lines) for title, lines in charts if lines]
    if not charts:
        raise DataError("metrics.jsonl has no lines yet")
    figures = {}
    for title, lines in charts:
        figure = figures[title] = Figure(figsize=(4.2, 2.3), dpi=180, layout="constrained")
        axis = figure.subplots()
        for (label, (steps, values)), colour in zip(lines.items(), (ACCENT, SECOND), strict=False):
            axis.plot(
                steps,
                values,
                color=colour,
                label=label,
                linewidth=1.6,
                marker="o" if len(steps) < 40 else "",
                markersize=3,
            )
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.tick_params(labelsize=9, colors="#5b6875")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if len(lines) > 1:
            axis.legend(fontsize=9, frameon=False)
    return figures


def neighbours_section(run: pathlib.Path, config: dict) -> str:
    if not config["evaluation"]["dataset"]:
        raise DataError("the run has no labelled images (config.evaluation.dataset)")
    figure, of = neighbours(str(run), config["evaluation"]["dataset"])
    return wide(image(figure, "held-out images and their nearest training images")) + (
        '<p class="note">Left: held-out images. Right of each: the training images whose features '
        f"are nearest by cosine, of {of}; green where the class is the same.</p>"
    )


def neighbours(run: str, dataset: str) -> tuple[Figure, int]:
    """Held-out images of different classes and their nearest training images; also how many these were chosen from."""
    encoder, variables, size = encoders.load_encoder(run)
    sets = probe.load_sets(dataset, k=1)
    _, first_of_class = np.unique(sets["test"].labels, return_index=True)
    chosen = {
        "train": sets["train"].take(attention.spread(len(sets["train"]), BANK)),
        "test": sets["test"].take(first_of_class[attention.spread(len(first_of_class), QUERIES)]),
    }
    pixels, features = {}, {}
    for split, subset in chosen.items():
        batches = list(images.eval_batches(subset, batch_size=min(len(subset), 128), image_size=size))
        features[split], _ = encoders.extract_features(encoder, variables, batches)
        # A collapsed encoder's features differ so little that float32 cannot rank their cosines.
        features[split] = features[split].astype(np.float64)
        features[split] /= np.linalg.norm(features[split], axis=1, keepdims=True)
        pixels[split] = np.concatenate([batch["image"] for batch in batches])
    nearest = np.argsort(-features["test"] @ features["train"].T, axis=1, kind="stable")[:, :NEIGHBOURS]

    names = sets["train"].class_names
    figure = Figure(figsize=(1.2 * (1 + NEIGHBOURS), 1.35 * len(nearest)), dpi=140, layout="constrained")
    axes = figure.subplots(len(nearest), 1 + NEIGHBOURS, squeeze=False)
    for row, query in enumerate(chosen["test"].labels):
        _picture(axes[row, 0], pixels["test"][row], names[query], INK)
        for axis, i in zip(axes[row, 1:], nearest[row], strict=False):
            label = chosen["train"].labels[i]
            _picture(axis, pixels["train"][i], names[label], RIGHT if label == query else WRONG)
    return figure, len(chosen["train"])


def _picture(axis, pixels: np.ndarray, caption: str, colour: str) -> None:
    axis.imshow(pixels)
    axis.set_xlabel(caption, fontsize=9, color=colour, labelpad=4, parse_math=False)  # classes may have a $
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color=colour, linewidth=2.5)


def attention_section(run: pathlib.Path, config: dict) -> str:
    method = attention.method_with_attention(str(run))
    source, size = config["data"]["path"], config["data"]["image_size"]
    if not source:
        raise DataError("the run has no unlabelled images (config.data.path)")
    frames, captions = attention.load_images(source, count=ATTENTION_FRAMES, size=size)
    png = io.BytesIO()
    attention.attention_figure(frames, attention.load_masks(str(run), method, frames), captions, png)
    picture = wide(png_tag(png, "frames, and the attention over each"))
    return picture + '<p class="note">Masks of the online network, each frame by itself (VITO, Figure A.1).</p>'


def set_up(run: pathlib.Path, config: dict) -> str:
    """Files, versions and the whole config."""
    paths = [run / name for name in ("config.json", "metrics.jsonl", "summary.json")]
    paths += [run / "checkpoints" / str(step) for step in checkpoint.steps(run / "checkpoints")[-1:]]
    paths += exports_of(run)
    links = ", ".join(
        f'<a href="{html.escape(os.path.relpath(f, run))}">{html.escape(f.name)}</a>' for f in paths if f.exists()
    )
    versions = {
        "commit": commit(),
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return (
        f"<p>Files: {links}</p><p>When this page was written:</p>{table(versions.items())}"
        f"<details><summary>Config</summary>{table(flat(config))}</details>"
    )


def exports_of(run: pathlib.Path) -> list[pathlib.Path]:
    """Exports in the run's folder, and those beside it that say they are of this run."""
    inside = [path for path in sorted(run.iterdir()) if (path / SUMS).is_file() or path.suffix in EXPORTED]
    beside = [p for p in files_in(run.resolve().parent, {".safetensors"}) if written_from(p) == run.resolve().name]
    return inside + beside


def written_from(path: pathlib.Path) -> str | None:
    """The name of the run that a safetensors file was written from; None: it does not say."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get(SOURCE)
    except (safetensors.SafetensorError, OSError):
        return None


def flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) of a nested dict."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def table(rows) -> str:
    cells = ((html.escape(str(key)), html.escape(str(value))) for key, value in rows)
    return "<table>" + "".join(f"<tr><td>{key}</td><td>{value}</td></tr>" for key, value in cells) + "</table>"


def wide(picture: str) -> str:
    """A picture of many columns: in a narrow window it is moved sideways, as it could not be read if it shrank."""
    return f'<div class="wide">{picture}</div>'


def image(figure: Figure, description: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png_tag(png, description)


def png_tag(png: io.BytesIO, description: str) -> str:
    data = base64.b64encode(png.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def main(argv: list[str] | None = None) -> None:
    parser = command_line.Parser("evaluation.report", __doc__)
    parser.add_argument("--checkpoint", "--workdir", required=True, help="run directory")
    command_line.run_parser(report, parser, argv, remote=["checkpoint"])


def report(options: argparse.Namespace) -> None:
    """Writes the page; of a run in a bucket, about a copy, and into the bucket."""
    run = options.checkpoint.rstrip("/")
    if not run.startswith(ADDRESSES):
        print(f"wrote {write_report(options.checkpoint)}")
        return
    page = write_report(checkpoint.local_copy(run), called=run)
    Folder(run).write(page.name, page.read_bytes())
    print(f"wrote {run}/{page.name}")


if __name__ == "__main__":
    main()
