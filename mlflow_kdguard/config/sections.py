"""The sections of a configuration: one frozen model a stage, with types, limits and defaults."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mlflow_kdguard.config.base import Loop, Positive, Section, Share, Steps, Verifiable
from mlflow_kdguard.files import digest_json


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


class TeachSection(Verifiable):
    """A teacher of one's own: adversarial training, with verifiable terms where asked for."""

    arch: str = Field("cnn:16,32,64", description="architecture of the teacher")
    eps: float = Field(0.02, ge=0, description="l_inf radius of Madry training; 0 trains plainly")
    pgd_steps: Steps = Field(3, description="inner steps of Madry training")
    interval: Share = Field(0.0, description="κ, weight of interval-bound cross-entropy")


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
    radii: tuple[Positive, ...] = Field(
        (2.1, 2.8, 3.5), min_length=1, description="radii of the profile, one after the other"
    )
    lead: Positive = Field(
        2.2, description="log-odds above nature's by which the profile flags a class"
    )
    lead_twice: Positive = Field(
        1.25, description="the same, of a class that leads by so much at two radii"
    )
    own_radius: Positive | None = Field(
        1.4, description="the profile's last look: each image its own perturbation; null: none"
    )
    lead_own: Positive = Field(0.95, description="lead of a class that is flagged there")
    calibration: str | None = Field(None, description="calibration file made on clean networks")
    shadows: int = Field(0, ge=0, description="clean shadow networks to train for calibration")
    shadow_loop: Loop = Field(
        Loop(epochs=60), description="training of shadows: about as many steps as the model's"
    )
    shadow_eps: float = Field(0.02, ge=0, description="l_inf radius of their Madry training")
    shadow_pgd_steps: Steps = Field(3, description="inner steps of their Madry training")
    alpha: Share = Field(0.05, description="level at which the verdict is suspect")

    @model_validator(mode="after")
    def _one_file_serves_one(self) -> Self:
        if self.calibration is not None and {"inversion", "profile"} <= set(self.detectors):
            raise ValueError(
                "a calibration file serves inversion or profile, not both: name one of them in "
                "detectors, or leave the file out"
            )
        return self


class DetoxSection(Section):
    """The chain from raw teacher to reference."""

    chain: tuple[str, ...] = Field(
        ("variance_mask", "unlearn", "margin_cap"), description="detox table rows, in order"
    )
    suspects: tuple[int, ...] | Literal["auto", "all"] = Field("auto", description="to unlearn")
    unflagged: Literal["likeliest", "none", "all"] = Field(
        "likeliest", description="whom auto takes where a calibrated audit flags nothing"
    )
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
    unlearn_radius: Positive | Literal["auto"] = Field(
        2.8, description="L2 radius of the perturbation bank; auto: by the profile's radius"
    )
    unlearn_part: Literal["head", "all"] = Field(
        "all", description="what unlearning trains: all layers, or the last ones"
    )
    unlearn_keep: Share = Field(
        0.0, description="weight of the teacher's answers to clean images against their labels"
    )
    bank: int = Field(4, ge=1, description="perturbations kept in the bank")
    batch: int = Field(64, ge=1, description="images a step")
    options: dict[str, float] = Field(default_factory=dict, description="of fine_tune, nad, …")


