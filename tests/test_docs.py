"""README and docs/: every command parses, every link leads somewhere, every quoted message is in the code."""

import ast
import contextlib
import functools
import importlib.util
import io
import re
import unicodedata

import pytest
import yaml

from benchmarks import config_reference
from evaluation import probe
from helpers.commands import ROOT, run_module
from helpers.documented import PACKAGES, PAGES, commands, configured, file_of, options_of, options_of_script

BEAMS_OWN = {"direct_num_workers", "direct_running_mode", "runner"}
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def wrong_with(words: list[str]) -> str:
    """What is wrong with a command, or nothing."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]
    if words[0] == "bash":
        return _wrong_with_script(words[1], words[2:])
    if "--" in words:  # launch.sweep: the command that it is for
        return wrong_with(words[: words.index("--")]) or wrong_with(words[words.index("--") + 1 :])
    return _wrong_with_module(words[2], words[3:])


def _wrong_with_script(script: str, words: list[str]) -> str:
    path = ROOT / script
    if not path.is_file():
        return f"no {script}"
    if path.name in ("test.sh", "run"):  # pytest's options
        return ""
    if path.name == "demo.sh":
        return _wrong_with_options(words, options_of(path.with_suffix(".py")))
    own, rest = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    module = "vivi_jax.main"
    if path.name == "beam.sh":
        module = {"prepare": "input_pipeline.prepare_beam", "curate": "input_pipeline.curate"}[own[1]]
    return _wrong_with_options(own, options_of_script(path)) or _wrong_with_module(module, rest)


def _wrong_with_module(module: str, words: list[str]) -> str:
    if re.search("[A-Z]", module):  # benchmarks.NAME
        return ""
    if not module.startswith(PACKAGES):
        return "" if importlib.util.find_spec(module) else f"no module {module}"
    file = file_of(module)
    if file is None:
        return f"no module {module}"
    known = options_of(file)
    if module in ("input_pipeline.prepare_beam", "input_pipeline.curate"):
        known |= BEAMS_OWN
    return _wrong_with_options(words, known) or _wrong_with_config(words)


def _wrong_with_options(words: list[str], known) -> str:
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    return next((f"no option --{n}" for n in names if n not in known and not n.startswith("config.")), "")


def _wrong_with_config(words: list[str]) -> str:
    flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    overrides = {name.removeprefix("config."): value for name, value in flags.items() if name.startswith("config.")}
    file = flags.get("config", "")
    if not re.match(r"(configs/)?[a-z]", file):
        return ""  # none, or a placeholder
    try:
        configured(file if "/" in file else f"configs/{file}", overrides)
    except (KeyError, AttributeError, ValueError, TypeError, ModuleNotFoundError) as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page):
    text = page.read_text()
    wrong = {" ".join(words): problem for words in commands(text) if (problem := wrong_with(words))}
    for file in set(re.findall(r"\bconfigs/\w+\.py:[\w=,.-]*\w", text)):
        if problem := _wrong_with_config([f"--config={file}"]):
            wrong[file] = problem
    assert not wrong


@pytest.mark.parametrize(
    "command, problem",
    [
        ("python -m evaluation.prob --checkpoint=RUN", "no module"),
        ("python -m evaluation.probe --chekpoint=RUN", "no option --chekpoint"),
        ("python -m evaluation.segmentation --config=configs/segmentation.py:voc --sweeep", "no option --sweeep"),
        ("python -m input_pipeline.prepare --video=VIDEOS", "no option --video"),
        ("python -m vivi_jax.main --config=configs/vitto.py", "vitto"),
        ("python -m vivi_jax.main --config=configs/vito.py --config.data.pth=STORE", "pth"),
        ("bash launch/slurm.sh --node=4 -- --config=configs/vito.py", "no option --node"),
        ("bash launch/slurm.sh --nodes=4 -- --config=configs/vito.py:dem", "dem"),
        ("bash launch/slrm.sh", "no launch/slrm.sh"),
    ],
)
def test_a_wrong_command_is_noticed(command, problem):
    assert problem in wrong_with(command.split())


def test_the_options_that_are_read_from_the_code_are_those_of_the_command():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        probe.main(["--help"])
    assert set(re.findall(r"--(\w+)", shown.getvalue())) - {"help"} == options_of(file_of("evaluation.probe"))


# ---- Links ----------------------------------------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """The anchor of a heading, as MkDocs makes it.

    >>> anchor("VITO (arXiv:2210.06433)")
    'vito-arxiv221006433'
    """
    plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@functools.cache
def anchors(path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, fragment = target.partition("#")
        there = page.parent / file if file else page
        assert there.is_file(), target
        assert not fragment or fragment in anchors(there), target


def test_the_navigation_has_every_page_once():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)]

    assert sorted(pages(SITE["nav"])) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_site_builds_and_asks_nothing_of_other_sites(tmp_path):
    pytest.importorskip("mkdocs")
    done = run_module("mkdocs", "build", "--strict", "--site-dir", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").glob("*.html"):
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]* (?:src|href)="https?:', page.read_text()), page


# ---- What is made from the code -------------------------------------------------------------------------------------


def test_the_reference_of_keys_is_up_to_date():
    assert (ROOT / config_reference.PAGE).read_text() == config_reference.page(), (
        "python -m benchmarks.config_reference"
    )


@pytest.mark.parametrize("module", config_reference.ARGUMENTS)
def test_every_key_of_every_variant_has_a_row_that_says_something(module):
    rows = {key.strip("`"): source for key, _, source, _ in config_reference.rows(module)}
    get_config = importlib.import_module(f"configs.{module}").get_config
    for argument in config_reference.ARGUMENTS[module]:
        assert set(config_reference.flat(get_config(argument).to_dict())) - {"name"} <= set(rows), argument
    assert not [key for key, source in rows.items() if not source], "a comment in the config file, or MEANING"


def test_the_reference_has_every_config_file():
    files = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"__init__", "common"}
    assert files == set(config_reference.ARGUMENTS)


@pytest.mark.parametrize(
    "module, key, source",
    [
        ("vito", "schedule.base_lr", "VITO A.2, per 256 examples: 4.8 at batch 4096"),
        ("vito", "ema.base", "Of the target network. BYOL's preset for 300 epochs, whose other values VITO A.2 gives."),
        ("vivi", "data.shots", "K, VIVI §4"),  # of a function that returns a section
        ("vivi", "run.eval_every", "steps between online evaluations; 0: only at the end"),  # of common.py
        ("action", "data.views", "K, VDIM §4.1"),  # not what a variant says of its own
        ("detection", "method.options.nearest", "ATSS §3.3"),  # a section in a section
        ("vtab", "repeats", "VIVI §4: the median of three"),
    ],
)
def test_sources_are_the_comments_beside_the_defaults(module, key, source):
    assert config_reference.sources(module)[key] == source


# ---- Messages -------------------------------------------------------------------------------------------------------


@functools.cache
def texts_of_the_code() -> str:
    """All string constants of the product, a line each; what is filled in is a tab."""
    lines = []
    for folder in ("vivi_jax", "input_pipeline", "evaluation", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "\t" for p in node.values]
                    lines.append("".join(map(str, parts)).replace("\n", " "))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    lines.append(node.value.replace("\n", " "))
    return "\n".join(lines)


def in_the_code(message: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    return re.search(pattern, texts_of_the_code()) is not None


def test_every_message_of_the_page_is_in_the_code():
    page = (ROOT / "docs" / "messages.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 30
    assert not [message for message in messages if not in_the_code(message)]


def test_a_message_that_no_longer_exists_is_noticed():
    assert not in_the_code("config.data.path is vacant: give")
