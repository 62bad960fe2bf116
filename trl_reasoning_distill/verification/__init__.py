"""Is this answer right? See `verify.py`; the comparison rules are in `comparison.py`."""

from trl_reasoning_distill.data.schema import Verdict
from trl_reasoning_distill.verification.extract import ExtractedAnswer, extract_answer
from trl_reasoning_distill.verification.verify import answer_key, verify_answer, verify_answers

__all__ = ["ExtractedAnswer", "Verdict", "answer_key", "extract_answer", "verify_answer", "verify_answers"]
