"""Writes docs/config_reference.md: every key of every config, its default, its source, and the variants' values.

    python -m benchmarks.config_reference            # rewrite the page
    python -m benchmarks.config_reference --check    # exit 1 if it would change

Values are those of get_config; what is said of them are the comments beside them in configs/*.py.
"""

import argparse
import ast
import importlib
import io
import pathlib
import sys
import tokenize
from collections.abc import Iterator

from benchmarks.results import ROOT

PAGE = pathlib.Path("docs") / "config_reference.md"

# Config file -> its default argument, and the others whose values are shown where they differ.
ARGUMENTS = {
    "vito": (
        "",
        "own",
        "demo",
        "moclr",
        "images",
        "encoder=swin_t",
        "encoder=swin_s",
        "scales=1",
        "pooling=average",
        "sampler=fixed_delay",
        "sampler=uniform_chunks",
        "crop=0.08",
        "clip=1.28",
        "clip=3.2",
        "views=2",
    ),
    "vivi": (
        "ex4",
        "ex2",
        "order",
        "ex-s",
        "ex-f",
        "ex-images",
        "rot4",
        "rot2",
        "rot-f",
        "rot-images",
        "ex4,co=10",
        "ex4,co=100",
        "sup,co=100",
        "ex4,big",
        "ex4,aa",
        "ex4,own",
        "ex4,demo",
    ),
    "vdim": (
        "",
        "own",
        "data=kinetics600",
        "layers=68",
        "layers=8",
        "color=lab",
        "rotate",
        "offset=32",
        "difference=no",
        "down=1",
        "down=3",
        "demo",
    ),
    "moco_v3": ("", "video", "demo"),
    "vtab": ("", "demo"),
    "segmentation": ("voc", "ade20k", "voc,demo"),
    "detection": ("coco", "lvis", "retinanet", "coco,demo"),
    "action": ("ucf101_vdim", "ucf101_vdim_split1", "hmdb51_vdim", "ucf101_vito", "demo"),
}

# Of keys that several files have, and none explains.
MEANING = {
    "seed": "of the network's start, the order of the data and all random choices",
    "micro_batches": "> 1: the same batch in the memory of one micro-batch",
    "metric": "whose rules score the boxes",
    "data.labelled_batch_size": "labelled images beside the unlabelled data in a step; 0: none",
    "data.long_side": "the longer side may have so many pixels",
    "data.source": "what a batch is made of: video, images, shots or windows",
    "data.test_annotations": "path below --data",
    "data.test_images": "path below --data",
    "data.train_annotations": "path below --data",
    "data.train_images": "path below --data",
    "encoder.depth": "layers of a ResNet, blocks of a ViT",
    "encoder.heads": "attention heads of a block",
    "encoder.input_std": "images are divided by it, after input_mean is subtracted",
    "encoder.name": "resnet, swin, vit or vdim",
    "encoder.remat": "recompute each block's activations in the backward pass: less memory, more time",
    "encoder.stem": "imagenet: 7x7 convolution of stride 2 and pooling",
    "encoder.weight_standardization": "each kernel to mean 0 and variance 1",
    "encoder.width": "of all layers, 1.0 being the published one; Swin, ViT: channels of the first stage",
    "evaluation.batch_size": "images whose features are extracted at once",
    "evaluation.image_size": "side in pixels at which the online evaluation sees images",
    "method.form": "fcos or retinanet",
    "method.lambda_video": "weight of the video loss; swept by the paper, which gives no value",
    "method.name": "vito, vivi, vdim or moco_v3",
    "method.options.aspects": "of anchors: detectron2's",
    "method.options.huber": "where smooth L1 becomes linear: detectron2's",
    "method.options.negative": "overlap below which an anchor is background: detectron2's",
    "method.options.octaves": "sizes of anchors in an octave: detectron2's",
    "method.options.positive": "overlap above which an anchor is an object: detectron2's",
    "optimizer.b1": "Adam's decay of the mean gradient",
    "optimizer.b2": "Adam's decay of the squared gradient",
    "optimizer.momentum": "of SGD",
    "own.largest_batch": "the batch is as many videos as there are, up to this",
    "own.paper": "what the paper's run is, for the log",
    "run.keep_checkpoints": "the newest that stay",
    "schedule.boundaries": "where the rate is multiplied by factor, in the unit of the run's length",
    "schedule.epochs": "length of the run",
    "schedule.examples_per_epoch": "how many make an epoch; None: one pass over the data",
    "schedule.factor": "what the rate is multiplied by at each boundary",
    "schedule.lr": "learning rate after the warm-up",
    "schedule.name": "cosine, piecewise or poly",
    "schedule.total_steps": "length of the run",
    "schedule.warmup_epochs": "in which the rate rises from 0",
    "schedule.warmup_steps": "in which the rate rises from 0",
    "test.batch_size": "examples that are scored at once",
    "test.clips": "evenly spaced windows of a video; None: by stride",
    "test.long_side": "the longer side may have so many pixels",
}

