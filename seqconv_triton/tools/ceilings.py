"""What a device does at most in a second: bytes, FLOPs and, on a GPU, warp instructions."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second, read and written, and FLOPs a second of matrix products, two a multiply-add."""

    bytes_per_second: float
    operations_per_second: float

    def roofline(self, operations: float, moved: float) -> float:
        """Seconds: no less than this, whatever the code."""
        return max(operations / self.operations_per_second, moved / self.bytes_per_second)


@dataclass(frozen=True)
class Gpu(Ceilings):
    """The defaults are an H200's: its copies and bfloat16 products as measured, its usual clock in cycles a second."""

    bytes_per_second: float = 4.3e12
    operations_per_second: float = 780e12
    multiprocessors: int = 132
    clock: float = 1.755e9
    name: str = "H200"

    @property
    def issues_per_second(self) -> float:
        """Warp instructions: four schedulers a multiprocessor, one a cycle."""
        return self.multiprocessors * 4 * self.clock

    def in_tf32(self) -> Gpu:
        """Products of float32 have half the rate."""
        return replace(self, operations_per_second=self.operations_per_second / 2)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.bytes_per_second / 1e12:.3g} TB/s, {self.operations_per_second / 1e12:.3g} TFLOP/s, "
            f"{self.multiprocessors} × 4 warp instructions a cycle at {self.clock / 1e9:.4g} GHz"
        )


# One GPU of each architecture whose machine code can be counted; all but the H200's figures are those of data sheets.
GPUS = {
    "sm_80": Gpu(2.039e12, 312e12, 108, 1.41e9, "A100 80 GB"),
    "sm_86": Gpu(0.936e12, 71e12, 82, 1.695e9, "RTX 3090"),
    "sm_89": Gpu(1.008e12, 165e12, 128, 2.52e9, "RTX 4090"),
    "sm_90": Gpu(),
    "sm_120": Gpu(1.792e12, 209e12, 170, 2.407e9, "RTX 5090"),
}
