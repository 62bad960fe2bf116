"""YAML of options, read strictly: the rules of version 1.2, each key once, and nothing in it that could run code.

What versions 1.1 and 1.2 of YAML read as different numbers (`0100`, `1:30`, `1_000`) is refused, not guessed: write it in quotes
where text is meant. `no`, `on` and dates are text, `1e-5` is a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

MOST_VALUES = 10_000
"""Values that a file may hold, those behind anchors counted each time that they are named."""

ENVIRONMENT = frozenset(
    """
    CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUBLAS_WORKSPACE_CONFIG
    PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF PYTORCH_ENABLE_MPS_FALLBACK
    OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS RAYON_NUM_THREADS TOKENIZERS_PARALLELISM
    GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_SOCKET_FAMILY NCCL_DEBUG NCCL_DEBUG_SUBSYS NCCL_ALGO NCCL_PROTO NCCL_SHM_DISABLE
    NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_IB_DISABLE NCCL_IB_HCA NCCL_IB_GID_INDEX NCCL_IB_TIMEOUT NCCL_IB_RETRY_CNT
    NCCL_NET_GDR_LEVEL NCCL_CUMEM_ENABLE NCCL_NVLS_ENABLE NCCL_BUFFSIZE
    TORCH_NCCL_BLOCKING_WAIT TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_AVOID_RECORD_STREAMS TORCH_DISTRIBUTED_DEBUG
    HF_HUB_OFFLINE HF_DATASETS_OFFLINE TRANSFORMERS_OFFLINE HF_HUB_CACHE HF_DATASETS_CACHE HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT
    HF_HUB_DISABLE_PROGRESS_BARS HF_HUB_DISABLE_TELEMETRY HF_HUB_DISABLE_XET HF_HUB_ENABLE_HF_TRANSFER HF_XET_HIGH_PERFORMANCE
    HF_DATASETS_IN_MEMORY_MAX_SIZE TRANSFORMERS_VERBOSITY TRANSFORMERS_NO_ADVISORY_WARNINGS
    WANDB_PROJECT WANDB_ENTITY WANDB_NAME WANDB_RUN_GROUP WANDB_RUN_ID WANDB_JOB_TYPE WANDB_TAGS WANDB_NOTES WANDB_MODE WANDB_RESUME
    WANDB_DISABLED WANDB_SILENT WANDB_LOG_MODEL WANDB_WATCH
    TRACKIO_PROJECT TRACKIO_SPACE_ID TRACKIO_DATASET_ID MLFLOW_EXPERIMENT_NAME MLFLOW_RUN_NAME COMET_PROJECT_NAME COMET_MODE
    VLLM_ATTENTION_BACKEND VLLM_LOGGING_LEVEL VLLM_WORKER_MULTIPROC_METHOD TRD_DEBUG
    """.split()  # noqa: SIM905  # a list of 80 names reads better so
)
"""The environment variables that `env:` in a config may set. Not here: what makes a process load code (`LD_PRELOAD`, `PYTHON*`, `PATH`,
`GIT_*`, plugins of NCCL), what holds a secret, and where secrets are sent to. These belong to the shell that starts the command."""

_INT, _FLOAT, _BOOL, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null", "merge"))
_AMBIGUOUS = "!ambiguous"
_PLAIN = (
    (_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")),
    (_INT, re.compile(r"(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$")),
    (_FLOAT, re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")),
    (_FLOAT, re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")),
    (_NULL, re.compile(r"(?:~|null|Null|NULL|)$")),
    (_MERGE, re.compile(r"<<$")),
    # Numbers to version 1.1 or to people, and other numbers or none to 1.2
    (_AMBIGUOUS, re.compile(r"[-+]?(?:0b[01_]+|0[xo][0-9a-fA-F_]+|[0-9_]*[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)$")),
    (_AMBIGUOUS, re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?$")),
)  # fmt: skip


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML or not a mapping, has a key twice, holds a number that could be read in two ways, grows too large
            by its anchors, or sets an environment variable that a config may not; with file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No config file at {path}.")
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Constructor = _Resolver, _Constructor
    try:
        config = yaml.load(Path(path).read_text(encoding="utf-8-sig"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem, *_ = str(error.problem or error.context).partition(
            " with value"
        )  # of a doubled key: it may be a secret
        raise ValueError(f"{path}{line}: {problem.splitlines()[0]}.") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())}).") from None
    except RecursionError:
        raise ValueError(f"{path}: lists or mappings are nested too deeply.") from None
    if config is None:
        return {}
    others = [key for key in config if not isinstance(key, str)] if isinstance(config, dict) else [config]
    if others:
        raise ValueError(f"{path}: expected a mapping of option names to values, found {others[0]!r:.80}.")
    return config


def environment_of(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The variables that the key `env` of a config sets.

    Raises:
        ValueError: If it is not a mapping of names to values, or names a variable that is not in `ENVIRONMENT`.
    """
    variables = config.get("env") or {}
    if not isinstance(variables, Mapping) or any(isinstance(value, list | dict) for value in variables.values()):
        raise ValueError(f"{where}: `env` must be a mapping of variables to values, found {variables!r}.")
    refused = [str(name) for name in variables if name not in ENVIRONMENT]
    if refused:
        raise ValueError(
            f"{where}: `env` may not set {', '.join(refused)}: a config file is data, and only variables that cannot run code or hold "
            "a secret are taken from it (docs/threats.md lists them). Set it in the shell that starts the command."
        )
    return {name: str(value) for name, value in variables.items()}


class _Resolver(VersionedResolver):
    """What a plain scalar is, whatever version the file claims to be written in."""

    processing_version = (1, 2)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        tags = (Tag(suffix=tag) for tag, pattern in _PLAIN if pattern.match(value))
        return next(tags, self.DEFAULT_SCALAR_TAG)


class _Constructor(SafeConstructor):
    """Values of a document that is not too large."""

    def construct_document(self, node: Node) -> Any:
        _check_size(node)
        return super().construct_document(node)

    def refuse_number(self, node: ScalarNode) -> NoReturn:
        what = f"{node.value!r} is one number to YAML 1.1 and another, or none, to YAML 1.2; write it in quotes, or without leading zeros, colons and underscores"
        raise ConstructorError(None, None, what, node.start_mark)


_Constructor.add_constructor(_AMBIGUOUS, _Constructor.refuse_number)


def _check_size(document: Node) -> None:
    """Refuse a document that anchors make too large, or endless."""
    sizes: dict[int, int] = {}  # of a node with all below it; 0 while it is being counted

    def size(node: Node) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise ConstructorError(None, None, "an anchor stands inside itself", node.start_mark)
        if known is None:
            sizes[id(node)] = 0
            items = [] if isinstance(node, ScalarNode) else node.value
            parts = [part for pair in items for part in pair] if isinstance(node, MappingNode) else items
            known = sizes[id(node)] = 1 + sum(map(size, parts))
            if known > MOST_VALUES:
                raise ConstructorError(
                    None, None, f"more than {MOST_VALUES:,} values, anchors written out", node.start_mark
                )
        return known

    size(document)