HEAD = """# Every key of the configs

Made by `python -m benchmarks.config_reference` from `configs/*.py`; do not edit. A key is set on the command line as
`--config.KEY=VALUE`; a key that does not exist is an error with the nearest name. "Meaning or source" is the comment
beside the default in the file: the section of the paper or the code it is from, or that the paper is silent. The last
column has the variants, what stands behind the file's name and a colon, that have another value.
"""


def flat(section: dict, prefix: str = "") -> dict[str, object]:
    """Nested dict -> {"dotted.key": value}, in the order of the file."""
    values: dict[str, object] = {}
    for key, value in section.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


class Comments:
    """The comments of a file of Python source, by line."""

    def __init__(self, text: str):
        self._beside: dict[int, str] = {}
        self._alone: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                where = self._beside if token.line[: token.start[1]].strip() else self._alone
                where[token.start[0]] = token.string.lstrip("# ")

    def of(self, node: ast.stmt | ast.keyword) -> str:
        """What stands behind the last line of a node; else the lines directly above it that are comments alone."""
        if (beside := self._beside.get(node.end_lineno or node.lineno)) is not None:
            return beside
        lines, line = [], node.lineno - 1
        while line in self._alone:
            lines.append(self._alone[line])
            line -= 1
        return " ".join(reversed(lines))

    def opening(self, call: ast.Call) -> str:
        """What stands behind the line in which a dict(...) begins, if its keys come below."""
        return self._beside.get(call.lineno, "") if (call.end_lineno or 0) > call.lineno else ""


