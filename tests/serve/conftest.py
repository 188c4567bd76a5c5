"""What the tests of inference prepare, for those of the servers and pages too."""

from __future__ import annotations

from tests.inference.conftest import adapters_folder, bundle, lively_base, questions, run_dir

__all__ = ["adapters_folder", "bundle", "lively_base", "questions", "run_dir"]