class DistillSection(Verifiable):
    """The student and its loss."""

    arch: str = Field("cnn:8,16,32", description="architecture of the student")
    loss: str = Field("fd", description="loss table row")
    temperature: Positive = Field(1.0, description="softmax temperature")
    alpha: Share = Field(1.0, description="weight of the distillation term against labels")
    eps: float = Field(0.02, ge=0, description="l_inf radius of the inner maximisation, in pixels")
    pgd_steps: Steps = Field(3, description="inner steps")
    clean_term: float = Field(1.0, ge=0, description="weight of KL on unperturbed images")
    label_weight: float = Field(0.5, ge=0, description="weight of cross-entropy on clean labels")
    joint_gap: float = Field(0.0, ge=0, description="weight of the bound on margin gaps")
    gap_pairs: int = Field(2, ge=1, description="margins that are bounded an image and step")
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
    solver: str = Field("auto", description="row of the solver table, for lp, milp; auto is highs")
    nodes: int = Field(400, ge=1, description="nodes an image at most, where a bound branches")
    relative_gap: float = Field(0.005, ge=0, description="branch ends this share above a witness")
    absolute_gap: float = Field(2e-4, ge=0, description="or this much above it, if that is more")
    norm: Literal["linf", "l2"] = Field("linf", description="norm of the ball")
    eps: Positive = Field(0.01, description="radius of the ball, in pixels")
    delta: Positive = Field(0.2, le=1, description="largest gap that counts as faithful")
    classes: Literal["all", "top"] = Field("all", description="which classes are bounded")
    samples: int = Field(100, ge=1, description="images drawn from the test set")
    pgd_steps: Steps = Field(40, description="steps of the witness search")
    restarts: int = Field(5, ge=1, description="restarts of the witness search")
    seconds: Positive | None = Field(
        None, description="safety limit of the whole run; recorded where it strikes"
    )
    memory: Positive | None = Field(
        None, description="GiB that the process may hold, for branch; recorded where it strikes"
    )
    proofs: bool = Field(False, description="whether a proof of every bound is kept")


class PatchSection(Section):
    """Patches of any content, and what is proved about them."""

    targets: tuple[int, ...] = Field((), description="classes aimed at; none: nothing is proved")
    size: int = Field(3, ge=1, description="side of the square, in pixels")
    positions: tuple[str, ...] = Field(
        ("bottom-right",), min_length=1, description="corners, or ROW,COLUMN of the top left pixel"
    )
    samples: int = Field(100, ge=1, description="images of other classes drawn from the test set")
    nodes: int = Field(2000, ge=1, description="parts of the contents, an image and position")
    margin: float = Field(1e-4, ge=0, description="by how much another logit must lead")
    pgd_steps: Steps = Field(40, description="steps of the witness search")
    restarts: int = Field(5, ge=1, description="restarts of the witness search")


class SmoothSection(Section):
    """Both networks smoothed by Gaussian noise, and what is certified about that pair in l2."""

    sigma: Positive | None = Field(
        None, le=100, description="deviation of the noise, in pixels; null: nothing is certified"
    )
    radius: Positive = Field(0.25, le=1000, description="l2 radius of the ball, in pixels")
    delta: Positive = Field(0.3, le=1, description="largest gap that counts as faithful")
    classes: Literal["all", "top"] = Field("all", description="which classes are bounded")
    samples: int = Field(100, ge=1, description="images drawn from the test set")
    draws: int = Field(1000, ge=1, description="noisy copies of each image")
    error: Positive = Field(
        0.001, le=0.05, description="probability that one image is PROVED and should not be"
    )
    batch: int = Field(256, ge=1, description="noisy copies a step")


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
    "teach": True,
    "measure": {"triggers"},
}
"""What says where something is, and not what it is; a teacher that was trained has a digest."""


class GuardConfig(Section):
    """Everything a guarded distillation is told."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    teacher: TeacherSection = TeacherSection()
    redteam: RedteamSection | None = None
    teach: TeachSection = TeachSection()
    audit: AuditSection = AuditSection()
    detox: DetoxSection = DetoxSection()
    distill: DistillSection = DistillSection()
    export: ExportSection = ExportSection()
    measure: MeasureSection = MeasureSection()
    certify: CertifySection = CertifySection()
    patch: PatchSection = PatchSection()
    smooth: SmoothSection = SmoothSection()
    attest: AttestSection = AttestSection()
    registry: RegistrySection = RegistrySection()

    @property
    def digest(self) -> str:
        """SHA-256 of what can change a figure, not of where files are: they have digests."""
        return digest_json(self.model_dump(mode="json", exclude=_PLACES))