def sources(module: str, root: pathlib.Path = ROOT) -> dict[str, str]:
    """{"dotted.key": comment} of a config file, and {"section.": comment} of whole sections. The first place counts."""
    trees = {name: ast.parse((root / "configs" / f"{name}.py").read_text()) for name in (module, "common")}
    comments = {name: Comments((root / "configs" / f"{name}.py").read_text()) for name in trees}
    functions = {
        name: {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name, tree in trees.items()
    }
    found: dict[str, str] = {}

    def dictionary(call: ast.Call, prefix: str, file: str) -> None:
        if prefix and (whole := comments[file].opening(call)):
            found.setdefault(prefix, whole)
        for keyword in call.keywords:
            if keyword.arg is None:
                continue
            inner = list(_dicts(keyword.value))
            for nested in inner:
                dictionary(nested, f"{prefix}{keyword.arg}.", file)
            comment = comments[file].of(keyword)
            found.setdefault(f"{prefix}{keyword.arg}" + ("." if inner else ""), comment)

    def expression(value: ast.expr, prefix: str, file: str) -> bool:
        """Whether the value is a section, all of whose keys are now found."""
        called = _function(value)
        if called and called[1] in functions[called[0] or file]:
            for conditional in (False, True):
                function(functions[called[0] or file][called[1]], prefix, called[0] or file, conditional)
            return True
        inner = list(_dicts(value))
        for call in inner:
            dictionary(call, prefix, file)
        return bool(inner)

    def function(node: ast.FunctionDef, prefix: str | None, file: str, conditional: bool) -> None:
        """Of a function that returns a section, its prefix is given; one that fills `config` has none."""
        nested = {inner for branch in ast.walk(node) if isinstance(branch, ast.If) for inner in ast.walk(branch)}
        for statement in ast.walk(node):
            if (statement in nested) != conditional:
                continue
            if isinstance(statement, ast.Assign | ast.AugAssign):
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                path = _path(target)
                if path is None:
                    if prefix is not None:
                        expression(statement.value, prefix, file)
                    continue
                if not expression(statement.value, f"{path}." if path else "", file) and path:
                    found.setdefault(path, comments[file].of(statement))
                elif path and (whole := comments[file].of(statement)):
                    found.setdefault(f"{path}.", whole)
            elif isinstance(statement, ast.Return) and statement.value is not None and prefix is not None:
                expression(statement.value, prefix, file)
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                method = statement.value.func
                if isinstance(method, ast.Attribute) and method.attr == "update":
                    path = _path(method.value)
                    if path is not None:
                        for argument in statement.value.args:
                            expression(argument, f"{path}." if path else "", file)

    for conditional in (False, True):  # what always holds, then what variants change
        for node in functions[module].values():
            takes_config = any(argument.arg == "config" for argument in node.args.args)
            if _fills(node) or (takes_config and node.name != "demo"):
                function(node, None, module, conditional)
    return found


def _fills(node: ast.FunctionDef) -> bool:
    """Whether a function makes the whole config, as a variable of that name."""
    return any(isinstance(statement, ast.Assign) and _path(statement.targets[0]) == "" for statement in ast.walk(node))


def _path(node: ast.expr) -> str | None:
    """`config.data.path` -> "data.path"; `config` -> ""; None for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "config" else None


def _function(node: ast.expr) -> tuple[str, str] | None:
    """The (module or "", name) of the function whose result an expression is, with or without ConfigDict around it."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute) and node.func.attr == "ConfigDict":
        return _function(node.args[0]) if node.args else None
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return (node.func.value.id, node.func.attr) if node.func.value.id == "common" else None
    return ("", node.func.id) if isinstance(node.func, ast.Name) else None


def _dicts(node: ast.expr) -> Iterator[ast.Call]:
    """The calls of dict(...) that an expression's value is made of."""
    if isinstance(node, ast.BinOp):
        yield from _dicts(node.left)
        yield from _dicts(node.right)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id == "dict":
            yield node
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "ConfigDict":
            for argument in node.args:
                yield from _dicts(argument)


def rows(module: str) -> list[tuple[str, str, str, str]]:
    """(key, default, source, values of variants) of every key that some variant has, `name` left out."""
    get_config = importlib.import_module(f"configs.{module}").get_config
    configs = {argument: flat(get_config(argument).to_dict()) for argument in ARGUMENTS[module]}
    default, *others = ARGUMENTS[module]
    comments = sources(module)
    keys = dict.fromkeys(key for config in configs.values() for key in config if key != "name")
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in keys))
    table = []
    for key in sorted(keys, key=lambda key: sections.index(key.rpartition(".")[0])):
        there = configs[default].get(key, configs)  # configs: no value of any key, as None may be one
        differing: dict[str, list[str]] = {}
        for argument in others:
            value = configs[argument].get(key, configs)
            if value is not configs and (there is configs or value != there):
                differing.setdefault(f"`{value!r}`", []).append(f"`{argument}`")
        table.append(
            (
                f"`{key}`",
                "" if there is configs else f"`{there!r}`",
                comments.get(key) or MEANING.get(key) or comments.get(key.rpartition(".")[0] + ".", ""),
                "; ".join(f"{value}: {', '.join(arguments)}" for value, arguments in differing.items()),
            )
        )
    return table


def page() -> str:
    parts = [HEAD]
    for module in ARGUMENTS:
        lines = [("Key", "Default", "Meaning or source", "Other variants"), ("---",) * 4, *rows(module)]
        cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
        default = ARGUMENTS[module][0]
        parts.append(
            f"## configs/{module}.py\n\n"
            + (f"The default is `configs/{module}.py:{default}`.\n\n" if default else "")
            + "".join(f"| {line} |\n" for line in cells)
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None, root: pathlib.Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is out of date")
    check, file, text = parser.parse_args(argv).check, root / PAGE, page()
    if file.is_file() and file.read_text() == text:
        print("nothing to change")
    elif check:
        sys.exit(f"error: {PAGE} is out of date; run python -m benchmarks.config_reference")
    else:
        file.write_text(text)
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
