"""Proofs of bounds, and a checker that shares no code with the search: NumPy and the graph."""

from mlflow_kdguard.proof.check import Checker
from mlflow_kdguard.proof.document import Claim, Gaps, Proof
from mlflow_kdguard.proof.trees import Trees

__all__ = ["Checker", "Claim", "Gaps", "Proof", "Trees"]
