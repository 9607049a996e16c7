"""An independent implementation of the objective in numpy loops over queries, and random batches to compare on."""

import itertools

import numpy as np
import torch

from datamodules.packed import ContrastiveBatch


def batch_without_texts(**fields):
    """Return a batch with vectors only: `fields` are its ids and columns, and there is nothing to encode."""
    fields = {"task": "search"} | fields
    return ContrastiveBatch(step=0, seed=0, fingerprint="", num_tokens=0, chunks=(), **fields)


def random_batch(rng, num_queries=6, num_documents=11, num_ids=40, num_positives=3, num_negatives=2, task="search"):
    """Return a batch in which queries have further known positives, and some texts have the same key.

    num_positives, num_negatives: maximum number of positives and of hard negatives per query.
    """
    ids = rng.permutation(num_ids)[:num_documents]
    positives = np.full((num_queries, num_positives), -1)
    negatives = np.full((num_queries, num_negatives), -1)
    known = np.full((num_queries, num_positives + 3), -1)
    for b in range(num_queries):
        columns = rng.permutation(num_documents)
        count = rng.integers(1, num_positives + 1)
        positives[b, :count] = columns[:count]
        num_own = rng.integers(0, num_negatives + 1) if num_negatives else 0
        negatives[b, :num_own] = columns[num_positives : num_positives + num_own]
        known[b, :count] = ids[columns[:count]]
        known[b, num_positives] = ids[columns[-1]]  # a positive that was not sampled
        known[b, num_positives + 1] = num_ids + 5  # a positive that is not in the batch
    return batch_without_texts(
        task=task,
        queries=torch.arange(num_queries),
        documents=torch.tensor(num_queries + rng.permutation(num_documents)),
        document_ids=torch.tensor(ids),
        positives=torch.tensor(positives),
        hard_negatives=torch.tensor(negatives),
        known_positives=torch.tensor(known),
        text_keys=torch.tensor(rng.integers(0, 3 * num_documents, num_queries + num_documents)),
    )


