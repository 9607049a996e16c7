"""Run sentence-transformers (version 5 or newer) with the same weights, texts, precision and optimizer as ours."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from experiments.bench.workload import TASK, Workload
from lightning_modules.encoders.backbone import quiet_transformers
from lightning_modules.encoders.export import save_dense

PEER = "sentence-transformers"
DEFAULT_BATCH = 32  # default batch size of its encode()
LOSSES = ("sentence_transformers.sentence_transformer.losses", "sentence_transformers.losses")  # since 6.2; before


def peer_version() -> str | None:
    """Return the installed version, or None."""
    return importlib.metadata.version(PEER) if importlib.util.find_spec("sentence_transformers") else None


def attentions(workload: Workload) -> list[str]:
    """Return the implementations of attention to measure: SDPA, and FlashAttention if it is installed."""
    has_flash = workload.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    return ["sdpa", "flash_attention_2"] if has_flash and workload.precision in ("bf16", "fp16") else ["sdpa"]


class Peer:
    """sentence-transformers with the weights of our Vanilla encoder.

    attention: "sdpa" or "flash_attention_2".
    """

    def __init__(self, workload: Workload, attention: str = "sdpa"):
        self.workload, self.attention = workload, attention

    def model(self, dtype: torch.dtype, dropout: float = 0.0) -> Any:
        """Load the model. dropout: rate for hidden states and attention weights."""
        from sentence_transformers import SentenceTransformer

        quiet_transformers()
        folder = self.workload.folder / "dense"
        if not folder.exists():
            save_dense(self.workload.encoder(), TASK, folder)
        return SentenceTransformer(
            str(folder),
            device=str(self.workload.device),
            model_kwargs={"dtype": dtype, "attn_implementation": self.attention},
            config_kwargs={"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
        )

    @cached_property
    def encoder(self) -> Any:
        """The model for inference, with weights of the workload's type."""
        return self.model(self.workload.dtype).eval()

    def encode(self, texts: Sequence[str], batch_size: int) -> Any:
        """Return the vectors (n, D) of texts, on the host."""
        return self.encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False)

    @torch.inference_mode()
    def forward(self, batches: Sequence[dict[str, Any]]) -> None:
        """Compute the vectors of batches that are on the device."""
        for features in batches:
            self.encoder(dict(features))

    def features(self, model: Any, texts: Sequence[str]) -> dict[str, Any]:
        """Tokenise and pad a batch, and move it to the device."""
        features = getattr(model, "preprocess", model.tokenize)(list(texts))
        return {k: v.to(self.workload.device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}

    def sorted_batches(self, texts: Sequence[str], batch_size: int) -> list[dict[str, Any]]:
        """Return texts as batches on the device, sorted by length, as encode() does."""
        ordered = sorted(texts, key=len)
        starts = range(0, len(ordered), batch_size)
        return [self.features(self.encoder, ordered[start : start + batch_size]) for start in starts]

    def training_step(
        self, pairs: int, dropout: float, hard_negatives: int = 1, mini_batch: int = 0
    ) -> Callable[[], None]:
        """Return a function that takes a training step with MultipleNegativesRankingLoss.

        Texts are tokenised beforehand. mini_batch: chunk size of its GradCache; 0: no GradCache.
        """
        workload, model = self.workload, self.model(torch.float32, dropout).train()
        module = losses()
        scale = {"scale": 20.0}  # the inverse of our temperature
        if mini_batch:
            loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch, **scale)
        else:
            loss = module.MultipleNegativesRankingLoss(model, **scale)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        columns = 2 + hard_negatives
        texts = list(itertools.islice(itertools.cycle(workload.texts), columns * pairs))
        features = [self.features(model, texts[i * pairs : (i + 1) * pairs]) for i in range(columns)]

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with workload.computing():
                value = loss([dict(column) for column in features], None)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step

    def search(self, queries: torch.Tensor, documents: torch.Tensor, k: int) -> Any:
        """Return the k best documents of each query."""
        from sentence_transformers.util import semantic_search

        return semantic_search(queries, documents, top_k=k)


def losses() -> Any:
    """Return the module with the losses of sentence-transformers."""
    for name in LOSSES:
        if importlib.util.find_spec(name):
            return importlib.import_module(name)
    raise ImportError(f"{PEER} has no losses at {' or '.join(LOSSES)}")
