"""Image files in torchvision's folder layouts, with torchvision itself as the oracle."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mlflow_kdguard import data
from mlflow_kdguard.errors import DataError

GENERATOR = np.random.default_rng(0)


def picture(path: Path, width: int, height: int, mode: str = "RGB", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = GENERATOR.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height)).convert(mode).save(path, **options)


def refused(uri: str, says: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        _ = data.load(uri, **options).x
    assert uri in caught.value.message
    assert says in caught.value.message
    assert caught.value.remedy


def theirs(dataset: Any) -> tuple[Any, list[int]]:
    """Pixels and labels as torchvision serves them, for sets made with a ToTensor transform."""
    pairs = [dataset[i] for i in range(len(dataset))]
    return np.stack([image.numpy() for image, _ in pairs]), [label for _, label in pairs]


def same(ours: Any, oracle: Any) -> None:
    pixels, labels = theirs(oracle)
    assert ours.y.tolist() == labels
    assert np.array_equal(ours.x, pixels)


def fitted(size: int) -> Any:
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    return Compose([Resize(size), CenterCrop(size), ToTensor()])


def write_folder(root: Path) -> Path:
    sizes = [(9, 7), (8, 8), (20, 8), (7, 31), (8, 9)]
    names = ["b/z.png", "b/a.JPG", "a/deep/x.bmp", "a/0.ppm", "c/1.webp"]
    for name, (width, height) in zip(names, sizes, strict=True):
        picture(root / name, width, height)
    (root / "b" / "notes.txt").write_text("not an image")
    (root / "readme.md").write_text("not a class")
    return root


# ── ImageFolder ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [5, 8, 16])
def test_imagefolder_is_torchvisions_resized_and_cropped(tmp_path: Path, size: int) -> None:
    from torchvision.datasets import ImageFolder

    place = write_folder(tmp_path / "my #1 set")
    ours = data.load(f"imagefolder:{data.quote(place)}?size={size}")
    assert (ours.classes, ours.shape) == (3, (3, size, size))
    same(ours, ImageFolder(place, transform=fitted(size)))


def test_imagefolder_of_one_size_needs_none(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "b/2.png"):
        picture(tmp_path / name, 6, 4)
    ours = data.load(f"imagefolder:{tmp_path}")
    assert ours.shape == (3, 4, 6)
    with Image.open(tmp_path / "b/2.png") as image:
        assert np.array_equal(
            ours.x[2], (np.asarray(image) / 255).astype(np.float32).transpose(2, 0, 1)
        )
    picture(tmp_path / "b/3.png", 6, 5)
    refused(f"imagefolder:{tmp_path}", "b/3.png is 6×5 pixels, but the first image is 6×4")
    assert len(data.load(f"imagefolder:{tmp_path}#[:3]").x) == 3


def test_imagefolder_splits_share_the_classes_of_train(tmp_path: Path) -> None:
    for name in ("train/a/0.png", "train/b/0.png", "train/b/1.png", "test/b/0.png"):
        picture(tmp_path / name, 4, 4)
    uri = f"imagefolder:{tmp_path}"
    whole, test = data.load(uri), data.load(f"{uri}#test")
    assert whole.y.tolist() == [0, 1, 1, 1]
    # Alone, the test folder's only class would have become class 0.
    assert (test.y.tolist(), test.classes) == ([1], 2)
    assert data.concat(data.load(f"{uri}#train"), test, "both").sha256 == whole.sha256
    picture(tmp_path / "test/new/0.png", 4, 4)
    refused(uri, "#test has the class 'new', which train lacks")


def test_the_container_of_pixels_does_not_matter(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png"):
        picture(tmp_path / name, 4, 4)
    folder = data.load(f"imagefolder:{tmp_path}")
    np.savez(tmp_path / "same.npz", x=folder.x, y=folder.y)
    assert data.load(f"npz:{tmp_path}/same.npz").sha256 == folder.sha256


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_other_eight_bit_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    picture(tmp_path / "a" / "0.tiff", 4, 4, mode)
    with Image.open(tmp_path / "a" / "0.tiff") as image:
        assert mode in (image.mode, "P")
        expected = (np.asarray(image.convert("RGB")) / 255).astype(np.float32)
    assert np.array_equal(data.load(f"imagefolder:{tmp_path}").x[0], expected.transpose(2, 0, 1))


def test_only_the_images_of_a_slice_are_decoded(tmp_path: Path) -> None:
    for name in ("0", "1", "2"):
        picture(tmp_path / "a" / f"{name}.png", 4, 4)
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    uri = f"imagefolder:{tmp_path}"
    whole = data.load(uri)
    assert len(whole.take([1, 0]).x) == 2
    assert len(data.load(f"{uri}#[:2]").sha256) == 64
    with pytest.raises(DataError, match=r"2\.png"):
        whole.batch([2])


BROKEN = {
    "empty": (b"", "cannot read the image"),
    "text": (b"hello", "cannot read the image"),
    "truncated": (b"P6 4 4 255\n" + bytes(40), "cannot read the image"),
    "400 megapixels": (b"P6 20000 20000 255\n" + bytes(64), "cannot read the image"),
    "sixteen bit": (b"P5 2 2 65535\n" + bytes(range(8)), "not 8-bit"),
    # Pillow would start Ghostscript on this one.
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "cannot read the image"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_images_are_named(tmp_path: Path, fault: str) -> None:
    raw, says = BROKEN[fault]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "odd one.png").write_bytes(raw)
    refused(f"imagefolder:{tmp_path}", says)
    refused(f"imagefolder:{tmp_path}?size=4", "odd one.png")


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    refused(f"imagefolder:{tmp_path}/none", "not a folder")
    refused(f"imagefolder:{tmp_path}", "holds no class folders")
    picture(tmp_path / "a" / "0.png", 4, 4)
    (tmp_path / "b").mkdir()
    refused(f"imagefolder:{tmp_path}", "b holds no images")
    (tmp_path / "b").rmdir()
    refused(f"imagefolder:{tmp_path}#train", "no split #train")


# ── ImageNet, GTSRB, Flowers102 ─────────────────────────────────────────────────────────────────


def test_imagenet_by_wnid(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    base = tmp_path / "imagenet"
    for name in ("train/n02/n02_1.JPEG", "train/n01/n01_7.JPEG", "val/n01/ILSVRC_1.JPEG"):
        picture(base / name, 30, 20)
    (base / "val" / "n02").mkdir()
    picture(base / "val" / "n02" / "ILSVRC_2.JPEG", 18, 40)
    # The devkit's metadata is never opened: a payload in it stays where it is.
    (base / "meta.bin").write_bytes(b"cos\nabort\n(tR.")
    for split, folder in (("train", "train"), ("test", "val")):
        ours = data.load(f"imagenet?size=12#{split}", root=tmp_path)
        same(ours, ImageFolder(base / folder, transform=fitted(12)))
        assert data.load(f"imagenet?size=12#{split}", root=base).sha256 == ours.sha256
    assert data.load("imagenet", root=tmp_path).shape == (3, 224, 224)
    refused("imagenet", "cannot be downloaded", root=tmp_path / "none", download=True)


def write_gtsrb(root: Path) -> Path:
    base = root / "gtsrb"
    for name in ("00000/00000_00001.ppm", "00001/00000_00000.ppm", "00001/00000_00001.ppm"):
        picture(base / "GTSRB" / "Training" / name, 40, 35)
    (base / "GTSRB" / "Training" / "00000" / "GT-00000.csv").write_text("Filename;Width\n")
    for name in ("00000.ppm", "00001.ppm"):
        picture(base / "GTSRB" / "Final_Test" / "Images" / name, 50, 29)
    rows = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    rows += "00000.ppm;50;29;6;5;48;49;16\n00001.ppm;50;29;5;5;36;40;1\n"
    (base / "GT-final_test.csv").write_text(rows)
    return base


def test_gtsrb(tmp_path: Path) -> None:
    from torchvision.datasets import GTSRB

    base = write_gtsrb(tmp_path)
    for split in ("train", "test"):
        ours = data.load(f"gtsrb#{split}", root=tmp_path)
        assert (ours.classes, ours.shape) == (43, (3, 32, 32))
        same(ours, GTSRB(tmp_path, split=split, transform=fitted(32)))
    table = base / "GT-final_test.csv"
    good = table.read_text()
    for old, new, says in (
        (";16\n", ";43\n", "labels range from 1 to 43"),
        (";16\n", ";-1\n", "labels range from -1"),
        (";16\n", ";x\n", "cannot read"),
        ("ClassId", "Class", "cannot read"),
        ("00000.ppm", "../../secret.ppm", "no file name"),
        ("00000.ppm", "", "no file name"),
        ("00000.ppm", "00009.ppm", "00009.ppm"),
    ):
        table.write_text(good.replace(old, new))
        refused("gtsrb#test", says, root=tmp_path)
    table.unlink()
    refused("gtsrb#test", "GT-final_test.csv", root=tmp_path)
    (base / "GTSRB" / "Training" / "stop").mkdir()
    refused("gtsrb#train", "not a class number", root=tmp_path)


def test_flowers102(tmp_path: Path, monkeypatch: Any) -> None:
    from torchvision.datasets import Flowers102

    base = tmp_path / "flowers-102"
    for number in range(1, 6):
        picture(base / "jpg" / f"image_{number:05d}.jpg", 20 + number, 17)
    labels = np.array([[77, 102, 1, 3, 3]], np.uint8)
    ids = {"trnid": [[5, 2]], "valid": [[1]], "tstid": [[4, 3]]}
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {key: np.array(value, np.uint16) for key, value in ids.items()})
    # Only the checksums of the real files stand between the oracle and these small ones.
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    for split in ("train", "test"):
        ours = data.load(f"flowers102?size=16#{split}", root=tmp_path)
        same(ours, Flowers102(tmp_path, split=split, transform=fitted(16)))
    whole = data.load("flowers102", root=tmp_path)
    assert (whole.y.tolist(), whole.classes) == ([2, 101, 76, 2, 0], 102)
    assert whole.shape == (3, 224, 224)
    savemat(base / "setid.mat", {"trnid": [[6]], "valid": [["a"]]})
    refused("flowers102#train", "beyond the 5 labels", root=tmp_path)
    refused("flowers102#val", "not of integers", root=tmp_path)
    refused("flowers102#test", "tstid", root=tmp_path)
    savemat(base / "imagelabels.mat", {"labels": labels * 0})
    savemat(base / "setid.mat", {"trnid": [[1]]})
    refused("flowers102#train", "labels range from -1", root=tmp_path)
    (base / "imagelabels.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
    refused("flowers102#train", "imagelabels.mat", root=tmp_path)


def test_sets_under_a_root_say_where_they_looked(tmp_path: Path) -> None:
    for name, folder in (("gtsrb", "gtsrb/GTSRB"), ("flowers102", "jpg"), ("imagenet", "train")):
        refused(name, folder, root=tmp_path)
        refused(name, "none was named")


def test_nothing_is_downloaded_unasked_and_a_failed_download_is_an_answer(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from torchvision import datasets

    asked: list[str] = []

    def fail(*arguments: Any, **_: Any) -> None:
        asked.append(str(arguments[0]))
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.utils, "download_and_extract_archive", fail)
    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", fail)
    refused("cifar10", "there is no folder", root=tmp_path)
    assert asked == []
    refused("cifar10", "no route to host", root=tmp_path, download=True)
    refused("mnist", "no route to host", root=tmp_path, download=True)
    assert asked[0].startswith("https://")
    assert len(asked) > 1


def test_listing_a_folder_decodes_nothing_and_imports_no_torch(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    code = (
        "import sys; from mlflow_kdguard import data;"
        f"d = data.load({f'imagefolder:{tmp_path}/set?size=4'!r});"
        "assert len(d) == 5 and 'PIL' not in sys.modules;"
        "d.x; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
