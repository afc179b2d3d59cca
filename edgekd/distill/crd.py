"""Contrastive representation distillation (CRD, Tian et al., arXiv 1910.10699)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.base import DistillationLoss, LossContext, Options, TrainingBatch
from edgekd.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions(Options):
    """Options of `crd`; the defaults are the paper's.

    Attributes:
        width: Width of the embeddings.
        negatives: Images of other classes that each image is compared with, K.
        temperature: Temperature T of the similarities, apart from the protocol's.
        momentum: Weight of the old embedding when a memory bank is updated.
    """

    width: int = 128
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5

    def __post_init__(self) -> None:
        for name in ("width", "negatives", "temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: {self.momentum} is not in 0..1")


class ContrastiveDistillation(DistillationLoss):
    """Noise-contrastive estimation between embeddings of both networks' pooled features.

    Memory banks keep the embedding of every training image. Each image's embedding in one network is to be
    distinguished from those of `negatives` images of other classes in the other network's bank.

    Raises:
        ConfigError: The training images are of one class, so that there are no negatives.
    """

    options = ContrastiveOptions
    weight = 0.8
    needs = ("pooled",)
    needs_teacher = True

    bank: Tensor
    log_mean: Tensor
    order: Tensor
    count: Tensor
    first: Tensor

    def __init__(self, options: ContrastiveOptions, context: LossContext) -> None:
        super().__init__(options, context)
        labels, width = context.labels, options.width
        if len(set(labels)) < 2:
            raise ConfigError(
                f"method 'crd' contrasts images of different classes, and the training images have "
                f"{len(set(labels))} class",
                fix="use images of two or more classes, or another method",
            )
        self.negatives, self.temperature, self.momentum = options.negatives, options.temperature, options.momentum
        self.embed = nn.ModuleList(nn.Linear(of.pooled, width) for of in (context.student, context.teacher))
        self.register_buffer("bank", (2 * torch.rand(2, len(labels), width) - 1) * math.sqrt(3 / width))
        self.register_buffer("log_mean", torch.full((2,), math.nan))
        known = torch.tensor(labels)
        count = known.bincount()
        self.register_buffer("order", known.argsort(stable=True), persistent=False)
        self.register_buffer("count", count, persistent=False)
        self.register_buffer("first", count.cumsum(0) - count, persistent=False)

    def forward(self, batch: TrainingBatch) -> Tensor:
        each = [embed(pooled.float()) for embed, pooled in zip(self.embed, batch.pooled_pair())]
        embedded = F.normalize(torch.stack(each), dim=-1)  # (2, B, width)
        index = torch.cat([batch.index[:, None], self.sample_negatives(batch.target)], dim=1)
        similar = embedded.flip(0) @ self.bank.mT  # the student's with the teacher's bank, and vice versa
        scores = similar.gather(2, index.expand(2, -1, -1)) / self.temperature
        if self.log_mean.isnan().any():  # estimated from the first batch and then kept, as in the authors' code
            every = gathered(scores.detach()).flatten(1)
            self.log_mean = every.logsumexp(1) - math.log(every.shape[1])
        loss = nce(scores, self.log_mean)
        self.update_bank(batch.index, embedded.detach())
        return loss

    def sample_negatives(self, target: Tensor) -> Tensor:
        """Draw indices (B, K) of images of other classes than `target` (B,), uniformly with replacement."""
        own, first = self.count[target, None], self.first[target, None]
        place = torch.randint(1 << 62, (len(target), self.negatives), device=target.device) % (len(self.order) - own)
        return self.order[place + own * (place >= first)]

    def update_bank(self, index: Tensor, embedded: Tensor) -> None:
        """Move the banks' entries of the images `index` (B,) towards `embedded` (2, B, width), on every process."""
        index, embedded = gathered(index[None])[0], gathered(embedded)
        mixed = self.momentum * self.bank[:, index] + (1 - self.momentum) * embedded
        self.bank = self.bank.index_copy(1, index, F.normalize(mixed, dim=-1))  # backward still needs the old one


def nce(scores: Tensor, log_mean: Tensor) -> Tensor:
    """Compute noise-contrastive estimation, summed over the K + 1 candidates and both directions, mean over the batch.

    This is the paper's equation 18 with h = P / (P + K / N), P = exp(score) / (N * mean), written as a sigmoid, which
    exp(1 / T) cannot overflow and in which the number of images N cancels.

    Args:
        scores: (2, B, 1 + K), similarity / T of each image with its positive and then its negatives.
        log_mean: (2,), logarithm of the mean of exp(scores), which normalises them.
    """
    logit = scores - log_mean[:, None, None] - math.log(scores.shape[-1] - 1)
    each = F.logsigmoid(logit[..., 0]) + F.logsigmoid(-logit[..., 1:]).sum(-1)
    return -each.sum() / scores.shape[1]


def gathered(values: Tensor) -> Tensor:
    """Concatenate the values (n, B, …) of all processes along the second dimension."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim=1)
