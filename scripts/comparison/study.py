"""The runs of a comparison: each variant with each seed, and the tuning runs that choose its weights."""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from data.annotations import load_annotations
from data.image_folder import find_folder
from detector import atomic, config, config_files
from detector.configure import resolve
from detector.errors import UserError
from scripts.comparison import result, tuning
from scripts.comparison.supervise import Run, train_all
from scripts.comparison.tuning import Trial
from scripts.comparison.variants import Values, with_values

HELD_OUT = 0.25  # of the training images, to tune on


class Study:
    """The folders of a comparison, and the config that its runs share."""

    def __init__(self, base: str, settings: list[str], output: Path | None, results: Path | None, processes: int = 1):
        self.base = Path(base)
        self.values = config_files.read(base)
        self.common = resolve(self.values, base, settings)
        self.settings = settings
        self.output = output or Path("runs") / self.base.resolve().parent.name
        self.results = results or self.output / "results"
        self.processes = processes
        self.tried: dict[tuple[str, int], list[Trial]] = {}  # finished tuning runs, by variant and seed
        self.tunings: dict[tuple[str, int], Values] = {}  # what they found
        data = self.common.data
        files = {"data.train": Path(data.train.annotations), "data.val": Path(data.val.annotations)}
        self.annotations = {key: hash_of(file) for key, file in files.items() if file.is_file()}

    def runs(self, variants: dict[str, Values], seeds: int) -> list[Run]:
        """Every variant with one seed, then with the next, so that runs that stop early still compare."""
        return [
            self.whole_run(name, changes, seed, self.tunings.get((name, seed), self.tunings.get((name, 0))))
            for seed in range(seeds)
            for name, changes in variants.items()
        ]

    def whole_run(self, variant: str, changes: Values, seed: int, tuned: Values | None) -> Run:
        notes = {"variant": variant, "seed": seed}
        if tuned:
            changes, notes = with_values(changes, tuned["chosen"]), notes | {"tuning": tuned}
        return self.run(f"{variant}-s{seed}", config_files.merge(changes, {"seed": seed}), notes)

    def searches(
        self, variants: dict[str, Values], runs: list[Run], tuned_keys: list[str], count: int, settings: list[str]
    ) -> list[Iterator[Run]]:
        """A `search` for each of the runs, for its variant and with its seed."""
        keys = [key for key in tuning.KEYS if key in tuned_keys]  # in one order, which the search depends on
        searches = []
        for run in runs:
            name, seed, values = run.notes["variant"], run.notes["seed"], config.flat(run.cfg.model_dump(mode="json"))
            initial = {key: values[key] for key in keys}
            searches.append(self.search(name, variants[name], seed, initial, count, settings))
        return searches

    def search(
        self, variant: str, changes: Values, seed: int, initial: dict[str, float], count: int, settings: list[str]
    ) -> Iterator[Run]:
        """The `count` tuning runs of a variant, beginning with its `initial` values, which are added to `tried`.

        Each must have a result before the next is asked for. One that has a result already keeps its values.
        """
        tried = self.tried.setdefault((variant, seed), [])
        for number in range(1, count + 1):
            name = f"tune-{variant}{of_seed(seed)}-{number}"
            kept = self.results / f"{name}.json"
            if tried and kept.exists():
                values = kept_values(kept, list(initial))
            else:
                values = tuning.propose(tried, seed) if tried else initial
            best = f"; best so far {tuning.best(tried).AP or 0:.3f}" if tried else ""
            title = f"{variant}{of_seed(seed)}, trial {number}/{count} ({shown(values)}{best})"
            run = self.trial(name, with_values(changes, values), seed, {"variant": variant, "tried": values}, settings)
            yield replace(run, title=title, keep_best=False)
            tried.append(Trial(values, score(run.kept)))

    def trial(self, name: str, changes: Values, seed: int, notes: Values, settings: list[str]) -> Run:
        """A tuning run that trains on a part of the training set and is scored on the rest."""
        files = {s: {"annotations": str(self.part(s, seed)), "images": self.images} for s in ("train", "val")}
        changes = config_files.merge(changes, {"data": files, "seed": seed})
        return self.run(name, config_files.with_settings(changes, settings), notes)

    def run(self, name: str, changes: Values, notes: Values) -> Run:
        changes = config_files.merge(config_files.with_settings({}, self.settings), changes)
        values = config_files.merge(self.values, changes) | {"run": name, "output": str(self.output)}
        notes = notes | {"processes": self.processes, "annotations": self.annotations}
        file, kept = self.output / "configs" / f"{name}.yaml", self.results / f"{name}.json"
        return Run(file, resolve(values, f"variant {notes['variant']}", []), kept, notes, self.processes)

    @cached_property
    def images(self) -> str:
        """The folder of the training images, which is searched beside the whole file, not beside a part of it."""
        train = self.common.data.train
        return train.images or str(find_folder(train.annotations, load_annotations(train.annotations).file_names))

    def part(self, split: str, seed: int) -> Path:
        return self.output / f"tune_{split}{of_seed(seed)}.json"

    def hold_out(self, seed: int) -> None:
        """Split the training set's annotation file by images, at random with this seed."""
        annotations = load_annotations(self.common.data.train.annotations)
        indices = list(range(len(annotations.image_ids)))
        random.Random(seed).shuffle(indices)
        count = max(1, round(HELD_OUT * len(indices)))
        for split, part in (("val", indices[:count]), ("train", indices[count:])):
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                atomic.write(self.part(split, seed), json.dumps(annotations.document(part)))
            except OSError as error:
                raise UserError(f"--output: {self.part(split, seed)} cannot be written ({error.strerror})") from None

    def tune(self, searches: list[Iterator[Run]], trials: int, jobs: int) -> None:
        """Train the tuning runs and keep what they found. Exits if a tuning run has no result."""
        small: dict[str, list | dict] = {"curve": [], "probability": [], "resampled": {}}
        if not train_all(searches, trials * len(searches), jobs, keep=lambda full: full | small):
            sys.exit(1)
        for (variant, seed), tried in self.tried.items():
            self.tunings[variant, seed] = tuning.summary(tried)
            print(f"{variant}{of_seed(seed)}: {tuning.described([self.tunings[variant, seed]])}")


def of_seed(seed: int) -> str:
    """For names of tuning runs. Without --tune-each-seed all have seed 0, and later seeds can be added."""
    return f"-s{seed}" if seed else ""


def kept_values(kept: Path, keys: list[str]) -> dict[str, float]:
    """What a finished trial tried. Raises UserError if those are other keys."""
    values = result.read(kept).get("tried")
    if not isinstance(values, dict) or list(values) != keys:
        raise UserError(f"{kept}: has not tried {', '.join(keys)}: delete it, or give another --results")
    return values


def score(kept: Path) -> float | None:
    """The AP of a result; None if the run failed."""
    return result.read(kept).get("metrics", {}).get("AP")


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in values.items())


def hash_of(file: Path) -> str:
    """The start of the file's SHA-256: a result belongs to the data of its training."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
