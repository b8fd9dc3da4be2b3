"""Laws of data/image_folder.py: each spelling of a name leads to its file, none to another or outside."""

import os
import unicodedata
from urllib.parse import quote

import pytest

from data.image_folder import ImageFolder, find_folder
from detector.errors import UserError


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def locate(folder, *names):
    return ImageFolder(folder).locate(names, "x.json")


def refusal(folder, *names):
    with pytest.raises(UserError) as excinfo:
        locate(folder, *names)
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


FILE = "Züge/한 1%.jpg"  # as it is on the disk
SPELLINGS = {
    "itself": FILE,
    "dots": "./Züge/../Züge//한 1%.jpg",
    "other case": "züGE/한 1%.JPG",
    "decomposed": unicodedata.normalize("NFD", FILE),
    "url-encoded": quote(FILE),
    "url-encoded whole": quote(FILE, safe=""),
    "backslashes": FILE.replace("/", "\\"),
    "all at once": quote(unicodedata.normalize("NFD", FILE).upper().replace("/", "\\")),
    "from the folder above": f"images/{FILE}",
    "from the folder above, backslashes": "Images\\" + FILE.replace("/", "\\"),
    "from the folder above, url-encoded": quote(f"images/{FILE}", safe=""),
    "of another machine": f"/nowhere/at/all/images/{FILE}",
    "of a Windows machine": "C:\\Users\\me\\images\\" + FILE.replace("/", "\\"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_each_spelling_of_a_name_is_found(tmp_path, kind):
    folder = make(tmp_path / "images", FILE, "other.jpg")
    files, remarks = locate(folder, SPELLINGS[kind], "other.jpg")
    assert files == [FILE, "other.jpg"]
    assert remarks == (
        [] if kind == "itself" else [f"1 images found under another spelling (the first is {SPELLINGS[kind]!r})"]
    )


@pytest.mark.parametrize("kind", ["decomposed", "url-encoded", "url-encoded whole", "other case"])
def test_the_file_on_the_disk_may_have_the_odd_spelling(tmp_path, kind):
    folder = make(tmp_path / "images", SPELLINGS[kind])
    assert locate(folder, FILE)[0] == [SPELLINGS[kind]]


def test_absolute_paths_into_the_folder_are_accepted(tmp_path):
    folder = make(tmp_path / "pictures", "a/b.jpg")
    (tmp_path / "link").symlink_to(folder)
    names = [str(folder / "a" / "b.jpg"), str(tmp_path / "link" / "a" / "b.jpg")]
    assert locate(folder, names[0])[0] == locate(tmp_path / "link", names[0])[0] == ["a/b.jpg"]
    assert locate(tmp_path / "link", names[1])[0] == ["a/b.jpg"]


def test_nothing_leads_out_of_the_folder(tmp_path):
    folder = make(tmp_path / "images", "a.jpg")
    make(tmp_path, "x.jpg", "other/images/a.jpg")
    for name in (
        "../x.jpg",
        "..\\x.jpg",
        "s/../../x.jpg",
        str(tmp_path / "x.jpg"),
        str(tmp_path / "other/images/a.jpg"),
    ):
        assert f"file_name is {name!r}, which leads out of the image folder" in refusal(folder, name)
    for name in ("%2e%2e/x.jpg", "..%2fx.jpg", "/x.jpg", "C:\\x.jpg"):
        refusal(folder, name)


def test_an_exact_name_comes_before_other_spellings(tmp_path):
    folder = make(
        tmp_path / "images", "a.jpg", "A.jpg", "b%20c.jpg", "b c.jpg", "d\\e.jpg", "d/e.jpg", "images/f.jpg", "f.jpg"
    )
    names = ["a.jpg", "A.jpg", "b%20c.jpg", "b c.jpg", "d\\e.jpg", "d/e.jpg", "images/f.jpg", "f.jpg"]
    assert locate(folder, *names) == (names, [])


def test_a_name_that_fits_two_files_is_refused(tmp_path):
    folder = make(tmp_path / "images", "a.jpg", "A.jpg", "Sub/c.jpg", "sub/C.jpg")
    assert "'A.JPG' of x.json may be 'A.jpg' or 'a.jpg'" in refusal(folder, "A.JPG")
    assert "may be" in refusal(folder, "SUB/c.jpg")


def test_two_names_of_one_file_are_refused(tmp_path):
    folder = make(tmp_path / "images", "a.jpg")
    assert "'A.jpg' and 'a.jpg' of x.json would both be 'a.jpg'" in refusal(folder, "a.jpg", "A.jpg")
    assert "would both be" in refusal(folder, "A.jpg", "a.JPG")
    assert locate(folder, "A.jpg", "A.jpg")[0] == ["a.jpg", "a.jpg"]  # two records may share a name


def test_missing_images_are_counted(tmp_path):
    folder = make(tmp_path / "images", "a.jpg")
    assert "2 of 3 images of x.json are not there, the first is 's/b.jpg'" in refusal(
        folder, "a.jpg", "s/b.jpg", "s/b.jpg"
    )
    assert "nowhere: cannot read the image folder" in refusal(tmp_path / "nowhere", "a.jpg")


def test_a_folder_is_listed_once_however_many_images_it_has(tmp_path, monkeypatch):
    folder, listed_folders, scandir = make(tmp_path / "images", "a.jpg", "b.jpg", "sub/c.jpg"), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed_folders.append(str(path)) or scandir(path))
    locate(folder, "a.jpg", "b.jpg", "sub/c.jpg", "A.JPG".lower())
    assert sorted(listed_folders) == [str(folder), str(folder / "sub")]


@pytest.mark.parametrize("link", ["image", "folder", "by way of a link", "the image folder"])
def test_links_are_followed_wherever_they_lead(tmp_path, link):
    folder, elsewhere = make(tmp_path / "images", "sub/b.jpg", "a.jpg"), tmp_path / "store"
    if link == "folder":
        (folder / "sub").rename(elsewhere)
        (folder / "sub").symlink_to(elsewhere)
    elif link == "the image folder":
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    else:
        elsewhere.mkdir()
        (folder / "sub" / "b.jpg").rename(elsewhere / "b.jpg")
        (tmp_path / "link").symlink_to(elsewhere)
        (folder / "sub" / "b.jpg").symlink_to((tmp_path / "link" if "way" in link else elsewhere) / "b.jpg")
    (folder / "not an image").symlink_to("/")  # links that no name uses may lead anywhere
    (folder / "circle").symlink_to("circle")
    (folder / "up").symlink_to("..")
    assert locate(folder, "a.jpg", "sub/b.jpg") == (["a.jpg", "sub/b.jpg"], [])
    assert locate(folder, "SUB/b.JPG")[0] == ["sub/b.jpg"]


def test_dots_after_a_link_do_not_lead_out_of_the_folder(tmp_path):
    folder = make(tmp_path / "images", "a.jpg")
    make(tmp_path, "store/in/b.jpg", "store/x.jpg")
    (folder / "link").symlink_to(tmp_path / "store" / "in")
    assert "are not there" in refusal(folder, "link/../x.jpg")
    assert locate(folder, "link/../a.jpg")[0] == ["a.jpg"]


@pytest.mark.parametrize("kind", ["folder", "dangling link", "link to itself", "pipe"])
def test_a_folder_pipe_or_dangling_link_counts_as_missing(tmp_path, kind):
    folder = make(tmp_path / "images", "a.jpg")
    if kind == "folder":
        (folder / "c.jpg").mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / "c.jpg")  # reading it would wait for ever
    else:
        (folder / "c.jpg").symlink_to("c.jpg" if kind == "link to itself" else "nowhere.jpg")
    assert "1 of 2 images" in refusal(folder, "a.jpg", "c.jpg")


