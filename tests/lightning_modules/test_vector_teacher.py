"""Training with the vectors of a teacher: they are stored once and read in each step, and runs resume exactly."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from datamodules.records import UserError
from datamodules.tasks import LinkPredictionDataModule, SearchDataModule
from lightning_modules.contrastive import CheckpointMismatch, ContrastiveModule
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.frozen import FrozenEncoder
from lightning_modules.objective_options import GuideOptions, TeacherOptions, VectorTeacherOptions
from lightning_modules.optim import OptimOptions
from lightning_modules.retrieval.evaluation import evaluate
from lightning_modules.retrieval.vector_cache import VectorCache
from tests.conftest import toy_collection
from tests.lightning_modules.quiet_trainer import quiet_trainer


def trained(encoder, data, folder, steps=6, teacher=None, resume=None, lr=3e-3, **options):
    """Train, and return the module. options: those of the vector teacher."""
    module = ContrastiveModule(
        encoder,
        similarity="cosine",
        temperature=0.1,
        total_steps=6,
        optim=OptimOptions(lr=lr, schedule="constant"),
        vector_teacher=VectorTeacherOptions(**({"model": "teacher"} | options)),
        vector_teacher_model=teacher and FrozenEncoder(teacher),
    )
    trainer = quiet_trainer(folder, max_steps=steps)
    trainer.fit(module, data, ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.fixture
def larger(make_backbone, make_encoder):
    """A teacher with 48 dimensions; students have 32."""
    return lambda seed=5: make_encoder("shared", seed=seed, config={"hidden_size": 48})


def count_encoded(monkeypatch, encoder):
    """Return a list that gets the number of texts of each pass of the encoder."""
    counts, encode = [], type(encoder).encode_each

    def spy(self, groups, *arguments, **options):
        def counted():
            for group in groups:
                counts.append(len(group))
                yield group

        return encode(self, counted(), *arguments, **options)

    monkeypatch.setattr(type(encoder), "encode_each", spy)
    return counts


def test_teacher_encodes_each_text_once_and_later_runs_read_its_vectors(
    make_encoder, make_task, larger, tmp_path, monkeypatch
):
    teacher = larger()
    counts, texts = count_encoded(monkeypatch, teacher), 10 + 12
    vectors = []
    for number, (model, expected) in enumerate([(teacher, texts), (larger(), 0), (larger(seed=6), texts)]):
        data = make_task(SearchDataModule, cache=str(tmp_path / "cache"))
        module = trained(make_encoder("shared"), data, tmp_path / f"{number}", teacher=model)
        assert sum(counts) == expected, "the fingerprint covers the teacher's weights"
        counts.clear()
        vectors.append(weights(module))
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    data = make_task(SearchDataModule, collection=toy_collection(12, 11), cache=str(tmp_path / "cache"))
    trained(make_encoder("shared"), data, tmp_path / "other", teacher=larger())
    assert counts == [11], "the fingerprint covers the texts: the corpus has another one, the queries are the same"


@pytest.mark.parametrize("kind", [SearchDataModule, LinkPredictionDataModule])
def test_stored_vectors_are_those_of_encode_and_train_as_those_of_each_step(
    make_encoder, make_task, larger, tmp_path, kind
):
    collection = toy_collection(10, 10, papers=kind is LinkPredictionDataModule)
    results = []
    for cached in (True, False):
        data = make_task(kind, collection=collection, carry_texts=True)
        results.append(weights(trained(make_encoder(), data, tmp_path / str(cached), teacher=larger(), cached=cached)))
        if cached:
            batch = data.train_dataloader().batches[0]
            expected = normalize(larger().encode(list(batch.texts), "search"), dim=-1)
            torch.testing.assert_close(batch.teacher_vectors, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(*results, atol=1e-4, rtol=0)


def test_batch_without_vectors_and_texts_raises_user_error(make_encoder, make_task, larger, tmp_path):
    with pytest.raises(UserError, match="carry_texts"):
        trained(make_encoder(), make_task(SearchDataModule), tmp_path, teacher=larger(), cached=False)


def test_weight_0_trains_as_without_a_teacher_to_the_bit(make_encoder, make_task, larger, tmp_path):
    runs = [
        trained(make_encoder(), make_task(SearchDataModule), tmp_path, teacher=larger(), **options)
        for options in ({"weight": 0}, {"model": None}, {"weight": 1e-3})
    ]
    zero, without, small = (weights(run.encoder) for run in runs)
    assert torch.equal(zero, without)
    assert not torch.equal(small, without)


def test_projection_is_trained_saved_resumed_and_not_exported(make_encoder, make_task, larger, tmp_path):
    module = trained(make_encoder(), make_task(SearchDataModule), tmp_path / "whole", teacher=larger())
    options, teacher = module.objective.options.vector_teacher, FrozenEncoder(larger())
    fresh = ContrastiveModule(make_encoder(), vector_teacher=options, vector_teacher_model=teacher)
    assert not torch.equal(module.objective.projection, fresh.objective.projection)
    part, rest = tmp_path / "part", tmp_path / "rest"
    trained(make_encoder(), make_task(SearchDataModule), part, steps=3, teacher=larger())
    other = make_encoder(seed=9)
    resumed = trained(other, make_task(SearchDataModule), rest, teacher=larger(), resume=part / "last.ckpt")
    assert torch.equal(weights(resumed), weights(module))
    saved = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["objective.projection"], module.objective.projection)
    exported = load_encoder(tmp_path / "whole" / "last.ckpt")
    assert not any("projection" in name for name in exported.state_dict())
    assert exported.encode(make_task(SearchDataModule).documents[:2], "search").shape == (2, 32)


def test_start_keeps_the_encoder_near_its_start(make_encoder, make_task, tmp_path):
    texts = list(toy_collection().corpus.values())
    before = make_encoder().encode(texts, "search")
    similarity = []
    for options in ({"model": None}, {"model": "start", "weight": 10, "loss": "cosine"}):
        module = trained(make_encoder(), make_task(SearchDataModule), tmp_path, **options)
        assert module.objective.projection is None
        similarity.append(cosine_similarity(module.encoder.eval().encode(texts, "search"), before).mean().item())
    assert similarity[0] < similarity[1] - 0.05
    assert similarity[1] < 1 - 1e-6


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_an_encoder_is_at_distance_0_from_its_start(make_encoder, make_task, tmp_path, similarity, cached):
    """With dot products, the anchor moved all vectors to the unit sphere, because the start's were normalised."""
    data, options = make_task(SearchDataModule, carry_texts=True), VectorTeacherOptions("start", cached=cached)
    module = ContrastiveModule(make_encoder(), similarity=similarity, total_steps=1, vector_teacher=options)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    quiet_trainer(tmp_path, max_steps=1).fit(module, data)  # gives the data the teacher's vectors
    batch = data.train_dataloader().batches[0]
    assert module.eval().training_step(batch, 0)["vector_distance"] > 1e-3
    module.load_state_dict(before)
    assert module.training_step(batch, 0)["vector_distance"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("role", ["guide", "teacher", "vector_teacher", "start"])
def test_a_training_resumes_with_the_frozen_models_of_its_start(make_encoder, make_task, tmp_path, role):
    """A file that was replaced changed the objective of the rest of the training."""

    def train(seed, steps, resume=None):
        if role == "start":
            options = {"vector_teacher": VectorTeacherOptions("start")}
        else:
            kind = {"guide": GuideOptions, "teacher": TeacherOptions, "vector_teacher": VectorTeacherOptions}[role]
            options = {role: kind("model"), f"{role}_model": FrozenEncoder(make_encoder(seed=seed))}
        encoder = make_encoder(seed=seed if role == "start" else 0)
        module = ContrastiveModule(encoder, similarity="cosine", total_steps=2, **options)
        trainer = quiet_trainer(tmp_path, max_steps=steps)
        trainer.fit(module, make_task(SearchDataModule, carry_texts=True), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "last.ckpt")

    train(seed=5, steps=1)
    with pytest.raises(CheckpointMismatch, match=r"objective.\w+.model has changed since the training began"):
        train(seed=6, steps=2, resume=tmp_path / "last.ckpt")
    train(seed=5, steps=2, resume=tmp_path / "last.ckpt")


def test_vectors_of_an_earlier_teacher_are_not_used(make_encoder, make_task, tmp_path):
    """A second training with the same data learned from the stored vectors of the first one's teacher."""
    data = make_task(SearchDataModule, carry_texts=True)
    stored = []
    for seed, cached in ((5, True), (6, False)):
        trained(make_encoder("shared"), data, tmp_path, 1, make_encoder("shared", seed=seed), cached=cached)
        stored.append(data.train_dataloader().batches[0].teacher_vectors is not None)
    assert stored == [True, False]


def test_asymmetric_student_learns_the_teachers_space(make_encoder, make_task, tmp_path):
    """Its queries come near the teacher's, and rank the teacher's documents better than before."""
    collection, teacher = toy_collection(), make_encoder("shared", seed=5)
    queries, corpus = list(collection.queries.values()), list(collection.corpus.values())
    target = teacher.encode(queries, "search")
    figures = []
    for lr in (1e-9, 3e-3):
        data = make_task(SearchDataModule, num_batches=60, batch_size=8)
        module = trained(make_encoder("shared"), data, tmp_path, 60, teacher, lr=lr, asymmetric=True)
        student = module.encoder.eval()
        near = cosine_similarity(student.encode(queries, "search"), target).mean().item()
        benchmark = data.benchmarks("test")[0]
        result = evaluate(
            student, benchmark, ["ndcg@10"], similarity="cosine", document_vectors=module.document_vectors
        )
        own, others = (normalize(e.encode(t, "search"), dim=-1) for e, t in ((student, queries), (teacher, corpus)))
        best = [corpus[row].id for row in (own @ others.T).argmax(1).tolist()]
        assert [result.run.documents[row[0]] for row in result.run.indices] == best
        figures.append((near, result.metrics["ndcg@10"]))
    (near_before, ndcg_before), (near, ndcg) = figures
    assert near > near_before + 0.3
    assert ndcg > ndcg_before + 0.02


def test_gradients_do_not_reach_documents_of_an_asymmetric_student(make_encoder, make_task):
    data = make_task(SearchDataModule, carry_texts=True)
    module = ContrastiveModule(
        make_encoder("shared"),
        similarity="cosine",
        vector_teacher=VectorTeacherOptions("x", asymmetric=True),
        vector_teacher_model=FrozenEncoder(make_encoder("shared", seed=5)),
    )
    batch = data.train_dataloader().batches[0]
    vectors = module.embed(batch).vectors.detach().requires_grad_()
    module.objective(vectors, batch)["loss"].backward()
    norms = vectors.grad.norm(dim=1)
    assert (norms[batch.queries] > 1e-4).all()
    assert (norms[batch.documents] == 0).all()


def test_asymmetric_student_of_another_size_raises_user_error(make_encoder, larger):
    options = VectorTeacherOptions("x", asymmetric=True)
    with pytest.raises(UserError, match="asymmetric: expected a teacher with 32 dimensions, as in the encoder, got 48"):
        ContrastiveModule(
            make_encoder(), similarity="cosine", vector_teacher=options, vector_teacher_model=FrozenEncoder(larger())
        )


def test_document_vectors_of_another_size_raise_user_error(make_encoder, make_task, larger):
    benchmark = make_task(SearchDataModule).benchmarks("test")[0]
    with pytest.raises(UserError, match="document_vectors: expected 32 dimensions, .* got 48"):
        evaluate(make_encoder(), benchmark, ["ndcg@10"], document_vectors=VectorCache(larger()))
