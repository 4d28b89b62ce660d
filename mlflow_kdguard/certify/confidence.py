"""The confidence p = 1 / (1 + Σ_j exp a_j) of one class in its m margins a_j = z_j - z_k.

For any multipliers, the largest gap of two confidences splits into a linear part, which the
backward pass bounds, and two constants (Lagrangian split):

    max p(a(x)) - p(b(x)) <= max_x [λ·a(x) + μ·b(x)] + upper_constant(λ) + lower_constant(μ)
    upper_constant = sup {p(a) - λ·a : a in its box},  lower_constant = sup {-p(b) - μ·b}.

Both constants hold for every λ <= 0 and μ >= 0 in real arithmetic up to `margin`.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from mlflow_kdguard.certify.rounding import gamma

_CORNERS = 5
"""Classes whose ends are enumerated in `lower_constant`; the others are bounded to first order."""

_HUGE = 1e290
"""Where exp is cut off: far above any number of which 1 / (1 + x) differs from 0 in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Margins:
    """Box of the margins: lo, hi, N×m each."""

    lo: Tensor
    hi: Tensor

    def joined(self, other: "Margins") -> "Margins":
        """These rows, then the others."""
        return Margins(torch.cat((self.lo, other.lo)), torch.cat((self.hi, other.hi)))


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Interval of the log-odds t = -LSE(margins) of a confidence: lo, hi, N each.

    A half of a band is one interval more on a sum of exponentials, so that a split of the output
    costs one dimension, whatever the number of classes.
    """

    lo: Tensor
    hi: Tensor

    @classmethod
    def of(cls, box: Margins) -> "Band":
        """What the box of the margins says."""
        return cls(_below(-torch.logsumexp(box.hi, -1)), _above(-torch.logsumexp(box.lo, -1)))

    @property
    def middle(self) -> Tensor:
        """Where a band is halved."""
        return (self.lo + self.hi) / 2

    def masses(self) -> tuple[Tensor, Tensor]:
        """Least and largest sum of exponentials, relaxed outwards: N each."""
        most = (-self.lo).exp()
        # What float64 cannot hold is no limit at all, and nothing is never the most.
        most = torch.where(most < _HUGE, most * (1.0 + _RELAXED), torch.inf).clamp(min=1.0 / _HUGE)
        # What is left of a few digits is no least either.
        least = _exp(-self.hi) * (1.0 - _RELAXED)
        return torch.where(least > 1.0 / _HUGE, least, 0.0), most


_RELAXED = 1e-9
"""How far ends of bands are moved outwards: far more than their exponentials can be wrong."""


def _below(x: Tensor) -> Tensor:
    """`x`, moved down by far more than it can be wrong."""
    return torch.where(x.isinf(), x, x - _RELAXED * (1.0 + x.abs()))


def _above(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), x, x + _RELAXED * (1.0 + x.abs()))


def tightened(box: Margins, band: Band) -> tuple[Margins, Band]:
    """Box and band, each cut to what the other leaves of it (both stay relaxed outwards)."""
    least, most = band.masses()
    # Sums over the other classes: a difference of sums would lose what is small beside the rest.
    others = 1.0 - torch.eye(box.lo.shape[-1], dtype=box.lo.dtype, device=box.lo.device)
    room = most[:, None] - (_exp(box.lo) @ others) * (1.0 - _RELAXED)
    need = least[:, None] - (_exp(box.hi) @ others) * (1.0 + _RELAXED)
    cut = Margins(
        torch.maximum(box.lo, _below(need.clamp(min=0.0).log())),
        torch.minimum(box.hi, _above(room.clamp(min=0.0).log())),
    )
    own = Band.of(Margins(torch.minimum(cut.lo, cut.hi), torch.maximum(cut.lo, cut.hi)))
    return cut, Band(torch.maximum(band.lo, own.lo), torch.minimum(band.hi, own.hi))


def probability(margins: Tensor) -> Tensor:
    """p = 1 / (1 + Σ exp a_j) over the last axis."""
    return torch.sigmoid(-torch.logsumexp(margins, -1))


def margin(classes: int, weights: Tensor, box: Margins) -> Tensor:
    """A-priori rounding error of a constant with multipliers `weights` (N×m): N.

    Every exp, log and division of the libraries is taken to be within 4 units in the last place.
    The log-odds themselves are sums of products of margins, and move the confidence by at most a
    quarter of their error, whatever the multipliers are. They lie within log(m + 1) of a margin.
    """
    size = torch.maximum(box.lo.abs(), box.hi.abs()).amax(-1) + math.log(classes)
    return gamma(64 + 8 * classes) * (4.0 + (1.0 + weights.abs().sum(-1)) * size)


@dataclass(frozen=True, slots=True, eq=False)
class Upper:
    """p(a) <= λ·a + constant: multipliers λ <= 0 (N×m) and the constant (N)."""

    weights: Tensor
    constant: Tensor


def upper_plane(box: Margins, at: Tensor, slope: Tensor, band: Band | None = None) -> Upper:
    """Tangent of log-sum-exp at margins `at` (N×m), then a line of `slope` in (0, 1/4] (N).

    LSE is convex, so t = -(tangent) >= -LSE; p <= sigmoid(t) <= slope t + c on t's interval, and
    c is the exact supremum: at an end or where sigmoid' = slope on the concave side. With a `band`
    p is at most its end, and t at least its beginning; c is -inf where nothing is left.
    """
    share = torch.softmax(at, -1)
    base = torch.logsumexp(at, -1) - (share * at).sum(-1)
    t_lo = -(base + (share * box.hi).sum(-1))
    t_hi = -(base + (share * box.lo).sum(-1))
    root = (1.0 - 4.0 * slope).clamp(min=0.0).sqrt()
    turn = torch.log((1.0 + root) ** 2 / (4.0 * slope))
    if band is None:
        points = torch.stack((t_lo, t_hi, turn.clamp(t_lo, t_hi).detach()), -1)
        best = (torch.sigmoid(points) - slope[..., None] * points).amax(-1)
        return Upper(-slope[..., None] * share, best - slope * base)
    t_lo, cap = torch.maximum(t_lo, _below(band.lo)), _above(band.hi)
    empty = (t_lo > _above(t_hi)).detach()
    turn = torch.minimum(torch.maximum(torch.minimum(turn, cap), t_lo), t_hi).detach()
    points = torch.stack((t_lo, t_hi, turn), -1)
    reached = torch.minimum(torch.sigmoid(points), torch.sigmoid(cap)[..., None])
    best = (reached - slope[..., None] * points).amax(-1).masked_fill(empty, -torch.inf)
    return Upper(-slope[..., None] * share, best - slope * base)


def lower_constant(box: Margins, weights: Tensor, band: Band | None = None) -> Tensor:
    """sup of -p(b) - μ·b over the box, for μ = `weights` >= 0 (N×m): N, differentiable in μ.

    In one coordinate -p is convex while that class has probability below 1/2, and at most one
    class can have more; so all coordinates but one are at ends of the box, and that one is at an
    end or where the derivative vanishes on the concave side. Ends are enumerated for the classes
    with the largest exp(hi); the rest enters through the tangent of the concave -1/(1+s).

    A `band` limits the sum of the exponentials. For a fixed sum, -μ·b is convex in the
    exponentials, so that ends of all coordinates but one are still enough; -inf where nothing is
    left. The sum is nowhere less than the band's least one: below it, -1/(1+s) may be replaced by
    its tangent there, which is what keeps the first-order terms small in a narrow band.
    Never above the sum of both terms' own suprema.
    """
    with torch.no_grad():
        best = _worst_point(box, weights.detach(), band)
        least = Band.of(box).lo if band is None else band.lo
    fixed = best.value + (weights.detach() * best.at).sum(-1)
    # What the classes beyond the enumerated ones add to first order can exceed all there is.
    plain = -torch.sigmoid(_below(least)) - (weights * box.lo).sum(-1)
    return torch.minimum(fixed - (weights * best.at).sum(-1), plain)


@dataclass(frozen=True, slots=True, eq=False)
class _Point:
    value: Tensor
    at: Tensor


def _worst_point(box: Margins, weights: Tensor, band: Band | None) -> _Point:
    order = box.hi.argsort(-1, descending=True)
    lo, hi, mu = (value.gather(-1, order) for value in (box.lo, box.hi, weights))
    top = min(lo.shape[-1], _CORNERS)
    bent = 1.0 + _exp(lo).sum(-1, keepdim=True)
    least = most = None
    if band is not None:
        least, most = (mass[:, None] for mass in band.masses())
        bent = torch.maximum(bent, 1.0 + least)
    rest, rest_at = _rest(lo, hi, mu, top, bent)
    edges, free = corners(top, lo.device)
    ends = torch.where(edges, hi[:, None, :top], lo[:, None, :top])
    pick = free[None, :, None].expand(len(lo), -1, 1)
    held = ends.scatter(-1, pick, -torch.inf)
    others = _exp(held).sum(-1)
    least_rest = _exp(lo[:, top:]).sum(-1, keepdim=True)
    c = (1.0 + others + least_rest).clamp(max=_HUGE)
    mu_free, low_end, high_end = mu[:, free], lo[:, free], hi[:, free]
    if least is not None and most is not None:
        need = least - others - _exp(hi[:, top:]).sum(-1, keepdim=True)
        low_end = torch.maximum(low_end, need.clamp(min=0.0).log())
        room = most - others - least_rest
        high_end = torch.minimum(high_end, room.clamp(min=0.0).log())
    empty = low_end > _above(high_end)
    q = (1.0 + (1.0 - 4.0 * c * mu_free).clamp(min=0.0).sqrt()) / 2.0
    turn = c.log() + (q * q / (c * mu_free).clamp(min=1.0 / _HUGE)).log()
    high_end = torch.maximum(low_end, high_end)
    turn = torch.minimum(torch.maximum(turn, low_end), high_end)
    b = torch.stack((low_end, high_end, turn))
    linear = (mu[:, None, :top] * ends.scatter(-1, pick, 0.0)).sum(-1)
    fallen = _fallen(c + _exp(b), bent)
    values = (fallen - mu_free * b - linear).masked_fill(empty, -torch.inf)
    value, which = values.transpose(0, 1).flatten(1).max(-1)
    rows = torch.arange(len(lo), device=lo.device)
    edge = which % len(edges)
    at_top = ends[rows, edge].scatter(
        -1, free[edge][:, None], b.transpose(0, 1).flatten(1)[rows, which][:, None]
    )
    at = torch.empty_like(lo).scatter_(-1, order, torch.cat((at_top, rest_at), -1))
    return _Point(value + rest, at)


@cache
def corners(top: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each free class, all ends of the other `top` - 1 classes: bool (top 2^(top-1))×top, and
    which class is free in each row (int64)."""
    rows = [
        [*ends[:j], False, *ends[j:]]
        for j in range(top)
        for ends in product((False, True), repeat=top - 1)
    ]
    edges = torch.tensor(rows, device=device)
    return edges, torch.arange(len(edges), device=device) // (len(edges) // top)


