"""Which label file belongs to which image."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from data.spelling import spelling
from detector.errors import UserError
from scripts.conversion.found_files import Index, folder_of, part_of
from scripts.conversion.label_formats import Notes, bytes_of

APART = ("images", "jpegimages", "labels", "annotations")  # folders that keep images and labels apart


def pair(
    images: dict[str, Path], labels: dict[str, Path], inside: Callable[[Path], str | None], notes: Notes
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Image -> its label file; and image -> the label files that may or may not belong to it.

    Two files belong together if their paths differ only in the folders of APART or in spelling, if the label file has
    the image's name inside (`inside`), or if their names are equal and no file in their folders is paired by its path.
    """
    doubtful: dict[str, list[str]] = {}
    pairs = by_path(images, labels, doubtful, notes)
    by_inside(images, labels, pairs, inside, notes)
    by_stem([name for name in images if name not in doubtful], labels, pairs, doubtful, notes)
    return pairs, doubtful


def key_of(name: str) -> str:
    """The path without its suffix and without the folders of APART: equal for an image and its label file."""
    path = PurePosixPath(name)
    return "/".join([*(part for part in path.parent.parts if part.lower() not in APART), path.stem])


def by_path(
    images: dict[str, Path], labels: dict[str, Path], doubtful: dict[str, list[str]], notes: Notes
) -> dict[str, str]:
    exact, spelled = defaultdict(list), defaultdict(list)
    for name in labels:
        exact[key_of(name)].append(name)
        spelled[spelling(key_of(name))].append(name)
    keys = {name: key_of(name) for name in images}
    # photo.txt, or photo.jpg.txt
    alike = {name: exact.get(key) or exact.get(key_of(f"{name}.txt")) for name, key in keys.items()}
    used = {label for candidates in alike.values() for label in candidates or ()}
    rivals = defaultdict(set)  # images that differ only in spelling
    for name, key in keys.items():
        if not alike[name]:
            rivals[spelling(key)].add(key)
    pairs, second = {}, set()
    for name, candidates in alike.items():
        if not candidates:
            key = spelling(keys[name])
            spelt = spelled.get(key) or spelled.get(spelling(key_of(f"{name}.txt")), [])
            candidates = [label for label in spelt if label not in used]
            if candidates:
                notes["images whose label file is spelled otherwise"].append(name)
            if candidates and len(rivals[key]) > 1:
                doubtful[name] = candidates
                continue
        if candidates and len({bytes_of(labels[label]) for label in candidates}) > 1:
            doubtful[name] = candidates
        elif candidates:
            pairs[name] = candidates[0]
            second.update(candidates[1:])
    for name in sorted(second):
        notes["left out: a second label file of the same image"].append(name)
    return pairs


def by_inside(
    images: dict[str, Path], labels: dict[str, Path], pairs: dict[str, str], inside: Callable, notes: Notes
) -> None:
    """Add to `pairs` by the name inside a label file. Raises UserError if it contradicts the file's own name."""
    index = Index(images)
    images_of = defaultdict(list)
    for image, label in pairs.items():
        images_of[label].append(image)
    names_inside = {label: text for label, path in labels.items() if (text := inside(path))}
    claims = {label: hits[0] for label, text in names_inside.items() if len(hits := index.find(text, label)) == 1}
    times = Counter(claims.values())
    flaws = []
    for label, image in claims.items():
        if times[image] > 1:  # copies of one file that still have its name inside
            continue
        if not images_of[label] and image not in pairs:
            pairs[image] = label
            notes["images found by the name inside their label file"].append(image)
        elif images_of[label] and not {last_names(image)[1]} & {last_names(other)[1] for other in images_of[label]}:
            flaws.append(f"{label} has the name of {images_of[label][0]}, and inside it is {image}")
    if flaws:
        raise UserError(
            f"{len(flaws)} label files have the name of one image but name another image inside, the first: "
            f"{flaws[0]}; correct either name"
        )


def by_stem(
    images: list[str],
    labels: dict[str, Path],
    pairs: dict[str, str],
    doubtful: dict[str, list[str]],
    notes: Notes,
) -> None:
    """Add to `pairs` by the name alone, or to `doubtful` if the name does not decide."""
    used, done = set(pairs.values()), {folder_of(image) for image in pairs}
    done_labels = {folder_of(label) for label in used}
    free = defaultdict(list)
    for label in labels:
        if label not in used:
            free[last_names(label)[1]].append(label)
    rivals = defaultdict(list)
    for image in images:
        if image not in pairs:
            rivals[last_names(image)[1]].append(image)
    for image in images:
        if image in pairs:
            continue
        alike = [label for label in free.get(last_names(image)[1], []) if may_belong(image, label)]
        best = nearest(image, alike)
        decided = len(best) == 1 and folder_of(image) not in done and folder_of(best[0]) not in done_labels
        if decided and {key_of(other) for other in nearest(best[0], rivals[last_names(image)[1]])} == {key_of(image)}:
            pairs[image] = best[0]
            notes["images paired with a label file of another folder, by their name alone"].append(image)
        elif alike:
            doubtful[image] = alike


def last_names(path: str) -> tuple[str, str]:
    """The last name in a path with and without its suffix, in one spelling."""
    last = PurePosixPath(spelling(path))
    return last.name, last.stem


def may_belong(image: str, label: str) -> bool:
    parts = {part_of(folder_of(image)), part_of(folder_of(label))} - {None}
    return len(parts) < 2  # not one in train and one in val


def nearest(name: str, others: list[str]) -> list[str]:
    """Those of `others` whose folders share the most words with the folders of `name`."""
    words = [words_of(other) for other in others]
    counts = [(other & words_of(name)).total() for other in words]
    return [other for other, count in zip(others, counts) if count == max(counts)]


def words_of(name: str) -> Counter:
    folder = spelling(folder_of(name))
    return Counter("".join(letter if letter.isalnum() else " " for letter in folder).split())
