"""The search for a variant's weights: what a tuning run tries next, and what the tuning runs have found.

The values of all keys are searched together, evenly in their logarithms, from a tenth to ten times the variant's own
values. The first trial has its own values, the next three are random places in the range, the same for each variant
while their ranges are the same, and then Optuna's Gaussian process proposes. A trial depends only on the trials before
it and on the search's seed: `propose` makes a fresh Optuna study of them. A search that was stopped continues as if it
had not stopped.

If the best value so far lies in the outer tenth of a range, this side is extended by half a decade, to a hundredth or
a hundred times at most. The number of trials stays the same, so that every variant has the same budget.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

KEYS = ("class_loss.weight", "box_loss.weight", "solver.lr")  # what can be tuned: factors, of any positive size
DECADES = 1.0  # that the range goes below and above the first trial, at first
STEP = 0.5  # decades of an extension
LIMIT = 2.0  # decades it may grow at most
END = 0.1  # the share of a range, in decades, that counts as one of its ends
RANDOM = 4  # trials before the Gaussian process, with the first
SEEDS = 1000  # Optuna's seeds for each seed of a search, one a trial

Range = tuple[float, float]


class Trial(NamedTuple):
    """A tuning run."""

    values: dict[str, float]  # by key
    AP: float | None  # None if it failed


def propose(trials: Sequence[Trial], seed: int = 0) -> dict[str, float]:
    """The values of the next trial. The first, which has the variant's own values, must be among `trials`."""
    import optuna  # takes a second, and only tuning needs it

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    start = trials[0].values
    spans = ranges(trials)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        key: optuna.distributions.FloatDistribution(*span) for key, span in spans.items()
    }
    sampler = optuna.samplers.GPSampler(seed=SEEDS * seed + len(trials), n_startup_trials=RANDOM)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        # The clamp is for values that were rounded to just outside of the range.
        params = {key: min(max(_decades(trial, key, start), low), high) for key, (low, high) in spans.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=_score(trial)))
    proposed = study.ask(distributions).params
    return {key: float(f"{start[key] * 10 ** proposed[key]:.3g}") for key in start}


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the highest AP; the first of several. A trial that failed counts as 0."""
    return max(trials, key=_score)


def ranges(trials: Sequence[Trial]) -> dict[str, Range]:
    """The range of each key after these trials, in decades from the first."""
    start = trials[0].values
    spans = dict.fromkeys(start, (-DECADES, DECADES))
    for count in range(1, len(trials) + 1):
        leader = best(trials[:count])
        for key, (low, high) in spans.items():
            side = _end(_decades(leader, key, start), (low, high))
            spans[key] = max(low - STEP * (side < 0), -LIMIT), min(high + STEP * (side > 0), LIMIT)
    return spans


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """What a result keeps of its variant's tuning."""
    start = trials[0].values
    searched = ranges(trials[:-1] or trials)  # the last trial was the last one to use its range
    chosen = best(trials)
    return {
        "keys": list(start),
        "trials": [trial._asdict() for trial in trials],
        "range": {key: [float(f"{start[key] * 10**end:.3g}") for end in span] for key, span in searched.items()},
        "extended": [key for key, (low, high) in searched.items() if high - low > 2 * DECADES],
        "chosen": chosen.values,
        "at_an_end": [key for key, span in searched.items() if _end(_decades(chosen, key, start), span)],
    }


def budget(tuning: dict[str, Any]) -> str:
    """The tuned options and the number of trials, which must be the same for all variants."""
    return f"{', '.join(tuning['keys'])} in {len(tuning['trials'])} trials"


def described(tunings: Sequence[dict[str, Any]]) -> str:
    """The chosen values of summaries of one variant with their ranges, and remarks if they may not be the best.

    Values of several summaries, one for each seed, are separated by slashes; a range is that of all.
    """
    words = []
    for key in tunings[0]["chosen"]:
        values = " / ".join(f"{tuning['chosen'][key]:g}" for tuning in tunings)
        low, high = min(tuning["range"][key][0] for tuning in tunings), max(t["range"][key][1] for t in tunings)
        remark = ", extended" if any(key in tuning["extended"] for tuning in tunings) else ""
        if ends := sum(key in tuning["at_an_end"] for tuning in tunings):
            remark += f", at an end of its own in {ends} of {len(tunings)}" if len(tunings) > 1 else ", at an end of it"
        words.append(f"{key} {values} (range {low:g} to {high:g}{remark})")
    trials = [trial for tuning in tunings for trial in tuning["trials"]]
    if failed := sum(trial["AP"] is None for trial in trials):
        words.append(f"{failed} of {len(trials)} trials failed")
    best_trials = [highest(tuning) for tuning in tunings]
    if any(best_trials):
        words.append(f"best trial {' / '.join(f'{AP:.1f}' for AP in best_trials)} AP")
    if not all(best_trials):
        of_seeds = " of some seeds" if any(best_trials) else ""
        words.append(f"no trial{of_seeds} scored above 0, so these are the variant's own values")
        words[-1] += "; give longer trials (--tune-set)"
    return ", ".join(words)


def highest(tuning: dict[str, Any]) -> float:
    """The AP of a summary's best trial, in percent."""
    return 100 * max(0, *(trial["AP"] or 0 for trial in tuning["trials"]))


def _decades(trial: Trial, key: str, start: dict[str, float]) -> float:
    return math.log10(trial.values[key] / start[key])


def _end(place: float, span: Range) -> int:
    """-1 or 1 if `place` is in the lowest or highest tenth of the range, otherwise 0."""
    margin = END * (span[1] - span[0])
    return (place >= span[1] - margin) - (place <= span[0] + margin)


def _score(trial: Trial) -> float:
    return max(trial.AP or 0.0, 0.0)  # -1: there was nothing to score
