"""Configuration: every key known, every value in range, every error naming its key."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlflow_kdguard import config
from mlflow_kdguard.errors import ConfigError, UsageError


def _written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_without_anything_the_defaults_hold() -> None:
    assert config.load() == config.GuardConfig()


def test_a_file_then_overrides(tmp_path: Path) -> None:
    file = _written(tmp_path / "g.yaml", "distill: {epochs: 3, lr: 0.1}\nrun: {seed: 4}\n")
    loaded = config.load(file, ["distill.epochs=5", "redteam.clean_loop.epochs=2"])
    assert loaded.distill.epochs == 5
    assert loaded.distill.lr == 0.1
    assert loaded.run.seed == 4
    assert loaded.redteam is not None
    assert loaded.redteam.clean_loop.epochs == 2


def test_what_is_dumped_loads_as_the_same(tmp_path: Path) -> None:
    full = config.GuardConfig(redteam=config.RedteamSection())
    file = _written(tmp_path / "g.yaml", yaml.safe_dump(full.model_dump(mode="json")))
    assert config.load(file) == full
    assert config.load(file).digest == full.digest


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("distil: {epochs: 3}", "distil: unknown key"),
        ("distill: {epoch: 3}", "distill.epoch: unknown key"),
        ("distill: {epochs: -1}", "distill.epochs"),
        ("distill: {lr: .nan}", "distill.lr"),
        ("distill: {lr: .inf}", "distill.lr"),
        ("certify: {eps: -0.1}", "certify.eps"),
        ("certify: {eps: 0}", "certify.eps"),
        ("certify: {delta: 1.5}", "certify.delta"),
        ("certify: {norm: l7}", "certify.norm"),
        ("detox: {suspects: none}", "detox.suspects"),
        ("run: {device: tpu}", "run.device"),
        ("redteam: {clean_loop: {epoch: 1}}", "redteam.clean_loop.epoch: unknown key"),
        ("policy: {}", "policy: unknown key"),
        ("trust_code: true", "trust_code: unknown key"),
        ("distill: 3", "distill"),
        ("- a", "must hold sections"),
        ("3: {}", "must hold sections"),
        ("just words", "must hold sections"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "not valid YAML"),
    ],
)
def test_errors_name_the_file_and_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, names: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = _written(tmp_path / "g.yaml", text)
    with pytest.raises(ConfigError) as caught:
        config.load(file)
    assert names in caught.value.message
    assert str(file) in caught.value.message
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "override",
    ["", "=", "seed=1", "run.seed", "run.=1", ".seed=1", "run..seed=1", "run.seed.x=1",
     "run.seed=[", "run.sead=1", "run.seed=-1", "run.seed=one"],
)  # fmt: skip
def test_overrides_that_make_no_sense(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(None, ["run.seed=3", override])
    assert "--set" in caught.value.message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "latin").write_bytes(b"run: {work_dir: \xff\xfe}")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(tmp_path / "latin")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty"):
        config.load(tmp_path / "empty")


def test_digest_is_about_figures_only() -> None:
    base = config.parse({}, "test")
    same: list[dict[str, Any]] = [
        {"run": {"work_dir": "elsewhere"}},
        {"registry": {"model_name": "other"}},
        {"teacher": {"model": "elsewhere/teacher.onnx"}},
        {"data": {"transfer": "npz:elsewhere.npz", "root": "elsewhere"}},
        {"measure": {"triggers": ["elsewhere/patch.kdt:1"]}},
        {"teach": {"eps": 0.3}},
    ]
    for values in same:
        assert config.parse(values, "test").digest == base.digest
    other: list[dict[str, Any]] = [
        {"run": {"seed": 1}},
        {"distill": {"eps": 0.03}},
        {"redteam": {}},
        {"measure": {"recovered": False}},
    ]
    digests = {config.parse(values, "test").digest for values in other}
    assert len(digests | {base.digest}) == len(other) + 1


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.GuardConfig().run.seed = 3  # type: ignore[misc]


def test_every_field_says_what_it_is() -> None:
    for name, field in config.GuardConfig.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(k for k in kinds if isinstance(k, type) and issubclass(k, config.Section))
        for key, inner in section.model_fields.items():
            assert inner.description, f"{name}.{key}"
            assert not inner.is_required(), f"{name}.{key}"


def test_nothing_that_only_the_caller_may_grant_has_a_field() -> None:
    keys = {key for s in config.GuardConfig().model_dump().values() if s for key in s}
    assert not keys & {"policy", "key", "keys", "trust_code", "download", "signers"}


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    """Whatever is typed ends in a configuration or a ConfigError, never in a raw error."""
    with contextlib.suppress(ConfigError):
        config.load(None, [f"{key}={value}", f"run.{key}={value}"])
    with contextlib.suppress(ConfigError):
        config.load(None, [f"run.seed={value}"])


@pytest.mark.parametrize("text", ["my dir #2/t.onnx", "a: b.onnx", "123", "null", "yes", "[x"])
def test_named_values_are_text_as_they_stand(text: str) -> None:
    loaded = config.load(None, ["teacher.model=other"], {"teacher.model": text})
    assert loaded.teacher.model == text


def test_named_values_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"run\.device"):
        config.load(None, [], {"run.device": "tpu"})
    assert config.load(None, [], {"redteam.target": "3"}).redteam is not None
