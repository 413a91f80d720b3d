"""Box head: pooled RoI features in, class logits and box deltas out.

Letters: R RoIs, Cls foreground classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tmask.model.init import xavier


class BoxHead(nn.Module):
    """Two fully connected layers, then one classifier and one box regressor for each class.

    `background`: whether the classifier has a column for it, as a softmax needs. `class_bias`: what the classifier
    begins with. Source: the FPN head of He et al. 2017, "Mask R-CNN", figure 4 right.
    """

    def __init__(
        self,
        *,
        channels: int,
        pool_size: int,
        hidden: int,
        num_classes: int,
        background: bool = True,
        class_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc6 = nn.Linear(channels * pool_size**2, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, num_classes if background else num_classes - 1)
        self.regressor = nn.Linear(hidden, 4 * num_classes)
        xavier([self.fc6, self.fc7])
        _init_predictors(self.classifier, self.regressor, class_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [R, channels, pool, pool] to logits [R, Cls + 1], or [R, Cls], and deltas [R, Cls + 1, 4]."""
        x = F.relu(self.fc6(x.flatten(1)))
        x = F.relu(self.fc7(x))
        return self.classifier(x), self.regressor(x).unflatten(1, (-1, 4))


class MeanBoxHead(nn.Module):
    """The mean over the bins, then classifier and regressor: for features that went through conv5 in the RoI heads.

    Arguments as `BoxHead`. Source: the ResNet-C4 head of He et al. 2017, "Mask R-CNN", figure 4 left.
    """

    def __init__(self, *, channels: int, num_classes: int, background: bool = True, class_bias: float = 0.0) -> None:
        super().__init__()
        self.classifier = nn.Linear(channels, num_classes if background else num_classes - 1)
        self.regressor = nn.Linear(channels, 4 * num_classes)
        _init_predictors(self.classifier, self.regressor, class_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [R, channels, pool, pool] to logits [R, Cls + 1], or [R, Cls], and deltas [R, Cls + 1, 4]."""
        x = x.mean((2, 3))
        return self.classifier(x), self.regressor(x).unflatten(1, (-1, 4))


def _init_predictors(classifier: nn.Linear, regressor: nn.Linear, class_bias: float) -> None:
    """Small enough that training starts from near-uniform classes and unmoved boxes: Girshick 2015, section 2.3."""
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.constant_(classifier.bias, class_bias)
    nn.init.normal_(regressor.weight, std=0.001)
    nn.init.zeros_(regressor.bias)
