"""The search for a variant's weights: it finds them, with one budget for all, as if it had never been stopped."""

import math

import pytest

from scripts.comparison import tuning
from scripts.comparison.tuning import Trial

OWN = {"class_loss.weight": 4.0, "box_loss.weight": 2.0}


def search(score, count=12, trials=()):
    """Trials, continued up to `count`."""
    trials = list(trials) or [Trial(OWN, score(OWN))]
    while len(trials) < count:
        values = tuning.propose(trials)
        trials.append(Trial(values, score(values)))
    return trials


def hill(**best):
    """A score of at most 1, which falls by 0.5 a square decade from the best class and box weight."""
    best = {f"{key}_loss.weight": value for key, value in best.items()}
    return lambda values: 1 - 0.5 * sum(math.log10(values[key] / best[key]) ** 2 for key in best)


@pytest.fixture(scope="module")
def inside():
    return search(hill(**{"class": 1.5, "box": 7}))


@pytest.fixture(scope="module")
def outside():
    """The best class weight is 25 times as large as the variant's own."""
    return search(hill(**{"class": 100, "box": 2}))


def test_the_first_trial_is_the_variant_s_own_and_the_best_is_near_the_optimum(inside):
    assert inside[0].values == OWN and inside[0].AP < 0.77
    assert tuning.best(inside).AP > 0.98  # within 0.2 decades
    found = tuning.summary(inside)
    assert found["chosen"] == tuning.best(inside).values and len(found["trials"]) == 12
    assert found["extended"] == found["at_an_end"] == []
    assert found["range"] == {"class_loss.weight": [0.4, 40], "box_loss.weight": [0.2, 20]}
    for trial in inside:
        assert all(OWN[key] / 10.1 < value < OWN[key] * 10.1 for key, value in trial.values.items())


def test_a_best_value_at_an_end_extends_that_side_within_the_same_trials(outside):
    found = tuning.summary(outside)
    assert found["extended"] == ["class_loss.weight"] and len(found["trials"]) == 12
    assert found["range"]["class_loss.weight"][0] == pytest.approx(0.4)
    assert found["range"]["class_loss.weight"][1] in (126, 400)
    assert found["range"]["box_loss.weight"] == [0.2, 20]
    assert 40 < found["chosen"]["class_loss.weight"] < 200 and tuning.best(outside).AP > 0.97
    assert "class_loss.weight" in tuning.described(found) and ", extended" in tuning.described(found)


def at(*decades, AP):
    return Trial({"class_loss.weight": 10 ** decades[0], "box_loss.weight": 10 ** decades[1]}, AP)


def test_the_outer_tenth_is_counted_in_decades():
    for place, span in ((0.79, (-1, 1)), (0.81, (-1, 1.5)), (-0.79, (-1, 1)), (-0.81, (-1.5, 1))):
        assert tuning.ranges([at(0, 0, AP=0.1), at(0, place, AP=0.2)])["box_loss.weight"] == span
    trials = [at(0, 0, AP=0.1)] + [at(place, 0, AP=place) for place in (0.9, 1.4, 1.9, 2.0)]
    assert [tuning.ranges(trials[:n])["class_loss.weight"][1] for n in range(1, 6)] == [1, 1.5, 2, 2, 2]  # the limit
    assert tuning.summary(trials)["at_an_end"] == ["class_loss.weight"]
    worse = [at(0, 0, AP=0.5), at(0.9, 0.9, AP=0.4), at(-0.9, 0, AP=None)]
    assert set(tuning.ranges(worse).values()) == {(-1, 1)}


def test_an_end_that_only_the_last_trial_reached_is_not_said_to_be_searched():
    found = tuning.summary([at(0, 0, AP=0.1), at(0.95, 0, AP=0.2)])
    assert found["range"]["class_loss.weight"] == [0.1, 10] and found["extended"] == []
    assert found["at_an_end"] == ["class_loss.weight"] and "at an end of it" in tuning.described(found)


def test_a_trial_depends_on_those_before_it_alone(inside):
    """So a search that is stopped goes on the same, and other searches beside it change nothing."""
    for before in (1, 5, 11):
        assert tuning.propose(inside[:before]) == inside[before].values


def test_failures_count_as_nothing_and_do_not_end_the_search():
    def score(values):
        return None if values["class_loss.weight"] > 4.5 else hill(**{"class": 1, "box": 2})(values)

    trials = search(score, 6)
    assert any(trial.AP is None for trial in trials) and tuning.best(trials).AP > trials[0].AP
    failed = [Trial(OWN, None), Trial({key: 2 * value for key, value in OWN.items()}, None)]
    found = tuning.summary(failed)
    assert found["chosen"] == OWN and tuning.propose(failed).keys() == OWN.keys()
    assert "2 of 2 trials failed, no trial scored above 0" in tuning.described(found)


def test_every_variant_starts_with_the_same_multiples():
    """So that none is luckier than another."""
    other = {key: 10 * value for key, value in OWN.items()}
    one, two = (search(lambda _: 0.5, 3, [Trial(own, 0.5)]) for own in (OWN, other))
    for a, b in zip(one, two, strict=True):
        assert [b.values[key] / a.values[key] for key in OWN] == pytest.approx([10, 10], rel=0.01)


def test_results_of_an_earlier_version_read_as_before():
    old = {"key": "box_loss.weight", "AP": {"x0.5": 0.3, "x1": 0.4, "x2": None}, "chosen": "x1"}
    assert tuning.described(old) == "box_loss.weight x1"
    assert tuning.described(old | {"chosen": "x2"}) == "box_loss.weight x2, an end"
    assert tuning.aps(old) == old["AP"] and tuning.budget(old) == "box_loss.weight in 3 trials"
