"""scripts/compare_label_noise.py: the table is the results' means, and errors are one line."""

from scripts import compare_label_noise
from scripts.comparison import result

LOSSES = {"class_loss": {"name": "ce"}, "box_loss": {"name": "smooth_l1"}}


def write(folder, share, name, seed, ap):
    content = {"config": {"run": f"{name}-s{seed}", "seed": seed, **LOSSES}, "metrics": {"AP": ap}, "variant": name}
    metrics = {"AP": ap, "images": 100}
    content |= {"seed": seed, "metrics": metrics, "resampled": {"AP": [ap - 0.001 * (draw % 2) for draw in range(500)]}}
    result.write(folder / str(share) / f"{name}-s{seed}.json", content)


def test_means_and_what_is_lost(folder, command):
    for seed, more in ((0, 0.0), (1, 0.01), (2, 0.02)):
        for share, ap in ((0, 0.5), (10, 0.45), (20, 0.3)):
            write(folder, share, "ce", seed, ap + more)
        write(folder, 0, "focal", seed, 0.6)
    for share, ap in ((0, 0.5), (20, 0.3)):
        write(folder, share, "single", 0, ap)
    failed = {"config": {"run": "ghm", "seed": 0, **LOSSES}, "failure": "loss inf", "variant": "ghm", "seed": 0}
    result.write(folder / "0" / "ghm-s0.json", failed)
    code, out, err = command(compare_label_noise.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    # By hand: Student's t for 4 degrees of freedom, 2.776 sqrt(1/3 + 1/3).
    assert "| ce | 51.0±1.0 | 46.0±1.0 | 31.0±1.0 | 20.0 [17.7, 22.3], 39% |" in out
    assert "| single | 50.0 | - | 30.0 | 20.0 [20.0, 20.0] over images only, 40% |" in out  # one seed
    assert "failed: ghm at 0%, seed 0: loss inf" in err
    assert "| focal | 60.0±0.0 | - | - | - |" in out
    assert "ghm" not in out
    assert (folder / "plot.png").stat().st_size > 5000


def test_errors_are_one_line(folder, command):
    (folder / "empty").mkdir()
    (folder / "10").mkdir()
    write(folder / "good", 0, "ce", 0, 0.5)
    write(folder / "good", 10, "ce", 0, 0.4)
    write(folder / "one", 0, "ce", 0, 0.5)
    for expected, arguments in {
        "has no folders": (folder / "empty",),
        "has no result files": (folder,),
        "at least two shares": (folder / "one",),
        "cannot be written": (folder / "good", "--output", "/dev/null/x.png"),
    }.items():
        code, _, err = command(compare_label_noise.main, *arguments)
        assert code == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1
