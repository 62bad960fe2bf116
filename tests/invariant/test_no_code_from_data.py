"""No file that comes from elsewhere can run code: nothing is unpickled, and YAML is read by ruamel.yaml's safe loader only, in one module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def risks(source: str) -> Iterator[str]:
    """What in a module could run code that a file brings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
            if called == "torch.load" and ast.unparse(options.get("weights_only", ast.Constant(False))) != "True":
                yield "torch.load without weights_only=True"
            elif called in ("np.load", "numpy.load") and "allow_pickle" in options:
                yield "numpy.load with allow_pickle"
            elif called == "yaml.load" and "Loader" in options:
                yield "yaml.load of PyYAML"
            elif called in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"):
                yield called


def test_the_package_reads_no_code_from_files(repository: Path) -> None:
    found = {
        str(path): list(risks(path.read_text(encoding="utf-8")))
        for path in (repository / "trl_reasoning_distill").rglob("*.py")
    }
    assert {path: risk for path, risk in found.items() if risk} == {}


def test_a_pickle_would_be_found() -> None:
    source = "from pickle import loads\ntorch.load(f)\ntorch.load(f, weights_only=True)\nyaml.load(f, Loader=yaml.Loader)\neval(s)"
    assert list(risks(source)) == [
        "imports pickle",
        "torch.load without weights_only=True",
        "yaml.load of PyYAML",
        "eval",
    ]
