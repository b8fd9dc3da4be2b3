"""The search for a variant's weights: it finds them, every variant has the same budget, and a stop changes nothing."""

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
    """A score of at most 1. It falls by 0.5 times the squared distance to the best weights, in decades."""
    best = {f"{key}_loss.weight": value for key, value in best.items()}
    return lambda values: 1 - 0.5 * sum(math.log10(values[key] / best[key]) ** 2 for key in best)


@pytest.fixture(scope="module")
def inside():
    return search(hill(**{"class": 1.5, "box": 7}))


@pytest.fixture(scope="module")
def outside():
    """The best class weight is 25 times as large as the variant's own."""
    return search(hill(**{"class": 100, "box": 2}))


def test_the_search_starts_at_the_variant_s_weights_and_gets_near_the_optimum(inside):
    assert inside[0].values == OWN and inside[0].AP < 0.77
    assert tuning.best(inside).AP > 0.98  # within 0.2 decades
    summary = tuning.summary(inside)
    assert summary["chosen"] == tuning.best(inside).values and len(summary["trials"]) == 12
    assert summary["extended"] == summary["at_an_end"] == []
    assert summary["range"] == {"class_loss.weight": [0.4, 40], "box_loss.weight": [0.2, 20]}
    for trial in inside:
        assert all(OWN[key] / 10.1 < value < OWN[key] * 10.1 for key, value in trial.values.items())


def test_a_best_value_at_an_end_extends_the_range_but_not_the_budget(outside):
    summary = tuning.summary(outside)
    assert summary["extended"] == ["class_loss.weight"] and len(summary["trials"]) == 12
    assert summary["range"]["class_loss.weight"][0] == pytest.approx(0.4)
    assert summary["range"]["class_loss.weight"][1] in (126, 400)
    assert summary["range"]["box_loss.weight"] == [0.2, 20]
    assert 40 < summary["chosen"]["class_loss.weight"] < 200 and tuning.best(outside).AP > 0.97
    assert "class_loss.weight" in tuning.described([summary]) and ", extended" in tuning.described([summary])


def at(*decades, AP):
    return Trial({"class_loss.weight": 10 ** decades[0], "box_loss.weight": 10 ** decades[1]}, AP)


def test_the_outer_tenth_is_counted_in_decades():
    for place, span in ((0.79, (-1, 1)), (0.81, (-1, 1.5)), (-0.79, (-1, 1)), (-0.81, (-1.5, 1))):
        assert tuning.ranges([at(0, 0, AP=0.1), at(0, place, AP=0.2)])["box_loss.weight"] == span
    trials = [at(0, 0, AP=0.1)] + [at(place, 0, AP=place) for place in (0.9, 1.4, 1.9, 2.0)]
    assert [tuning.ranges(trials[:n])["class_loss.weight"][1] for n in range(1, 6)] == [1, 1.5, 2, 2, 2]  # the limit
    assert tuning.summary(trials)["at_an_end"] == ["class_loss.weight"]
    worse_trials = [at(0, 0, AP=0.5), at(0.9, 0.9, AP=0.4), at(-0.9, 0, AP=None)]
    assert set(tuning.ranges(worse_trials).values()) == {(-1, 1)}


def test_an_end_that_only_the_last_trial_reached_is_not_reported_as_extended():
    summary = tuning.summary([at(0, 0, AP=0.1), at(0.95, 0, AP=0.2)])
    assert summary["range"]["class_loss.weight"] == [0.1, 10] and summary["extended"] == []
    assert summary["at_an_end"] == ["class_loss.weight"] and "at an end of it" in tuning.described([summary])


def test_a_trial_depends_only_on_those_before_it(inside):
    """So a stopped search continues the same, and parallel searches change nothing."""
    for count in (1, 5, 11):
        assert tuning.propose(inside[:count]) == inside[count].values


def test_searches_with_other_seeds_propose_other_values(inside):
    proposed = [tuning.propose(inside[:1], seed) for seed in (0, 1, 2)]
    assert proposed[0] == tuning.propose(inside[:1]) == inside[1].values
    assert all(len({values[key] for values in proposed}) == 3 for key in OWN)


def test_summaries_of_several_seeds_are_one_line():
    trials = [at(0, 0, AP=0.1), at(0.95, 0.5, AP=0.2)], [at(0, 0, AP=0.3), at(0.2, 0.5, AP=None)], [at(0, 0, AP=None)]
    line = tuning.described([tuning.summary(of_seed) for of_seed in trials])
    assert "class_loss.weight 8.91251 / 1 / 1 (range 0.1 to 10, at an end of its own in 1 of 3)" in line
    assert "2 of 5 trials failed, best trial 20.0 / 30.0 / 0.0 AP, no trial of some seeds scored above 0, so" in line


def test_failed_trials_are_never_best_and_do_not_end_the_search():
    def score(values):
        return None if values["class_loss.weight"] > 4.5 else hill(**{"class": 1, "box": 2})(values)

    trials = search(score, 6)
    assert any(trial.AP is None for trial in trials) and tuning.best(trials).AP > trials[0].AP
    failed_trials = [Trial(OWN, None), Trial({key: 2 * value for key, value in OWN.items()}, None)]
    summary = tuning.summary(failed_trials)
    assert summary["chosen"] == OWN and tuning.propose(failed_trials).keys() == OWN.keys()
    assert "2 of 2 trials failed, no trial scored above 0" in tuning.described([summary])


def test_every_variant_starts_with_the_same_multiples():
    """So no variant is luckier than another."""
    scaled = {key: 10 * value for key, value in OWN.items()}
    trials, scaled_trials = (search(lambda _: 0.5, 3, [Trial(weights, 0.5)]) for weights in (OWN, scaled))
    for trial, scaled_trial in zip(trials, scaled_trials, strict=True):
        assert [scaled_trial.values[key] / trial.values[key] for key in OWN] == pytest.approx([10, 10], rel=0.01)
