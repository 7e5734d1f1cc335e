"""Before any test: shapes in signatures are checked, libraries use one thread each, nothing looks for a network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook(["models", "trainer.objectives", "trainer.augment", "trainer.augment_images"], "beartype.beartype")

pytest_plugins = ["tests.s3_server"]
