"""scripts/noise.py: the table is the results' means, and slips are told."""

from scripts import noise, result

LOSSES = {"class_loss": {"name": "ce"}, "box_loss": {"name": "smooth_l1"}}


def write(folder, share, name, seed, ap):
    content = {"config": {"run": f"{name}-s{seed}", "seed": seed, **LOSSES}, "metrics": {"AP": ap}, "variant": name}
    content |= {"seed": seed, "resampled": [ap - 0.001 * share * (draw % 2) for draw in range(500)]}
    result.write(folder / str(share) / f"{name}-s{seed}.json", content)


def test_means_and_what_is_lost(folder, command):
    for seed, more in ((0, 0.0), (1, 0.02)):
        for share, ap in ((0, 0.5), (10, 0.45), (20, 0.3)):
            write(folder, share, "ce", seed, ap + more)
        write(folder, 0, "focal", seed, 0.6)
    failed = {"config": {"run": "ghm", "seed": 0, **LOSSES}, "failure": "loss inf", "variant": "ghm", "seed": 0}
    result.write(folder / "0" / "ghm-s0.json", failed)
    code, out, err = command(noise.main, folder, "--output", folder / "plot.png")
    assert code == 0, err
    assert "| ce | 51.0±1.4 | 46.0±1.4 | 31.0±1.4 | 20.0 [20.0, 22.0], 39% |" in out
    assert "| focal | 60.0±0.0 | - | - | - |" in out
    assert "ghm" not in out
    assert (folder / "plot.png").stat().st_size > 5000


def test_slips_are_one_line(folder, command):
    (folder / "empty").mkdir()
    (folder / "10").mkdir()
    write(folder / "good", 0, "ce", 0, 0.5)
    for expected, arguments in {
        "holds no folders": (folder / "empty",),
        "no result files": (folder,),
        "cannot be written": (folder / "good", "--output", "/dev/null/x.png"),
    }.items():
        code, _, err = command(noise.main, *arguments)
        assert code == 2 and expected in err and err.startswith("error: ") and err.count("\n") == 1
