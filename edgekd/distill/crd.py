"""Contrastive representation distillation (CRD, Tian et al., arXiv 1910.10699)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.base import Loss, Setting, Settings, Step, method
from edgekd.errors import ConfigError


def nce(scores: Tensor, log_mean: Tensor) -> Tensor:
    """Noise-contrastive estimation, summed over the K + 1 candidates and both directions, mean over the batch.

    scores: (2, B, 1 + K), similarity / T of each image with its positive and then its negatives; log_mean: (2,), log of
    the mean of exp(scores) that normalises them. It is the paper's equation 18 with h = P / (P + K / N),
    P = exp(score) / (N * mean): a sigmoid, which exp(1 / T) cannot overflow, and in which the N images cancel.
    """
    logit = scores - log_mean[:, None, None] - math.log(scores.shape[-1] - 1)
    each = F.logsigmoid(logit[..., 0]) + F.logsigmoid(-logit[..., 1:]).sum(-1)
    return -each.sum() / scores.shape[1]


class Contrast(nn.Module):
    """Embeddings of both networks' pooled features, and banks that remember them for every training image.

    Each image's embedding in one network is to be told from those of `negatives` images of other classes in the other
    network's bank. labels: of the training images by index; student, teacher: widths of the pooled features.
    """

    bank: Tensor
    log_mean: Tensor
    order: Tensor
    count: Tensor
    first: Tensor

    def __init__(
        self,
        labels: Sequence[int],
        *,
        student: int,
        teacher: int,
        width: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.negatives, self.temperature, self.momentum = negatives, temperature, momentum
        self.embed = nn.ModuleList([nn.Linear(student, width), nn.Linear(teacher, width)])
        self.register_buffer("bank", (2 * torch.rand(2, len(labels), width) - 1) * math.sqrt(3 / width))
        self.register_buffer("log_mean", torch.full((2,), math.nan))
        known = torch.tensor(labels)
        count = known.bincount()
        self.register_buffer("order", known.argsort(stable=True), persistent=False)
        self.register_buffer("count", count, persistent=False)
        self.register_buffer("first", count.cumsum(0) - count, persistent=False)

    def forward(self, step: Step) -> Tensor:
        each = [embed(pooled.float()) for embed, pooled in zip(self.embed, step.pooled())]
        embedded = F.normalize(torch.stack(each), dim=-1)  # (2, B, width)
        index = torch.cat([step.index[:, None], self.draw(step.target)], dim=1)
        similar = embedded.flip(0) @ self.bank.mT  # the student's with the teacher's bank, and the other way round
        scores = similar.gather(2, index.expand(2, -1, -1)) / self.temperature
        if self.log_mean.isnan().any():  # of the first batch, and then kept, as the authors' code does
            every = everyone(scores.detach()).flatten(1)
            self.log_mean = every.logsumexp(1) - math.log(every.shape[1])
        loss = nce(scores, self.log_mean)
        self.remember(step.index, embedded.detach())
        return loss

    def draw(self, target: Tensor) -> Tensor:
        """(B, K) indices of images of other classes, all of them equally likely, with replacement."""
        own, first = self.count[target, None], self.first[target, None]
        place = torch.randint(1 << 62, (len(target), self.negatives), device=target.device) % (len(self.order) - own)
        return self.order[place + own * (place >= first)]

    def remember(self, index: Tensor, embedded: Tensor) -> None:
        """Move the banks' entries of the images `index` (B,) towards `embedded` (2, B, width), on every process."""
        index, embedded = everyone(index[None])[0], everyone(embedded)
        mixed = self.momentum * self.bank[:, index] + (1 - self.momentum) * embedded
        self.bank = self.bank.index_copy(1, index, F.normalize(mixed, dim=-1))  # backward still needs the old one


def everyone(values: Tensor) -> Tensor:
    """What all processes have (n, B, …), one behind the other in the second dimension."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim=1)


@method("crd", weight=0.8, teacher=True, needs=("pooled",))
def crd(settings: Settings, setting: Setting) -> Loss:
    """`Contrast` with the paper's 16,384 negatives, temperature 0.07 and momentum 0.5.

    Raises:
        ConfigError: the training images are of one class, so that there are no negatives.
    """
    assert setting.teacher is not None
    if len(set(setting.labels)) < 2:
        raise ConfigError(
            f"method 'crd' tells images of different classes apart, and the training part has "
            f"{len(set(setting.labels))} class",
            fix="use images of two or more classes, or another method",
        )
    return Contrast(setting.labels, student=setting.student.pooled, teacher=setting.teacher.pooled)
