"""One tiny trained run, which several tests look at and none changes."""

import pytest

from datastore.layout import Store
from tests.runs import tiny_config, train, write_corpus
from trainer.runfolder import RunFolder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_corpus(str(tmp_path_factory.mktemp("corpus") / "store.zarr"))


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus: Store, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(tiny_config(tiny_corpus.url), str(tmp_path_factory.mktemp("runs") / "tiny"))
