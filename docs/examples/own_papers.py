"""From a CSV file of papers to a trained encoder, and a search with it, in half a minute on one core.

The papers are made up. For real ones, replace papers.csv by your own file and `random_backbone` by
`load_backbone("sentence-transformers/all-MiniLM-L6-v2")`, which loads a trained model from the hub.
"""

import csv

import lightning as L
from torch.nn.functional import normalize

import scimult

# 600 papers: 20 subjects times 6 methods times 5. The title names the subject; the abstract only paraphrases it.
SUBJECTS = {
    "proteins": "enzymes, amino acids, folding",
    "galaxies": "stars, dark matter, telescopes",
    "markets": "prices, traders, inflation",
    "languages": "grammar, syntax, speakers",
    "glaciers": "ice, melting, sea level",
    "bridges": "steel, load, vibration",
    "vaccines": "antibodies, infection, trials",
    "batteries": "lithium, charging, electrodes",
    "forests": "trees, drought, biomass",
    "schools": "pupils, teachers, grades",
    "robots": "arms, grasping, sensors",
    "lasers": "photons, pulses, cavities",
    "elections": "voters, parties, turnout",
    "earthquakes": "faults, tremors, waves",
    "bees": "pollen, hives, foraging",
    "rivers": "floods, sediment, dams",
    "tumours": "cells, mutations, therapy",
    "networks": "nodes, edges, communities",
    "museums": "paintings, visitors, archives",
    "engines": "fuel, combustion, emissions",
}
METHODS = ["a survey", "simulations", "statistics", "experiments", "deep learning", "theory"]


def main() -> None:
    L.seed_everything(0)
    papers = [
        {
            "title": f"{method} on {subject} {number}".capitalize(),
            "abstract": f"We report on {words}, based on {method}. Series {number}.",
            "keywords": f"{subject}; {method}",
        }
        for subject, words in SUBJECTS.items()
        for method in METHODS
        for number in range(5)
    ]
    with open("papers.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, papers[0])
        writer.writeheader()
        writer.writerows(papers)

    # Two tasks: find the keywords of a paper, and find an abstract by its title.
    data = scimult.MultiTaskDataModule(
        [
            scimult.ClassificationDataModule("classification", scimult.PapersReader("papers.csv", view="labels")),
            scimult.SearchDataModule("search", scimult.PapersReader("papers.csv", view="searches")),
        ],
        batch_size=32,
        max_length=48,
    )

    # A small BERT with random weights, and an expert for each task in every second layer.
    vocabulary = scimult.word_vocabulary((text for paper in papers for text in paper.values()), size=2000)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    backbone, tokenizer = scimult.random_backbone(shape, vocabulary)
    experts = {"classification": "classification", "search": "search"}
    encoder = scimult.MoEEncoder(backbone, tokenizer, experts, pooling="mean", max_length=48)

    # Train it, and measure it on the papers of the test split.
    optim = scimult.OptimOptions(lr=2e-3)
    module = scimult.ContrastiveModule(encoder, similarity="cosine", temperature=0.05, optim=optim)
    trainer = L.Trainer(max_steps=300, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, data)
    for benchmark in data.benchmarks("test"):
        print(benchmark.name, scimult.evaluate(encoder, benchmark, ["ndcg@10", "recall@10"]).metrics)

    # Search the titles for words that no title has. The encoder was trained for cosine, so normalise vectors.
    titles = [paper["title"] for paper in papers]
    vectors = normalize(encoder.encode(titles, task="search"))
    query = normalize(encoder.encode(["stars and dark matter, seen by telescopes"], task="search"))
    for row in (query @ vectors.T)[0].topk(3).indices.tolist():
        print(titles[row])

    # Save it for load_encoder, and for the commands eval, embed and export.
    encoder.save_pretrained("encoder")


if __name__ == "__main__":
    main()
