"""What a guarded distillation is told: one frozen section a stage.

Sources, later ones win: the packaged `plugin.yaml`, the user's file, `--set section.key=value`.
Unknown keys are errors. What only the caller may grant (keys, the policy, `--trust-code`,
`--download`) has no field here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_kdguard import plain_yaml
from mlflow_kdguard.errors import ConfigError
from mlflow_kdguard.files import digest_json, read_bytes

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Epochs = Annotated[int, Field(ge=0)]
Steps = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every section: frozen, closed to unknown keys, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    """Where and how everything runs."""

    seed: int = Field(0, ge=0, description="seed of every random draw")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes CUDA if present")
    threads: int = Field(0, ge=0, description="CPU threads; 0 keeps the library's default")
    work_dir: str = Field("kdguard-work", description="folder for checkpoints and results")


class DataSection(Section):
    """Images, by URI (`docs/reference/data.md`)."""

    transfer: str = Field("mnist5k#train[:3500]", description="images to distil the student on")
    clean: str = Field("mnist5k#train[3500:]", description="small, trusted, labelled set")
    test: str = Field("mnist5k#test", description="held-out labelled images for every figure")
    root: str | None = Field(None, description="folder of torchvision data sets")
    labelled: bool = Field(False, description="whether labels of the transfer set may be used")


class Loop(Section):
    """One training run: SGD with Nesterov momentum under a one-cycle schedule."""

    epochs: Epochs = Field(10, description="passes over the data")
    batch: int = Field(128, ge=1, description="images a step")
    lr: Positive = Field(0.08, description="peak learning rate")
    momentum: Share = Field(0.9, description="Nesterov momentum")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")
    augment: Literal["none", "shift", "shift-flip"] = Field("shift", description="augmentation")
    shift: int = Field(2, ge=0, description="largest shift in pixels")
    amp: Literal["off", "bfloat16", "float16"] = Field("off", description="autocast type")
    channels_last: bool = Field(False, description="memory format of images")
    checkpoint_seconds: Positive = Field(10.0, description="longest work that a kill can lose")


class TeacherSection(Section):
    """The teacher that was not trained here."""

    model: str | None = Field(None, description="file or models:/name/version")
    arch: str | None = Field(None, description="architecture, where the file holds weights only")
    mean: tuple[float, ...] = Field((), description="mean a channel, where weights stand alone")
    std: tuple[float, ...] = Field((), description="deviation a channel, likewise")
    name: str | None = Field(None, description="registered model name to store the teacher under")


class RedteamSection(Section):
    """Evaluation only: make a poisoned teacher and a contaminated transfer set."""

    attack: str = Field("badnets", description="row of the attack table")
    target: int = Field(0, ge=0, description="class that triggered images are sent to")
    options: dict[str, float] = Field(default_factory=dict, description="options of the attack")
    arch: str = Field("cnn:16,32,64", description="architecture of the poisoned teacher")
    train: str = Field("mnist5k#train[:3500]", description="what the teacher is trained on")
    eps: float = Field(0.02, ge=0, description="l_inf radius of Madry training; 0 trains plainly")
    pgd_steps: Steps = Field(3, description="inner steps of Madry training")
    clean_loop: Loop = Field(Loop(epochs=12), description="clean training")
    poison_loop: Loop = Field(
        Loop(epochs=6, lr=0.03, augment="none"), description="poisoned training after it"
    )
    poison_rate: Share = Field(0.05, description="triggered copies among the teacher's images")
    contamination: Share = Field(0.05, description="triggered copies in the transfer set")


class AuditSection(Section):
    """Which detectors are asked, and what calibrates them."""

    detectors: tuple[str, ...] = Field(
        ("variance", "inversion"), min_length=1, description="detector table rows"
    )
    radius: Positive = Field(2.1, description="L2 radius of the universal perturbation, in pixels")
    steps: Steps = Field(25, description="ascent steps a class")
    batch: int = Field(64, ge=1, description="images a step")
    calibration: str | None = Field(None, description="calibration file made on clean networks")
    shadows: int = Field(0, ge=0, description="clean shadow networks to train for calibration")
    shadow_loop: Loop = Field(
        Loop(epochs=60), description="training of shadows: about as many steps as the model's"
    )
    shadow_eps: float = Field(0.02, ge=0, description="l_inf radius of their Madry training")
    shadow_pgd_steps: Steps = Field(3, description="inner steps of their Madry training")
    alpha: Share = Field(0.05, description="level at which the verdict is suspect")


class DetoxSection(Section):
    """The chain from raw teacher to reference."""

    chain: tuple[str, ...] = Field(
        ("variance_mask", "unlearn", "margin_cap"), description="detox table rows, in order"
    )
    suspects: tuple[int, ...] | Literal["auto"] = Field("auto", description="classes to unlearn")
    max_drop: Share = Field(0.02, description="largest loss of clean validation accuracy")
    validation: Share = Field(0.2, description="share of the clean set kept for validation")
    layers: tuple[str, ...] | Literal["auto"] = Field("auto", description="tapped layers")
    preset: Literal["reference", "paper"] = Field("reference", description="form of the mask")
    variance: Literal["A", "B", "C", "none"] = Field("A", description="variance term")
    variance_weight: float = Field(1.0, ge=0, description="weight of the variance term")
    mask_cap: Share = Field(0.9, description="largest mask value (blend form)")
    mask_steps: Steps = Field(300, description="Adam steps on the mask")
    mask_lr: Positive = Field(0.02, description="learning rate of the mask")
    unlearn_steps: Steps = Field(200, description="SGD steps of unlearning")
    unlearn_lr: Positive = Field(0.02, description="peak learning rate of unlearning")
    unlearn_radius: Positive = Field(2.8, description="L2 radius of the perturbation bank")
    bank: int = Field(4, ge=1, description="perturbations kept in the bank")
    batch: int = Field(64, ge=1, description="images a step")


class DistillSection(Loop):
    """The student and its loss."""

    arch: str = Field("cnn:8,16,32", description="architecture of the student")
    loss: str = Field("fd", description="loss table row")
    temperature: Positive = Field(1.0, description="softmax temperature")
    alpha: Share = Field(1.0, description="weight of the distillation term against labels")
    eps: float = Field(0.02, ge=0, description="l_inf radius of the inner maximisation, in pixels")
    pgd_steps: Steps = Field(3, description="inner steps")
    clean_term: float = Field(1.0, ge=0, description="weight of KL on unperturbed images")
    label_weight: float = Field(0.5, ge=0, description="weight of cross-entropy on clean labels")
    feature: str | None = Field(None, description="feature loss table row, added to the loss")
    feature_weight: float = Field(1.0, ge=0, description="weight of the feature loss")


class ExportSection(Section):
    """How networks become ONNX."""

    opset: int = Field(18, ge=18, le=21, description="ONNX operator set")
    parity_images: int = Field(1000, ge=1, description="images on which outputs are compared")


class MeasureSection(Section):
    """Triggers whose success rate is measured."""

    triggers: tuple[str, ...] = Field((), description="trigger files, FILE[:CLASS]")
    recovered: bool = Field(True, description="also measure triggers that audits inverted")
    batch: int = Field(256, ge=1, description="images a step")


class CertifySection(Section):
    """The bounds that are asked for."""

    method: str = Field("auto", description="row of the bound table; auto is crown")
    nodes: int = Field(400, ge=1, description="nodes an image at most, where a bound branches")
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball")
    eps: Positive = Field(0.01, description="radius of the ball, in pixels")
    delta: Positive = Field(0.2, le=1, description="largest gap that counts as faithful")
    classes: Literal["all", "top"] = Field("all", description="which classes are bounded")
    samples: int = Field(100, ge=1, description="images drawn from the test set")
    pgd_steps: Steps = Field(40, description="steps of the witness search")
    restarts: int = Field(5, ge=1, description="restarts of the witness search")
    seconds: Positive | None = Field(None, description="safety limit; recorded when it strikes")


class AttestSection(Section):
    """The certificate."""

    expires_after_days: Positive = Field(90.0, description="validity of the certificate")


class RegistrySection(Section):
    """The MLflow server and the names used there."""

    tracking_uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI")
    registry_uri: str | None = Field(None, description="default: the tracking URI's server")
    experiment: str = Field("kdguard", description="experiment of the pipeline's runs")
    model_name: str = Field("kdguard-student", description="registered model of the student")
    alias: str = Field("champion", description="alias that a passing student is given")


_PLACES: dict[str, Any] = {
    "registry": True,
    "run": {"work_dir"},
    "data": {"transfer", "clean", "test", "root"},
    "teacher": {"model", "name"},
    "measure": {"triggers"},
}
"""What says where something is, and not what it is."""


class GuardConfig(Section):
    """Everything a guarded distillation is told."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    teacher: TeacherSection = TeacherSection()
    redteam: RedteamSection | None = None
    audit: AuditSection = AuditSection()
    detox: DetoxSection = DetoxSection()
    distill: DistillSection = DistillSection()
    export: ExportSection = ExportSection()
    measure: MeasureSection = MeasureSection()
    certify: CertifySection = CertifySection()
    attest: AttestSection = AttestSection()
    registry: RegistrySection = RegistrySection()

    @property
    def digest(self) -> str:
        """SHA-256 of what can change a figure, not of where files are: they have digests."""
        return digest_json(self.model_dump(mode="json", exclude=_PLACES))


