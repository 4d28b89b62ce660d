"""`train`: distil a student towards a reference."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mlflow_kdguard import extensions
from mlflow_kdguard.config import DistillSection
from mlflow_kdguard.data import Dataset, concat
from mlflow_kdguard.distill.look import Look, Row, Term
from mlflow_kdguard.distill.verifiable import regularisers
from mlflow_kdguard.errors import ModelError
from mlflow_kdguard.nets.zoo import Classifier
from mlflow_kdguard.records import Progress, silent
from mlflow_kdguard.training import Batch, Fitted, derive, evaluating, fit, state_sha256

__all__ = ["Look", "Row", "Term", "train"]


def train(
    student: nn.Module,
    reference: nn.Module,
    transfer: Dataset,
    clean: Dataset,
    *,
    config: DistillSection,
    seed: int,
    device: torch.device,
    checkpoint: Path | None = None,
    progress: Progress = silent,
    features_from: nn.Module | None = None,
) -> Fitted:
    """Train `student` in place towards `reference`, on the transfer and the clean images together.

    loss = config.loss + feature_weight · config.feature + label_weight · CE on labelled images,
    and the terms of `verifiable.regularisers`.
    Labels of transfer images count where they are known: pass `transfer.unlabelled()` where they
    must not. The reference (and `features_from`, the network whose features are matched) stays
    as it is, in evaluation mode. Resumes from `checkpoint` as `training.fit` does.

    Raises ModelError where the two networks do not fit each other or the images, ConfigError for
    an unknown loss, UsageError where features cannot be matched, and what `fit` raises.
    """
    data = concat(transfer, clean, f"{transfer.uri} + {clean.uri}")
    source = reference if features_from is None else features_from
    for net in (student, reference, source):
        net.to(device)
    with evaluating(reference, source):
        _check(student, reference, data, device)
        terms = _terms(config, student, reference, source, shape=data.shape, seed=seed)
        return fit(
            student,
            data,
            partial(_loss, reference, terms, config),
            config,
            seed=seed,
            device=device,
            what="student",
            checkpoint=checkpoint,
            progress=progress,
            along=_along(terms),
            depends=state_sha256(reference, source),
        )


Weighted = list[tuple[float, Term]]


def _terms(
    config: DistillSection,
    student: nn.Module,
    reference: nn.Module,
    source: nn.Module,
    *,
    shape: tuple[int, int, int],
    seed: int,
) -> Weighted:
    """The terms of the loss with their weights; fresh connectors are drawn from `seed`."""
    named = [(1.0, config.loss)]
    if config.feature is not None:
        named.append((config.feature_weight, config.feature))
    terms: Weighted = []
    with evaluating(student), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "connectors"))
        for weight, name in named:
            row: Row = extensions.load("loss", name)
            term = row(
                config, student=student, reference=reference, features_from=source, shape=shape
            )
            terms.append((weight, term))
    return terms


def _loss(
    reference: nn.Module,
    terms: Weighted,
    config: DistillSection,
    student: nn.Module,
    batch: Batch,
) -> Tensor:
    tapped = tuple(dict.fromkeys(name for _, term in terms for name in term.taps))
    look = Look(student, reference, batch, tapped)
    loss = regularisers(config, look)
    for weight, term in terms:
        loss = loss + weight * term.value(look)
    return loss if config.label_weight == 0 else loss + config.label_weight * look.labels


def _along(terms: Weighted) -> nn.Module:
    return nn.ModuleList(term.along for _, term in terms if term.along is not None)


def _check(student: nn.Module, reference: nn.Module, data: Dataset, device: torch.device) -> None:
    """ModelError where student or reference cannot read the images, or name other classes."""
    here = _width("student", student, data, device)
    there = _width("reference", reference, data, device)
    if here != there:
        raise ModelError(
            f"the student names {here} classes and the reference {there}.",
            remedy="Build the student for the reference's classes.",
        )


def _width(name: str, net: nn.Module, data: Dataset, device: torch.device) -> int:
    """Number of classes that the net answers with."""
    remedy = "Distil on images like those that it was made for."
    what = f"the {name} does not take images of shape {data.shape}"
    if isinstance(net, Classifier) and net.architecture.shape != data.shape:
        # Not left to the call below: broadcasting lets grey images into a colour network.
        raise ModelError(f"{what}: it is made for {net.architecture.shape}.", remedy=remedy)
    try:
        with evaluating(net), torch.no_grad():
            logits: Tensor = net(torch.full((2, *data.shape), 0.5, device=device))
            return logits.shape[1]
    except (RuntimeError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{what}: {reason}.", remedy=remedy) from error
