"""Both constants of the confidence split in float32, with their derivatives; see `confidence`.

What does not depend on the multipliers is computed once for all steps of a descent. These numbers
steer; the constants that a bound rests on are those of `confidence`.
"""

import torch
from torch import Tensor

from mlflow_kdguard.certify.confidence import Band, Margins, corners

_LIMIT = 80.0
"""Margins beyond this do not change a confidence in float32."""


class Low:
    """sup of -p(b) - μ·b over box and band: see `confidence.lower_constant`."""

    def __init__(self, box: Margins, band: Band, top: int = 5) -> None:
        self.order = box.hi.argsort(-1, descending=True)
        lo, hi = (v.gather(-1, self.order).clamp(-_LIMIT, _LIMIT).float() for v in (box.lo, box.hi))
        self.lo, self.hi = lo, hi
        self.top = top = min(top, lo.shape[-1])
        edges, self.free = corners(top, lo.device)
        own = torch.nn.functional.one_hot(self.free, top).bool()
        self.at_hi = (edges & ~own).float()
        self.at_lo = (~edges & ~own).float()
        e_lo, e_hi = lo.exp(), hi.exp()
        others = e_lo[:, :top] @ self.at_lo.T + e_hi[:, :top] @ self.at_hi.T
        rest = e_lo[:, top:].sum(-1, keepdim=True), e_hi[:, top:].sum(-1, keepdim=True)
        least, most = (
            (-end).clamp(-_LIMIT, _LIMIT).float().exp()[:, None] for end in (band.hi, band.lo)
        )
        self.plain = -torch.sigmoid(band.lo).float()
        self.c = 1.0 + others + rest[0]
        first = torch.maximum(e_lo[:, self.free], least - others - rest[1])
        last = torch.minimum(e_hi[:, self.free], most - others - rest[0])
        self.empty = first > last * (1.0 + 1e-5)
        self.first, self.last = first, torch.maximum(first, last)
        self.first_log = first.log()
        self.least = 1.0 + torch.maximum(e_lo.sum(-1, keepdim=True), least)
        self.at_first = self._fallen(self.c + first)
        self.rate = self.least**-2.0
        self.rest_value = self.rate * (e_hi[:, top:] - e_lo[:, top:])

    def _fallen(self, total: Tensor) -> Tensor:
        """-1 / total, and its tangent at the least total below it."""
        tangent = (total / self.least - 2.0) / self.least
        return torch.where(total < self.least, tangent, -1.0 / total)

    def worst(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The constant (N) and the margins b at which it is attained (N×m)."""
        top = self.top
        mu = weights.gather(-1, self.order)
        low, high = mu[:, :top] * self.lo[:, :top], mu[:, :top] * self.hi[:, :top]
        linear = low @ self.at_lo.T + high @ self.at_hi.T
        own = mu[:, self.free]
        q = (1.0 + (1.0 - 4.0 * self.c * own).clamp(min=0.0).sqrt()) / 2.0
        turn = torch.minimum(torch.maximum(q * q / own, self.first), self.last)
        turn_log = turn.log()
        values = torch.stack(
            (self.at_first - own * self.first_log, self._fallen(self.c + turn) - own * turn_log)
        )
        value, side = values.max(0)
        value = (value - linear).masked_fill(self.empty, -torch.inf)
        best, edge = value.max(-1)
        pick = edge[:, None]
        free = torch.where(side == 0, self.first_log, turn_log).gather(1, pick)
        hi_side = self.at_hi[edge] > 0.0
        at = torch.where(hi_side, self.hi[:, :top], self.lo[:, :top])
        at = at.scatter(1, self.free[edge][:, None], free)
        rest_lo, rest_hi = self.lo[:, top:], self.hi[:, top:]
        ends = torch.stack((-mu[:, top:] * rest_lo, self.rest_value - mu[:, top:] * rest_hi))
        gain, which = ends.max(0)
        at = torch.cat((at, torch.where(which == 0, rest_lo, rest_hi)), 1)
        value, plain = best + gain.sum(-1), self.plain - torch.linalg.vecdot(mu, self.lo)
        at = torch.where((plain < value)[:, None], self.lo, at)
        return torch.minimum(value, plain), torch.empty_like(at).scatter_(-1, self.order, at)


class High:
    """The plane above p over box and band: see `confidence.upper_plane`."""

    def __init__(self, box: Margins, band: Band) -> None:
        self.lo, self.hi = (v.clamp(-_LIMIT, _LIMIT).float() for v in (box.lo, box.hi))
        self.run = self.hi - self.lo
        self.first, self.cap = (v.clamp(-_LIMIT, _LIMIT).float() for v in (band.lo, band.hi))

    def plane(self, where: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers λ (N×m) and constant (N), for tangents at `where` in [0, 1]^m of the box."""
        self.at = torch.addcmul(self.lo, where, self.run)
        self.share = share = torch.softmax(self.at, -1)
        self.slope = slope
        self.base = torch.logsumexp(self.at, -1) - torch.linalg.vecdot(share, self.at)
        self.at_lo, self.at_hi = (torch.linalg.vecdot(share, end) for end in (self.lo, self.hi))
        t_hi = -(self.base + self.at_lo)
        from_box = -(self.base + self.at_hi)
        t_lo = torch.maximum(from_box, self.first)
        root = (1.0 - 4.0 * slope).clamp(min=0.0).sqrt()
        turn = torch.minimum(torch.log((1.0 + root) ** 2 / (4.0 * slope)), self.cap)
        points = torch.stack((t_lo, torch.minimum(torch.maximum(turn, t_lo), t_hi)))
        values = torch.minimum(torch.sigmoid(points), torch.sigmoid(self.cap)) - slope * points
        best, which = values.max(0)
        self.t = points.gather(0, which[None])[0]
        self.ended_hi = self.t >= t_hi
        self.ended_lo = (self.t <= t_lo) & (from_box >= self.first) & ~self.ended_hi
        self.capped = self.t > self.cap
        return -slope[:, None] * share, best - slope * self.base

    def gradients(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of λ·a + constant in `where` (N×m) and in the slope (N), at margins a."""
        share, k = self.share, self.slope[:, None]
        along = torch.linalg.vecdot(share, a)
        in_slope = -along - self.t - self.base
        # How base + share·end changes with the tangent point, for ends lo and hi.
        bend = share * (self.at - torch.linalg.vecdot(share, self.at)[:, None])
        in_at = -k * share * (a - along[:, None]) + k * bend
        p = torch.sigmoid(self.t)
        steep = torch.where(self.capped, 0.0, p * (1.0 - p)) - self.slope
        for ended, end, value in (
            (self.ended_hi, self.lo, self.at_lo),
            (self.ended_lo, self.hi, self.at_hi),
        ):
            moved = bend - share * (end - value[:, None])
            in_at = in_at + torch.where(ended, steep, 0.0)[:, None] * moved
        return in_at * self.run, in_slope