def _exp(x: Tensor) -> Tensor:
    return x.exp().clamp(max=_HUGE)


def _fallen(total: Tensor, bent: Tensor) -> Tensor:
    """-1 / total, and below `bent` its tangent there: concave, rising, and never less."""
    return torch.where(total < bent, (total - bent) / bent / bent - 1.0 / bent, -1.0 / total)


def _rest(lo: Tensor, hi: Tensor, mu: Tensor, top: int, bent: Tensor) -> tuple[Tensor, Tensor]:
    """First-order share of the classes beyond `top`: its supremum (N) and where it lies.

    `bent` (N×1): nothing rises faster than -1 / (1 + s) does where 1 + s is that.
    """
    exp_lo = _exp(lo)
    rate = bent**-2.0
    ends = torch.stack((lo, hi))[:, :, top:]
    scores = rate * (_exp(ends) - exp_lo[:, top:]) - mu[:, top:] * ends
    best, which = scores.max(0)
    at = torch.where(which == 0, ends[0], ends[1])
    return best.sum(-1), at


def interval_gap(high: Margins, low: Margins) -> Tensor:
    """Upper bound of p(a) - p(b) from the boxes alone: N."""
    return probability(high.lo) - probability(low.hi)


def linked_gap(high: Margins, low: Margins, difference: Margins) -> Tensor:
    """Upper bound of p(a) - p(b) from a - b in `difference`: N.

    log-odds t = -LSE differ by at most D = max_j (b_j - a_j), and sigmoid(t + D) - sigmoid(t) is
    largest at t = -D/2 (where it is tanh(D/4)) or, if that is out of reach, at the nearest t.
    """
    rise = (-difference.lo).amax(-1).clamp(min=0.0)
    t_lo, t_hi = -torch.logsumexp(low.hi, -1), -torch.logsumexp(low.lo, -1)
    t_lo = torch.maximum(t_lo, -torch.logsumexp(high.hi, -1) - rise)
    t = torch.minimum(torch.maximum(-rise / 2.0, t_lo), torch.maximum(t_hi, t_lo))
    return torch.sigmoid(t + rise) - torch.sigmoid(t)
