"""Box head: pooled RoI features in, class logits and box deltas out.

Letters: R RoIs, C classes with background.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # variance 1 / fan_in
            nn.init.zeros_(layer.bias)
        # Small enough that training starts from near-uniform classes and unmoved boxes: Girshick 2015, section 2.3.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.constant_(self.classifier.bias, class_bias)
        nn.init.normal_(self.regressor.weight, std=0.001)
        nn.init.zeros_(self.regressor.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [R, channels, pool, pool] to logits [R, C], or [R, C - 1], and deltas [R, C, 4]."""
        x = F.relu(self.fc6(x.flatten(1)))
        x = F.relu(self.fc7(x))
        return self.classifier(x), self.regressor(x).unflatten(1, (-1, 4))
