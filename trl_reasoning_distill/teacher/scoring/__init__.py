"""Reading with a teacher: rows of token ids in, records of the asked positions out.

`TransformersReader` runs the teacher in this process: exact, any M, any temperature. `ServerReader` asks a server for what it
thinks of a prompt: a teacher that runs elsewhere, at T = 1 and as many tokens as the server gives.
"""

from trl_reasoning_distill.teacher.scoring.base import Reader
from trl_reasoning_distill.teacher.scoring.local import TransformersReader
from trl_reasoning_distill.teacher.scoring.server import ServerReader

__all__ = ["Reader", "ServerReader", "TransformersReader"]
