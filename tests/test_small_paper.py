"""benchmarks/small_paper: the paired test against SciPy and closed forms, verdicts, what is gathered, the command."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import tables
from benchmarks.small_paper import __main__ as command
from benchmarks.small_paper import trainings
from benchmarks.small_paper.directions import DIRECTIONS, Direction
from benchmarks.small_paper.measures import MEASURES, measures_of
from benchmarks.small_paper.paired import compare, paired_t
from benchmarks.small_paper.settings import SETTINGS, SIZES, config_of, identity

ONE = Direction("a above b", "Table 0", "", "knn_top1", {"a": 1.0, "b": -1.0})
SEEDS = [0, 1, 2, 3, 4]


def compared(differences: list[float | None], direction: Direction = ONE):
    """b is 0.2 and a is above it by so much; None: a diverged."""
    a = {seed: None if d is None else 0.2 + d for seed, d in enumerate(differences)}
    return compare(direction, {"a": a, "b": dict.fromkeys(SEEDS, 0.2)}, SEEDS)


def test_the_paired_t_test_is_scipys():
    rng = np.random.default_rng(0)
    for n in (2, 5, 11):
        a, b = rng.normal(size=n), rng.normal(size=n)
        mean, error, low, high, p = paired_t(list(a - b))
        expected = stats.ttest_rel(a, b)
        interval = expected.confidence_interval(0.95)
        np.testing.assert_allclose([mean, p, low, high], [np.mean(a - b), expected.pvalue, *interval], rtol=1e-9)
        assert error == pytest.approx(stats.sem(a - b))


def test_closed_forms_of_two_and_of_equal_differences():
    """With two pairs t has one degree of freedom, a Cauchy variable: p = 1 - 2 arctan(t) / pi."""
    mean, error, _, _, p = paired_t([1.0, 3.0])
    assert (mean, error) == (2.0, 1.0)
    assert p == pytest.approx(1 - 2 * math.atan(2.0) / math.pi)
    assert paired_t([0.5, 0.5, 0.5]) == (0.5, 0.0, 0.5, 0.5, 0.0)
    assert paired_t([0.0, 0.0]) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert paired_t([0.3])[0] == 0.3 and math.isnan(paired_t([0.3])[4])
    assert all(math.isnan(x) for x in paired_t([]))


def test_a_direction_is_agreed_with_disagreed_with_or_undecided():
    assert compared([0.10, 0.11, 0.09, 0.10, 0.12]).verdict == "agrees"
    assert compared([-0.10, -0.11, -0.09, -0.10, -0.12]).verdict == "disagrees"
    assert compared([0.10, -0.11, 0.09, -0.10, 0.12]).verdict == "undecided"


def test_no_effect_is_agreed_with_only_by_a_narrow_interval():
    none = ONE._replace(sign=0)
    assert compared([0.001, -0.002, 0.0, 0.002, -0.001], none).verdict == "agrees"
    assert compared([0.010, 0.011, 0.010, 0.009, 0.010], none).verdict == "agrees"  # an effect, but below 3 points
    assert compared([0.10, 0.11, 0.09, 0.10, 0.12], none).verdict == "disagrees"
    assert compared([0.10, -0.11, 0.09, -0.10, 0.12], none).verdict == "undecided"


def test_seeds_that_miss_are_not_finished_and_diverged_ones_are_counted():
    missing = compared([0.1, 0.1, 0.1, 0.1])
    assert (missing.verdict, missing.seeds, missing.diverged) == ("not finished", 4, 0)
    assert missing.mean == pytest.approx(0.1)
    diverged = compared([0.10, 0.11, 0.09, 0.10, None])
    assert (diverged.verdict, diverged.seeds, diverged.diverged) == ("agrees", 4, 1)
    assert compared([None] * 5).verdict == "not finished"


def test_a_contrast_of_four_settings_is_a_difference_of_differences():
    four = ONE._replace(contrast={"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0})
    rng = np.random.default_rng(1)
    values = {name: dict(enumerate(rng.normal(size=5).tolist())) for name in "abcd"}
    a, b, c, d = (np.array(list(values[name].values())) for name in "abcd")
    assert compare(four, values, SEEDS).p == pytest.approx(stats.ttest_1samp((a - b) - (c - d), 0)[1])


def test_directions_are_of_settings_that_measure_them():
    assert len(DIRECTIONS) >= 24
    used = {setting for direction in DIRECTIONS.values() for setting in direction.contrast}
    assert used == set(SETTINGS)
    of_training = {"knn_top1", "linear_top1"}
    for name, direction in DIRECTIONS.items():
        assert direction.measure in of_training | set(MEASURES), name
        for setting in direction.contrast:
            assert direction.measure in of_training or direction.measure in measures_of(setting), (name, setting)


@pytest.mark.parametrize("size", SIZES)
def test_settings_differ_from_one_another_and_have_one_identity(size):
    identities = {name: identity(name, size) for name in SETTINGS}
    assert len(set(identities.values())) == len(SETTINGS)
    assert identities == {name: identity(name, size) for name in SETTINGS}
    for name in SETTINGS:
        assert config_of(name, size).data.path == ""


def results_of(kept, *, diverges: str = "moclr") -> None:
    """Made-up results of four seeds for all settings; setting number n has n thousandths in every measure."""
    for n, setting in enumerate(SETTINGS):
        names = {"knn_top1", "linear_top1", *measures_of(setting)}
        for seed in range(4):
            lost = setting == diverges and seed == 3
            metrics = None if lost else dict.fromkeys(names, 0.2 + n / 1000 + seed / 100)
            result = dict(setting=setting, seed=seed, size="small", identity=identity(setting, "small"), commit="c")
            path = trainings.result_path(setting, "small", seed, kept)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result | dict(processor_seconds=90.0, metrics=metrics, diverged="nan" * lost)))


def test_what_is_there_is_gathered_and_what_is_missing_is_said(tmp_path, capsys):
    results_of(tmp_path)
    command.main(["--gather", "--seeds=0,1,2,3", f"--results={tmp_path}"])
    assert f"{4 * len(SETTINGS)} of {4 * len(SETTINGS)} trainings are there" in capsys.readouterr().out
    result = json.loads((tmp_path / "small_paper.json").read_text())
    rows = {row["row"]: row for row in result["values"]["rows"]}
    assert set(rows) == set(DIRECTIONS)
    assert {row["verdict"] for row in rows.values()} == {"not finished"}  # the fifth seed
    assert (rows["vito-moclr"]["seeds"], rows["vito-moclr"]["diverged"]) == (3, 1)
    assert rows["vito-moclr"]["mean"] == pytest.approx(-0.001)
    table = tables.small_paper_table(result)
    assert "VITO above MoCLR" in table and "-0.1" in table and "not finished" in table
    assert (tmp_path / "small_paper.svg").read_text().startswith("<?xml")

    command.main(["--list", f"--results={tmp_path}", "--only=lambda"])  # two settings of five seeds, one missing
    assert "8 of 10 trainings are there; the others will take about 0.05 processor-hours" in capsys.readouterr().out


def test_a_changed_setting_is_trained_again(tmp_path, monkeypatch):
    results_of(tmp_path)
    assert trainings.read("vito", "small", 0, tmp_path) is not None
    monkeypatch.setitem(SETTINGS, "vito", SETTINGS["vito"]._replace(changes={"batch_size": 32}))
    assert trainings.read("vito", "small", 0, tmp_path) is None
    assert trainings.read("moclr", "small", 0, tmp_path) is not None


def test_an_unknown_row_is_named(tmp_path):
    with pytest.raises(SystemExit, match="error: no direction or setting 'vitro'"):
        command.main(["--only=vitro", f"--results={tmp_path}"])


@pytest.mark.slow
def test_the_command_at_its_smallest(tmp_path):
    """One training of one seed, measured and kept; a second call finds it."""
    arguments = ["--size=tiny", "--only=one-scale-average", "--seeds=0"]
    arguments += [f"--out={tmp_path / 'out'}", f"--results={tmp_path / 'kept'}"]
    command.main(arguments)
    kept = json.loads((tmp_path / "kept" / "tiny" / "one-scale-average-0.json").read_text())
    assert set(kept["metrics"]) >= {"knn_top1", "knn_top1_untrained", "linear_top1"}
    assert kept["processor_seconds"] > 0 and kept["diverged"] == ""
    again = trainings.read("one-scale-average", "tiny", 0, tmp_path / "kept")
    assert again == kept
