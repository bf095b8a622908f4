"""What is found in a folder, in which order, with which labels, and what is said when nothing is."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sslpre.data.decode import BadImage
from sslpre.data.find import Folder, _Listing, find, printable, subset
from sslpre.data.sample import sample
from sslpre.errors import SslpreError

PIXEL = b"not decoded here"


def make(root: Path, *names: str | bytes) -> Path:
    for name in names:
        path = os.fsencode(root) + b"/" + (name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(PIXEL)
    root.mkdir(exist_ok=True)
    return root


def names(source: Folder) -> list[bytes]:
    return [source.relative(i) for i in range(len(source))]


def refused(root: Path) -> SslpreError:
    with pytest.raises(SslpreError) as caught:
        find(root)
    assert caught.value.code == 4
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def test_every_extension_in_any_case_nested_or_flat(tmp_path):
    images = ["a.jpg", "b.JPEG", "c.png", "d.WebP", "e.bmp", "f.gif", "g.tif", "deep/er/h.TIFF", "deep/i.x.Jpg"]
    make(tmp_path, *images, "notes.txt", "deep/x.DCM", "deep/y.dcm", "jpg", "no.jpg.bak")
    found = find(tmp_path)
    assert names(found.train) == sorted(map(os.fsencode, images))
    assert found.skipped == {".txt": 1, ".dcm": 2, "no extension": 1, ".bak": 1}
    assert (found.test, found.note) == (None, "")
    assert found.train.where == str(tmp_path)


def test_hidden_names_and_run_folders_are_skipped(tmp_path):
    make(tmp_path, "a.jpg", ".b.jpg", "._a.jpg", ".git/c.jpg", "__MACOSX/d.jpg", "x/.DS_Store", "x/e.jpg")
    make(tmp_path, "runs/simclr-1/recipe.toml", "runs/simclr-1/metrics.jsonl", "runs/simclr-1/views.png")
    make(tmp_path, "r/recipe.toml", "r/checkpoints/1/preview.jpg", "cooking/recipe.toml", "cooking/cake.jpg")
    found = find(tmp_path)
    assert names(found.train) == [b"a.jpg", b"cooking/cake.jpg", b"x/e.jpg"]
    assert found.skipped == {"hidden": 5, "run folder": 2, ".toml": 1}


def test_names_of_any_bytes(tmp_path):
    odd = [
        b"new\nline.jpg",
        "\U0001f600 emoji.png".encode(),
        b"latin-\xe9.jpg",
        b" .gif",
        b"dir\xff/\\.jpg",
        b"'\".jpg",
    ]
    odd.append(b"n" * 251 + b".png")
    make(tmp_path, *odd)
    train = find(tmp_path).train
    assert names(train) == sorted(odd)
    shown = [train.name(i) for i in range(len(train))]
    assert all(text.isprintable() and text.encode() for text in shown)
    assert {"new\\nline.jpg", "\U0001f600 emoji.png", "latin-\\xe9.jpg"} <= set(shown)
    for i in range(len(train)):
        assert Path(os.fsdecode(train.path(i))).read_bytes() == PIXEL


def test_symlink_loops_end_and_links_are_followed(tmp_path):
    outside = make(tmp_path / "outside", "far.jpg", "more/far2.jpg")
    root = make(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to("self")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "c").symlink_to(outside)
    (root / "again").symlink_to(outside / "more")
    (root / "file.jpg").symlink_to(outside / "far.jpg")
    (root / "dead.jpg").symlink_to(outside / "gone.jpg")
    found = find(root)
    assert names(found.train) == [b"a/1.jpg", b"again/far2.jpg", b"b/2.jpg", b"c/far.jpg", b"file.jpg"]
    assert found.skipped == {"broken link": 2}


def test_every_name_of_a_file_counts(tmp_path):
    """Labels come from names, so the same file may be an image of two classes; a copy of the folder is the same set."""
    make(tmp_path / "one", "cat/1.jpg", "dog/2.jpg")
    os.link(tmp_path / "one/cat/1.jpg", tmp_path / "one/dog/1.jpg")
    (tmp_path / "one/dog/3.jpg").symlink_to(tmp_path / "one/cat/1.jpg")
    make(tmp_path / "two", "cat/1.jpg", "dog/2.jpg", "dog/1.jpg", "dog/3.jpg")
    one, two = find(tmp_path / "one").train, find(tmp_path / "two").train
    assert names(one) == names(two) == [b"cat/1.jpg", b"dog/1.jpg", b"dog/2.jpg", b"dog/3.jpg"]
    assert one.fingerprint == two.fingerprint


def test_things_that_are_not_files(tmp_path):
    make(tmp_path, "x.jpg/inner.png")
    (tmp_path / "empty.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would never return
    found = find(tmp_path)
    assert names(found.train) == [b"x.jpg/inner.png"]
    assert found.skipped == {"not a file": 1}


def test_unreadable_folder_is_counted(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg", "lost+found/b.jpg")
    real = os.scandir

    def scandir(path: bytes) -> object:
        if b"lost+found" in path:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    found = find(tmp_path)
    assert names(found.train) == [b"a.jpg"]
    assert found.skipped == {"unreadable folder": 1}


# ---------------------------------------------------------------- order, packing, fingerprint

component = st.binary(min_size=1, max_size=6).filter(
    lambda b: b"/" not in b and b"\0" not in b and not b.startswith(b".") and b != b"__MACOSX"
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths=st.sets(st.lists(component, min_size=1, max_size=4).map(tuple), min_size=1, max_size=12))
def test_index_is_sorted_by_bytes_and_whole(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    wanted = {b"/".join([*folders, file + b".png"]) for *folders, file in paths}
    make(root, *wanted)
    index = find(root).train
    if not {b"train", b"test", b"val"} & {path[0].lower() for path in paths}:
        assert names(index) == sorted(wanted)
    assert isinstance(index.names, bytes)
    assert (index.ends.dtype, index.sizes.dtype, index.labels.dtype) == (np.int64,) * 3
    assert len(index.ends) == len(index.sizes) + 1 == len(index.labels) + 1
    assert (index.sizes == len(PIXEL)).all()


def test_fingerprint_depends_on_names_and_sizes_alone(tmp_path):
    first = find(make(tmp_path / "one", "a/1.jpg", "b/2.jpg")).train.fingerprint
    assert first == find(make(tmp_path / "two", "b/2.jpg", "a/1.jpg", "x.txt")).train.fingerprint
    int(first, 16)
    others = [
        find(make(tmp_path / "3", "a/1.jpg", "b/3.jpg")),
        find(make(tmp_path / "4", "a/1.jpg", "b/2.jpg", "c.jpg")),
    ]
    (make(tmp_path / "5", "a/1.jpg", "b/2.jpg") / "a/1.jpg").write_bytes(PIXEL + b".")
    others += [find(tmp_path / "5"), find(make(tmp_path / "6", "a/1.jp", "a/1.jpg", "gb/2.jpg"))]
    assert len({first, *(other.train.fingerprint for other in others)}) == 5


def test_many_images_in_one_folder_take_little_memory(tmp_path):
    for i in range(4000):
        (tmp_path / f"{i:08}_of_many.jpg").touch()
    find(tmp_path)
    tracemalloc.start()
    try:
        source = find(tmp_path).train
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source) == 4000
    assert peak < 4000 * 250


def test_a_time_that_no_calendar_has_is_a_time_like_any_other(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")
    monkeypatch.setattr("sslpre.data.find._Listing.add", far := Later())
    assert len({find(tmp_path).train.written for far.time in (2**70 + 1, -(2**40), 5)}) == 3


class Later:
    """Lists files as if they had been written at `time`."""

    def __init__(self) -> None:
        self.time, self.add = 0, _Listing.add

    def __get__(self, listing: object, kind: object) -> object:
        def add(entry: os.DirEntry[bytes], path: bytes) -> None:
            info = SimpleNamespace(st_mode=entry.stat().st_mode, st_size=7, st_mtime_ns=self.time)
            self.add(listing, SimpleNamespace(name=entry.name, stat=lambda: info), path)

        return add


def test_written_changes_with_the_limit_of_pixels(tmp_path):
    """Which images are bad is a part of what is stored."""
    make(tmp_path, "a.jpg", "b.jpg")
    one, same, other = (find(tmp_path, limit).train for limit in (1000, 1000, 1001))
    assert one.written == same.written != other.written
    assert one.fingerprint == other.fingerprint
    assert subset(one, np.array([0])).written != subset(other, np.array([0])).written


def test_written_changes_with_every_time_of_modification(tmp_path):
    make(tmp_path, "a/1.jpg", "b/2.jpg", "b/3.jpg")
    for name, time in (("a/1.jpg", 10**18), ("b/2.jpg", 10**18 + 1), ("b/3.jpg", -5)):
        os.utime(tmp_path / name, ns=(0, time))
    first = find(tmp_path).train
    int(first.written, 16)
    assert first.written != first.fingerprint
    os.utime(tmp_path / "a/1.jpg", ns=(7, 10**18))  # the time of access
    assert find(tmp_path).train.written == first.written
    os.utime(tmp_path / "a/1.jpg", ns=(0, 10**18 + 1))
    later = find(tmp_path).train
    os.utime(tmp_path / "a/1.jpg", ns=(0, 10**18 + 1))
    os.utime(tmp_path / "b/2.jpg", ns=(0, 10**18))
    swapped = find(tmp_path).train
    assert {later.fingerprint, swapped.fingerprint} == {first.fingerprint}
    (tmp_path / "c.jpg").write_bytes(PIXEL)
    added = find(tmp_path).train
    assert len({source.written for source in (first, later, swapped, added)}) == 4
    parts = [subset(source, rows) for source in (first, later) for rows in ([0, 1], [1, 0])]
    assert len({part.written for part in parts}) == 4
    assert len({part.fingerprint for part in parts}) == 2
    assert subset(first, [0, 1]).written == parts[0].written
    assert sample(20).train.written == sample(20).train.written != sample(20, seed=1).train.written


def test_subset(tmp_path):
    source = find(make(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(6)))).train
    part = subset(source, np.array([11, 0, 3]))
    assert [part.name(i) for i in range(len(part))] == ["b/5.jpg", "a/0.jpg", "a/3.jpg"]
    assert part.labels.tolist() == [1, 0, 0]
    assert (part.classes, part.where) == (["a", "b"], source.where)
    assert len({source.fingerprint, part.fingerprint, subset(source, np.array([11, 3, 0])).fingerprint}) == 3
    assert part.fingerprint == subset(source, np.array([11, 0, 3])).fingerprint
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "b/5.jpg", "PNG")
    assert part.size(0) == (7, 5)
    assert part.read(0).tolist() == [[[1, 2, 3]] * 5] * 7
    assert part.grey(0) is source.grey(11) is False
    Image.new("L", (5, 7), 3).save(tmp_path / "a/0.jpg", "PNG")
    assert part.grey(1) is source.grey(0) is True
    for ask in (part.read, part.size, part.grey):
        with pytest.raises(BadImage):
            ask(2)
    with pytest.raises(IndexError):
        subset(source, np.array([12]))


# ---------------------------------------------------------------- labels and splits


def test_labels_are_the_first_folder_level(tmp_path):
    make(
        tmp_path, *(f"cat/{i}/x.jpg" for i in range(5)), *(f"dog/{i}.jpg" for i in range(5)), "cat.x/1.jpg", "loose.jpg"
    )
    make(tmp_path, *(f"cat/more{i}.jpg" for i in range(5)))
    source = find(tmp_path).train
    assert source.classes == ["cat", "cat.x", "dog"]
    assert names(source) == sorted(names(source))  # `cat.x/…` before `cat/…`, though `cat` is before `cat.x`
    for i in range(len(source)):
        folder = source.name(i).split("/")[0]
        assert source.labels[i] == (source.classes.index(folder) if "/" in source.name(i) else -1)
    assert (source.labels == -1).sum() == 1


@pytest.mark.parametrize(("classes", "images", "counted"), [(1, 20, 0), (2, 10, 2), (2, 9, 0), (3, 15, 3), (3, 14, 0)])
def test_too_few_and_too_many_classes_count_as_none(tmp_path, classes, images, counted):
    source = find(make(tmp_path, *(f"c{i % classes}/{i}.jpg" for i in range(images)))).train
    assert len(source.classes) == counted
    assert set(source.labels) == (set(range(counted)) or {-1})


@pytest.mark.parametrize("test", ["test", "val", "Valid", "validation"])
def test_split(tmp_path, test):
    make(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(5)), "extra/z.jpg", "root.jpg")
    make(tmp_path, *(f"{test}/{c}/{i}.jpg" for c in "cba" for i in range(3)), f"{test}/loose.jpg")
    (tmp_path / "train" / "a" / "leak").symlink_to(tmp_path / test)
    found = find(tmp_path)
    assert [found.train.name(i) for i in range(3)] == ["a/0.jpg", "a/1.jpg", "a/2.jpg"]
    assert len(found.train) == 10
    assert found.train.where == f"{tmp_path}/train"
    assert found.test.where == f"{tmp_path}/{test}"
    assert found.train.classes == found.test.classes == ["a", "b"]
    assert found.test.labels.tolist() == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1]
    assert found.note == f"using train/ only; {test}/ is left for probe"


def test_test_goes_before_val(tmp_path):
    make(tmp_path, "train/a.jpg", "val/b.jpg", "test/c.jpg")
    assert find(tmp_path).test.where.endswith("/test")
    make(tmp_path, *(f"{split}/{c}/{i}.jpg" for split in ("train", "val", "test") for c in "ab" for i in range(5)))
    found = find(tmp_path)
    assert found.test.where.endswith("/test")
    assert (found.note, found.passed_over) == ("using train/ only; test/ is left for probe", "")


@pytest.mark.parametrize("flat", [(), ("test/1.jpg", "test/2.jpg"), ("test/unknown/1.jpg",)])
def test_the_test_split_is_the_first_with_known_labels(tmp_path, flat):
    """The layout of ImageNet: validation images with labels, test images without."""
    make(tmp_path, *(f"{split}/{c}/{i}.jpg" for split in ("train", "val") for c in "ab" for i in range(5)), *flat)
    (tmp_path / "test").mkdir(exist_ok=True)
    found = find(tmp_path)
    assert found.test.where == f"{tmp_path}/val"
    assert found.test.labels.tolist() == [0] * 5 + [1] * 5
    assert found.passed_over == ("test/ holds no labels of train/" if flat else "test/ holds no images")
    assert found.note == f"using train/ only; val/ is left for probe; {found.passed_over}"
    assert len(found.train) == 10


def test_without_labels_the_test_split_is_the_first_with_images(tmp_path):
    make(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(5)), "test/x.npy", "valid/1.jpg", "val/2.jpg")
    found = find(tmp_path)
    assert found.test.where == f"{tmp_path}/val"
    assert found.note == "using train/ only; val/ is left for probe; test/ holds no images"
    for name in ("valid/1.jpg", "val/2.jpg"):
        (tmp_path / name).unlink()
    found = find(tmp_path)
    assert found.test is None
    assert found.note == "using train/ only; test/ holds no images; val/ holds no images; valid/ holds no images"
    assert found.skipped == {".npy": 1}


def test_train_alone_is_the_root(tmp_path):
    found = find(make(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(5))))
    assert found.train.classes == ["a", "b"]
    assert found.test is None
    make(tmp_path, "other/deep/x.jpg")  # now `train` is one folder among others
    assert len(find(tmp_path).train) == 11
    (tmp_path / "other/deep/x.jpg").rename(tmp_path / "x.jpg")
    assert len(find(tmp_path).train) == 11


def test_what_a_run_leaves_beside_train_does_not_change_the_data(tmp_path):
    make(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(5)))
    before = find(tmp_path)
    make(tmp_path, "runs/simclr-1/recipe.toml", "runs/simclr-1/metrics.jsonl", "runs/simclr-1/views.png", "README.md")
    make(
        tmp_path, "enc/config.json", "mine/recipe.toml", "mine/checkpoints/1/a.jpg", ".cache/a.jpg", "LICENSE", ".a.jpg"
    )
    (tmp_path / "again").symlink_to(tmp_path / "train")
    (tmp_path / "up").symlink_to(tmp_path)
    after = find(tmp_path)
    assert after.train.fingerprint == before.train.fingerprint
    assert after.train.labels.tolist() == before.train.labels.tolist() == [0] * 5 + [1] * 5
    assert (after.train.classes, after.train.where) == (["a", "b"], f"{tmp_path}/train")


# ---------------------------------------------------------------- errors


def test_missing_folder(tmp_path):
    make(tmp_path / "images", "a.jpg")
    error = refused(tmp_path / "imagse")
    assert error.message == f"there is no folder `{tmp_path}/imagse`"
    assert error.hint == f"did you mean `{tmp_path}/images`?"
    assert "path is taken from" in refused(tmp_path / "q" / "w").hint


def test_a_file(tmp_path):
    make(tmp_path, "a.jpg")
    assert refused(tmp_path / "a.jpg").message == f"`{tmp_path}/a.jpg` is a file, not a folder"
    assert "not a directory" in refused(tmp_path / "a.jpg" / "b").message


def test_empty_and_imageless_folders(tmp_path):
    assert refused(make(tmp_path / "empty")).message == f"the folder `{tmp_path}/empty` is empty"
    dicom = make(tmp_path / "d", *(f"s/{i}.dcm" for i in range(12)), "a.txt", "b.txt", "c.txt")
    assert refused(dicom).message == f"no images in `{tmp_path}/d`: found 12 .dcm and 3 .txt"
    make(dicom, "x.csv", "y.json", "y2.json", "z.md", "readme")
    assert refused(dicom).message.endswith("found 12 .dcm, 3 .txt, 2 .json and 3 others")
    assert refused(make(tmp_path / "h", ".a.jpg")).message.endswith("found 1 hidden")
    split = make(tmp_path / "split", "train/x.npy", "test/a.jpg")
    assert refused(split).message == f"no images in `{split}/train`: found 1 .npy"


def test_folder_without_permission(tmp_path, monkeypatch):
    make(tmp_path, "a.jpg")

    def scandir(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", scandir)
    assert refused(tmp_path).message == f"cannot read the folder `{tmp_path}`: permission denied"


def test_printable():
    assert printable(b"a\xff\n\x1b[31m\\") == "a\\xff\\n\\x1b[31m\\"
