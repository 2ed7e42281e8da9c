"""Second moments of what a site reads or writes, for initialisations that choose directions (ReGLU and `inputs`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.examples import Example, collate, micro_batches
from ..errors import NumericError
from ..forward import Progress, answer_hidden
from ..sites import Site, tap


@torch.no_grad()
def second_moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    examples: Sequence[Example],
    *,
    of_inputs: bool,
    token_budget: int,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """C = E[z z^T] over all real tokens (prompt and answer, padding left out), uncentred, per site, float32.

    z is the site's output including its bias (shape of C: (out, out)), or with `of_inputs` its input ((in, in)). For an
    expert the mean runs over all tokens of the data, those routed elsewhere counting as zero. Paper: ReGLU, arXiv
    2604.17396.
    """
    total: dict[str, Tensor] = {}
    tokens = 0
    mask = torch.empty(0)

    def observe(site: Site, x: Tensor, y: Tensor) -> None:
        z = (x if of_inputs else y)[mask].float()
        total[site.name] = total.get(site.name, 0) + z.T @ z

    with tap(model, sites, forward=observe):
        for group in micro_batches([len(e) for e in examples], token_budget):
            batch = collate([examples[i] for i in group]).to(model.device)
            mask = batch.attention_mask.bool()
            answer_hidden(model, batch)
            tokens += int(mask.sum())
            if progress:
                progress(len(group))
    for site in sites:
        size = site.shape[1] if of_inputs else site.shape[0]
        moment = total.setdefault(site.name, torch.zeros(size, size, device=model.device)).div_(tokens)
        if not torch.isfinite(moment).all():
            raise NumericError(f"activations: the second moments of site '{site.name}' are not finite.")
    return total