# --------------------------------------------------------------------------------------------- the folder itself

# the annotation file, an image, its name in the annotation file, the folder that is found
LAYOUTS = {
    "Roboflow": ("train/_annotations.coco.json", "train/a.jpg", "a.jpg", "train"),
    "ours": ("train.json", "images/a.jpg", "a.jpg", "images"),
    "the demo's": ("train.json", "train/a.jpg", "a.jpg", "train"),
    "COCO": ("annotations/instances_train2017.json", "train2017/a.jpg", "a.jpg", "train2017"),
    "COCO, images below": (
        "annotations/instances_train2017.json",
        "images/train2017/a.jpg",
        "a.jpg",
        "images/train2017",
    ),
    "CVAT": ("annotations/instances_default.json", "images/a.jpg", "a.jpg", "images"),
    "CVAT, newer": ("annotations/instances_default.json", "images/default/a.jpg", "a.jpg", "images/default"),
    "Label Studio": ("result.json", "images/a.jpg", "images/a.jpg", "."),
    "Label Studio, Windows": ("result.json", "images/a.jpg", "images\\a.jpg", "."),
    "FiftyOne": ("labels.json", "data/a.jpg", "a.jpg", "data"),
    "VIA": ("via_export_coco.json", "a.jpg", "a.jpg", "."),
    "apart": ("labels/train.json", "a.jpg", "a.jpg", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_found_where_exporters_put_them(tmp_path, layout, monkeypatch):
    file, image, name, expected = LAYOUTS[layout]
    make(tmp_path, file, image)
    make(tmp_path / "other", "b.jpg")
    assert find_folder(tmp_path / file, [name]).resolve() == (tmp_path / expected).resolve()
    monkeypatch.chdir((tmp_path / file).parent)
    assert find_folder(os.path.basename(file), [name]).resolve() == (tmp_path / expected).resolve()


def test_only_a_folder_with_all_images_is_found(tmp_path):
    make(tmp_path, "train.json", "train/a.jpg", "images/a.jpg", "images/b.jpg")
    assert find_folder(tmp_path / "train.json", ["a.jpg", "b.jpg"]) == tmp_path / "images"
    with pytest.raises(UserError, match=r"its images may be in .*train or in .*images; name the right one"):
        find_folder(tmp_path / "train.json", ["a.jpg"])
    with pytest.raises(UserError, match=r"its images, such as 'c\.jpg', are neither beside it nor in"):
        find_folder(tmp_path / "train.json", ["c.jpg"])


def test_images_beside_the_annotation_file_come_before_those_above_it(tmp_path):
    make(tmp_path, "train/x.json", "train/a.jpg", "images/a.jpg")
    assert find_folder(tmp_path / "train" / "x.json", ["a.jpg"]) == tmp_path / "train"
