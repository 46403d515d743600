"""The classifier as the published networks start it, for the paper's numbers of classes."""

from __future__ import annotations

import math

from torch import nn

from seqconv_triton.nn.leaf import leaf


class PublishedClassifier(nn.Linear):
    """An nn.Linear that starts uniform in (−b, b), b = √(3 / out_features), with biases of zero.

    That is for hundreds of classes: with ten, logits have a standard deviation of 2 to 9, and the first cross entropy
    is up to eight times chance.
    """

    forward = leaf(nn.Linear.forward)

    @classmethod
    def of(cls, linear: nn.Linear) -> PublishedClassifier:
        """With the very parameters of `linear`, started anew."""
        new = cls(linear.in_features, linear.out_features, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.start()
        return new

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.start()

    def start(self) -> None:
        bound = math.sqrt(3 / self.out_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
