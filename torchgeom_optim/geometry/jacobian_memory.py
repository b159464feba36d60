"""What an operation with a Jacobian will take, predicted before it is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["JacobianMemoryError", "MemoryPlan"]

# Larger mini-batches than this bring no speed on a CPU, whose caches they leave.
_WORKING_BYTES = 2**28
_VECTORS_AT_ONCE = 32
_PIECE_BYTES = 2**26
_ADVICE = {
    "product": "Take fewer vectors at once, or a smaller batch_size.",
    "transposed_product": "Take fewer vectors at once, or a smaller batch_size.",
    "rows": "Give a smaller batch_size, or fewer parameters.",
    "dense": "Use products, rows() or gram(), which do not hold J, or fewer samples.",
    "gram": "Use products J @ (J.T @ u), of a spectrum num_eigenvalues=50, or fewer samples.",
}


class JacobianMemoryError(MemoryError):
    """An operation would take more memory than was allowed; nothing was computed.

    Attributes:
        needed: bytes predicted.
        allowed: the limit in bytes.
    """

    def __init__(self, operation: str, needed: int, allowed: float, advice: str) -> None:
        super().__init__(
            f"{operation} would take {_readable(needed)}: memory_limit allows {_readable(allowed)}. {advice}"
        )
        self.needed = needed
        self.allowed = allowed


@dataclass
class MemoryPlan:
    """How many samples and vectors to take at once, and the bytes that this takes.

    Args:
        num_samples: N.
        num_outputs: C.
        num_weights: P.
        item: bytes of one number.
        saved: bytes that one sample's forward pass keeps for its backward pass.
        limit: bytes allowed for one operation.
        batch_size: the user's number of samples per pass, or None.
        largest: samples in the largest mini-batch that the data has.
        twice_backward: products by J keep the graph of a backward pass too.
        factors: bytes per sample that J J' keeps of the layers' factors, and of the patches that it takes of one of
            them; None if it goes through rows.
    """

    num_samples: int
    num_outputs: int
    num_weights: int
    item: int
    saved: int
    limit: float
    batch_size: int | None
    largest: int
    twice_backward: bool = False
    factors: tuple[int, int] | None = None

    def allow(self, operation: str, num_vectors: int = 1) -> None:
        """Raise unless the operation keeps within the limit.

        Raises:
            JacobianMemoryError: it does not.
        """
        needed = self.predicted(operation, num_vectors)
        if needed > self.limit:
            raise JacobianMemoryError(operation, needed, self.limit, _ADVICE[operation])

    def predicted(self, operation: str, num_vectors: int = 1) -> int:
        """Bytes at the operation's peak; see :meth:`Jacobian.predicted_bytes`.

        Args:
            operation: its name.
            num_vectors: k, for products.

        Returns:
            Bytes, result included, weights and data excluded.

        Raises:
            ValueError: unknown operation, or no vector.
        """
        if operation not in _ADVICE or not num_vectors >= 1:
            raise ValueError(
                f"operation={operation!r}, num_vectors={num_vectors}: must be one of {', '.join(map(repr, _ADVICE))}, "
                "and at least one vector."
            )
        rows, size = self.num_samples * self.num_outputs, self.num_weights
        if operation in ("product", "transposed_product"):
            at_once = self.vectors_at_once(num_vectors)
            vectors = self.item * (rows * num_vectors + size * (num_vectors + 2 * at_once + 1))
            return vectors + self.samples_per_pass(operation, at_once) * self._per_sample(operation, at_once)
        block = self.samples_per_pass("rows") * self._per_sample("rows")
        if operation == "rows":
            return block
        if operation == "dense":
            return self.item * rows * size + block
        if self.factors is not None and (needed := self._by_factors(self.factors)) <= self.limit:
            return needed
        held = self.samples_held() * self.num_outputs * size * self.item
        return 2 * self.item * rows * rows + held + block

    def gram_by_factors(self) -> bool:
        """Whether J J' goes through the layers' factors: they are known, and there is room for those of all samples."""
        return self.factors is not None and self._by_factors(self.factors) <= self.limit

    def _by_factors(self, factors: tuple[int, int]) -> int:
        rows = self.num_samples * self.num_outputs
        # The products and their copies, two pieces of rows, the factors while they are joined, one pass.
        pieces = 2 * min(_PIECE_BYTES, rows * self.num_weights * self.item)
        kept, patches = factors
        passes = self.samples_per_pass("factors") * self._per_sample("factors")
        return 3 * self.item * rows * rows + pieces + self.num_samples * (2 * kept + patches) + passes

    def vectors_at_once(self, num_vectors: int) -> int:
        """Vectors that share a pass."""
        return min(num_vectors, _VECTORS_AT_ONCE)

    def samples_per_pass(self, operation: str, num_vectors: int = 1) -> int:
        """Samples in one mini-batch: the user's number, or what there is room for, and at least one."""
        if self.batch_size is not None:
            return min(self.batch_size, self.largest)
        room = min(_WORKING_BYTES, self.limit)
        return max(1, min(int(room // max(1, self._per_sample(operation, num_vectors))), self.largest))

    def samples_held(self) -> int:
        """Samples whose rows J J' holds at once."""
        rows, size = self.num_samples * self.num_outputs, self.num_weights
        at_least = min(self.samples_per_pass("rows"), self.num_samples)
        room = self.limit - 2 * self.item * rows * rows - at_least * self._per_sample("rows")
        if room == math.inf:
            return self.num_samples
        return max(at_least, min(self.num_samples, int(room // (self.item * self.num_outputs * size))))

    def _per_sample(self, operation: str, num_vectors: int = 1) -> int:
        if operation == "factors":
            kept = 0 if self.factors is None else self.factors[0]
            return self.saved * (2 + 2 * self.num_outputs) + kept
        if operation == "rows":
            # Every output's cotangent at the widest layers, and each gradient by itself and in its block.
            return self.saved * (2 + self.num_outputs) + 2 * self.num_outputs * self.num_weights * self.item
        kept = 3 if operation == "product" and self.twice_backward else 2
        return self.saved * (kept + num_vectors) + self.num_outputs * self.item * num_vectors


def _readable(size: float) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