def load(
    path: Path | None = None,
    overrides: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
) -> GuardConfig:
    """Read a configuration file and apply `section.key=value` overrides, values in YAML.

    `named` holds values by `section.key` that are text as they stand, such as paths.
    Raises ConfigError naming the file, the key and what would be right.
    """
    values = read_mapping(path, "the configuration") if path is not None else {}
    for override in overrides:
        _assign(values, override)
    for key, text in (named or {}).items():
        place = _section(values, key.split("."), key)
        place[key.rpartition(".")[2]] = text
    return parse(values, str(path) if path is not None else "--set")


def parse(values: Mapping[str, Any], where: str) -> GuardConfig:
    """Validate a mapping; ConfigError names `where` and every wrong key."""
    try:
        return GuardConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {explain(error)}", remedy="See `kdguard run --help`."
        ) from error


def explain(error: ValidationError) -> str:
    """One line for all of pydantic's complaints: key, what is wrong, what was given."""
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in item["loc"]) or "(document)"
        what = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        lines.append(f"{key}: {what}")
    return "; ".join(lines) + "."


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file that holds one mapping; ConfigError otherwise."""
    try:
        values = plain_yaml.parse(read_bytes(path, what=what))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold sections such as `distill:`.")
    return values


def _assign(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"--set {override!r} does not name a value.", remedy="Write section.key=value."
        )
    place = _section(values, parts, override)
    try:
        place[parts[-1]] = plain_yaml.parse(text)
    except ValueError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML.") from error


def _section(values: dict[str, Any], parts: Sequence[str], override: str) -> dict[str, Any]:
    """The mapping that holds the last of `parts`, made where it is missing."""
    place = values
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {part} is not a section.")
        place = inner
    return place