def normalized(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_sum_exp(values):
    values = np.array(values)
    return values.max() + np.log(np.exp(values - values.max()).sum())


def row_loss(scores, positives, masked, form, in_denominator):
    """Return InfoNCE of one query. scores: divided by the temperature, (C,). masked: masked columns."""
    negatives = [c for c in range(len(scores)) if c not in masked and c not in positives]
    log_q = []
    for p in positives:
        denominator = [*(positives if in_denominator else [p]), *negatives]
        log_q.append(scores[p] - log_sum_exp([scores[c] for c in denominator]))
    return -np.mean(log_q) if form == "mean_log" else np.log(len(log_q)) - log_sum_exp(log_q)


def above_guide(scores, positives, margin, kind):
    """Return the columns that the guide scores above the positives minus the margin."""
    mean = np.mean([scores[p] for p in positives])
    limit = mean - (margin if kind == "absolute" else abs(mean) * margin)
    return {c for c in range(len(scores)) if scores[c] > limit}


def distillation_loss(student, teacher, positives, candidates, temperature, options):
    """Return the distillation loss of one query. student, teacher: scores, (C,)."""
    if options.loss == "kl":
        s = np.array([student[c] for c in candidates]) / temperature
        t = np.array([teacher[c] for c in candidates]) / options.temperature
        s, t = s - log_sum_exp(s), t - log_sum_exp(t)
        return (np.exp(t) * (t - s)).sum()
    pairs = [(p, n) for p, n in itertools.product(positives, candidates) if n not in positives]
    errors = [(student[p] - student[n] - teacher[p] + teacher[n]) ** 2 for p, n in pairs]
    return np.mean(errors) if errors else 0.0


def reference(vectors, batch, options, temperature, guide=None, teacher=None, vector_teacher=None, projection=None):
    """Return the loss of vectors (U, D). guide, teacher, vector_teacher: vectors of queries and of documents."""
    total = 0.0
    if vector_teacher is not None:
        total += options.vector_teacher.weight * _vector_distance(vectors, batch, options, vector_teacher, projection)
        if options.vector_teacher.asymmetric:
            vectors = vectors.copy()
            vectors[batch.documents.numpy()] = vector_teacher[1]
    weights = [1.0, *(options.matryoshka_weights or [1.0] * len(options.matryoshka))]
    for prefix, weight in zip([None, *options.matryoshka], weights, strict=True):
        total += weight * _loss_of_prefix(vectors[:, :prefix], batch, options, temperature, guide, teacher)
    return options.task_weights.get(batch.task, 1.0) * total


def _vector_distance(vectors, batch, options, targets, projection):
    distances = []
    for b, (positives, negatives) in enumerate(zip(batch.positives, batch.hard_negatives, strict=True)):
        documents = [c for c in positives.tolist() + negatives.tolist() if c >= 0]
        pairs = [(vectors[batch.queries[b]], targets[0][b])]
        if not options.vector_teacher.asymmetric:
            pairs += [(vectors[batch.documents[c]], targets[1][c]) for c in documents]
        values = []
        for vector, target in pairs:
            vector = normalized(vector) if options.similarity == "cosine" else vector
            vector = vector if projection is None else projection @ vector
            l2 = ((vector - target) ** 2).sum()
            cosine = 1 - normalized(vector) @ normalized(target)
            values.append(l2 if options.vector_teacher.loss == "l2" else cosine)
        distances.append(np.mean(values))
    return np.mean(distances)


def _loss_of_prefix(vectors, batch, options, temperature, guide, teacher):
    queries, documents = vectors[batch.queries.numpy()], vectors[batch.documents.numpy()]
    if options.similarity == "cosine":
        queries, documents = normalized(queries), normalized(documents)
    scores, ids = queries @ documents.T, batch.document_ids.tolist()
    known = [set(row) for row in batch.known_positives.tolist()]
    keys = batch.text_keys.numpy()
    query_keys, document_keys = keys[batch.queries.numpy()], keys[batch.documents.numpy()]
    positives = [[c for c in row if c >= 0] for row in batch.positives.tolist()]
    negatives = [[c for c in row if c >= 0] for row in batch.hard_negatives.tolist()]
    guide_scores = None if guide is None else guide[0] @ guide[1].T
    teacher_scores = None if teacher is None else teacher[0] @ teacher[1].T
    margin = (options.guide.margin, options.guide.kind)
    rule = (options.positives, options.positives_in_denominator)
    forward, backward, distillation = [], [], []
    for b in range(len(queries)):
        masked = {c for c in range(len(ids)) if options.mask_known_positives and ids[c] in known[b]}
        if options.mask_same_text:
            texts = {query_keys[b]} | {document_keys[p] for p in positives[b]}
            masked |= {c for c in range(len(ids)) if document_keys[c] in texts}
        if guide_scores is not None:
            masked |= above_guide(guide_scores[b], positives[b], *margin)
        forward.append(row_loss(scores[b] / temperature, positives[b], masked, *rule))
        if teacher_scores is not None:
            candidates = [c for c in range(len(ids)) if c in positives[b] or c not in masked]
            if options.teacher.candidates == "own":
                candidates = [c for c in positives[b] + negatives[b] if c in candidates]
            distillation.append(
                distillation_loss(scores[b], teacher_scores[b], positives[b], candidates, temperature, options.teacher)
            )
        terms = []
        for p in positives[b]:
            masked_queries = {q for q in range(len(queries)) if options.mask_known_positives and ids[p] in known[q]}
            if options.mask_same_text:
                masked_queries |= {q for q in range(len(queries)) if query_keys[q] in (query_keys[b], document_keys[p])}
            if guide_scores is not None:
                masked_queries |= above_guide(guide_scores[:, p], [b], *margin)
            terms.append(row_loss(scores[:, p] / temperature, [b], masked_queries, *rule))
        backward.append(np.mean(terms))
    loss = (np.mean(forward) + np.mean(backward)) / 2 if options.symmetric else np.mean(forward)
    return loss + (options.teacher.weight * np.mean(distillation) if teacher_scores is not None else 0.0)
