"""A judge that is trained on the data: a transformer reads "query [SEP] paper" and predicts whether the paper is a
positive.

No model judges a pair that it has seen. The queries are divided into folds, and the judge of each fold is trained on
the other folds to tell positives from mined negatives. False negatives among these are label noise. Finding label
errors with out-of-sample predictions is known as confident learning (arXiv 1911.00068).

Shapes: n pairs of query and paper.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from datamodules.files import atomic_folder
from datamodules.progress_lines import ProgressLines
from datamodules.records import UserError
from datamodules.text import input_text
from lightning_modules.distributed.collectives import from_first_rank, rank, together
from lightning_modules.encoders.backbone import check_family, check_size, installed, reading
from lightning_modules.mining.filters import text_hashes
from lightning_modules.mining.relabel import Judge, JudgeContext, Pairs
from lightning_modules.optim import schedule

log = logging.getLogger(__name__)

WARM_UP = 0.1  # share of steps during which the learning rate rises
NUM_CHECKED = 500  # number of positives to score per fold, to log the judge's quality


class CrossEncoderJudge(Judge):
    """Score by a cross-encoder that is trained on the positives and mined negatives of other queries.

    The score is a probability. Each training batch has as many positives as negatives, so 0.5 is undecided.

    model: backbone to start from: folder or hub name of a transformer, or package:NAME.
    folds: number of folds. Each fold is judged by a model that is trained on the other folds.
    steps: number of optimizer steps of each model.
    batch_size: number of pairs in a batch.
    lr: peak learning rate of AdamW.
    max_length: maximum number of tokens of a pair.
    """

    def __init__(
        self,
        model: str,
        drop_above: float | None = 0.5,
        positive_above: float | None = None,
        folds: int = 2,
        steps: int = 1000,
        batch_size: int = 32,
        lr: float = 5e-5,
        max_length: int = 256,
        seed: int = 0,
    ):
        super().__init__(drop_above, positive_above)
        if folds < 2:
            raise UserError(f"folds: expected at least 2, so that no model judges a pair that it has seen, got {folds}")
        if steps < 1 or batch_size < 2 or max_length < 5:
            given = f"{steps}, {batch_size} and {max_length}"
            raise UserError(f"steps, batch_size, max_length: expected at least 1, 2 and 5, got {given}")
        self.model, self.folds, self.steps, self.batch_size = model, folds, steps, batch_size
        self.lr, self.max_length, self.seed = lr, max_length, seed
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """Hash of the backbone's weights."""
        if not self._fingerprint:
            model, _ = self._load(installed(self.model))
            digest = hashlib.blake2b(digest_size=8)
            for name, tensor in model.base_model.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def judge(self, pairs, context):
        scores = from_first_rank(together(lambda: self._scores(pairs, context) if rank() == 0 else None))
        return [self.by_score(part) for part in np.split(scores, np.cumsum([len(p.queries) for p in pairs])[:-1])]

    def _scores(self, pairs: Sequence[Pairs], context: JudgeContext) -> np.ndarray:
        """Return the probability of each mined document of all pools, (n,)."""
        table = PairTable.of(pairs)
        fold_of_pair = table.folds(self.folds, self.seed)
        scores = np.full(int(table.is_mined.sum()), np.nan)
        for fold in range(self.folds):
            judged = np.flatnonzero(table.is_mined & (fold_of_pair == fold))
            if not len(judged):
                continue
            trained_on = table.unseen(fold_of_pair != fold, judged)
            model, tokenizer = self._trained(table, trained_on, context.folder / "judges", fold, context.device)
            scores[judged] = self._predict(model, tokenizer, table, judged)  # mined pairs are the first rows
            known = np.flatnonzero(~table.is_mined & (fold_of_pair == fold))[:NUM_CHECKED]
            known_scores = self._predict(model, tokenizer, table, known)
            threshold = 0.5 if self.drop_above is None else self.drop_above
            log.info(
                "judge of fold %d/%d: %.1f%% of its queries' known positives and %.1f%% of their mined negatives score "
                "at least %g",
                *(fold + 1, self.folds, 100 * (known_scores >= threshold).mean()),
                *(100 * (scores[judged] >= threshold).mean(), threshold),
            )
        return scores

    def _trained(
        self, table: PairTable, rows: np.ndarray, folder: Path, fold: int, device: torch.device | str
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Train the judge of a fold, or load it if it is already trained."""
        settings = {key: value for key, value in self.description.items() if not key.endswith("_above")}
        digest = hashlib.blake2b(json.dumps([settings, fold], sort_keys=True).encode(), digest_size=8)
        for array in (table.keys, table.is_mined, rows):
            digest.update(np.ascontiguousarray(array).data)
        path = folder / digest.hexdigest()
        if (path / "config.json").is_file():
            log.info("%s: using the judge that was trained before", path)
            model, tokenizer = self._load(str(path))
            return model.to(device).eval(), tokenizer
        model, tokenizer = self._load(installed(self.model))
        self._train(model.to(device), tokenizer, table, rows, fold)
        with atomic_folder(path) as new:
            model.save_pretrained(new)
            tokenizer.save_pretrained(new)
        log.info("%s: trained a judge on %d pairs of the other folds", path, len(rows))
        return model.eval(), tokenizer

    def _load(self, name: str) -> tuple[Any, PreTrainedTokenizerBase]:
        with reading(name, "model"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # for the weights of the new classifier
            settings = PreTrainedConfig.get_config_dict(name)[0]
            check_size(settings)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=torch.float32, trust_remote_code=False
            )
        check_family(model.config, name, "model")
        return model, tokenizer

    def _train(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: PairTable, rows: np.ndarray, fold: int
    ) -> None:
        groups = [rows[~table.is_mined[rows]], rows[table.is_mined[rows]]]
        if not all(map(len, groups)):
            raise UserError(
                f"folds: there are no positives or no mined negatives outside fold {fold + 1}; use fewer folds"
            )
        rng, half = np.random.default_rng([self.seed, fold]), self.batch_size // 2
        targets = torch.cat([torch.ones(half), torch.zeros(half)]).to(model.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("linear", WARM_UP, self.steps))
        model.train()
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(self.seed + fold)  # for dropout
            progress = ProgressLines(f"training the judge of fold {fold + 1}/{self.folds}", "steps", self.steps)
            for _ in range(self.steps):
                batch = np.concatenate([rng.choice(group, half) for group in groups])
                loss = F.binary_cross_entropy_with_logits(self._logits(model, tokenizer, table, batch), targets)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                progress.advance(1)

    @torch.inference_mode()
    def _predict(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: PairTable, rows: np.ndarray
    ) -> np.ndarray:
        """Return the probabilities of some pairs, (n,). A batch has pairs of similar length."""
        scores, order = np.empty(len(rows)), np.argsort([len(a) + len(b) for a, b in table.texts(rows)])
        progress = ProgressLines("judging", "pairs", len(rows))
        for first in range(0, len(rows), 4 * self.batch_size):
            part = order[first : first + 4 * self.batch_size]
            scores[part] = self._logits(model, tokenizer, table, rows[part]).sigmoid().cpu().numpy()
            progress.advance(len(part))
        return scores

    def _logits(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: PairTable, rows: np.ndarray
    ) -> torch.Tensor:
        """Return the logits of some pairs, (n,) in float32."""
        longest = min(self.max_length, model.config.max_position_embeddings - 2)  # RoBERTa reserves two positions
        queries, papers = zip(*table.texts(rows), strict=True)
        options = {"truncation": True, "max_length": longest, "padding": True, "return_tensors": "pt"}
        tokens = tokenizer(list(queries), list(papers), **options).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            logits = model(**tokens).logits
        return logits[:, 0].float()


@dataclass(frozen=True)
class PairTable:
    """The mined pairs of all pools of a task, followed by the known positives.

    pairs: numbers of the pool, the query and the document, (n, 3).
    query_hashes: hash of each query's text, (n,).
    keys: hash of the two texts of each pair, (n,). It ignores their order, because in link prediction, a paper may be
        the query of one pair and the document of another.
    is_mined: whether a pair was mined, (n,) bool.
    """

    pools: Sequence[Any]
    pairs: np.ndarray
    query_hashes: np.ndarray
    keys: np.ndarray
    is_mined: np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[Pairs]) -> PairTable:
        parts, hashes = [], [(text_hashes(pool.queries), text_hashes(pool.corpus)) for pool, _, _ in pairs]
        known = [Pairs(p.pool, p.pool.positives.owners, p.pool.positives.values) for p in pairs]
        for group in (pairs, known):
            for number, (_, queries, documents) in enumerate(group):
                columns = (np.full(len(queries), number), queries, documents)
                texts = (hashes[number][0][queries], hashes[number][1][documents])
                parts.append(np.stack([*columns, *texts], axis=1).astype(np.int64))
        table = np.concatenate(parts)
        keys = np.minimum(table[:, 3], table[:, 4]) * 0x9E3779B97F4A7C5 ^ np.maximum(table[:, 3], table[:, 4])
        is_mined = np.arange(len(table)) < sum(len(p.queries) for p in pairs)
        return cls([p.pool for p in pairs], table[:, :3], table[:, 3], keys, is_mined)

    def folds(self, count: int, seed: int) -> np.ndarray:
        """Return the fold of each pair, (n,). Queries with the same text are in the same fold."""
        distinct, number = np.unique(self.query_hashes, return_inverse=True)
        if len(distinct) < count:
            raise UserError(f"folds: expected at most {len(distinct)}, the number of distinct queries, got {count}")
        return np.random.default_rng(seed).permutation(len(distinct))[number] % count

    def unseen(self, chosen: np.ndarray, judged: np.ndarray) -> np.ndarray:
        """Return the rows of chosen pairs, (n,) bool, whose texts differ from those of all judged pairs."""
        return np.flatnonzero(chosen & ~np.isin(self.keys, self.keys[judged]))

    def texts(self, rows: np.ndarray) -> Iterator[tuple[str, str]]:
        """Yield the texts of each pair's query and document."""
        for pool, query, document in self.pairs[rows].tolist():
            texts = self.pools[pool].queries[query], self.pools[pool].corpus[document]
            yield input_text(texts[0], "\n"), input_text(texts[1], "\n")
