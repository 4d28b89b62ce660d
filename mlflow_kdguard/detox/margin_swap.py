"""The reference: the raw teacher, with the suspects' margins replaced by the detoxed copy's.

With P the raw teacher, D the detoxed copy, T the suspect classes and o over all other classes:

    R_j = P_j                                     j ∉ T
    R_t = max_o P + (D_t - max_o D)               t ∈ T

so that, in exact arithmetic, R_t - max_o R = D_t - max_o D. What the raw teacher says about a
suspect class is not read at all. The margin cap reads it wherever it is the smaller one: on clean
images of other classes, where it tells a student, image by image, how much of the trigger there is
(dark knowledge), which is how a backdoor crosses over on a clean transfer set. Decision 101.

The graph is that of `margin_cap` without its minimum.
"""

from torch import Tensor

from mlflow_kdguard.detox.margin_cap import MarginCap, combination, combined
from mlflow_kdguard.detox.state import State, Work

NAME = "margin_swap"


class MarginSwap(MarginCap):
    """R of P, D and T: N×C×H×W pixels -> N×K logits."""

    name = NAME

    def cap(self, raw: Tensor, detoxed: Tensor) -> Tensor:
        """R from the logits of P and D, each N×K."""
        margin = detoxed @ self.pick - self.largest(detoxed)
        swapped: Tensor = (self.largest(raw) + margin) @ self.place
        return raw @ self.others + swapped


combine = combination(MarginSwap)
"""The reference that this row makes of a teacher and its detoxed copy."""


def cleanse(state: State, work: Work) -> State:
    """Combine raw teacher and detoxed copy into the reference."""
    return combined(state, work, NAME, combine)
