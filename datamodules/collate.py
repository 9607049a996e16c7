"""Examples of one task become a ContrastiveBatch: each distinct text once, and who is positive for whom."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch

from datamodules.records import ContrastiveBatch, Document, Example
from datamodules.rounds import NegativesOf, negatives_of_data
from datamodules.schedule import mix
from datamodules.text import length_sorted_chunks, pad


def sampled_by_grade(example: Example, count: int, rng: random.Random) -> list[int]:
    """At most count of an example's positives, one after the other in proportion to their grades, none twice."""
    left = dict(zip(example.positives, example.grades, strict=True))
    drawn: list[int] = []
    while left and len(drawn) < count:
        drawn += rng.choices(list(left), weights=list(left.values()))
        del left[drawn[-1]]
    return drawn


def padded(lists: Sequence[Sequence[int]]) -> torch.Tensor:
    """(n, longest) int64, padded with -1."""
    rows = [torch.tensor(items, dtype=torch.int64) for items in lists]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def text_key(ids: np.ndarray) -> int:
    """Of a text's token ids: equal for texts that the encoder reads alike, on every rank."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.uint32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: below 0 are no keys


class Collator:
    """Makes batches of one task's examples.

    tokens: of the rows that the examples name. pad_id: of the tokenizer. token_budget: padded tokens of a chunk.
    num_positives, num_hard_negatives: for each query, where it has them. texts: of the rows, to be carried by batches.
    negatives_of: the rows that an example's hard negatives are drawn from, by its number, the example and the step.
    """

    def __init__(
        self,
        task: str,
        examples: Sequence[Example],
        tokens: Sequence[np.ndarray],
        pad_id: int,
        *,
        token_budget: int,
        num_hard_negatives: int,
        seed: int,
        num_positives: int = 1,
        negatives_of: NegativesOf = negatives_of_data,
        texts: Sequence[Document] | None = None,
    ):
        self.task, self.examples, self.tokens, self.pad_id = task, examples, tokens, pad_id
        self.token_budget, self.seed, self.texts = token_budget, seed, texts
        self.num_positives, self.num_hard_negatives = num_positives, num_hard_negatives
        self.negatives_of = negatives_of

    def __call__(self, draws: Sequence[tuple[int, int]], step: int) -> ContrastiveBatch:
        """draws: B pairs (example, epoch); the epoch seeds what is sampled for the example."""
        queries, positives, negatives = [], [], []
        for index, epoch in draws:
            example, rng = self.examples[index], random.Random(mix(self.seed, "draw", self.task, index, epoch))
            queries.append(example.query)
            positives.append(sampled_by_grade(example, self.num_positives, rng))
            hard = self.negatives_of(index, example, step)
            negatives.append(rng.sample(hard, min(self.num_hard_negatives, len(hard))))

        drawn = [[row for rows in lists for row in rows] for lists in (positives, negatives)]
        rows_of_documents = list(dict.fromkeys(drawn[0] + drawn[1]))  # distinct, in the order of their first use
        rows_of_texts = list(dict.fromkeys(queries + rows_of_documents))
        chunks, place = self._chunks(rows_of_texts)
        column = {row: index for index, row in enumerate(rows_of_documents)}
        known = [self.examples[index].not_negatives for index, _ in draws]
        return ContrastiveBatch(
            step=step,
            task=self.task,
            seed=mix(self.seed, "step", step, *draws[0]),
            fingerprint=hashlib.blake2b(repr((queries, *drawn)).encode(), digest_size=6).hexdigest(),
            num_tokens=sum(int(chunk.attention_mask.sum()) for chunk in chunks),
            chunks=chunks,
            queries=torch.tensor([place[row] for row in queries]),
            documents=torch.tensor([place[row] for row in rows_of_documents]),
            document_ids=torch.tensor(rows_of_documents),
            positives=padded([[column[row] for row in rows] for rows in positives]),
            hard_negatives=padded([[column[row] for row in rows] for rows in negatives]),
            known_positives=padded(known),
            text_keys=torch.tensor([text_key(self.tokens[row]) for row in place]),
            texts=() if self.texts is None else tuple(self.texts[row] for row in place),
        )

    def _chunks(self, rows: list[int]):
        """The rows' texts in chunks, and where each row stands among them."""
        ids = [self.tokens[row] for row in rows]
        chunks, place = [], {}
        for indices in length_sorted_chunks([len(x) for x in ids], self.token_budget):
            chunks.append(pad((ids[i] for i in indices), self.pad_id))
            for i in indices:
                place[rows[i]] = len(place)
        return tuple(chunks), place
