"""The code on docs/library.md runs, block after block, as a reader would paste it."""

import re
from pathlib import Path

from datamodules.readers.beir import write_beir
from tests.conftest import toy_collection

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_code_of_the_library_page_runs(tmp_path, monkeypatch, make_backbone):
    backbone, tokenizer = make_backbone()
    backbone.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    write_beir(toy_collection(), tmp_path / "searches")
    write_beir(toy_collection(papers=True), tmp_path / "citations")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 5
    assert names["scores"].shape == (1, 1)
    assert names["trainer"].global_step == 4
    assert set(names["result"].metrics) == {"ndcg@10", "recall@100"}
    assert len(names["mined"].negatives)
