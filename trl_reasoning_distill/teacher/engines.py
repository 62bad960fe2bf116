"""`teacher.sampling` by its name in 0.1.0, which the pages taught; goes with 0.3."""

import warnings

from trl_reasoning_distill.teacher.sampling import *  # noqa: F403

warnings.warn("trl_reasoning_distill.teacher.engines is now teacher.sampling.", DeprecationWarning, stacklevel=2)
