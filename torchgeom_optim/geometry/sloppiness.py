"""How sloppy a spectrum is, in numbers: decades, slope, stiff fraction, effective dimension, shares of the trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sloppiness", "linear_range", "num_for_trace_share", "sloppiness", "trace_share"]


@dataclass(frozen=True)
class Sloppiness:
    r"""Numbers of one spectrum lam_1 >= lam_2 >= ... >= lam_n; each states the threshold that it depends on.

    Source: Cowlagi & Chaudhari, "Does the geometry of the data control the geometry of neural predictions?", which
    describes spectra by "less than 5 % stiff", the "slope of the linear (sloppy) range" and the trace, and defines
    none of the three; the definitions are ours.

    Attributes:
        num_eigenvalues: n.
        roundoff: eigenvalues at or below it are not told from zero; in the eigenvalues' units.
        rank: eigenvalues above it, r.
        decades: log10(lam_1 / lam_r).
        slope: of log10 lam over ``slope_range``, in decades per eigenvalue; negative; nan if r < 3.
        slope_per_rank: slope times r: decades that the linear range would fall by if it were the whole spectrum.
            Comparable between spectra of different length.
        slope_range: first and last index (from 0, the last included) of the longest stretch that a line fits.
        slope_misfit: root mean square distance from the line, in decades; at most the ``misfit`` asked for.
        stiff_threshold: relative to lam_1.
        num_stiff: eigenvalues of at least stiff_threshold * lam_1.
        stiff_fraction: num_stiff / n.
        damping: relative to lam_1.
        effective_dimension: sum lam / (lam + damping * lam_1), the number of directions that the data determine against
            a prior (or a regulariser) of that strength (MacKay 1992, "Bayesian interpolation").
        participation_ratio: (sum lam)^2 / sum lam^2, an effective dimension without a threshold.
        trace: sum of all eigenvalues, in their units.
        num_for_90_percent: how many of the largest make up nine tenths of the trace.
    """

    num_eigenvalues: int
    roundoff: float
    rank: int
    decades: float
    slope: float
    slope_per_rank: float
    slope_range: tuple[int, int]
    slope_misfit: float
    stiff_threshold: float
    num_stiff: int
    stiff_fraction: float
    damping: float
    effective_dimension: float
    participation_ratio: float
    trace: float
    num_for_90_percent: int

    def __str__(self) -> str:
        first, last = self.slope_range
        lines = [
            f"{self.rank} of {self.num_eigenvalues} eigenvalues above round-off ({self.roundoff:.2g}), over "
            f"{self.decades:.1f} decades; trace {self.trace:.4g}",
            f"{self.num_stiff} ({self.stiff_fraction:.1%}) are stiff: at least {self.stiff_threshold:g} of the "
            f"largest; {self.num_for_90_percent} make up 90 % of the trace",
            f"effective dimension {self.effective_dimension:.1f} (damping {self.damping:g} of the largest), "
            f"participation ratio {self.participation_ratio:.1f}",
        ]
        if not math.isnan(self.slope):
            fall = -self.slope * (last - first)
            lines.append(f"numbers {first + 1} to {last + 1} fall evenly, by {fall:.1f} decades in all")
        return "\n".join(lines)


def sloppiness(
    eigenvalues: Tensor,
    *,
    roundoff: float | None = None,
    stiff_threshold: float = 1e-2,
    damping: float = 1e-3,
    misfit: float = 0.1,
) -> Sloppiness:
    """The numbers of a complete spectrum; they do not change when it is scaled, ``roundoff`` and ``trace`` aside.

    Args:
        eigenvalues: [n], all of them, in any order; those that are zero by construction left out or not, which
            ``stiff_fraction`` alone feels.
        roundoff: see :class:`Sloppiness`; by default n eps lam_1.
        stiff_threshold: relative to the largest eigenvalue, in (0, 1].
        damping: relative to the largest eigenvalue, in (0, inf).
        misfit: decades (root mean square) by which the linear range may differ from a line.

    Returns:
        The numbers.

    Raises:
        ValueError: not a vector of finite numbers, none above round-off, or an argument out of range.

    Example:
        >>> numbers = sloppiness(10.0 ** -torch.arange(0, 5, 0.1, dtype=torch.float64))
        >>> round(numbers.decades, 6), round(numbers.slope, 6), numbers.num_stiff
        (4.9, -0.1, 21)
    """
    if not 0.0 < stiff_threshold <= 1.0:
        raise ValueError(f"stiff_threshold={stiff_threshold}: must be in (0, 1], relative to the largest; try 1e-2.")
    if not 0.0 < damping < math.inf:
        raise ValueError(f"damping={damping}: must be in (0, inf), relative to the largest eigenvalue; try 1e-3.")
    values = _checked(eigenvalues)
    largest = float(values[0])
    if roundoff is None:
        roundoff = len(values) * torch.finfo(eigenvalues.dtype).eps * abs(largest)
    if not 0.0 <= roundoff < math.inf:
        raise ValueError(f"roundoff={roundoff}: must be in [0, inf), in the units of the eigenvalues.")
    rank = int((values > roundoff).sum())
    if rank == 0:
        raise ValueError(
            f"largest eigenvalue {largest:.3g}: one above round-off ({roundoff:.3g}) is needed. Does what was "
            "differentiated depend on the weights at all, or are all centred inputs equal?"
        )
    logs = values[:rank].log10()
    first, last, slope, distance = linear_range(logs, misfit)
    stiff = int((values >= stiff_threshold * largest * (1 - 1e-12)).sum())
    positive = values.clamp(min=0.0)
    return Sloppiness(
        num_eigenvalues=len(values),
        roundoff=roundoff,
        rank=rank,
        decades=float(logs[0] - logs[-1]),
        slope=slope,
        slope_per_rank=slope * rank,
        slope_range=(first, last),
        slope_misfit=distance,
        stiff_threshold=stiff_threshold,
        num_stiff=stiff,
        stiff_fraction=stiff / len(values),
        damping=damping,
        effective_dimension=float((positive / (positive + damping * largest)).sum()),
        participation_ratio=float(positive.sum().square() / positive.square().sum()),
        trace=float(values.sum()),
        num_for_90_percent=num_for_trace_share(values, 0.9),
    )


def linear_range(values: Tensor, misfit: float = 0.1) -> tuple[int, int, float, float]:
    """The longest stretch of a sequence that a straight line fits; of equally long ones the best fitted.

    Ends are looked for on a grid of at most 128 indices, which both ends of the sequence belong to.

    Args:
        values: [n].
        misfit: root mean square distance from the line that is allowed, in (0, inf).

    Returns:
        First index, last index (included), slope per index, root mean square distance. (0, n - 1, nan, nan) for
        n < 3.

    Raises:
        ValueError: the misfit is out of range.
    """
    if not 0.0 < misfit < math.inf:
        raise ValueError(f"misfit={misfit}: must be in (0, inf); 0.1 decades is a common start.")
    n = len(values)
    if n < 3:
        return 0, n - 1, math.nan, math.nan
    y = values.double().cpu()
    y = y - y.mean()  # sums of squares then cancel less
    x = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    sums = [torch.cat([y.new_zeros(1), term.cumsum(0)]) for term in (x, y, x * x, x * y, y * y)]
    ends = torch.tensor(sorted({round(n * i / 127) for i in range(128)}))
    start, stop = (grid.reshape(-1) for grid in torch.meshgrid(ends, ends, indexing="ij"))
    long_enough = stop - start >= 3
    start, stop = start[long_enough], stop[long_enough]
    length = stop - start
    sx, sy, sxx, sxy, syy = ((s[stop] - s[start]) / length for s in sums)
    var_x, cov, var_y = sxx - sx * sx, sxy - sx * sy, syy - sy * sy
    distance = (var_y - cov * cov / var_x).clamp(min=0.0).sqrt()
    fits = distance <= misfit
    # Three neighbours may miss any line too; then the best fitted of the shortest is all that there is.
    score = torch.where(fits, length.double() - distance / (misfit + distance), -distance)
    best = int(score.argmax())
    slope = float(cov[best] / var_x[best])
    return int(start[best]), int(stop[best]) - 1, slope, float(distance[best])


def trace_share(eigenvalues: Tensor, num: int, trace: float | None = None) -> float:
    """What the largest eigenvalues make up of the trace.

    Args:
        eigenvalues: [n], the largest at least.
        num: how many.
        trace: of the whole matrix; by default the sum of the eigenvalues, which are then all of them.

    Returns:
        A share in [0, 1], up to the error of the trace.

    Raises:
        ValueError: more eigenvalues than there are; a trace that is not positive.
    """
    values = _checked(eigenvalues)
    total = float(values.sum()) if trace is None else trace
    if not 0 <= num <= len(values):
        raise ValueError(f"num={num}: must be in [0, {len(values)}], the eigenvalues there are. Compute more of them.")
    if not 0.0 < total < math.inf:
        raise ValueError(f"trace {total}: must be in (0, inf). Is the matrix zero?")
    return float(values[:num].sum()) / total


def num_for_trace_share(eigenvalues: Tensor, share: float, trace: float | None = None) -> int:
    """How many of the largest eigenvalues make up at least that share of the trace.

    Args:
        eigenvalues: [n], the largest at least.
        share: in (0, 1].
        trace: of the whole matrix; by default the sum of the eigenvalues.

    Returns:
        The number.

    Raises:
        ValueError: share out of range, or more than the given eigenvalues make up.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share={share}: must be in (0, 1]; 0.9 is a common choice.")
    values = _checked(eigenvalues).clamp(min=0.0)
    reached = values.cumsum(0)
    total = float(reached[-1]) if trace is None else trace
    enough = (reached >= share * total * (1 - 1e-12)).nonzero()
    if len(enough) == 0:
        raise ValueError(
            f"share={share}: the {len(values)} eigenvalues make up {float(reached[-1]) / total:.3g} of the trace. "
            "Compute more of them."
        )
    return int(enough[0]) + 1


def _checked(eigenvalues: Tensor) -> Tensor:
    if eigenvalues.dim() != 1 or len(eigenvalues) == 0 or not bool(torch.isfinite(eigenvalues).all()):
        raise ValueError(
            f"eigenvalues of shape {list(eigenvalues.shape)}: a vector of at least one finite number is needed. Look "
            "for nan with torch.isfinite."
        )
    return eigenvalues.detach().double().sort(descending=True).values
