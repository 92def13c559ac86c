"""Weight standardization: convolutions whose weights have mean 0 and deviation 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


def standardize(weight: Tensor) -> Tensor:
    """The weight of each output unit, less its mean, divided by its deviation.

    The deviation is the unbiased one and ``EPS`` is added to it, not to the variance, as in the
    reference. By the chain rule the gradient of ``weight`` is centered.
    """
    std, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True)
    return (weight - mean) / (std + EPS)


class StandardizedConv2d(nn.Conv2d):
    """A convolution that standardizes its weight in every forward pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for it
        """Convolve with the standardized weight."""
        return F.conv2d(
            input,
            standardize(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
